//! The guest's interface as a descriptor: a TAP, or a packet socket on the far end of a veth pair.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

const TP_STATUS_VLAN_VALID: u32 = 0x10;

/// One interface; its own duplicate of the descriptor.
pub struct Link {
    fd: OwnedFd,
    packet_socket: bool,
}

/// What one read gave: bytes, and the VLAN tag the kernel took out of them (packet sockets only).
pub struct Frame {
    pub length: usize,
    pub vlan: Option<u16>,
}

/// tpacket_auxdata (linux/if_packet.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Auxiliary {
    status: u32,
    length: u32,
    snap_length: u32,
    mac: u16,
    net: u16,
    vlan_tci: u16,
    vlan_tpid: u16,
}

impl Link {
    /// `fd` stays the caller's; it is duplicated.
    pub fn new(fd: RawFd, packet_socket: bool) -> io::Result<Self> {
        if fd < 0 {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        // SAFETY: the caller keeps `fd` open during this call; a closed one gives EBADF.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
        Ok(Self { fd, packet_socket })
    }

    pub fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// One frame behind its virtio-net header; None when there is none now or the interface is down.
    pub fn read(&self, into: &mut [u8]) -> Option<Frame> {
        if self.packet_socket {
            return self.receive(into);
        }
        // SAFETY: `into` is writable for its length.
        let count = unsafe { libc::read(self.raw(), into.as_mut_ptr().cast(), into.len()) };
        usize::try_from(count)
            .ok()
            .filter(|&length| length > 0)
            .map(|length| Frame { length, vlan: None })
    }

    fn receive(&self, into: &mut [u8]) -> Option<Frame> {
        let mut vector = libc::iovec {
            iov_base: into.as_mut_ptr().cast(),
            iov_len: into.len(),
        };
        let mut ancillary = [0u64; 8];
        // SAFETY: an all-zero msghdr is a valid value; its fields are set below.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = &mut vector;
        message.msg_iovlen = 1;
        message.msg_control = ancillary.as_mut_ptr().cast();
        message.msg_controllen = mem::size_of_val(&ancillary) as _;
        // SAFETY: all pointers in `message` are to live buffers of the lengths given.
        let count = unsafe { libc::recvmsg(self.raw(), &mut message, libc::MSG_DONTWAIT) };
        let length = usize::try_from(count).ok().filter(|&length| length > 0)?;
        let mut vlan = None;
        // SAFETY: `message` was filled by recvmsg; CMSG_FIRSTHDR gives null or a header inside `ancillary`.
        let header = unsafe { libc::CMSG_FIRSTHDR(&message) };
        if !header.is_null() {
            // SAFETY: a non-null header is inside `ancillary`, which is aligned for it.
            let (level, kind, size) = unsafe {
                (
                    (*header).cmsg_level,
                    (*header).cmsg_type,
                    (*header).cmsg_len,
                )
            };
            // SAFETY: CMSG_LEN only computes.
            let needed = unsafe { libc::CMSG_LEN(mem::size_of::<Auxiliary>() as u32) } as usize;
            if level == libc::SOL_PACKET && kind == libc::PACKET_AUXDATA && size >= needed {
                // SAFETY: the kernel wrote at least `needed` bytes of this message into `ancillary`.
                let data = unsafe {
                    std::ptr::read_unaligned(libc::CMSG_DATA(header).cast::<Auxiliary>())
                };
                if data.status & TP_STATUS_VLAN_VALID != 0 {
                    vlan = Some(data.vlan_tci);
                }
            }
        }
        Some(Frame { length, vlan })
    }

    /// Gives one frame behind its header to the kernel; false = refused.
    pub fn write(&self, data: &[u8]) -> bool {
        // SAFETY: `data` is readable for its length.
        let count = unsafe { libc::write(self.raw(), data.as_ptr().cast(), data.len()) };
        count >= 0
    }
}
