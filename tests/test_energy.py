"""Energy from a made-up /sys: what is read, and what is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmc.runtimes.on_device import energy
from llmc.runtimes.on_device.energy import Meter

pytestmark = pytest.mark.skipif(os.name == "nt", reason="names of /sys have a colon")


@pytest.fixture
def sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "SYS", tmp_path)
    monkeypatch.setattr(energy, "EVERY", 0.001)
    return tmp_path


def write(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name).write_text(f"{value}\n")


def waited(seconds: float) -> Meter:
    import time

    with Meter() as meter:
        time.sleep(seconds)
    return meter


def test_nothing_to_read(sys: Path) -> None:
    assert (waited(0).joules, waited(0).source) == (None, None)


def test_rapl_counters_add_up_and_wrap(sys: Path) -> None:
    zones = [sys / f"class/powercap/intel-rapl:{i}" for i in (0, 1)]
    for zone, name, before in zip(zones, ("package-0", "package-1"), (1_000_000, 9_000_000), strict=True):
        write(zone, name=name, energy_uj=before, max_energy_range_uj=10_000_000)
    write(sys / "class/powercap/intel-rapl:0:0", name="core", energy_uj=5)  # part of its package
    write(sys / "class/powercap/intel-rapl:2", name="psys", energy_uj=5)  # counts the packages again
    with Meter() as meter:
        write(zones[0], energy_uj=3_000_000)
        write(zones[1], energy_uj=500_000)  # began again at its range
    assert meter.joules == pytest.approx(2.0 + 1.5)
    assert meter.source == "RAPL, CPU packages"


def test_a_sensor_of_power_is_watched(sys: Path) -> None:
    rail = sys / "class/hwmon/hwmon3"
    write(rail, name="ina3221", in1_label="VDD_CPU", in1_input=5000, curr1_input=100,
          in2_label="VDD_IN", in2_input=5000, curr2_input=2000)
    meter = waited(0.05)
    assert meter.source == "ina3221 VDD_IN"
    assert meter.joules == pytest.approx(10 * 0.05, rel=0.5)


@pytest.mark.parametrize(("status", "measured"), [("Discharging", True), ("Charging", False)])
def test_a_battery_tells_only_while_it_is_discharged(sys: Path, status: str, measured: bool) -> None:
    write(sys / "class/power_supply/BAT0", status=status, current_now=-2_000_000, voltage_now=4_000_000)
    meter = waited(0.05)
    assert (meter.source == "battery BAT0") == measured
    assert meter.joules == (pytest.approx(8 * 0.05, rel=0.5) if measured else None)
