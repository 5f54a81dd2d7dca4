//! The door thread: owns every partition's door socket and hands validated frames to the daemon.
//!
//! Life cycle. `Doors::new` starts the thread; `open` gives it a connected socket; whole frames that passed every check of
//! the format come out of `take` in order, and `Closed` exactly once at the end of a door, nothing after it. `event_fd`
//! is readable while there is something to take. Dropping `Doors` closes all doors and joins the thread.
//!
//! Fairness and bounds. At most `frames_per_turn` frames of one door per turn, `frames_per_second` on average; a door whose
//! frames the owner has not worked off (`consumed`), or that does not take what it is sent, is not read meanwhile. So
//! neither memory nor other doors suffer from a guest that floods or sleeps.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use vswitch_memory::eventfd;
use vswitch_wire::door::{DoorMessage, MAX_TEXT};

mod link;
pub mod sys;

use link::{End, Link};
use sys::Epoll;

/// What one door may ask.
#[derive(Clone, Copy, Debug)]
pub struct Quotas {
    pub frames_per_turn: usize,
    pub frames_per_second: u32,
    pub frames_burst: u32,
    /// Frames the guest has not taken before its door is not read any more.
    pub send_backlog: usize,
    /// Frames the guest has not taken before its door is closed.
    pub send_limit: usize,
}

/// What happened at a door.
#[derive(Debug)]
pub enum Event {
    /// A checked frame, guest to host; the descriptors are the taker's.
    Frame {
        door: u64,
        data: Vec<u8>,
        fds: Vec<OwnedFd>,
    },
    /// The door is over.
    Closed { door: u64, reason: String },
}

enum Command {
    Open {
        socket: OwnedFd,
        number: u64,
        quotas: Quotas,
    },
    Send {
        number: u64,
        frame: Vec<u8>,
        fds: Vec<OwnedFd>,
    },
    ExpectFds {
        number: u64,
        count: usize,
    },
    Hold {
        number: u64,
        held: bool,
    },
    Consumed {
        number: u64,
        count: usize,
    },
    Close {
        number: u64,
        end: End,
    },
    Stop,
}

#[derive(Default)]
struct Queues {
    commands: Vec<Command>,
    events: Vec<Event>,
    last: u64,
}

struct Shared {
    queues: Mutex<Queues>,
    command_fd: OwnedFd,
    event_fd: OwnedFd,
}

