//! An attempt to leave the VMM's process kills it: each kind of forbidden system call, from each kind of thread, in a process of
//! its own that went through the sandbox as the VMM does before its guest's first instruction.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::{env, io, process, thread};

use vswitch_vmm::sandbox;

const ASKED: &str = "VSWITCH_TEST_LEAVE";

/// (name, number, arguments): what a process that was taken over would try.
fn attempts() -> Vec<(&'static str, libc::c_long, [u64; 6])> {
    let path = c"/bin/true".as_ptr() as u64;
    let argv = [path, 0];
    let argv = Box::leak(Box::new(argv)).as_ptr() as u64;
    let exec = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let here = libc::AT_FDCWD as u64;
    let own = u64::from(process::id());
    vec![
        ("execve", libc::SYS_execve, [path, argv, 0, 0, 0, 0]),
        ("execveat", libc::SYS_execveat, [here, path, argv, 0, 0, 0]),
        (
            "socket",
            libc::SYS_socket,
            [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0],
        ),
        (
            "socketpair",
            libc::SYS_socketpair,
            [
                libc::AF_UNIX as u64,
                libc::SOCK_STREAM as u64,
                0,
                argv,
                0,
                0,
            ],
        ),
        ("connect", libc::SYS_connect, [0; 6]),
        ("bind", libc::SYS_bind, [0; 6]),
        ("open", libc::SYS_open, [path, 0, 0, 0, 0, 0]),
        ("openat", libc::SYS_openat, [here, path, 0, 0, 0, 0]),
        ("openat2", libc::SYS_openat2, [here, path, 0, 0, 0, 0]),
        (
            "memfd_create",
            libc::SYS_memfd_create,
            [path, 0, 0, 0, 0, 0],
        ),
        (
            "ptrace",
            libc::SYS_ptrace,
            [libc::PTRACE_ATTACH as u64, 1, 0, 0, 0, 0],
        ),
        (
            "process_vm_writev",
            libc::SYS_process_vm_writev,
            [1, 0, 0, 0, 0, 0],
        ),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [0; 6]),
        ("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
        (
            "tgkill of another process",
            libc::SYS_tgkill,
            [1, 1, 0, 0, 0, 0],
        ),
        ("fork", libc::SYS_fork, [0; 6]),
        (
            "clone",
            libc::SYS_clone,
            [libc::SIGCHLD as u64, 0, 0, 0, 0, 0],
        ),
        ("clone3", libc::SYS_clone3, [0; 6]),
        (
            "unshare",
            libc::SYS_unshare,
            [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0],
        ),
        ("setns", libc::SYS_setns, [0; 6]),
        ("mount", libc::SYS_mount, [0; 6]),
        ("bpf", libc::SYS_bpf, [0; 6]),
        (
            "io_uring_setup",
            libc::SYS_io_uring_setup,
            [1, 0, 0, 0, 0, 0],
        ),
        ("userfaultfd", libc::SYS_userfaultfd, [0; 6]),
        ("perf_event_open", libc::SYS_perf_event_open, [0; 6]),
        ("setuid", libc::SYS_setuid, [0; 6]),
        ("seccomp", libc::SYS_seccomp, [0; 6]),
        (
            "prctl",
            libc::SYS_prctl,
            [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0],
        ),
        (
            "executable memory",
            libc::SYS_mmap,
            [0, 4096, exec, anonymous, u64::MAX, 0],
        ),
        (
            "memory made executable",
            libc::SYS_mprotect,
            [argv & !4095, 4096, exec, 0, 0, 0],
        ),
        (
            "a terminal's ioctl",
            libc::SYS_ioctl,
            [0, libc::TIOCSTI, argv, 0, 0, 0],
        ),
        (
            "tgkill of itself, for comparison",
            libc::SYS_tgkill,
            [own, 0, 0, 0, 0, 0],
        ),
    ]
}

/// A call that is allowed, or at worst an error: what else would make the others' death mean nothing.
const HARMLESS: &str = "tgkill of itself, for comparison";

fn call(number: libc::c_long, arguments: [u64; 6]) -> libc::c_long {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: none of the calls is meant to return, and what an address among the arguments names is static.
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

/// Not a test of its own: what `leave` runs in a process that may die.
#[test]
#[ignore = "run by the other tests, in a process of its own"]
fn attempt() {
    let Ok(asked) = env::var(ASKED) else { return };
    let (thread, name) = asked.split_once(' ').unwrap();
    let found = attempts().into_iter().find(|entry| entry.0 == name);
    let (_, number, arguments) = found.unwrap();
    sandbox::give_up_privileges().unwrap();
    let body = match thread {
        "processor" => sandbox::confine_processor,
        _ => sandbox::confine_machine,
    };
    let attempt = thread::spawn(move || {
        body().unwrap();
        call(number, arguments);
        // Whatever the call did: it came back.
        call(libc::SYS_exit_group, [0; 6]);
    });
    let _ = attempt.join();
}

fn leave(thread: &str, name: &str) -> io::Result<ExitStatus> {
    let mut command = Command::new(env::current_exe()?);
    command
        .args(["--exact", "attempt", "--ignored", "--nocapture"])
        .env(ASKED, format!("{thread} {name}"));
    Ok(command.output()?.status)
}

fn assert_killed_by_each(thread: &str) -> io::Result<()> {
    for (name, ..) in attempts() {
        let status = leave(thread, name)?;
        if name == HARMLESS {
            assert_eq!(status.code(), Some(0), "{thread}: {name}: {status}");
        } else {
            assert_eq!(
                status.signal(),
                Some(libc::SIGSYS),
                "{thread}: {name}: {status}"
            );
        }
    }
    Ok(())
}

#[test]
fn an_attempt_to_leave_from_a_processors_thread_is_killed() {
    assert_killed_by_each("processor").unwrap();
}

#[test]
fn an_attempt_to_leave_from_the_machines_thread_is_killed() {
    assert_killed_by_each("machine").unwrap();
}
