//! The sandbox holds: what a guest that has broken into the process could try kills it; what it needs goes on.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use vswitch_vmm::sandbox;

const ATTEMPT: &str = "VSWITCH_VMM_ATTEMPT";

/// Tries one thing behind the sandbox, in a process of its own.
fn attempt(which: &str) {
    let (side, what) = which.split_once(' ').unwrap();
    sandbox::give_up_privileges().unwrap();
    match side {
        "machine" => sandbox::confine_machine().unwrap(),
        _ => sandbox::confine_processor().unwrap(),
    }
    // SAFETY: plain system calls whose results do not matter: either they are allowed, or this process ends here.
    unsafe {
        match what {
            "nothing" => {
                let grown = vec![1u8; 32 << 20];
                assert_eq!(
                    grown.iter().map(|byte| usize::from(*byte)).sum::<usize>(),
                    32 << 20
                );
                libc::_exit(0);
            }
            "open" => drop(std::fs::File::open("/etc/passwd")),
            "socket" => drop(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0)),
            "exec" => {
                let arguments = [c"/bin/true".as_ptr(), std::ptr::null()];
                libc::execve(arguments[0], arguments.as_ptr(), std::ptr::null());
            }
            "fork" => drop(libc::fork()),
            "thread" => drop(std::thread::spawn(|| {}).join()),
            "executable" => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let protection = libc::PROT_READ | libc::PROT_EXEC;
                libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0);
            }
            "terminal" => drop(libc::ioctl(0, libc::TIOCSTI, c"x".as_ptr())),
            "new machine" => drop(libc::ioctl(0, 0xAE01, 0)),
            "debugger" => drop(libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0)),
            "signal" => drop(libc::kill(libc::getppid(), 0)),
            other => panic!("no attempt {other}"),
        }
        libc::_exit(0);
    }
}

fn ends(which: &str) -> std::process::ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["attempts_to_leave_are_killed", "--exact", "--nocapture"])
        .env(ATTEMPT, which)
        .status()
        .unwrap()
}

#[test]
fn attempts_to_leave_are_killed() {
    if let Ok(which) = std::env::var(ATTEMPT) {
        attempt(&which);
    }
    let attempts = [
        "open",
        "socket",
        "exec",
        "fork",
        "thread",
        "executable",
        "terminal",
        "debugger",
        "signal",
    ];
    for side in ["machine", "processor"] {
        for what in attempts {
            let status = ends(&format!("{side} {what}"));
            assert_eq!(
                status.signal(),
                Some(libc::SIGSYS),
                "{side}: {what}: {status}"
            );
        }
        let status = ends(&format!("{side} nothing"));
        assert_eq!(status.code(), Some(0), "{side}: {status}");
    }
    // What the machine's thread does at a reset is not for a processor's.
    assert_eq!(ends("machine new machine").code(), Some(0));
    let status = ends("processor new machine");
    assert_eq!(status.signal(), Some(libc::SIGSYS), "{status}");
}
