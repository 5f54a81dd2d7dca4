//! A partition's memory as this process sees it: mapped regions, page lists, event flags.
//!
//! Regions are memfds sealed against shrinking, mapped once. `BufferView` is a linear window over page lists; it keeps its
//! mapping alive, so tearing a GPADL down means dropping the views, after the epoch in which workers used them.

use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;

mod aio;
pub mod eventfd;
mod interrupt;
mod mapping;
mod view;

pub use interrupt::{Interrupt, EVENT_FLAGS_PER_SINT, EVENT_FLAG_BYTES_PER_SINT};
pub use view::{BufferView, Word};

use mapping::Mapping;
use view::Run;

#[cfg(target_endian = "big")]
compile_error!(
    "guest memory is little-endian and shared word by word: big-endian hosts are not supported"
);

pub const PAGE_SIZE: u64 = 4096;

/// An access outside the partition's memory, or memory that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryError {
    Outside {
        gpa: u64,
        length: u64,
    },
    OutsideView {
        offset: usize,
        length: usize,
        size: usize,
    },
    Unaligned {
        address: u64,
    },
    NoSuchFlag {
        sint: u32,
        flag: u32,
    },
    Overlap {
        gpa: u64,
    },
    NotWholePages {
        gpa: u64,
        size: u64,
    },
    NotSealed {
        gpa: u64,
    },
    NotMemfd {
        gpa: u64,
    },
    TooSmall {
        gpa: u64,
        size: u64,
        have: u64,
    },
    System(i32),
}

impl fmt::Display for MemoryError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MemoryError::Outside { gpa, length } => {
                write!(
                    out,
                    "{length} bytes at {gpa:#x} are outside the partition's memory"
                )
            }
            MemoryError::OutsideView {
                offset,
                length,
                size,
            } => {
                write!(
                    out,
                    "{length} bytes at offset {offset} are outside a view of {size}"
                )
            }
            MemoryError::Unaligned { address } => {
                write!(out, "address {address:#x} is not aligned")
            }
            MemoryError::NoSuchFlag { sint, flag } => {
                write!(out, "event flag {flag} of SINT {sint} does not exist")
            }
            MemoryError::Overlap { gpa } => {
                write!(out, "region at {gpa:#x} overlaps the one before it")
            }
            MemoryError::NotWholePages { gpa, size } => {
                write!(
                    out,
                    "region at {gpa:#x} of {size} bytes is not made of whole pages"
                )
            }
            MemoryError::NotSealed { gpa } => {
                write!(
                    out,
                    "region at {gpa:#x}: its memfd is not sealed against shrinking"
                )
            }
            MemoryError::NotMemfd { gpa } => {
                write!(out, "region at {gpa:#x}: its fd is not a memfd")
            }
            MemoryError::TooSmall { gpa, size, have } => {
                write!(
                    out,
                    "region at {gpa:#x}: {size} bytes wanted, its memfd has {have}"
                )
            }
            MemoryError::System(errno) => {
                write!(
                    out,
                    "guest memory: {}",
                    std::io::Error::from_raw_os_error(*errno)
                )
            }
        }
    }
}

impl std::error::Error for MemoryError {}

/// `size` bytes of guest memory at guest-physical address `gpa`, backed by the memfd `fd`.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub gpa: u64,
    pub size: u64,
    pub fd: RawFd,
}

struct MappedRegion {
    gpa: u64,
    mapping: Arc<Mapping>,
}

/// All regions of a partition. Nothing crosses a region's end.
pub struct GuestMemory {
    regions: Vec<MappedRegion>,
}

