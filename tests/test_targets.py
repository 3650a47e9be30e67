"""targets.toml: what is read, what is refused, and what an edit leaves alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc import cgroup, machine
from llmc.cli import run
from llmc.errors import UserError
from llmc.runtimes.on_device import probe
from llmc.runtimes.targets.device import LocalDevice, connect
from llmc.runtimes.targets.target import (
    ADB,
    SSH,
    Target,
    find_target,
    load_targets,
    remove_target,
    targets_file,
    write_target,
)

HAND = """# my devices
[targets.pi]
address = "ssh://me@pi5:22"  # under the desk
profile = "pi5"

[targets.phone]
address = "adb:0A1B"
"""


def test_local_targets_need_no_file() -> None:
    assert list(load_targets()) == ["local-cpu", "local-gpu"]
    assert isinstance(connect(find_target("local-cpu")), LocalDevice)
    with pytest.raises(UserError, match="there is no target 'pi'"):
        find_target("pi")
    with pytest.raises(UserError, match=r"no file nowhere\.toml"):
        load_targets(Path("nowhere.toml"))


def test_which_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "c"))
    assert targets_file() == tmp_path / "c/llmc/targets.toml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert targets_file() == tmp_path / ".config/llmc/targets.toml"
    Path("targets.toml").write_text(HAND)
    assert targets_file() == Path("targets.toml")
    assert load_targets()["pi"] == Target("pi", "ssh://me@pi5:22", profile="pi5")


def test_an_edit_leaves_the_rest_as_it_was() -> None:
    path = Path("targets.toml")
    path.write_text(HAND)
    facts = {"cpu": "Cortex-A76", "memory": 8 << 30, "cpu_features": ["asimd"], "governor": None, "gpus": []}
    write_target(Target("pi", "ssh://me@pi5:22", profile="pi5", facts=facts))
    assert path.read_text().startswith("# my devices")
    assert '"ssh://me@pi5:22"  # under the desk' in path.read_text()
    found = load_targets()
    assert found["pi"].facts == {k: v for k, v in facts.items() if v is not None}
    assert found["phone"] == Target("phone", "adb:0A1B")
    write_target(Target("pi", "ssh://me@pi5:22"))
    assert load_targets()["pi"] == Target("pi", "ssh://me@pi5:22"), "what is taken back is gone"
    remove_target("pi")
    assert list(load_targets()) == ["local-cpu", "local-gpu", "phone"]
    with pytest.raises(UserError, match="has no target 'pi'"):
        remove_target("pi")


def test_a_new_file_and_the_facts_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.toml"
    write_target(Target("local-cpu", "local-cpu", facts={"cpu": "A"}), path)
    write_target(Target("jet", "ssh://jet", jump="me@bastion:2222", cache_gb=5, python="/opt/py/bin/python3"), path)
    assert load_targets(path)["jet"] == Target("jet", "ssh://jet", jump="me@bastion:2222", cache_gb=5,
                                               python="/opt/py/bin/python3")
    assert load_targets(path)["local-cpu"].facts == {"cpu": "A"}


@pytest.mark.parametrize(("text", "why"), [
    ("[targets.pi]\n", "has no address"), ("[targets.pi]\naddress = 3\n", "address of target pi is 3"),
    ('[targets.pi]\naddress = "ssh://a"\nspeed = 3\n', "unknown keys speed"),
    ("[pi]\naddress = 1\n", "pi is not a table"),
    ('[targets.pi]\naddress = "ssh://a"\ncache_gb = true\n', "cache_gb of target pi is True"),
    ("targets = 1\n", "not a table"),
    ('[targets.pi]\naddress = "ssh://a"\ncache_gb = 0\n', "out of range"), ("[targets\n", "is not TOML"),
    ('[targets.Pi]\naddress = "ssh://a"\n', "is not a valid target name"),
    ('[targets.local-cpu]\naddress = "ssh://a"\n', "this machine"),
    ('[targets.pi]\naddress = "ssh://a"\njump = "-oProxyCommand=x"\n', "jump"),
    ('[targets.pi]\naddress = "ssh://a"\npython = "-c"\n', "python '-c'"),
    ('[targets.pi]\naddress = "ssh://a"\ncache = "a\\nb"\n', "is not a path"),
])
def test_what_is_refused(text: str, why: str) -> None:
    Path("targets.toml").write_text(text)
    with pytest.raises(UserError, match=why):
        load_targets()
    with pytest.raises(UserError):
        write_target(Target("new", "ssh://b"))
    assert Path("targets.toml").read_text() == text


@pytest.mark.parametrize("address", ["ssh://-oProxyCommand=x", "ssh://a b", "ssh://a;b", "ssh://$(x)", "ssh://a@-b", "adb:-s",
                                     "adb:a b", "ssh://", "http://a", "pi", "ssh://a/b", "ssh://a:port"])
def test_addresses_that_could_be_something_else(address: str) -> None:
    with pytest.raises(UserError, match="address"):
        Target("pi", address)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_no_part_of_an_address_is_an_option_or_a_command(text: str) -> None:
    for prefix, pattern in (("ssh://", SSH), ("adb:", ADB)):
        if match := pattern.fullmatch(prefix + text):
            for part in match.groupdict().values():
                assert not set(part or "") & set(" ;&|$`'\"\\\n<>()*?!#~/")
                assert not (part or "").startswith("-")


def test_bandwidth_and_flops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of one second for each look at it."""
    clock = iter(range(1000))
    monkeypatch.setattr("llmc.runtimes.on_device.probe.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(probe, "BYTES", 1 << 20)
    monkeypatch.setattr(probe, "SIDE", 32)
    assert probe.read_bandwidth(3) == 1 << 20
    assert probe.matmul_flops(3) == 3 * 2 * 32**3


def test_this_machine_agrees_with_psutil() -> None:
    facts = machine.describe()
    assert facts["physical_cores"] == psutil.cpu_count(logical=False)
    total = psutil.virtual_memory().total
    assert facts["memory"] == pytest.approx(min(total, cgroup.memory() or total), rel=0.01)
    assert 1 <= facts["usable_cores"] <= facts["logical_cores"]
    assert facts["cpu"]


def test_a_device_without_psutil_is_described_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert machine.describe()["physical_cores"] >= 1
    monkeypatch.setattr(machine, "CPUS", tmp_path)
    assert machine.describe()["physical_cores"] >= 1
    for i, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):  # two cores, two threads each
        (tmp_path / f"cpu{i}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{i}/topology/thread_siblings_list").write_text(siblings)
    assert machine.describe()["physical_cores"] == 2


