//! The system calls that no crate wraps, each behind a safe function.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use kvm_bindings::{
    kvm_cpuid2, kvm_enable_cap, kvm_hyperv_eventfd, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip,
    kvm_userspace_memory_region, CpuId, KVM_HYPERV_EVENTFD_DEASSIGN, KVM_IRQ_ROUTING_HV_SINT,
    KVM_IRQ_ROUTING_IRQCHIP, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use crate::memory::Memory;

const KVMIO: u32 = 0xAE;
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

ioctl_iow_nr!(KVM_HYPERV_EVENTFD, KVMIO, 0xBD, kvm_hyperv_eventfd);
ioctl_iowr_nr!(KVM_GET_SUPPORTED_HV_CPUID, KVMIO, 0xC1, kvm_cpuid2);

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Whether a memfd's size is sealed for good.
pub fn sealed(file: &impl AsRawFd) -> bool {
    // SAFETY: asks for flags of an open descriptor; no memory is passed.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & SEALS == SEALS
}

/// Takes a descriptor that the command line or the environment named; None when it is not open.
pub fn take_fd(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: asks for flags; a number that is not open gives an error.
    if number < 0 || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: open, inherited for this purpose, and named once: nobody else in this process owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    // SAFETY: sets a flag of an open descriptor.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    Some(fd)
}

/// File status flags (O_APPEND, ...); 0 when they cannot be read.
pub fn status_flags(fd: BorrowedFd<'_>) -> libc::c_int {
    // SAFETY: asks for flags of an open descriptor.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }.max(0)
}

/// Accepts a connection without waiting.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no address is asked for; the result is checked.
    let fd = check(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            flags,
        )
    })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes accept() and read() on a descriptor of our own return at once.
pub fn set_nonblocking(fd: BorrowedFd<'_>) {
    let flags = status_flags(fd);
    // SAFETY: sets a flag of an open descriptor.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
}

/// An eventfd that came through the door.
pub fn eventfd(fd: OwnedFd) -> EventFd {
    // SAFETY: the descriptor's only owner gives it away.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}

/// Whether `fd` takes bytes right now.
pub fn writable(fd: RawFd) -> bool {
    let mut entry = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one valid entry; returns at once.
    unsafe { libc::poll(&mut entry, 1, 0) == 1 }
}

/// Maps every region of the guest's memory into the virtual machine.
pub fn set_memory(vm: &VmFd, memory: &Memory) -> Result<(), kvm_ioctls::Error> {
    for (slot, region) in memory.iter().enumerate() {
        let Ok(address) = region.get_host_address(MemoryRegionAddress(0)) else {
            return Err(kvm_ioctls::Error::new(libc::EFAULT));
        };
        let entry = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: address as u64,
        };
        // SAFETY: the mapping is shared memory that lives as long as the process; KVM and the guest may change it at any
        // time, and this process reads and writes it through volatile or atomic accesses alone.
        unsafe { vm.set_user_memory_region(entry)? };
    }
    Ok(())
}

/// Hyper-V's CPUID leaves that this KVM can serve for a virtual processor.
pub fn supported_hv_cpuid(vcpu: &VcpuFd) -> io::Result<CpuId> {
    let mut leaves = CpuId::new(KVM_MAX_CPUID_ENTRIES)
        .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    // SAFETY: the structure says how many entries it has room for, and KVM writes at most as many.
    let result = unsafe {
        ioctl_with_mut_ref(
            vcpu,
            KVM_GET_SUPPORTED_HV_CPUID(),
            &mut *leaves.as_mut_fam_struct_ptr(),
        )
    };
    check(result)?;
    Ok(leaves)
}

/// Lets the guest's HvCallSignalEvent on `connection` write `fd`; None takes it back.
pub fn set_hyperv_eventfd(
    vm: &VmFd,
    connection: u32,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let entry = kvm_hyperv_eventfd {
        conn_id: connection,
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        flags: if fd.is_none() {
            KVM_HYPERV_EVENTFD_DEASSIGN
        } else {
            0
        },
        padding: [0; 3],
    };
    // SAFETY: a valid structure that KVM only reads.
    check(unsafe { ioctl_with_ref(vm, KVM_HYPERV_EVENTFD(), &entry) }).map(|_| ())
}

/// A capability without arguments, switched on for a virtual processor.
pub fn enable(vcpu: &VcpuFd, capability: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    let mut wanted = kvm_enable_cap {
        cap: capability,
        ..Default::default()
    };
    wanted.args[0] = argument;
    vcpu.enable_cap(&wanted)
}

/// Routes a GSI to a pin of an in-kernel interrupt chip.
pub fn chip_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

/// Routes a GSI to a SINT of a virtual processor.
pub fn sint_route(gsi: u32, vcpu: u32, sint: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_HV_SINT,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            hv_sint: kvm_irq_routing_hv_sint { vcpu, sint },
        },
        ..Default::default()
    }
}
