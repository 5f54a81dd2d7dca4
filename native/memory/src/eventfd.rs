//! Eventfds shared with a peer that may change their flags: no call here can block.

use std::io;
use std::os::fd::RawFd;

/// Makes an eventfd, non-blocking and close-on-exec.
pub fn create() -> io::Result<RawFd> {
    // SAFETY: plain values in, a new fd or -1 out.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// Adds 1. A full counter is already a wake-up, and an fd that is no eventfd any more wakes nobody: no error.
pub fn signal(fd: RawFd) {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // O_NONBLOCK belongs to the open file description, which the peer shares and may clear: ask before writing.
    // SAFETY: one valid pollfd.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    if ready == 1 && poll.revents & libc::POLLOUT != 0 {
        let one = 1u64.to_ne_bytes();
        // SAFETY: 8 valid bytes.
        unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) };
    }
}

/// Reads and clears the counter; 0 when it was clear.
pub fn drain(fd: RawFd) -> u64 {
    let mut counter = [0u8; 8];
    let part = libc::iovec {
        iov_base: counter.as_mut_ptr().cast(),
        iov_len: counter.len(),
    };
    // SAFETY: one valid iovec over 8 private bytes; RWF_NOWAIT makes the call non-blocking whatever the flags of the fd.
    let got = unsafe { libc::preadv2(fd, &part, 1, -1, libc::RWF_NOWAIT) };
    if got == 8 {
        u64::from_ne_bytes(counter)
    } else {
        0
    }
}
