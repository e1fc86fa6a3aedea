"""Detection on recorded trees of files: two JetPacks, a PC, containers, and machines that say little."""

import pytest

from transformers_minicpm4.edge import device_profile as module
from transformers_minicpm4.edge.device_profile import GB, PROFILES, CudaDevice, DeviceProfile, detect, device_profile


MiB = 1 << 20
RTX = CudaDevice("NVIDIA GeForce RTX 4090", (8, 9), 25_300_000_000, 24_900_000_000)
ORIN = CudaDevice("Orin", (8, 7), 8_000_000_000, 900_000_000, integrated=True)


@pytest.fixture
def tree(tmp_path):
    """Write files below a root: {"proc/meminfo": text}; returns the root."""

    def write(*parts, **files):
        for name, text in {key: value for part in parts for key, value in part.items()}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        return tmp_path

    return write


def meminfo(total, available):
    """In bytes; kB in the file."""
    return {
        "proc/meminfo": f"MemTotal:  {total // 1024} kB\nMemFree:  {available // 2048} kB\n"
        f"MemAvailable:  {available // 1024} kB\nBuffers:  10 kB\nCached:  20 kB\nSwapTotal:  0 kB\n"
    }


# As they stand on the boards, but for the amounts of memory.
JETPACK_6 = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "proc/sys/kernel/osrelease": "5.15.148-tegra\n",
    "sys/devices/system/cpu/online": "0-5\n",
}
JETPACK_7 = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n",
    "proc/sys/kernel/osrelease": "6.8.12-tegra\n",
    "sys/devices/system/cpu/online": "0-13\n",
}
PC = {
    "proc/cpuinfo": "processor : 0\nmodel name\t: AMD Ryzen 9 7950X 16-Core Processor\n",
    "proc/sys/kernel/osrelease": "6.8.0-45-generic\n",
    "sys/devices/system/cpu/online": "0-7,16-23\n",
}


def test_jetpack_6_counts_what_is_available(tree):
    found = detect(tree(JETPACK_6, meminfo(7620 * MiB, 5000 * MiB)))
    assert (found.kind, found.unified, found.release, found.threads) == ("jetson", True, "36.4.3", 6)
    assert (found.memory_total, found.memory_available) == (7620 * MiB, 5000 * MiB)
    assert (found.bandwidth, found.compute_capability) == (102e9, (8, 7))
    assert found.name == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert any("3.11" in note for note in found.notes)
    assert not any("assumption" in note for note in found.notes)  # nothing is assumed of a board that was read


def test_thor_on_jetpack_7(tree):
    found = detect(tree(JETPACK_7, meminfo(122 * GB, 110 * GB)))
    assert (found.kind, found.release, found.bandwidth, found.compute_capability) == (
        "jetson",
        "38.2.0",
        273e9,
        (11, 0),
    )
    assert not any("JetPack 5 or 6" in note for note in found.notes)


