"""What keeps untrusted code apart: namespaces, a file system of its own, an unprivileged user, and limits.

Everything is done by system calls, because Python 3.11 has none of these functions. Names are those of Linux:
https://man7.org/linux/man-pages/man7/namespaces.7.html
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import signal
import sys

TYPE_CHECKING = False  # as `typing` has it, whose import takes longer than all that is done here
if TYPE_CHECKING:
    from typing import Any

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 1 << 18
_MNT_DETACH = 2
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522

# What a Python program may see: the system's programs and libraries, and the devices without which little works.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_WORK = "/.answer"  # beside the names of the real root, whatever they are

_libc = ctypes.CDLL(None, use_errno=True)


class Ground:
    """What `separate` achieved, and what `confine` has yet to do."""

    def __init__(self) -> None:
        self.guarantees: set[str] = set()
        """`network`: there is none. `files`: nothing outside the working directory can be changed. `processes`: their
        number is limited and none survives. Memory, time and file size are always limited."""
        self.user: int | None = None
        """User and group id to become; None stays who started it."""
        self.new_root = False
        """Whether `/` is the working directory's own file system."""


def separate(order: dict[str, Any]) -> Ground:
    """Enter new namespaces and change to the working directory, as far as the kernel allows.

    Containers and some distributions forbid namespaces. Then orphans are gathered for the keeper to kill, and Python
    code is kept off the network by `forbid_network`.
    """
    ground = Ground()
    root = os.geteuid() == 0
    if root and not order["trusted_program"]:
        ground.user = _id_of_nobody()
    flags = _NEWNS | _NEWPID | _NEWIPC | (0 if order["network"] else _NEWNET) | (0 if root else _NEWUSER)
    own = (os.geteuid(), os.getegid())
    if _libc.unshare(flags) != 0:
        return _together(order, ground)
    if not root:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{own[0]} {own[0]} 1")
        _write("/proc/self/gid_map", f"{own[1]} {own[1]} 1")
    _mount_files(order)
    ground.new_root = not order["trusted_program"]
    ground.guarantees |= {"files"} | (set() if order["network"] else {"network"})
    if ground.user is not None or not root:
        ground.guarantees.add("processes")
    return ground


def _together(order: dict[str, Any], ground: Ground) -> Ground:
    """Do without namespaces: a plain directory, and orphans come to this process."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if ground.user is not None and not _readable_by(ground.user):
        ground.user = None
    if ground.user is not None:
        os.chown(order["directory"], ground.user, ground.user)
        ground.guarantees.add("files")
    if os.geteuid() != 0 or ground.user is not None:
        ground.guarantees.add("processes")
    os.chdir(order["directory"])
    return ground


def leave(order: dict[str, Any], ground: Ground, outside: int) -> None:
    """Remove the working directory, for which nobody may be left; for the keeper, at the very end.

    Args:
        order: `directory`.
        ground: what `separate` returned.
        outside: the directory that it is in, opened before `separate`.
    """
    if ground.new_root:
        _libc.umount2(b"/", _MNT_DETACH)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.basename(order["directory"]), dir_fd=outside)


def confine(order: dict[str, Any], ground: Ground) -> None:
    """Give up every privilege and set the limits; for the child, right before its job."""
    if not order["trusted_program"]:
        os.environ["HOME"] = os.getcwd()
    if ground.user is not None:
        with contextlib.suppress(PermissionError):  # a container's user namespace may forbid it
            os.setgroups([])
        os.setresgid(ground.user, ground.user, ground.user)
        os.setresuid(ground.user, ground.user, ground.user)
    _drop_capabilities()
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, order["memory_mb"] << 20)
    _limit(resource.RLIMIT_FSIZE, order["file_mb"] << 20)
    _limit(resource.RLIMIT_NOFILE, 256)
    _limit(resource.RLIMIT_NPROC, order["processes"] + _processes_before(ground))
    if order["seconds"] is not None:
        _limit(resource.RLIMIT_CPU, math.ceil(order["seconds"]) + 1)
    order["hook"] = "network" not in ground.guarantees and not order["network"]
    if order["hook"] and order["job"] != "verify":  # verifiers load libraries first, which need what is refused
        forbid_network()


def forbid_network() -> None:
    """Refuse sockets, and what could get round that, to Python code in this process.

    Weaker than a namespace: an audit hook (https://peps.python.org/pep-0578/) sees what goes through the interpreter.
    """
    refused = ("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "ctypes.")

    def refuse(event: str, _arguments: tuple[Any, ...]) -> None:
        if event.startswith(refused):
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(refuse)


def _mount_files(order: dict[str, Any]) -> None:
    """Make the file system read-only but for a working directory in memory, and change to that.

    A trusted program keeps seeing all of it. Anything else sees only the interpreter, its libraries and the system's,
    under the same names, in a new root; so no home directory, no keys and no other run.
    """
    base = order["directory"]
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=16m,mode=755")
    work = base + _WORK
    os.mkdir(work)
    if not order["trusted_program"]:
        for path in _visible():
            _show(path, base + path)
    _set_read_only("/" if order["trusted_program"] else base)
    # Bytes and files in it are limited together, however many files there are.
    _mount("tmpfs", work, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={4 * order['file_mb']}m,nr_inodes=4096,mode=777")
    if order["trusted_program"]:
        os.chdir(work)
        return
    os.chroot(base)
    os.chdir(_WORK)


def _visible() -> list[str]:
    """Return the paths to show, none of them within another."""
    wanted = [*_SYSTEM, *_DEVICES, os.path.dirname(__file__), sys.base_prefix, sys.prefix, *sys.path]
    shown: list[str] = []
    for path in wanted:
        within = any(path == other or path.startswith(other + "/") for other in shown)
        if os.path.isabs(path) and os.path.exists(path) and not within:
            shown.append(path)
    return shown


def _show(path: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):  # `/bin` is a link to `usr/bin` on most systems
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(path, target, None, _MS_BIND | _MS_REC)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = [text and text.encode() for text in (source, target, kind)]
    if _libc.mount(*encoded, ctypes.c_ulong(flags), options.encode() or None) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def _set_read_only(path: str) -> None:
    """Make a mount and all that is mounted below it read-only."""
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    arguments = (_AT_FDCWD, path.encode(), _AT_RECURSIVE, ctypes.byref(attributes), size)
    if _libc.syscall(_SYS_MOUNT_SETATTR, *arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if _libc.capset(ctypes.byref(header), ctypes.byref(nothing)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _id_of_nobody() -> int | None:
    """Return an id that is nobody's, so that its processes can be counted; None where there is only root."""
    user = 50000 + os.getpid() % 10000
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return user if any(first <= user < first + count for first, _, count in ranges) else None


def _readable_by(user: int) -> bool:
    """Whether another user may read the interpreter; one below `/root` is root's alone."""
    os.setegid(user)
    os.seteuid(user)
    readable = all(os.access(path, os.R_OK, effective_ids=True) for path in (os.__file__, __file__, sys.prefix))
    os.seteuid(0)
    os.setegid(0)
    return readable


def _processes_before(ground: Ground) -> int:
    """Count the processes and threads that the kernel holds against the limit already.

    In a user namespace that is the keeper, for an id of its own nothing; else all that the user runs.
    """
    if "network" in ground.guarantees or "files" in ground.guarantees:
        return 1
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
        except FileNotFoundError:
            continue
    return count


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
