//! Bringing a virtual processor's thread out of KVM_RUN, without a window in which the wish is lost.
//!
//! The signal's handler sets `immediate_exit` in the thread's own run structure: whether the signal comes before, in or after
//! KVM_RUN, the next return from it is at once.

use std::cell::Cell;
use std::io;
use std::ptr;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

thread_local! {
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

fn number() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn kicked(_: libc::c_int) {
    // A plain load of a constant-initialised thread-local: safe in a signal handler.
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: set by this thread to a mapping that it clears before it gives the processor away.
        unsafe { ptr::addr_of_mut!((*run).immediate_exit).write_volatile(1) };
    }
}

/// Installs the handler, for the whole process.
pub fn install() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid: no flags (KVM_RUN must be interrupted), empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = kicked as extern "C" fn(libc::c_int) as usize;
    // SAFETY: a valid action whose handler touches this thread's own data alone.
    if unsafe { libc::sigaction(number(), &action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Ties the calling thread to a processor, or to none.
pub fn bind(vcpu: Option<&mut VcpuFd>) {
    let run = vcpu.map_or(ptr::null_mut(), |vcpu| ptr::from_mut(vcpu.get_kvm_run()));
    RUN.set(run);
}

/// The calling thread, for `kick`.
pub fn this_thread() -> libc::pid_t {
    // SAFETY: asks for a number.
    unsafe { libc::gettid() }
}

/// Makes a thread of this process leave KVM_RUN.
pub fn kick(thread: libc::pid_t) {
    // SAFETY: sends a signal whose handler is installed; a thread that is gone gives an error.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, number()) };
}
