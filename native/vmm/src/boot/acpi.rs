//! ACPI: what tells a guest of its processors, its serial port, how to power off, and that it is on a VMBus.
//!
//! Hardware-reduced ACPI (ACPI 6.5, 4.1), as a second-generation Hyper-V machine has it. The VMBus device looks as
//! Linux `drivers/hv/vmbus_drv.c` expects it: `_HID` "VMBUS" below a module device with a window for MMIO.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Interrupt, Name, Package, Path,
    ResourceTemplate, Scope, IO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, ProcessorLocalApic, MADT,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::Aml;
use vm_memory::{Bytes, GuestAddress};

use crate::devices::{
    RESET_PORT, RESET_VALUE, SERIAL_IRQ, SERIAL_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
    SLEEP_TYPE_OFF,
};
use crate::error::{Context, Result};
use crate::memory::Memory;

const RSDP: u64 = 0xE_0000;
const TABLES: u64 = 0xE_0040;
const OEM: [u8; 6] = *b"VSWTCH";
const OEM_TABLE: [u8; 8] = *b"VSWITCH ";
const LOCAL_APIC: u32 = 0xFEE0_0000;
const IO_APIC: u32 = 0xFEC0_0000;
/// Addresses a guest may give to VMBus devices; in the device hole that memory leaves free.
const MMIO_FIRST: u32 = 0xF800_0000;
const MMIO_LAST: u32 = 0xFEBF_FFFF;
const NO_VGA: u16 = 1 << 2;
/// The clock's registers can be read, but there is no clock with an interrupt for a driver.
const NO_CMOS_RTC: u16 = 1 << 5;

/// Writes all tables; gives the RSDP's address.
pub fn write(memory: &Memory, processors: u32) -> Result<u64> {
    for (address, bytes) in build(processors) {
        memory
            .write_slice(&bytes, GuestAddress(address))
            .context("ACPI tables")?;
    }
    Ok(RSDP)
}

/// Every table with its address.
fn build(processors: u32) -> Vec<(u64, Vec<u8>)> {
    let mut tables = Vec::new();
    let mut next = TABLES;
    let mut place = |bytes: Vec<u8>| {
        let address = next;
        next = (next + bytes.len() as u64).next_multiple_of(16);
        tables.push((address, bytes));
        address
    };
    let dsdt = place(dsdt());
    let fadt = place(fadt(dsdt));
    let madt = place(madt(processors));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes_of(&xsdt));
    tables.push((RSDP, bytes_of(&Rsdp::new(OEM, xsdt))));
    tables
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u16) -> GAS {
    GAS::new(
        Space::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(address),
    )
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"MsHyperV").into();
    bytes_of(&fadt.finalize())
}

fn madt(processors: u32) -> Vec<u8> {
    let address = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, 1, address);
    for processor in 0..processors as u8 {
        madt.add_structure(ProcessorLocalApic::new(
            processor,
            processor,
            EnabledStatus::Enabled,
        ));
    }
    madt.add_structure(IoApic::new(processors as u8, IO_APIC, 0));
    bytes_of(&madt)
}

fn dsdt() -> Vec<u8> {
    let serial_io = IO::new(SERIAL_PORT, SERIAL_PORT, 0, 8);
    let serial_irq = Interrupt::new(true, true, false, false, SERIAL_IRQ);
    let serial_id = EISAName::new("PNP0501");
    let serial_name = Name::new("_HID".into(), &serial_id);
    let serial_uid = Name::new("_UID".into(), &0u8);
    let serial_template = ResourceTemplate::new(vec![&serial_io, &serial_irq]);
    let serial_resources = Name::new("_CRS".into(), &serial_template);
    let serial = Device::new(
        "COM1".into(),
        vec![&serial_name, &serial_uid, &serial_resources],
    );

    let bus_name = Name::new("_HID".into(), &"VMBUS");
    let bus_uid = Name::new("_UID".into(), &0u8);
    let bus_text = Name::new("_DDN".into(), &"VMBUS");
    let bus_status = Name::new("_STA".into(), &0x0Fu8);
    let bus = Device::new(
        "VMBS".into(),
        vec![&bus_name, &bus_uid, &bus_text, &bus_status],
    );
    let module_name = Name::new("_HID".into(), &"ACPI0004");
    let module_uid = Name::new("_UID".into(), &0u8);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        MMIO_FIRST,
        MMIO_LAST,
        None,
    );
    let module_template = ResourceTemplate::new(vec![&window]);
    let module_resources = Name::new("_CRS".into(), &module_template);
    let module = Device::new(
        "VMOD".into(),
        vec![&module_name, &module_uid, &module_resources, &bus],
    );

    let off = Package::new(vec![&SLEEP_TYPE_OFF, &0u8, &0u8, &0u8]);
    let power_off = Name::new(Path::new("_S5_"), &off);
    let scope = Scope::new("_SB_".into(), vec![&serial, &module]);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    dsdt.append_slice(&bytes_of(&scope));
    dsdt.append_slice(&bytes_of(&power_off));
    dsdt.update_checksum();
    dsdt.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_adds_up_and_is_found() {
        let tables = build(3);
        let find = |address: u64| {
            let found = tables.iter().find(|(at, _)| *at == address);
            &found.unwrap_or_else(|| panic!("nothing at {address:#x}")).1
        };
        for (address, bytes) in &tables {
            let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "the table at {address:#x}");
        }
        let rsdp = find(RSDP);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let first = rsdp[..20]
            .iter()
            .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(first, 0);
        let xsdt = find(word(rsdp, 24));
        let (fadt, madt) = (find(word(xsdt, 36)), find(word(xsdt, 44)));
        assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
        assert_eq!(&find(word(fadt, 140))[..4], b"DSDT");
        // Three processors of 8 bytes each, one I/O APIC of 12.
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
    }

    #[test]
    fn tables_keep_apart_and_stay_in_the_rom_area() {
        let mut tables = build(64);
        tables.sort_by_key(|(address, _)| *address);
        for pair in tables.windows(2) {
            assert!(pair[0].0 + pair[0].1.len() as u64 <= pair[1].0);
        }
        let (address, bytes) = tables.last().unwrap();
        assert!(address + (bytes.len() as u64) < 0x10_0000);
    }

    #[test]
    fn the_bus_has_the_name_that_drivers_look_for() {
        let dsdt = dsdt();
        let at = dsdt.windows(6).filter(|part| part == b"VMBUS\0").count();
        assert_eq!(at, 2, "_HID and _DDN");
    }
}
