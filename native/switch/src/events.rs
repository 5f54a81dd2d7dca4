//! What a datapath tells its owner: a bounded queue and an eventfd.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use vswitch_memory::eventfd;

use crate::program::TraceStep;

/// Extension errors that wait to be read; more are dropped, the extension's counters tell of them.
const ERRORS_KEPT: usize = 256;

#[derive(Debug)]
pub enum Event {
    /// The extension broke the protocol, missed its deadline or died.
    ExtensionFailed {
        id: u64,
        why: String,
    },
    /// It answered that its code raised.
    ExtensionError {
        id: u64,
        why: String,
    },
    TraceDone {
        id: u64,
        steps: Vec<TraceStep>,
    },
    BarrierDone {
        id: u64,
    },
    /// The endpoint's code panicked: the port has none any more.
    PortDisconnected {
        port_id: u32,
        why: String,
    },
}

pub struct EventQueue {
    queue: Mutex<VecDeque<Event>>,
    fd: OwnedFd,
}

impl EventQueue {
    pub fn new() -> std::io::Result<Self> {
        let fd = eventfd::create()?;
        // SAFETY: a new fd that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(EventQueue {
            queue: Mutex::default(),
            fd,
        })
    }

    /// Readable while events wait.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub fn put(&self, event: Event) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(event, Event::ExtensionError { .. }) && queue.len() >= ERRORS_KEPT {
            return;
        }
        queue.push_back(event);
        if queue.len() == 1 {
            eventfd::signal(self.fd());
        }
    }

    pub fn take(&self) -> Vec<Event> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        eventfd::drain(self.fd());
        queue.drain(..).collect()
    }
}
