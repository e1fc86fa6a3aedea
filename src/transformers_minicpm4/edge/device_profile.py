"""
What a machine offers to decoding: memory that is free to use, memory bandwidth, and which kernels it can run.

A profile is recorded (figures of the maker, for planning on another machine) or detected. Detection reads files that
Linux and JetPack write, under a root that tests replace, and asks PyTorch for discrete GPUs. Bytes and bytes a second
throughout, decimal: 1 GB is 1e9 bytes.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


GB = 10**9
KINDS = ("jetson", "cuda", "cpu")

# Where memory is shared, a recorded profile leaves this to the operating system. An assumption, not a measurement: a
# JetPack without desktop. `detect` reads what is free instead.
SYSTEM_BYTES = 1 * GB

SPEC = "NVIDIA's published peak (collected in the project's inference spec, 4.4 and 7)"
DATASHEET = "NVIDIA's published peak (data sheet)"


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """
    One machine, as far as planning looks at it.

    Args:
        name (`str`): short name of a recorded profile, or what the machine calls itself.
        kind (`str`): `"jetson"`, `"cuda"` (a discrete GPU) or `"cpu"`.
        memory_total (`int`): bytes of the memory that weights and cache would lie in.
        memory_available (`int`): bytes of it that are free to take; never more than `memory_total`.
        unified (`bool`): whether that memory is shared with the operating system and the CPU.
        bandwidth (`float`, *optional*): peak bytes a second of that memory; `None` where nobody says.
        compute_capability (`tuple[int, int]`, *optional*): of the GPU.
        threads (`int`, *optional*): CPU threads this process may use.
        release (`str`, *optional*): Jetson Linux (L4T) version, such as "36.4.3".
        source (`str`): where the figures come from.
        notes (`tuple[str, ...]`): what a reader of a plan should know about the machine.

    Raises:
        ValueError: a figure that no machine has.
    """

    name: str
    kind: str
    memory_total: int
    memory_available: int
    unified: bool
    bandwidth: float | None = None
    compute_capability: tuple[int, int] | None = None
    threads: int | None = None
    release: str | None = None
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"DeviceProfile: kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if not 0 <= self.memory_available <= self.memory_total:
            raise ValueError(
                f"DeviceProfile: memory_available must lie between 0 and memory_total ({self.memory_total:,} bytes), "
                f"got {self.memory_available:,}."
            )
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ValueError(
                f"DeviceProfile: bandwidth must be above 0 bytes a second, or None where it is not known; got "
                f"{self.bandwidth!r}."
            )

    @property
    def has_bfloat16(self) -> bool:
        """Whether the matrix units compute in bfloat16: compute capability 8.0 and later, and CPUs through PyTorch."""
        return self.compute_capability is None or self.compute_capability >= (8, 0)

    def replace(self, **changes) -> DeviceProfile:
        """A copy with other figures, such as `memory_available` of the board at hand."""
        return dataclasses.replace(self, **changes)


def _jetson(name: str, gigabytes: int, bandwidth: float, threads: int, capability=(8, 7), notes=()) -> DeviceProfile:
    total = gigabytes * GB
    return DeviceProfile(
        name=name,
        kind="jetson",
        memory_total=total,
        memory_available=total - SYSTEM_BYTES,
        unified=True,
        bandwidth=bandwidth * GB,
        compute_capability=capability,
        threads=threads,
        source=SPEC,
        notes=("1 GB is left to the operating system: an assumption, see what is free on the board", *notes),
    )


def _gpu(name: str, gigabytes: int, bandwidth: float, capability: tuple[int, int], source=DATASHEET) -> DeviceProfile:
    total = gigabytes * GB
    return DeviceProfile(
        name=name,
        kind="cuda",
        memory_total=total,
        memory_available=total,
        unified=False,
        bandwidth=bandwidth * GB,
        compute_capability=capability,
        source=source,
    )


def _cpu(name: str, gigabytes: int, transfers: int, threads: int) -> DeviceProfile:
    """Two memory channels of 8 bytes at `transfers` million a second."""
    total = gigabytes * GB
    return DeviceProfile(
        name=name,
        kind="cpu",
        memory_total=total,
        memory_available=total - SYSTEM_BYTES,
        unified=True,
        bandwidth=2 * 8 * transfers * 10**6,
        threads=threads,
        source=f"arithmetic: 2 channels x 8 bytes x {transfers} MT/s",
        notes=("1 GB is left to the operating system: an assumption",),
    )


_SUPER = "102 GB/s is the Super mode; in the modes before JetPack 6.2 the memory runs at 68 GB/s"

PROFILES: dict[str, DeviceProfile] = {
    profile.name: profile
    for profile in (
        _jetson("orin-nano", 8, 102, 6, notes=(_SUPER, "contiguous allocations are limited further by CMA")),
        _jetson("orin-nx-8gb", 8, 102, 6),
        _jetson("orin-nx", 16, 102, 8),
        _jetson("agx-orin-32gb", 32, 204.8, 8),
        _jetson("agx-orin", 64, 204.8, 12),
        _jetson("thor", 128, 273, 14, capability=(11, 0)),
        _gpu("rtx-3060", 12, 360, (8, 6)),
        _gpu("rtx-3090", 24, 936, (8, 6)),
        _gpu("rtx-4060", 8, 272, (8, 9)),
        _gpu("rtx-4090", 24, 1008, (8, 9), SPEC),
        _gpu("rtx-5090", 32, 1792, (12, 0)),
        _gpu("h200", 141, 4800, (9, 0), SPEC),
        _cpu("cpu-ddr4", 16, 3200, 8),
        _cpu("cpu-ddr5", 32, 5600, 16),
    )
}


def device_profile(name: str) -> DeviceProfile:
    """
    The recorded profile of that name.

    Raises:
        ValueError: there is none; names those that exist.
    """
    if name not in PROFILES:
        raise ValueError(
            f"no recorded device {name!r}; recorded are {', '.join(PROFILES)}. For the machine at hand use detect()."
        )
    return PROFILES[name]


@dataclass(frozen=True)
class CudaDevice:
    """What PyTorch says of one GPU. `bandwidth` in bytes a second, `None` where it cannot be told."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    integrated: bool = False
    bandwidth: float | None = None


