//! Linear windows over scattered guest pages.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::mapping::Mapping;
use crate::MemoryError;

/// `length` bytes of one mapping, at `start` of the window.
#[derive(Clone)]
pub(crate) struct Run {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) offset: usize,
    pub(crate) start: usize,
    pub(crate) length: usize,
}

/// A linear window over runs of guest memory. Cheap to clone; keeps the memory mapped as long as it lives.
#[derive(Clone)]
pub struct BufferView {
    runs: Arc<[Run]>,
    length: usize,
}

impl BufferView {
    pub(crate) fn new(runs: Vec<Run>) -> Self {
        let length = runs.last().map_or(0, |run| run.start + run.length);
        Self {
            runs: runs.into(),
            length,
        }
    }

    /// Bytes in the window.
    #[inline]
    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    #[inline]
    fn check(&self, offset: usize, length: usize) -> Result<(), MemoryError> {
        if offset <= self.length && length <= self.length - offset {
            Ok(())
        } else {
            Err(MemoryError::OutsideView {
                offset,
                length,
                size: self.length,
            })
        }
    }

    /// Calls `act(mapping, offset in mapping, position in the range, bytes)` for each piece of a checked range.
    #[inline]
    fn pieces(
        &self,
        offset: usize,
        length: usize,
        mut act: impl FnMut(&Arc<Mapping>, usize, usize, usize) -> bool,
    ) -> Result<(), MemoryError> {
        self.check(offset, length)?;
        let mut index = match self.runs.len() {
            0 | 1 => 0,
            _ => self
                .runs
                .partition_point(|run| run.start <= offset)
                .saturating_sub(1),
        };
        let mut done = 0;
        while done < length {
            let Some(run) = self.runs.get(index) else {
                return Err(MemoryError::OutsideView {
                    offset,
                    length,
                    size: self.length,
                });
            };
            let skip = offset + done - run.start;
            let take = (run.length - skip).min(length - done);
            if !act(&run.mapping, run.offset + skip, done, take) {
                return Err(MemoryError::OutsideView {
                    offset,
                    length,
                    size: self.length,
                });
            }
            done += take;
            index += 1;
        }
        Ok(())
    }

    /// Copies out of guest memory into `into`.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), MemoryError> {
        self.pieces(offset, into.len(), |mapping, at, done, take| {
            match into.get_mut(done..done + take) {
                Some(part) => mapping.copy_out(at, part),
                None => false,
            }
        })
    }

    /// Copies `from` into guest memory.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), MemoryError> {
        self.pieces(offset, from.len(), |mapping, at, done, take| {
            match from.get(done..done + take) {
                Some(part) => mapping.copy_in(at, part),
                None => false,
            }
        })
    }

    /// Copies `length` bytes straight to another window, once.
    pub fn copy_to(
        &self,
        offset: usize,
        target: &BufferView,
        target_offset: usize,
        length: usize,
    ) -> Result<(), MemoryError> {
        target.check(target_offset, length)?;
        self.pieces(offset, length, |mapping, at, done, take| {
            target
                .pieces(target_offset + done, take, |to, to_at, part, bytes| {
                    mapping.copy_to(at + part, to, to_at, bytes)
                })
                .is_ok()
        })
    }

    /// A window over a part of this one.
    pub fn slice(&self, offset: usize, length: usize) -> Result<BufferView, MemoryError> {
        let mut runs = Vec::new();
        self.pieces(offset, length, |mapping, at, start, take| {
            runs.push(Run {
                mapping: Arc::clone(mapping),
                offset: at,
                start,
                length: take,
            });
            true
        })?;
        Ok(BufferView::new(runs))
    }

    /// The 32-bit word at `offset`, checked once, for repeated atomic access.
    pub fn word(&self, offset: usize) -> Result<Word, MemoryError> {
        let mut found = None;
        self.pieces(offset, 4, |mapping, at, _, take| {
            if take == 4 && at & 3 == 0 {
                found = Some(Word {
                    mapping: Arc::clone(mapping),
                    offset: at,
                });
            }
            true
        })?;
        found.ok_or(MemoryError::Unaligned {
            address: offset as u64,
        })
    }

    /// One aligned 32-bit load (acquire).
    pub fn load_u32(&self, offset: usize) -> Result<u32, MemoryError> {
        Ok(self.word(offset)?.load())
    }

    /// One aligned 32-bit store (release).
    pub fn store_u32(&self, offset: usize, value: u32) -> Result<(), MemoryError> {
        self.word(offset)?.store(value);
        Ok(())
    }

    /// Appends the range's addresses as iovecs, for readv, writev and the like. They are valid while this window lives.
    pub fn iovecs(
        &self,
        offset: usize,
        length: usize,
        into: &mut Vec<libc::iovec>,
    ) -> Result<(), MemoryError> {
        self.pieces(offset, length, |mapping, at, _, take| {
            match mapping.address(at, take) {
                Some(address) => {
                    into.push(libc::iovec {
                        iov_base: address.cast(),
                        iov_len: take,
                    });
                    true
                }
                None => false,
            }
        })
    }

    /// Hints that the range will be read soon.
    #[inline]
    pub fn prefetch(&self, offset: usize, length: usize) {
        let _ = self.pieces(offset, length, |mapping, at, _, take| {
            mapping.prefetch(at, take);
            true
        });
    }
}

/// One aligned 32-bit word of guest memory, for indices and masks.
#[derive(Clone)]
pub struct Word {
    mapping: Arc<Mapping>,
    offset: usize,
}

impl Word {
    /// Acquire load.
    #[inline]
    pub fn load(&self) -> u32 {
        self.mapping
            .load_u32(self.offset, Ordering::Acquire)
            .unwrap_or(0)
    }

    /// Release store.
    #[inline]
    pub fn store(&self, value: u32) {
        self.mapping
            .store_u32(self.offset, value, Ordering::Release);
    }
}
