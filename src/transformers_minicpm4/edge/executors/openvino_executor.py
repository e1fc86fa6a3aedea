"""
OpenVINO: one step of the model, exported by `torch.export`, with keys and values as the model's own state.

The step takes any number of tokens, so it is prefill and decode in one; `score` and `generate` are built of them.
Attention is dense.

Shape letters: `S` tokens of a step, `P` tokens before it, `G` key/value heads, `D` head size, `V` vocabulary.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...quantization.bitcpm4.packed_linear import TernaryLinear
from ...quantization.export.checkpoint_files import new_folder, own_tokenizer, quantized_by
from ..runner import check_model
from ..trace import Trace
from .protocol import Executor, Scores


MODEL_FILE = "openvino_model.xml"
TYPES = ("f32", "f16")
CHUNK_TOKENS = 256


def import_openvino():
    """
    The package, which reports each import to its maker where it can: here it cannot.

    Raises:
        ImportError: not installed.
    """
    if "openvino" not in sys.modules:
        # Its own code for a missing reporter does nothing.
        sys.modules.setdefault("openvino_telemetry", None)
    try:
        import openvino
    except ImportError as error:
        raise ImportError("this needs the package `openvino`; install it with: pip install openvino") from error
    return openvino


class OpenVINOExecutor(Executor):
    """
    Args:
        folder: of `export_openvino`.
        context: tokens that a text may have.
        threads: of the processor; default those of PyTorch.
        name, trace: as in `TorchExecutor`.

    Raises:
        ImportError: `openvino` is not installed.
        ValueError: not such a folder.
    """

    calls = frozenset({"generate", "score", "prefill", "decode", "reset"})

    def __init__(
        self,
        folder: str | os.PathLike,
        context: int = 2048,
        threads: int | None = None,
        name: str = "openvino",
        trace: Trace | None = None,
    ):
        openvino = import_openvino()
        folder = Path(folder)
        if not (folder / MODEL_FILE).is_file():
            raise ValueError(f"{folder} has no {MODEL_FILE}; `minicpm4 export --to openvino` writes such a folder.")
        config = AutoConfig.from_pretrained(folder)
        self.name, self.trace = name, trace
        self.vocab_size, self.context = config.vocab_size, min(context, config.max_position_embeddings)
        settings = {
            # By default keys and values are stored in 8 bits, and matrices may be multiplied in bfloat16.
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        }
        try:
            compiled = openvino.Core().compile_model(folder / MODEL_FILE, "CPU", settings)
        except RuntimeError as error:
            raise ValueError(f"OpenVINO does not load {folder} ({error}); export it again.") from error
        self._request = compiled.create_infer_request()
        self._length = 0

    def close(self) -> None:
        super().close()
        self._request = None

    def _held(self) -> int:
        return self._length

    def _step(self, token_ids: list[int]) -> torch.Tensor:
        """Logits after each of the tokens, `[S, V]`, copied: the next step overwrites OpenVINO's own."""
        result = self._request.infer({"token_ids": torch.tensor([token_ids]).numpy()})
        self._length += len(token_ids)
        return torch.from_numpy(result["logits"].copy())[0]

    def _prefill(self, token_ids: list[int]) -> torch.Tensor:
        for start in range(0, len(token_ids), CHUNK_TOKENS):
            logits = self._step(token_ids[start : start + CHUNK_TOKENS])
        return logits[-1]

    def _decode(self, token: int) -> torch.Tensor:
        return self._step([token])[0]

    def _reset(self) -> None:
        self._request.reset_state()
        self._length = 0

    def _score(self, token_ids: list[int], top: int) -> Scores:
        self.reset()
        parts = []
        for start in range(0, len(token_ids) - 1, CHUNK_TOKENS):
            following = token_ids[start + 1 : start + CHUNK_TOKENS + 1]
            parts.append(Scores.of_logits(self._step(token_ids[start : start + len(following)]), following, top))
        self.reset()
        return Scores.joined(parts)


