//! A capture tap: a bounded queue of sightings from the worker to whoever reads it, and an eventfd.

use std::collections::{HashSet, VecDeque};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vswitch_memory::eventfd;

use crate::drops::DropReason;
use crate::endpoint::Meta;
use crate::limits::Limits;

/// One sighting; see `vswitch.engine.CapturedFrame`.
#[derive(Clone, Debug)]
pub struct Sighting {
    pub timestamp_ns: u64,
    pub port_id: u32,
    pub outward: bool,
    pub packet_id: u64,
    pub data: Vec<u8>,
    pub original_length: usize,
    pub meta: Meta,
    pub drop: Option<(DropReason, Option<Arc<str>>, String)>,
}

/// What a tap wants to see.
pub struct TapFilter {
    /// `None` = all ports, later ones too.
    pub ports: Option<HashSet<u32>>,
    /// Bytes kept of each frame.
    pub snaplen: usize,
    pub drops: bool,
}

#[derive(Default)]
struct Queue {
    sightings: VecDeque<Sighting>,
    bytes: usize,
}

/// Shared by the worker, which fills it, and the reader.
pub struct Tap {
    pub filter: TapFilter,
    limit: usize,
    byte_limit: usize,
    queue: Mutex<Queue>,
    lost: AtomicU64,
    closed: AtomicBool,
    fd: OwnedFd,
}

impl Tap {
    pub fn new(filter: TapFilter, limits: &Limits) -> std::io::Result<Self> {
        let fd = eventfd::create()?;
        // SAFETY: a new fd that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Tap {
            filter,
            limit: limits.capture_frames,
            byte_limit: limits.capture_bytes,
            queue: Mutex::default(),
            lost: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            fd,
        })
    }

    /// Readable while sightings wait.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Ends it: the worker lets go of it at its next sighting.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    pub fn wants(&self, port_id: u32, dropped: bool) -> bool {
        (self.filter.drops || !dropped)
            && self
                .filter
                .ports
                .as_ref()
                .is_none_or(|ports| ports.contains(&port_id))
    }

    pub fn put(&self, sighting: Sighting) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = queue.bytes + sighting.data.len();
        if queue.sightings.len() >= self.limit || bytes > self.byte_limit {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.bytes = bytes;
        queue.sightings.push_back(sighting);
        if queue.sightings.len() == 1 {
            eventfd::signal(self.fd());
        }
    }

    /// Takes up to `limit` sightings, oldest first.
    pub fn read(&self, limit: usize) -> Vec<Sighting> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let count = limit.min(queue.sightings.len());
        let taken: Vec<Sighting> = queue.sightings.drain(..count).collect();
        queue.bytes -= taken.iter().map(|one| one.data.len()).sum::<usize>();
        if queue.sightings.is_empty() {
            eventfd::drain(self.fd());
        }
        taken
    }
}
