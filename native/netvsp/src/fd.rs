//! File descriptors that this crate owns. The only place with raw ones.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A new eventfd, non-blocking and close-on-exec.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    let fd = vswitch_memory::eventfd::create()?;
    // SAFETY: `create` made the fd just now and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A duplicate of the caller's `fd`, close-on-exec.
pub(crate) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the caller's fd is open for the duration of the call; a closed one gives EBADF.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}
