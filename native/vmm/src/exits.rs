//! The Hyper-V exits in a virtual processor's run structure.

use kvm_bindings::{KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNIC};
use kvm_ioctls::VcpuFd;

/// What KVM leaves to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HyperV {
    /// One of these registers was written; all three are as they are now.
    Synic { control: u64, siefp: u64, simp: u64 },
    /// A hypercall; its result is due before the guest goes on.
    Hypercall { input: u64, parameters: [u64; 2] },
}

/// The exit that KVM_RUN has just returned with; None for a kind that this machine does not use.
pub fn hyperv(vcpu: &mut VcpuFd) -> Option<HyperV> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_HYPERV {
        return None;
    }
    // SAFETY: the exit reason says that this member of the union is the valid one; all its fields are plain numbers.
    let exit = unsafe { run.__bindgen_anon_1.hyperv };
    match exit.type_ {
        KVM_EXIT_HYPERV_SYNIC => {
            // SAFETY: as above, by the exit's own type.
            let synic = unsafe { exit.u.synic };
            Some(HyperV::Synic {
                control: synic.control,
                siefp: synic.evt_page,
                simp: synic.msg_page,
            })
        }
        KVM_EXIT_HYPERV_HCALL => {
            // SAFETY: as above, by the exit's own type.
            let call = unsafe { exit.u.hcall };
            Some(HyperV::Hypercall {
                input: call.input,
                parameters: call.params,
            })
        }
        _ => None,
    }
}

/// Leaves the result of a hypercall for KVM to hand to the guest.
pub fn finish_hypercall(vcpu: &mut VcpuFd, result: u64) {
    vcpu.get_kvm_run().__bindgen_anon_1.hyperv.u.hcall.result = result;
}