def cuda_devices() -> list[CudaDevice]:
    """The GPUs that PyTorch can use in this process."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        # kHz and bits, double data rate; not in every version of PyTorch, and 0 where the driver does not say.
        clock, width = (getattr(properties, name, 0) or 0 for name in ("memory_clock_rate", "memory_bus_width"))
        found.append(
            CudaDevice(
                name=properties.name,
                capability=(properties.major, properties.minor),
                total=total,
                free=free,
                integrated=bool(getattr(properties, "is_integrated", False)),
                bandwidth=2 * clock * 1000 * width / 8 or None,
            )
        )
    return found


def detect(
    root: str | os.PathLike = "/", *, cuda: Sequence[CudaDevice] | Callable[[], Sequence[CudaDevice]] | None = None
) -> DeviceProfile:
    """
    The machine at hand: a Jetson by its device tree, else the GPU with most free memory, else the CPU.

    Where memory is unified, what counts is what is *available* (`MemAvailable`, which includes caches that Linux gives
    back), and no more than what the container's memory limit leaves. A file that is missing or unreadable is passed
    over.

    Args:
        root: where `proc`, `sys` and `etc` lie; another one than "/" describes a recorded machine.
        cuda: the GPUs, or who to ask for them. By default PyTorch if `root` is "/", and none otherwise.

    Raises:
        ValueError: there is no memory information at all under `root`.
    """
    root = Path(root)
    if cuda is None:
        cuda = cuda_devices if root == Path("/") else ()
    gpus = list(cuda() if callable(cuda) else cuda)
    total, available, memory_notes = _memory(root)
    threads = _threads(root)
    jetson = _detect_jetson(root, total, available, gpus)
    if jetson is not None:
        return jetson.replace(threads=threads or jetson.threads, notes=(*jetson.notes, *memory_notes))
    if gpus:
        gpu = max(gpus, key=lambda device: device.free)
        notes = () if len(gpus) == 1 else (f"{len(gpus)} GPUs; the plan is for the one with most free memory",)
        bandwidth, source = gpu.bandwidth, "PyTorch: memory clock and bus width"
        if bandwidth is None:
            bandwidth, source = _recorded_bandwidth(gpu.name)
        if gpu.integrated:  # shares the system's memory, of which the driver calls caches used
            return DeviceProfile(
                name=gpu.name,
                kind="cuda",
                memory_total=total,
                memory_available=available,
                unified=True,
                bandwidth=bandwidth,
                compute_capability=gpu.capability,
                threads=threads,
                source=source,
                notes=(*notes, *memory_notes),
            )
        return DeviceProfile(
            name=gpu.name,
            kind="cuda",
            memory_total=gpu.total,
            memory_available=min(gpu.free, gpu.total),
            unified=False,
            bandwidth=bandwidth,
            compute_capability=gpu.capability,
            threads=threads,
            source=source,
            notes=notes,
        )
    return DeviceProfile(
        name=_cpu_name(root),
        kind="cpu",
        memory_total=total,
        memory_available=available,
        unified=True,
        threads=threads,
        source="detected; the memory's bandwidth cannot be read from files",
        notes=memory_notes,
    )


def _read(path: Path) -> str | None:
    """The file's text, without the NUL that ends strings of a device tree; `None` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n\r\t ")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.isdigit() else None


