//! An endpoint whose other side is code in this process: two bounded queues with an eventfd each.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vswitch_memory::eventfd;

use crate::drops::DropReason;
use crate::endpoint::{Batch, Endpoint, FrameRef, Meta, HEAD_BYTES};
use crate::segment::Segment;

type Queue = VecDeque<(Vec<u8>, Meta)>;

struct Shared {
    limit: usize,
    to_switch: Mutex<Queue>,
    from_switch: Mutex<Queue>,
    wake: OwnedFd,
    ready: OwnedFd,
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The side of the program.
#[derive(Clone)]
pub struct QueuePeer(Arc<Shared>);

/// The side of the switch.
pub struct QueueEndpoint {
    shared: Arc<Shared>,
    /// Frames of the batch under way: its tails point into them.
    lent: Vec<Vec<u8>>,
    unsignalled: bool,
}

/// Makes both sides; `limit` frames wait in each direction at most.
pub fn pair(limit: usize) -> std::io::Result<(QueuePeer, QueueEndpoint)> {
    let fd = || {
        let fd = eventfd::create()?;
        // SAFETY: a new fd that nobody else owns.
        Ok::<OwnedFd, std::io::Error>(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    let shared = Arc::new(Shared {
        limit,
        to_switch: Mutex::default(),
        from_switch: Mutex::default(),
        wake: fd()?,
        ready: fd()?,
    });
    let endpoint = QueueEndpoint {
        shared: shared.clone(),
        lent: Vec::new(),
        unsignalled: false,
    };
    Ok((QueuePeer(shared), endpoint))
}

impl QueuePeer {
    /// Gives a frame to the switch; false = the queue is full.
    pub fn send(&self, data: Vec<u8>, meta: Meta) -> bool {
        let mut queue = lock(&self.0.to_switch);
        if queue.len() >= self.0.limit {
            return false;
        }
        queue.push_back((data, meta));
        drop(queue);
        eventfd::signal(self.0.wake.as_raw_fd());
        true
    }

    /// Takes all frames that the switch delivered since the last call.
    pub fn received(&self) -> Vec<(Vec<u8>, Meta)> {
        eventfd::drain(self.0.ready.as_raw_fd());
        lock(&self.0.from_switch).drain(..).collect()
    }

    /// Readable while frames from the switch wait.
    pub fn fd(&self) -> RawFd {
        self.0.ready.as_raw_fd()
    }
}

impl Endpoint for QueueEndpoint {
    fn wake_fd(&self) -> RawFd {
        self.shared.wake.as_raw_fd()
    }

    fn receive(&mut self, batch: &mut Batch) -> bool {
        self.lent.clear();
        let mut queue = lock(&self.shared.to_switch);
        while !batch.is_full() {
            let Some((data, meta)) = queue.pop_front() else {
                return false;
            };
            let Some(mut frame) = batch.begin() else {
                return true;
            };
            let head = data.len().min(HEAD_BYTES);
            frame.head(head).copy_from_slice(&data[..head]);
            if data.len() > head {
                // SAFETY: the bytes stay in `lent` until the next `receive`, which comes after `flush`.
                let tail = unsafe { Segment::new(data[head..].as_ptr(), data.len() - head) };
                if !frame.tail(tail) {
                    drop(frame);
                    batch.drop_one(DropReason::InvalidPacket);
                    continue;
                }
            }
            if frame.finish(meta) {
                self.lent.push(data);
            }
        }
        !queue.is_empty()
    }

    fn transmit(&mut self, frame: &FrameRef<'_>) -> Result<(), DropReason> {
        let mut queue = lock(&self.shared.from_switch);
        if queue.len() >= self.shared.limit {
            return Err(DropReason::Resources);
        }
        queue.push_back((frame.to_vec(usize::MAX), frame.meta));
        self.unsignalled = true;
        Ok(())
    }

    fn flush(&mut self) {
        if std::mem::take(&mut self.unsignalled) {
            eventfd::signal(self.shared.ready.as_raw_fd());
        }
    }

    fn rearm(&mut self) -> bool {
        !lock(&self.shared.to_switch).is_empty()
    }
}
