"""A real sshd on loopback for the tests: own keys, own known_hosts, own config, high port, run by whoever runs the tests."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

NEEDED = "LLMC_NEED_SSHD"  # set where sshd must be there: a test that cannot have one fails instead of being skipped
PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin"])
RELAY = """
import os, socket, sys, threading, time
host, port, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
there = socket.create_connection((host, port))
def back():
    while data := there.recv(1 << 16):
        os.write(1, data)
    os._exit(0)
threading.Thread(target=back, daemon=True).start()
while data := os.read(0, 1 << 14):
    there.sendall(data)
    time.sleep(pause)
os._exit(0)
"""


class Server:
    """`ssh`: value of LLMC_SSH for a client that knows the aliases device, device-slow, device-unknown and device-jump."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sshd = shutil.which("sshd", path=PLACES)
        if sshd is None or shutil.which("ssh") is None:
            (pytest.fail if os.environ.get(NEEDED) else pytest.skip)("no sshd here: apt-get install openssh-server")
        for name in ("host", "client"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copy(folder / "client.pub", folder / "authorized")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.user = getpass.getuser()
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where sshd of root drops its privileges
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
            f"PidFile {folder}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "PermitRootLogin prohibit-password\nAllowTcpForwarding yes\n")
        host_key = " ".join((folder / "host.pub").read_text().split()[:2])
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {host_key}\n")
        (folder / "none").write_text("")
        (folder / "relay.py").write_text(RELAY)
        self._write_config()
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=self.log)
        self._wait()

    def _write_config(self) -> None:
        f = self.folder
        relay = f"ProxyCommand {sys.executable} {f}/relay.py %h %p"
        blocks = {
            "device": "", "device-slow": f"{relay} 0.002", "bastion": "",
            "device-jump": "ProxyJump bastion", "device-unknown": f"UserKnownHostsFile {f}/none",
            "device-closed": "PubkeyAuthentication no", "device-gone": "Port 1",
        }
        text = "".join(f"Host {name}\n  HostName 127.0.0.1\n  {extra}\n" for name, extra in blocks.items())
        common = (f"Host *\n  Port {self.port}\n  User {self.user}\n  IdentityFile {f}/client\n  IdentitiesOnly yes\n"
                  f"  IdentityAgent none\n  UserKnownHostsFile {f}/known\n  GlobalKnownHostsFile /dev/null\n"
                  "  RemoteCommand echo from the config\n  RequestTTY yes\n")  # an alias made for people, not programs
        (f / "config").write_text(text + common)
        self.ssh = f"ssh -F {f}/config"

    def _wait(self) -> None:
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        said = (self.folder / "log").read_text()
        (pytest.fail if os.environ.get(NEEDED) else pytest.skip)(f"sshd does not start here: {said}")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()
