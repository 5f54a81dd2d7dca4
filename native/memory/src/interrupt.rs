//! Host to guest: an event flag on the channel's VP, then the VP's interrupt eventfd.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::{eventfd, GuestMemory, MemoryError};

pub const EVENT_FLAGS_PER_SINT: u32 = 2048;
pub const EVENT_FLAG_BYTES_PER_SINT: u64 = 256;
const NO_FLAG: u64 = u64::MAX;

/// A channel's interrupt. `signal` may run on a worker while `target` runs on the control thread; neither takes a lock.
pub struct Interrupt {
    memory: Arc<GuestMemory>,
    fd: OwnedFd,
    /// SIEFP page number << 16 | SINT << 11 | flag, or NO_FLAG.
    flag: AtomicU64,
}

impl Interrupt {
    /// `fd` is duplicated.
    pub fn new(memory: Arc<GuestMemory>, fd: RawFd) -> io::Result<Self> {
        eventfd::prepare_shared();
        Ok(Self {
            memory,
            fd: duplicate(fd)?,
            flag: AtomicU64::new(NO_FLAG),
        })
    }

    /// Where the flag lives: the VP's SIEFP page (None: not enabled, then only the eventfd is written).
    ///
    /// `fd`, duplicated too, replaces the eventfd: the channel moved to another VP, or the door was resumed.
    pub fn target(
        &self,
        siefp_gpa: Option<u64>,
        sint: u32,
        flag: u32,
        fd: Option<RawFd>,
    ) -> Result<(), MemoryError> {
        if sint >= 16 || flag >= EVENT_FLAGS_PER_SINT {
            return Err(MemoryError::NoSuchFlag { sint, flag });
        }
        let packed = match siefp_gpa {
            None => NO_FLAG,
            Some(gpa) => {
                self.memory.check(gpa, 4096)?;
                if gpa % 4096 != 0 {
                    return Err(MemoryError::Unaligned { address: gpa });
                }
                (gpa >> 12) << 16 | u64::from(sint) << 11 | u64::from(flag)
            }
        };
        if let Some(fd) = fd {
            // Atomic replacement: a worker in `signal` writes either the old eventfd or the new one.
            // SAFETY: plain fd numbers; the target is ours and stays ours.
            if unsafe { libc::dup3(fd, self.fd.as_raw_fd(), libc::O_CLOEXEC) } < 0 {
                return Err(MemoryError::System(
                    io::Error::last_os_error().raw_os_error().unwrap_or(0),
                ));
            }
        }
        self.flag.store(packed, Ordering::Release);
        Ok(())
    }

    /// Interrupts the guest. Spurious interrupts are legal, lost ones are not: the eventfd is always written.
    pub fn signal(&self) {
        let packed = self.flag.load(Ordering::Acquire);
        if packed != NO_FLAG {
            let base = (packed >> 16 << 12) + (packed >> 11 & 0xF) * EVENT_FLAG_BYTES_PER_SINT;
            // The page was checked when it was set and regions never go while this lives.
            let _ = self.memory.set_flag(base, (packed & 0x7FF) as u32);
        }
        eventfd::signal_shared(self.fd.as_raw_fd());
    }
}

fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the caller's fd is open for the duration of the call; a closed one gives EBADF.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}
