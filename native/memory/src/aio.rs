//! Eventfd signals by the kernel's own hand: the completion of an asynchronous no-op (Linux AIO, io_submit(2),
//! IOCB_FLAG_RESFD). Completions signal with `eventfd_signal`, which saturates instead of waiting: the only way for an
//! ordinary process to signal an eventfd that cannot block, whatever a peer does to the counter or to O_NONBLOCK.

use std::os::fd::RawFd;
use std::sync::OnceLock;

use crate::eventfd;

const IOCB_CMD_POLL: u16 = 5;
const IOCB_FLAG_RESFD: u32 = 1;
const EVENTS: usize = 128;
const ATTEMPTS: usize = 8;

/// `struct iocb` of include/uapi/linux/aio_abi.h (little-endian: `lib.rs` refuses others).
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    result_fd: u32,
}

/// `struct io_event` of the same header.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

/// The process's one context; never taken down.
struct Context {
    id: libc::c_ulong,
    /// A private eventfd that is always readable: polling it completes at once.
    readable: RawFd,
}

static CONTEXT: OnceLock<Option<Context>> = OnceLock::new();

fn context() -> Option<&'static Context> {
    CONTEXT.get_or_init(Context::new).as_ref()
}

/// Whether the kernel gave a context.
pub(crate) fn available() -> bool {
    context().is_some()
}

/// Adds 1 to the eventfd `fd` (or leaves it full) and wakes its pollers; false when the kernel does not do that.
pub(crate) fn signal(fd: RawFd) -> bool {
    context().is_some_and(|context| context.signal(fd))
}

impl Context {
    fn new() -> Option<Self> {
        let mut id: libc::c_ulong = 0;
        // SAFETY: `id` is a valid, zeroed context id to write to.
        if unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &mut id) } != 0 {
            return None;
        }
        let readable = eventfd::create().ok()?;
        eventfd::signal(readable);
        Some(Context { id, readable })
    }

    fn signal(&self, fd: RawFd) -> bool {
        let (Ok(result_fd), Ok(readable)) = (u32::try_from(fd), u32::try_from(self.readable))
        else {
            return false;
        };
        let mut request = Request {
            opcode: IOCB_CMD_POLL,
            fd: readable,
            buffer: libc::POLLIN as u64,
            flags: IOCB_FLAG_RESFD,
            result_fd,
            ..Request::default()
        };
        for _ in 0..ATTEMPTS {
            let list = [&raw mut request];
            // SAFETY: one valid request, which the kernel copies; it refers to no memory of ours.
            let taken = unsafe { libc::syscall(libc::SYS_io_submit, self.id, 1, list.as_ptr()) };
            if taken == 1 {
                return true;
            }
            if std::io::Error::last_os_error().raw_os_error() != Some(libc::EAGAIN) {
                return false;
            }
            self.forget_completions();
        }
        false
    }

    /// The completions themselves tell nothing; their ring is emptied when it is full.
    fn forget_completions(&self) {
        let mut events = [Event::default(); EVENTS];
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: room for EVENTS events, a valid timespec; a zero timeout does not wait.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.id,
                0,
                EVENTS,
                events.as_mut_ptr(),
                &mut now,
            )
        };
    }
}