impl Shared {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All doors of one process. Any thread may call any function; none waits.
pub struct Doors {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn owned_eventfd() -> io::Result<OwnedFd> {
    let fd = eventfd::create()?;
    // SAFETY: a new fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Doors {
    pub fn new() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queues: Mutex::default(),
            command_fd: owned_eventfd()?,
            event_fd: owned_eventfd()?,
        });
        let epoll = Epoll::new()?;
        epoll.update(shared.command_fd.as_raw_fd(), 0, 0, libc::EPOLLIN as u32)?;
        let mut worker = Worker {
            epoll,
            shared: Arc::clone(&shared),
            links: HashMap::new(),
        };
        let thread = std::thread::Builder::new()
            .name("doors".into())
            .spawn(move || worker.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    fn command(&self, command: Command) {
        self.shared.queues().commands.push(command);
        eventfd::signal(self.shared.command_fd.as_raw_fd());
    }

    /// Serves a connected SOCK_SEQPACKET socket; gives the door's number.
    pub fn open(&self, socket: OwnedFd, quotas: Quotas) -> u64 {
        let number = {
            let mut queues = self.shared.queues();
            queues.last += 1;
            let number = queues.last;
            queues.commands.push(Command::Open {
                socket,
                number,
                quotas,
            });
            number
        };
        eventfd::signal(self.shared.command_fd.as_raw_fd());
        number
    }

    /// Queues a frame. Ignored once the door is closed, as are the calls below.
    pub fn send(&self, number: u64, frame: Vec<u8>, fds: Vec<OwnedFd>) {
        self.command(Command::Send { number, frame, fds });
    }

    /// How many descriptors the next frame may carry; without this, any make the frame malformed.
    pub fn expect_fds(&self, number: u64, count: usize) {
        self.command(Command::ExpectFds { number, count });
    }

    /// Stops reading the guest's frames, or goes on.
    pub fn hold(&self, number: u64, held: bool) {
        self.command(Command::Hold { number, held });
    }

    /// `count` frames of a door have been worked off.
    pub fn consumed(&self, number: u64, count: usize) {
        self.command(Command::Consumed { number, count });
    }

    /// Sends ERROR if a code is given, then closes.
    pub fn close(&self, number: u64, reason: String, code: Option<u32>) {
        self.command(Command::Close {
            number,
            end: End { reason, code },
        });
    }

    /// Readable while `take` has something to give.
    pub fn event_fd(&self) -> RawFd {
        self.shared.event_fd.as_raw_fd()
    }

    /// Everything that happened since the last call. Bounded by the doors' quotas.
    pub fn take(&self) -> Vec<Event> {
        eventfd::drain(self.shared.event_fd.as_raw_fd());
        std::mem::take(&mut self.shared.queues().events)
    }
}

impl Drop for Doors {
    fn drop(&mut self) {
        self.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker {
    epoll: Epoll,
    shared: Arc<Shared>,
    links: HashMap<u64, Link>,
}

impl Worker {
    fn run(&mut self) {
        let mut ready = Vec::new();
        let mut events = Vec::new();
        loop {
            if self.epoll.wait(&mut ready, self.timeout()).is_err() {
                return;
            }
            if ready.iter().any(|(number, _)| *number == 0) {
                eventfd::drain(self.shared.command_fd.as_raw_fd());
                let commands = std::mem::take(&mut self.shared.queues().commands);
                for command in commands {
                    if !self.obey(command, &mut events) {
                        return;
                    }
                }
            }
            for (number, what) in ready.iter().copied().filter(|(number, _)| *number != 0) {
                self.serve(number, what, &mut events);
            }
            self.unthrottle(&mut events);
            if !events.is_empty() {
                self.shared.queues().events.append(&mut events);
                eventfd::signal(self.shared.event_fd.as_raw_fd());
            }
        }
    }

    /// Milliseconds until the next throttled door may be read.
    fn timeout(&self) -> i32 {
        let next = self
            .links
            .values()
            .filter_map(|link| link.throttled_until)
            .min();
        next.map_or(-1, |at| {
            at.saturating_duration_since(Instant::now()).as_millis() as i32 + 1
        })
    }

    fn unthrottle(&mut self, events: &mut Vec<Event>) {
        let now = Instant::now();
        let due: Vec<u64> = self
            .links
            .values()
            .filter(|link| link.throttled_until.is_some_and(|at| at <= now))
            .map(|link| link.number)
            .collect();
        for number in due {
            self.with(number, events, |link, _| {
                link.throttled_until = None;
                Ok(())
            });
        }
    }

    /// Acts on a door, then waits for what it now needs; ends the door when that fails.
    fn with(
        &mut self,
        number: u64,
        events: &mut Vec<Event>,
        act: impl FnOnce(&mut Link, &mut Vec<Event>) -> Result<(), End>,
    ) {
        let Some(link) = self.links.get_mut(&number) else {
            return;
        };
        if let Err(end) = act(link, events).and_then(|()| link.register(&self.epoll)) {
            self.end(number, end, events);
        }
    }

    fn end(&mut self, number: u64, end: End, events: &mut Vec<Event>) {
        let Some(mut link) = self.links.remove(&number) else {
            return;
        };
        if let Some(code) = end.code {
            let mut cut = end.reason.len().min(MAX_TEXT);
            while !end.reason.is_char_boundary(cut) {
                cut -= 1;
            }
            let text = end.reason.get(..cut).unwrap_or_default();
            if let Ok(frame) = (DoorMessage::DoorError { code, text }).encode(0) {
                link.send_error(&frame);
            }
        }
        link.unregister(&self.epoll);
        events.push(Event::Closed {
            door: number,
            reason: end.reason,
        });
    }

    fn serve(&mut self, number: u64, what: u32, events: &mut Vec<Event>) {
        self.with(number, events, |link, events| {
            if what & (libc::EPOLLOUT | libc::EPOLLERR | libc::EPOLLHUP) as u32 != 0 {
                link.flush()?;
            }
            if what & (libc::EPOLLIN | libc::EPOLLERR | libc::EPOLLHUP) as u32 != 0 {
                link.read(events)?;
            }
            Ok(())
        });
    }

    /// False: stop.
    fn obey(&mut self, command: Command, events: &mut Vec<Event>) -> bool {
        match command {
            Command::Open {
                socket,
                number,
                quotas,
            } => {
                self.links.insert(number, Link::new(number, socket, quotas));
                self.with(number, events, |_, _| Ok(()));
            }
            Command::Send { number, frame, fds } => {
                self.with(number, events, |link, _| link.send(frame, fds));
            }
            Command::ExpectFds { number, count } => self.with(number, events, |link, _| {
                link.fds_expected = count;
                Ok(())
            }),
            Command::Hold { number, held } => self.with(number, events, |link, _| {
                link.held = held;
                Ok(())
            }),
            Command::Consumed { number, count } => self.with(number, events, |link, _| {
                link.unread = link.unread.saturating_sub(count);
                Ok(())
            }),
            Command::Close { number, end } => self.end(number, end, events),
            Command::Stop => return false,
        }
        true
    }
}
