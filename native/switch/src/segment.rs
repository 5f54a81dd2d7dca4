//! A piece of a sender's memory behind a frame's head. The only place of the crate that touches such memory.

use std::ptr::NonNull;

/// Bytes in memory that a guest shares and may change at any moment; they are only ever copied, never judged.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a segment is an address; the promise given to `new` holds on every thread.
unsafe impl Send for Segment {}

impl Segment {
    /// # Safety
    /// `start..start + length` must stay mapped and readable until the endpoint that made the segment has been
    /// dropped, or has returned from the next `flush`, whichever comes first. A null `start` is taken as empty.
    pub unsafe fn new(start: *const u8, length: usize) -> Self {
        match NonNull::new(start.cast_mut()) {
            Some(start) => Segment { start, length },
            None => Segment {
                start: NonNull::dangling(),
                length: 0,
            },
        }
    }

    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// First byte, for endpoints that copy from guest to guest themselves.
    pub fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    /// Copies up to `out.len()` bytes and returns how many there were.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let count = self.length.min(out.len());
        // SAFETY: `new`'s caller promised `length` readable bytes; `out` is private memory, so they do not overlap.
        // The guest may write meanwhile: whatever mix arrives is payload that nobody judges.
        unsafe { std::ptr::copy_nonoverlapping(self.start.as_ptr(), out.as_mut_ptr(), count) };
        count
    }
}

/// Copies `length` bytes of the frame `head` + `tail`, from `offset` on, to `destination`; returns how many.
///
/// # Safety
/// `destination..destination + length` must be mapped, writable and no part of this process's own objects.
pub(crate) unsafe fn copy_frame(
    head: &[u8],
    tail: &[Segment],
    mut offset: usize,
    destination: *mut u8,
    length: usize,
) -> usize {
    let mut done = 0;
    let pieces = std::iter::once((head.as_ptr(), head.len())).chain(
        tail.iter()
            .map(|segment| (segment.start.as_ptr().cast_const(), segment.length)),
    );
    for (start, size) in pieces {
        if offset >= size {
            offset -= size;
            continue;
        }
        let count = (size - offset).min(length - done);
        // SAFETY: source: the head's own bytes or what `Segment::new` was promised. Destination: as promised by the
        // caller. Sender and receiver may be one guest's memory and overlap, hence the overlapping copy.
        unsafe { std::ptr::copy(start.add(offset), destination.add(done), count) };
        done += count;
        offset = 0;
        if done == length {
            break;
        }
    }
    done
}
