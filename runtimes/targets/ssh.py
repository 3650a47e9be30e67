"""A device over ssh, by the system's own client: aliases of ssh's config, jump hosts, agents and known_hosts are its business."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.errors import UserError
from llmc.runtimes.targets import agent
from llmc.runtimes.targets.needs import packages_of
from llmc.runtimes.targets.shell import command_line, run
from llmc.runtimes.targets.transfer import Cache

if TYPE_CHECKING:
    from llmc.runtimes.targets.target import Target

CLIENT = "LLMC_SSH"  # environment variable: the ssh client and options that come first, as GIT_SSH_COMMAND
READY = "llmc-ready"
GRACE = 5  # seconds that a connection may take to end
# Nothing is asked (BatchMode), an unknown or changed host key ends it, and of the user's config nothing that forwards or runs.
OPTIONS = {
    "BatchMode": "yes", "StrictHostKeyChecking": "yes", "ConnectTimeout": "15", "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4", "ControlPersist": "no", "ClearAllForwardings": "yes", "ForwardAgent": "no",
    "ForwardX11": "no", "PermitLocalCommand": "no", "RemoteCommand": "none", "RequestTTY": "no",
}
ADDRESS = re.compile(r"ssh://(?:([\w][\w.@+$-]*)@)?([A-Za-z0-9_][\w.-]*|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\])(?::(\d{1,5}))?/?", re.ASCII)
JUMP = re.compile(r"[\w][\w.@+$:\[\],%-]*", re.ASCII)
# "$1" the Python that the target names, or nothing: that of the cache's own environment, else python3; "$2" cache, "$3" agent
PYTHON = """
python=$1
case $python in
  "") if [ -x "$2/venv/bin/python" ]; then python=$2/venv/bin/python; else python=python3; fi;;
  "~/"*) python=$HOME/${1#"~/"};;
esac
"""
START = PYTHON + 'export PYTHONDONTWRITEBYTECODE=1; exec "$python" "$3"'


def parse(address: str) -> tuple[str | None, str, str | None]:
    """(user, host or alias, port) of ssh://[user@]host[:port]; UserError for anything that ssh could take for an option."""
    found = ADDRESS.fullmatch(address)
    if found is None or (found[3] and not 0 < int(found[3]) < 65536):
        raise UserError(f"{address!r} is no address of an ssh target",
                        "write ssh://user@host:port, where user and port may be left out, or ssh://ALIAS of ~/.ssh/config")
    return found[1], found[2].strip("[]"), found[3]


class Connection:
    """One connection to a host, shared by all commands (ssh's ControlMaster, its socket in a private folder)."""

    def __init__(self, name: str, address: str, jump: str | None = None) -> None:
        self.name, self.address = name, address
        user, host, port = parse(address)
        if jump and not JUMP.fullmatch(jump):
            raise UserError(f"jump = {jump!r} of target {name} is no host", "write user@host:port, several with commas")
        client = shlex.split(os.environ.get(CLIENT, "ssh"))
        if not client or shutil.which(client[0]) is None:
            raise UserError(f"there is no {client[0] if client else 'ssh'} here", "install OpenSSH's client: openssh-client")
        self._folder = tempfile.mkdtemp(prefix="llmc-")  # mode 700
        options = {**OPTIONS, "ControlPath": f"{self._folder}/s".replace("%", "%%")}
        self._command = [*client, "-T", *(f"-o{k}={v}" for k, v in options.items()), *(["-J", jump] if jump else []),
                         *(["-p", port] if port else []), *(["-l", user] if user else [])]
        self._host = host
        self._master = self._connect()

    def _connect(self) -> subprocess.Popen[bytes]:
        """The process that owns the connection: it ends, and with it the connection, when its stdin does."""
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
            said = errors.read().decode(errors="replace").strip()
        shutil.rmtree(self._folder)
        raise self._refused(line, said)

    def _refused(self, line: str, said: str) -> UserError:
        if line:
            return UserError(f"the login shell of {self.name} prints {line!r} before it runs a command",
                             "make its startup files silent where the shell is not interactive")
        last = said.splitlines()[-1] if said else "the connection was closed"
        by_hand = self.address.removeprefix("ssh://")
        if "Host key verification failed" in said:
            what = "has changed" if "HAS CHANGED" in said else "is not known"
            return UserError(f"{self.name}: the host key of {by_hand} {what}",
                             f"connect by hand once, compare the fingerprint, and accept it: ssh {self.address}")
        if "Permission denied" in said:
            return UserError(f"{self.name}: {last}", f"llmc asks for no password: set up a key, until this works: "
                             f"ssh -o BatchMode=yes {self.address} true")
        return UserError(f"{self.name}: {last}", f"see that this works: ssh -o BatchMode=yes {self.address} true")

    def popen(self, script: str, *args: str, **how: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen([*self._command, "-oControlMaster=no", "--", self._host, command_line(script, *args)], **how)

    def close(self) -> None:
        try:
            self._master.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:  # it waits for commands that still run there
            self._master.kill()
            self._master.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)


class SshDevice:
    """A device (see device.py) that llmc reaches over ssh, and that has a Python."""

    emulated = False

    def __init__(self, target: Target) -> None:
        self.target = target
        self._shell = Connection(target.name, target.address, target.jump)
        try:
            self.cache = Cache(self._shell, target.cache, int(target.cache_gb * 1e9))
            with tempfile.TemporaryDirectory() as folder:
                self._agent = self.cache.place(agent.write(Path(folder)))
        except BaseException:
            self._shell.close()
            raise
        self._has: dict[str, Any] | None = None

    def place(self, artifact: Path) -> str:
        return self.cache.place(artifact)

    def start(self, module: str, job: dict[str, Any]) -> subprocess.Popen[str]:
        if "artifact" in job:
            self._check(packages_of(job["artifact"]))
        return self._start(module, job)

    def _start(self, module: str, job: dict[str, Any]) -> subprocess.Popen[str]:
        process = self._shell.popen(START, self.target.python or "", self.cache.root, self._agent,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        order(process, module, job)
        return process

    def has(self) -> dict[str, Any]:
        """What runtimes/targets/needs.py finds there."""
        if self._has is None:
            out, _ = (process := self._start("llmc.runtimes.targets.needs", {})).communicate()
            if process.returncode == 127:
                raise UserError(f"{self.target.name} has no {self.target.python or 'python3'}",
                                "install Python 3.11 or newer there, or name it in targets.toml: python = \"/path\"")
            found: dict[str, Any] = json.loads(out or "{}")
            if "packages" not in found:
                raise UserError(found.get("problem", f"Python on {self.target.name} ended with {process.returncode}"),
                                found.get("hint", "see its message above"))
            self._has = found
        return self._has

    def _check(self, packages: tuple[str, ...]) -> None:
        found = self.has()
        absent = [p for p in packages if found["packages"][p] is None]
        if absent:
            raise UserError(
                f"{self.target.name}: {found['executable']} (Python {found['python']}) lacks {', '.join(absent)}",
                f"llmc target setup {self.target.name} --install, or there: "
                f"{shlex.join([found['executable'], '-m', 'pip', 'install', *absent])}")

    def close(self) -> None:
        self.cache.close()
        self._shell.close()


def order(process: subprocess.Popen[str], module: str, job: dict[str, Any]) -> None:
    """Tell a fresh agent (agent_main.py) what to run."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps({"module": module, "job": job}) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has died: its exit code and its lack of an answer tell
