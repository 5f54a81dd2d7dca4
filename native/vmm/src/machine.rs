//! The machine's own thread: the door, the console, and the life of the virtual machine between them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use vmm_sys_util::eventfd::EventFd;
use vswitch_door::sys::{self, Epoll};
use vswitch_wire::door::{DoorMessage, DOOR_VERSION, HELLO_RESUME, MAX_FRAME};

use crate::args::Options;
use crate::boot;
use crate::calls;
use crate::console::{Console, Output};
use crate::control::Control;
use crate::devices::{Ports, Power};
use crate::door::{Answer, Door, Event, Refusal, Shape};
use crate::error::{Context, Error, Result};
use crate::memory::Regions;
use crate::requests::Requests;
use crate::sandbox;
use crate::synic::{Registers, Slots, Waiting, MSR_TIME_REF_COUNT};
use crate::vcpu::Processor;
use crate::vm::Vm;

/// How the machine ended; the process's exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Off = 0,
    Crashed = 3,
    Abandoned = 4,
}

const ERROR_INTERNAL: u32 = 8;
/// The most that one HELLO carries: 16 regions and 64 interrupts.
const MOST_FDS: usize = 80;
/// The first connection may take this long, however short the grace period is.
const FIRST_GRACE: Duration = Duration::from_secs(20);
/// When a slow reader or a full serial queue is looked at again.
const RETRY: Duration = Duration::from_millis(20);

const DOOR_LISTENER: u64 = 1;
const DOOR: u64 = 2;
const CONSOLE_LISTENER: u64 = 3;
const CONSOLE_CLIENT: u64 = 4;
const OUTPUT: u64 = 5;
const CONTROL: u64 = 6;
const REQUESTS: u64 = 7;
const TERMINATED: u64 = 8;
const ACKNOWLEDGED: u64 = 0x100;
const READ: u32 = libc::EPOLLIN as u32;
const WRITE: u32 = libc::EPOLLOUT as u32;

/// How far a reset has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    No,
    Wanted,
    /// RESET with this sequence waits for RESET_DONE.
    Sent(u32),
}

/// What exists once HELLO has come.
struct Running {
    shape: Shape,
    regions: Regions,
    control: Arc<Control>,
    slots: Vec<Arc<Slots>>,
    vm: Option<Vm>,
    interrupts: Vec<EventFd>,
    reset: Reset,
    /// The new machine waits for the answer to this question for its reference time.
    clock: Option<u32>,
    /// PARK with this sequence waits for PARKED.
    parking: Option<u32>,
    parked: bool,
}

impl Running {
    /// Lets the processors run unless something wants them stopped.
    fn go(&self) {
        if self.reset == Reset::No && self.clock.is_none() && self.parking.is_none() && !self.parked
        {
            self.control.run();
        }
    }
}

/// One machine from its start to its end.
pub struct Machine {
    kvm: Kvm,
    kernel: File,
    initrd: Option<File>,
    cmdline: String,
    name: String,
    grace: Duration,
    epoll: Epoll,
    listener: OwnedFd,
    socket: Option<Arc<OwnedFd>>,
    socket_events: u32,
    client: Option<(RawFd, u32)>,
    /// When the machine gives up waiting for its host.
    deadline: Instant,
    door: Door,
    requests: Arc<Requests>,
    output: Arc<Output>,
    console: Console,
    ports: Arc<Ports>,
    running: Option<Running>,
    terminated: EventFd,
    end: Option<End>,
    sandboxed: bool,
}

fn events_of(fds: Vec<OwnedFd>) -> Vec<EventFd> {
    fds.into_iter().map(calls::eventfd).collect()
}

impl Machine {
    /// `log` takes the console's output; the machine ends when `terminated` is readable.
    pub fn new(
        options: Options,
        kvm: Kvm,
        listener: OwnedFd,
        log: OwnedFd,
        terminated: EventFd,
    ) -> Result<Self> {
        let epoll = Epoll::new().context("epoll")?;
        calls::set_nonblocking(listener.as_fd());
        let output = Arc::new(Output::new()?);
        let machine = Self {
            console: Console::new(options.console, log),
            ports: Arc::new(Ports::new(Arc::clone(&output))?),
            requests: Arc::new(Requests::new()?),
            kernel: options.kernel,
            initrd: options.initrd,
            cmdline: options.cmdline,
            name: options.name,
            grace: options.grace,
            deadline: after(options.grace.max(FIRST_GRACE)),
            socket: None,
            socket_events: 0,
            client: None,
            door: Door::default(),
            running: None,
            end: None,
            sandboxed: false,
            kvm,
            epoll,
            listener,
            terminated,
            output,
        };
        for (fd, number) in [
            (machine.listener.as_raw_fd(), DOOR_LISTENER),
            (machine.console.listener().as_raw_fd(), CONSOLE_LISTENER),
            (machine.output.event().as_raw_fd(), OUTPUT),
            (machine.requests.event().as_raw_fd(), REQUESTS),
            (machine.terminated.as_raw_fd(), TERMINATED),
        ] {
            machine.epoll.update(fd, number, 0, READ).context("epoll")?;
        }
        Ok(machine)
    }

