"""Energy from fake sensors: ramps whose integral is known, counters that go round, rails that must not count twice."""

import threading
import time

import pytest

from transformers_minicpm4.edge.power import EnergyMeter, find_sensors


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def board(tmp_path):
    """A board with INA3221 monitors: `board({"VDD_IN": (5000, 2000), ...})` in mV and mA, three rails a chip."""

    def build(rails, chip="ina3221"):
        for index, label in enumerate(rails):
            folder = tmp_path / f"sys/class/hwmon/hwmon{3 + index // 3}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "name").write_text(f"{chip}\n")
            channel = index % 3 + 1
            (folder / f"in{channel}_label").write_text(f"{label}\n")
            (folder / f"in{channel}_input").write_text(f"{rails[label][0]}\n")
            (folder / f"curr{channel}_input").write_text(f"{rails[label][1]}\n")
        return tmp_path

    return build


def zone(root, name, label, energy, span=1000, at=None):
    folder = root / "sys/class/powercap" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder / "energy_uj"


def current(root, chip=3, channel=1):
    return root / f"sys/class/hwmon/hwmon{chip}/curr{channel}_input"


ORIN_NANO = {"VDD_IN": (5000, 1200), "VDD_CPU_GPU_CV": (5000, 500), "VDD_SOC": (5000, 300)}
AGX_ORIN = {
    "VDD_GPU_SOC": (19000, 200), "VDD_CPU_CV": (19000, 100), "VIN_SYS_5V0": (5000, 1000),
    "NC": (0, 0), "VDDQ_VDD2_1V8AO": (5000, 300),
}  # fmt: skip


def test_a_ramp_is_integrated_exactly(board):
    root, clock = board(ORIN_NANO), Clock()
    meter = EnergyMeter(root, interval=None, clock=clock)
    with meter:
        # 5 V; 1.2 A + 0.5 A/s for 8 s at uneven steps: integral 5 * (1.2 * 8 + 0.5 * 32) J.
        for step in (0.5, 1.0, 1.5, 2.0, 3.0):
            clock.now += step
            current(root).write_text(f"{1200 + 500 * (clock.now - 100):.0f}")
            meter.sample()
    assert meter.joules == pytest.approx(5 * (1.2 * 8 + 0.5 * 32), rel=1e-12)
    assert meter.seconds == 8
    assert meter.watts == pytest.approx(meter.joules / 8)
    assert meter.tokens_per_joule(64) == pytest.approx(64 / meter.joules)
    assert meter.reason is None


def test_the_input_rail_stands_for_its_parts(board):
    sensors, source, scope, reason = find_sensors(board(ORIN_NANO))
    assert source == "INA hwmon: VDD_IN"
    assert scope == "the whole input"
    assert sum(rail.watts() for rail in sensors) == 6.0
    assert reason is None


def test_agx_orin_adds_parts_and_leaves_out_what_one_of_them_feeds(board):
    sensors, source, scope, _ = find_sensors(board(AGX_ORIN))
    assert source == "INA hwmon: VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    assert "parts" in scope
    assert sum(rail.watts() for rail in sensors) == pytest.approx(3.8 + 1.9 + 5.0)


def test_thor_has_its_input_in_an_ina238(board):
    root = board({"VDD_GPU": (12000, 900), "VDD_CPU_SOC_MSS": (12000, 500), "VIN_SYS_5V0": (5000, 900)})
    assert find_sensors(root)[1] == "INA hwmon: VDD_GPU + VDD_CPU_SOC_MSS + VIN_SYS_5V0"
    folder = root / "sys/class/hwmon/hwmon9"
    folder.mkdir()
    (folder / "name").write_text("ina238\n")
    (folder / "power1_input").write_text("25500000\n")  # microwatts
    sensors, source, _, _ = find_sensors(root)
    assert source == "INA hwmon: VIN"
    assert [rail.watts() for rail in sensors] == [25.5]


def test_rails_that_are_not_known_are_not_added_up(board):
    root = board({"RAIL_A": (5000, 1000), "RAIL_B": (3300, 1000)})
    meter = EnergyMeter(root, interval=None)
    with meter:
        meter.sample()
    assert meter.joules is None
    assert "RAIL_A, RAIL_B" in meter.reason
    assert "rails=" in meter.reason
    named = EnergyMeter(root, rails=["RAIL_B"], interval=None, clock=Clock())
    with named:
        named.clock.now += 2
    assert named.joules == pytest.approx(3.3 * 2)


def test_a_rail_that_is_not_there(board):
    meter = EnergyMeter(board(ORIN_NANO), rails=["VDD_GPU"])
    with meter:
        pass
    assert meter.joules is None
    assert "VDD_GPU" in meter.reason
    assert "VDD_IN" in meter.reason


def test_a_channel_that_is_off_is_no_rail(board):
    root = board(ORIN_NANO)
    (root / "sys/class/hwmon/hwmon3/in1_enable").write_text("0\n")
    assert "not known" in find_sensors(root)[3]  # without VDD_IN, what is left are parts nobody described