def _detect_jetson(root: Path, total: int, available: int, gpus: list[CudaDevice]) -> DeviceProfile | None:
    model = _read(root / "proc/device-tree/model") or ""
    release = _l4t_release(_read(root / "etc/nv_tegra_release") or "")
    kernel = _read(root / "proc/sys/kernel/osrelease") or ""
    if not kernel and root == Path("/"):
        kernel = os.uname().release
    # In a container the files in /etc are the container's own; the device tree and the kernel are the board's.
    is_tegra = release is not None or "-tegra" in kernel
    if not is_tegra and not re.search(r"jetson|\borin\b|\bthor\b", model, re.IGNORECASE):
        return None
    recorded = _recorded_jetson(model, total)
    capability = gpus[0].capability if gpus else (recorded.compute_capability if recorded else None)
    notes = [] if recorded is None else [note for note in recorded.notes if "assumption" not in note]
    if not gpus and root == Path("/"):
        notes.append("PyTorch sees no GPU here: this build would run on the CPU; install the wheel made for Jetson")
    if release is not None and release.split(".")[0] in ("35", "36"):
        notes.append(
            "JetPack 5 or 6: its own Python is 3.8 or 3.10 and Transformers 5 needs 3.11, so use a container or "
            "JetPack 7.2"
        )
    if recorded is None:
        notes.append(f"the board {model or 'without a model name'!r} has no recorded bandwidth: no estimate of speed")
    return DeviceProfile(
        name=model or "NVIDIA Jetson",
        kind="jetson",
        memory_total=total,
        memory_available=available,
        unified=True,
        bandwidth=recorded.bandwidth if recorded else None,
        compute_capability=capability,
        threads=recorded.threads if recorded else None,
        release=release,
        source=f"detected; bandwidth of {recorded.name}: {recorded.source}" if recorded else "detected",
        notes=tuple(notes),
    )


def _recorded_jetson(model: str, total: int) -> DeviceProfile | None:
    """The recorded board by the words of its name and, where it comes in two sizes, its memory."""
    # Firmware and kernel keep some of the memory, so what Linux counts is a little less than what is soldered.
    large = total > 20 * GB
    for words, name in (
        (("thor",), "thor"),
        (("agx", "orin"), "agx-orin" if total > 40 * GB else "agx-orin-32gb"),
        (("orin", "nx"), "orin-nx" if total > 10 * GB else "orin-nx-8gb"),
        (("orin", "nano"), "orin-nano"),
        (("orin",), ("agx-orin" if total > 40 * GB else "agx-orin-32gb") if large else None),
    ):
        if name is not None and all(word in model.lower() for word in words):
            return PROFILES[name]
    return None


