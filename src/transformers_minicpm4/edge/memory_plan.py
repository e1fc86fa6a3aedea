"""
What a model needs on a device, byte by byte, before any weight is there: which precision and context fit, and the most
tokens a second that the memory's bandwidth allows.

Sizes of weights come from the model itself, built without storage (PyTorch's meta device), those of packed weights and
of the cache from the layouts of this package; tests compare all of them with real tensors. What a prefill chunk needs
beside them is a formula fitted to what this package's attention allocates. 1 GB is 1e9 bytes.

Letters: `O` outputs and `I` inputs of a linear layer, `B` rows of the batch, `C` tokens of a chunk, `N` cached tokens,
`H` query heads, `G` key/value heads, `D` head size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..infllm_v2 import InfLLMv2Config
from ..infllm_v2.blockwise import CHUNK, DENSE_CHUNK, GATHER_BLOCKS, SCORE_CHUNK
from ..infllm_v2.slots import slot_multiple, spare_windows
from ..quantization.bitcpm4.configuration import QUANT_METHOD as BITCPM4
from ..quantization.bitcpm4.ternary_packing import packed_bytes
from ..quantization.packing import pack_unit
from .device_profile import GB, DeviceProfile


DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PRECISIONS = (*DTYPE_BYTES, "int4", "ternary")
# Inputs that share a scale: the released INT4 checkpoints, and BitCPM4's default.
GROUP_SIZES = {"int4": 128, "ternary": 64}

# Share of the available memory that a plan may fill; the rest is for fragmentation and whatever else runs.
MEMORY_SHARE = 0.9
# Libraries, kernels and the driver's context: the figure of the project's inference spec, 7; not measured on a board.
RUNTIME_BYTES = 400_000_000
# Tokens of a prefill chunk: CPM.cu's default.
CHUNK_TOKENS = 2048
# A precision is chosen by itself only if it leaves room for this many tokens.
MIN_CONTEXT = 8192

DRAFTS = ("eagle", "eagle3", "lookup")
# Nodes of a draft tree are bits of one 64-bit word.
LARGEST_TREE = 64


class PlanError(ValueError):
    """A plan that cannot be made; the message says what was given, what is allowed and what to do."""


class DoesNotFit(PlanError):
    """
    The model does not fit. Attributes: `needed_bytes`, `budget_bytes`, `missing_bytes`, and `fits`, the precisions
    that would do and the most tokens that fit with each.
    """

    def __init__(self, message: str, needed_bytes: int, budget_bytes: int, fits: Mapping[str, int]):
        super().__init__(message)
        self.needed_bytes, self.budget_bytes, self.fits = needed_bytes, budget_bytes, dict(fits)

    @property
    def missing_bytes(self) -> int:
        return self.needed_bytes - self.budget_bytes


# ------------------------------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Linear:
    """A linear layer inside the decoder: what quantizers shrink. `bias` in elements."""

    name: str
    part: str
    outputs: int
    inputs: int
    bias: int = 0


@dataclass(frozen=True)
class ModelShape:
    """Linear layers, and the elements of everything else by part; tied weights are counted once."""

    linears: tuple[Linear, ...]
    rest: Mapping[str, int]
    buffer_bytes: int = 0

    @property
    def parameters(self) -> int:
        return sum(self.rest.values()) + sum(layer.outputs * layer.inputs + layer.bias for layer in self.linears)


def model_shape(config) -> ModelShape:
    """
    The sizes of a causal language model's parameters, from its configuration alone.

    Raises:
        PlanError: the configuration describes no decoder-only language model, or a mixture of experts.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config.get_text_config())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _refuse_other_decoders(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, AttributeError, TypeError) as error:
        raise PlanError(
            f"a configuration of type {config.model_type!r} describes no causal language model that can be built "
            f"({_one_line(error)}); give that of a MiniCPM4, Llama or Qwen checkpoint."
        ) from error
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = {embeddings: "embeddings", head: "head"}
    seen, linears, rest = set(), [], dict.fromkeys(("embeddings", "head", "attention", "mlp", "norms", "other"), 0)
    for name, module in model.named_modules():
        part = parts.get(module) or _part_of(name)
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
        seen.update(map(id, own))
        if isinstance(module, nn.Linear) and module is not head and own:
            outputs, inputs = module.weight.shape
            linears.append(Linear(name, part, outputs, inputs, 0 if module.bias is None else module.bias.numel()))
        else:
            rest[part] += sum(parameter.numel() for parameter in own)
    keys = [layer for layer in linears if layer.name.endswith(".k_proj")]
    _, groups, size = _heads(config)
    if any(layer.outputs != groups * size for layer in keys):
        raise PlanError(
            f"the keys of this {config.model_type!r} model have {keys[0].outputs} features where {groups} heads of "
            f"{size} were expected; layers of different shape are not planned."
        )
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return ModelShape(tuple(linears), rest, buffers)


