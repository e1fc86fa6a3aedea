"""
Stock `quant_method: gptq` checkpoints, written and read without gptqmodel.

A quantized layer has `qweight` (codes packed along inputs), `qzeros` (zero points packed along outputs), `scales` and
`g_idx` in the place of `weight`; everything else of the checkpoint is as it was. Two ways to store a zero point exist:
`checkpoint_format` "gptq" (v1) has `zero - 1`, "gptq_v2" has `zero`. Any reader of the format takes these files.

Shape letters: `O` outputs, `I` inputs, `Q` groups of inputs, `b` bits.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..packing import pack_codes, unpack_codes
from ..quantized_weight import QuantizedWeight
from .checkpoint_files import CheckpointTensors, new_folder, read_json, write_json, write_shards


FORMATS = ("gptq", "gptq_v2")
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def gptq_tensors(weight: QuantizedWeight, checkpoint_format: str = "gptq") -> dict[str, torch.Tensor]:
    """
    One layer's tensors in the GPTQ format.

    Args:
        weight: `codes` uint8 `[O, I]`; 2, 3, 4 or 8 bits; `scales` exact in float16.
        checkpoint_format: "gptq" (v1: zero points less one) or "gptq_v2".

    Returns:
        `qweight` int32 `[I * b / 32, O]`, `qzeros` int32 `[Q, O * b / 32]`, `scales` float16 `[Q, O]`, `g_idx` int32
        `[I]`, and `bias` `[O]` where there is one.

    Raises:
        ValueError: sizes that fill no whole words, scales that float16 does not hold, a zero point of 0 in v1.
    """
    if checkpoint_format not in FORMATS:
        raise ValueError(f"checkpoint_format is one of {', '.join(FORMATS)}, got {checkpoint_format!r}.")
    zeros = weight.zeros.to(torch.int16)
    if checkpoint_format == "gptq":
        if (zeros == 0).any():
            raise ValueError(
                "a zero point is 0, and checkpoint_format 'gptq' (v1) stores zero - 1: write checkpoint_format="
                "'gptq_v2'."
            )
        zeros = zeros - 1
    scales = weight.scales.to(torch.float16)
    if not torch.equal(scales.to(weight.scales.dtype), weight.scales):
        worst = weight.scales[scales.to(weight.scales.dtype) != weight.scales].abs().max().item()
        raise ValueError(
            f"the format stores scales in float16, which does not hold them exactly (one is {worst:.9g}): round "
            "scales to float16 before rounding the weight with them."
        )
    tensors = {
        "qweight": pack_codes(weight.codes.T, weight.bits, dim=0),
        "qzeros": pack_codes(zeros.T, weight.bits, dim=1),
        "scales": scales.T.contiguous(),
        "g_idx": weight.groups.to(torch.int32),
    }
    if weight.bias is not None:
        tensors["bias"] = weight.bias
    return tensors


def gptq_config(
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    checkpoint_format: str = "gptq",
    desc_act: bool = False,
    static_groups: bool = True,
    damp_percent: float = 0.01,
    true_sequential: bool = True,
    lm_head: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    The dictionary of `quantize_config.json` and of `quantization_config` in `config.json`, with each key that some
    converter asks for.

    Args:
        group_size: inputs that share a scale; -1 for one scale a row.
        meta: our facts about the run, JSON values; readers ignore them. `quantizer` is added.
    """
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": desc_act,
        "static_groups": static_groups,
        "damp_percent": damp_percent,
        "true_sequential": true_sequential,
        "lm_head": lm_head,
        # The two libraries that defined the format spell it differently.
        "format": checkpoint_format,
        "checkpoint_format": checkpoint_format,
        "meta": {**(meta or {}), "quantizer": [f"transformers_minicpm4:{version('transformers_minicpm4')}"]},
    }


