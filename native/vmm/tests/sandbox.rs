//! The sandbox holds: what a guest that has broken into the process could try kills it; what it needs goes on.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use vswitch_vmm::{failure, sandbox};

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

/// In a process of its own whose test thread is its first one: what a processor's thread does in its sandbox.
fn in_a_processors_thread(test: &str, act: fn()) -> std::process::Output {
    if std::env::var(ATTEMPT).is_ok() {
        failure::end_on_panic();
        sandbox::give_up_privileges().unwrap();
        let thread = std::thread::spawn(move || {
            sandbox::confine_processor().unwrap();
            act();
        });
        let ended = thread.join();
        std::process::exit(i32::from(ended.is_err()));
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(ATTEMPT, "in a thread");
    command.output().unwrap()
}

#[test]
fn a_panic_in_any_thread_ends_the_process_in_words() {
    let test = "a_panic_in_any_thread_ends_the_process_in_words";
    let ended = in_a_processors_thread(test, || panic!("as the test says"));
    let words = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(failure::STATUS), "{words}");
    assert!(words.contains("vswitch-vmm: a fault of its own"), "{words}");
    assert!(
        words.contains("tests/sandbox.rs") && words.contains("as the test says"),
        "{words}"
    );
}

#[test]
fn a_processors_thread_may_give_memory_back() {
    let ended = in_a_processors_thread("a_processors_thread_may_give_memory_back", || {
        // Below the size that is mapped on its own: the heap grows, and shrinks.
        let pieces: Vec<Vec<u8>> = (0..1000).map(|_| vec![1; 32 << 10]).collect();
        drop(pieces);
    });
    assert_eq!(ended.status.code(), Some(0), "{}", ended.status);
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
