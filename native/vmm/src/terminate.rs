//! SIGTERM and SIGINT end the machine in an orderly way, also when it is the first process of its namespace.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

static EVENT: AtomicI32 = AtomicI32::new(-1);

extern "C" fn terminate(_: libc::c_int) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: write is allowed in a signal handler; the eventfd lives as long as the process.
    unsafe {
        libc::write(
            EVENT.load(Ordering::Relaxed),
            one.as_ptr().cast(),
            one.len(),
        )
    };
}

/// Gives what is readable once one of the signals has come. To be kept for the process's whole life.
pub fn install() -> io::Result<EventFd> {
    let event = EventFd::new(EFD_NONBLOCK)?;
    EVENT.store(event.as_raw_fd(), Ordering::Relaxed);
    for number in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: an all-zero sigaction is valid: no flags, empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = terminate as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: a valid action whose handler calls nothing but write.
        if unsafe { libc::sigaction(number, &action, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(event)
}