class _Past(DynamicCache):
    """Positions are handed to the model; asking the cache would fix the exported program to one length."""

    def get_seq_length(self, *args, **kwargs):
        return 0


class _Step(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, token_ids, *past):
        """Token ids `[1, S]` and each layer's keys and values `[1, G, P, D]` to logits, and the longer past."""
        cache = _Past()
        for keys, values in zip(past[::2], past[1::2]):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        before, new = past[0].shape[2], token_ids.shape[1]
        positions = torch.arange(before, before + new)[None]
        visible = torch.arange(before + new) <= positions[0][:, None]
        output = self.model(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=visible[None, None],
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, *[states for layer in cache.layers for states in (layer.keys, layer.values)]


def export_openvino(folder: str | os.PathLike, output: str | os.PathLike, type: str = "f32") -> None:
    """
    Write a checkpoint as an OpenVINO model with state, beside its config and tokenizer.

    Args:
        folder: plain or packed ternary checkpoint of a dense decoder (MiniCPM4, Llama, Qwen); ternary layers are
            written as dense ones.
        output: a new folder; it appears when all of it is written.
        type: "f32", or "f16" for weights stored in half precision. Both compute in float32.

    Raises:
        ImportError: `openvino` is not installed.
        FileExistsError: `output` has something in it.
        ValueError: another type or quantization, or a model that keeps more than keys and values.
    """
    if type not in TYPES:
        raise ValueError(f"OpenVINO models are written as {' or '.join(TYPES)}, got {type!r}.")
    openvino = import_openvino()
    method = quantized_by(AutoConfig.from_pretrained(folder))
    if method not in (None, "bitcpm4"):
        raise ValueError(
            f"{folder} is quantized by {method}; the OpenVINO export takes plain and bitcpm4 checkpoints."
        )
    with new_folder(output) as work:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        check_model(model)
        _unpack(model)
        openvino.save_model(_converted(openvino, model), work / MODEL_FILE, compress_to_fp16=type == "f16")
        plain = model.config.to_dict()
        plain.pop("quantization_config", None)
        model.config.__class__.from_dict(plain).save_pretrained(work)
        tokenizer = own_tokenizer(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)


def _converted(openvino, model: PreTrainedModel):
    """The model's step with its past as state: input `token_ids` int64 `[1, S]`, output `logits` `[1, S, V]`."""
    from openvino import passes

    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups, count = config.num_key_value_heads, 2 * config.num_hidden_layers
    past = tuple(torch.zeros(1, groups, 5, size) for _ in range(count))
    # One name for the length of all pasts: with a symbol a layer, tracing 30 layers takes a third longer.
    new, before = torch.export.Dim("new", min=1, max=2**20), torch.export.Dim("before", min=1, max=2**20)
    with torch.no_grad():
        program = torch.export.export(
            _Step(model),
            (torch.zeros(1, 7, dtype=torch.long), *past),
            dynamic_shapes=({1: new}, tuple({2: before} for _ in past)),
            strict=False,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # OpenVINO 2026.4 asks torch 2.13 in an older way
        converted = openvino.convert_model(program)
    before, after = [f"past.{index}" for index in range(count)], [f"present.{index}" for index in range(count)]
    for port, name in zip(converted.inputs, ("token_ids", *before), strict=True):
        port.set_names({name})
    for port, name in zip(converted.outputs, ("logits", *after), strict=True):
        port.set_names({name})
    # The converter leaves the number of heads open, and a state of unknown size begins with none.
    converted.reshape({"token_ids": [1, -1], **{name: [1, groups, -1, size] for name in before}})
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful(dict(zip(before, after))))
    manager.run_passes(converted)
    return converted


def _unpack(model: PreTrainedModel) -> None:
    """Packed ternary layers as dense ones of the same values."""
    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, TernaryLinear)]:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        dense.bias = layer.bias
        model.set_submodule(name, dense)


__all__ = ["OpenVINOExecutor", "export_openvino", "import_openvino"]
