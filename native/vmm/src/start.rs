//! From a command line to a machine that waits for its host.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use kvm_ioctls::Kvm;

use crate::args::Options;
use crate::calls;
use crate::error::{Context, Error, Result};
use crate::machine::{End, Machine};
use crate::{kick, privileges, probe, sandbox, terminate};

const DOOR_VARIABLE: &str = "VSWITCH_DOOR_FD";

/// The KVM device: the one that was handed over, or this machine's own.
pub fn open_kvm(fd: Option<OwnedFd>) -> Result<Kvm> {
    let kvm = match fd {
        // SAFETY: the descriptor's only owner gives it away.
        Some(fd) => unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) },
        None => Kvm::new().map_err(|error| {
            let remedy = match error.errno() {
                libc::ENOENT => "load kvm-intel or kvm-amd, or enable virtualisation",
                libc::EACCES => "add your user to the group kvm",
                _ => "see the kernel's log",
            };
            Error::new(format!("/dev/kvm: {error}; {remedy}"))
        })?,
    };
    if kvm.get_api_version() != 12 {
        return Err(Error::new(
            "the descriptor given as /dev/kvm is no KVM device",
        ));
    }
    Ok(kvm)
}

/// Runs one machine to its end.
pub fn run(mut options: Options) -> Result<End> {
    let number = std::env::var(DOOR_VARIABLE)
        .ok()
        .and_then(|text| text.parse::<RawFd>().ok());
    let listener = number.and_then(calls::take_fd).ok_or_else(|| {
        Error::new(format!(
            "{DOOR_VARIABLE} must name the door's listening socket; machines are started by vswitchd"
        ))
    })?;
    let kvm = open_kvm(options.kvm.take())?;
    let mut kept = vec![
        0,
        1,
        2,
        listener.as_raw_fd(),
        kvm.as_raw_fd(),
        options.kernel.as_raw_fd(),
        options.console.as_raw_fd(),
    ];
    kept.extend(options.initrd.as_ref().map(AsRawFd::as_raw_fd));
    privileges::close_others(&kept);
    probe::check(&kvm)?;
    sandbox::set_affinity(&options.host_cpus)?;
    let log = io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .context("standard output")?;
    kick::install().context("signals")?;
    let terminated = terminate::install().context("signals")?;
    sandbox::give_up_privileges()?;
    Machine::new(options, kvm, listener, log, terminated)?.run()
}
