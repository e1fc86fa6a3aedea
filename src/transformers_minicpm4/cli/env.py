"""`minicpm4 env`: versions, devices and settings, to be pasted into a bug report."""

import argparse
import json
import os
import platform
from importlib import metadata


PACKAGES = (
    "torch",
    "transformers",
    "kernels",
    "triton",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "optimum",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
)
VARIABLES = (
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_MINICPM4_CACHE",
    "INFLLM_V2_IMPLEMENTATION",
    "INFLLM_V2_KERNEL",
    "LOCAL_KERNELS",
)

EXAMPLES = """\
examples:
  minicpm4 env           a list to paste into a bug report
  minicpm4 env --json
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "env",
        help="versions, devices and settings of this machine",
        description="Show versions, devices, settings, and which implementations of sparse attention can run here.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args) -> None:
    report = describe_environment()
    if args.json:
        print(json.dumps(report, indent=2))
        return
    width = max(len(name) for section in report.values() for name in section)
    for title, section in report.items():
        print(f"{title}:")
        for name, value in section.items():
            print(f"  {name:<{width}}  {value}")


def describe_environment() -> dict[str, dict[str, str]]:
    from transformers_minicpm4 import __version__

    packages = {name: package_version(name) or "not installed" for name in PACKAGES}
    return {
        "versions": {"python": platform.python_version(), "transformers_minicpm4": __version__, **packages},
        "devices": describe_devices(),
        "environment variables": {name: os.environ.get(name, "not set") for name in VARIABLES},
        "sparse attention": describe_implementations(),
    }


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe_devices() -> dict[str, str]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = {"cpu": f"{platform.machine()}, {usable} cores usable, PyTorch uses {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, compute capability "
            f"{properties.major}.{properties.minor}"
        )
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def describe_implementations() -> dict[str, str]:
    from transformers_minicpm4.infllm_v2 import InfLLMv2Config, kernel
    from transformers_minicpm4.infllm_v2.backend import IMPLEMENTATIONS

    attend, reason = kernel.find(InfLLMv2Config())
    state = "usable" if attend is not None else reason or "none named (INFLLM_V2_KERNEL)"
    return {**dict.fromkeys(IMPLEMENTATIONS, "usable"), "kernel": state}
