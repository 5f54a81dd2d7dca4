//! What the VMM does for its guest without KVM: I/O ports, SynIC registers and message slots in memory that the guest writes;
//! and the kernel image that it is given. No panic; every message is written or lost once and ends once.
#![no_main]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vswitch_vmm::boot;
use vswitch_vmm::console::Output;
use vswitch_vmm::devices::Ports;
use vswitch_vmm::memory::Memory;
use vswitch_vmm::synic::{Registers, Slots, Waiting};

const SIZE: usize = 4 << 20;

thread_local! {
    static MEMORY: Memory = Memory::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap();
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    MEMORY.with(|memory| {
        if kind % 8 == 0 {
            image(memory, rest);
        } else {
            machine(memory, rest);
        }
    });
});

fn image(memory: &Memory, bytes: &[u8]) {
    // SAFETY: a system call without pointers to anything but a static name; the result is checked and has no other owner.
    let mut kernel = unsafe {
        let fd = libc::memfd_create(c"kernel".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    kernel.write_all(bytes).unwrap();
    // An entry point that makes no sense is the guest's to fault at.
    let _ = boot::load(memory, &mut kernel, None, "console=ttyS0", 2);
}

/// The guest's hands and the host's messages, step by step.
fn machine(memory: &Memory, data: &[u8]) {
    let output = Arc::new(Output::new().unwrap());
    let ports = Ports::new(Arc::clone(&output)).unwrap();
    let slots = Slots::default();
    // SINTs with a message that no EOM has answered: the door lets one through for each.
    let mut open = BTreeSet::new();
    let mut rest = data;
    while let Some((step, tail)) = rest.split_first_chunk::<12>() {
        rest = tail;
        let [kind, choice, a, b, value @ ..] = *step;
        let value = u64::from_le_bytes(value);
        let port = u16::from_le_bytes([a, b]);
        match kind % 9 {
            0 => {
                let _ = ports.write(port, &value.to_le_bytes()[..usize::from(choice % 9)]);
            }
            1 => ports.read(port, &mut [0; 8][..usize::from(choice % 9)]),
            2 => {
                let _ = ports.type_in(&[choice; 256][..usize::from(a)]);
                assert!(output.read_from(value).1.len() <= 65536);
            }
            3 => {
                let mut registers = slots.registers();
                match choice % 5 {
                    0 => registers.control = value,
                    1 => registers.simp = value,
                    2 => registers.siefp = value,
                    3 => registers.hypercall = value,
                    _ => registers.sints[usize::from(a % 16)] = value,
                }
                let before = slots.set_registers(memory, registers);
                assert!(registers.changes(&before).len() <= 1);
            }
            4 => {
                let sint = u32::from(choice % 16);
                if open.insert(sint) {
                    let mut message = Box::new([b; 256]);
                    message[..4].copy_from_slice(&[a | 1, 0, 0, 0]);
                    slots.queue(Waiting { sint, message });
                }
            }
            5 => {
                let lost = slots.write(memory, |sint| assert!(open.contains(&sint)));
                for sint in lost {
                    assert!(open.remove(&sint), "ended twice: {sint}");
                }
            }
            6 => {
                let (taken, _) = slots.emptied(memory);
                for sint in taken {
                    assert!(open.remove(&sint), "ended twice: {sint}");
                }
            }
            7 => {
                let _ = memory.write_obj(value, GuestAddress(u64::from(port) * 16));
            }
            _ => {
                slots.forget(choice & 1 == 1);
                open.clear();
            }
        }
    }
    // Switched off, everything ends.
    slots.set_registers(memory, Registers::default());
    for sint in slots.write(memory, |_| panic!("nothing may be written")) {
        assert!(open.remove(&sint), "ended twice: {sint}");
    }
    assert!(open.is_empty(), "never ended: {open:?}");
}
