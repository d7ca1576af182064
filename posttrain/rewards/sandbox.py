"""A stranger's Python program, confined by the kernel: `python sandbox.py JOB REPORT`, descriptors of two open files.

The process gives up what it could do harm with, and only then runs the program:
- Landlock: it reads Python's libraries and its scratch folder, writes into the scratch folder, and opens no other file.
- seccomp: a list of harmless system calls is allowed. There is no socket, no new process, no other program, no signal to
  anyone, no way to raise a limit; threads are allowed.
- resource limits: CPU time, address space, size of a file, open files; root's capabilities are dropped.
It ends with the thread that started it. All of this works without privileges. What is missing on a machine is named by
`missing_protections`; there is no unprotected mode. The standard library only, as this file runs by its path.

Sources: Linux Documentation/userspace-api/{landlock,seccomp_filter,no_new_privs}.rst, include/uapi/linux/{landlock,seccomp,filter,audit}.h.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
import traceback
import types
from typing import Any

# Numbers of the system calls that a Python program needs to compute, print and use files: (x86_64, aarch64).
ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "dup2": (33, None),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "getcwd": (79, 17),
    "unlink": (87, None),
    "readlink": (89, None),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "dup3": (292, 24),
    "getrandom": (318, 278),
    "statx": (332, 291),
    "rseq": (334, 293),
    "faccessat2": (439, 439),
}
# Allowed with certain arguments only; see `filter_program`.
CLONE, FCNTL, OPENAT, PRLIMIT = (56, 220), (72, 25), (257, 56), (302, 261)
CLONE3 = 435  # its flags lie in memory, where a filter can't look: "no such call" makes the C library use clone
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

EACCES, ENOSYS = 13, 38
CLONE_THREAD, O_TRUNC, O_ACCMODE, F_SETFL, F_DUPFD_CLOEXEC = 0x10000, 0o1000, 0o3, 4, 1030
SET_PARENT_DEATH_SIGNAL, SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 1, 22, 38  # linux/prctl.h
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # on every machine
CAPSET = (126, 91)
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_FILE, TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))

CONFINED = "confined"  # the report's first line

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """A system call's result. Raises OSError naming what could not be done."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def missing_protections() -> list[str]:
    """What this machine lacks to confine a program, in words; empty where everything is there."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return [f"untrusted code is confined on Linux on {' and '.join(MACHINES)} only, not on {sys.platform} on {platform.machine()}"]
    found = []
    if landlock_version() < 1:
        found.append("Landlock is missing or switched off, so that files can't be protected; Linux 5.13 or later with lsm=landlock works")
    if libc.prctl(SET_SECCOMP, 2, None, 0, 0) != -1 or ctypes.get_errno() != 14:  # EFAULT: it would have read a filter
        found.append("seccomp filters are missing, so that network and processes can't be denied; CONFIG_SECCOMP_FILTER=y works")
    return found


# --- what the process gives up


def confine(scratch: str, seconds: int, memory: int, file_bytes: int) -> None:
    """Gives up everything but computing, Python's libraries and the scratch folder; for good. Raises OSError if it can't."""
    for limit, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    checked(libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    restrict_files(scratch)
    drop_capabilities()
    filter_system_calls()


def landlock_version() -> int:
    """The version of Landlock's interface, or -1."""
    return libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)


def readable() -> list[str]:
    """Where Python and the libraries that it loads lie."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
    return sorted(path for path in {*paths, f"{sys.base_prefix}/lib", *system} if os.path.exists(path))


def restrict_files(scratch: str) -> None:
    version = landlock_version()
    handled = (1 << 13) - 1  # everything that the first version knows
    handled |= sum(1 << bit for bit, since in ((13, 2), (14, 3), (15, 5)) if version >= since)
    ruleset = checked(libc.syscall(LANDLOCK_CREATE_RULESET, struct.pack("Q", handled), 8, 0), "a Landlock ruleset")
    for path in readable():
        allow(ruleset, path, READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE)
    allow(ruleset, "/dev/null", READ_FILE | WRITE_FILE)
    allow(ruleset, scratch, handled & (READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_FILE | TRUNCATE))
    checked(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0), "restricting files by Landlock")
    os.close(ruleset)


def allow(ruleset: int, path: str, access: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", access, descriptor)
    checked(libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"a Landlock rule for {path}")
    os.close(descriptor)


def drop_capabilities() -> None:
    """Root without capabilities: the owner of root's files, which Landlock guards."""
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    number = CAPSET[MACHINES[platform.machine()][0]]
    checked(libc.syscall(number, header, bytes(24)), "dropping capabilities")


