//! Eventfds, private or shared with a peer that may change their flags: no call here can block.

use std::io;
use std::os::fd::RawFd;

use crate::aio;

/// Makes an eventfd, non-blocking and close-on-exec.
pub fn create() -> io::Result<RawFd> {
    // SAFETY: plain values in, a new fd or -1 out.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// Adds 1 to an eventfd that nobody hostile shares. A full counter is already a wake-up, and an fd that is no eventfd
/// any more wakes nobody: no error.
pub fn signal(fd: RawFd) {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // O_NONBLOCK belongs to the open file description, which a peer may have changed: ask before writing.
    // SAFETY: one valid pollfd.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    if ready == 1 && poll.revents & libc::POLLOUT != 0 {
        let one = 1u64.to_ne_bytes();
        // SAFETY: 8 valid bytes.
        unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) };
    }
}

/// As `signal`, for an eventfd that a hostile peer shares: it may clear O_NONBLOCK and fill the counter between any two
/// of our calls, so a `write` could block for ever. The kernel signals it for us instead, which never waits, and wakes
/// pollers even when the counter is full. Where the kernel has no AIO, this is `signal`.
pub fn signal_shared(fd: RawFd) {
    if !aio::signal(fd) {
        signal(fd);
    }
}

/// Makes ready what `signal_shared` needs, before a peer can use up the system's share of it; whether it will hold.
pub fn prepare_shared() -> bool {
    aio::available()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{mpsc, Arc};
    use std::time::Duration;

    fn eventfd() -> OwnedFd {
        // SAFETY: made just now.
        unsafe { OwnedFd::from_raw_fd(create().unwrap()) }
    }

    fn fill(fd: RawFd) {
        let most = (u64::MAX - 1).to_ne_bytes();
        // SAFETY: 8 valid bytes.
        unsafe { libc::write(fd, most.as_ptr().cast(), 8) };
    }

    #[test]
    fn a_shared_signal_counts_and_never_runs_out() {
        let fd = eventfd();
        assert!(prepare_shared(), "this kernel has no AIO");
        for _ in 0..2000 {
            signal_shared(fd.as_raw_fd());
        }
        assert_eq!(drain(fd.as_raw_fd()), 2000);
        assert_eq!(drain(fd.as_raw_fd()), 0);
        signal_shared(-1);
    }

    #[test]
    fn a_peer_that_fills_the_counter_of_a_blocking_eventfd_holds_no_shared_signal() {
        let fd = Arc::new(eventfd());
        let stop = Arc::new(AtomicBool::new(false));
        let (peer, ends) = (Arc::clone(&fd), Arc::clone(&stop));
        let hostile = std::thread::spawn(move || {
            let fd = peer.as_raw_fd();
            // SAFETY: plain values.
            let flags = |value: i32| unsafe { libc::fcntl(fd, libc::F_SETFL, value) };
            while !ends.load(Ordering::Relaxed) {
                flags(libc::O_NONBLOCK);
                drain(fd);
                fill(fd);
                flags(0);
            }
            drain(fd);
            flags(0);
            fill(fd);
        });
        let (done, finished) = mpsc::channel();
        let host = Arc::clone(&fd);
        std::thread::spawn(move || {
            for _ in 0..20_000 {
                signal_shared(host.as_raw_fd());
            }
            done.send(()).unwrap();
        });
        let outcome = finished.recv_timeout(Duration::from_secs(30));
        stop.store(true, Ordering::Relaxed);
        hostile.join().unwrap();
        assert!(outcome.is_ok(), "a signal blocked");
        // Full and blocking for good: still no wait.
        signal_shared(fd.as_raw_fd());
    }
}
