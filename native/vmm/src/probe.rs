//! Whether this machine's KVM runs Hyper-V guests.

use kvm_bindings::KVM_CAP_HYPERV_SYNIC2;
use kvm_ioctls::Kvm;

use crate::calls;
use crate::error::{Context, Error, Result};
use crate::vm::NEEDED;

/// The capabilities that are needed, and whether each is there.
pub fn capabilities(kvm: &Kvm) -> Vec<(&'static str, bool)> {
    NEEDED
        .into_iter()
        .map(|(capability, name)| (name, kvm.check_extension_raw(u64::from(capability)) > 0))
        .collect()
}

/// Refuses a KVM without them.
pub fn check(kvm: &Kvm) -> Result<()> {
    let missing: Vec<&str> = capabilities(kvm)
        .into_iter()
        .filter(|(_, there)| !there)
        .map(|(name, _)| name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::new(format!(
        "this machine's KVM cannot run Hyper-V guests: it lacks {}; use a kernel with CONFIG_KVM_HYPERV on a processor \
         with VMX or SVM",
        missing.join(", ")
    )))
}

/// The answer as one line of JSON, and whether guests run.
pub fn report(kvm: Result<Kvm>) -> (bool, String) {
    let (found, refusal) = match &kvm {
        Ok(kvm) => (
            capabilities(kvm),
            check(kvm).and_then(|()| try_out(kvm)).err(),
        ),
        Err(error) => (Vec::new(), Some(Error::new(error.to_string()))),
    };
    let capabilities: Vec<String> = found
        .iter()
        .map(|(name, there)| format!("\"{name}\": {there}"))
        .collect();
    let ok = refusal.is_none();
    let why = refusal.map_or(String::new(), |error| error.to_string());
    let text = format!(
        "{{\"ok\": {ok}, \"why\": {}, \"caps\": {{{}}}}}",
        quoted(&why),
        capabilities.join(", ")
    );
    (ok, text)
}

/// A machine with one processor that has Hyper-V's registers: what no capability bit promises.
fn try_out(kvm: &Kvm) -> Result<()> {
    let vm = kvm.create_vm().context("creating a virtual machine")?;
    vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
    let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    calls::enable(&vcpu, KVM_CAP_HYPERV_SYNIC2, 0).context("KVM_CAP_HYPERV_SYNIC2")?;
    calls::supported_hv_cpuid(&vcpu).context("KVM_GET_SUPPORTED_HV_CPUID")?;
    Ok(())
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => out.extend(['\\', letter]),
            letter if u32::from(letter) < 0x20 => {
                out.push_str(&format!("\\u{:04x}", u32::from(letter)))
            }
            letter => out.push(letter),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_kvm_is_told_so_in_json() {
        let (ok, text) = report(Err(Error::new("no \"kvm\" here\n")));
        assert!(!ok);
        let wanted = r#"{"ok": false, "why": "no \"kvm\" here\u000a", "caps": {}}"#;
        assert_eq!(text, wanted);
    }
}
