//! From a kernel image to a processor that is about to run it (Linux, Documentation/arch/x86/boot.rst).

use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile,
};

use crate::devices::{RESET_PORT, RESET_VALUE};
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
/// Where a processor in real mode begins after a reset; what is there is the whole firmware.
pub const RESET_VECTOR: u64 = 0xF_FFF0;
/// Linux restarts by going there where ACPI is hardware-reduced and there is no EFI (reboot.c, machine_real_restart): write
/// RESET_VALUE to RESET_PORT, then stand still.
const RESET_CODE: [u8; 9] = [
    0xB0,
    RESET_VALUE, // mov al, RESET_VALUE
    0xBA,
    RESET_PORT.to_le_bytes()[0],
    RESET_PORT.to_le_bytes()[1], // mov dx, RESET_PORT
    0xEE,                        // out dx, al
    0xF4,                        // hlt
    0xEB,
    0xFD, // jmp to hlt
];
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
    memory
        .write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR))
        .context("reset vector")?;
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
    // As a whole: over network file systems one read gives less than is asked for, and the loaders ask once.
    // `take` bounds it, and keeps the read from asking for the file's status, which the sandbox does not allow.
    let mut bytes = Vec::new();
    kernel.seek(SeekFrom::Start(0)).context("kernel")?;
    kernel.take(low).read_to_end(&mut bytes).context("kernel")?;
    let elf = bytes.starts_with(b"\x7FELF");
    let mut kernel = Cursor::new(bytes);
    if elf {
        let result = Elf::load(memory, None, &mut kernel, None).context("kernel (ELF)")?;
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
    let result = BzImage::load(memory, None, &mut kernel, Some(GuestAddress(HIGH)))
        .context("kernel: neither a bzImage nor an ELF file that fits into memory")?;
    let mut header = result
        .setup_header
        .ok_or_else(|| Error::new("kernel: a bzImage without a header"))?;
    if header.version < BOOT_VERSION_64 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::new("kernel: it has no 64-bit entry point"));
    }
    let needed = header
        .pref_address
        .saturating_add(u64::from(header.init_size));
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
    read_into(memory, initrd, start, size)?;
    parameters.hdr.ramdisk_image = start as u32;
    parameters.hdr.ramdisk_size = u32::try_from(size).context("initial RAM disk")?;
    Ok(())
}

