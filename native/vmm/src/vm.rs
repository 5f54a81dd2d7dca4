//! The virtual machine in KVM: memory slots, interrupt chips and routes, processors in their reset state.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use kvm_bindings::{
    kvm_clock_data, kvm_msr_entry, kvm_pit_config, CpuId, KvmIrqRouting, Msrs,
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_HYPERV_ENFORCE_CPUID, KVM_CAP_HYPERV_EVENTFD,
    KVM_CAP_HYPERV_SYNIC2, KVM_CAP_HYPERV_VP_INDEX, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IRQCHIP,
    KVM_CAP_IRQFD_RESAMPLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vswitch_wire::door::SINT_COUNT;

use crate::boot;
use crate::calls;
use crate::cpuid;
use crate::devices::SERIAL_IRQ;
use crate::error::{Context, Error, Result};
use crate::memory::Memory;

/// Where VMBus takes its messages and events (Linux, VMBUS_MESSAGE_SINT).
const EVENT_SINT: u32 = 2;
const FIRST_SINT_GSI: u32 = 24;
const TSS: usize = 0xFFFB_D000;
const IDENTITY_MAP: u64 = 0xFFFB_C000;
const MSR_MISC_ENABLE: u32 = 0x1A0;
const FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2FF;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
const LVT0: usize = 0x350;
const LVT1: usize = 0x360;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTERNAL: u32 = 7 << 8;

