"""
Energy from the board's own sensors, without extra packages: INA power monitors of Jetson boards (hwmon) and the RAPL
counters of x86 processors (powercap). Files are read under a root that tests replace.

Which rails are added up is decided here once, so that nothing is counted twice: a rail that measures the whole input
stands alone, and a rail that is fed from another measured one is left out.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


# Seconds between samples. A read of an INA monitor goes over I2C and takes about a millisecond.
INTERVAL = 0.05

CHIPS = ("ina3221", "ina238")

# The whole input of module or board, by label: whichever is there stands for all. VDD_IN: Orin NX and Nano, Xavier NX
# ("total power of module", NVIDIA's forum); VIN: Thor, an INA238 before the carrier board; POM_5V_IN: the first Nano.
INPUT_RAILS = ("VIN", "VDD_IN", "POM_5V_IN")
# Boards that measure parts only: rails that share no current. Their sum leaves out what no rail measures.
PARTS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO is fed from VIN_SYS_5V0
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor without its INA238
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)


@dataclass
class _Rail:
    """Power of one rail: a file in microwatts, or volts and amperes in thousandths."""

    label: str
    power: Path | None = None
    voltage: Path | None = None
    current: Path | None = None

    def watts(self) -> float:
        if self.power is not None:
            return _integer(self.power) / 1e6
        return _integer(self.voltage) * _integer(self.current) / 1e6


@dataclass
class _Counter:
    """An energy counter in microjoules that starts again at 0 after `span`."""

    label: str
    path: Path
    span: int
    last: int | None = None

    def joules_until(self, now: int) -> float:
        """What was added since the last call, which must come before the counter has gone round once."""
        grown = 0 if self.last is None else now - self.last
        self.last = now
        return (grown if grown >= 0 else grown + self.span) / 1e6


def _integer(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n\r\t ")
    except OSError:
        return None


@dataclass
class EnergyMeter:
    """
    Measures the energy used while a block runs:

        with EnergyMeter() as meter:
            output = model.generate(**inputs, max_new_tokens=256)
        print(meter.joules, meter.tokens_per_joule(256))

    A thread samples the sensors; power is integrated over time by the trapezoidal rule, counters are differenced.
    Where there is no sensor, `joules` is `None` and `reason` says why; nothing is raised.

    Args:
        root: where `sys` lies.
        rails: labels of hwmon rails to add up, on a board that is not known here. The choice is yours then: a rail
            that is fed from another one would count twice.
        interval: seconds between samples; `None` for no thread: call `sample` yourself.
        clock: seconds, as `time.monotonic` gives them.

    Attributes:
        source (`str`, *optional*): the sensor and the rails or zones that are added up.
        scope (`str`, *optional*): what they cover.
        joules (`float`, *optional*): energy from the start of the block to the last sample.
        seconds (`float`): between the first and the last sample.
        samples, missed (`int`): samples taken, and those of which a file could not be read.
        reason (`str`, *optional*): why there is no energy.
    """

    root: str | os.PathLike = "/"
    rails: Sequence[str] | None = None
    interval: float | None = INTERVAL
    clock: Callable[[], float] = time.monotonic
    source: str | None = field(default=None, init=False)
    scope: str | None = field(default=None, init=False)
    reason: str | None = field(default=None, init=False)
    samples: int = field(default=0, init=False)
    missed: int = field(default=0, init=False)

    def __post_init__(self):
        if self.interval is not None and not self.interval > 0:
            raise ValueError(
                f"interval must be above 0 seconds, or None to call sample() yourself; got {self.interval!r}."
            )
        if isinstance(self.rails, str):
            raise ValueError(f"rails is a list of labels, got the text {self.rails!r}; write [{self.rails!r}].")
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._clear()
        self._sensors, self.source, self.scope, self._absent = find_sensors(self.root, self.rails)
        self.reason = self._absent

    def _clear(self) -> None:
        self._joules, self._first, self._last, self._watts = 0.0, None, None, None
        self.samples = self.missed = 0

    def __enter__(self) -> EnergyMeter:
        if self._thread is not None:
            raise RuntimeError("this EnergyMeter is running already; use one for each block.")
        self._clear()
        for sensor in self._sensors:
            if isinstance(sensor, _Counter):
                sensor.last = None
        self.reason = self._absent
        self.sample()
        if self._sensors and self.interval is not None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="energy-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self.sample()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()

    def sample(self) -> None:
        """Read the sensors now. A sample of which a file cannot be read is left out and counted in `missed`."""
        if not self._sensors:
            return
        with self._lock:
            try:
                watts = readings = None
                if isinstance(self._sensors[0], _Counter):
                    readings = [_integer(counter.path) for counter in self._sensors]
                else:
                    watts = sum(rail.watts() for rail in self._sensors)
            except (OSError, ValueError) as error:
                self.missed += 1
                if not self.samples:
                    self.reason = f"{self.source} cannot be read: {error}"
                return
            now = self.clock()
            self.reason = None
            if readings is not None:
                self._joules += sum(map(_Counter.joules_until, self._sensors, readings))
            elif self._last is not None:
                self._joules += (watts + self._watts) / 2 * (now - self._last)
            if self._last is None:
                self._first = now
            self._last, self._watts = now, watts
            self.samples += 1

    @property
    def seconds(self) -> float:
        return 0.0 if self._first is None else self._last - self._first

    @property
    def joules(self) -> float | None:
        return self._joules if self.samples > 1 else None

    @property
    def watts(self) -> float | None:
        """Mean power, in watts."""
        return self.joules / self.seconds if self.joules is not None and self.seconds > 0 else None

    def tokens_per_joule(self, tokens: int) -> float | None:
        """`tokens` divided by the energy, idle power of the board included; `None` without a measurement."""
        return tokens / self.joules if self.joules else None


def find_sensors(
    root: str | os.PathLike = "/", rails: Sequence[str] | None = None
) -> tuple[list[_Rail] | list[_Counter], str | None, str | None, str | None]:
    """The sensors to add up, their source and scope; or none, and the reason."""
    root = Path(root)
    found = _hwmon_rails(root)
    if rails is not None:
        unknown = [label for label in rails if label not in found]
        if unknown or not rails:
            return [], None, None, (
                f"rails={list(rails)!r} was given, and this machine's INA monitors have "
                f"{', '.join(found) or 'no rails (there is no such monitor)'}"
            )  # fmt: skip
        return [found[label] for label in rails], f"INA hwmon: {' + '.join(rails)}", "the rails named", None
    chosen = _choose(found)
    if chosen:
        scope = "the whole input" if chosen[0] in INPUT_RAILS else "the measured parts of the module"
        return [found[label] for label in chosen], f"INA hwmon: {' + '.join(chosen)}", scope, None
    counters, why_not = _rapl_counters(root)
    if counters:
        labels = " + ".join(counter.label for counter in counters)
        return counters, f"RAPL: {labels}", "processor packages and the memory they report; no discrete GPU", None
    if found:
        return [], None, None, (
            f"the rails {', '.join(found)} are not known here, and adding them up could count some twice; name those "
            "that share no current: EnergyMeter(rails=[...])"
        )  # fmt: skip
    return [], None, None, why_not


def _hwmon_rails(root: Path) -> dict[str, _Rail]:
    """Rails of all INA monitors by label; unconnected, unlabelled and switched-off channels are passed over."""
    found: dict[str, _Rail] = {}
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        chip = _text(folder / "name")
        if chip not in CHIPS:
            continue
        if chip == "ina238":  # one rail; Jetson Thor's is the input, whether or not the kernel passes its label on
            power = folder / "power1_input"
            if power.is_file():
                label = _text(folder / "in1_label") or _text(folder / "label") or "VIN"
                found[label] = _Rail(label, power=power)
            continue
        for channel in (1, 2, 3):  # further ones are sums and shunt voltages
            label = _text(folder / f"in{channel}_label")
            voltage, current = folder / f"in{channel}_input", folder / f"curr{channel}_input"
            if not label or label.upper() == "NC" or _text(folder / f"in{channel}_enable") == "0":
                continue
            if voltage.is_file() and current.is_file():
                found[label] = _Rail(label, voltage=voltage, current=current)
    return found


def _choose(found: dict[str, _Rail]) -> list[str]:
    for label in INPUT_RAILS:
        if label in found:
            return [label]
    for labels in PARTS:
        if all(label in found for label in labels):
            return list(labels)
    return []


def _rapl_counters(root: Path) -> tuple[list[_Counter], str | None]:
    """Counters of processor packages and of the memory beside them; zones inside a package are part of it."""
    folder = root / "sys/class/powercap"
    counters, unreadable = [], []
    # "intel-rapl" on AMD too. "intel-rapl-mmio" shows the same packages again, and "psys" includes them.
    for zone in sorted(folder.glob("intel-rapl:*")):
        name = _text(zone / "name") or ""
        is_top = re.fullmatch(r"intel-rapl:\d+", zone.name) is not None
        if not (name.startswith("package") if is_top else name == "dram"):
            continue
        path = zone / "energy_uj"
        try:
            _integer(path)
            span = _integer(zone / "max_energy_range_uj")
        except PermissionError:
            unreadable.append(path)
        except (OSError, ValueError):
            continue
        else:
            parent = "" if is_top else (_text(folder / zone.name.rpartition(":")[0] / "name") or "") + "/"
            counters.append(_Counter(parent + name, path, span))
    if unreadable:  # some of the zones would be a number that means nothing
        return [], f"{unreadable[0]} can be read by root only: run as root, or `chmod o+r` it"
    if counters:
        return counters, None
    return [], (
        f"no power sensor: neither an INA monitor in {root / 'sys/class/hwmon'} nor RAPL counters in {folder}. "
        "Measure at the plug"
    )


__all__ = ["EnergyMeter", "find_sensors"]
