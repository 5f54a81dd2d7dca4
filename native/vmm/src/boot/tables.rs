//! Descriptor table and page tables of the 64-bit boot protocol: flat segments, the first 4 GiB mapped one to one.

use kvm_bindings::{kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use crate::error::{Context, Result};
use crate::memory::Memory;

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xA000;
const DIRECTORIES: u64 = 0xB000;
const GIGABYTES: u64 = 4;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 0x80;
/// Null, unused, __BOOT_CS (0x10), __BOOT_DS (0x18).
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

/// Writes the tables.
pub fn write(memory: &Memory) -> Result<()> {
    let put = |address: u64, value: u64| memory.write_obj(value, GuestAddress(address));
    let all = || {
        for (index, entry) in GDT_ENTRIES.iter().enumerate() {
            put(GDT + index as u64 * 8, *entry)?;
        }
        // What an earlier run of this machine left in these pages must not map anything.
        memory.write_slice(&[0; ((2 + GIGABYTES) * 4096) as usize], GuestAddress(PML4))?;
        put(PML4, PDPT | PRESENT_WRITABLE)?;
        for gigabyte in 0..GIGABYTES {
            let directory = DIRECTORIES + gigabyte * 4096;
            put(PDPT + gigabyte * 8, directory | PRESENT_WRITABLE)?;
            for entry in 0..512 {
                let address = gigabyte << 30 | entry << 21;
                put(directory + entry * 8, address | PRESENT_WRITABLE | LARGE)?;
            }
        }
        Ok::<_, vm_memory::GuestMemoryError>(())
    };
    all().context("boot tables")
}

/// The system registers of the boot processor at the kernel's 64-bit entry point.
pub fn set_registers(sregs: &mut kvm_sregs) {
    const PE: u64 = 1;
    const ET: u64 = 1 << 4;
    const NE: u64 = 1 << 5;
    const PG: u64 = 1 << 31;
    const PAE: u64 = 1 << 5;
    const LME: u64 = 1 << 8;
    const LMA: u64 = 1 << 10;
    let data = kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector: BOOT_DS,
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: BOOT_CS,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (GDT_ENTRIES.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = PML4;
    sregs.cr4 = PAE;
    sregs.cr0 = PE | ET | NE | PG;
    sregs.efer = LME | LMA;
}
