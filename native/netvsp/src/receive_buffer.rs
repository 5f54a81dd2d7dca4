//! The receive buffer: guest memory in sub-allocations that the host fills and the guest gives back.

use vswitch_memory::{BufferView, MemoryError};

use vswitch_switch::endpoint::FrameRef;

use crate::guest_bytes::copy_frame;
use crate::limits::{CONTROL_RESERVE, MAX_QUEUES};

const END: u32 = u32::MAX;
const NOBODY: u8 = u8::MAX;
const _: () = assert!(MAX_QUEUES < NOBODY as usize);

/// Sub-allocations of `size` bytes; the last [`CONTROL_RESERVE`] free ones are for control messages only.
pub(crate) struct ReceiveBuffer {
    view: BufferView,
    pub(crate) id: u16,
    pub(crate) size: usize,
    free: Vec<u32>,
    /// For a sub-allocation that is out: the next one of the same packet.
    next: Vec<u32>,
    /// The queue by which a packet that starts with this sub-allocation went out: its index is the transaction id.
    holder: Vec<u8>,
}

impl ReceiveBuffer {
    pub(crate) fn new(view: BufferView, id: u16, size: usize, count: usize) -> Self {
        ReceiveBuffer {
            view,
            id,
            size,
            free: (0..count as u32).rev().collect(),
            next: vec![END; count],
            holder: vec![NOBODY; count],
        }
    }

    pub(crate) fn free_count(&self) -> usize {
        self.free.len()
    }

    /// A free sub-allocation; None when only the control reserve (or, for control, nothing) is left.
    pub(crate) fn take(&mut self, control: bool) -> Option<u32> {
        if self.free.len() <= if control { 0 } else { CONTROL_RESERVE } {
            return None;
        }
        self.free.pop()
    }

    pub(crate) fn put_back(&mut self, index: u32) {
        self.free.push(index);
    }

    /// Copies `data` to `offset` of sub-allocation `index`.
    pub(crate) fn write(&self, index: u32, offset: usize, data: &[u8]) -> Result<(), MemoryError> {
        self.view.write(index as usize * self.size + offset, data)
    }

    /// Copies `length` bytes of `frame`, from `from` on, to `offset` of sub-allocation `index`.
    pub(crate) fn write_frame(
        &self,
        index: u32,
        offset: usize,
        frame: &FrameRef<'_>,
        from: usize,
        length: usize,
    ) -> Result<(), MemoryError> {
        let at = index as usize * self.size + offset;
        copy_frame(frame, from, &self.view, at, length)
    }

    /// Notes that `indices` went out in one packet of `queue`; its transaction id.
    pub(crate) fn sent(&mut self, indices: &[u32], queue: usize) -> u64 {
        let Some(&head) = indices.first() else {
            return 0;
        };
        self.holder[head as usize] = queue as u8;
        for pair in indices.windows(2) {
            self.next[pair[0] as usize] = pair[1];
        }
        u64::from(head)
    }

    /// The guest gave a packet's sub-allocations back on `queue`; false if it held no such packet.
    pub(crate) fn completed(&mut self, transaction_id: u64, queue: usize) -> bool {
        let Some(holder) = usize::try_from(transaction_id)
            .ok()
            .and_then(|index| self.holder.get_mut(index))
        else {
            return false;
        };
        if usize::from(*holder) != queue {
            return false;
        }
        *holder = NOBODY;
        let before = self.free.len();
        let mut index = transaction_id as u32;
        while index != END {
            self.free.push(index);
            index = std::mem::replace(&mut self.next[index as usize], END);
        }
        // The first of them is the next to be taken, as before.
        self.free[before..].reverse();
        true
    }

    /// The queue is closed: what went out by it comes back by itself.
    pub(crate) fn reclaim(&mut self, queue: usize) {
        for index in 0..self.holder.len() {
            self.completed(index as u64, queue);
        }
    }
}
