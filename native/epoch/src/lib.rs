//! The one epoch mechanism: what returns memory waits until every worker has passed a quiescent point.
//!
//! Life cycle. A control thread takes the object out of every place where a worker can find it, then calls `advance` (or
//! `defer`). A worker calls `quiesce` between batches, when it holds nothing that it found in shared places, and `park`
//! before it sleeps. Once `passed(epoch)` is true, no worker can still touch the object, and all its accesses happened
//! before. `wait` and `collect` build on that.
//!
//! Cost to a worker: one shared load per batch, and one private store when the epoch moved. No lock on a worker's path.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

mod sync {
    #[cfg(not(loom))]
    pub(crate) use std::sync::{
        atomic::{fence, AtomicU64, Ordering},
        Arc, Mutex, MutexGuard,
    };

    #[cfg(loom)]
    pub(crate) use loom::sync::{
        atomic::{fence, AtomicU64, Ordering},
        Arc, Mutex, MutexGuard,
    };
}

use sync::{fence, Arc, AtomicU64, Mutex, MutexGuard, Ordering};

/// A worker that holds nothing: asleep, or not yet started.
const PARKED: u64 = u64::MAX;

struct Slot {
    seen: AtomicU64,
}

type Deferred = Box<dyn FnOnce() + Send>;

struct Shared {
    global: AtomicU64,
    workers: Mutex<Vec<Arc<Slot>>>,
    deferred: Mutex<VecDeque<(u64, Deferred)>>,
}

/// A list stays usable after a thread panicked with it: both lists are valid between any two of their operations.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The control side; clones share one epoch counter.
#[derive(Clone)]
pub struct Epochs {
    shared: Arc<Shared>,
}

impl Default for Epochs {
    fn default() -> Self {
        Self::new()
    }
}

impl Epochs {
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                global: AtomicU64::new(1),
                workers: Mutex::new(Vec::new()),
                deferred: Mutex::new(VecDeque::new()),
            }),
        }
    }

    /// A new worker, parked. It leaves when dropped.
    pub fn register(&self) -> Worker {
        let slot = Arc::new(Slot {
            seen: AtomicU64::new(PARKED),
        });
        lock(&self.shared.workers).push(Arc::clone(&slot));
        Worker {
            slot,
            shared: Arc::clone(&self.shared),
        }
    }

    /// Starts a new epoch: what was taken out of the workers' reach before this call is free once it has `passed`.
    pub fn advance(&self) -> u64 {
        let epoch = self.shared.global.fetch_add(1, Ordering::AcqRel) + 1;
        // Against `unpark`: either it sees what was taken out, or `passed` sees it awake.
        fence(Ordering::SeqCst);
        epoch
    }

    /// Whether every worker has been at a quiescent point since `advance` gave `epoch`.
    pub fn passed(&self, epoch: u64) -> bool {
        lock(&self.shared.workers)
            .iter()
            .all(|slot| slot.seen.load(Ordering::Acquire) >= epoch)
    }

    /// Advances and waits; false when a worker has not passed within `timeout`. Never call it on a worker.
    pub fn wait(&self, timeout: Duration) -> bool {
        let epoch = self.advance();
        let deadline = Instant::now() + timeout;
        let mut pause = Duration::from_micros(10);
        while !self.passed(epoch) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
        true
    }

    /// Runs `action` in a later `collect`, when every worker has passed an epoch that starts now.
    pub fn defer(&self, action: impl FnOnce() + Send + 'static) {
        let epoch = self.advance();
        lock(&self.shared.deferred).push_back((epoch, Box::new(action)));
    }

    /// Runs what is due, in order, on this thread; gives how many actions still wait.
    pub fn collect(&self) -> usize {
        loop {
            let action = {
                let mut deferred = lock(&self.shared.deferred);
                match deferred.front() {
                    Some((epoch, _)) if self.passed(*epoch) => deferred.pop_front(),
                    _ => return deferred.len(),
                }
            };
            if let Some((_, action)) = action {
                action();
            }
        }
    }
}

/// A worker's side. Starts parked: call `unpark` before looking at shared places.
pub struct Worker {
    slot: Arc<Slot>,
    shared: Arc<Shared>,
}

impl Worker {
    /// A quiescent point: this worker holds nothing that it found in shared places.
    #[inline]
    pub fn quiesce(&self) {
        let epoch = self.shared.global.load(Ordering::Acquire);
        if self.slot.seen.load(Ordering::Relaxed) != epoch {
            self.slot.seen.store(epoch, Ordering::Release);
        }
    }

    /// Holds nothing until `unpark`: a sleeping worker delays nobody.
    pub fn park(&self) {
        self.slot.seen.store(PARKED, Ordering::Release);
    }

    /// Back from sleep; shared places may be looked at again.
    pub fn unpark(&self) {
        let epoch = self.shared.global.load(Ordering::Acquire);
        self.slot.seen.store(epoch, Ordering::Release);
        // Against `advance`: from here on this worker sees what was taken out, or is seen awake.
        fence(Ordering::SeqCst);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        lock(&self.shared.workers).retain(|slot| !Arc::ptr_eq(slot, &self.slot));
    }
}
