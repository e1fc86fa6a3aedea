"""
The trained part of EAGLE drafting: the heads' modules, and how their files are read and written.

Shape letters: B batch, S rows, N rows attended to, C hidden size, G key/value heads, D head size, L layers of the
target.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PretrainedConfig, PreTrainedModel

from ..model.modeling_minicpm4 import MiniCPM4RMSNorm, apply_rotary_pos_emb


CONFIG, WEIGHTS = "config.json", "model.safetensors"
# In files of EAGLE heads, but not the head's: shared with the target, or of use in training alone.
SHARED = ("embed_tokens.weight", "t2d")


@dataclass(frozen=True)
class EagleConfig:
    """
    Sizes of a head; `config.json` has them under these names.

    Args:
        scale_depth, mup_denominator: residual branches are multiplied by `scale_depth / sqrt(mup_denominator)`
            (EAGLE-2; the branches of EAGLE-3 are not scaled).
        scale_emb, dim_model_base: the target's, which the head uses through the target; kept for CPM.cu.
        fc_bias: whether `fc` has a bias (EAGLE-2).
        draft_vocab_size: ids that the head scores (EAGLE-3), in tokens; `None`: all.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    scale_depth: float = 1.0
    mup_denominator: float = 1.0
    scale_emb: float = 1.0
    dim_model_base: float | None = None
    fc_bias: bool = False
    draft_vocab_size: int | None = None

    def __post_init__(self):
        sizes = (self.vocab_size, self.hidden_size, self.intermediate_size, self.num_key_value_heads, self.head_dim)
        if min(sizes) < 1 or self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                "an EAGLE head needs sizes of 1 or more, an even head_dim, and num_attention_heads a multiple of "
                f"num_key_value_heads; got {asdict(self)}."
            )
        if self.scale_depth <= 0 or self.mup_denominator <= 0:
            raise ValueError(
                f"scale_depth and mup_denominator must be positive, got {self.scale_depth} and {self.mup_denominator}."
            )

    @classmethod
    def for_target(cls, target: PretrainedConfig, **changes) -> EagleConfig:
        """
        The sizes of the target's own layers. MiniCPM4: residual scale `scale_depth / sqrt(L + 1)`; others: 1. Keyword
        arguments change fields.
        """
        heads = target.num_attention_heads
        values = {
            "vocab_size": target.vocab_size,
            "hidden_size": target.hidden_size,
            "intermediate_size": target.intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(target, "num_key_value_heads", None) or heads,
            "head_dim": getattr(target, "head_dim", None) or target.hidden_size // heads,
            "rms_norm_eps": target.rms_norm_eps,
        }
        if hasattr(target, "scale_depth"):
            values |= {"scale_depth": target.scale_depth, "mup_denominator": target.num_hidden_layers + 1}
            values |= {"scale_emb": target.scale_emb, "dim_model_base": target.dim_model_base}
        return cls(**{**values, **changes})

    @property
    def residual_scale(self) -> float:
        return self.scale_depth / math.sqrt(self.mup_denominator)


class _Attention(nn.Module):
    def __init__(self, config: EagleConfig, inputs: int):
        super().__init__()
        self.head_dim, self.groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(inputs, queries, bias=False)
        self.k_proj = nn.Linear(inputs, keys, bias=False)
        self.v_proj = nn.Linear(inputs, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def keys_values(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]):
        """Rotated keys and values of rows `x` `[B, S, inputs]`, each `[B, G, S, D]`."""
        keys, values = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.k_proj, self.v_proj)
        )
        return apply_rotary_pos_emb(keys, keys, *rotation)[1], values

    def forward(self, x, rotation, keys, values, mask=None) -> torch.Tensor:
        """Rows `x` attend to `keys`, `values` `[B, G, N, D]` where `mask` `[S, N]` is true; `[B, S, C]`."""
        batch, rows = x.shape[:2]
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query = apply_rotary_pos_emb(query, query, *rotation)[0]
        # The queries of a group side by side: the keys need not be repeated for them.
        query = query.reshape(batch, -1, self.groups * rows, self.head_dim)
        if mask is not None:
            mask = mask.repeat(self.groups, 1)
        output = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        output = output.reshape(batch, -1, rows, self.head_dim).transpose(1, 2)
        return self.o_proj(output.reshape(batch, rows, -1))