def save_gptq(
    folder: str | os.PathLike,
    model,
    weights: Mapping[str, QuantizedWeight],
    *,
    tokenizer=None,
    meta: Mapping[str, Any] | None = None,
    checkpoint_format: str = "gptq",
    max_shard_size: int | str = "5GB",
    state_dict: Mapping[str, torch.Tensor] | None = None,
    static_groups: bool = True,
    damp_percent: float = 0.01,
    true_sequential: bool = True,
    extras: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """
    Writes a stock GPTQ checkpoint. The folder appears when all of it is written, and not at all after an error.

    Args:
        folder: new or empty.
        model: a `PreTrainedModel`; gives config, generation config and what is not in `weights`. Its quantized layers
            may be on the meta device. Not changed.
        weights: quantized layers by module name, all of one width, group size and symmetry. Each is asked for once,
            so a mapping may load it from disk then.
        meta: see [`gptq_config`].
        static_groups, damp_percent, true_sequential: how the solver ran, for the config; readers ignore them, some
            converters want `static_groups`. `desc_act` is written where a weight has a `g_idx`.
        max_shard_size: in bytes, or as "5GB". Memory needed is about one shard; CPM.cu's converter wants one file.
        state_dict: in the place of `model.state_dict()`.
        extras: called with the folder before it takes its name, to add files such as a card. Names ending in
            .safetensors are for weights: some engines read all files of that ending.

    Returns:
        the `quantization_config` that was written.

    Raises:
        FileExistsError: the folder has something in it.
        ValueError: no weights, names that the model does not have, unlike weights, a quantized head tied to the
            embeddings, tensors that are neither quantized nor in memory, and what [`gptq_tensors`] refuses.
    """
    state = model.state_dict() if state_dict is None else state_dict
    names = list(weights)
    _check_names(model, names)
    common = _Common()

    with new_folder(folder) as work:
        write_shards(work, checkpoint_tensors(model, weights, checkpoint_format, state, common.add), max_shard_size)
        quantization = gptq_config(
            common.bits,
            common.group_size,
            symmetric=common.symmetric,
            checkpoint_format=checkpoint_format,
            desc_act=common.desc_act,
            static_groups=static_groups,
            damp_percent=damp_percent,
            true_sequential=true_sequential,
            lm_head="lm_head" in names,
            meta=meta,
        )
        quantization.update(partial_layers(model, names))
        write_json(work / "quantize_config.json", quantization)
        save_model_files(work, model, tokenizer, quantization, state.values())
        if extras is not None:
            extras(work)
    return quantization


def checkpoint_tensors(
    model,
    weights: Mapping[str, QuantizedWeight],
    checkpoint_format: str = "gptq",
    state: Mapping[str, torch.Tensor] | None = None,
    seen: Callable[[str, QuantizedWeight], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    All tensors of a GPTQ checkpoint, one after the other: what is not quantized, then layer by layer.

    Args:
        weights: quantized layers by module name; each is asked for once. One without a bias has the model's.
        state: in the place of `model.state_dict()`.
        seen: called with each layer before its tensors are made.

    Raises:
        ValueError: see [`save_gptq`].
    """
    state = model.state_dict() if state is None else state
    yield from plain_tensors(model, state, list(weights))
    for name in weights:
        weight = weights[name]
        if seen is not None:
            seen(name, weight)
        own_bias = state.get(f"{name}.bias")
        if weight.bias is None and own_bias is not None:
            if own_bias.is_meta:
                raise ValueError(f"{name} has a bias that is not in memory: put it into the QuantizedWeight.")
            weight = copy.copy(weight)
            weight.bias = own_bias
        try:
            parts = gptq_tensors(weight, checkpoint_format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        for part, tensor in parts.items():
            yield f"{name}.{part}", tensor


def plain_tensors(
    model, state: Mapping[str, torch.Tensor], quantized: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds besides the quantized layers; of tied weights the first alone."""
    # A packed ternary layer has its scales in the state dict too.
    gone = {f"{name}.{part}" for name in quantized for part in ("weight", "weight_scale", "bias")}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in state.items():
        if name in gone or name in tied:
            continue
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and not among the quantized layers: load it first.")
        yield name, tensor


def save_model_files(
    folder: Path,
    model,
    tokenizer,
    quantization: dict[str, Any] | None,
    tensors: Iterable[torch.Tensor] | None = None,
) -> None:
    """
    config.json with `quantization_config`, generation_config.json and the tokenizer's files.

    Args:
        tensors: what is saved, in the place of the model's parameters; the first of floating point gives `dtype`.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    dtypes = [tensor.dtype for tensor in tensors or model.parameters() if tensor.is_floating_point()]
    config.dtype = dtypes[0] if dtypes else model.config.dtype
    config.quantization_config = quantization
    if quantization is None:
        del config.quantization_config
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _check_names(model, names: list[str]) -> None:
    if not names:
        raise ValueError("no quantized weights were given: quantize first, or use model.save_pretrained.")
    known = dict(model.named_modules())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no module of {type(model).__name__}; give module names as in model.named_modules(), "
            "such as 'model.layers.0.self_attn.q_proj'."
        )
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for one, other in tied.items():
        for key in (one, other):
            if key.removesuffix(".weight") in names:
                raise ValueError(
                    f"{key} is tied ({one} is {other}): a shared weight cannot be quantized in one place."
                )


@dataclass
class _Common:
    """What the one config says of all layers, gathered as they pass."""

    first: str = ""
    bits: int = 0
    symmetric: bool = True
    sizes: set[int] = field(default_factory=set)
    widest_whole: int = 0  # inputs of the widest layer with one group
    desc_act: bool = False

    @property
    def group_size(self) -> int:
        return min(self.sizes, default=-1)

    def add(self, name: str, weight: QuantizedWeight) -> None:
        inputs = weight.codes.shape[1]
        if not self.first:
            self.first, self.bits, self.symmetric = name, weight.bits, weight.symmetric
        if weight.group_size >= inputs:
            self.widest_whole = max(self.widest_whole, inputs)
        else:
            self.sizes.add(weight.group_size)
        self.desc_act |= weight.g_idx is not None
        unlike_groups = len(self.sizes) > 1 or (self.sizes and self.widest_whole > min(self.sizes))
        if weight.bits != self.bits or weight.symmetric != self.symmetric or unlike_groups:
            raise ValueError(
                f"a GPTQ config has one width, group size and symmetry: layers up to {self.first!r} have {self.bits} "
                f"bits, symmetric {self.symmetric}; {name!r} has {weight.bits}, {weight.symmetric}, and group sizes "
                f"so far are {sorted(self.sizes)} besides one group in rows of {self.widest_whole}. Quantize them "
                "alike."
            )


def partial_layers(model, names: list[str]) -> dict[str, Any]:
    """
    Which linear layers are quantized, where some are not: Transformers reads `modules_in_block_to_quantize` (names end
    with one of these), gptqmodel and vLLM read `dynamic` (patterns of names to leave alone).
    """
    chosen = set(names)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    outside = {name for name in linears if ".layers." not in name}
    left = [name for name in linears if name not in chosen and name not in outside]
    if not left:
        return {}
    kinds = {name.split(".layers.")[1].split(".", 1)[1] for name in chosen if ".layers." in name}
    if any(name.endswith(tuple(kinds)) for name in left):  # blocks differ: whole names, from the number on
        kinds = {"layers." + name.split(".layers.")[1] for name in chosen if ".layers." in name}
    return {
        "modules_in_block_to_quantize": [sorted(kinds)],
        "dynamic": {"-:^" + name.replace(".", r"\.") + "$": {} for name in left},
    }


class GPTQWeights(Mapping):
    """
    The quantized layers of a GPTQ checkpoint by module name, read when asked for.

    Args:
        folder: of ours or of others: one file or shards, v1 or v2, with or without `g_idx`, activation order.

    Raises:
        FileNotFoundError: no checkpoint, or not all of it.
        ValueError: another quantization, or damage; names the file and the tensor.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.config = read_gptq_config(self.folder)
        self.tensors = CheckpointTensors(self.folder)
        self.names = [name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight")]
        if not self.names:
            raise ValueError(f"{self.folder} says quant_method 'gptq' and has no tensor named *.qweight.")
        for name in self.names:
            for part in ("qzeros", "scales"):
                if f"{name}.{part}" not in self.tensors:
                    raise ValueError(f"{self.tensors.path(name + '.qweight')} is damaged: no tensor {name}.{part!r}.")

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def plain(self) -> Iterator[str]:
        """Names of the tensors that belong to no quantized layer."""
        own = {f"{name}.{part}" for name in self.names for part in (*PARTS, "bias")}
        return (name for name in self.tensors if name not in own)

    def __getitem__(self, name: str) -> QuantizedWeight:
        if f"{name}.qweight" not in self.tensors:
            raise KeyError(name)
        bits = self.config["bits"]
        qweight, qzeros = self._part(name, "qweight", torch.int32), self._part(name, "qzeros", torch.int32)
        scales = self._part(name, "scales")
        inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
        group_size = inputs if self.config["group_size"] == -1 else self.config["group_size"]
        groups = -(-inputs // group_size)
        self._shape(name, "scales", scales, (groups, outputs))
        self._shape(name, "qzeros", qzeros, (groups, outputs * bits // 32))
        if not scales.is_floating_point() or not scales.isfinite().all():
            self._damaged(name, "scales", "it must hold finite floats")
        try:
            codes = unpack_codes(qweight, bits, dim=0).T.contiguous()
            zeros = unpack_codes(qzeros, bits, dim=1)
        except ValueError as error:
            self._damaged(name, "qweight", str(error))
        if self.config["checkpoint_format"] == "gptq":
            zeros = (zeros + 1) & (2**bits - 1)
        g_idx = None
        if f"{name}.g_idx" in self.tensors:
            g_idx = self._part(name, "g_idx").to(torch.int32)
            self._shape(name, "g_idx", g_idx, (inputs,))
            if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
                self._damaged(name, "g_idx", f"groups must lie in 0 .. {groups - 1}")
            if torch.equal(g_idx, torch.arange(inputs, dtype=torch.int32) // group_size):
                g_idx = None
        return QuantizedWeight(
            codes=codes,
            scales=scales.T.contiguous(),
            zeros=zeros.T.contiguous(),
            bits=bits,
            group_size=group_size,
            symmetric=bool((zeros == 2 ** (bits - 1)).all()),
            g_idx=g_idx,
            bias=self._part(name, "bias") if f"{name}.bias" in self.tensors else None,
        )

    def _part(self, name: str, part: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = self.tensors[f"{name}.{part}"]
        if dtype is not None and (tensor.dtype != dtype or tensor.dim() != 2):
            self._damaged(name, part, f"{dtype} of two dimensions is expected, it is {tensor.dtype} {_size(tensor)}")
        return tensor

    def _shape(self, name: str, part: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            config = f"bits {self.config['bits']} and group_size {self.config['group_size']}"
            self._damaged(name, part, f"shape {list(shape)} is expected with {config}, it is {_size(tensor)}")

    def _damaged(self, name: str, part: str, what: str):
        file = self.tensors.path(f"{name}.{part}")
        raise ValueError(f"{file} is damaged at tensor '{name}.{part}': {what}.")


def _size(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def read_gptq_config(folder: str | os.PathLike) -> dict[str, Any]:
    """
    The quantization config of a GPTQ folder, with `bits`, `group_size` and `checkpoint_format` always there.

    Raises:
        FileNotFoundError: neither `config.json` nor `quantize_config.json`.
        ValueError: not a GPTQ checkpoint, or a variant that is not read.
    """
    folder = Path(folder)
    config = None
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json").get("quantization_config")
    if config is None:
        path = folder / "quantize_config.json"
        if not path.is_file():
            if (folder / "config.json").is_file():
                raise ValueError(f"{folder} is not quantized: its config.json has no quantization_config.")
            raise FileNotFoundError(f"{folder} has no config.json; give the folder of a GPTQ checkpoint.")
        config = read_json(path)
    config = dict(config)
    method = config.get("quant_method", "gptq")
    if method != "gptq":
        raise ValueError(f"{folder} has quant_method {method!r}; only 'gptq' is read here.")
    # Files older than the two names are v1.
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    if form not in FORMATS:
        raise ValueError(f"{folder} has checkpoint_format {form!r}; {' and '.join(FORMATS)} are read.")
    bits, group_size = config.get("bits"), config.get("group_size", -1)
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"{folder} has bits {bits!r}; 2, 3, 4 and 8 are read.")
    if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise ValueError(f"{folder} has group_size {group_size!r}; a positive number or -1 is expected.")
    mixed = [rule for rule, change in (config.get("dynamic") or {}).items() if not rule.startswith("-:") and change]
    if mixed:
        raise ValueError(f"{folder} mixes widths (dynamic rule {mixed[0]!r}); one width for all layers is read.")
    return {**config, "bits": bits, "group_size": group_size, "checkpoint_format": form}


def read_gptq(folder: str | os.PathLike) -> GPTQWeights:
    """The quantized layers of a GPTQ folder: module name to [`QuantizedWeight`], read when asked for."""
    return GPTQWeights(folder)


def load_gptq(folder: str | os.PathLike, dtype: torch.dtype | None = None, config: PreTrainedConfig | None = None):
    """
    A GPTQ checkpoint as an ordinary dense model, on CPU and without gptqmodel: for evaluation, export, and machines
    that have no kernels for it.

    Args:
        folder: a local folder of ours or of others, see [`GPTQWeights`].
        dtype: of the dense weights; by default the config's. In float16 they are, bit for bit, what GPTQ readers
            compute.
        config: in the place of the folder's, for changes such as another attention.

    Returns:
        an `AutoModelForCausalLM` in eval mode whose config has no `quantization_config`.

    Raises:
        FileNotFoundError, ValueError: see [`GPTQWeights`]; weights that do not fit the architecture.
    """
    weights = read_gptq(folder)
    config = AutoConfig.from_pretrained(folder) if config is None else copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = dtype or config.dtype or torch.float16
    state = {name: weights.tensors[name].to(dtype) for name in weights.plain()}
    for name in weights:
        weight = weights[name]
        # Below float32's precision a product of two rounded factors is rounded twice; float16 readers do it once.
        exact = torch.float16 if dtype == torch.float16 else torch.promote_types(dtype, torch.float32)
        state[f"{name}.weight"] = weight.dequantize(exact).to(dtype)
        if weight.bias is not None:
            state[f"{name}.bias"] = weight.bias.to(dtype)
    with torch.device("meta"):
        architecture = type(AutoModelForCausalLM.from_config(config))
    model, report = architecture.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, found)) for kind, found in report.items() if found and kind != "error_msgs"}
    if wrong:
        raise ValueError(f"{folder} does not fit {type(model).__name__}: {wrong}.")
    if (Path(folder) / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()