fn last_errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn check_region(region: &Region) -> Result<(), MemoryError> {
    let Region { gpa, size, fd } = *region;
    let end = gpa.checked_add(size);
    if gpa % PAGE_SIZE != 0
        || size == 0
        || size % PAGE_SIZE != 0
        || end.is_none_or(|end| end > 1 << 52)
    {
        return Err(MemoryError::NotWholePages { gpa, size });
    }
    // SAFETY: plain values; a wrong fd gives an error.
    let seals = unsafe { libc::fcntl(fd, libc::F_GET_SEALS) };
    if seals < 0 {
        return Err(MemoryError::NotMemfd { gpa });
    }
    if seals & libc::F_SEAL_SHRINK == 0 {
        return Err(MemoryError::NotSealed { gpa });
    }
    // SAFETY: an all-zero stat is a valid value, filled by the call below.
    let mut status: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `status` is a valid stat to write to.
    if unsafe { libc::fstat(fd, &mut status) } < 0 {
        return Err(MemoryError::System(last_errno()));
    }
    let have = status.st_size as u64;
    if have < size {
        return Err(MemoryError::TooSmall { gpa, size, have });
    }
    Ok(())
}

impl GuestMemory {
    /// Maps `regions`; their fds stay the caller's and may be closed.
    pub fn new(regions: &[Region]) -> Result<Self, MemoryError> {
        let mut sorted = regions.to_vec();
        sorted.sort_by_key(|region| region.gpa);
        let mut mapped = Vec::with_capacity(sorted.len());
        let mut end = 0;
        for region in &sorted {
            check_region(region)?;
            if region.gpa < end {
                return Err(MemoryError::Overlap { gpa: region.gpa });
            }
            end = region.gpa + region.size;
            let mapping = Mapping::new(region.fd, region.size as usize)
                .map_err(|error| MemoryError::System(error.raw_os_error().unwrap_or(0)))?;
            mapped.push(MappedRegion {
                gpa: region.gpa,
                mapping: Arc::new(mapping),
            });
        }
        Ok(Self { regions: mapped })
    }

    /// Bytes over all regions.
    pub fn size(&self) -> u64 {
        self.regions
            .iter()
            .map(|region| region.mapping.size() as u64)
            .sum()
    }

    #[inline]
    fn find(&self, gpa: u64, length: u64) -> Result<(&Arc<Mapping>, usize), MemoryError> {
        let index = self.regions.partition_point(|region| region.gpa <= gpa);
        if let Some(region) = index
            .checked_sub(1)
            .and_then(|index| self.regions.get(index))
        {
            let offset = gpa - region.gpa;
            let size = region.mapping.size() as u64;
            if offset <= size && length <= size - offset {
                return Ok((&region.mapping, offset as usize));
            }
        }
        Err(MemoryError::Outside { gpa, length })
    }

    /// Whether `length` bytes at `gpa` are inside one region.
    pub fn check(&self, gpa: u64, length: u64) -> Result<(), MemoryError> {
        self.find(gpa, length).map(|_| ())
    }

    /// The address of `length` bytes at `gpa`, for those who move bytes themselves. Valid while this memory lives.
    pub fn iovec(&self, gpa: u64, length: usize) -> Result<libc::iovec, MemoryError> {
        let outside = MemoryError::Outside {
            gpa,
            length: length as u64,
        };
        let (mapping, offset) = self.find(gpa, length as u64)?;
        let address = mapping.address(offset, length).ok_or(outside)?;
        Ok(libc::iovec {
            iov_base: address.cast(),
            iov_len: length,
        })
    }

