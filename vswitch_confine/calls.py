"""System call numbers, per machine, of the calls that the filters of this package name.

From Linux arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

# fmt: off
CALLS: dict[str, dict[str, int]] = {
    "x86_64": {
        "access": 21, "arch_prctl": 158, "brk": 12, "clock_getres": 229, "clock_gettime": 228,
        "clock_nanosleep": 230, "clone": 56, "clone3": 435, "close": 3, "close_range": 436, "dup": 32,
        "dup2": 33, "dup3": 292, "epoll_create1": 291, "epoll_ctl": 233, "epoll_pwait": 281,
        "epoll_wait": 232, "eventfd2": 290, "execve": 59, "exit": 60, "exit_group": 231, "faccessat": 269,
        "faccessat2": 439, "fcntl": 72, "fork": 57, "fstat": 5, "futex": 202, "get_robust_list": 274,
        "getcwd": 79, "getdents64": 217, "getegid": 108, "geteuid": 107, "getgid": 104, "getpgid": 121,
        "getpgrp": 111, "getpid": 39, "getppid": 110, "getrandom": 318, "getresgid": 120, "getresuid": 118,
        "getrlimit": 97, "getrusage": 98, "getsid": 124, "gettid": 186, "gettimeofday": 96, "getuid": 102,
        "kill": 62, "lseek": 8, "lstat": 6, "madvise": 28, "membarrier": 324, "mmap": 9, "mprotect": 10,
        "mremap": 25, "munmap": 11, "nanosleep": 35, "newfstatat": 262, "open": 2, "openat": 257,
        "pipe2": 293, "poll": 7, "ppoll": 271, "pread64": 17, "preadv": 295, "preadv2": 327, "prlimit64": 302,
        "pselect6": 270, "ptrace": 101, "pwrite64": 18, "read": 0, "readlink": 89, "readlinkat": 267,
        "readv": 19, "recvfrom": 45, "recvmsg": 47, "restart_syscall": 219, "rseq": 334,
        "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_getaffinity": 204,
        "sched_yield": 24, "select": 23, "sendmsg": 46, "sendto": 44, "set_robust_list": 273,
        "set_tid_address": 218, "sigaltstack": 131, "socket": 41, "stat": 4, "statx": 332, "sysinfo": 99,
        "time": 201, "times": 100, "umask": 95, "uname": 63, "vfork": 58, "write": 1, "writev": 20,
    },
    "aarch64": {
        "brk": 214, "clock_getres": 114, "clock_gettime": 113, "clock_nanosleep": 115, "clone": 220,
        "clone3": 435,
        "close": 57, "close_range": 436, "dup": 23, "dup3": 24, "epoll_create1": 20, "epoll_ctl": 21,
        "epoll_pwait": 22, "eventfd2": 19, "execve": 221, "exit": 93, "exit_group": 94, "faccessat": 48,
        "faccessat2": 439, "fcntl": 25, "fstat": 80, "futex": 98, "get_robust_list": 100, "getcwd": 17,
        "getdents64": 61, "getegid": 177, "geteuid": 175, "getgid": 176, "getpgid": 155, "getpid": 172,
        "getppid": 173, "getrandom": 278, "getresgid": 150, "getresuid": 148, "getrlimit": 163,
        "getrusage": 165, "getsid": 156, "gettid": 178, "gettimeofday": 169, "getuid": 174, "kill": 129,
        "lseek": 62, "madvise": 233, "membarrier": 283, "mmap": 222, "mprotect": 226, "mremap": 216,
        "munmap": 215, "nanosleep": 101, "newfstatat": 79, "openat": 56, "pipe2": 59, "ppoll": 73,
        "pread64": 67, "preadv": 69,
        "preadv2": 286,
        "prlimit64": 261, "pselect6": 72, "ptrace": 117, "pwrite64": 68,
        "read": 63, "readlinkat": 78, "readv": 65, "recvfrom": 207, "recvmsg": 212, "restart_syscall": 128,
        "rseq": 293, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
        "sched_getaffinity": 123, "sched_yield": 124, "sendmsg": 211, "sendto": 206, "set_robust_list": 99,
        "set_tid_address": 96, "sigaltstack": 132, "socket": 198, "statx": 291, "sysinfo": 179,
        "times": 153, "umask": 166, "uname": 160, "write": 64, "writev": 66,
    },
}
# fmt: on