def _l4t_release(text: str) -> str | None:
    """Version in the first line of /etc/nv_tegra_release: `# R36 (release), REVISION: 4.3, ...` is 36.4.3."""
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return None if found is None else f"{found[1]}.{found[2]}"


def _recorded_bandwidth(name: str) -> tuple[float | None, str]:
    # "NVIDIA GeForce RTX 4090" is rtx-4090, and "... RTX 4060 Ti" or "... Laptop GPU" is another card.
    words = name.lower().removeprefix("nvidia ").removeprefix("geforce ").replace(" ", "-")
    profile = PROFILES.get(words)
    if profile is None:
        return None, "detected; no bandwidth is recorded for this card"
    return profile.bandwidth, f"detected; bandwidth: {profile.source}"


def _memory(root: Path) -> tuple[int, int, tuple[str, ...]]:
    """Bytes in all and available, the limits of the process's control groups applied."""
    text = _read(root / "proc/meminfo")
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", text or "", re.M))
    if "MemTotal" not in fields:
        raise ValueError(
            f"{root / 'proc/meminfo'} says no MemTotal: memory can be detected on Linux only. Name a recorded device "
            f"({', '.join(PROFILES)}), or build a DeviceProfile."
        )
    total = int(fields["MemTotal"]) * 1024
    if "MemAvailable" in fields:
        available = int(fields["MemAvailable"]) * 1024
    else:  # kernels before 3.14
        available = sum(int(fields.get(name, 0)) for name in ("MemFree", "Buffers", "Cached")) * 1024
    available = min(available, total)
    notes = []
    limit = None
    for own_limit, left in _cgroup_limits(root):
        if own_limit >= total:  # no limit, or one above what there is
            continue
        limit = min(own_limit, limit or own_limit)
        available = min(available, left)
    if limit is not None:
        notes.append(f"a memory limit of {limit / GB:.2f} GB applies (container or control group)")
        total = limit
    return total, max(min(available, total), 0), tuple(notes)


def _cgroup_limits(root: Path):
    """(limit, bytes left under it) of each control group this process is in, version 1 or 2, up to the topmost."""
    membership = _read(root / "proc/self/cgroup") or ""
    mount = root / "sys/fs/cgroup"
    for line in membership.splitlines() or ["0::/"]:
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0" and not controllers:
            base, limits = mount, ("memory.max", "memory.high")
            usage, reclaimable = "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limits = mount / "memory", ("memory.limit_in_bytes",)
            usage, reclaimable = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # Inside a container the path is often the host's and not there; then the top of the mount is the container's.
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            group = base.joinpath(*parts[:depth])
            known = [limit for limit in (_number(group / name) for name in limits) if limit]
            if not known:  # "max", or no such file
                continue
            limit = min(known)
            used = _number(group / usage) or 0
            statistics = dict(re.findall(r"^(\w+) (\d+)$", _read(group / "memory.stat") or "", re.M))
            used = max(used - int(statistics.get(reclaimable, 0)), 0)
            yield limit, max(limit - used, 0)


def _threads(root: Path) -> int | None:
    """CPU threads this process may use: those online, its affinity, and the share a container is given."""
    counts = []
    online = _read(root / "sys/devices/system/cpu/online")
    if online:
        counts.append(sum(_span(part) for part in online.split(",") if re.fullmatch(r"\d+(-\d+)?", part)))
    if root == Path("/") and hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    quota = (_read(root / "sys/fs/cgroup/cpu.max") or "").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
        counts.append(max(int(quota[0]) // int(quota[1]), 1))
    return min((count for count in counts if count), default=None)


def _span(text: str) -> int:
    first, _, last = text.partition("-")
    return int(last or first) - int(first) + 1


def _cpu_name(root: Path) -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", _read(root / "proc/cpuinfo") or "", re.M)
    return named[1].strip() if named else (_read(root / "proc/device-tree/model") or "CPU")


__all__ = ["PROFILES", "CudaDevice", "DeviceProfile", "cuda_devices", "detect", "device_profile"]
