//! The worker thread of one datapath: polls while there is work, sleeps on epoll when there is none.
//!
//! # Life cycle
//! [`Worker::start`] makes the thread; [`Worker::call`] runs a closure on it between two batches and waits for the
//! result; dropping the worker ends the thread. What a call took away (an endpoint, a port, an extension's rings) is
//! out of use once [`Worker::quiesce`] has returned true: the worker passes a quiescent point between two batches.
//!
//! # Threads
//! The core belongs to the worker alone. Callers block for at most one batch, behind a barrier for what it takes from
//! the endpoints: `BARRIER_ROUNDS` batches of each at most.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vswitch_epoch::Epochs;
use vswitch_memory::eventfd;

use crate::clock::Clock;
use crate::core::Core;
use crate::endpoint::{Batch, Endpoint};
use crate::events::EventQueue;
use crate::limits::Limits;
use crate::poller::Poller;
use crate::upcall::{Channel, Link};

const COMMANDS: u64 = u64::MAX;
/// Tokens of extensions have this bit; those of ports are their ids.
const EXTENSION: u64 = 1 << 63;
const COMMANDS_PER_TURN: usize = 64;
/// Batches that a barrier takes from each endpoint at most: a guest that never pauses holds it no longer.
const BARRIER_ROUNDS: usize = 256;
const QUIESCENCE_LIMIT: Duration = Duration::from_secs(5);

type Command = Box<dyn FnOnce(&mut State) + Send>;

/// The core with what the worker needs to serve it.
pub struct State {
    pub core: Core,
    poller: Poller,
    /// Ports that may have frames, each once.
    ready: VecDeque<u32>,
    ends: bool,
}

impl State {
    /// Connects an endpoint; the caller has checked that the port exists and has none.
    pub fn attach(&mut self, port_id: u32, endpoint: Box<dyn Endpoint>) -> Result<(), String> {
        let fd = endpoint.wake_fd();
        self.poller
            .add(fd, u64::from(port_id))
            .map_err(|error| format!("its wake-up fd cannot be polled: {error}"))?;
        self.core.attach(port_id, endpoint);
        self.make_ready(port_id);
        Ok(())
    }

    /// Lets go of the port's endpoint and drops it.
    pub fn detach(&mut self, port_id: u32) {
        if let Some(fd) = self.core.wake_fd(port_id) {
            self.poller.remove(fd);
        }
        self.ready.retain(|&ready| ready != port_id);
        self.core.detach(port_id);
    }

    pub fn remove_port(&mut self, port_id: u32) {
        self.detach(port_id);
        self.core.remove_port(port_id);
    }

    /// Replaces the extension list; on an error nothing has changed.
    pub fn set_extensions(&mut self, channels: Vec<Channel>) -> Result<(), String> {
        let order: Vec<u64> = channels.iter().map(|channel| channel.id).collect();
        let deadline_ns = self.core.limits().upcall_deadline_ns;
        let mut fresh = Vec::new();
        for channel in channels {
            if !self.core.has_link(channel.id) {
                fresh.push(Link::new(channel, deadline_ns)?);
            }
        }
        for (index, link) in fresh.iter().enumerate() {
            let token = EXTENSION | link.channel.id;
            if let Err(error) = self.poller.add(link.reply_fd(), token) {
                // The extension holds the eventfd too, so that closing ours would not end the polling.
                for link in &fresh[..index] {
                    self.poller.remove(link.reply_fd());
                }
                return Err(format!(
                    "extension {}: its reply fd cannot be polled: {error}",
                    link.name
                ));
            }
        }
        for link in self.core.set_links(order, fresh) {
            self.poller.remove(link.reply_fd());
        }
        Ok(())
    }

    /// Takes what waits in the endpoints, then tells by an event when no frame waits for an extension.
    pub fn barrier(&mut self, id: u64, batch: &mut Batch) {
        for _ in 0..BARRIER_ROUNDS {
            let mut busy = false;
            for port_id in self.core.connected_ports() {
                if self.core.service(port_id, batch) {
                    busy = true;
                    // What the last round leaves is work all the same.
                    self.make_ready(port_id);
                }
            }
            if !busy {
                break;
            }
        }
        self.core.barrier(id);
    }

