//! What a virtual processor's run structure says of the Hyper-V exits, and of those after which it cannot go on.

use kvm_bindings::{
    kvm_run, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNIC,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_UNKNOWN,
};
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

/// The exit that KVM_RUN has just returned with, in words, and where the processor is: one that this machine cannot serve.
pub fn failure(vcpu: &mut VcpuFd) -> String {
    let what = describe(vcpu.get_kvm_run());
    match vcpu.get_regs() {
        Ok(registers) => format!("{what}, at {:#x}", registers.rip),
        Err(_) => what,
    }
}

fn describe(run: &kvm_run) -> String {
    match run.exit_reason {
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: the exit reason says that this member of the union is the valid one; all its fields are plain numbers.
            let error = unsafe { run.__bindgen_anon_1.internal };
            let count = (error.ndata as usize).min(error.data.len());
            let data = error.data.get(..count).unwrap_or_default();
            format!(
                "KVM cannot run what its processor is at: internal error {} {data:x?}",
                error.suberror
            )
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let entry = unsafe { run.__bindgen_anon_1.fail_entry };
            format!(
                "KVM cannot enter its processor: hardware reason {:#x} on CPU {}",
                entry.hardware_entry_failure_reason, entry.cpu
            )
        }
        KVM_EXIT_UNKNOWN => {
            // SAFETY: as above.
            let reason = unsafe { run.__bindgen_anon_1.hw }.hardware_exit_reason;
            format!("KVM cannot tell why its processor stopped: hardware reason {reason:#x}")
        }
        other => {
            format!("its processor stopped for KVM's exit reason {other}, which is not served")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(exit_reason: u32) -> kvm_run {
        kvm_run {
            exit_reason,
            ..Default::default()
        }
    }

    #[test]
    fn an_exit_that_is_the_end_is_named_with_its_numbers() {
        let mut internal = run(KVM_EXIT_INTERNAL_ERROR);
        internal.__bindgen_anon_1.internal.suberror = 3;
        internal.__bindgen_anon_1.internal.ndata = u32::MAX;
        let words = describe(&internal);
        assert!(words.contains("internal error 3 [0, "), "{words}");
        let mut entry = run(KVM_EXIT_FAIL_ENTRY);
        entry
            .__bindgen_anon_1
            .fail_entry
            .hardware_entry_failure_reason = 0x8000_0021;
        let words = describe(&entry);
        assert!(words.contains("0x80000021"), "{words}");
        let mut unknown = run(KVM_EXIT_UNKNOWN);
        unknown.__bindgen_anon_1.hw.hardware_exit_reason = 0x1F;
        assert!(describe(&unknown).contains("0x1f"));
        assert!(describe(&run(38)).contains("exit reason 38"));
    }
}
