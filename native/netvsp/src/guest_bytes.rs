//! Bytes in guest memory by address: what a guest sent, and where a frame goes. The only place that handles such addresses.
//!
//! Every address comes from a checked range of a `GuestMemory` or of a view of it, and is used while that memory is kept
//! mapped by the endpoint that owns it. The guest may change the bytes at any moment: they are copied, never judged.

use vswitch_memory::{BufferView, GuestMemory, MemoryError};
use vswitch_switch::endpoint::{FrameRef, Segment};

/// The RNDIS bytes behind one 107, piece by piece; kept from packet to packet.
#[derive(Default)]
pub(crate) struct Source {
    pieces: Vec<Segment>,
    length: usize,
}

impl Source {
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        self.length = 0;
    }

    /// Bytes in all.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    fn push(&mut self, piece: libc::iovec) {
        let start = piece.iov_base.cast::<u8>().cast_const();
        self.length += piece.iov_len;
        if let Some(last) = self.pieces.last_mut() {
            if std::ptr::eq(last.as_ptr().wrapping_add(last.len()), start) {
                let length = last.len() + piece.iov_len;
                // SAFETY: both pieces are mapped, side by side, as long as the memory they come from.
                *last = unsafe { Segment::new(last.as_ptr(), length) };
                return;
            }
        }
        // SAFETY: a checked range of guest memory, which the endpoint keeps mapped until it is dropped.
        self.pieces
            .push(unsafe { Segment::new(start, piece.iov_len) });
    }

    /// Appends a range of `view`, whose memory the caller keeps.
    pub(crate) fn add_view(
        &mut self,
        view: &BufferView,
        offset: usize,
        length: usize,
    ) -> Result<(), MemoryError> {
        let mut pieces = Vec::with_capacity(2);
        view.iovecs(offset, length, &mut pieces)?;
        pieces.into_iter().for_each(|piece| self.push(piece));
        Ok(())
    }

    /// Appends `length` bytes at `gpa` of `memory`, which the caller keeps.
    pub(crate) fn add(
        &mut self,
        memory: &GuestMemory,
        gpa: u64,
        length: usize,
    ) -> Result<(), MemoryError> {
        self.push(memory.iovec(gpa, length)?);
        Ok(())
    }

    /// Calls `act` for the pieces of `length` bytes from `offset` on, until it says false; whether it never did.
    pub(crate) fn each(
        &self,
        mut offset: usize,
        mut length: usize,
        mut act: impl FnMut(Segment) -> bool,
    ) -> bool {
        for piece in &self.pieces {
            if length == 0 {
                break;
            }
            if offset >= piece.len() {
                offset -= piece.len();
                continue;
            }
            let take = (piece.len() - offset).min(length);
            // SAFETY: a part of a piece that is mapped as a whole.
            let part = unsafe { Segment::new(piece.as_ptr().add(offset), take) };
            if !act(part) {
                return false;
            }
            offset = 0;
            length -= take;
        }
        length == 0
    }

    /// Copies from `offset` on into `out`; false when there are not so many bytes.
    pub(crate) fn copy(&self, offset: usize, out: &mut [u8]) -> bool {
        let mut done = 0;
        let length = out.len();
        self.each(offset, length, |piece| match out.get_mut(done..) {
            Some(rest) => {
                done += piece.copy_to(rest);
                true
            }
            None => false,
        })
    }
}

/// Copies `length` bytes of `frame`, from `from` on, to `at` of `view`.
pub(crate) fn copy_frame(
    frame: &FrameRef<'_>,
    from: usize,
    view: &BufferView,
    at: usize,
    length: usize,
) -> Result<(), MemoryError> {
    let mut pieces = Vec::with_capacity(2);
    view.iovecs(at, length, &mut pieces)?;
    let mut done = from;
    for piece in pieces {
        // SAFETY: a checked range of guest memory, kept mapped by `view`; no object of this process lies there.
        done += unsafe { frame.copy_to(done, piece.iov_base.cast(), piece.iov_len) };
    }
    Ok(())
}