    /// Serves until the guest, the host or the grace period ends it.
    pub fn run(mut self) -> Result<End> {
        let mut ready = Vec::new();
        let mut retry = false;
        loop {
            let timeout = self.timeout(retry);
            self.epoll.wait(&mut ready, timeout).context("epoll")?;
            for &(number, what) in &ready {
                self.serve(number, what)?;
            }
            self.advance()?;
            retry = self.serve_console()?;
            if let Some(end) = self.end {
                self.console.pass_on(&self.output);
                return Ok(end);
            }
        }
    }

    /// Milliseconds to sleep at most.
    fn timeout(&self, retry: bool) -> i32 {
        let grace = self
            .socket
            .is_none()
            .then(|| self.deadline.saturating_duration_since(Instant::now()));
        let soonest = grace.into_iter().chain(retry.then_some(RETRY)).min();
        soonest.map_or(-1, |time| {
            i32::try_from(time.as_millis()).unwrap_or(i32::MAX - 1) + 1
        })
    }

    fn serve(&mut self, number: u64, what: u32) -> Result<()> {
        match number {
            DOOR_LISTENER => self.accept(),
            DOOR => self.serve_door(what),
            CONSOLE_LISTENER => {
                self.console.accept(&self.output);
                Ok(())
            }
            CONSOLE_CLIENT => {
                self.console.receive();
                Ok(())
            }
            TERMINATED => {
                self.end = Some(End::Off);
                Ok(())
            }
            OUTPUT => drain(self.output.event()),
            CONTROL => match &self.running {
                Some(running) => drain(running.control.event()),
                None => Ok(()),
            },
            REQUESTS => {
                drain(self.requests.event())?;
                self.flush()
            }
            _ => self.acknowledged(number.wrapping_sub(ACKNOWLEDGED)),
        }
    }

    // --- the door's connection ---

    fn accept(&mut self) -> Result<()> {
        if self.socket.is_some() {
            return Ok(());
        }
        if let Ok(fd) = calls::accept(self.listener.as_fd()) {
            self.watch(self.listener.as_raw_fd(), DOOR_LISTENER, READ, 0)?;
            self.watch(fd.as_raw_fd(), DOOR, 0, READ)?;
            self.socket_events = READ;
            self.socket = Some(Arc::new(fd));
            self.door.connected();
        }
        Ok(())
    }

    fn watch(&self, fd: RawFd, number: u64, before: u32, after: u32) -> Result<()> {
        self.epoll
            .update(fd, number, before, after)
            .context("epoll")
    }

    /// The connection is over; the guest goes on without its host.
    fn lose(&mut self, why: &str, code: Option<u32>) -> Result<()> {
        let Some(socket) = self.socket.take() else {
            return Ok(());
        };
        if let Some(code) = code {
            if let Ok(frame) = (DoorMessage::DoorError { code, text: why }).encode(0) {
                // The connection ends either way.
                let _ = sys::send(socket.as_raw_fd(), &frame, &[]);
            }
        }
        self.requests.close();
        self.watch(socket.as_raw_fd(), DOOR, self.socket_events, 0)?;
        drop(socket);
        self.watch(self.listener.as_raw_fd(), DOOR_LISTENER, 0, READ)?;
        self.deadline = after(self.grace);
        self.say(&format!("the door is closed: {why}"));
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        for slots in &running.slots {
            slots.forget(false);
        }
        if let Some(vm) = &mut running.vm {
            vm.forget_connections()?;
        }
        running.parking = None;
        running.parked = false;
        // The reference time stays what it is; a reset is asked for again.
        running.clock = None;
        if let Reset::Sent(_) = running.reset {
            running.reset = Reset::Wanted;
        }
        running.go();
        Ok(())
    }

    /// A line for the log, beside the guest's own.
    fn say(&self, text: &str) {
        self.output
            .append(format!("[vmm {}: {text}]\r\n", self.name).as_bytes());
    }

