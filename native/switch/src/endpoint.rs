//! What a port is connected to: the [`Endpoint`] trait, the [`Batch`] it fills and the [`FrameRef`] it takes.
//!
//! # Life of a frame
//! An endpoint copies the frame's head once into the batch, out of the guest's reach, and names what follows by
//! [`Segment`]s of guest memory. The worker judges the head alone, and hands a [`FrameRef`] to every destination,
//! which writes the head from the private copy and the tail straight from the sender's memory. After the batch the
//! worker drops the frames, then calls `flush` on the source, which only now may complete them to its guest.
//!
//! # Threads
//! An endpoint belongs to one worker thread from `attach` to `detach`; no call may block. Memory that segments
//! point into must stay mapped until the endpoint was detached (dropped) by the worker.

use std::os::fd::RawFd;
use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::drops::DropReason;
pub use crate::segment::Segment;

/// Bytes that the head of a frame holds at least, if the frame has them: the parser looks at no byte beyond.
pub const HEAD_BYTES: usize = 192;
/// Frames in one batch.
pub const BATCH: usize = 64;
/// Segments that one frame's tail may consist of.
pub const MAX_SEGMENTS: usize = 64;
/// The longest frame that the switch carries: a large send with its Ethernet header and VLAN tag.
pub const MAX_FRAME: usize = 65_535 + 18;

/// What is known of a checksum field in the frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Checksum {
    /// Nothing: the field holds what the sender wrote.
    #[default]
    None = 0,
    /// The sender left it to the device: the field holds at most the pseudo-header's sum.
    Partial = 1,
    /// Verified or never at risk: a receiver need not look.
    Good = 2,
}

/// Offload metadata that travels with a frame from one NIC to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The TCP or UDP checksum.
    pub checksum: Checksum,
    /// The IPv4 header checksum is to be filled in by whoever completes the frame.
    pub ip_checksum: bool,
    /// Bytes from the frame's start to the transport header; 0 = find it by parsing.
    pub l4_offset: u16,
    /// TCP payload bytes per segment of a large send; 0 = an ordinary frame.
    pub mss: u32,
}

/// What accompanies a frame's bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    pub offload: Offload,
    /// 802.1Q tag control information that travels out of band.
    pub vlan_tci: Option<u16>,
    /// The sender's RSS hash, if it gave one.
    pub hash: Option<u32>,
}

/// A frame as a destination sees it: private head, tail in the sender's memory (or empty), metadata.
#[derive(Clone, Copy)]
pub struct FrameRef<'a> {
    pub head: &'a [u8],
    pub tail: &'a [Segment],
    /// Length of head and tail together.
    pub length: usize,
    pub meta: Meta,
}

impl<'a> FrameRef<'a> {
    /// A frame that lies in private memory as a whole.
    pub fn whole(data: &'a [u8], meta: Meta) -> Self {
        FrameRef {
            head: data,
            tail: &[],
            length: data.len(),
            meta,
        }
    }

    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Copies the first `out.len()` bytes (or all, if the frame is shorter) and returns how many.
    pub fn copy_prefix(&self, out: &mut [u8]) -> usize {
        let mut done = self.head.len().min(out.len());
        out[..done].copy_from_slice(&self.head[..done]);
        for segment in self.tail {
            let rest = &mut out[done..];
            if rest.is_empty() {
                break;
            }
            done += segment.copy_to(rest);
        }
        done
    }

    /// Copies `length` bytes from `offset` on to `destination`, which may be guest memory; returns how many there
    /// were to copy.
    ///
    /// # Safety
    /// `destination..destination + length` must be mapped, writable and no part of this process's own objects.
    pub unsafe fn copy_to(&self, offset: usize, destination: *mut u8, length: usize) -> usize {
        // SAFETY: as promised by the caller.
        unsafe { crate::segment::copy_frame(self.head, self.tail, offset, destination, length) }
    }

    /// The frame's bytes, at most `limit` of them, in private memory.
    pub fn to_vec(&self, limit: usize) -> Vec<u8> {
        let mut out = vec![0; self.length.min(limit)];
        let done = self.copy_prefix(&mut out);
        out.truncate(done);
        out
    }
}

