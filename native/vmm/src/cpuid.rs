//! What the processor says of itself: KVM's offer, narrowed to this machine, with Hyper-V as the hypervisor.
//!
//! TLFS, "Feature and Interface Discovery". A feature is there when KVM serves it or the host behind the door does; nothing
//! of KVM's own interface is left, at any base, so that a guest finds one hypervisor.

use kvm_bindings::{kvm_cpuid_entry2, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};

pub const HYPERVISOR_FIRST: u32 = 0x4000_0000;
pub const HYPERVISOR_LAST: u32 = 0x4000_FFFF;
const HV_INTERFACE: u32 = 0x4000_0001;
const HV_FEATURES: u32 = 0x4000_0003;
const HV_LAST_LEAF: u32 = 0x4000_0006;
const VENDOR: [u32; 3] = [
    u32::from_le_bytes(*b"Micr"),
    u32::from_le_bytes(*b"osof"),
    u32::from_le_bytes(*b"t Hv"),
];
const INTERFACE: u32 = u32::from_le_bytes(*b"Hv#1");

/// 0x40000003 EAX: what the door's host must grant for the guest to see it.
const EAX_OF_THE_HOST: u32 = 1 << 1 | 1 << 2 | 1 << 5 | 1 << 6;
/// 0x40000003 EAX: what KVM serves alone: VP run time, synthetic timers, APIC registers, reset, reference TSC,
/// frequencies, invariant TSC.
const EAX_OF_KVM: u32 = 1 << 0 | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 9 | 1 << 11 | 1 << 15;
/// EBX: PostMessages, SignalEvents. The host serves more calls than these, but KVM hands no others on.
const EBX_SERVED: u32 = 1 << 4 | 1 << 5;
/// EDX: XMM input, frequency registers, crash registers, extended flush ranges, direct synthetic timers.
const EDX_SERVED: u32 = 1 << 4 | 1 << 8 | 1 << 10 | 1 << 14 | 1 << 19;
/// 0x40000004 EAX: nested features that need a leaf this machine does not have.
const HINT_ENLIGHTENED_VMCS: u32 = 1 << 14;

/// The leaves of one virtual processor. `base` is KVM's offer for processors, `hyperv` its Hyper-V leaves.
pub fn leaves(
    base: &[kvm_cpuid_entry2],
    hyperv: &[kvm_cpuid_entry2],
    privileges: u64,
    vp: u32,
    vp_count: u32,
) -> Vec<kvm_cpuid_entry2> {
    let mut leaves: Vec<kvm_cpuid_entry2> = base
        .iter()
        .copied()
        .filter(|entry| !(HYPERVISOR_FIRST..=HYPERVISOR_LAST).contains(&entry.function))
        .filter(|entry| !matches!(entry.function, 0xB | 0x1F | 0x8000_000A))
        .map(|entry| of_this_processor(entry, vp, vp_count))
        .collect();
    let highest = base.iter().find(|entry| entry.function == 0);
    if highest.is_some_and(|entry| entry.eax >= 0xB) {
        leaves.extend(topology(vp, vp_count));
    }
    leaves.extend(
        hyperv
            .iter()
            .copied()
            .filter(|entry| (HYPERVISOR_FIRST..=HV_LAST_LEAF).contains(&entry.function))
            .map(|entry| of_this_hypervisor(entry, privileges)),
    );
    leaves
}

fn of_this_hypervisor(mut entry: kvm_cpuid_entry2, privileges: u64) -> kvm_cpuid_entry2 {
    match entry.function {
        HYPERVISOR_FIRST => {
            entry.eax = HV_LAST_LEAF;
            [entry.ebx, entry.ecx, entry.edx] = VENDOR;
        }
        HV_INTERFACE => entry.eax = INTERFACE,
        HV_FEATURES => {
            let (low, high) = (privileges as u32, (privileges >> 32) as u32);
            entry.eax &= EAX_OF_KVM | EAX_OF_THE_HOST & low;
            entry.ebx &= EBX_SERVED & high;
            entry.edx &= EDX_SERVED;
        }
        0x4000_0004 => entry.eax &= !HINT_ENLIGHTENED_VMCS,
        _ => {}
    }
    entry
}

/// Bits of an APIC id that number the processors of the one package.
fn id_bits(vp_count: u32) -> u32 {
    vp_count.next_power_of_two().trailing_zeros()
}

fn of_this_processor(mut entry: kvm_cpuid_entry2, vp: u32, vp_count: u32) -> kvm_cpuid_entry2 {
    const VMX: u32 = 1 << 5;
    const HYPERVISOR: u32 = 1 << 31;
    const HTT: u32 = 1 << 28;
    const SVM: u32 = 1 << 2;
    const CMP_LEGACY: u32 = 1 << 1;
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xFFFF | vp_count.min(255) << 16 | vp << 24;
            entry.ecx = entry.ecx & !VMX | HYPERVISOR;
            entry.edx = if vp_count > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Caches: the third level is shared by all, the others are each core's own.
        4 | 0x8000_001D => {
            let shared = if entry.eax >> 5 & 7 == 3 {
                vp_count - 1
            } else {
                0
            };
            entry.eax = entry.eax & !(0xFFF << 14) | shared.min(0xFFF) << 14;
            if entry.function == 4 {
                entry.eax = entry.eax & !(0x3F << 26) | (vp_count - 1).min(0x3F) << 26;
            }
        }
        0x8000_0001 => {
            entry.ecx &= !(SVM | CMP_LEGACY);
            if vp_count > 1 {
                entry.ecx |= CMP_LEGACY;
            }
        }
        0x8000_0008 => {
            entry.ecx = entry.ecx & !0xF0FF | id_bits(vp_count) << 12 | (vp_count - 1);
        }
        0x8000_001E => {
            entry.eax = vp;
            entry.ebx = vp & 0xFF;
            entry.ecx = 0;
        }
        _ => {}
    }
    entry
}

