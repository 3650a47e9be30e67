"""Devices over ssh, against a real sshd on loopback: what is copied, what is run, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sshd import Server

import llmc
from llmc.errors import UserError
from llmc.runtimes.targets import shell, transfer
from llmc.runtimes.targets.ssh import Connection, SshDevice
from llmc.runtimes.targets.target import Target
from llmc.runtimes.targets.transfer import Cache, files_of, key_of

AWKWARD = ["with space", "it's; touch pwned", "$(touch pwned)", "`touch pwned`", "-rf", "new\nline\n", '"quoted"', "ünï ☃",
           "a\\b", "*"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("sshd"))
    yield made
    made.close()


@pytest.fixture
def ssh(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("LLMC_SSH", server.ssh)
    return server


@pytest.fixture
def connection(ssh: Server) -> Iterator[Connection]:
    made = Connection(Target("pi", "ssh://device"))
    yield made
    made.close()


@pytest.fixture
def cache(connection: Connection, tmp_path: Path) -> Iterator[Cache]:
    made = Cache(connection, str(tmp_path / "the device's cache"), 1 << 30)
    yield made
    made.close()


def target(tmp_path: Path, python: str = sys.executable) -> Target:
    return Target("pi", "ssh://device", python=python, cache=str(tmp_path / "cache"), cache_gb=1)


def write(path: Path, size: int, seed: int = 0) -> Path:
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    return path


@pytest.mark.parametrize("text", [*AWKWARD, "", "~", "--"])
def test_arguments_arrive_as_they_are(connection: Connection, text: str) -> None:
    assert shell.run(connection, 'printf %s "$1$2"', text, "|")[1] == text + "|"


def test_awkward_names_are_copied_and_nothing_runs(cache: Cache, tmp_path: Path) -> None:
    folder = tmp_path / "-a 'model' $(touch pwned)"
    folder.mkdir()
    for i, name in enumerate(AWKWARD[:8]):
        (folder / name).mkdir()
        write(folder / name / f"{name}.onnx", 100 * i, i)  # the first is empty
    there = Path(cache.place(folder))
    assert {p.relative_to(there): p.read_bytes() for p in there.rglob("*.onnx")} == {
        p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.onnx")}
    assert not list(tmp_path.rglob("pwned"))
    assert not Path.home().joinpath("pwned").exists()
    for i, name in enumerate(AWKWARD[3:7]):
        path = Path(cache.place(write(tmp_path / name, 50 + i)))
        assert path.name == name
        assert path.read_bytes() == (tmp_path / name).read_bytes()


def test_what_is_there_is_not_copied_again(cache: Cache, tmp_path: Path) -> None:
    artifact = write(tmp_path / "a.gguf", 3 << 20)
    first = Path(cache.place(artifact))
    changed = first.stat().st_mtime_ns, first.stat().st_ino
    assert cache.place(artifact) == str(first)
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == changed
    other = Path(cache.place(write(artifact, 3 << 20, seed=1)))  # the same name, other bytes
    assert other != first
    assert other.read_bytes() == artifact.read_bytes()


COPY = """
import sys
from llmc.runtimes.targets.ssh import Connection
from llmc.runtimes.targets.target import Target
from llmc.runtimes.targets.transfer import Cache
from pathlib import Path
Cache(Connection(Target("pi", "ssh://device-slow")), sys.argv[1], 1 << 30).place(Path(sys.argv[2]))
"""


def test_a_killed_copy_goes_on(cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = write(tmp_path / "a.gguf", 40 << 20)  # device-slow takes at most 8 MB/s
    file = files_of(artifact)[0]
    root = Path(cache.root)
    part = root / "partial" / key_of([file]) / f"{file.sha256}.part"
    process = subprocess.Popen([sys.executable, "-P", "-c", COPY, str(root), str(artifact)])
    while not (part.exists() and part.stat().st_size > 2 << 20):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((root / "artifacts").iterdir())  # nothing partial can be run
    sent: list[int] = []
    append = Cache._append

    def spy(self: Cache, key: str, file: transfer.File, offset: int) -> bool:
        sent.append(offset)
        return append(self, key, file, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "_append", spy)
        there = Path(cache.place(artifact))
    assert there.read_bytes() == artifact.read_bytes()
    assert len(sent) == 1
    assert 2 << 20 < sent[0] < 40 << 20
    assert "going on with a.gguf on pi at" in capsys.readouterr().err
    assert not list((root / "partial").iterdir())


@pytest.mark.parametrize("damage", ["flipped", "longer", "other"])
def test_a_damaged_part_is_noticed_and_sent_again(cache: Cache, tmp_path: Path, damage: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    artifact = write(tmp_path / "a.gguf", 1 << 20)
    file = files_of(artifact)[0]
    part = Path(cache.root) / "partial" / key_of([file]) / f"{file.sha256}.part"
    part.parent.mkdir()
    data = bytearray(artifact.read_bytes())
    if damage == "flipped":
        data = data[: 1 << 19]
        data[12345] ^= 1
    part.write_bytes(bytes(data) + b"x" if damage == "longer" else bytes(len(data)) if damage == "other" else data)
    assert Path(cache.place(artifact)).read_bytes() == artifact.read_bytes()
    assert "what pi has of a.gguf is damaged: sending it from the start" in capsys.readouterr().err


def test_damage_on_the_way_is_noticed(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    """The device hashes what it has: what it was sent differs from what was announced."""
    artifact = write(tmp_path / "a.gguf", 1 << 20)
    pump, broken = transfer._pump, [True, False]

    def flip(source: Any, sink: Any) -> Iterator[int]:
        if broken.pop(0):
            sink.write(bytes(1 << 20))
            source.read()
        yield from pump(source, sink)

    monkeypatch.setattr(transfer, "_pump", flip)
    assert Path(cache.place(artifact)).read_bytes() == artifact.read_bytes()
    assert "arrived damaged on pi: sending it again" in capsys.readouterr().err
    broken[:] = [True, True]
    with pytest.raises(UserError, match=r"b\.gguf arrived damaged on pi twice"):
        cache.place(write(tmp_path / "b.gguf", 1 << 20, seed=1))
    assert len(list((Path(cache.root) / "artifacts").iterdir())) == 1


def test_a_folder_goes_on_after_its_finished_files(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    for name in ("a", "b", "c"):
        write(folder / name, 1000, ord(name))
    append = Cache._append

    def stop_at_c(self: Cache, key: str, file: transfer.File, offset: int) -> bool:
        if file.name == "c":
            raise KeyboardInterrupt
        return append(self, key, file, offset)

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "_append", stop_at_c)
        with pytest.raises(KeyboardInterrupt):
            cache.place(folder)
    assert not list((Path(cache.root) / "artifacts").iterdir())
    finished = {p.stat().st_ino for p in Path(cache.root).glob("partial/*/*")}
    assert len(finished) == 2
    there = Path(cache.place(folder))
    assert {p.name: p.read_bytes() for p in there.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert {(there / name).stat().st_ino for name in "ab"} == finished


def test_the_oldest_use_leaves_and_never_what_is_in_use(connection: Connection, tmp_path: Path) -> None:
    root, mb = str(tmp_path / "cache"), 1 << 20
    a, b, c, d = (write(tmp_path / f"{name}.gguf", 4 * mb, i) for i, name in enumerate("abcd"))
    first = Cache(connection, root, 10 * mb)
    placed = {p.name: Path(first.place(p)) for p in (a, b)}
    first.close()
    for age, name in ((100, "a.gguf"), (50, "b.gguf")):
        os.utime(placed[name].parent, (time.time() - age,) * 2)
    user = Cache(connection, root, 10 * mb)
    user.place(a)  # now the newest use
    other = Cache(connection, root, 10 * mb)
    there = Path(other.place(c))  # makes room: b goes, though it came after a
    assert [p.exists() for p in (placed["a.gguf"], there, placed["b.gguf"])] == [True, True, False]
    with pytest.raises(UserError, match=r"d\.gguf has 4\.2 MB, and the cache of pi may hold 10\.5 MB, of which 8\.4 MB"):
        other.place(d)  # a and c are in use
    assert [p.exists() for p in (placed["a.gguf"], there)] == [True, True]
    user.close()
    assert [p.exists() for p in (Path(other.place(d)), placed["a.gguf"])] == [True, False]
    removed, left = Cache(connection, root, 10 * mb).clean()
    assert (removed, left) == (0, pytest.approx(8 * mb, rel=0.1))
    other.close()
    assert other.clean()[1] == 0
    assert not list((tmp_path / "cache" / "artifacts").iterdir())


def test_two_copies_at_once_wait_for_each_other(connection: Connection, tmp_path: Path) -> None:
    artifact = write(tmp_path / "a.gguf", 8 << 20)
    root = str(tmp_path / "cache")
    process = subprocess.Popen([sys.executable, "-P", "-c", COPY, root, str(artifact)])
    while not list(Path(root).rglob("*.part")):
        time.sleep(0.01)
    there = Path(Cache(connection, root, 1 << 30).place(artifact))
    assert there.read_bytes() == artifact.read_bytes()
    assert process.wait() == 0


def test_the_agent_runs_there(ssh: Server, tmp_path: Path, made: SimpleNamespace) -> None:
    device = SshDevice(target(tmp_path))
    try:
        there = device.place(made.gguf)
        assert Path(there).is_relative_to(tmp_path / "cache" / "artifacts")
        job = {"artifact": there, "context": 32, "threads": 1, "device": "cpu", "kv": None}
        child = device.start("llmc.runtimes.on_device.bench", job)
        asked = [{"do": "ids", "ids": list(range(3, 19))}, {"do": "run", "prompts": [16], "depths": [16], "generate": 4},
                 {"do": "end"}]
        out, _ = child.communicate("".join(json.dumps(line) + "\n" for line in asked))
        loaded, fed, ran, ended = (json.loads(line) for line in out.splitlines())
        assert loaded["runtime"]["runtime"] == "llama.cpp"
        assert fed == {"tokens": 16}
        assert ran["decode_s"]["16"] > 0
        assert ended["peak_rss"] > 1 << 20
    finally:
        device.close()
    agents = list((tmp_path / "cache" / "artifacts").glob("*/*.zip"))
    assert [hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in agents] == [p.stem for p in agents]
    assert len(agents) == 1


def test_bench_and_eval_there(ssh: Server, tmp_path: Path, made: SimpleNamespace) -> None:
    """The whole way: targets.toml, a report of the device's speed, and its logits against this machine's."""
    targets = tmp_path / "targets.toml"
    targets.write_text(f'[targets.pi]\naddress = "ssh://device"\npython = "{sys.executable}"\ncache = "{tmp_path}/cache"\n')
    report = llmc.bench(made.gguf, target="pi", targets=targets, prompt=16, generate=4, warmup=0, threads=1)[0]
    section = report["speeds"]["pi"]
    assert section["target"]["address"] == "ssh://device"
    assert section["decode"]["median"] > 0
    assert section["runtime"]["runtime"] == "llama.cpp"
    report = llmc.evaluate(made.gguf, base=made.gguf, target="pi", targets=targets, chunks=1, context=32, threads=1)
    quality = report["quality"]
    assert quality["runtime"]["target"]["name"] == "pi"
    assert quality["texts"][0]["top1"]["value"] == 1
    with pytest.raises(UserError, match=r"is a model folder for torch; pi runs \.gguf files and ONNX folders"):
        llmc.evaluate(made.base, target="pi", targets=targets)


def test_what_the_device_lacks_is_named(ssh: Server, tmp_path: Path, made: SimpleNamespace) -> None:
    import venv

    venv.create(tmp_path / "bare", with_pip=False)
    python = str(tmp_path / "bare/bin/python")
    device = SshDevice(target(tmp_path, python=python))
    try:
        with pytest.raises(UserError, match=r"pi: .*bare/bin/python .* lacks numpy, llama-cpp-python") as e:
            device.start("llmc.runtimes.on_device.bench", {"artifact": "/x/a.gguf"})
        assert e.value.hint == ("llmc target setup pi --install, or there: "
                                f"{python} -m pip install numpy llama-cpp-python")
    finally:
        device.close()
    device = SshDevice(target(tmp_path, python="/nowhere/python3"))
    try:
        with pytest.raises(UserError, match="pi has no /nowhere/python3"):
            device.has()
    finally:
        device.close()


@pytest.mark.parametrize(("address", "problem", "hint"), [
    ("ssh://device-unknown", r"pi: the host key of device-unknown is not known", "compare the fingerprint"),
    ("ssh://device-closed", r"pi: .*Permission denied", "set up a key"),
    ("ssh://device-gone", r"pi: .*Connection refused", "ssh -o BatchMode=yes ssh://device-gone true"),
])
def test_who_cannot_connect_is_told_why(ssh: Server, address: str, problem: str, hint: str) -> None:
    with pytest.raises(UserError, match=problem) as e:
        Connection(Target("pi", address))
    assert hint in e.value.hint


def test_a_changed_host_key_is_refused(ssh: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = tmp_path / "known"
    key = (ssh.folder / "client.pub").read_text().split()[1]
    known.write_text(f"[127.0.0.1]:{ssh.port} ssh-ed25519 {key}\n")
    monkeypatch.setenv("LLMC_SSH", f"{ssh.ssh} -o UserKnownHostsFile={known} -o StrictHostKeyChecking=no")
    with pytest.raises(UserError, match="the host key of device has changed"):
        Connection(Target("pi", "ssh://device"))


@pytest.mark.parametrize(("address", "jump"), [("ssh://device-jump", None), ("ssh://device", "bastion")])
def test_jump_hosts(ssh: Server, address: str, jump: str | None) -> None:
    """By the user's ssh config, and by the target's own `jump`."""
    connection = Connection(Target("pi", address, jump=jump))
    assert shell.run(connection, "echo here")[1] == "here\n"
    connection.close()


def test_the_host_comes_after_every_option(ssh: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """User, port and an IPv6 address of a target, as ssh is given them."""
    client = tmp_path / "ssh"
    client.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/given\necho llmc-ready\ncat >/dev/null\n')
    client.chmod(0o755)
    monkeypatch.setenv("LLMC_SSH", str(client))
    Connection(Target("pi", "ssh://me@[fe80::1]:2222", jump="me@bastion")).close()
    given = (tmp_path / "given").read_text().splitlines()
    assert [a for a in given if a.startswith(("-J", "-p", "-l"))] == ["-Jme@bastion", "-p2222", "-lme"]
    assert given[given.index("--") + 1] == "fe80::1"
    assert "-oStrictHostKeyChecking=yes" in given


def test_nothing_is_left_behind_here(ssh: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    device = SshDevice(target(tmp_path))
    sockets = list(tmp_path.glob("llmc-*/s"))
    assert [s.parent.stat().st_mode & 0o777 for s in sockets] == [0o700]
    device.close()
    assert not list(tmp_path.glob("llmc-*"))