    /// Copies out of guest memory.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let outside = MemoryError::Outside {
            gpa,
            length: into.len() as u64,
        };
        let (mapping, offset) = self.find(gpa, into.len() as u64)?;
        mapping.copy_out(offset, into).then_some(()).ok_or(outside)
    }

    /// Copies into guest memory.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<(), MemoryError> {
        let (mapping, offset) = self.find(gpa, from.len() as u64)?;
        mapping
            .copy_in(offset, from)
            .then_some(())
            .ok_or(MemoryError::Outside {
                gpa,
                length: from.len() as u64,
            })
    }

    /// One aligned 32-bit load (acquire).
    pub fn load_u32(&self, gpa: u64) -> Result<u32, MemoryError> {
        let (mapping, offset) = self.find(gpa, 4)?;
        mapping
            .load_u32(offset, std::sync::atomic::Ordering::Acquire)
            .ok_or(MemoryError::Unaligned { address: gpa })
    }

    /// One aligned 32-bit store (release).
    pub fn store_u32(&self, gpa: u64, value: u32) -> Result<(), MemoryError> {
        let (mapping, offset) = self.find(gpa, 4)?;
        mapping
            .store_u32(offset, value, std::sync::atomic::Ordering::Release)
            .then_some(())
            .ok_or(MemoryError::Unaligned { address: gpa })
    }

    /// `byte_count` bytes, starting `byte_offset` into the first of `pfns`, as one linear window.
    pub fn view(
        &self,
        pfns: &[u64],
        byte_offset: usize,
        byte_count: usize,
    ) -> Result<BufferView, MemoryError> {
        let page = PAGE_SIZE as usize;
        let size = pfns.len() * page;
        if byte_offset > size || byte_count > size - byte_offset {
            return Err(MemoryError::OutsideView {
                offset: byte_offset,
                length: byte_count,
                size,
            });
        }
        let mut runs: Vec<Run> = Vec::new();
        let mut skip = byte_offset % page;
        let mut start = 0;
        for pfn in &pfns[byte_offset / page..] {
            if start == byte_count {
                break;
            }
            let gpa = pfn.checked_mul(PAGE_SIZE).ok_or(MemoryError::Outside {
                gpa: u64::MAX,
                length: PAGE_SIZE,
            })?;
            let (mapping, offset) = self.find(gpa, PAGE_SIZE)?;
            let take = (page - skip).min(byte_count - start);
            match runs.last_mut() {
                Some(run)
                    if Arc::ptr_eq(&run.mapping, mapping)
                        && run.offset + run.length == offset + skip =>
                {
                    run.length += take;
                }
                _ => runs.push(Run {
                    mapping: Arc::clone(mapping),
                    offset: offset + skip,
                    start,
                    length: take,
                }),
            }
            start += take;
            skip = 0;
        }
        Ok(BufferView::new(runs))
    }

    fn flag_word(&self, gpa: u64, bit: u32) -> Result<(&Arc<Mapping>, usize, u32), MemoryError> {
        let (mapping, offset) = self.find(gpa.saturating_add(u64::from(bit / 8)), 1)?;
        Ok((
            mapping,
            offset & !3,
            1 << ((offset as u32 & 3) * 8 + bit % 8),
        ))
    }

    /// Atomically sets bit `bit % 8` of byte `gpa + bit / 8`; true when it was clear.
    pub fn set_flag(&self, gpa: u64, bit: u32) -> Result<bool, MemoryError> {
        let (mapping, offset, mask) = self.flag_word(gpa, bit)?;
        let before = mapping
            .fetch_or_u32(offset, mask)
            .ok_or(MemoryError::Unaligned { address: gpa })?;
        Ok(before & mask == 0)
    }

    /// Atomically reads and clears flag bytes, word by word; clear words are only read.
    pub fn take_flags(&self, gpa: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let outside = MemoryError::Outside {
            gpa,
            length: into.len() as u64,
        };
        let (mapping, start) = self.find(gpa, into.len() as u64)?;
        let end = start + into.len();
        let mut word = start & !3;
        while word < end {
            let first = start.max(word) - word;
            let last = end.min(word + 4) - word;
            let mask = (first..last).fold(0u32, |mask, byte| mask | 0xFF << (byte * 8));
            let mut value = mapping
                .load_u32(word, std::sync::atomic::Ordering::Acquire)
                .ok_or(outside)?
                & mask;
            if value != 0 {
                value = mapping.fetch_and_u32(word, !mask).ok_or(outside)? & mask;
            }
            let bytes = value.to_le_bytes();
            let at = word + first - start;
            if let (Some(target), Some(source)) =
                (into.get_mut(at..at + last - first), bytes.get(first..last))
            {
                target.copy_from_slice(source);
            }
            word += 4;
        }
        Ok(())
    }
}