def _refuse_other_decoders(config) -> None:
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if (getattr(config, name, None) or 0) > 1:
            raise PlanError(
                f"this {config.model_type!r} model is a mixture of {getattr(config, name)} experts, of which a token "
                "reads a few: neither its packed sizes nor its speed are planned here. Give a dense model."
            )
    if getattr(config, "kv_lora_rank", None):
        raise PlanError(
            f"this {config.model_type!r} model caches latent vectors (kv_lora_rank={config.kv_lora_rank}), which are "
            "not planned here. Give a model with grouped-query attention."
        )
    try:
        _heads(config)
        for name in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "max_position_embeddings"):
            getattr(config, name)
    except AttributeError as error:
        raise PlanError(
            f"a configuration of type {config.model_type!r} lacks what planning reads ({_one_line(error)}); give that "
            "of a MiniCPM4, Llama or Qwen checkpoint."
        ) from error


def _part_of(name: str) -> str:
    """The part of the table that a module belongs to, by its name."""
    if "norm" in name.rsplit(".", 1)[-1]:  # q_norm and k_norm lie inside self_attn and are norms still
        return "norms"
    if re.search(r"attn|attention", name):
        return "attention"
    return "mlp" if re.search(r"mlp|feed_forward|ffn", name) else "other"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclass(frozen=True)
