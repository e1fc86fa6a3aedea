"""
A model as a row of blocks that can be run one at a time, in memory or read from a checkpoint's files when their turn
comes, so that a model larger than memory can be quantized.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..adapters import refuse_adapters


class _Stop(Exception):
    pass


class Blocks:
    """
    The decoder layers of a causal LM.

    Args:
        model: in memory, or of empty weights as `open_checkpoint` makes it.
        files: where the tensors of blocks lie, for a model of empty weights.
        stored_dtype: of parameters that are not quantized, once they are saved; `None`: the dtype they have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: dict[str, Path] | None = None,
        stored_dtype: torch.dtype | None = None,
    ):
        refuse_adapters(model)
        self.model, self.files, self.stored_dtype = model, files, stored_dtype
        self.decoder = model.get_decoder()
        layers = getattr(self.decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise ValueError(
                f"{type(model).__name__} has no list of decoder layers named `layers`; models built like Llama are "
                "quantized"
            )
        self.layers = layers
        absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if files is None and absent:
            raise ValueError(
                f"{absent[0]} is not in memory (meta or offloaded); pass the checkpoint's path, whose blocks are "
                "read one by one, or load the model without offloading"
            )
        name = next(name for name, module in model.named_modules() if module is layers)
        self.names = [f"{name}.{index}" for index in range(len(layers))]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def as_stored(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter if self.stored_dtype is None else parameter.to(self.stored_dtype)

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights; those of a model of empty weights are gone again afterwards."""
        block = self.layers[index]
        if self.files is None:
            yield block
            return
        prefix = f"{self.names[index]}."
        _fill(self.model, [prefix + name for name, _ in block.named_parameters()], self.files, self.device)
        try:
            yield block
        finally:
            block.to("meta")
            gc.collect()

    @torch.no_grad()
    def first_inputs(
        self, batch: dict[str, torch.Tensor], past_key_values: Cache | None = None
    ) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """
        What the first block is given for a batch, `[B, S, hidden]`, and each block's further arguments.

        Args:
            past_key_values: an empty cache; the decoder may give it the kinds of layers that its blocks want.
        """
        found: list[dict[str, Any]] = [{} for _ in self.layers]
        hidden: list[torch.Tensor] = []

        def stand_in(index):
            def forward(hidden_states, *args, **kwargs):
                if args:
                    raise ValueError(
                        f"{self.names[index]} takes positional arguments; quantized are models like Llama"
                    )
                hidden.append(hidden_states)
                found[index] = kwargs
                return hidden_states

            return forward

        # A hook of accelerate stands in the instance, as ours does for the moment.
        own = [layer.__dict__.get("forward") for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.forward = stand_in(index)
        try:
            self.decoder(
                **{name: value.to(self.device) for name, value in batch.items()},
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
            )
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward
        return hidden[0], found


def run(block: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def run_until(block: nn.Module, module: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """The input of `module` within `block`; what comes after it is not computed."""
    found: list[torch.Tensor] = []

    def stop(_, args):
        found.append(args[0])
        raise _Stop

    handle = module.register_forward_pre_hook(stop)
    try:
        run(block, hidden, kwargs)
    except _Stop:
        pass
    finally:
        handle.remove()
    if not found or found[0].shape[:2] != hidden.shape[:2]:
        raise ValueError(
            "a linear layer does not see every position (an expert of a mixture?); name those that do with "
            "modules_in_block_to_quantize"
        )
    return found[0]


def feeds(block: nn.Module, giver: nn.Module, reader: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether what `giver` returns is the very tensor that `reader` is given."""
    given: list[torch.Tensor] = []
    handle = giver.register_forward_hook(lambda _, __, output: given.append(output))
    try:
        read = run_until(block, reader, hidden, kwargs)
    finally:
        handle.remove()
    return any(read is tensor for tensor in given)


def linear_groups(block: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> list[list[str]]:
    """
    The names of a block's linear layers in the order in which they run; those that read the same tensor together.
    """
    seen: list[tuple[torch.Tensor, list[str]]] = []  # the tensors stay alive, so that no two share an id

    def watch(name):
        def hook(_, args):
            for tensor, names in seen:
                if tensor is args[0]:
                    names.append(name)
                    return
            seen.append((args[0], [name]))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        run(block, hidden, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in seen]


def open_checkpoint(
    model_or_path: str | Path, device: torch.device | str = "cpu", compute_dtype: torch.dtype | None = None
) -> Blocks:
    """
    A checkpoint whose blocks are read when they are needed; all else is loaded.

    Args:
        compute_dtype: what blocks compute in. `None`: the checkpoint's dtype, but float32 in the place of bfloat16
            on a CPU that is slow in it.

    Raises:
        ValueError: no safetensors files, or files whose names are not those of the model; a device that is not there;
            a compute dtype that does not hold the checkpoint's values.
    """
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    config = AutoConfig.from_pretrained(model_or_path)
    files = _tensor_files(str(model_or_path))
    stored = config.dtype or _dtype_of(files)
    if compute_dtype is None:
        compute_dtype = torch.float32 if stored == torch.bfloat16 and slow_in_bfloat16(device) else stored
    elif torch.promote_types(stored, compute_dtype) != compute_dtype:
        raise ValueError(
            f"compute_dtype={compute_dtype} was given for a checkpoint in {stored}, whose values it does not hold; "
            f"give {stored}, torch.float32, or nothing"
        )
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype)
    model.config.dtype = stored
    model.eval()
    blocks = Blocks(model, files, stored)
    inside = tuple(f"{name}." for name in blocks.names)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [name for name in model.state_dict() if name not in parameters]
    if buffers:
        raise ValueError(
            f"{buffers[0]} of {type(model).__name__} is a buffer that is saved, and only parameters are read block by "
            "block; load the model with from_pretrained and pass it instead of the path"
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if config.tie_word_embeddings else set()
    rest = [name for name, _ in model.named_parameters() if not name.startswith(inside) and name not in tied]
    _fill(model, rest, files, device)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return blocks


def _dtype_of(files: dict[str, Path]) -> torch.dtype:
    """Of the first tensor of floating point, for a config that does not say."""
    for name, path in files.items():
        with safe_open(path, "pt") as file:
            part = file.get_slice(name)
            tensor = part[:1] if part.get_shape() else file.get_tensor(name)
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def slow_in_bfloat16(device: torch.device | str) -> bool:
    """Whether this is a CPU without vector instructions beyond AVX2, many times slower in bfloat16 than in float32."""
    return torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def _tensor_files(model_or_path: str) -> dict[str, Path]:
    single = cached_file(model_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        names = [Path(single)]
    else:
        import json

        index = cached_file(model_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        if index is None:
            raise ValueError(f"{model_or_path} has no safetensors files; save the model again with save_pretrained")
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        names = [Path(cached_file(model_or_path, shard)) for shard in shards]
    found = {}
    for path in names:
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _fill(model: nn.Module, names: list[str], files: dict[str, Path], device: torch.device | str) -> None:
    missing = [name for name in names if name not in files]
    if missing:
        raise ValueError(
            f"the checkpoint's files have no tensor named {missing[0]!r} (and {len(missing) - 1} more); load it with "
            "from_pretrained and pass the model instead of the path"
        )
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(files[name], []).append(name)
    for path, inside in by_file.items():
        with safe_open(path, "pt") as file:
            for name in inside:
                tensor = file.get_tensor(name)
                set_module_tensor_to_device(model, name, device, value=tensor.to(model.get_parameter(name).dtype))