    fn flush(&mut self) -> Result<()> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let fd = socket.as_raw_fd();
        match self.requests.flush() {
            None => self.lose("the host's side is gone", None),
            Some(all) => {
                let events = if all { READ } else { READ | WRITE };
                self.watch(fd, DOOR, self.socket_events, events)?;
                self.socket_events = events;
                Ok(())
            }
        }
    }

    fn serve_door(&mut self, what: u32) -> Result<()> {
        if what & WRITE != 0 {
            self.flush()?;
        }
        let mut buffer = vec![0; MAX_FRAME];
        // A turn is bounded, so that the console is served beside a busy host.
        for _ in 0..64 {
            let Some(socket) = &self.socket else {
                return Ok(());
            };
            let received = match sys::receive(socket.as_raw_fd(), &mut buffer, MOST_FDS) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return self.lose(&error.to_string(), None),
            };
            if received.length == 0 {
                return self.lose("the host closed it", None);
            }
            if received.truncated || received.fds_discarded {
                let why = "a frame or its descriptors are longer than allowed";
                return self.lose(why, Some(crate::door::ERROR_MALFORMED));
            }
            let frame = buffer.get(..received.length).unwrap_or_default();
            match self.door.receive(frame, received.fds) {
                Ok(event) => self.obey(event)?,
                Err(Refusal { code, text }) => return self.lose(&text, Some(code)),
            }
        }
        Ok(())
    }

    // --- what the host asks ---

    fn obey(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Fresh {
                sequence,
                shape,
                memfds,
                interrupts,
            } => {
                if let Err(error) = self.start(sequence, shape, memfds, interrupts) {
                    self.lose(&error.to_string(), Some(ERROR_INTERNAL))?;
                    return Err(error);
                }
                Ok(())
            }
            Event::Resumed {
                sequence,
                interrupts,
            } => self.resume(sequence, interrupts),
            Event::Answered(sequence, answer) => self.answered(sequence, answer),
            Event::Reply(frame) => {
                self.requests.send_frame(frame, &[]);
                Ok(())
            }
            Event::Shutdown => {
                self.end = Some(End::Off);
                Ok(())
            }
            Event::Ended(why) => self.lose(&why, None),
            Event::Nothing => Ok(()),
            Event::Deliver { vp, sint, message } => self.deliver(vp, Waiting { sint, message }),
            Event::EventFd(connection, fd) => match self.vm() {
                Some(vm) => vm.set_connection(connection, fd),
                None => Ok(()),
            },
            Event::Park(sequence) => self.park(sequence),
            Event::Run => self.unpark(),
            Event::ResetDone(sequence) => self.reset_done(sequence),
        }
    }

    fn vm(&mut self) -> Option<&mut Vm> {
        self.running.as_mut()?.vm.as_mut()
    }

    fn deliver(&mut self, vp: u32, waiting: Waiting) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        if running.reset != Reset::No {
            // The host forgets it with the reset.
            return Ok(());
        }
        let (Some(vm), Some(slots)) = (&mut running.vm, running.slots.get(vp as usize)) else {
            return Ok(());
        };
        let line = vm.message_line(vp, waiting.sint)?;
        running.control.set_line(vp, waiting.sint, line);
        slots.queue(waiting);
        running.control.kick(vp);
        Ok(())
    }

    /// HELLO: everything is made, the sandbox closed, and the guest started.
    fn start(
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
            clock: None,
            parking: None,
            parked: false,
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

    /// The partition's reference time is the host's: a new machine begins with it.
    fn ask_for_time(&mut self) {
        if let Some(running) = &mut self.running {
            let question = DoorMessage::MsrRead {
                vp: 0,
                msr: MSR_TIME_REF_COUNT,
            };
            running.clock = Some(self.requests.request(&question));
        }
    }

    fn answered(&mut self, sequence: u32, answer: Answer) -> Result<()> {
        let Some(running) = self
            .running
            .as_mut()
            .filter(|running| running.clock == Some(sequence))
        else {
            self.requests.answered(sequence, answer);
            return Ok(());
        };
        running.clock = None;
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
    fn build(&mut self) -> Result<()> {
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
        running.control.hand_out(vcpus);
        running.vm = Some(vm);
        Ok(())
    }

    /// HELLO of a restarted daemon: it gets its memory back and is told every register again.
    fn resume(&mut self, sequence: u32, interrupts: Vec<OwnedFd>) -> Result<()> {
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
            for (vp, slots) in (0..).zip(&running.slots) {
                slots.with_registers(|registers| {
                    for (msr, value) in registers.changes(&Registers::default()) {
                        self.requests
                            .request(&DoorMessage::MsrWrite { vp, msr, value });
                    }
                });
            }
        }
        self.say("the host is back");
        Ok(())
    }

    // --- stopping and starting ---

    fn park(&mut self, sequence: u32) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        running.parking = Some(sequence);
        running.control.stop();
        Ok(())
    }

    fn unpark(&mut self) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        if !std::mem::take(&mut running.parked) {
            return Ok(());
        }
        running.go();
        let processors = 0..running.shape.vp_count;
        // What was acknowledged while no EOM could be sent.
        processors
            .into_iter()
            .try_for_each(|vp| self.acknowledged(u64::from(vp)))
    }

    /// The guest ended an interrupt or wrote EOM: which messages has it taken?
    fn acknowledged(&mut self, vp: u64) -> Result<()> {
        let Some(running) = &self.running else {
            return Ok(());
        };
        let (Some(vm), Some(slots)) = (&running.vm, running.slots.get(vp as usize)) else {
            return Ok(());
        };
        if let Some(event) = vm.acknowledged().get(vp as usize) {
            drain(event)?;
        }
        if running.parked {
            return Ok(());
        }
        let (taken, again) = slots.emptied(&running.regions.memory);
        if again {
            running.control.kick(vp as u32);
        }
        for sint in taken {
            self.end_message(vp as u32, sint);
        }
        Ok(())
    }

    fn end_message(&mut self, vp: u32, sint: u32) {
        if self.door.end_of_message(vp, sint) {
            self.requests.send(&DoorMessage::Eom { vp, sint }, 0, &[]);
        }
    }

    /// Takes the next step of whatever waits for the processors to stop, or for the host.
    fn advance(&mut self) -> Result<()> {
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
        let reset = running.reset == Reset::Wanted && !running.parked;
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
    fn ask_for_reset(&mut self) -> Result<()> {
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

    fn reset_done(&mut self, sequence: u32) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        if running.reset != Reset::Sent(sequence) {
            let why = "RESET_DONE that no RESET waits for";
            return self.lose(why, Some(crate::door::ERROR_STATE));
        }
        self.say("the guest starts anew");
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        running.reset = Reset::No;
        running.control.give_up();
        // Its descriptors go with it, out of epoll too.
        running.vm = None;
        self.ports.reset()?;
        self.door.reset();
        self.build()?;
        self.ask_for_time();
        Ok(())
    }

    // --- the console ---

    /// Moves the console's bytes; true when somebody must be looked at again soon.
    fn serve_console(&mut self) -> Result<bool> {
        let slow = self.console.pass_on(&self.output);
        let full = self.console.type_in(&self.ports);
        let wanted = self
            .console
            .client()
            .map(|fd| (fd, if self.console.wants_input() { READ } else { 0 }));
        if wanted != self.client {
            // A client that has gone took its place in epoll along when its descriptor was closed.
            let (fd, before) = match (self.client, wanted) {
                (Some((old, events)), Some((new, _))) if old == new => (new, events),
                (_, Some((new, _))) => (new, 0),
                (_, None) => (-1, 0),
            };
            if let Some((_, events)) = wanted {
                self.watch(fd, CONSOLE_CLIENT, before, events)?;
            }
            self.client = wanted;
            // The next one may be waiting.
            let listening = if wanted.is_some() {
                (READ, 0)
            } else {
                (0, READ)
            };
            let listener = self.console.listener().as_raw_fd();
            self.listen_console(listener, listening)?;
        }
        Ok(slow || full)
    }

    fn listen_console(&self, fd: RawFd, (before, after): (u32, u32)) -> Result<()> {
        match self.epoll.update(fd, CONSOLE_LISTENER, before, after) {
            Err(error)
                if !matches!(
                    error.raw_os_error(),
                    Some(libc::EEXIST) | Some(libc::ENOENT)
                ) =>
            {
                Err(Error::new(format!("epoll: {error}")))
            }
            _ => Ok(()),
        }
    }
}

/// A time from now; one beyond reckoning is as far as it goes.
fn after(time: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(time)
        .unwrap_or_else(|| now + Duration::from_secs(u64::from(u32::MAX)))
}

fn drain(event: &EventFd) -> Result<()> {
    match event.read() {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
            Err(Error::new(format!("eventfd: {error}")))
        }
        _ => Ok(()),
    }
}