def filter_system_calls() -> None:
    code = filter_program(platform.machine())
    instructions = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(instructions))  # struct sock_fprog
    checked(libc.prctl(SET_SECCOMP, 2, program, 0, 0), "filtering system calls by seccomp")


# --- the filter, in the kernel's packet filter language

LOAD, EQUAL, GREATER, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06
KILL, ALLOW, DENY, UNKNOWN = 0x80000000, 0x7FFF0000, 0x00050000 | EACCES, 0x00050000 | ENOSYS
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes, the low half first


def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction; `if_true` and `if_false` instructions are skipped after it."""
    return struct.pack("HBBI", code, if_true, if_false, value)


def case(number: int, *body: bytes) -> bytes:
    """For the system call `number`: the body, which returns. The number stays loaded otherwise."""
    return step(EQUAL, number, 0, len(body)) + b"".join(body)


def filter_program(machine: str) -> bytes:
    """Allows what is in ALLOWED, a few calls by their arguments, and nothing else."""
    column, architecture = MACHINES[machine]
    allowed, denied = step(RETURN, ALLOW), step(RETURN, DENY)
    program = [
        step(LOAD, ARCHITECTURE),
        step(EQUAL, architecture, 1, 0),
        step(RETURN, KILL),  # another machine's numbers mean other calls
        step(LOAD, NUMBER),
        # threads, but no processes
        case(CLONE[column], step(LOAD, ARGUMENTS), step(ANY_BIT, CLONE_THREAD, 0, 1), allowed, denied),
        case(CLONE3, step(RETURN, UNKNOWN)),
        # flags of descriptors; not F_SETOWN and F_NOTIFY, by which the kernel signals other processes
        case(
            FCNTL[column],
            step(LOAD, ARGUMENTS + 8),
            step(EQUAL, F_DUPFD_CLOEXEC, 1, 0),
            step(GREATER, F_SETFL, 1, 0),
            allowed,
            denied,
        ),
        # the first versions of Landlock let a file that may be read be emptied by O_RDONLY | O_TRUNC
        case(OPENAT[column], step(LOAD, ARGUMENTS + 16), step(AND, O_TRUNC | O_ACCMODE), step(EQUAL, O_TRUNC, 1, 0), allowed, denied),
        # limits of this process may be read: its number is 0 and the new limit NULL
        case(
            PRLIMIT[column],
            *(part for at in (0, 16, 20) for part in (step(LOAD, ARGUMENTS + at), step(EQUAL, 0, 1, 0), denied)),
            allowed,
        ),
        *(case(number, allowed) for numbers in ALLOWED.values() if (number := numbers[column]) is not None),
        denied,
    ]
    return b"".join(program)


# --- running the program


def run(source: str, name: str) -> dict[str, Any]:
    """The program as the module `name`; returns its names."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, "<response>", "exec"), vars(module))
    return vars(module)


def check(job: dict[str, Any], report: int) -> None:
    """Runs the program, then every test among the program's names; reports the tests that pass, each with the token.

    Without the token, a program that ends the process early or writes into every descriptor would pass.
    """
    names = run(job["source"], "solution")
    for number, test in enumerate(job["tests"]):
        try:
            exec(compile(test, f"<test {number}>", "exec"), dict(names))
        except BaseException:
            traceback.print_exc()
        else:
            os.write(report, f"{job['token']} {number}\n".encode())


def main(job_file: str, report_file: str) -> None:
    libc.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    with os.fdopen(int(job_file)) as lines:
        job = json.load(lines)
    if os.getppid() != job["parent"]:
        os._exit(1)
    report = int(report_file)
    os.set_inheritable(report, False)
    confine(job["scratch"], job["seconds"], job["memory"], job["file_bytes"])
    os.write(report, f"{CONFINED}\n".encode())
    sys.argv = ["response.py"]
    if job["tests"]:
        check(job, report)
    else:
        run(job["source"], "__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