def test_sensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for i, mhz in enumerate((1000, 2000)):
        (tmp_path / f"cpu{i}/cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{i}/cpufreq/scaling_cur_freq").write_text(f"{mhz * 1000}\n")
        (tmp_path / f"cpu{i}/thermal_throttle").mkdir()
        (tmp_path / f"cpu{i}/thermal_throttle/core_throttle_count").write_text(f"{i + 1}\n")
    monkeypatch.setattr(machine, "CPUS", tmp_path)
    assert machine.state()["mhz"] == 1500
    assert machine.state()["throttle_events"] == 3
    assert machine.state()["throttled_now"] is None
    flags = tmp_path / "get_throttled"
    monkeypatch.setattr(machine, "PI", str(flags))
    for text, now in (("0x0", False), ("50000", False), ("50005", True)):  # was throttled, is throttled
        flags.write_text(text)
        assert machine.state()["throttled_now"] is now


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*args: str) -> str:
        assert run(["target", *args]) == 0
        return capsys.readouterr().out

    Path("targets.toml").write_text(HAND)
    printed("add", "jet", "ssh://me@jet", "--jump", "me@bastion", "--cache-gb", "5")
    assert load_targets()["jet"] == Target("jet", "ssh://me@jet", jump="me@bastion", cache_gb=5)
    write_target(Target("jet", "ssh://me@jet", jump="me@bastion", cache_gb=5, facts={"cpu": "Cortex"}))
    printed("add", "jet", "ssh://me@jet", "--profile", "orin")
    assert load_targets()["jet"] == Target("jet", "ssh://me@jet", jump="me@bastion", cache_gb=5, profile="orin",
                                           facts={"cpu": "Cortex"}), "what is not named stays"
    printed("add", "jet", "ssh://me@other")
    assert load_targets()["jet"].facts == {}, "another device's"
    assert printed("ls").count("\n") == 7
    assert set(json.loads(printed("ls", "--json"))["targets"]) == {"local-cpu", "local-gpu", "pi", "phone", "jet"}
    assert "not probed" in printed("show", "pi")
    printed("rm", "phone")
    assert "phone" not in load_targets()
    for wrong in (["rm", "phone"], ["add", "local-cpu", "ssh://a"], ["show", "x"]):
        assert run(["target", *wrong]) == 2


def test_probing_notes_what_it_finds(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("new.toml")
    file.write_text("")
    assert run(["target", "probe", "local-cpu", "--targets", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert load_targets(file)["local-cpu"].facts == {k: v for k, v in facts.items() if v is not None}
    assert facts["read_bandwidth"] > 1e8
    assert facts["matmul_flops"] > 1e8
    assert facts["cpu"] == machine.cpu_model()
    assert run(["target", "show", "local-cpu", "--targets", str(file)]) == 0
    assert "GB/s of weights" in capsys.readouterr().out