/// Leaf 0xB: one thread per core, all cores in one package.
fn topology(vp: u32, vp_count: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xB,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: vp,
        ..Default::default()
    };
    [
        level(0, 0, 1, 1),
        level(1, id_bits(vp_count), vp_count, 2),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn example(privileges: u64, vp: u32, vp_count: u32) -> Vec<kvm_cpuid_entry2> {
        let kvm = [
            u32::from_le_bytes(*b"KVMK"),
            u32::from_le_bytes(*b"VMKV"),
            u32::from_le_bytes(*b"M\0\0\0"),
        ];
        let all = u32::MAX;
        let base = [
            leaf(0, [0x10, 0, 0, 0]),
            leaf(1, [0, 0xFFFF_FFFF, 1 << 5, 0]),
            leaf(0x4000_0000, [0x4000_0001, kvm[0], kvm[1], kvm[2]]),
            leaf(0x4000_0001, [all, 0, 0, 0]),
            leaf(0x4000_0100, [0x4000_0101, kvm[0], kvm[1], kvm[2]]),
            leaf(0x8000_0001, [0, 0, 1 << 2, 0]),
        ];
        let hyperv = [
            leaf(0x4000_0000, [0x4000_0082, 1, 2, 3]),
            leaf(0x4000_0001, [INTERFACE, 0, 0, 0]),
            leaf(0x4000_0003, [all, all, all, all]),
            leaf(0x4000_0004, [all, 0, 0, 0]),
            leaf(0x4000_000A, [all, 0, 0, 0]),
            leaf(0x4000_0080, [all, 0, 0, 0]),
        ];
        leaves(&base, &hyperv, privileges, vp, vp_count)
    }

    fn get(leaves: &[kvm_cpuid_entry2], function: u32) -> kvm_cpuid_entry2 {
        let mut found = leaves.iter().filter(|entry| entry.function == function);
        let first = found
            .next()
            .unwrap_or_else(|| panic!("no leaf {function:#x}"));
        assert!(found.next().is_none(), "leaf {function:#x} is there twice");
        *first
    }

    #[test]
    fn one_hypervisor_and_it_is_not_kvm() {
        let leaves = example(u64::MAX, 0, 1);
        let first = get(&leaves, 0x4000_0000);
        assert_eq!([first.ebx, first.ecx, first.edx], VENDOR);
        assert_eq!(first.eax, HV_LAST_LEAF);
        assert!(leaves
            .iter()
            .filter(|entry| entry.function & 0xFFFF_0000 == 0x4000_0000)
            .all(|entry| entry.function <= HV_LAST_LEAF));
        let signature = u32::from_le_bytes(*b"KVMK");
        assert!(leaves.iter().all(|entry| entry.ebx != signature));
        assert_eq!(
            get(&leaves, 1).ecx,
            1 << 31,
            "a hypervisor, and no VMX below it"
        );
        assert_eq!(get(&leaves, 0x8000_0001).ecx & 1 << 2, 0, "no SVM");
    }

    #[test]
    fn features_are_those_that_are_served() {
        let all = get(&example(u64::MAX, 0, 1), HV_FEATURES);
        assert_eq!(all.eax, EAX_OF_KVM | EAX_OF_THE_HOST);
        assert_eq!(all.ebx, EBX_SERVED);
        assert_eq!(all.edx, EDX_SERVED);
        let none = get(&example(0, 0, 1), HV_FEATURES);
        assert_eq!((none.eax, none.ebx), (EAX_OF_KVM, 0));
        let synic = get(&example(1 << 2, 0, 1), HV_FEATURES);
        assert_eq!(synic.eax, EAX_OF_KVM | 1 << 2);
    }

    #[test]
    fn processors_differ_by_their_number() {
        let leaves = example(u64::MAX, 3, 4);
        let first = get(&leaves, 1);
        assert_eq!((first.ebx >> 24, first.ebx >> 16 & 0xFF), (3, 4));
        assert_ne!(first.edx & 1 << 28, 0);
        let levels: Vec<_> = leaves
            .iter()
            .filter(|entry| entry.function == 0xB)
            .collect();
        assert_eq!(levels.len(), 3);
        assert!(levels.iter().all(|entry| entry.edx == 3));
        assert_eq!((levels[1].eax, levels[1].ebx), (2, 4));
        assert_eq!(id_bits(1), 0);
        assert_eq!(id_bits(5), 3);
    }
}
