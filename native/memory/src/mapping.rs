//! One region's mapping: the only place where guest memory is touched through pointers.
//!
//! Guest memory is shared with a process that may write it at any moment, so no reference to it is ever formed: bytes move by
//! raw copies into or out of private memory, words by atomic operations. The memfd is sealed against shrinking before it
//! is mapped, so no access can fault.

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// `size` bytes of a memfd, mapped shared for reading and writing until dropped.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    size: usize,
}

// SAFETY: the mapping is valid until Drop whichever thread uses it; all access is by raw copies and atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent access is what shared guest memory is, and no Rust reference into it exists.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `size` bytes (not 0) of `fd`.
    pub(crate) fn new(fd: RawFd, size: usize) -> io::Result<Self> {
        // SAFETY: a fresh address chosen by the kernel; arguments are plain values; the result is checked.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        match NonNull::new(address.cast::<u8>()) {
            Some(base) => Ok(Self { base, size }),
            None => Err(io::Error::from(io::ErrorKind::OutOfMemory)),
        }
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Whether `length` bytes at `offset` are inside.
    #[inline]
    fn holds(&self, offset: usize, length: usize) -> bool {
        offset <= self.size && length <= self.size - offset
    }

    /// Copies out of guest memory; false when the bytes are not all inside.
    #[inline]
    pub(crate) fn copy_out(&self, offset: usize, into: &mut [u8]) -> bool {
        if !self.holds(offset, into.len()) {
            return false;
        }
        // SAFETY: the source range is inside the mapping (just checked), the target is a private slice of that length.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.base.as_ptr().add(offset),
                into.as_mut_ptr(),
                into.len(),
            )
        };
        true
    }

    /// Copies into guest memory; false when the bytes are not all inside.
    #[inline]
    pub(crate) fn copy_in(&self, offset: usize, from: &[u8]) -> bool {
        if !self.holds(offset, from.len()) {
            return false;
        }
        // SAFETY: the target range is inside the mapping (just checked), the source is a private slice of that length.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.base.as_ptr().add(offset), from.len())
        };
        true
    }

    /// Copies guest memory to guest memory, possibly the same; false when either range is not all inside.
    #[inline]
    pub(crate) fn copy_to(
        &self,
        offset: usize,
        target: &Mapping,
        target_offset: usize,
        length: usize,
    ) -> bool {
        if !self.holds(offset, length) || !target.holds(target_offset, length) {
            return false;
        }
        // SAFETY: both ranges are inside their mappings (just checked); they may overlap, hence `copy`.
        unsafe {
            std::ptr::copy(
                self.base.as_ptr().add(offset),
                target.base.as_ptr().add(target_offset),
                length,
            )
        };
        true
    }

    /// The aligned 32-bit word at `offset`, if it is inside.
    #[inline]
    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        if !self.holds(offset, 4) || offset & 3 != 0 {
            return None;
        }
        // SAFETY: inside the mapping and aligned (mappings start at a page); an atomic may alias what others write.
        Some(unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast::<u32>()) })
    }

    #[inline]
    pub(crate) fn load_u32(&self, offset: usize, order: Ordering) -> Option<u32> {
        self.word(offset).map(|word| word.load(order))
    }

    #[inline]
    pub(crate) fn store_u32(&self, offset: usize, value: u32, order: Ordering) -> bool {
        self.word(offset)
            .map(|word| word.store(value, order))
            .is_some()
    }

    /// Sets bits; gives the word as it was.
    pub(crate) fn fetch_or_u32(&self, offset: usize, bits: u32) -> Option<u32> {
        self.word(offset)
            .map(|word| word.fetch_or(bits, Ordering::AcqRel))
    }

    /// Clears bits; gives the word as it was.
    pub(crate) fn fetch_and_u32(&self, offset: usize, bits: u32) -> Option<u32> {
        self.word(offset)
            .map(|word| word.fetch_and(bits, Ordering::AcqRel))
    }

    /// The address of a range, for system calls that move bytes themselves; None when it is not all inside.
    pub(crate) fn address(&self, offset: usize, length: usize) -> Option<*mut u8> {
        // SAFETY: the offset is inside the mapping (just checked).
        self.holds(offset, length)
            .then(|| unsafe { self.base.as_ptr().add(offset) })
    }

    /// Hints that `length` bytes at `offset` will be read soon.
    #[inline]
    pub(crate) fn prefetch(&self, offset: usize, length: usize) {
        #[cfg(target_arch = "x86_64")]
        if self.holds(offset, length) {
            let mut at = 0;
            while at < length {
                // SAFETY: inside the mapping; a prefetch changes nothing.
                unsafe {
                    use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
                    _mm_prefetch::<_MM_HINT_T0>(self.base.as_ptr().add(offset + at).cast());
                }
                at += 64;
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (offset, length);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this object made the mapping and nothing uses it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.size) };
    }
}
