"""From a checkpoint's name to a model in the memory that was planned for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from ..generation.draft_tree import MAX_NODES
from ..generation.drafts import Draft
from ..infllm_v2 import ATTN_IMPLEMENTATION
from ..model.prefix_cache import FILE_NAME, PrefixCache
from ..quantization.export.checkpoint_files import quantized_by
from .device_profile import DeviceProfile, detect
from .memory_plan import MIN_CONTEXT, DoesNotFit, DraftSpec, MemoryPlan, PlanError, plan_memory


logger = logging.get_logger(__name__)

# Where a checkpoint is found, for all of its files.
HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_planned(
    name_or_path: str,
    profile: DeviceProfile | None = None,
    *,
    context: int | None = None,
    batch: int = 1,
    precision: str | None = None,
    draft: Draft | Callable[[PreTrainedModel], Draft] | None = None,
    tree_size: int | None = None,
    chunk: int | None = None,
    **kwargs,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PrefixCache | None, MemoryPlan]:
    """
    Plan for a machine and load as planned; arguments as for `EdgeEngine.from_pretrained`.

    Raises:
        DoesNotFit, PlanError: from the planner.
    """
    for name in ("dtype", "torch_dtype", "device_map", "config"):
        if name in kwargs:
            raise PlanError(f"{name} was given, which the plan decides; give precision or profile.")
    hub = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
    profile = detect() if profile is None else profile
    if precision is not None and precision not in DTYPES:
        raise PlanError(
            f"precision is one of {', '.join(DTYPES)}, or None for what the checkpoint is; got {precision!r}. To "
            "shrink a checkpoint, quantize it first (optimum-cli minicpm4 quantize, or ternarize)."
        )
    config = AutoConfig.from_pretrained(name_or_path, **hub)
    unpacked = gptq_is_unpacked(config)
    planned = copy.deepcopy(config) if unpacked else config
    if unpacked:
        del planned.quantization_config
    sparse = getattr(config, "sparse_config", None) is not None
    if "attn_implementation" in kwargs:
        sparse = kwargs["attn_implementation"] == ATTN_IMPLEMENTATION
    plan = _first_that_fits(
        planned,
        profile,
        _precisions(planned, profile, precision),
        context=context,
        batch=batch,
        chunk=chunk,
        sparse=sparse,
        cache="static",
        draft=_draft_spec(draft, tree_size),
    )
    device = _device(profile)
    dtype = DTYPES[plan.dtype]
    if unpacked:
        from ..quantization.export.gptq import load_gptq

        logger.warning_once("gptqmodel is not installed: the INT4 weights are unpacked into dense ones.")
        if "attn_implementation" in kwargs:
            config._attn_implementation = kwargs["attn_implementation"]
        model = load_gptq(_folder(name_or_path, hub, whole=True), dtype, config).to(device)
    else:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, device_map=device, **kwargs)
    folder = _folder(name_or_path, hub)
    prefix = None if folder is None else PrefixCache.load(folder)
    return model, AutoTokenizer.from_pretrained(name_or_path, **hub), prefix, plan


def _device(profile: DeviceProfile) -> str:
    """Of several GPUs the one that `detect` plans for: with most free memory."""
    if profile.kind == "cpu":
        return "cpu"
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    return f"cuda:{free.index(max(free))}" if len(free) > 1 else "cuda"


def _draft_spec(draft, tree_size: int | None) -> DraftSpec | None:
    """A draft that is there already has its memory; one that will be made of the model is planned as a head."""
    if draft is None:
        return None
    if isinstance(draft, Draft):
        return DraftSpec(kind="lookup", tree_size=max(tree_size or draft.size, 2))
    return DraftSpec(kind="eagle", vocabulary=None, tree_size=max(tree_size or MAX_NODES, 2))


def gptq_is_unpacked(config) -> bool:
    """Whether there is nothing here that multiplies by INT4 weights."""
    import importlib.util

    return quantized_by(config) == "gptq" and importlib.util.find_spec("gptqmodel") is None


def _precisions(config, profile: DeviceProfile, precision: str | None) -> list[str | None]:
    """What the checkpoint can be loaded in, the best first; `None` is what it is quantized to."""
    if getattr(config, "quantization_config", None) is not None:
        if precision is not None:
            raise PlanError(
                f"precision={precision!r} was given for a quantized checkpoint, which is what it is; leave it out."
            )
        return [None]
    if precision is not None:
        return [precision]
    half = "bf16" if profile.has_bfloat16 else "fp16"
    # Few processors multiply 16-bit numbers as fast as they read 32-bit ones.
    return ["fp32", half] if profile.kind == "cpu" else [half]


def _first_that_fits(config, profile, precisions, **options) -> MemoryPlan:
    """The first with room for a useful context; where none has, the one with most."""
    error, plans = None, []
    for precision in precisions:
        try:
            plans.append(plan_memory(config, profile, precision=precision, **options))
        except DoesNotFit as found:
            error = found
            continue
        if options["context"] is not None or plans[-1].context >= min(MIN_CONTEXT, plans[-1].context_limit):
            return plans[-1]
    if not plans:
        raise error
    return max(plans, key=lambda plan: plan.context)


def _folder(name_or_path: str, hub: dict, whole: bool = False) -> Path | None:
    """Where a checkpoint lies: one of the Hub only if it has a prefix, or with `whole` after fetching all of it."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path, hub.get("subfolder", ""))
    if whole:
        from huggingface_hub import snapshot_download

        places = {name: value for name, value in hub.items() if name not in ("subfolder", "trust_remote_code")}
        return Path(snapshot_download(name_or_path, **places), hub.get("subfolder", ""))
    missing = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    file = cached_file(name_or_path, FILE_NAME, **hub, **dict.fromkeys(missing, False))
    return None if file is None else Path(file).parents[1]