def test_other_hwmon_chips_are_passed_over(board):
    assert "no power sensor" in find_sensors(board({"VDD_IN": (5000, 1)}, chip="nvme"))[3]


def test_a_counter_that_goes_round(tmp_path):
    energy = zone(tmp_path, "intel-rapl:0", "package-0", 400, span=1_000_000)
    with EnergyMeter(tmp_path, interval=None, clock=Clock()) as meter:
        for value in (900_400, 100_000, 100_000, 5):  # +0.9 J, round +0.1996 J, nothing, round again +0.900005 J
            energy.write_text(f"{value}\n")
            meter.clock.now += 1
            meter.sample()
    assert meter.joules == pytest.approx((900_000 + 199_600 + 0 + 900_005) / 1e6, rel=1e-12)
    assert meter.source == "RAPL: package-0"
    assert "no discrete GPU" in meter.scope


def test_packages_and_memory_count_once(tmp_path):
    wanted = [
        zone(tmp_path, "intel-rapl:0", "package-0", 0),
        zone(tmp_path, "intel-rapl:1", "package-1", 0),
        zone(tmp_path, "intel-rapl:1:1", "dram", 0),
    ]
    inside = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    with EnergyMeter(tmp_path, interval=None) as meter:
        for path in wanted:
            path.write_text("100")
        for path in inside:
            path.write_text("900")
    assert meter.joules == pytest.approx(300e-6)
    assert meter.source == "RAPL: package-0 + package-1 + package-1/dram"


def test_a_counter_for_root_only_is_a_reason_and_no_error(tmp_path, monkeypatch):
    from transformers_minicpm4.edge import power

    zone(tmp_path, "intel-rapl:0", "package-0", 0)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(power, "_integer", refuse)
    with EnergyMeter(tmp_path) as meter:
        pass
    assert meter.joules is None
    assert "root" in meter.reason


def test_a_missed_reading_loses_no_energy_of_a_counter(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 0, span=10**9)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 0, span=10**9)
    with EnergyMeter(tmp_path, interval=None) as meter:
        first.write_text("1000000")
        second.write_text("torn")
        meter.sample()
        first.write_text("2000000")
        second.write_text("3000000")
    assert meter.missed == 1
    assert meter.joules == pytest.approx(5.0)


def test_a_gap_is_bridged_between_its_neighbours(board):
    root, clock = board(ORIN_NANO), Clock()
    with EnergyMeter(root, interval=None, clock=clock) as meter:
        clock.now += 1
        current(root).unlink()
        meter.sample()
        current(root).write_text("2200")
        clock.now += 1
    assert meter.missed == 1
    assert meter.joules == pytest.approx(2 * 5 * (1.2 + 2.2) / 2)


def test_a_sensor_that_never_answers(board):
    root = board(ORIN_NANO)
    meter = EnergyMeter(root, interval=None)
    current(root).unlink()
    with meter:
        pass
    assert meter.joules is None
    assert meter.tokens_per_joule(10) is None
    assert "VDD_IN cannot be read" in meter.reason


def test_no_sensor(tmp_path):
    with EnergyMeter(tmp_path) as meter:
        pass
    assert (meter.joules, meter.watts, meter.seconds, meter.tokens_per_joule(5)) == (None, None, 0.0, None)
    assert "Measure at the plug" in meter.reason


def test_the_thread_samples_and_ends(board):
    before = threading.active_count()
    started = time.monotonic()
    with EnergyMeter(board(ORIN_NANO), interval=0.01) as meter:
        deadline = time.monotonic() + 20
        while meter.samples < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
    elapsed = time.monotonic() - started
    assert meter.samples >= 5
    assert threading.active_count() == before
    assert meter.joules == pytest.approx(6.0 * meter.seconds)
    assert 0 < meter.seconds <= elapsed


def test_it_ends_when_the_block_fails_and_can_be_used_again(board):
    meter = EnergyMeter(board(ORIN_NANO), interval=0.01)
    before = threading.active_count()
    with pytest.raises(KeyError), meter:
        raise KeyError
    assert threading.active_count() == before
    samples = meter.samples
    with meter:
        assert meter.samples >= 1
        with pytest.raises(RuntimeError, match="one for each block"):
            meter.__enter__()
    assert samples >= 2


def test_a_second_block_starts_from_nothing(tmp_path):
    energy = zone(tmp_path, "intel-rapl:0", "package-0", 0, span=10**9)
    meter = EnergyMeter(tmp_path, interval=None)
    with meter:
        energy.write_text("7000000")
    energy.write_text("9000000")  # between the blocks
    with meter:
        energy.write_text("10000000")
    assert meter.joules == pytest.approx(1.0)


@pytest.mark.parametrize("arguments, words", [({"interval": 0}, "above 0"), ({"rails": "VDD_IN"}, r"\['VDD_IN'\]")])
def test_bad_arguments(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        EnergyMeter(tmp_path, **arguments)