#[derive(Clone, Copy)]
struct Slot {
    head_start: usize,
    head_length: usize,
    first_segment: usize,
    segments: usize,
    length: usize,
    meta: Meta,
}

/// Up to [`BATCH`] frames of one endpoint; its buffers are kept from batch to batch.
#[derive(Default)]
pub struct Batch {
    slots: Vec<Slot>,
    heads: Vec<u8>,
    segments: Vec<Segment>,
    drops: Vec<DropReason>,
}

impl Batch {
    pub fn new() -> Self {
        Batch::default()
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether it holds [`BATCH`] frames and takes no more.
    pub fn is_full(&self) -> bool {
        self.slots.len() >= BATCH
    }

    pub fn clear(&mut self) {
        self.slots.clear();
        self.heads.clear();
        self.segments.clear();
        self.drops.clear();
    }

    /// Starts the next frame; `None` = the batch is full. The frame counts once `finish` was called.
    pub fn begin(&mut self) -> Option<FrameBuilder<'_>> {
        if self.is_full() {
            return None;
        }
        let slot = Slot {
            head_start: self.heads.len(),
            head_length: 0,
            first_segment: self.segments.len(),
            segments: 0,
            length: 0,
            meta: Meta::default(),
        };
        Some(FrameBuilder {
            batch: self,
            slot,
            finished: false,
        })
    }

    /// Adds a frame that is copied whole; false = the batch is full or the frame longer than [`MAX_FRAME`].
    #[must_use]
    pub fn push(&mut self, data: &[u8], meta: Meta) -> bool {
        if data.len() > MAX_FRAME {
            return false;
        }
        let Some(mut frame) = self.begin() else {
            return false;
        };
        frame.head(data.len()).copy_from_slice(data);
        frame.finish(meta)
    }

    /// Forgets the frames from `count` on.
    pub fn truncate(&mut self, count: usize) {
        if let Some(slot) = self.slots.get(count) {
            self.heads.truncate(slot.head_start);
            self.segments.truncate(slot.first_segment);
            self.slots.truncate(count);
        }
    }

    /// Notes a frame that the endpoint itself dropped on its way in; the switch counts it at the port.
    pub fn drop_one(&mut self, reason: DropReason) {
        self.drops.push(reason);
    }

    /// What [`Batch::drop_one`] noted.
    pub fn dropped(&self) -> &[DropReason] {
        &self.drops
    }

    pub fn frame(&self, index: usize) -> Option<FrameRef<'_>> {
        let slot = self.slots.get(index)?;
        Some(FrameRef {
            head: &self.heads[slot.head_start..slot.head_start + slot.head_length],
            tail: &self.segments[slot.first_segment..slot.first_segment + slot.segments],
            length: slot.length,
            meta: slot.meta,
        })
    }
}

/// A frame being put into a [`Batch`]; dropped unfinished, it leaves no trace.
pub struct FrameBuilder<'a> {
    batch: &'a mut Batch,
    slot: Slot,
    finished: bool,
}

impl FrameBuilder<'_> {
    /// The private head to copy into, `length` zero bytes (at most [`MAX_FRAME`]). Call it once, before `tail`.
    /// A frame with a tail needs a head of [`HEAD_BYTES`] or more.
    pub fn head(&mut self, length: usize) -> &mut [u8] {
        let length = length.min(MAX_FRAME);
        self.slot.length = self.slot.length - self.slot.head_length + length;
        self.slot.head_length = length;
        self.batch.heads.resize(self.slot.head_start + length, 0);
        &mut self.batch.heads[self.slot.head_start..]
    }

    /// Appends a piece of the sender's memory behind the head; false = too many pieces or too long a frame.
    #[must_use]
    pub fn tail(&mut self, segment: Segment) -> bool {
        if self.slot.segments >= MAX_SEGMENTS || self.slot.length + segment.len() > MAX_FRAME {
            return false;
        }
        self.slot.segments += 1;
        self.slot.length += segment.len();
        self.batch.segments.push(segment);
        true
    }

    /// Makes the frame part of the batch. False, and no frame, if it has a tail behind a head that is shorter than
    /// [`HEAD_BYTES`]: the parser must never be shown less than there is.
    #[must_use]
    pub fn finish(mut self, meta: Meta) -> bool {
        if self.slot.segments > 0 && self.slot.head_length < HEAD_BYTES {
            return false;
        }
        self.slot.meta = meta;
        self.finished = true;
        true
    }
}

