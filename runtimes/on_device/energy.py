"""The energy of a piece of work in joules, if the machine measures it: RAPL counters of Intel and AMD, power sensors (INA219,
INA3221 and similar, as on Jetson boards), or a discharging battery."""

from __future__ import annotations

import threading
from pathlib import Path
from time import monotonic
from types import TracebackType

SYS = Path("/sys")
TOTALS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0")  # names of the whole board's input on Jetson boards
EVERY = 0.05  # seconds between two readings of a power sensor


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, readable by root only, or without an answer
        return None


def _rapl() -> list[Path]:
    """The energy counters, in microjoules, one for each CPU package (Linux docs: power/powercap/powercap.rst)."""
    zones = [z for z in sorted((SYS / "class/powercap").glob("intel-rapl:*")) if z.name.count(":") == 1]
    return [z / "energy_uj" for z in zones if _number(z / "energy_uj") is not None
            and (z / "name").read_text().startswith("package")]


def _watts() -> tuple[float, str] | None:
    """The power now, in watts, and the name of its sensor; None if there is none. Of an INA3221 only a total rail counts."""
    for sensor in sorted((SYS / "class/hwmon").glob("hwmon*")):
        chip = (sensor / "name").read_text().strip() if (sensor / "name").is_file() else ""
        if not chip.startswith("ina"):
            continue
        for volts in sorted(sensor.glob("in*_input")):
            n = volts.name.removeprefix("in").removesuffix("_input")
            label = (sensor / f"in{n}_label").read_text().strip() if (sensor / f"in{n}_label").is_file() else ""
            millivolts, milliamperes = _number(volts), _number(sensor / f"curr{n}_input")
            if millivolts and milliamperes is not None and (chip != "ina3221" or label in TOTALS):
                return millivolts * milliamperes / 1e6, f"{chip} {label}".strip()
    for battery in sorted((SYS / "class/power_supply").glob("*")):
        if not (battery / "status").is_file() or (battery / "status").read_text().strip() != "Discharging":
            continue
        microwatts = _number(battery / "power_now")
        if microwatts is None:
            current, voltage = _number(battery / "current_now"), _number(battery / "voltage_now")
            microwatts = None if current is None or voltage is None else abs(current) * voltage // 1_000_000
        if microwatts:
            return microwatts / 1e6, f"battery {battery.name}"
    return None


class Meter:
    """Measures the energy of a block: `with Meter() as m: work()`, then m.joules and m.source; None if nothing measures it.

    RAPL covers the CPU packages; a battery or a board's input covers the whole device. The idle energy is not subtracted."""

    joules: float | None = None
    source: str | None = None

    def __enter__(self) -> Meter:
        self._counters = _rapl()
        self._start = monotonic()
        self._before = [_number(p) for p in self._counters]
        self._seen: list[float] = []
        self._done = threading.Event()
        self._thread = None
        if not self._counters and (first := _watts()) is not None:
            self.source = first[1]
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(EVERY):
            if (now := _watts()) is not None:
                self._seen.append(now[0])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        if self._thread:
            self._thread.join()
            if self._seen:
                self.joules = sum(self._seen) / len(self._seen) * (monotonic() - self._start)
            return
        used = 0
        for path, before in zip(self._counters, self._before, strict=True):
            after = _number(path)
            if after is None or before is None:
                return
            wrap = _number(path.with_name("max_energy_range_uj")) or 0
            used += after - before + (wrap if after < before else 0)
        if self._counters:
            self.joules, self.source = used / 1e6, "RAPL, CPU packages"
