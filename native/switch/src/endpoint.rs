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

use crate::drops::DropReason;
pub use crate::segment::Segment;

/// Bytes that the head of a frame holds: the parser looks at no byte beyond them.
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
    /// The IPv4 header checksum.
    pub ip_checksum: Checksum,
    /// TCP payload bytes per segment of a large send; 0 = an ordinary frame.
    pub lso_mss: u32,
    /// 4 or 6 where the sender stated it, else 0.
    pub ip_version: u8,
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

    /// Copies the first `out.len()` bytes (or all, if the frame is shorter) and returns how many.
    pub fn copy_prefix(&self, out: &mut [u8]) -> usize {
        let mut done = self.head.len().min(out.len());
        out[..done].copy_from_slice(&self.head[..done]);
        for segment in self.tail {
            let Some(rest) = out.get_mut(done..) else {
                break;
            };
            if rest.is_empty() {
                break;
            }
            let count = segment.len().min(rest.len());
            segment.copy_to(&mut rest[..count]);
            done += count;
        }
        done
    }

    /// The frame's bytes, at most `limit` of them, in private memory.
    pub fn to_vec(&self, limit: usize) -> Vec<u8> {
        let mut out = vec![0; self.length.min(limit)];
        let done = self.copy_prefix(&mut out);
        out.truncate(done);
        out
    }
}

struct Slot {
    head: [u8; HEAD_BYTES],
    head_length: usize,
    first_segment: usize,
    segments: usize,
    length: usize,
    meta: Meta,
}

/// Up to [`BATCH`] frames of one endpoint. Allocated once per worker.
pub struct Batch {
    slots: Box<[Slot]>,
    used: usize,
    segments: Vec<Segment>,
}

impl Default for Batch {
    fn default() -> Self {
        Batch::new()
    }
}

impl Batch {
    pub fn new() -> Self {
        let slots = (0..BATCH)
            .map(|_| Slot {
                head: [0; HEAD_BYTES],
                head_length: 0,
                first_segment: 0,
                segments: 0,
                length: 0,
                meta: Meta::default(),
            })
            .collect();
        Batch {
            slots,
            used: 0,
            segments: Vec::with_capacity(BATCH * 4),
        }
    }

    pub fn len(&self) -> usize {
        self.used
    }

    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Frames that still fit.
    pub fn room(&self) -> usize {
        self.slots.len() - self.used
    }

    pub fn clear(&mut self) {
        self.used = 0;
        self.segments.clear();
    }

    /// Starts the next frame; `None` = the batch is full. The frame counts once `finish` was called.
    pub fn begin(&mut self) -> Option<FrameBuilder<'_>> {
        if self.used >= self.slots.len() {
            return None;
        }
        let first_segment = self.segments.len();
        let slot = &mut self.slots[self.used];
        slot.head_length = 0;
        slot.first_segment = first_segment;
        slot.segments = 0;
        slot.length = 0;
        slot.meta = Meta::default();
        Some(FrameBuilder {
            batch: self,
            finished: false,
        })
    }

    /// Adds a frame from private memory, whole; false = the batch is full. Bytes beyond the head stay referenced:
    /// `data` must therefore fit in the head, else it is refused too.
    pub fn push_small(&mut self, data: &[u8], meta: Meta) -> bool {
        if data.len() > HEAD_BYTES {
            return false;
        }
        let Some(mut frame) = self.begin() else {
            return false;
        };
        frame.head(data.len()).copy_from_slice(data);
        frame.finish(meta)
    }

    pub fn frame(&self, index: usize) -> Option<FrameRef<'_>> {
        if index >= self.used {
            return None;
        }
        let slot = &self.slots[index];
        Some(FrameRef {
            head: &slot.head[..slot.head_length],
            tail: &self.segments[slot.first_segment..slot.first_segment + slot.segments],
            length: slot.length,
            meta: slot.meta,
        })
    }
}

/// A frame being put into a [`Batch`]; dropped unfinished, it leaves no trace.
pub struct FrameBuilder<'a> {
    batch: &'a mut Batch,
    finished: bool,
}

impl FrameBuilder<'_> {
    /// The private head to copy into. `length` must be the frame's length or [`HEAD_BYTES`], whichever is less;
    /// more is cut to it.
    pub fn head(&mut self, length: usize) -> &mut [u8] {
        let slot = &mut self.batch.slots[self.batch.used];
        slot.length -= slot.head_length;
        slot.head_length = length.min(HEAD_BYTES);
        slot.length += slot.head_length;
        &mut slot.head[..slot.head_length]
    }

    /// Appends a piece of the sender's memory behind the head; false = too many pieces or too long a frame.
    #[must_use]
    pub fn tail(&mut self, segment: Segment) -> bool {
        let slot = &mut self.batch.slots[self.batch.used];
        if slot.segments >= MAX_SEGMENTS || slot.length + segment.len() > MAX_FRAME {
            return false;
        }
        slot.segments += 1;
        slot.length += segment.len();
        self.batch.segments.push(segment);
        true
    }

    /// Makes the frame part of the batch. False, and no frame, if it has a tail behind a head that is not full:
    /// the parser must never be shown less than there is.
    #[must_use]
    pub fn finish(mut self, meta: Meta) -> bool {
        let slot = &mut self.batch.slots[self.batch.used];
        if slot.segments > 0 && slot.head_length < HEAD_BYTES {
            return false;
        }
        slot.meta = meta;
        self.finished = true;
        true
    }
}

impl Drop for FrameBuilder<'_> {
    fn drop(&mut self) {
        if self.finished {
            self.batch.used += 1;
        } else {
            let first = self.batch.slots[self.batch.used].first_segment;
            self.batch.segments.truncate(first);
        }
    }
}

/// A port's other side. See the module's head for the life cycle and threads.
pub trait Endpoint: Send {
    /// Becomes readable when the guest has signalled; the endpoint itself clears it in `receive`.
    fn wake_fd(&self) -> RawFd;

    /// Appends the guest's frames to the empty `batch` until it is full; true = there may be more.
    fn receive(&mut self, batch: &mut Batch) -> bool;

    /// Hands a frame towards the guest, or says why it cannot be taken (no buffer, link down, packet filter).
    fn transmit(&mut self, frame: &FrameRef<'_>) -> Result<(), DropReason>;

    /// After a batch: publish rings, send completions for what `receive` gave, signal the guest if due.
    fn flush(&mut self);

    /// Asks to be woken for the next frame; true = work arrived meanwhile, and there may be no wake-up for it.
    fn rearm(&mut self) -> bool;
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
        assert!(batch.push_small(&[1, 2, 3], Meta::default()));
        assert_eq!(batch.frame(0).unwrap().length, 3);
        assert!(batch.frame(0).unwrap().tail.is_empty());
        assert!(batch.frame(1).is_none());
    }

    #[test]
    fn a_batch_is_bounded() {
        let mut batch = Batch::new();
        for _ in 0..BATCH {
            assert!(batch.push_small(&[0; 14], Meta::default()));
        }
        assert!(!batch.push_small(&[0; 14], Meta::default()));
        assert!(!batch.push_small(&[0; HEAD_BYTES + 1], Meta::default()));
        batch.clear();
        assert_eq!(batch.room(), BATCH);
    }
}
