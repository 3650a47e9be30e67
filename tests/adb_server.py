"""An adb server for the tests: the host's protocol over a socket (SERVICES.TXT of AOSP's packages/modules/adb, and for
`shell,v2` shell_protocol.h), with one device whose shell is this machine's. The client is the real `adb`."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from typing import Any

STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
VERSION = 41  # ADB_SERVER_VERSION of adb 1.0.41: a client that finds another one kills the server


class Server:
    """`port`: for ANDROID_ADB_SERVER_PORT. path: what the device's shell finds programs by."""

    def __init__(self, serial: str, path: str) -> None:
        self.serial, self.path = serial, path
        self.commands: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the socket was closed
            while True:
                threading.Thread(target=self._serve, args=(self._socket.accept()[0],), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(ConnectionError):
            while request := self._request(peer):
                if request == "host:version":
                    peer.sendall(b"OKAY0004" + b"%04x" % VERSION)
                    return
                if request.endswith(("features", ":get-state")):
                    if self.serial not in request and not request.startswith("host:"):
                        return self._fail(peer, f"device '{request.split(':')[1]}' not found")
                    answer = b"shell_v2,cmd" if "features" in request else b"device"
                    peer.sendall(b"OKAY%04x" % len(answer) + answer)
                    return
                if request.startswith(("host:transport:", "host:tport:serial:")):
                    if request.removeprefix("host:tport:serial:").removeprefix("host:transport:") != self.serial:
                        return self._fail(peer, f"device '{request.rpartition(':')[2]}' not found")
                    peer.sendall(b"OKAY" + (struct.pack("<Q", 1) if "tport" in request else b""))
                elif request.startswith("shell,v2"):
                    peer.sendall(b"OKAY")
                    return self._shell(peer, request.partition(":")[2])
                else:
                    return self._fail(peer, f"unknown request {request}")

    def _fail(self, peer: socket.socket, why: str) -> None:
        peer.sendall(b"FAIL%04x" % len(why) + why.encode())

    def _request(self, peer: socket.socket) -> str:
        length = _exactly(peer, 4)
        return _exactly(peer, int(length, 16)).decode() if length else ""

    def _shell(self, peer: socket.socket, command: str) -> None:
        self.commands.append(command)
        env = {"PATH": f"{self.path}{os.pathsep}{os.environ['PATH']}"}  # Android's shell has no HOME
        process = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=env)
        lock = threading.Lock()

        def send(kind: int, data: bytes) -> None:
            with lock, contextlib.suppress(OSError):
                peer.sendall(struct.pack("<BI", kind, len(data)) + data)

        def drain(kind: int, stream: Any) -> None:
            while data := os.read(stream.fileno(), 1 << 16):
                send(kind, data)

        def feed() -> None:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                while header := _exactly(peer, 5):
                    kind, length = struct.unpack("<BI", header)
                    data = _exactly(peer, length)
                    if kind == STDIN:
                        process.stdin.write(data)
                        process.stdin.flush()
                    elif kind == CLOSE_STDIN:
                        break
            with contextlib.suppress(OSError):
                process.stdin.close()

        threads = [threading.Thread(target=drain, args=a, daemon=True)
                   for a in ((STDOUT, process.stdout), (STDERR, process.stderr))]
        threading.Thread(target=feed, daemon=True).start()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        send(EXIT, bytes([process.wait() & 0xFF]))


def _exactly(peer: socket.socket, n: int) -> bytes:
    """n bytes, or fewer where the peer is done."""
    data = b""
    while len(data) < n and (part := peer.recv(n - len(data))):
        data += part
    return data if len(data) == n else b""
