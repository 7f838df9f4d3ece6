"""What a process gives up, for good, before it runs a student's code: rights, memory, files, the network.

The worker calls `lock_down` on itself; there is no way back for it or its children. Bubblewrap adds what a process cannot
do to itself: its own view of files and processes. Each part says whether it worked, and the grader decides if that is
enough. Linux only, but for the limits. Sources: landlock(7), prctl(2), unshare(2), setrlimit(2). It imports nothing of minillm.
"""

import ctypes
import os
import resource
import struct
import sys

CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 4, 38, 36
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ = (1 << 0) | (1 << 2) | (1 << 3)  # execute, read a file, read a folder
ACCESS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}


def libc() -> ctypes.CDLL:
    """The C library, whose errors can be asked for."""
    return ctypes.CDLL(None, use_errno=True)


def lock_down(uid: int | None, limits: dict[str, int], readable: list[str], writable: list[str], network: bool) -> dict:
    """Give up everything that `limits` (resource name -> value) and the two lists of paths do not leave.

    uid: the user to become, for root. network: whether this process must cut itself off (bubblewrap has done it otherwise).
    Returns what holds: {"user", "network", "files": bool}.
    """
    held = {"network": not network or _no_network()}
    if uid is not None and os.getuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    held["user"] = os.getuid() != 0
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    if sys.platform == "linux":
        libc().prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # becoming another user cleared it; /proc/self is needed
        libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    held["files"] = _landlock(readable, writable)
    return held


def _no_network() -> bool:
    """Move to a network of one's own that has nothing but a loopback, for exercises on ranks."""
    if sys.platform != "linux":
        return False
    uid, gid, spaces = os.getuid(), os.getgid(), CLONE_NEWNET | CLONE_NEWIPC
    if libc().unshare(spaces if uid == 0 else spaces | CLONE_NEWUSER) != 0:
        return False
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _loopback_up()
    return True


def _loopback_up() -> None:
    import fcntl
    import socket
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        request = struct.pack("16sh14x", b"lo", 1)  # SIOCSIFFLAGS with IFF_UP
        fcntl.ioctl(device, 0x8914, request)


def landlock_abi() -> int:
    """The kernel's version of landlock; 0 without it."""
    return max(0, libc().syscall(LANDLOCK_CREATE, None, 0, 1)) if sys.platform == "linux" else 0


def _landlock(readable: list[str], writable: list[str]) -> bool:
    """No file but those below the given paths, no TCP (from ABI 4), no signals to and sockets of others (from 6)."""
    abi = landlock_abi()
    if not abi:
        return False
    c, access = libc(), ACCESS_BY_ABI[min(abi, 5)]
    rules = struct.pack("QQQ", access, 0b11 if abi >= 4 and not only_loopback() else 0, 0b11 if abi >= 6 else 0)
    rules = rules[:8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = c.syscall(LANDLOCK_CREATE, rules, len(rules), 0)
    if ruleset < 0:
        return False
    for paths, allowed in ((readable, READ), (writable, access)):
        for path in paths:
            try:
                file = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            one = allowed if os.path.isdir(path) else allowed & ((1 << 0) | (1 << 1) | (1 << 2) | (1 << 14))
            c.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", one & access, file), 0)
            os.close(file)
    done = c.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return done


def only_loopback() -> bool:
    """Whether the only network is a loopback of one's own, where ranks may talk: then TCP need not be forbidden."""
    try:
        with open("/proc/net/dev") as file:
            return all(line.split(":")[0].strip() == "lo" for line in file.readlines()[2:])
    except OSError:
        return False