class _MLP(nn.Module):
    def __init__(self, config: EagleConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: EagleConfig, inputs: int):
        super().__init__()
        self.self_attn = _Attention(config, inputs)
        self.mlp = _MLP(config)
        self.input_layernorm = MiniCPM4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MiniCPM4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class EagleHead(nn.Module):
    """
    The EAGLE-2 head of MiniCPM4: `x = layer(fc([norm1(embedding); norm2(hidden)]))`, where `x` is both the next hidden
    state and the input of the target's output head. Parameters are named as in the released files.
    """

    def __init__(self, config: EagleConfig):
        super().__init__()
        self.config, self.residual_scale = config, config.residual_scale
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.input_norm1 = MiniCPM4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_norm2 = MiniCPM4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([_Layer(config, config.hidden_size)])

    @property
    def layer(self) -> _Layer:
        return self.layers[0]

    def fuse(self, embeddings: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of embeddings and hidden states `[B, S, C]`: the layer's residual stream, and what its attention reads."""
        stream = self.fc(torch.cat([self.input_norm1(embeddings), self.input_norm2(hidden)], dim=-1))
        return stream, self.layer.input_layernorm(stream)

    def finish(self, stream, read, rotation, keys, values, mask=None) -> torch.Tensor:
        """The rest of the layer for the rows that `fuse` gave: next hidden states `[B, S, C]`."""
        branch = self.layer.self_attn(read, rotation, keys, values, mask)
        stream = torch.add(stream, branch, alpha=self.residual_scale)
        branch = self.layer.mlp(self.layer.post_attention_layernorm(stream))
        return torch.add(stream, branch, alpha=self.residual_scale)


class Eagle3Head(nn.Module):
    """
    The EAGLE-3 head: `fc` fuses three of the target's hidden states, and the attention of one layer reads embedding
    and fused state side by side. It has an output head of its own over `draft_vocab_size` ids; id `i` is the target's
    `i + d2t[i]`. Parameters are named as in the released files.
    """

    def __init__(self, config: EagleConfig):
        super().__init__()
        self.config, self.residual_scale = config, 1.0
        rows = config.draft_vocab_size or config.vocab_size
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = _Layer(config, 2 * config.hidden_size)
        self.midlayer.hidden_norm = MiniCPM4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = MiniCPM4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, rows, bias=False)
        self.register_buffer("d2t", torch.zeros(rows, dtype=torch.long))

    @property
    def layer(self) -> _Layer:
        return self.midlayer

    def fuse(self, embeddings: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of `EagleHead`; `hidden` is three states side by side `[B, S, 3C]`, or the head's own `[B, S, C]`."""
        stream = self.fc(hidden) if hidden.shape[-1] == self.fc.in_features else hidden
        read = torch.cat([self.layer.input_layernorm(embeddings), self.layer.hidden_norm(stream)], dim=-1)
        return stream, read

    finish = EagleHead.finish


# --- Files -----------------------------------------------------------------------------------------------------------


def check_target(config: EagleConfig, target: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: a head of `config` cannot draft for `target`.
    """
    own = EagleConfig.for_target(target.config)
    if config.vocab_size != own.vocab_size:
        raise ValueError(
            f"the EAGLE head was trained for a vocabulary of {config.vocab_size} tokens and the target has "
            f"{own.vocab_size}: a head fits the model it was trained for."
        )
    for name in ("hidden_size", "head_dim"):
        if getattr(config, name) != getattr(own, name):
            raise ValueError(
                f"the EAGLE head has {name}={getattr(config, name)} and the target {getattr(own, name)}: a head fits "
                "the model it was trained for."
            )
    if not hasattr(getattr(target, "model", None), "rotary_emb"):
        raise ValueError(
            f"an EAGLE head rotates with the target's model.rotary_emb, which {type(target).__name__} does not have; "
            "use a Llama-like target."
        )


def check_ids(ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Ids `[V]` on the CPU, or ValueError: not distinct integers of the vocabulary."""
    ids = torch.as_tensor(ids).cpu()
    integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not integer or ids.dim() != 1 or not len(ids):
        raise ValueError(f"ids to draft are a list of integers, got shape {tuple(ids.shape)} of {ids.dtype}.")
    ids = ids.long()
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"ids to draft run from {int(ids.min())} to {int(ids.max())}, the vocabulary from 0 to {vocabulary - 1}."
        )
    if len(ids.unique()) != len(ids):
        raise ValueError(f"{len(ids) - len(ids.unique())} of {len(ids)} ids to draft are there twice; list each once.")
    return ids


def read_head(kind: type, folder: Path, target: PreTrainedModel) -> EagleHead | Eagle3Head:
    """
    The head in `folder`, in the target's dtype and on its device. Names of CPM.cu and Hugging Face (`layers.0.*`,
    `midlayer.*`) and of vLLM (`model.eagle_layers.0.*`) are read.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape, or another vocabulary; named.
        FileNotFoundError: no weights in `folder`.
    """
    files = sorted(folder.glob("*.safetensors"))
    tensors = {}
    for file in files or sorted(folder.glob("*.bin")):
        tensors |= load_file(file) if files else torch.load(file, map_location="cpu", weights_only=True)
    if not tensors:
        raise FileNotFoundError(f"{folder} has no *.safetensors and no *.bin: give the folder of an EAGLE head.")
    third = kind is Eagle3Head
    skipped = SHARED if third else (*SHARED, "lm_head.weight")
    layer = "midlayer." if third else "layers.0."
    named = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("model.").replace("eagle_layers.", "layers.")
        name = layer + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name
        if name not in skipped and not name.endswith("rotary_emb.inv_freq"):
            named[name] = tensor
    config = _read_config(folder, named, target)
    check_target(config, target)
    with torch.device("meta"):
        head = kind(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if third and "d2t" not in named and wanted["d2t"] == (config.vocab_size,):
        named["d2t"] = torch.zeros(config.vocab_size, dtype=torch.long)
    missing, unknown = sorted(wanted.keys() - named), sorted(named.keys() - wanted)
    if missing or unknown:
        other = "Eagle3Draft" if any(name.startswith("midlayer.") for name in unknown) else "EagleDraft"
        hint = f" It looks like a head for {other}." if third == (other == "EagleDraft") and missing else ""
        raise ValueError(
            f"{folder} is not {'an EAGLE-3' if third else 'an EAGLE-2'} head of one layer in 16 or 32 bits: missing "
            f"{', '.join(missing) or 'nothing'}; unknown {', '.join(unknown) or 'nothing'}.{hint}"
        )
    for name, shape in wanted.items():
        if tuple(named[name].shape) != shape:
            raise ValueError(f"{folder}: {name} has shape {tuple(named[name].shape)}, expected {shape}.")
    head.load_state_dict({name: tensor.clone() for name, tensor in named.items()}, assign=True)
    if third:
        head.d2t = head.d2t.long()
    return head.to(device=target.device, dtype=target.dtype).requires_grad_(False)


def _read_config(folder: Path, tensors: dict[str, torch.Tensor], target: PreTrainedModel) -> EagleConfig:
    """What `config.json` says, and the target where it is silent."""
    file = folder / CONFIG
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = {field.name for field in fields(EagleConfig)} - {"fc_bias", "draft_vocab_size"}
    changes = {name: value for name, value in given.items() if name in known and value is not None}
    if "num_attention_heads" in changes:
        changes.setdefault("num_key_value_heads", changes["num_attention_heads"])
    if "scale_depth" in changes:
        changes.setdefault("mup_denominator", target.config.num_hidden_layers + 1)
    rows = len(tensors.get("lm_head.weight", ()))
    config = EagleConfig.for_target(target.config, fc_bias="fc.bias" in tensors, **changes)
    return replace(config, draft_vocab_size=rows) if rows not in (0, config.vocab_size) else config


def read_ids(folder: Path) -> torch.Tensor | None:
    """
    FR-Spec's list `freq_*.pt` in `folder`, if there is one.

    Raises:
        ValueError: more than one list.
    """
    files = sorted(folder.glob("freq_*.pt"))
    if len(files) > 1:
        raise ValueError(
            f"{folder} has {len(files)} lists of ids ({', '.join(file.name for file in files)}); pass the one to use: "
            "vocabulary_ids=torch.tensor(torch.load(file)), or None for all ids."
        )
    return torch.as_tensor(torch.load(files[0], map_location="cpu", weights_only=True)) if files else None


def save_head(head: EagleHead | Eagle3Head, folder: Path, architecture: str) -> None:
    """Writes `config.json` and `model.safetensors`, in the names of CPM.cu."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"architectures": [architecture], "model_type": "llama", "num_hidden_layers": 1, **asdict(head.config)}
    values = {name: value for name, value in values.items() if value is not None and name != "fc_bias"}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    write_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(values, indent=2) + "\n"
    write_file(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def write_file(file: Path, write: Callable[[Path], object]) -> None:
    """`write` gets a name beside `file`, which takes `file`'s place only when it is whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