/// Capabilities without which no Hyper-V guest runs, with their names.
pub const NEEDED: [(u32, &str); 6] = [
    (KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP"),
    (KVM_CAP_IRQFD_RESAMPLE, "KVM_CAP_IRQFD_RESAMPLE"),
    (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
    (KVM_CAP_HYPERV_SYNIC2, "KVM_CAP_HYPERV_SYNIC2"),
    (KVM_CAP_HYPERV_VP_INDEX, "KVM_CAP_HYPERV_VP_INDEX"),
    (KVM_CAP_HYPERV_EVENTFD, "KVM_CAP_HYPERV_EVENTFD"),
];

/// One life of the machine: a reset makes a new one.
pub struct Vm {
    fd: VmFd,
    /// The descriptors that KVM watches: interrupts from the host, messages by (VP, SINT).
    interrupts: Vec<EventFd>,
    messages: HashMap<(u32, u32), EventFd>,
    /// Written by KVM when a virtual processor ends an interrupt or a message.
    acknowledged: Vec<EventFd>,
    connections: HashMap<u32, OwnedFd>,
}

fn gsi(vp: u32, sint: u32) -> u32 {
    FIRST_SINT_GSI + vp * SINT_COUNT + sint
}

impl Vm {
    /// A machine with its processors; the first one is about to run at `entry`.
    pub fn create(
        kvm: &Kvm,
        memory: &Memory,
        vp_count: u32,
        privileges: u64,
        entry: u64,
        serial_irq: &EventFd,
    ) -> Result<(Self, Vec<VcpuFd>)> {
        let fd = kvm.create_vm().context("creating a virtual machine")?;
        fd.set_tss_address(TSS).context("KVM_SET_TSS_ADDR")?;
        fd.set_identity_map_address(IDENTITY_MAP)
            .context("KVM_SET_IDENTITY_MAP_ADDR")?;
        fd.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        fd.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .context("KVM_CREATE_PIT2")?;
        calls::set_memory(&fd, memory).context("guest memory")?;
        let base = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .context("KVM_GET_SUPPORTED_CPUID")?;
        let mut vcpus = Vec::new();
        for vp in 0..vp_count {
            let vcpu = fd.create_vcpu(u64::from(vp)).context("KVM_CREATE_VCPU")?;
            set_up(kvm, &vcpu, &base, privileges, vp, vp_count)?;
            vcpus.push(vcpu);
        }
        if let Some(first) = vcpus.first() {
            start_at(first, entry)?;
        }
        fd.set_gsi_routing(&routes(vp_count)?)
            .context("KVM_SET_GSI_ROUTING")?;
        fd.register_irqfd(serial_irq, SERIAL_IRQ)
            .context("the serial port's interrupt")?;
        let new = |_| EventFd::new(EFD_NONBLOCK).context("interrupt acknowledgement");
        let acknowledged = (0..vp_count).map(new).collect::<Result<_>>()?;
        let vm = Self {
            fd,
            interrupts: Vec::new(),
            messages: HashMap::new(),
            acknowledged,
            connections: HashMap::new(),
        };
        Ok((vm, vcpus))
    }

    /// The host's interrupt eventfds, one per VP; they replace those of an earlier door.
    pub fn bind_interrupts(&mut self, fds: &[EventFd]) -> Result<()> {
        for (vp, old) in (0..).zip(self.interrupts.drain(..)) {
            // Fails only if KVM does not know it, which is what is wanted.
            let _ = self.fd.unregister_irqfd(&old, gsi(vp, EVENT_SINT));
        }
        for (vp, fd) in (0..).zip(fds) {
            self.fd
                .register_irqfd(fd, gsi(vp, EVENT_SINT))
                .context("the host's interrupt eventfd")?;
            self.interrupts
                .push(fd.try_clone().context("interrupt eventfd")?);
        }
        Ok(())
    }

    /// The partition's reference time, in units of 100 ns, is this from now on.
    pub fn set_reference_time(&self, units: u64) -> Result<()> {
        let clock = kvm_clock_data {
            clock: units.saturating_mul(100),
            ..Default::default()
        };
        self.fd.set_clock(&clock).context("KVM_SET_CLOCK")
    }

    /// What raises a SINT after a message was written into its slot.
    pub fn message_line(&mut self, vp: u32, sint: u32) -> Result<EventFd> {
        if let Some(line) = self.messages.get(&(vp, sint)) {
            return line.try_clone().context("message interrupt");
        }
        let line = EventFd::new(EFD_NONBLOCK).context("message interrupt")?;
        let acknowledged = self
            .acknowledged
            .get(vp as usize)
            .ok_or_else(|| Error::new(format!("no virtual processor {vp}")))?;
        self.fd
            .register_irqfd_with_resample(&line, acknowledged, gsi(vp, sint))
            .context("message interrupt")?;
        let copy = line.try_clone().context("message interrupt")?;
        self.messages.insert((vp, sint), line);
        Ok(copy)
    }

    /// One per virtual processor, readable when its slots are to be looked at.
    pub fn acknowledged(&self) -> &[EventFd] {
        &self.acknowledged
    }

    /// Lets the guest signal a connection without leaving the kernel; None: no more.
    pub fn set_connection(&mut self, connection: u32, fd: Option<OwnedFd>) -> Result<()> {
        if self.connections.remove(&connection).is_some() {
            calls::set_hyperv_eventfd(&self.fd, connection, None).context("KVM_HYPERV_EVENTFD")?;
        }
        if let Some(fd) = fd {
            calls::set_hyperv_eventfd(&self.fd, connection, Some(fd.as_fd()))
                .context("KVM_HYPERV_EVENTFD")?;
            self.connections.insert(connection, fd);
        }
        Ok(())
    }

    /// The host's descriptors are dead.
    pub fn forget_connections(&mut self) -> Result<()> {
        let all: Vec<u32> = self.connections.keys().copied().collect();
        all.into_iter()
            .try_for_each(|connection| self.set_connection(connection, None))
    }
}

/// PIC and I/O APIC pins one to one, then every SINT of every virtual processor.
fn routes(vp_count: u32) -> Result<KvmIrqRouting> {
    let mut entries = Vec::new();
    for pin in 0..24 {
        if pin < 8 {
            entries.push(calls::chip_route(pin, KVM_IRQCHIP_PIC_MASTER, pin));
        } else if pin < 16 {
            entries.push(calls::chip_route(pin, KVM_IRQCHIP_PIC_SLAVE, pin - 8));
        }
        entries.push(calls::chip_route(pin, KVM_IRQCHIP_IOAPIC, pin));
    }
    for vp in 0..vp_count {
        entries.extend((0..SINT_COUNT).map(|sint| calls::sint_route(gsi(vp, sint), vp, sint)));
    }
    KvmIrqRouting::from_entries(&entries)
        .map_err(|error| Error::new(format!("interrupt routes: {error:?}")))
}

fn set_up(
    kvm: &Kvm,
    vcpu: &VcpuFd,
    base: &CpuId,
    privileges: u64,
    vp: u32,
    vp_count: u32,
) -> Result<()> {
    calls::enable(vcpu, KVM_CAP_HYPERV_SYNIC2, 0).context("KVM_CAP_HYPERV_SYNIC2")?;
    let hyperv = calls::supported_hv_cpuid(vcpu).context("KVM_GET_SUPPORTED_HV_CPUID")?;
    let leaves = cpuid::leaves(base.as_slice(), hyperv.as_slice(), privileges, vp, vp_count);
    let leaves = CpuId::from_entries(&leaves)
        .map_err(|error| Error::new(format!("CPUID leaves: {error:?}")))?;
    vcpu.set_cpuid2(&leaves).context("KVM_SET_CPUID2")?;
    // Where KVM can: what the leaves do not offer raises #GP or fails, of both interfaces.
    for capability in [
        KVM_CAP_HYPERV_ENFORCE_CPUID,
        KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
    ] {
        if kvm.check_extension_raw(u64::from(capability)) > 0 {
            calls::enable(vcpu, capability, 1).context("enforcing CPUID")?;
        }
    }
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[
        entry(MSR_MISC_ENABLE, FAST_STRING),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK),
    ])
    .map_err(|error| Error::new(format!("MSRs: {error:?}")))?;
    vcpu.set_msrs(&msrs).context("KVM_SET_MSRS")?;
    let mut lapic = vcpu.get_lapic().context("KVM_GET_LAPIC")?;
    for (register, mode) in [(LVT0, DELIVER_EXTERNAL), (LVT1, DELIVER_NMI)] {
        if let Some(bytes) = lapic.regs.get_mut(register..register + 4) {
            for (place, value) in bytes.iter_mut().zip(mode.to_le_bytes()) {
                *place = value as i8;
            }
        }
    }
    vcpu.set_lapic(&lapic).context("KVM_SET_LAPIC")
}

fn start_at(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    boot::tables::set_registers(&mut sregs);
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    let mut regs = vcpu.get_regs().context("KVM_GET_REGS")?;
    regs.rip = entry;
    regs.rsi = boot::BOOT_PARAMS;
    regs.rsp = boot::STACK;
    regs.rbp = regs.rsp;
    regs.rflags = 2;
    vcpu.set_regs(&regs).context("KVM_SET_REGS")
}
