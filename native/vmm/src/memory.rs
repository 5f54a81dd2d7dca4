//! The guest's memory: the host's sealed memfds, mapped once.

use std::fs::File;
use std::os::fd::OwnedFd;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::error::{Context, Error, Result};

pub type Memory = GuestMemoryMmap<()>;

/// Guest-physical address and size of a region.
pub type Region = (u64, u64);

/// The memory with the descriptors that a restarted daemon gets back.
pub struct Regions {
    pub memory: Memory,
    files: Vec<File>,
}

impl Regions {
    /// Maps each memfd at its place. Fails when one is not exactly as long as its region and sealed to stay so.
    pub fn map(layout: &[Region], memfds: Vec<OwnedFd>) -> Result<Self> {
        let mut files = Vec::new();
        let mut regions = Vec::new();
        for (&(gpa, size), memfd) in layout.iter().zip(memfds) {
            let file = File::from(memfd);
            let what = format!("memory region at {gpa:#x}");
            let length = file.metadata().context(&what)?.len();
            if length != size || !crate::calls::sealed(&file) {
                return Err(Error::new(format!(
                    "{what}: {length} bytes came for {size}, or the size is not sealed"
                )));
            }
            let offset = FileOffset::new(file.try_clone().context(&what)?, 0);
            let size = usize::try_from(size).context(&what)?;
            let mapping = MmapRegion::from_file(offset, size).context(&what)?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(gpa))
                .ok_or_else(|| Error::new(format!("{what}: outside the address space")))?;
            regions.push(region);
            files.push(file);
        }
        let memory = Memory::from_regions(regions).context("guest memory")?;
        Ok(Self { memory, files })
    }

    /// Copies of the descriptors, in HELLO's order.
    pub fn memfds(&self) -> Result<Vec<OwnedFd>> {
        let copy = |file: &File| Ok(file.try_clone().context("memory region")?.into());
        self.files.iter().map(copy).collect()
    }
}
