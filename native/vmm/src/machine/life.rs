//! The virtual machine's life: made at HELLO, resumed, parked, reset; each step when processors and host are where it needs them.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;
use vswitch_door::sys;
use vswitch_wire::door::{DoorMessage, DOOR_VERSION, HELLO_RESUME};

use super::{drain, End, Machine, ACKNOWLEDGED, CONTROL, READ};
use crate::boot;
use crate::calls;
use crate::control::Control;
use crate::devices::Power;
use crate::door::{Answer, Shape, ERROR_STATE};
use crate::error::{Context, Result};
use crate::memory::Regions;
use crate::sandbox;
use crate::synic::{self, Slots, MSR_TIME_REF_COUNT};
use crate::vcpu::Processor;
use crate::vm::Vm;

/// From one start to the next at least: a guest that resets itself without end keeps nobody busy.
const RESET_PAUSE: Duration = Duration::from_secs(1);

/// How far a reset has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reset {
    No,
    Wanted,
    /// RESET with this sequence waits for RESET_DONE.
    Sent(u32),
}

/// Whether the machine has the partition's reference time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clock {
    Set,
    /// To be asked for once requests may be made.
    Due,
    /// MSR_READ with this sequence waits for its answer.
    Asked(u32),
}

/// What exists once HELLO has come.
pub(super) struct Running {
    pub(super) shape: Shape,
    pub(super) regions: Regions,
    pub(super) control: Arc<Control>,
    pub(super) slots: Vec<Arc<Slots>>,
    pub(super) vm: Option<Vm>,
    pub(super) interrupts: Vec<EventFd>,
    pub(super) reset: Reset,
    pub(super) clock: Clock,
    /// PARK with this sequence waits for PARKED.
    pub(super) parking: Option<u32>,
    pub(super) parked: bool,
    /// When the guest was started last.
    pub(super) started: Instant,
}

impl Running {
    /// Lets the processors run unless something wants them stopped.
    pub(super) fn go(&self) {
        if self.reset == Reset::No
            && self.clock == Clock::Set
            && self.parking.is_none()
            && !self.parked
        {
            self.control.run();
        }
    }

    /// How long a reset that is wanted has to wait yet.
    pub(super) fn reset_due(&self) -> Option<Duration> {
        let since = self.started.elapsed();
        (self.reset == Reset::Wanted && since < RESET_PAUSE).then(|| RESET_PAUSE - since)
    }
}

fn events_of(fds: Vec<OwnedFd>) -> Vec<EventFd> {
    fds.into_iter().map(calls::eventfd).collect()
}

impl Machine {
    /// HELLO: everything is made, the sandbox closed, and the guest started.
    pub(super) fn start(
        &mut self,
        sequence: u32,
        shape: Shape,
        memfds: Vec<OwnedFd>,
        interrupts: Vec<OwnedFd>,
    ) -> Result<()> {
        let regions = Regions::map(&shape.regions, memfds)?;
        let control = Arc::new(Control::new(shape.vp_count)?);
        self.watch(control.event().as_raw_fd(), CONTROL, 0, READ)?;
        let slots: Vec<Arc<Slots>> = (0..shape.vp_count).map(|_| Arc::default()).collect();
        for (vp, slots) in (0..).zip(&slots) {
            let processor = Processor {
                vp,
                memory: regions.memory.clone(),
                ports: Arc::clone(&self.ports),
                control: Arc::clone(&control),
                requests: Arc::clone(&self.requests),
                slots: Arc::clone(slots),
            };
            std::thread::Builder::new()
                .name(format!("vp{vp}"))
                .stack_size(256 << 10)
                .spawn(move || {
                    if let Err(error) = sandbox::confine_processor() {
                        // Without its sandbox no guest instruction runs.
                        eprintln!("vswitch-vmm: {error}");
                        std::process::exit(1);
                    }
                    processor.control.ready(vp);
                    processor.serve();
                })
                .context("starting a virtual processor's thread")?;
        }
        control.wait_ready();
        if !self.sandboxed {
            sandbox::confine_machine()?;
            self.sandboxed = true;
        }
        self.running = Some(Running {
            shape,
            regions,
            control,
            slots,
            vm: None,
            interrupts: events_of(interrupts),
            reset: Reset::No,
            clock: Clock::Due,
            parking: None,
            parked: false,
            started: Instant::now(),
        });
        self.build()?;
        let acknowledge = DoorMessage::HelloAck {
            version: DOOR_VERSION,
            flags: 0,
        };
        if let Some(socket) = &self.socket {
            self.requests.open(Arc::clone(socket));
        }
        self.requests.send(&acknowledge, sequence, &[]);
        self.ask_for_time();
        Ok(())
    }