impl Drop for FrameBuilder<'_> {
    fn drop(&mut self) {
        if self.finished {
            self.batch.slots.push(self.slot);
        } else {
            self.batch.heads.truncate(self.slot.head_start);
            self.batch.segments.truncate(self.slot.first_segment);
        }
    }
}

/// A port's other side. See the module's head for the life cycle and threads.
pub trait Endpoint: Send {
    /// Becomes readable when the guest has signalled; an eventfd, never read by the
    /// worker (it polls edge-triggered, so that a guest which shares the fd cannot make a read block).
    fn wake_fd(&self) -> RawFd;

    /// Appends the guest's frames to the empty `batch` until it is full; true = there may be more.
    fn receive(&mut self, batch: &mut Batch) -> bool;

    /// Hands a frame towards the guest, or says why it cannot be taken (no buffer, link down, packet filter).
    fn transmit(&mut self, frame: &FrameRef<'_>) -> Result<(), DropReason>;

    /// After a batch: publish rings, send completions for what `receive` gave, signal the guest if due.
    fn flush(&mut self);

    /// Asks to be woken for the next frame; true = work arrived meanwhile, and there may be no wake-up for it.
    fn rearm(&mut self) -> bool;

    /// The last call: the endpoint's code panicked and the switch lets go of it. Tells the owner why.
    fn failed(&mut self, _why: &str) {}
}

/// Calls into an endpoint; a panic in there comes back as its text. The endpoint is of no use then: what it was doing is
/// half done, and only [`Endpoint::failed`] and dropping it may follow.
pub(crate) fn guarded<R>(
    endpoint: &mut dyn Endpoint,
    act: impl FnOnce(&mut dyn Endpoint) -> R,
) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(|| act(endpoint))).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        text.or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a text".into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_head_then_tail() {
        let tail: Vec<u8> = (0..100).collect();
        let mut batch = Batch::new();
        let mut frame = batch.begin().unwrap();
        frame.head(HEAD_BYTES).fill(7);
        // SAFETY: `tail` outlives the batch's use of it below.
        assert!(frame.tail(unsafe { Segment::new(tail.as_ptr(), tail.len()) }));
        assert!(frame.finish(Meta::default()));
        let frame = batch.frame(0).unwrap();
        assert_eq!(frame.length, HEAD_BYTES + 100);
        let bytes = frame.to_vec(usize::MAX);
        assert_eq!(&bytes[..HEAD_BYTES], &[7; HEAD_BYTES]);
        assert_eq!(&bytes[HEAD_BYTES..], &tail[..]);
        assert_eq!(frame.to_vec(200).len(), 200);
    }

    #[test]
    fn an_unfinished_frame_leaves_no_trace() {
        let byte = [1u8];
        let mut batch = Batch::new();
        let mut frame = batch.begin().unwrap();
        frame.head(10).fill(1);
        // SAFETY: `byte` outlives the batch.
        assert!(frame.tail(unsafe { Segment::new(byte.as_ptr(), 1) }));
        assert!(!frame.finish(Meta::default()), "a tail behind a short head");
        assert!(batch.is_empty());
        assert!(batch.push(&[1, 2, 3], Meta::default()));
        assert_eq!(batch.frame(0).unwrap().length, 3);
        assert!(batch.frame(0).unwrap().tail.is_empty());
        assert!(batch.frame(1).is_none());
    }

    #[test]
    fn a_batch_is_bounded() {
        let mut batch = Batch::new();
        for _ in 0..BATCH {
            assert!(batch.push(&[0; 14], Meta::default()));
        }
        assert!(!batch.push(&[0; 14], Meta::default()));
        assert!(!batch.push(&[0; MAX_FRAME + 1], Meta::default()));
        batch.clear();
        assert!(batch.is_empty());
    }
}
