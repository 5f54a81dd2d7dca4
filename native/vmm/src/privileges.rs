//! The system calls by which a process gives up what it may do, each behind a safe function.

use std::io;
use std::os::fd::RawFd;

const CAPABILITY_VERSION: u32 = 0x2008_0522;
const LAST_CAPABILITY: libc::c_ulong = 63;

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn prctl(option: libc::c_int, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: an option with one plain number; the others must be 0 and are.
    check(unsafe {
        libc::prctl(
            option,
            argument,
            0 as libc::c_ulong,
            0 as libc::c_ulong,
            0 as libc::c_ulong,
        )
    })
}

/// No program that this process could ever run gains anything by its set-id bits or capabilities.
pub fn no_new_privileges() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)
}

/// No core dump, and nobody of the same user attaches a debugger or opens /proc/PID/mem.
pub fn not_dumpable() -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0)
}

/// Empties every set of capabilities. A user without any has none to lose.
pub fn no_capabilities() -> io::Result<()> {
    for capability in 0..=LAST_CAPABILITY {
        // Fails beyond the last one that this kernel knows, and without CAP_SETPCAP.
        let _ = prctl(libc::PR_CAPBSET_DROP, capability);
    }
    let ambient = libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong;
    let _ = prctl(libc::PR_CAP_AMBIENT, ambient);
    let header = [CAPABILITY_VERSION, 0];
    let none = [0u32; 6];
    // SAFETY: header and data have the layout of this version: (version, pid) and twice (effective, permitted, inheritable).
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) } as libc::c_int)
}

/// Lowers a limit to `most`, or raises it there as far as the hard limit goes.
pub fn limit(resource: libc::__rlimit_resource_t, most: u64) -> io::Result<()> {
    let mut now = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: one valid structure that the kernel fills.
    check(unsafe { libc::getrlimit(resource, &mut now) })?;
    now.rlim_max = now.rlim_max.min(most);
    now.rlim_cur = now.rlim_max;
    // SAFETY: one valid structure that the kernel reads.
    check(unsafe { libc::setrlimit(resource, &now) })
}

/// One heap for all threads. Giving memory of another one back, glibc reads a file in /proc the first time, which the sandbox
/// does not let it; and a few threads that seldom allocate gain nothing by heaps of their own.
pub fn one_heap() -> io::Result<()> {
    // SAFETY: a parameter with a plain number; no other thread allocates yet.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } == 0 {
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }
    Ok(())
}

/// Runs this thread, and those it starts, on these host processors alone.
pub fn set_affinity(cpus: &[usize]) -> io::Result<()> {
    // SAFETY: an all-zero set is valid and empty.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in cpus {
        if *cpu < libc::CPU_SETSIZE as usize {
            // SAFETY: a number within the set.
            unsafe { libc::CPU_SET(*cpu, &mut set) };
        }
    }
    // SAFETY: a valid set and its size.
    check(unsafe { libc::sched_setaffinity(0, std::mem::size_of_val(&set), &set) })
}

/// Closes every descriptor that is not among these.
pub fn close_others(kept: &[RawFd]) {
    let mut kept: Vec<u32> = kept
        .iter()
        .filter_map(|fd| u32::try_from(*fd).ok())
        .collect();
    kept.sort_unstable();
    let mut first = 0;
    for end in kept.into_iter().chain([u32::MAX]) {
        if end > first {
            // SAFETY: nobody in this process uses the descriptors in between: it has made none but those kept.
            unsafe { libc::syscall(libc::SYS_close_range, first, end - 1, 0) };
        }
        first = end.saturating_add(1);
    }
}