    /// The partition's reference time is the host's: a new machine begins with it. Parked, it asks later.
    pub(super) fn ask_for_time(&mut self) {
        if let Some(running) = self.running.as_mut().filter(|running| !running.parked) {
            let question = DoorMessage::MsrRead {
                vp: 0,
                msr: MSR_TIME_REF_COUNT,
            };
            running.clock = Clock::Asked(self.requests.request(&question));
        }
    }

    pub(super) fn answered(&mut self, sequence: u32, answer: Answer) -> Result<()> {
        let Some(running) = self
            .running
            .as_mut()
            .filter(|running| running.clock == Clock::Asked(sequence))
        else {
            self.requests.answered(sequence, answer);
            return Ok(());
        };
        running.clock = Clock::Set;
        // Without the privilege the guest has no such counter either.
        if let (
            Answer::Msr {
                fault: false,
                value,
            },
            Some(vm),
        ) = (answer, &running.vm)
        {
            vm.set_reference_time(value)?;
        }
        running.go();
        Ok(())
    }

    /// A virtual machine with the kernel at its entry point; there is none at the moment, and no processor runs.
    pub(super) fn build(&mut self) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let entry = boot::load(
            &running.regions.memory,
            &mut self.kernel,
            self.initrd.as_mut(),
            &self.cmdline,
            running.shape.vp_count,
        )?;
        let (mut vm, vcpus) = Vm::create(
            &self.kvm,
            &running.regions.memory,
            running.shape.vp_count,
            running.shape.privileges,
            entry,
            &self.ports.serial_irq,
        )?;
        vm.bind_interrupts(&running.interrupts)?;
        for (number, fd) in (ACKNOWLEDGED..).zip(vm.acknowledged()) {
            self.epoll
                .update(fd.as_raw_fd(), number, 0, READ)
                .context("epoll")?;
        }
        running.started = Instant::now();
        running.control.hand_out(vcpus);
        running.vm = Some(vm);
        Ok(())
    }

    /// HELLO of a restarted daemon: it gets its memory back and is told every register again.
    pub(super) fn resume(&mut self, sequence: u32, interrupts: Vec<OwnedFd>) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        running.interrupts = events_of(interrupts);
        if let Some(vm) = &mut running.vm {
            vm.bind_interrupts(&running.interrupts)?;
        }
        let memfds = running.regions.memfds()?;
        let acknowledge = DoorMessage::HelloAck {
            version: DOOR_VERSION,
            flags: HELLO_RESUME,
        };
        if let Some(socket) = &self.socket {
            // Before requests are let through: HELLO_ACK is the first frame.
            if let Ok(frame) = acknowledge.encode(sequence) {
                if let Err(error) = sys::send(socket.as_raw_fd(), &frame, &memfds) {
                    return self.lose(&error.to_string(), None);
                }
            }
            self.requests.open(Arc::clone(socket));
        }
        if running.reset == Reset::No {
            // All of them, also those that are as after a reset: the host holds what was written last before the door was lost.
            synic::tell_all(&running.slots, |vp, msr, value| {
                self.requests
                    .request(&DoorMessage::MsrWrite { vp, msr, value });
            });
        }
        self.say("the host is back");
        Ok(())
    }

    // --- stopping and starting ---

    pub(super) fn park(&mut self, sequence: u32) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        running.parking = Some(sequence);
        running.control.stop();
        Ok(())
    }

    pub(super) fn unpark(&mut self) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        if !std::mem::take(&mut running.parked) {
            return Ok(());
        }
        running.go();
        let due = running.clock == Clock::Due;
        // What was acknowledged while no EOM could be sent.
        self.look_for_taken();
        if due {
            self.ask_for_time();
        }
        Ok(())
    }

    /// The guest ended an interrupt or wrote EOM on this processor.
    pub(super) fn acknowledged(&mut self, vp: u64) -> Result<()> {
        let vm = self.running.as_ref().and_then(|it| it.vm.as_ref());
        if let Some(event) = vm.and_then(|vm| vm.acknowledged().get(vp as usize)) {
            drain(event)?;
            self.look_for_taken();
        }
        Ok(())
    }

    /// Which messages has the guest taken? Of every processor: one that crashed takes, on one processor, what lies in the
    /// others' slots too, and writes EOM on its own alone.
    fn look_for_taken(&mut self) {
        let Some(running) = self.running.as_ref().filter(|running| !running.parked) else {
            return;
        };
        let emptied = synic::all_emptied(&running.slots, &running.regions.memory);
        for vp in emptied.again {
            running.control.kick(vp);
        }
        for (vp, sint) in emptied.taken {
            self.end_message(vp, sint);
        }
    }

    pub(super) fn end_message(&mut self, vp: u32, sint: u32) {
        if self.door.end_of_message(vp, sint) {
            self.requests.send(&DoorMessage::Eom { vp, sint }, 0, &[]);
        }
    }

    /// Takes the next step of whatever waits for the processors to stop, or for the host.
    pub(super) fn advance(&mut self) -> Result<()> {
        if self.socket.is_none() && Instant::now() >= self.deadline {
            self.say("no host came back in time");
            self.end = Some(End::Abandoned);
        }
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        while let Some(power) = running.control.take_power() {
            match power {
                Power::Off => self.end = Some(End::Off),
                Power::Crashed(why) => {
                    let text = format!("[vmm {}: the guest crashed: {why}]\r\n", self.name);
                    self.output.append(text.as_bytes());
                    self.end = Some(End::Crashed);
                }
                Power::Reset if running.reset == Reset::No => {
                    running.reset = Reset::Wanted;
                    running.control.stop();
                    let text = format!("[vmm {}: the guest resets itself]\r\n", self.name);
                    self.output.append(text.as_bytes());
                }
                Power::Reset => {}
            }
        }
        let ended = running.control.take_ended();
        if !running.control.stopped() {
            for (vp, sint) in ended {
                self.end_message(vp, sint);
            }
            return Ok(());
        }
        let parking = running.parking.take();
        if parking.is_some() {
            running.parked = true;
        }
        let reset =
            running.reset == Reset::Wanted && running.reset_due().is_none() && !running.parked;
        for (vp, sint) in ended {
            self.end_message(vp, sint);
        }
        if let Some(sequence) = parking {
            self.requests.send(&DoorMessage::Parked, sequence, &[]);
        }
        if reset && self.requests.is_open() {
            self.ask_for_reset()?;
        }
        Ok(())
    }

    /// The machine stands still: the host lets go of all that the guest had.
    pub(super) fn ask_for_reset(&mut self) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        for slots in &running.slots {
            slots.forget(true);
        }
        if let Some(vm) = &mut running.vm {
            vm.forget_connections()?;
        }
        self.door.reset();
        running.reset = Reset::Sent(self.requests.request(&DoorMessage::Reset));
        Ok(())
    }

    pub(super) fn reset_done(&mut self, sequence: u32) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        if running.reset != Reset::Sent(sequence) {
            let why = "RESET_DONE that no RESET waits for";
            return self.lose(why, Some(ERROR_STATE));
        }
        self.say("the guest starts anew");
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        running.reset = Reset::No;
        running.clock = Clock::Due;
        running.control.give_up();
        // Its descriptors go with it, out of epoll too.
        running.vm = None;
        self.ports.reset()?;
        self.door.reset();
        self.build()?;
        self.ask_for_time();
        Ok(())
    }
}