class Packing:
    """How linear layers are stored. `keeps` says by name which of them stay as they are."""

    precision: str
    dtype: str = "bf16"
    group_size: int | None = None
    scale_bytes: int = 2
    keeps: Callable[[str], bool] = field(default=lambda name: False, compare=False)

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise PlanError(f"precision is one of {', '.join(PRECISIONS)}, or None to choose; got {self.precision!r}.")
        if self.precision in GROUP_SIZES and self.group_size is None:
            object.__setattr__(self, "group_size", GROUP_SIZES[self.precision])
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1)):
            raise PlanError(f"group_size is 1 or more inputs, or -1 for one scale an output row; got {size!r}.")

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.precision if self.precision in DTYPE_BYTES else self.dtype]

    def is_packed(self, layer: Linear) -> bool:
        if self.precision in DTYPE_BYTES or self.keeps(layer.name):
            return False
        # GPTQ words hold 8 codes along the inputs and 8 zero points along the outputs.
        return self.precision != "int4" or not (layer.inputs % pack_unit(4) or layer.outputs % pack_unit(4))

    def _groups(self, layer: Linear) -> int:
        if self.group_size == -1:
            return 1
        if self.precision == "ternary" and layer.inputs % self.group_size:
            raise PlanError(
                f"ternary weights need whole groups: {layer.name} has {layer.inputs} inputs, which group_size="
                f"{self.group_size} does not divide. Choose a divisor, or -1."
            )
        return -(-layer.inputs // self.group_size)

    def stored_bytes(self, layer: Linear) -> int:
        """Bytes of the layer's tensors as this package writes them: GPTQ's four, or codes and scales; and the bias."""
        bias = layer.bias * self.dtype_bytes
        if not self.is_packed(layer):
            return layer.outputs * layer.inputs * self.dtype_bytes + bias
        groups = self._groups(layer)
        scales = groups * layer.outputs * self.scale_bytes
        if self.precision == "ternary":
            return layer.outputs * packed_bytes(layer.inputs) + scales + bias
        codes, zeros, group_index = layer.inputs * layer.outputs // 2, groups * layer.outputs // 2, 4 * layer.inputs
        return codes + zeros + scales + group_index + bias

    def read_bytes(self, layer: Linear) -> int:
        """Bytes that a decode step must read: symmetric INT4 needs neither zero points nor the group index."""
        if not self.is_packed(layer):
            return self.stored_bytes(layer)
        unread = self._groups(layer) * layer.outputs // 2 + 4 * layer.inputs
        return self.stored_bytes(layer) - (unread if self.precision == "int4" else 0)


def weight_bytes(shape: ModelShape, packing: Packing) -> dict[str, int]:
    """Bytes of all parameters by part: embeddings, head (0 if tied), attention, mlp, norms, other."""
    table = {part: count * packing.dtype_bytes for part, count in shape.rest.items()}
    for layer in shape.linears:
        table[layer.part] += packing.stored_bytes(layer)
    return table


# -------------------------------------------------------------------------------------------------------------- cache


def _heads(config) -> tuple[int, int, int]:
    heads = config.num_attention_heads
    return (
        heads,
        config.num_key_value_heads or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _with_headroom(length: int) -> int:
    """Slots of a buffer of the InfLLM v2 cache that has just grown to hold `length` (`cache._Growing.reserve`)."""
    return length + length // 8 + 64


def _windows(settings: InfLLMv2Config, length: int) -> tuple[int, int]:
    """Fine and coarse compressed keys of `length` tokens: windows that are complete."""
    return tuple(
        max((length - size) // stride + 1, 0) for size, stride in (settings.windows(), settings.windows(coarse=True))
    )


def cache_bytes(
    config,
    tokens: int,
    *,
    batch: int = 1,
    dtype_bytes: int = 2,
    sparse: bool | None = None,
    cache="dynamic",
    chunk=None,
) -> dict[str, int]:
    """
    Bytes of the cache after `tokens` tokens a row.

    Args:
        tokens: of each row, padding included.
        dtype_bytes: of one number.
        sparse: whether attention is InfLLM v2; by default where the configuration has a `sparse_config`.
        cache: `"dynamic"`: the most that today's caches hold then. That of InfLLM v2 grows with room to spare: this is
            its size if the last growth came at the last token. `"static"`: slots for `tokens`, in whole blocks, as
            an engine takes them (`infllm_v2.slots`).
        chunk: tokens of a call, for layers with a sliding window, which hold the last call beside the window.

    Returns:
        `keys_and_values`, `compressed_keys` and `unrotated_keys`, all layers together.
    """
    from transformers import DynamicCache

    config = config.get_text_config()
    settings = sparse_settings(config, sparse)
    _, groups, size = _heads(config)
    row = batch * groups * size * dtype_bytes  # one layer's keys of one token
    if cache == "static":
        multiple = slot_multiple(settings)
        tokens = -(-tokens // multiple) * multiple
    if settings is None:
        slots = 0
        for layer in DynamicCache(config=config).layers:
            window = getattr(layer, "sliding_window", None)
            if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
                raise PlanError(
                    f"this {config.model_type!r} model has layers whose cache is a {type(layer).__name__}; planned "
                    "are layers with keys and values of every token, or of a sliding window."
                )
            slots += tokens if window is None else min(tokens, window - 1 + (chunk or tokens))
        return {"keys_and_values": 2 * slots * row, "compressed_keys": 0, "unrotated_keys": 0}
    hold = _with_headroom if cache == "dynamic" else int
    if cache == "static":
        compressed = sum(tokens // settings.windows(c)[1] + spare_windows(settings, c) for c in (False, True))
    else:
        compressed = sum(map(hold, _windows(settings, tokens)))
    layers = config.num_hidden_layers
    return {
        "keys_and_values": 2 * layers * hold(tokens) * row,
        "compressed_keys": layers * compressed * row,
        "unrotated_keys": layers * hold(tokens) * row if settings.use_nope else 0,
    }


def sparse_settings(config, sparse: bool | None = None) -> InfLLMv2Config | None:
    """
    The InfLLM v2 attention to plan for; `None` for dense.

    Raises:
        PlanError: sparse was asked of a model that cannot.
    """
    given = getattr(config, "sparse_config", None)
    if sparse is None:
        sparse = given is not None
    if not sparse:
        return None
    if not hasattr(config, "infllm_v2"):
        raise PlanError(
            f"sparse=True was given, and the cache of a {config.model_type!r} model keeps no compressed keys: only "
            "MiniCPM4 does. Leave it out, or convert the model (llama_to_minicpm4)."
        )
    return config.infllm_v2


# -------------------------------------------------------------------------------------------------------- activations


def activation_bytes(
    config,
    chunk: int,
    tokens: int,
    *,
    batch: int = 1,
    dtype_bytes: int = 2,
    sparse: bool | None = None,
    cache: str = "dynamic",
    logit_rows: int = 1,
) -> dict[str, int]:
    """
    Bytes that a forward pass of `chunk` tokens a row needs beside weights and cache, when `tokens` are cached with it:
    `prefill_chunk`, the larger of what is alive in an MLP and in an attention layer; `logits` of `logit_rows`
    positions a row, with the float32 copies that sampling makes.

    A formula: it follows the forward pass of Llama-like models in Transformers and this package's blocked attention
    (dense models: Transformers' `sdpa`), and tests hold it to what they allocate on a CPU.
    """
    config = config.get_text_config()
    settings = sparse_settings(config, sparse)
    heads, groups, size = _heads(config)
    s, new = dtype_bytes, batch * chunk
    hidden = new * config.hidden_size * s
    tables = 2 * chunk * size * 4
    mlp = 5 * hidden + 3 * new * config.intermediate_size * s
    projected = new * size * s * (heads + 2 * groups)
    # Float32 copies while rotating; then rotated queries and keys, the output twice, and the attention itself.
    rotating = 3 * new * heads * size * 4
    attending = new * size * s * (3 * heads + groups)
    if settings is None:
        workspace = _sdpa_workspace(batch, chunk, tokens, heads, groups, size, s, cache)
    else:
        workspace = _sparse_workspace(settings, batch, chunk, tokens, heads, groups, size, s, cache)
    attention = 3 * hidden + projected + max(rotating, attending + workspace)
    return {
        "prefill_chunk": tables + max(mlp, attention),
        "logits": batch * logit_rows * config.vocab_size * (s + 3 * 4),
    }


def _growth(batch: int, tokens: int, groups: int, size: int, s: int, cache: str) -> int:
    """The old copy of one layer's keys, alive while the larger one is filled."""
    return batch * groups * tokens * size * s if cache == "dynamic" else 0


def _sdpa_workspace(batch, chunk, tokens, heads, groups, size, s, cache) -> int:
    """A mask, as booleans and as numbers, and keys and values once for each query head; neither in a first call."""
    if tokens <= chunk:
        return 0
    mask = batch * chunk * tokens * (1 + s)
    repeated = 2 * batch * heads * tokens * size * s if heads != groups else 0
    return mask + repeated + _growth(batch, tokens, groups, size, s, cache)


def _sparse_workspace(settings, batch, chunk, tokens, heads, groups, size, s, cache) -> int:
    """What `infllm_v2.blockwise` holds at once, by its own chunk sizes; the largest of its ways to attend."""
    together, block, ratio = min(chunk, CHUNK), settings.block_size, heads // groups
    covered = settings.selected_blocks * block
    sparse_from, picked_from = settings.first_sparse_position(tokens), 3 * covered // 2
    widened = 4 if s < 4 else 0  # float32 copies of what is narrower
    phases = [0]
    # Dense positions after an earlier call: a mask for some queries, as booleans and as numbers.
    if tokens > chunk:
        phases.append(min(chunk, DENSE_CHUNK) * min(tokens, max(sparse_from, 1)) * (1 + s))
    if tokens > sparse_from:
        fine, coarse = _windows(settings, tokens)
        scored = min(chunk, SCORE_CHUNK)
        phases.append(  # selection: queries and compressed keys in float32, logits, weights summed over heads, pooled
            2 * batch * heads * together * size * 4
            + batch * groups * (fine + coarse) * size * widened
            + scored * (ratio * (fine + coarse) + 4 * fine) * 4
        )
        phases.append(batch * groups * min(chunk, DENSE_CHUNK) * min(tokens, picked_from) * (1 + s))
        phases.append(batch * groups * GATHER_BLOCKS * block * size * s)
    if tokens > max(sparse_from, picked_from):  # queries grouped by block, one key/value head at a time, in float32
        row = together * ratio * size * 4
        span = (settings.init_blocks + settings.window_blocks + 1) * block
        tile = min(block, together) * ratio * span * 4 + 2 * span * size * 4
        phases.append(
            (5 if widened else 3) * row
            + max(tile, 2 * row + together * ratio * block * 4)
            + 2 * tokens * size * widened
            + 2 * together * settings.topk * 16  # pairs of query and block
        )
    chosen = 2 * batch * groups * together * -(-tokens // block) if tokens > sparse_from else 0
    return chosen + max(phases) + _growth(batch, tokens, groups, size, s, cache)


# -------------------------------------------------------------------------------------------------------------- draft


@dataclass(frozen=True, kw_only=True)
class DraftSpec:
    """
    What proposes tokens for the model to verify.

    Args:
        kind (`str`): `"eagle"` (EAGLE-2 head of MiniCPM4), `"eagle3"` (of MiniCPM4.1), or `"lookup"` (prompt lookup,
            which needs no weights).
        window (`int`): tokens that the head's own cache holds.
        vocabulary (`int`, *optional*): rows of the head's output: the ids of FR-Spec, copied out of the model's head.
            `None`: the model's own head, shared ("eagle3" then has one of its own, of full size).
        tree_size (`int`): nodes verified in one pass, 2 to 64.
        steps (`int`): forward passes of the head for one verification.
        precision (`str`, *optional*): of its linear layers; by default `"int4"` where the model is quantized. The
            output rows keep the model's 16 bits, as in CPM.cu, unless `quantize_head`.
        quantize_head (`bool`): whether the output rows are quantized too.
    """

    kind: str = "eagle"
    window: int = 1024
    vocabulary: int | None = 32768
    tree_size: int = 12
    steps: int = 2
    precision: str | None = None
    quantize_head: bool = False

    def __post_init__(self):
        if self.kind not in DRAFTS:
            raise PlanError(f"draft is one of {', '.join(DRAFTS)}, or None for no draft; got {self.kind!r}.")
        if not 2 <= self.tree_size <= LARGEST_TREE:
            raise PlanError(f"tree_size is 2 to {LARGEST_TREE} nodes (one bit each of a word); got {self.tree_size}.")
        for name in ("window", "steps"):
            if getattr(self, name) < 1:
                raise PlanError(f"draft: {name} must be 1 or more, got {getattr(self, name)}.")
        if self.vocabulary is not None and self.vocabulary < 1:
            raise PlanError(f"draft: vocabulary must be 1 or more ids, or None for all; got {self.vocabulary}.")


@dataclass(frozen=True)
class DraftBytes:
    """Bytes of a draft head: `weights` and `cache` in memory, `per_step` read by each of its forward passes."""

    weights: int = 0
    cache: int = 0
    per_step: int = 0


def draft_bytes(config, draft: DraftSpec, packing: Packing, batch: int = 1) -> DraftBytes:
    """A draft head's bytes beside a model of `config`, after the tensors that CPM.cu loads (EAGLE-2: MiniCPM4;
    EAGLE-3: MiniCPM4.1)."""
    if draft.kind == "lookup":
        return DraftBytes()
    config = config.get_text_config()
    heads, groups, size = _heads(config)
    hidden, inner, s = config.hidden_size, config.intermediate_size, packing.dtype_bytes
    is_third = draft.kind == "eagle3"
    read = 2 * hidden if is_third else hidden  # the third kind's attention reads embedding and hidden state together
    linears = [
        Linear(name, "draft", outputs, inputs)
        for name, outputs, inputs in (
            ("fc", hidden, 3 * hidden if is_third else 2 * hidden),
            ("q_proj", heads * size, read),
            ("k_proj", groups * size, read),
            ("v_proj", groups * size, read),
            ("o_proj", hidden, heads * size),
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        )
    ]
    precision = draft.precision or ("int4" if packing.precision in GROUP_SIZES else packing.precision)
    own = Packing(precision, packing.dtype if packing.precision in GROUP_SIZES else packing.precision)
    norms = 4 * hidden * s
    is_short = draft.vocabulary is not None and draft.vocabulary < config.vocab_size
    rows = draft.vocabulary if is_short else config.vocab_size
    head = Linear("head", "draft", rows, hidden)
    head_packing = own if draft.quantize_head and (is_short or is_third) else Packing("fp32" if s == 4 else "bf16")
    owned = head_packing.stored_bytes(head) + rows * 8 if is_short or is_third else 0  # and the ids, int64
    kv = 2 * groups * size * s * batch * (draft.window + draft.tree_size)
    return DraftBytes(
        weights=sum(map(own.stored_bytes, linears)) + norms + owned,
        cache=kv,
        per_step=sum(map(own.read_bytes, linears)) + norms + head_packing.read_bytes(head),
    )


# ----------------------------------------------------------------------------------------------------------- roofline


def step_bytes(shape: ModelShape, config, packing: Packing, tokens: int, *, batch=1, sparse=None) -> dict[str, int]:
    """
    Bytes that one decode step reads at `tokens` cached tokens: `weights` (everything but the embedding table, of which
    one row is read, unless the head is tied to it) and `cache` (all keys and values; under InfLLM v2 those of the
    blocks a query reads, and the compressed keys).
    """
    config = config.get_text_config()
    settings = sparse_settings(config, sparse)
    _, groups, size = _heads(config)
    row = batch * config.num_hidden_layers * groups * size * packing.dtype_bytes
    head = shape.rest["head"] or shape.rest["embeddings"]
    rest = head + sum(count for part, count in shape.rest.items() if part not in ("head", "embeddings"))
    weights = rest * packing.dtype_bytes + sum(map(packing.read_bytes, shape.linears))
    if settings is None:
        cache = cache_bytes(config, tokens, batch=batch, dtype_bytes=packing.dtype_bytes, sparse=False, chunk=1)
        return {"weights": weights, "cache": cache["keys_and_values"]}
    if tokens - 1 < settings.first_sparse_position(tokens):
        return {"weights": weights, "cache": 2 * tokens * row}
    chosen = min(settings.selected_blocks * settings.block_size, tokens)
    return {"weights": weights, "cache": (2 * chosen + sum(_windows(settings, tokens))) * row}


def tokens_per_second(read: Mapping[str, int], bandwidth: float, *, batch: int = 1) -> float:
    """The most that a memory of `bandwidth` bytes a second allows: an upper bound, which counts reading alone."""
    return batch * bandwidth / sum(read.values())


def break_even(read: Mapping[str, int], draft: DraftBytes, steps: int) -> float:
    """
    What one verification with `steps` passes of the draft head reads, as a multiple of a plain step: as many tokens
    must come of it before anything is gained. `a` tokens make decoding `a / break_even` times as fast, at most.
    """
    return 1 + steps * draft.per_step / sum(read.values())


# --------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class MemoryPlan:
    """
    What was chosen and what it needs.

    Attributes:
        device (`DeviceProfile`): the machine.
        precision (`str`): of the linear layers; `dtype` of everything else.
        context (`int`): tokens a row, prompt and answer together.
        context_limit (`int`): tokens that the checkpoint is meant for.
        table (`dict[str, dict[str, int]]`): bytes by section and row.
        budget_bytes (`int`): what the plan may take of the device.
        read (`dict[str, int]`): bytes that a decode step reads at `context` tokens.
        roofline (`dict[str, float]`): tokens a second of the whole batch, at most: `first` with an empty cache, `full`
            at `context` tokens. Empty where the device's bandwidth is not known.
        break_even (`float`, *optional*): tokens that a verification must yield on average for the draft to cost
            nothing; with `a` tokens the bound is `roofline["full"] * a / break_even`.
        notes (`tuple[str, ...]`): what to know before relying on it.
    """

    device: DeviceProfile
    precision: str
    dtype: str
    group_size: int | None
    context: int
    context_limit: int
    batch: int
    chunk: int
    sparse: bool
    cache: str
    draft: DraftSpec | None
    table: dict[str, dict[str, int]]
    budget_bytes: int
    read: dict[str, int]
    roofline: dict[str, float]
    break_even: float | None
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(map(sum, (section.values() for section in self.table.values())))

    @property
    def weight_bytes(self) -> int:
        return sum(self.table["weights"].values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def plan_memory(
    config,
    profile: DeviceProfile,
    *,
    context: int | None = None,
    batch: int = 1,
    precision: str | None = None,
    group_size: int | None = None,
    draft: str | DraftSpec | None = None,
    chunk: int | None = None,
    sparse: bool | None = None,
    cache: str = "dynamic",
    context_limit: int | None = None,
    memory_share: float = MEMORY_SHARE,
    runtime_bytes: int = RUNTIME_BYTES,
    workspace_bytes: int | None = None,
) -> MemoryPlan:
    """
    Plan precision, context and memory of a model on a device; no weights are needed or read.

    Where `precision` is not given, the first of 16 bits, INT4 and ternary is taken that fits with `context`. Without a
    `context` it is the first of 16 bits and INT4 that leaves room for `MIN_CONTEXT` tokens (all that the model is
    meant for, if fewer), else the one of them with most room; ternary, which needs a model trained for it, if neither
    fits.

    Args:
        config: a configuration of Transformers. One that says it is quantized (GPTQ of 4 bits, packed BitCPM4) fixes
            the precision.
        profile: the machine: `detect()`, `device_profile(name)`.
        context: tokens a row, prompt and answer; the most that fit, up to `context_limit`, by default.
        batch: rows.
        precision: `"bf16"`, `"fp16"`, `"fp32"`, `"int4"` (GPTQ), `"ternary"` (BitCPM4's 2 bits).
        group_size: inputs that share a scale; 128 with INT4 and 64 with ternary weights by default.
        draft: `"eagle"`, `"eagle3"`, `"lookup"` or a [`DraftSpec`].
        chunk: tokens of a prefill call, 2,048 or `context` if that is less.
        sparse: InfLLM v2; by default where the configuration has a `sparse_config`.
        cache: `"dynamic"` (caches as they are, with the room they keep to grow) or `"static"` (an engine's: slots for
            `context`, in whole blocks).
        context_limit: tokens the checkpoint is meant for, `max_position_embeddings` by default.
        memory_share: of the available memory that may be planned, above 0 and at most 1.
        runtime_bytes: for libraries and driver.
        workspace_bytes: an engine's own figure for a prefill chunk, in the place of [`activation_bytes`]'s.

    Raises:
        PlanError: an argument, or a model, that cannot be planned.
        DoesNotFit: no memory for it; names the missing bytes and what would fit.
    """
    config = config.get_text_config()
    _refuse_other_decoders(config)
    limit = config.max_position_embeddings if context_limit is None else context_limit
    for name, value in (("context", context), ("batch", batch), ("chunk", chunk), ("context_limit", limit)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PlanError(f"{name} must be a whole number of 1 or more, got {value!r}.")
    if cache not in ("dynamic", "static"):
        raise PlanError(f"cache is 'dynamic' or 'static', got {cache!r}.")
    if not 0 < memory_share <= 1:
        raise PlanError(f"memory_share must lie above 0 and not above 1, got {memory_share!r}.")
    if isinstance(draft, str):
        draft = DraftSpec(kind=draft)
    half = "bf16" if profile.has_bfloat16 else "fp16"
    packings = _candidates(config, precision, group_size, half)
    settings = sparse_settings(config, sparse)
    shape = model_shape(config)
    budget = int(profile.memory_available * memory_share)
    nodes = 0 if draft is None else draft.tree_size

    def table(packing: Packing, tokens: int) -> dict[str, dict[str, int]]:
        held = tokens + nodes  # a tree's nodes are cached until they are verified
        calls = min(chunk or CHUNK_TOKENS, tokens)
        shared = {"batch": batch, "dtype_bytes": packing.dtype_bytes, "sparse": settings is not None, "cache": cache}
        activations = activation_bytes(config, calls, held, logit_rows=max(nodes, 1), **shared)
        if workspace_bytes is not None:
            activations["prefill_chunk"] = workspace_bytes
        packed = [layer for layer in shape.linears if packing.is_packed(layer)]
        # Without a kernel for it, and in long calls with most, a packed layer is unpacked before it is multiplied by.
        largest = max((layer.outputs * layer.inputs for layer in packed), default=0)
        activations["unpacked_layer"] = largest * packing.dtype_bytes if packing.precision == "int4" else 0
        activations["buffers"] = shape.buffer_bytes
        found = {
            "weights": weight_bytes(shape, packing),
            "cache": cache_bytes(config, held, chunk=calls, **shared),
            "activations": activations,
        }
        if draft is not None:
            proposing = draft_bytes(config, draft, packing, batch)
            found["draft"] = {"weights": proposing.weights, "cache": proposing.cache}
        found["reserve"] = {"runtime": runtime_bytes}
        return found

    def needed(packing: Packing, tokens: int) -> int:
        return sum(map(sum, (section.values() for section in table(packing, tokens).values())))

    def longest(packing: Packing) -> int:
        """The most tokens that fit, up to the limit; 0 if none do."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if needed(packing, middle) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    usable, reasons = _usable(shape, packings, precision)
    rooms = {packing.precision: longest(packing) for packing in usable}
    if context is None:
        wanted = min(MIN_CONTEXT, limit)
        fitting = [packing for packing in usable if rooms[packing.precision]]
        common = [packing for packing in fitting if packing.precision != "ternary"] or fitting
        roomy = [packing for packing in common if rooms[packing.precision] >= wanted]
        chosen = roomy[0] if roomy else max(common, key=lambda packing: rooms[packing.precision], default=None)
        tokens = rooms[chosen.precision] if chosen else 0
    else:
        chosen = next((packing for packing in usable if needed(packing, context) <= budget), None)
        tokens = context if chosen is not None else 0
    if not tokens:
        closest = min(usable, key=lambda packing: needed(packing, context or 1))
        others = {} if precision is None else _rooms_of_others(config, shape, half, packings, longest)
        raise _does_not_fit(
            profile, closest, needed(closest, context or 1), budget, context, batch, memory_share,
            {**others, **rooms},
        )  # fmt: skip

    shared = {"batch": batch, "sparse": settings is not None}
    read = step_bytes(shape, config, chosen, tokens, **shared)
    roofline = {}
    if profile.bandwidth is not None:
        first = step_bytes(shape, config, chosen, 1, **shared)
        roofline["first"] = tokens_per_second(first, profile.bandwidth, batch=batch)
        roofline["full"] = tokens_per_second(read, profile.bandwidth, batch=batch)
    return MemoryPlan(
        device=profile,
        precision=chosen.precision,
        dtype=chosen.precision if chosen.precision in DTYPE_BYTES else chosen.dtype,
        group_size=chosen.group_size,
        context=tokens,
        context_limit=limit,
        batch=batch,
        chunk=min(chunk or CHUNK_TOKENS, tokens),
        sparse=settings is not None,
        cache=cache,
        draft=draft,
        table=table(chosen, tokens),
        budget_bytes=budget,
        read=read,
        roofline=roofline,
        break_even=None if draft is None else break_even(read, draft_bytes(config, draft, chosen, batch), draft.steps),
        notes=tuple(_notes(config, shape, profile, chosen, tokens, limit, reasons)),
    )


def _candidates(config, precision: str | None, group_size: int | None, half: str) -> list[Packing]:
    """What may be chosen, most exact first; a quantized checkpoint is what it is."""
    stored = _stored_packing(config, half)
    if stored is not None:
        if precision not in (None, stored.precision) or group_size not in (None, stored.group_size):
            raise PlanError(
                f"this checkpoint is stored as {stored.precision} in groups of {stored.group_size}, and precision="
                f"{precision!r}, group_size={group_size!r} was asked for. Leave both out, or take the checkpoint it "
                "was made from."
            )
        return [stored]
    if precision is not None:
        return [Packing(precision, half, group_size)]
    if group_size is not None:
        raise PlanError(f"group_size={group_size!r} was given without a precision; name 'int4' or 'ternary' with it.")
    return [Packing(name, half) for name in (half, "int4", "ternary")]


def _stored_packing(config, half: str) -> Packing | None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = fields.get("quant_method")
    method = getattr(method, "value", method)
    if method == "gptq" and fields.get("bits") == 4:
        groups = fields.get("modules_in_block_to_quantize")
        kinds = tuple(name for group in groups for name in group) if groups else ()
        return Packing(
            "int4", half, fields.get("group_size", -1),
            keeps=(lambda name: not name.endswith(kinds)) if kinds else (lambda name: False),
        )  # fmt: skip
    if method == BITCPM4:
        if fields.get("weight_format") != "packed":
            return None  # latents: what they will be packed to is a choice still
        return Packing(
            "ternary", half, fields["group_size"],
            scale_bytes=4 if fields.get("scale_dtype") == "float32" else 2,
            keeps=_kept(fields.get("modules_to_not_convert") or []),
        )  # fmt: skip
    raise PlanError(
        f"this checkpoint is quantized with {method!r} ({fields.get('bits', '?')} bits), whose sizes are not planned; "
        "planned are unquantized checkpoints, GPTQ of 4 bits and BitCPM4."
    )


def _kept(names: list[str]) -> Callable[[str], bool]:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return lambda name: bool(names) and not should_convert_module(name, names)


def _usable(
    shape: ModelShape, packings: Sequence[Packing], precision: str | None
) -> tuple[list[Packing], dict[str, str]]:
    """The packings this model can have, and why not the others."""
    usable, reasons = [], {}
    for packing in packings:
        try:
            weight_bytes(shape, packing)
        except PlanError as error:
            if precision is not None or len(packings) == 1:
                raise
            reasons[packing.precision] = str(error)
        else:
            usable.append(packing)
    return usable, reasons


def _rooms_of_others(config, shape, half, packings, longest) -> dict[str, int]:
    if getattr(config, "quantization_config", None) is not None:
        return {}
    asked = {packing.precision for packing in packings}
    others, _ = _usable(shape, [Packing(name, half) for name in (half, "int4", "ternary") if name not in asked], None)
    return {packing.precision: longest(packing) for packing in others}


def _does_not_fit(profile, packing, needs, budget, context, batch, share, rooms) -> DoesNotFit:
    rows = "" if batch == 1 else f" in {batch} rows"
    what = f"a context of {context:,} tokens" if context else "a single token of context"
    fits = {name: tokens for name, tokens in rooms.items() if tokens}
    would = ", ".join(f"{tokens:,} tokens{rows} with {name}" for name, tokens in fits.items())
    missing = needs - budget
    message = (
        f"{packing.precision} with {what}{rows} needs {format_gb(needs)}, and {profile.name} has {format_gb(budget)} "
        f"to give ({share:g} of {format_gb(profile.memory_available)} available): {format_gb(missing)} ({missing:,} "
        f"bytes) are missing. {'Would fit: ' + would if would else 'No precision leaves room for a token'}. Take "
        f"that, a smaller model, {'' if batch == 1 else 'fewer rows, '}a shorter prefill chunk, or free memory."
    )
    return DoesNotFit(message, needs, budget, fits)


def _notes(config, shape, profile, packing, tokens, limit, reasons) -> Iterator[str]:
    yield from profile.notes
    if profile.bandwidth is None:
        yield "no bandwidth is known for this machine, so no tokens a second: give --bandwidth, replace(bandwidth=)"
    if tokens > limit:
        yield f"{tokens:,} tokens are beyond the {limit:,} that the checkpoint is meant for"
    if getattr(config, "quantization_config", None) is None:
        if packing.precision == "int4":
            yield "int4: the weights must be quantized first (P-GPTQ) or come as such a checkpoint"
        if packing.precision == "ternary":
            yield "ternary: only for a model trained so (BitCPM4); rounding another one ruins it"
    left = [layer.name for layer in shape.linears if not packing.is_packed(layer) and not packing.keeps(layer.name)]
    if packing.precision in GROUP_SIZES and left:
        yield f"{len(left)} layers stay in {packing.dtype}: their sizes fill no whole words ({left[0]}, ...)"
    for name, reason in reasons.items():
        yield f"{name} was not considered: {reason}"


def format_gb(count: int) -> str:
    """Decimal, in GB from 0.1 GB on, in MB below."""
    return f"{count / GB:.2f} GB" if abs(count) >= GB / 10 else f"{count / 1e6:.1f} MB"


__all__ = [
    "DoesNotFit",
    "DraftSpec",
    "MemoryPlan",
    "PlanError",
    "activation_bytes",
    "break_even",
    "cache_bytes",
    "draft_bytes",
    "model_shape",
    "plan_memory",
    "step_bytes",
    "tokens_per_second",
    "weight_bytes",
]
