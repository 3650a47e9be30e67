"""A device over ssh. The system's ssh client handles aliases, jump hosts, agents and known_hosts."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.machine import WINDOWS
from llmc.runtimes.targets import agent
from llmc.runtimes.targets.python_device import PythonDevice, pip_install
from llmc.runtimes.targets.shell import command_line
from llmc.runtimes.targets.target import SSH, Target
from llmc.runtimes.targets.transfer import Cache

CLIENT = "LLMC_SSH"  # environment variable: the ssh client and its options, such as -F FILE
READY = "llmc-ready"
GRACE = 5  # seconds that a connection may take to end
# These options override the user's config: no questions (BatchMode), no unknown or changed host key, no forwarding, no other
# commands.
OPTIONS = {
    "BatchMode": "yes", "StrictHostKeyChecking": "yes", "ConnectTimeout": "15", "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4", "ControlPersist": "no", "ClearAllForwardings": "yes", "ForwardAgent": "no",
    "ForwardX11": "no", "PermitLocalCommand": "no", "RemoteCommand": "none", "RequestTTY": "no",
}
# "$1" is the target's Python, "$2" the cache, "$3" the agent. If the target has the default Python, the environment in the
# cache, which `llmc target setup` makes, comes first.
PYTHON = """
python=$1
case $python in
  python3) if [ -x "$2/venv/bin/python" ]; then python=$2/venv/bin/python; fi;;
  "~/"*) python=$HOME/${1#"~/"};;
esac
"""
START = PYTHON + 'export PYTHONDONTWRITEBYTECODE=1; exec "$python" "$3"'
# The packages follow "$2". If the target names its own Python, that one gets the packages, else an environment in the cache.
INSTALL = PYTHON + """
if [ "$1" = python3 ] && [ "$python" = python3 ]; then
  python3 -m venv "$2/venv" || exit; python=$2/venv/bin/python
fi
shift 2; exec "$python" -m pip --disable-pip-version-check install "$@" >&2
"""


class Connection:
    """One connection to a host, shared by all commands (ssh's ControlMaster, its socket in a private folder)."""

    def __init__(self, target: Target) -> None:
        self.name, self.address = target.name, target.address
        parts = SSH.fullmatch(target.address)
        assert parts is not None, target.address
        client = shlex.split(os.environ.get(CLIENT, "ssh"))
        if WINDOWS and CLIENT not in os.environ:
            raise UserError("OpenSSH for Windows cannot share one connection among commands (ControlMaster), which ssh "
                            "targets need", "run llmc in WSL")
        if not client or shutil.which(client[0]) is None:
            raise UserError(f"{client[0] if client else 'ssh'} is not installed here",
                            "install OpenSSH's client: openssh-client")
        self._folder = tempfile.mkdtemp(prefix="llmc-")  # mode 700
        options = {**OPTIONS, "ControlPath": f"{self._folder}/s".replace("%", "%%")}
        more = (("J", target.jump), ("p", parts["port"]), ("l", parts["user"]))
        self._command = [client[0], "-T", *(f"-o{k}={v}" for k, v in options.items()), *client[1:],  # the first -o counts
                         *(f"-{k}{v}" for k, v in more if v)]
        self._host = parts["host"].strip("[]")
        self._master = self._connect()

    def _connect(self) -> subprocess.Popen[bytes]:
        """Start the process that owns the connection. When its stdin ends, the process and the connection end."""
        with tempfile.TemporaryFile() as errors:
            master = subprocess.Popen(
                [*self._command, "-oControlMaster=yes", "--", self._host, command_line(f"echo {READY}; cat >/dev/null")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            assert master.stdout is not None
            line = master.stdout.readline().decode(errors="replace").rstrip("\n")
            if line == READY:
                return master
            master.kill()
            master.communicate()
            errors.seek(0)
            message = errors.read().decode(errors="replace").strip()
        shutil.rmtree(self._folder)
        raise self._refused(line, message)

    def _refused(self, line: str, message: str) -> UserError:
        """The error for a failed connection. line: the first line of stdout; message: stderr."""
        if line:
            return UserError(f"the login shell of {self.name} prints {line!r} before it runs a command",
                             "make its startup files silent if the shell is not interactive")
        last = message.splitlines()[-1] if message else "the connection was closed"
        by_hand = self.address.removeprefix("ssh://")
        if "Host key verification failed" in message:
            what = "has changed" if "HAS CHANGED" in message else "is not known"
            return UserError(f"{self.name}: the host key of {by_hand} {what}",
                             f"connect by hand once, compare the fingerprint, and accept it: ssh {self.address}")
        if "Permission denied" in message:
            return UserError(f"{self.name}: {last}", f"llmc cannot enter a password: set up a key until this works: "
                             f"ssh -o BatchMode=yes {self.address} true")
        return UserError(f"{self.name}: {last}", f"check that this works: ssh -o BatchMode=yes {self.address} true")

    def popen(self, script: str, *args: str, **how: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen([*self._command, "-oControlMaster=no", "--", self._host, command_line(script, *args)], **how)

    def close(self) -> None:
        try:
            self._master.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:  # commands still run there
            self._master.kill()
            self._master.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)


class SshDevice(PythonDevice):
    """A device with a Python that llmc reaches over ssh."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._shell = Connection(target)
        try:
            self.cache = Cache(self._shell, target.cache, int(target.cache_gb * 1e9))
            with tempfile.TemporaryDirectory() as folder:
                self._zip = self.cache.place(agent.write(Path(folder)))
        except BaseException:
            self._shell.close()
            raise

    def _copy(self, artifact: Path) -> str:
        return self.cache.place(artifact)

    def install(self, packages: list[str]) -> None:
        """Run `pip install` on the device, with the device's network. Its output goes to stderr."""
        code = self._shell.popen(INSTALL, self.target.python, self.cache.root, *packages, stdin=subprocess.DEVNULL).wait()
        self._has = None
        if code:
            raise UserError(f"{self.target.name}: pip ended with exit code {code}",
                            "see its message above; on Debian it needs python3-venv, and a C++ compiler for llama-cpp-python")

    def _agent(self) -> subprocess.Popen[str]:
        return self._shell.popen(START, self.target.python, self.cache.root, self._zip,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _install_hint(self, executable: str, absent: list[str]) -> str:
        return f"llmc target setup {self.target.name} --install, or there: {pip_install(executable, absent)}"

    def close(self) -> None:
        self.cache.close()
        self._shell.close()