    /// Lets go of endpoints whose code panicked; what they do while they are dropped harms nobody.
    fn drop_broken(&mut self) {
        for (port_id, endpoint) in self.core.take_broken() {
            let poller = &self.poller;
            self.ready.retain(|&ready| ready != port_id);
            let _dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                poller.remove(endpoint.wake_fd());
                drop(endpoint);
            }));
        }
    }

    fn make_ready(&mut self, port_id: u32) {
        if !self.ready.contains(&port_id) {
            self.ready.push_back(port_id);
        }
    }

    /// One turn: a batch of every ready port, then whatever woke us.
    fn turn(
        &mut self,
        batch: &mut Batch,
        tokens: &mut Vec<u64>,
        quiescence: &vswitch_epoch::Worker,
    ) {
        for _ in 0..self.ready.len() {
            let Some(port_id) = self.ready.pop_front() else {
                break;
            };
            if self.core.service(port_id, batch) {
                self.ready.push_back(port_id);
            }
        }
        self.drop_broken();
        let timeout_ms = if self.ready.is_empty() {
            self.sleep_ms()
        } else {
            0
        };
        tokens.clear();
        if timeout_ms != 0 {
            quiescence.park();
        }
        self.poller.wait(timeout_ms, tokens);
        if timeout_ms != 0 {
            quiescence.unpark();
        }
        for &token in tokens.iter() {
            if token == COMMANDS {
                continue;
            }
            if token & EXTENSION != 0 {
                self.core.replies(token & !EXTENSION);
            } else if let Ok(port_id) = u32::try_from(token) {
                self.make_ready(port_id);
            }
        }
        if !self.core.clock().is_manual() && self.core.clock().now_ns() >= self.core.next_due_ns() {
            self.core.run_timers();
        }
    }

    /// Milliseconds to sleep when there is nothing to do: with a manual clock, until somebody calls.
    fn sleep_ms(&self) -> i32 {
        if self.core.clock().is_manual() {
            return -1;
        }
        let left_ns = self
            .core
            .next_due_ns()
            .saturating_sub(self.core.clock().now_ns());
        i32::try_from(left_ns.div_ceil(1_000_000)).unwrap_or(i32::MAX)
    }
}

/// The thread is gone: it ended, or an endpoint's code panicked on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerGone;

impl std::fmt::Display for WorkerGone {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("the datapath's worker thread has ended; make a new switch")
    }
}

impl std::error::Error for WorkerGone {}

/// The owner's handle of a datapath.
pub struct Worker {
    commands: Mutex<Sender<Command>>,
    wake: Arc<OwnedFd>,
    thread: Mutex<Option<JoinHandle<()>>>,
    epochs: Epochs,
    pub events: Arc<EventQueue>,
    pub clock: Clock,
}

impl Worker {
    /// Starts the thread, named `vswitch-data`.
    pub fn start(limits: Limits, clock: Clock) -> std::io::Result<Self> {
        let fd = eventfd::create()?;
        // SAFETY: a new fd that nobody else owns.
        let wake = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
        let events = Arc::new(EventQueue::new()?);
        let poller = Poller::new()?;
        poller.add(wake.as_raw_fd(), COMMANDS)?;
        let (commands, received) = channel();
        let core = Core::new(limits, clock.clone(), events.clone());
        let state = State {
            core,
            poller,
            ready: VecDeque::new(),
            ends: false,
        };
        let waker = wake.clone();
        let epochs = Epochs::new();
        let quiescence = epochs.register();
        let thread = std::thread::Builder::new()
            .name("vswitch-data".into())
            .spawn(move || run(state, &received, waker.as_raw_fd(), &quiescence))?;
        Ok(Worker {
            commands: Mutex::new(commands),
            wake,
            thread: Mutex::new(Some(thread)),
            epochs,
            events,
            clock,
        })
    }

    /// Waits until the worker has passed a quiescent point; false = it did not within five seconds.
    pub fn quiesce(&self) -> bool {
        self.epochs.wait(QUIESCENCE_LIMIT)
    }

    /// Runs `action` on the worker between two batches and waits for its result.
    pub fn call<R: Send + 'static>(
        &self,
        action: impl FnOnce(&mut State) -> R + Send + 'static,
    ) -> Result<R, WorkerGone> {
        let (answer, answered) = channel();
        self.send(Box::new(move |state| {
            // The caller may have given up waiting; nobody else wants the result.
            let _unwanted = answer.send(action(state));
        }))?;
        answered.recv().map_err(|_| WorkerGone)
    }

    /// Ends the thread and waits for it. All endpoints are dropped on the way.
    pub fn stop(&self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            if self.send(Box::new(|state| state.ends = true)).is_ok() {
                // A panic on the worker has been reported on stderr by the standard hook.
                let _panicked = thread.join();
            }
        }
    }

    fn send(&self, command: Command) -> Result<(), WorkerGone> {
        let sent = self
            .commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(command);
        sent.map_err(|_| WorkerGone)?;
        eventfd::signal(self.wake.as_raw_fd());
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(
    mut state: State,
    commands: &Receiver<Command>,
    wake_fd: RawFd,
    quiescence: &vswitch_epoch::Worker,
) {
    let mut batch = Batch::new();
    let mut tokens = Vec::new();
    quiescence.unpark();
    while !state.ends {
        quiescence.quiesce();
        eventfd::drain(wake_fd);
        let mut taken = 0;
        while let Ok(command) = commands.try_recv() {
            command(&mut state);
            taken += 1;
            if taken == COMMANDS_PER_TURN {
                eventfd::signal(wake_fd);
                break;
            }
        }
        if !state.ends {
            state.turn(&mut batch, &mut tokens, quiescence);
        }
    }
}
