"""`python watched.py LOG COMMAND…` in a network namespace of its own: every name that the command looks up is written to LOG.

A server on 127.0.0.1 is the only name server there, so look-ups of native code are seen too. There is no way out of the
namespace.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

BIND = 4096  # MS_BIND of mount(2)
UP = 0x8914, 0x1 | 0x40  # SIOCSIFFLAGS; IFF_UP, IFF_RUNNING
ENTER = ["unshare", "--user", "--map-root-user", "--net", "--mount"]


def possible() -> str | None:
    """Why there can be no such namespace here; None if there can."""
    try:
        done = subprocess.run([*ENTER, sys.executable, __file__, os.devnull, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        return "this system has no unshare"
    return None if done.returncode == 0 else f"no network namespace: {done.stderr.strip().splitlines()[-1:]}"


def _answer(server: socket.socket, log: Path) -> None:
    """Write the name of each question into the log and answer that there is no such name."""
    while True:
        question, sender = server.recvfrom(4096)
        labels, at = [], 12
        while length := question[at]:
            labels.append(question[at + 1 : at + 1 + length].decode(errors="replace"))
            at += 1 + length
        with log.open("a") as f:
            f.write(f"{'.'.join(labels)}\n")
        server.sendto(question[:2] + b"\x81\x83" + question[4:6] + bytes(6) + question[12 : at + 5], sender)


def main() -> int:
    log, command = Path(sys.argv[1]), sys.argv[2:]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, UP[0], struct.pack("16sH14x", b"lo", UP[1]))
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as config:
        config.write("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        config.flush()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(config.name.encode(), os.path.realpath("/etc/resolv.conf").encode(), None, BIND, None):
            sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("127.0.0.1", 53))
        threading.Thread(target=_answer, args=(server, log), daemon=True).start()
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
