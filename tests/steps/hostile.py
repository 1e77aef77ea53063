"""Programs that misbehave, as a model under reinforcement may come to write them. Where they fail they print `held`."""

from pathlib import Path

OUTSIDE = Path(__file__).with_name("hacked")

# Exit code, and the program. These are held everywhere.
ALWAYS_HELD = {
    "allocate": (
        0,
        """
try:
    bytearray(10 << 30)
except MemoryError:
    print("held")
""",
    ),
    "hoard": (
        0,
        """
rows = []
try:
    while True:
        rows.append(bytes(1 << 20))
except MemoryError:
    rows = []
    print("held")
""",
    ),
    "write": (
        0,
        """
file = open("x", "wb")
try:
    while True:
        file.write(bytes(1 << 20))
except OSError:
    print("held")
""",
    ),
    "read the environment": (
        0,
        """
import os
print("read" if "SECRET" in os.environ else "held")
""",
    ),
    "connect": (
        0,
        """
import socket
try:
    socket.create_connection(("127.0.0.1", 9), 2)
except OSError:
    print("held")
""",
    ),
    "look up": (
        0,
        """
import socket
try:
    socket.getaddrinfo("example.com", 80)
except OSError:
    print("held")
""",
    ),
    "loop": (124, "while True: pass"),
    "sleep": (124, "import time; time.sleep(100)"),
    "fork bomb": (
        124,
        """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    ),
    "print": (1, "while True: print('x' * 100_000)"),
    "crash": (139, "import ctypes; ctypes.string_at(0)"),
    "say that time ran out": (1, "import os; os._exit(124)"),
    "say that it was not confined": (1, "import os; os._exit(125)"),
}

# What the kernel must guarantee, and the program.
HELD_BY_THE_KERNEL = {
    "count processes": (
        "processes",
        """
import os, time
count = 0
try:
    while count < 99:
        if os.fork() == 0:
            time.sleep(99)
        count += 1
except OSError:
    print("held")
""",
    ),
    "count threads": (
        "processes",
        """
import threading, time
try:
    for _ in range(99):
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
except RuntimeError:
    print("held")
""",
    ),
    "become root": (
        "processes",
        """
import os
try:
    os.setuid(0)
except PermissionError:
    print("held")
""",
    ),
    "leave the group": (
        "processes",
        """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(97)
    os._exit(0)
print("held")
""",
    ),
    "write elsewhere": (
        "files",
        f"""
try:
    open({str(OUTSIDE)!r}, "w")
except OSError:
    print("held")
""",
    ),
    "fill the disk": (
        "files",
        """
try:
    for number in range(999):
        open(str(number), "wb").write(bytes(1 << 20))
except OSError:
    print("held")
""",
    ),
    "look around": (
        "files",
        """
import os
print("seen" if os.path.exists("/etc/passwd") or os.path.exists("/proc/1") or os.getpid() != 1 else "held")
""",
    ),
    "make a namespace": (
        "files",
        """
import ctypes
print("held" if ctypes.CDLL(None).unshare(0x10000000) else "made")
""",
    ),
    "reach this machine": (
        "network",
        """
import errno, socket
try:
    socket.socket().connect(("127.0.0.1", 22))
except OSError as error:
    print("held" if error.errno == errno.ENETUNREACH else error)
""",
    ),
}
