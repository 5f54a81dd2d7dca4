//! The machine's own thread: the door, the console, and the life of the virtual machine between them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use vmm_sys_util::eventfd::EventFd;
use vswitch_door::sys::{self, Epoll};
use vswitch_wire::door::{DoorMessage, MAX_FRAME};

use crate::args::Options;
use crate::calls;
use crate::console::{Console, Output};
use crate::devices::Ports;
use crate::door::{Door, Event, Refusal};
use crate::error::{Context, Error, Result};
use crate::requests::Requests;
use crate::synic::Waiting;
use crate::vm::Vm;

mod life;
mod terminal;

use life::{Clock, Reset, Running};
use terminal::Patience;

/// How the machine ended; the process's exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Off = 0,
    Crashed = 3,
    Abandoned = 4,
    /// Somebody on this machine ended it, with a signal.
    Terminated = 5,
}

const ERROR_INTERNAL: u32 = 8;
/// The most that one HELLO carries: 16 regions and 64 interrupts.
const MOST_FDS: usize = 80;
/// The first connection may take this long, however short the grace period is.
const FIRST_GRACE: Duration = Duration::from_secs(20);

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
    /// The console's client with the events that epoll has of it, and the listener's.
    client: Option<(RawFd, u32)>,
    listening: u32,
    patience: Patience,
    /// Room for one frame of the door.
    buffer: Vec<u8>,
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
            listening: READ,
            patience: Patience::default(),
            buffer: vec![0; MAX_FRAME],
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
        let mut retry = None;
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
    fn timeout(&self, retry: Option<Duration>) -> i32 {
        let grace = self
            .socket
            .is_none()
            .then(|| self.deadline.saturating_duration_since(Instant::now()));
        let reset = self.running.as_ref().and_then(Running::reset_due);
        let soonest = grace.into_iter().chain(reset).chain(retry).min();
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
                self.serve_client(what);
                Ok(())
            }
            TERMINATED => {
                self.say("told to end by a signal");
                self.end = Some(End::Terminated);
                Ok(())
            }
            OUTPUT => {
                self.output.take_event();
                Ok(())
            }
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
        running.clock = Clock::Set;
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
        // A turn is bounded, so that the console is served beside a busy host.
        for _ in 0..64 {
            let Some(socket) = &self.socket else {
                return Ok(());
            };
            let received = match sys::receive(socket.as_raw_fd(), &mut self.buffer, MOST_FDS) {
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
            let frame = self.buffer.get(..received.length).unwrap_or_default();
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