@pytest.mark.parametrize(
    "model, total, name",
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", 64, "agx-orin"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 30, "agx-orin-32gb"),
        ("NVIDIA Orin NX Developer Kit", 15.5, "orin-nx"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 7.6, "orin-nx-8gb"),
        ("NVIDIA Orin Nano Developer Kit", 7.6, "orin-nano"),
    ],
)
def test_boards_are_told_by_name_and_memory(tree, model, total, name):
    size = int(total * GB)
    found = detect(tree({**JETPACK_6, "proc/device-tree/model": f"{model}\0"}, meminfo(size, size // 2)))
    recorded = PROFILES[name]
    assert (found.bandwidth, found.compute_capability) == (recorded.bandwidth, recorded.compute_capability)
    assert recorded.name in found.source


def test_the_gpu_of_a_jetson_does_not_replace_available_memory(tree):
    # CUDA calls the system's caches used: 0.9 GB free where 5 GB are available.
    found = detect(tree(JETPACK_6, meminfo(7620 * MiB, 5000 * MiB)), cuda=[ORIN])
    assert found.memory_available == 5000 * MiB
    assert found.kind == "jetson"


def test_a_container_on_a_jetson_is_known_by_the_kernel_alone(tree):
    files = {"proc/sys/kernel/osrelease": "5.15.148-tegra\n"}
    found = detect(tree(files, meminfo(7620 * MiB, 5000 * MiB)))
    assert found.kind == "jetson"
    assert found.bandwidth is None
    assert any("no recorded bandwidth" in note for note in found.notes)


def test_an_old_jetson_gets_no_figures_of_another(tree):
    files = {**JETPACK_6, "proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0"}
    assert detect(tree(files, meminfo(4 * GB, 3 * GB))).bandwidth is None


def test_a_pc_without_gpu(tree):
    found = detect(tree(PC, meminfo(64 * GB, 48 * GB)))
    assert (found.kind, found.name, found.threads) == ("cpu", "AMD Ryzen 9 7950X 16-Core Processor", 16)
    assert found.memory_available == 48 * GB // 1024 * 1024
    assert found.bandwidth is None
    assert found.has_bfloat16


def test_a_discrete_gpu_counts_its_own_memory(tree):
    found = detect(tree(PC, meminfo(64 * GB, 48 * GB)), cuda=lambda: [RTX])
    assert (found.kind, found.unified) == ("cuda", False)
    assert (found.memory_total, found.memory_available) == (RTX.total, RTX.free)
    assert found.bandwidth == 1008e9


def test_of_two_gpus_the_one_with_more_free_memory(tree):
    busy = CudaDevice("NVIDIA GeForce RTX 3090", (8, 6), 25 * GB, 1 * GB)
    found = detect(tree(PC, meminfo(64 * GB, 48 * GB)), cuda=[busy, RTX])
    assert found.name == RTX.name
    assert any("2 GPUs" in note for note in found.notes)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4060 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L4"])
def test_a_similar_name_is_another_card(tree, name):
    found = detect(tree(PC, meminfo(64 * GB, 48 * GB)), cuda=[CudaDevice(name, (8, 9), 8 * GB, 7 * GB)])
    assert found.bandwidth is None


def test_bandwidth_that_pytorch_knows_goes_first(tree):
    card = CudaDevice("NVIDIA GeForce RTX 4090", (8, 9), 8 * GB, 7 * GB, bandwidth=5e11)
    assert detect(tree(PC, meminfo(64 * GB, 48 * GB)), cuda=[card]).bandwidth == 5e11


def test_an_integrated_gpu_shares_the_systems_memory(tree):
    spark = CudaDevice("NVIDIA GB10", (12, 1), 128 * GB, 20 * GB, integrated=True)
    found = detect(tree(PC, meminfo(120 * GB, 100 * GB)), cuda=[spark])
    assert (found.kind, found.unified) == ("cuda", True)
    assert found.memory_available == 100 * GB // 1024 * 1024


def test_a_container_limit_of_cgroup_v2(tree):
    files = {
        **PC,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{4 * GB}\n",
        "sys/fs/cgroup/memory.current": f"{3 * GB}\n",
        "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GB}\nactive_file 7\n",
        "sys/fs/cgroup/cpu.max": "250000 100000\n",
    }
    found = detect(tree(files, meminfo(64 * GB, 48 * GB)))
    # Files that nobody uses are given back: 4 - (3 - 1) GB are left.
    assert (found.memory_total, found.memory_available) == (4 * GB, 2 * GB)
    assert found.threads == 2
    assert any("4.00 GB" in note for note in found.notes)


def test_the_tightest_of_nested_groups_counts(tree):
    files = {
        "proc/self/cgroup": "0::/user.slice/app.scope\n",
        "sys/fs/cgroup/user.slice/memory.max": f"{6 * GB}\n",
        "sys/fs/cgroup/user.slice/memory.current": f"{5 * GB}\n",
        "sys/fs/cgroup/user.slice/app.scope/memory.max": "max\n",
        "sys/fs/cgroup/user.slice/app.scope/memory.high": f"{8 * GB}\n",
        "sys/fs/cgroup/user.slice/app.scope/memory.current": f"{2 * GB}\n",
    }
    found = detect(tree(files, meminfo(64 * GB, 48 * GB)))
    assert (found.memory_total, found.memory_available) == (6 * GB, 1 * GB)


def test_a_limit_of_cgroup_v1_whose_path_is_the_hosts(tree):
    files = {
        "proc/self/cgroup": "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 500000000\n",
    }
    found = detect(tree(files, meminfo(64 * GB, 48 * GB)))
    assert (found.memory_total, found.memory_available) == (2 * GB, 1_500_000_000)


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "", "none"])
def test_no_limit_is_no_limit(tree, limit):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": limit}
    found = detect(tree(files, meminfo(64 * GB, 48 * GB)))
    assert found.memory_total == 64 * GB // 1024 * 1024
    assert found.notes == ()


def test_a_limit_applies_to_a_jetson_too(tree):
    files = {**JETPACK_6, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{3 * GB}"}
    assert detect(tree(files, meminfo(7620 * MiB, 5000 * MiB))).memory_available == 3 * GB


def test_before_mem_available_free_and_caches_are_added(tree):
    found = detect(tree({"proc/meminfo": "MemTotal: 1000 kB\nMemFree: 100 kB\nBuffers: 20 kB\nCached: 3 kB\n"}))
    assert found.memory_available == 123 * 1024


def test_missing_files_are_passed_over(tree):
    found = detect(tree(meminfo(8 * GB, 4 * GB)))
    assert (found.kind, found.name, found.threads, found.release) == ("cpu", "CPU", None, None)


def test_without_any_memory_information_it_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="MemTotal.*orin-nano.*DeviceProfile"):
        detect(tmp_path)


def test_this_machine(monkeypatch):
    monkeypatch.setattr(module, "cuda_devices", list)
    found = detect()
    assert 0 < found.memory_available <= found.memory_total
    assert found.threads >= 1


def test_another_root_does_not_ask_this_machines_pytorch(tree, monkeypatch):
    monkeypatch.setattr(module, "cuda_devices", lambda: pytest.fail("asked"))
    assert detect(tree(PC, meminfo(64 * GB, 48 * GB))).kind == "cpu"


# Sections 4.4 and 7 of the project's inference spec.
@pytest.mark.parametrize(
    "name, gigabytes, bandwidth",
    [
        ("orin-nano", 8, 102), ("orin-nx", 16, 102), ("orin-nx-8gb", 8, 102), ("agx-orin", 64, 204.8),
        ("agx-orin-32gb", 32, 204.8), ("thor", 128, 273), ("rtx-4090", 24, 1008), ("h200", 141, 4800),
    ],
)  # fmt: skip
def test_recorded_figures(name, gigabytes, bandwidth):
    profile = device_profile(name)
    assert profile.memory_total == gigabytes * GB
    assert profile.bandwidth == bandwidth * GB
    assert profile.source


def test_recorded_unified_memory_leaves_something_to_the_system():
    for profile in PROFILES.values():
        assert profile.unified == (profile.memory_available < profile.memory_total)
        assert profile.unified == (profile.kind != "cuda")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'tx2'.*orin-nano.*rtx-4090"):
        device_profile("tx2")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kind": "tpu"}, "jetson, cuda, cpu, got .tpu"),
        ({"memory_available": 9 * GB}, "between 0 and memory_total"),
        ({"memory_available": -1}, "between 0"),
        ({"bandwidth": 0}, "above 0"),
    ],
)
def test_figures_that_no_machine_has(changes, words):
    good = {"name": "x", "kind": "cpu", "memory_total": 8 * GB, "memory_available": 4 * GB, "unified": True}
    DeviceProfile(**good)
    with pytest.raises(ValueError, match=words):
        DeviceProfile(**{**good, **changes})


def test_bfloat16_needs_capability_8():
    assert device_profile("orin-nano").has_bfloat16
    assert not device_profile("rtx-3060").replace(compute_capability=(7, 5)).has_bfloat16
