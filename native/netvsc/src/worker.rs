//! The thread of one virtual processor: owns its interrupt and event flags, and the data paths of its channels.
//!
//! Commands come through a queue and an eventfd; what the driver must see goes back through `Shared`. Nothing here calls
//! into Python. A path that was closed is touched no more when `close` returns.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use vswitch_memory::{eventfd, GuestMemory, EVENT_FLAG_BYTES_PER_SINT};

use crate::path::Path;

const INTERRUPT: u64 = 0;
const COMMAND: u64 = 1;
const FIRST_PATH: u64 = 2;

/// What the driver's thread asks of the worker.
pub enum Command {
    Open(u64, u32, Box<Path>),
    Act(u64, Box<dyn FnOnce(&mut Path) + Send>),
    Close(u64, SyncSender<()>),
    End,
}

/// Flags that belong to no data path of this worker.
pub struct Strays {
    flags: Mutex<BTreeSet<u32>>,
    fd: OwnedFd,
}

impl Strays {
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Takes all; clears the eventfd.
    pub fn take(&self) -> Vec<u32> {
        eventfd::drain(self.fd());
        let mut flags = self.flags.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *flags).into_iter().collect()
    }

    fn add(&self, found: impl Iterator<Item = u32>) {
        let mut flags = self.flags.lock().unwrap_or_else(PoisonError::into_inner);
        let before = flags.len();
        flags.extend(found);
        if flags.len() > before {
            eventfd::signal(self.fd());
        }
    }
}

