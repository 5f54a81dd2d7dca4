//! What the process gives up before the guest's first instruction: capabilities, new privileges, and all system calls but these.
//!
//! A guest that breaks out of KVM's virtual processor into this process finds a process that can neither open a file or a socket,
//! nor start a program or a thread; an attempt kills it, and with it the machine.

use std::collections::BTreeMap;

use seccompiler::{
    apply_filter, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use crate::error::{Context, Error, Result};
use crate::privileges;

/// Descriptors: 64 processors with 2 each, their eventfds, 2047 channels.
const MOST_FILES: u64 = 4096;

/// What every thread needs: memory, locks, time, its own end.
const EVERYWHERE: [libc::c_long; 19] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// What the machine's own thread needs beside that: its door, its console, its kernel's file.
const MACHINE: [libc::c_long; 14] = [
    libc::SYS_accept4,
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_poll,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
];

/// KVM_RUN, KVM_GET_MSRS, and KVM_GET_REGS to say where a processor cannot go on.
const PROCESSOR_IOCTLS: [u64; 3] = [0xAE80, 0xC008_AE88, 0x8090_AE81];

/// What makes a virtual machine, at the start and again at each reset.
const MACHINE_IOCTLS: [u64; 26] = [
    0xAE01,      // KVM_CREATE_VM
    0xAE03,      // KVM_CHECK_EXTENSION
    0xAE04,      // KVM_GET_VCPU_MMAP_SIZE
    0xC008_AE05, // KVM_GET_SUPPORTED_CPUID
    0xAE41,      // KVM_CREATE_VCPU
    0x4020_AE46, // KVM_SET_USER_MEMORY_REGION
    0xAE47,      // KVM_SET_TSS_ADDR
    0x4008_AE48, // KVM_SET_IDENTITY_MAP_ADDR
    0xAE60,      // KVM_CREATE_IRQCHIP
    0x4008_AE6A, // KVM_SET_GSI_ROUTING
    0x4020_AE76, // KVM_IRQFD
    0x4040_AE77, // KVM_CREATE_PIT2
    0x4030_AE7B, // KVM_SET_CLOCK
    0x8090_AE81, // KVM_GET_REGS
    0x4090_AE82, // KVM_SET_REGS
    0x8138_AE83, // KVM_GET_SREGS
    0x4138_AE84, // KVM_SET_SREGS
    0x4008_AE89, // KVM_SET_MSRS
    0x8400_AE8E, // KVM_GET_LAPIC
    0x4400_AE8F, // KVM_SET_LAPIC
    0x4008_AE90, // KVM_SET_CPUID2
    0x4068_AEA3, // KVM_ENABLE_CAP
    0x4018_AEBD, // KVM_HYPERV_EVENTFD
    0xC008_AEC1, // KVM_GET_SUPPORTED_HV_CPUID
    0x5421,      // FIONBIO
    0x5451,      // FIOCLEX
];

fn argument(number: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule> {
    let condition = SeccompCondition::new(number, SeccompCmpArgLen::Dword, operator, value);
    let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
    rule.context("system call filter")
}

fn filter(calls: &[libc::c_long], ioctls: &[u64]) -> Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = EVERYWHERE
        .iter()
        .chain(calls)
        .map(|call| (*call, Vec::new()))
        .collect();
    let ioctl = |number: &u64| argument(1, SeccompCmpOp::Eq, *number);
    rules.insert(
        libc::SYS_ioctl,
        ioctls.iter().map(ioctl).collect::<Result<_>>()?,
    );
    // Memory, but none that could be executed.
    let executable = libc::PROT_EXEC as u64;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(
            call,
            vec![argument(2, SeccompCmpOp::MaskedEq(executable), 0)?],
        );
    }
    // Asked before a descriptor is closed, in builds with checks.
    let asks = argument(1, SeccompCmpOp::Eq, libc::F_GETFD as u64)?;
    rules.entry(libc::SYS_fcntl).or_insert_with(|| vec![asks]);
    // Signals to this process alone: a kick.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![argument(0, SeccompCmpOp::Eq, own)?]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    filter
        .and_then(BpfProgram::try_from)
        .context("system call filter")
}

/// For the calling thread, which runs a virtual processor.
pub fn confine_processor() -> Result<()> {
    apply_filter(&filter(&[], &PROCESSOR_IOCTLS)?).context("system call filter")
}

/// For the calling thread, which is the machine's own.
pub fn confine_machine() -> Result<()> {
    apply_filter(&filter(&MACHINE, &MACHINE_IOCTLS)?).context("system call filter")
}

/// Host processors to run on; none: all.
pub fn set_affinity(cpus: &[usize]) -> Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    privileges::set_affinity(cpus).map_err(|error| {
        Error::new(format!(
            "--host-cpus {cpus:?}: {error}; name processors that this machine has and this user may use"
        ))
    })
}

/// For the whole process, before it has threads.
pub fn give_up_privileges() -> Result<()> {
    privileges::no_new_privileges().context("no_new_privs")?;
    privileges::no_capabilities().context("capabilities")?;
    privileges::not_dumpable().context("PR_SET_DUMPABLE")?;
    privileges::limit(libc::RLIMIT_CORE, 0).context("RLIMIT_CORE")?;
    privileges::limit(libc::RLIMIT_NOFILE, MOST_FILES).context("RLIMIT_NOFILE")?;
    privileges::one_heap().context("M_ARENA_MAX")
}