/// All of `size` bytes, however few each read gives.
fn read_into<F: ReadVolatile>(memory: &Memory, from: &mut F, start: u64, size: u64) -> Result<()> {
    let mut done = 0;
    while done < size {
        let wanted = usize::try_from(size - done).context("initial RAM disk")?;
        let count = memory
            .read_volatile_from(GuestAddress(start + done), from, wanted)
            .context("initial RAM disk")?;
        if count == 0 {
            return Err(Error::new(
                "initial RAM disk: it became shorter while it was read",
            ));
        }
        done += count as u64;
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const SIZE: usize = 8 << 20;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), SIZE), (GuestAddress(1 << 32), 1 << 20)]).unwrap()
    }

    fn file(name: &str, bytes: &[u8]) -> File {
        // Tests run side by side in one process.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vswitch-{name}-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let options = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .clone();
        let mut file = options.open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// The smallest ELF file that loads: one segment of four bytes at 2 MiB.
    fn elf() -> Vec<u8> {
        let mut image = b"\x7FELF\x02\x01\x01".to_vec();
        image.resize(16, 0);
        for half in [2u16, 62] {
            image.extend(half.to_le_bytes());
        }
        image.extend(1u32.to_le_bytes());
        for word in [0x20_0001u64, 64, 0] {
            image.extend(word.to_le_bytes());
        }
        image.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 1, 0, 0, 0] {
            image.extend(half.to_le_bytes());
        }
        for word in [1u32, 5] {
            image.extend(word.to_le_bytes());
        }
        for word in [120u64, 0x20_0000, 0x20_0000, 4, 4, 4096] {
            image.extend(word.to_le_bytes());
        }
        image.extend(b"code");
        image
    }

    /// A bzImage of two sectors of setup and a few bytes of kernel.
    fn bzimage(xloadflags: u16, pref_address: u64) -> Vec<u8> {
        let mut image = vec![0; 1024];
        let header = setup_header {
            setup_sects: 1,
            header: HEADER_MAGIC,
            version: BOOT_VERSION_64,
            loadflags: 1,
            code32_start: HIGH as u32,
            xloadflags,
            cmdline_size: 255,
            initrd_addr_max: u32::MAX,
            pref_address,
            init_size: 1 << 20,
            ..Default::default()
        };
        let bytes = header.as_slice();
        image[0x1F1..0x1F1 + bytes.len()].copy_from_slice(bytes);
        image.extend(b"kernel");
        image
    }

    fn loaded(
        image: &[u8],
        initrd: Option<&[u8]>,
        cmdline: &str,
    ) -> Result<(Memory, u64, boot_params)> {
        let memory = memory();
        let mut initrd = initrd.map(|bytes| file("initrd", bytes));
        let entry = load(
            &memory,
            &mut file("kernel", image),
            initrd.as_mut(),
            cmdline,
            2,
        )?;
        let mut parameters = boot_params::default();
        memory
            .read_slice(parameters.as_mut_slice(), GuestAddress(BOOT_PARAMS))
            .unwrap();
        Ok((memory, entry, parameters))
    }

    #[test]
    fn an_elf_file_is_entered_where_it_says() {
        let (memory, entry, parameters) = loaded(&elf(), None, "x=1").unwrap();
        assert_eq!(entry, 0x20_0001);
        let mut code = [0; 4];
        memory
            .read_slice(&mut code, GuestAddress(0x20_0000))
            .unwrap();
        assert_eq!(&code, b"code");
        let rsdp = parameters.acpi_rsdp_addr;
        let mut signature = [0; 8];
        memory
            .read_slice(&mut signature, GuestAddress(rsdp))
            .unwrap();
        assert_eq!(&signature, b"RSD PTR ");
    }

    #[test]
    fn a_bzimage_gets_its_parameters_and_its_disk() {
        let disk = vec![0x5A; 70_000];
        let (memory, entry, parameters) =
            loaded(&bzimage(1, 2 << 20), Some(&disk), "quiet").unwrap();
        assert_eq!(entry, HIGH + ENTRY_64);
        let header = parameters.hdr;
        let (start, size) = (header.ramdisk_image, header.ramdisk_size);
        assert_eq!(size as usize, disk.len());
        assert_eq!(start % 4096, 0);
        assert!(start as usize + disk.len() <= SIZE);
        let mut last = [0];
        memory
            .read_slice(&mut last, GuestAddress(u64::from(start) + 69_999))
            .unwrap();
        assert_eq!(last, [0x5A]);
        let mut text = [0; 6];
        memory
            .read_slice(&mut text, GuestAddress(COMMAND_LINE))
            .unwrap();
        assert_eq!(&text, b"quiet\0");
        // A kernel that restarts through the reset vector finds what resets the machine.
        let mut code = [0; 6];
        memory
            .read_slice(&mut code, GuestAddress(RESET_VECTOR))
            .unwrap();
        assert_eq!(code, [0xB0, 0x06, 0xBA, 0xF9, 0x0C, 0xEE]);
        let table = parameters.e820_table;
        let entries: Vec<_> = table
            .iter()
            .take(usize::from(parameters.e820_entries))
            .map(|entry| (entry.addr, entry.size, entry.r#type))
            .collect();
        let (low, high) = ((HIGH, SIZE as u64 - HIGH, RAM), (1 << 32, 1 << 20, RAM));
        assert_eq!(
            (entries[0], entries[3], entries[4]),
            ((0, EBDA, RAM), low, high)
        );
        assert_eq!(entries.len(), 5);
    }

    #[test]
    fn what_cannot_boot_is_refused_in_words() {
        let refusal = |image: &[u8], initrd: Option<&[u8]>, cmdline: &str| {
            let refused = loaded(image, initrd, cmdline);
            refused.map(|_| ()).unwrap_err().to_string()
        };
        let good = bzimage(1, 2 << 20);
        assert!(refusal(b"text", None, "").contains("neither a bzImage nor an ELF"));
        assert!(refusal(&bzimage(0, 2 << 20), None, "").contains("no 64-bit entry"));
        assert!(refusal(&bzimage(1, 8 << 20), None, "").contains("give it more"));
        assert!(refusal(&bzimage(1, u64::MAX), None, "").contains("give it more"));
        assert!(refusal(&good, None, &"x".repeat(256)).contains("takes 255"));
        let large = vec![0; 7 << 20];
        assert!(refusal(&good, Some(&large), "").contains("do not fit"));
    }
}
