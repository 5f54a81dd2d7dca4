//! From a kernel image to a processor that is about to run it (Linux, Documentation/arch/x86/boot.rst).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile,
};

use crate::error::{Context, Error, Result};
use crate::memory::Memory;

pub mod acpi;
pub mod tables;

pub const BOOT_PARAMS: u64 = 0x7000;
/// Grows down from the boot parameters; a kernel sets its own at once.
pub const STACK: u64 = BOOT_PARAMS;
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The kernel's own limit, with the terminator.
const COMMAND_LINE_LIMIT: usize = 2048;
const EBDA: u64 = 0x9_FC00;
const LOW_END: u64 = 0xA_0000;
const ROM: u64 = 0xE_0000;
const HIGH: u64 = 0x10_0000;
const RAM: u32 = 1;
const RESERVED: u32 = 2;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const XLF_KERNEL_64: u16 = 1;
const BOOT_VERSION_64: u16 = 0x020C;
const ENTRY_64: u64 = 0x200;
const LOADER_UNDEFINED: u8 = 0xFF;
const PAGE: u64 = 4096;

/// The page tables cover the first 4 GiB only, so everything that is loaded stays below.
const LOAD_LIMIT: u64 = 1 << 32;

struct Loaded {
    entry: u64,
    header: setup_header,
    /// Memory that the kernel needs from its load address on, before it looks at the memory map.
    end: u64,
}

/// Writes kernel, initial RAM disk, tables and parameters into the guest's memory; gives the entry point.
pub fn load(
    memory: &Memory,
    kernel: &mut File,
    initrd: Option<&mut File>,
    cmdline: &str,
    processors: u32,
) -> Result<u64> {
    let low = memory
        .find_region(GuestAddress(0))
        .map(|region| region.len().min(LOAD_LIMIT))
        .ok_or_else(|| Error::new("the partition has no memory at address 0"))?;
    if low < 2 * HIGH {
        return Err(Error::new(format!(
            "{low} bytes of memory are too few for a kernel: give the partition 64M or more"
        )));
    }
    tables::write(memory)?;
    let rsdp = acpi::write(memory, processors)?;
    let loaded = load_kernel(memory, kernel, low)?;
    let mut parameters = boot_params {
        hdr: loaded.header,
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    write_command_line(memory, cmdline, &mut parameters)?;
    if let Some(initrd) = initrd {
        load_initrd(memory, initrd, low, loaded.end, &mut parameters)?;
    }
    write_memory_map(memory, &mut parameters);
    memory
        .write_slice(parameters.as_slice(), GuestAddress(BOOT_PARAMS))
        .context("boot parameters")?;
    Ok(loaded.entry)
}

fn load_kernel(memory: &Memory, kernel: &mut File, low: u64) -> Result<Loaded> {
    let mut magic = [0; 4];
    kernel.seek(SeekFrom::Start(0)).context("kernel")?;
    kernel.read_exact(&mut magic).context("kernel")?;
    kernel.seek(SeekFrom::Start(0)).context("kernel")?;
    if magic == *b"\x7FELF" {
        let result = Elf::load(memory, None, kernel, None).context("kernel (ELF)")?;
        let header = setup_header {
            type_of_loader: LOADER_UNDEFINED,
            boot_flag: 0xAA55,
            header: HEADER_MAGIC,
            version: BOOT_VERSION_64,
            cmdline_size: COMMAND_LINE_LIMIT as u32 - 1,
            initrd_addr_max: 0x7FFF_FFFF,
            kernel_alignment: 0x20_0000,
            ..Default::default()
        };
        return Ok(Loaded {
            entry: result.kernel_load.0,
            header,
            end: result.kernel_end,
        });
    }
    let result = BzImage::load(memory, None, kernel, Some(GuestAddress(HIGH)))
        .context("kernel: neither a bzImage nor an ELF file that fits into memory")?;
    let mut header = result
        .setup_header
        .ok_or_else(|| Error::new("kernel: a bzImage without a header"))?;
    if header.version < BOOT_VERSION_64 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::new("kernel: it has no 64-bit entry point"));
    }
    let needed = header.pref_address + u64::from(header.init_size);
    if needed > low {
        return Err(Error::new(format!(
            "kernel: it needs {needed} bytes of memory to unpack itself and the partition has {low}: give it more"
        )));
    }
    header.type_of_loader = LOADER_UNDEFINED;
    Ok(Loaded {
        entry: result.kernel_load.0 + ENTRY_64,
        header,
        end: needed.max(result.kernel_end),
    })
}

fn write_command_line(memory: &Memory, text: &str, parameters: &mut boot_params) -> Result<()> {
    let limit = (parameters.hdr.cmdline_size as usize).min(COMMAND_LINE_LIMIT - 1);
    if text.len() > limit || text.contains('\0') {
        return Err(Error::new(format!(
            "command line: {} bytes, this kernel takes {limit} without a NUL",
            text.len()
        )));
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    parameters.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    memory
        .write_slice(&bytes, GuestAddress(COMMAND_LINE))
        .context("command line")
}

fn load_initrd(
    memory: &Memory,
    initrd: &mut File,
    low: u64,
    kernel_end: u64,
    parameters: &mut boot_params,
) -> Result<()> {
    let size = initrd.seek(SeekFrom::End(0)).context("initial RAM disk")?;
    initrd
        .seek(SeekFrom::Start(0))
        .context("initial RAM disk")?;
    let top = low.min(u64::from(parameters.hdr.initrd_addr_max) + 1);
    let start = top
        .checked_sub(size)
        .map(|start| start / PAGE * PAGE)
        .filter(|start| *start >= kernel_end)
        .ok_or_else(|| {
            Error::new(format!(
                "initial RAM disk: {size} bytes do not fit beside the kernel: give the partition more memory"
            ))
        })?;
    read_into(memory, initrd, start, size).context("initial RAM disk")?;
    parameters.hdr.ramdisk_image = start as u32;
    parameters.hdr.ramdisk_size = u32::try_from(size).context("initial RAM disk")?;
    Ok(())
}

fn read_into<F: ReadVolatile>(
    memory: &Memory,
    from: &mut F,
    start: u64,
    size: u64,
) -> std::result::Result<(), vm_memory::GuestMemoryError> {
    memory.read_exact_volatile_from(GuestAddress(start), from, size as usize)
}

fn write_memory_map(memory: &Memory, parameters: &mut boot_params) {
    let mut entries = Vec::new();
    for region in memory.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        if start == 0 {
            entries.push((0, EBDA, RAM));
            entries.push((EBDA, LOW_END, RESERVED));
            entries.push((ROM, HIGH, RESERVED));
            entries.push((HIGH, end, RAM));
        } else {
            entries.push((start, end, RAM));
        }
    }
    parameters.e820_entries = entries.len() as u8;
    for (slot, (start, end, kind)) in parameters.e820_table.iter_mut().zip(entries) {
        slot.addr = start;
        slot.size = end - start;
        slot.r#type = kind;
    }
}
