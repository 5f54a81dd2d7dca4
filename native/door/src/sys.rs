//! The system calls of a door, either end of it, each behind a safe function.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Descriptors that one frame may carry at most, either way.
pub const MAXIMUM_FDS: usize = 96;
const FD_BYTES: usize = std::mem::size_of::<RawFd>();
/// Room for one control message of MAXIMUM_FDS descriptors, in u64s for alignment.
const CONTROL_WORDS: usize = 4 + MAXIMUM_FDS * FD_BYTES / 8;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// An epoll instance; each fd is registered with a number of the caller's.
pub struct Epoll(OwnedFd);

impl Epoll {
    pub fn new() -> io::Result<Self> {
        // SAFETY: plain values; the result is checked.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: a new fd that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn control(
        &self,
        operation: libc::c_int,
        fd: RawFd,
        events: u32,
        number: u64,
    ) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events,
            u64: number,
        };
        // SAFETY: one valid event; wrong fds give an error.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), operation, fd, &mut event) }).map(|_| ())
    }

    /// Changes what is waited for on `fd` from `before` to `after`; without any event it is taken out, so that a
    /// hang-up on a door that is not read does not spin.
    pub fn update(&self, fd: RawFd, number: u64, before: u32, after: u32) -> io::Result<()> {
        match (before, after) {
            (before, after) if before == after => Ok(()),
            (0, after) => self.control(libc::EPOLL_CTL_ADD, fd, after, number),
            (_, 0) => self.control(libc::EPOLL_CTL_DEL, fd, 0, number),
            (_, after) => self.control(libc::EPOLL_CTL_MOD, fd, after, number),
        }
    }

    /// Waits for events, `timeout` milliseconds at most (-1: without end); (number, events) each.
    pub fn wait(&self, into: &mut Vec<(u64, u32)>, timeout: i32) -> io::Result<()> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        into.clear();
        // SAFETY: the array has as many events as the call is told.
        let count = match check(unsafe {
            libc::epoll_wait(
                self.0.as_raw_fd(),
                events.as_mut_ptr(),
                events.len() as i32,
                timeout,
            )
        }) {
            Ok(count) => count as usize,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        into.extend(
            events
                .iter()
                .take(count)
                .map(|event| (event.u64, event.events)),
        );
        Ok(())
    }
}

/// What recvmsg gave.
pub struct Received {
    pub length: usize,
    pub fds: Vec<OwnedFd>,
    /// The frame was longer than the buffer.
    pub truncated: bool,
    /// Descriptors came that were not expected; the kernel closed them.
    pub fds_discarded: bool,
}

/// One frame and up to `expected` descriptors, without waiting. Length 0 is end of file.
pub fn receive(fd: RawFd, buffer: &mut [u8], expected: usize) -> io::Result<Received> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: an all-zero msghdr is valid: no name, no data, no control.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    if expected > 0 {
        message.msg_control = control.as_mut_ptr().cast();
        // Room for whole descriptors up to the most that any frame has: one too many is seen, not lost.
        message.msg_controllen = std::mem::size_of_val(&control);
    }
    // SAFETY: the message points to a private buffer and a private control area, with their sizes.
    let length = unsafe {
        libc::recvmsg(
            fd,
            &mut message,
            libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
        )
    };
    if length < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut fds = Vec::new();
    // SAFETY: the kernel filled the control area and set its length.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&message) };
    // SAFETY: a non-null header points to a whole one inside the control area.
    while let Some(entry) = unsafe { header.as_ref() } {
        if entry.cmsg_level == libc::SOL_SOCKET && entry.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: the data of a header that the kernel wrote.
            let data = unsafe { libc::CMSG_DATA(header) };
            // SAFETY: computes the size of an empty control message.
            let overhead = unsafe { libc::CMSG_LEN(0) } as usize;
            for index in 0..entry.cmsg_len.saturating_sub(overhead) / FD_BYTES {
                // SAFETY: inside the data; each entry is a new fd that the kernel gave to this process alone.
                fds.push(unsafe {
                    OwnedFd::from_raw_fd(
                        data.add(index * FD_BYTES).cast::<RawFd>().read_unaligned(),
                    )
                });
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        header = unsafe { libc::CMSG_NXTHDR(&message, header) };
    }
    Ok(Received {
        length: length as usize,
        fds,
        truncated: message.msg_flags & libc::MSG_TRUNC != 0,
        fds_discarded: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Sends one frame with descriptors, without waiting and without SIGPIPE.
pub fn send(fd: RawFd, frame: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    if fds.len() > MAXIMUM_FDS {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec {
        iov_base: frame.as_ptr().cast_mut().cast(),
        iov_len: frame.len(),
    };
    // SAFETY: an all-zero msghdr is valid: no name, no data, no control.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        let bytes = (fds.len() * FD_BYTES) as u32;
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: computes a size; it fits the control area, as there are at most MAXIMUM_FDS descriptors.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as usize;
        // SAFETY: the control area has room for one header.
        let header = unsafe { libc::CMSG_FIRSTHDR(&message) };
        // SAFETY: not null, as the area has room; inside the private control area.
        if let Some(entry) = unsafe { header.as_mut() } {
            entry.cmsg_level = libc::SOL_SOCKET;
            entry.cmsg_type = libc::SCM_RIGHTS;
            // SAFETY: computes a size.
            entry.cmsg_len = unsafe { libc::CMSG_LEN(bytes) } as usize;
            // SAFETY: the data of that header.
            let data = unsafe { libc::CMSG_DATA(header) };
            for (index, fd) in fds.iter().enumerate() {
                // SAFETY: inside the data, whose size was computed for this many descriptors.
                unsafe {
                    data.add(index * FD_BYTES)
                        .cast::<RawFd>()
                        .write_unaligned(fd.as_raw_fd())
                };
            }
        }
    }
    // SAFETY: the message points to the frame and a private control area, with their sizes; both are only read.
    let sent = unsafe { libc::sendmsg(fd, &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
