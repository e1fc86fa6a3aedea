"""
The Marlin layout of CPM.cu, from a GPTQ folder, on CPU.

CPM.cu (github.com/OpenBMB/CPM.cu, scripts/model_convert/gptq2marlin.py) reads 4-bit symmetric layers of group size 128
whose codes lie as the tensor cores want them: q/k/v and gate/up joined along outputs, tiles of 16 inputs x 64 outputs,
each of the tile's 128 words holding 8 codes of one lane's two fragments. Zero points and `g_idx` are not stored.

Shape letters: `O` outputs, `I` inputs, `Q` groups of inputs.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..packing import pack_codes, unpack_codes
from ..quantized_weight import QuantizedWeight
from .checkpoint_files import new_folder, read_json
from .gptq import GPTQWeights, read_gptq, read_gptq_config


# What the engine takes for granted; the names are those of the GPTQ config.
REQUIRED = {
    "bits": 4,
    "checkpoint_format": "gptq",
    "desc_act": False,
    "group_size": 128,
    "lm_head": False,
    "static_groups": True,
    "sym": True,
}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

# An input within its 16 is (half, lane row, low bit), an output within its 64 is (subtile, block, lane column): each
# of 32 lanes (column, row) holds 4 subtiles' words, and a word's nibbles count (low bit, block, half), lowest first.
ROWS, COLUMNS = (2, 4, 2), (4, 2, 8)


def marlin_codes(codes: torch.Tensor) -> torch.Tensor:
    """
    Packs 4-bit codes in Marlin's order.

    Args:
        codes: uint8 `[I, O]`, inputs first; `I % 16 == 0`, `O % 64 == 0`.

    Returns:
        int32 `[I / 16, 2 * O]`.
    """
    inputs, outputs = codes.shape
    tiles = codes.reshape(inputs // 16, *ROWS, outputs // 64, *COLUMNS)
    #        0 tile row, 1 half, 2 lane row, 3 low, 4 tile column, 5 subtile, 6 block, 7 lane column
    words = tiles.permute(0, 4, 7, 2, 5, 3, 6, 1).reshape(inputs // 16, 2 * outputs, 8)
    return pack_codes(words, 4, dim=-1).squeeze(-1)


def unpack_marlin_codes(words: torch.Tensor) -> torch.Tensor:
    """The inverse of [`marlin_codes`]: int32 `[I / 16, 2 * O]` to uint8 `[I, O]`."""
    rows, outputs = words.shape[0], words.shape[1] // 2
    codes = unpack_codes(words.unsqueeze(-1), 4, dim=-1)
    tiles = codes.reshape(rows, outputs // 64, 8, 4, 4, 2, 2, 2)
    return tiles.permute(0, 7, 3, 5, 1, 4, 6, 2).reshape(rows * 16, outputs)


def marlin_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales `[Q, O]` in Marlin's order: each run of 64 outputs as an 8 x 8 square, transposed. Its own inverse."""
    groups, outputs = scales.shape
    return scales.reshape(groups, outputs // 64, 8, 8).transpose(-1, -2).reshape(groups, outputs).contiguous()


def gptq_to_marlin(source: str | os.PathLike, folder: str | os.PathLike) -> None:
    """
    Writes a GPTQ folder as CPM.cu reads it: `model_gptq.safetensors` beside the source's config and tokenizer files.

    Args:
        source: a GPTQ checkpoint with the settings of `REQUIRED`; sharded is fine.
        folder: new or empty.

    Raises:
        FileExistsError: the folder has something in it.
        ValueError: a setting, a size or a layer that CPM.cu does not take; names it and what is allowed.
    """
    source = Path(source)
    _check_config(source)
    weights = read_gptq(source)
    layers = read_json(source / "config.json").get("num_hidden_layers")
    tensors: dict[str, torch.Tensor] = {}
    with new_folder(folder) as work:
        for name in weights.plain():
            tensors[name] = weights.tensors[name]
        done: set[str] = set()
        for name in weights:
            stem, _, kind = name.rpartition(".")
            fused = next((new for new, parts in FUSED.items() if kind in parts), kind)
            if f"{stem}.{fused}" in done:
                continue
            done.add(f"{stem}.{fused}")
            parts = [f"{stem}.{part}" for part in FUSED.get(fused, (kind,))]
            codes, scales = _joined(weights, parts)
            tensors[f"{stem}.{fused}.qweight"] = marlin_codes(codes)
            tensors[f"{stem}.{fused}.scales"] = marlin_scales(scales)
        _check_layers(source, done, layers)
        save_file(tensors, work / "model_gptq.safetensors", metadata={"format": "pt"})
        for file in sorted(source.iterdir()):
            if file.is_file() and ".safetensors" not in file.name and file.suffix != ".bin":
                shutil.copyfile(file, work / file.name)
        if (source / "prefix_cache").is_dir():
            shutil.copytree(source / "prefix_cache", work / "prefix_cache")


def _check_config(source: Path) -> None:
    stated = read_gptq_config(source)
    for key, allowed in REQUIRED.items():
        given = stated.get(key, "nothing")
        if given != allowed:
            raise ValueError(
                f"{source}: CPM.cu's Marlin kernels need {key} = {allowed!r} in the quantization config, it says "
                f"{given!r}. Quantize with that setting, or use another engine."
            )


def _joined(weights: GPTQWeights, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 `[I, O]` and scales float16 `[Q, O]` of layers that CPM.cu has as one."""
    parts: list[QuantizedWeight] = []
    for name in names:
        if name not in weights.names:
            raise ValueError(f"{weights.folder}: CPM.cu joins {' and '.join(names)}, and {name} is not quantized.")
        weight = weights[name]
        if not weight.symmetric:
            raise ValueError(
                f"{name} has zero points other than 8, which CPM.cu does not read; quantize with sym=True."
            )
        if weight.g_idx is not None:
            raise ValueError(f"{name} has an activation order in g_idx, which CPM.cu ignores; use static groups.")
        if weight.bias is not None:
            raise ValueError(f"{name} has a bias, which CPM.cu has no place for.")
        parts.append(weight)
    codes = torch.cat([weight.codes for weight in parts]).T
    inputs, outputs = codes.shape
    if inputs % 128 or outputs % 64:
        raise ValueError(
            f"{' + '.join(names)} has {inputs} inputs and {outputs} outputs; Marlin needs inputs divisible by 128 and "
            "outputs divisible by 64."
        )
    return codes, torch.cat([weight.scales for weight in parts]).T.to(torch.float16)


def _check_layers(source: Path, done: set[str], layers: int | None) -> None:
    for number in range(layers or 0):
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            if f"model.layers.{number}.{name}" not in done:
                raise ValueError(
                    f"{source}: model.layers.{number}.{name} is not quantized, and CPM.cu wants every linear layer of "
                    "every block in 4 bits."
                )