/// Handle of the thread; ends it when dropped.
pub struct Worker {
    commands: Sender<Command>,
    command_fd: Arc<OwnedFd>,
    strays: Arc<Strays>,
    next: Mutex<u64>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

pub fn owned_eventfd() -> io::Result<OwnedFd> {
    let fd = eventfd::create()?;
    // SAFETY: `fd` is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Worker {
    /// `interrupt` is the VP's eventfd; flags of `sint` live in the page at `siefp_gpa`.
    pub fn start(
        memory: Arc<GuestMemory>,
        interrupt: OwnedFd,
        siefp_gpa: u64,
        sint: u32,
    ) -> io::Result<Self> {
        let flags_at = siefp_gpa + u64::from(sint) * EVENT_FLAG_BYTES_PER_SINT;
        memory
            .check(flags_at, EVENT_FLAG_BYTES_PER_SINT)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let command_fd = Arc::new(owned_eventfd()?);
        let strays = Arc::new(Strays {
            flags: Mutex::new(BTreeSet::new()),
            fd: owned_eventfd()?,
        });
        let (commands, receiver) = mpsc::channel();
        let state = State {
            epoll: epoll_create()?,
            memory,
            interrupt,
            flags_at,
            commands: receiver,
            command_fd: Arc::clone(&command_fd),
            strays: Arc::clone(&strays),
            paths: BTreeMap::new(),
        };
        state.watch(state.interrupt.as_raw_fd(), INTERRUPT)?;
        state.watch(state.command_fd.as_raw_fd(), COMMAND)?;
        let thread = thread::Builder::new()
            .name("netvsc-vp".into())
            .spawn(move || state.run())?;
        Ok(Self {
            commands,
            command_fd,
            strays,
            next: Mutex::new(FIRST_PATH),
            thread: Mutex::new(Some(thread)),
        })
    }

    pub fn strays(&self) -> &Strays {
        &self.strays
    }

    /// Runs a path; returns its key.
    pub fn open(&self, relid: u32, path: Path) -> u64 {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let key = *next;
        *next += 1;
        drop(next);
        self.send(Command::Open(key, relid, Box::new(path)));
        key
    }

    /// Has the worker do this to the path, if it is still there.
    pub fn act(&self, key: u64, act: impl FnOnce(&mut Path) + Send + 'static) {
        self.send(Command::Act(key, Box::new(act)));
    }

    /// Drops the path; returns when the worker has let go of its memory. Blocks for one turn of the worker.
    pub fn close(&self, key: u64) {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.send(Command::Close(key, sender));
        // An error means that the worker ended, which drops every path too.
        let _ = receiver.recv();
    }

    /// Ends the thread and everything on it.
    pub fn end(&self) {
        self.send(Command::End);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            eventfd::signal(self.command_fd.as_raw_fd());
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

fn epoll_create() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is checked.
    let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

struct Running {
    relid: u32,
    path: Box<Path>,
    due: bool,
    interrupted: bool,
}

struct State {
    epoll: OwnedFd,
    memory: Arc<GuestMemory>,
    interrupt: OwnedFd,
    flags_at: u64,
    commands: Receiver<Command>,
    command_fd: Arc<OwnedFd>,
    strays: Arc<Strays>,
    paths: BTreeMap<u64, Running>,
}

impl State {
    /// Edge-triggered: who is told reads until there is nothing.
    fn watch(&self, fd: RawFd, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events: (libc::EPOLLIN | libc::EPOLLET) as u32,
            u64: token,
        };
        // SAFETY: both descriptors are open and `event` is valid during the call.
        let done =
            unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn unwatch(&self, fd: RawFd) {
        // SAFETY: both descriptors are open; DEL ignores the event.
        unsafe {
            libc::epoll_ctl(
                self.epoll.as_raw_fd(),
                libc::EPOLL_CTL_DEL,
                fd,
                std::ptr::null_mut(),
            );
        }
    }

    fn run(mut self) {
        // Whatever was signalled before this thread owned the interrupt.
        let mut busy = self.on_interrupt();
        loop {
            let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
            let patience = if busy { 0 } else { -1 };
            // SAFETY: `events` is writable for its length.
            let count = unsafe {
                libc::epoll_wait(
                    self.epoll.as_raw_fd(),
                    events.as_mut_ptr(),
                    events.len() as i32,
                    patience,
                )
            };
            let count = usize::try_from(count).unwrap_or(0);
            for event in events.iter().take(count) {
                match event.u64 {
                    INTERRUPT => {
                        self.on_interrupt();
                    }
                    COMMAND => {
                        if !self.on_commands() {
                            return;
                        }
                    }
                    key => {
                        if let Some(running) = self.paths.get_mut(&key) {
                            running.path.link_is_ready();
                            running.due = true;
                        }
                    }
                }
            }
            busy = false;
            for running in self.paths.values_mut() {
                if running.due {
                    let interrupted = std::mem::take(&mut running.interrupted);
                    let more = running.path.turn(interrupted);
                    running.due = more;
                    running.interrupted = more;
                    busy |= more;
                }
            }
        }
    }

    /// Clears flags and makes every path look: a host without atomics may lose a flag, never the wake-up.
    fn on_interrupt(&mut self) -> bool {
        eventfd::drain(self.interrupt.as_raw_fd());
        let mut flags = [0u8; EVENT_FLAG_BYTES_PER_SINT as usize];
        if self.memory.take_flags(self.flags_at, &mut flags).is_ok() {
            let paths = &self.paths;
            let set = (0u32..).zip(flags).filter(|(_, byte)| *byte != 0);
            let found: Vec<u32> = set
                .flat_map(|(index, byte)| {
                    (0..8)
                        .filter(move |bit| byte >> bit & 1 != 0)
                        .map(move |bit| index * 8 + bit)
                })
                .filter(|flag| !paths.values().any(|running| running.relid == *flag))
                .collect();
            if !found.is_empty() {
                self.strays.add(found.into_iter());
            }
        }
        for running in self.paths.values_mut() {
            running.due = true;
            running.interrupted = true;
        }
        !self.paths.is_empty()
    }

    /// False when the worker is to end.
    fn on_commands(&mut self) -> bool {
        eventfd::drain(self.command_fd.as_raw_fd());
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Open(key, relid, mut path) => {
                    if let Err(error) = self.watch(path.link_fd(), key) {
                        path.fault(&format!("its interface cannot be polled: {error}"));
                    }
                    let running = Running {
                        relid,
                        path,
                        due: true,
                        interrupted: true,
                    };
                    self.paths.insert(key, running);
                }
                Command::Act(key, act) => {
                    if let Some(running) = self.paths.get_mut(&key) {
                        act(&mut running.path);
                        running.due = true;
                    }
                }
                Command::Close(key, done) => {
                    if let Some(running) = self.paths.remove(&key) {
                        self.unwatch(running.path.link_fd());
                    }
                    let _ = done.send(());
                }
                Command::End => return false,
            }
        }
        true
    }
}
