"""
llama.cpp in this process (package `xllamacpp`), for GGUF files: `generate` and `score`. And the export to them.

`score` asks the server token by token, which its cache of the prompt makes one evaluation each. The token wanted is
forced by a bias; the log-probabilities reported are those of the logits before any bias. llama.cpp attends densely.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ...quantization.quantized_weight import QuantizedWeight
from ..trace import Trace
from .protocol import Executor, Scores


FLOAT_TYPES = ("f32", "f16", "bf16")
TYPES = ("auto", *FLOAT_TYPES, "q8_0", "q4_0", "q4_1", "tq1_0", "tq2_0")
# Far above any logit.
FORCING = 1e5
# llama.cpp rounds the slots of its cache up to it.
SLOT_MULTIPLE = 256


class GGUFExecutor(Executor):
    """
    Args:
        path: a GGUF file with a tokenizer (the server turns what it samples into text).
        context: tokens that a text may have. Where the model's LongRoPE factors are those of long texts, more slots
            may be taken: llama.cpp chooses the factors by them.
        exact: keys and values in float32 and no flash attention, whose CPU form rounds to float16; for comparisons.
            Without it llama.cpp's defaults.
        threads: of the processor; default those of PyTorch.
        name, trace: as in `TorchExecutor`.

    Raises:
        ImportError: `xllamacpp` or `gguf` is not installed.
        ValueError: no GGUF file, one without a tokenizer, or a longer context than the model's; llama.cpp's refusal.

    llama.cpp's server opens a port of 127.0.0.1 while it lives; nothing here talks to it.
    """

    calls = frozenset({"generate", "score"})

    def __init__(
        self,
        path: str | os.PathLike,
        context: int = 2048,
        exact: bool = True,
        threads: int | None = None,
        name: str = "gguf",
        trace: Trace | None = None,
    ):
        try:
            import gguf  # noqa: F401
            import xllamacpp
        except ImportError as error:
            raise ImportError(
                "running GGUF files needs the packages `xllamacpp` and `gguf`; install them with: "
                "pip install xllamacpp gguf"
            ) from error
        self.name, self.trace = name, trace
        facts = _facts(Path(path))
        self.vocab_size, self._plain_token = facts["vocab_size"], facts["plain_token"]
        self.context = min(context, facts["context"])
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        long_from, slots = facts["long_from"], self.context
        if long_from is not None and facts["context"] > long_from:
            slots = max(slots, long_from + 1)
        elif long_from is not None:
            # The short factors: as many slots as llama.cpp, which rounds up, does not take for a long text.
            slots = self.context = min(slots, long_from // SLOT_MULTIPLE * SLOT_MULTIPLE)
            if slots == 0:
                raise ValueError(
                    f"{path} has LongRoPE factors for texts below {long_from} tokens, which llama.cpp, with "
                    f"{SLOT_MULTIPLE} slots or more, does not take; raise max_position_embeddings."
                )
        parameters.n_ctx = slots
        parameters.n_parallel, parameters.n_gpu_layers = 1, 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        parameters.warmup, parameters.verbosity, parameters.cache_ram_mib = False, -1, 0
        parameters.fit_params = False
        if exact:
            parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise ValueError(
                f"llama.cpp does not load {path} ({error}); is it a whole file, of an architecture it knows?"
            ) from error
        # A server that is closed before its loop began waits for ever (xllamacpp 2026.10): one answer, and it runs.
        self._ask_plainly([self._plain_token], 1)

    def close(self) -> None:
        super().close()
        self._server = None

    def _ask(self, prefix: list[int], token: int, top: int) -> dict | None:
        """
        What follows `prefix`: the forced `token` with its log-probability and the `top` likeliest; `None` where the
        server keeps silent, as it does about tokens that end within a character.
        """
        asked = {
            "prompt": prefix,
            "n_predict": 1,
            "n_probs": top,
            "temperature": 0.0,
            "cache_prompt": True,
            "logit_bias": [[token, FORCING]],
        }
        with self._span("evaluate", position=len(prefix)):
            answer = self._server.handle_completions(asked)
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp's server refused: {answer}")
        found = (answer["choices"][0].get("logprobs") or {}).get("content") or []
        return found[0] if found and found[0]["id"] == token else None

    def _ask_plainly(self, prefix: list[int], top: int) -> list[dict]:
        found = self._ask(prefix, self._plain_token, top)
        if found is None:
            raise RuntimeError(f"llama.cpp's server did not report log-probabilities after {len(prefix)} tokens.")
        return found["top_logprobs"]

    def _score(self, token_ids: list[int], top: int) -> Scores:
        given, rows = [], []
        for length in range(1, len(token_ids)):
            prefix, token = token_ids[:length], token_ids[length]
            found = self._ask(prefix, token, top)
            if found is None:
                candidates = self._ask_plainly(prefix, self.vocab_size)
                given.append(next(entry["logprob"] for entry in candidates if entry["id"] == token))
                rows.append(candidates[:top])
            else:
                given.append(found["logprob"])
                rows.append(found["top_logprobs"])
        return Scores(
            torch.tensor(given, dtype=torch.float64),
            torch.tensor([[entry["id"] for entry in row] for row in rows]),
            torch.tensor([[entry["logprob"] for entry in row] for row in rows], dtype=torch.float64),
        )

    def _generate(self, token_ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        # Token by token too: of an answer in one go the server does not give the ids within a character.
        made: list[int] = []
        while len(made) < max_new_tokens and not (made and made[-1] in stop_ids):
            made.append(self._ask_plainly(token_ids + made, 1)[0]["id"])
        return made


def _facts(path: Path) -> dict:
    """`vocab_size`, `context`, `long_from` (LongRoPE's original length, or `None`) and `plain_token` of a file."""
    import gguf

    if not path.is_file():
        raise ValueError(f"there is no file {path}; `minicpm4 export --to gguf` writes one.")
    try:
        fields = gguf.GGUFReader(path).fields
        arch = fields["general.architecture"].contents()
        context = int(fields[f"{arch}.context_length"].contents())
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a whole GGUF model: cut off, or something else; export it again.") from error
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise ValueError(
            f"{path} has no tokenizer, and llama.cpp's server needs one; export the model from a folder that has it."
        )
    kinds = fields.get("tokenizer.ggml.token_type")
    plain = None
    for index, data in enumerate(tokens.data):
        text = bytes(tokens.parts[data]).decode("utf-8", "replace")
        if text.isascii() and text.isalnum() and (kinds is None or int(kinds.parts[kinds.data[index]][0]) == 1):
            plain = index
            break
    if plain is None:
        raise ValueError(f"the tokenizer in {path} has no token of plain letters, by which the server could be asked.")
    original = fields.get(f"{arch}.rope.scaling.original_context_length")
    return {
        "vocab_size": len(tokens.data),
        "context": context,
        "long_from": None if original is None else int(original.contents()),
        "plain_token": plain,
    }


class _EightBits(Mapping):
    """The linear layers of a model's blocks rounded to 8 bits when asked for: 32 inputs share a float16 scale."""

    def __init__(self, model):
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in name
        }

    def __getitem__(self, name: str) -> QuantizedWeight:
        layer = self.layers[name]
        weight = layer.weight.detach().float()
        if weight.shape[1] % 32:
            raise ValueError(f"{name} has {weight.shape[1]} inputs; q8_0 wants a multiple of 32. Use f16.")
        groups = weight.reshape(len(weight), -1, 32)
        scales = (groups.abs().amax(-1) / 127).half().float()
        # Also where the scale was rounded down, or to zero, what is largest stays within 8 bits.
        steps = (groups / scales.clamp_min(torch.finfo(torch.float16).tiny)[..., None]).round().clamp(-127, 127)
        bias = None if layer.bias is None else layer.bias.detach()
        zeros = torch.full(scales.shape, 128, dtype=torch.uint8)
        return QuantizedWeight((steps + 128).to(torch.uint8).view_as(weight), scales, zeros, 8, 32, True, bias=bias)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def export_gguf(
    folder: str | os.PathLike, path: str | os.PathLike, type: str = "auto", tokenizer_pre: str | None = None
) -> dict[str, str]:
    """
    Write a checkpoint as GGUF, MiniCPM4's three scales and LongRoPE's factors included.

    Args:
        folder: plain, packed ternary (BitCPM4) or GPTQ checkpoint, with its tokenizer.
        path: a new file; it appears when all of it is written.
        type: of the linear layers of the blocks. "auto" as they are (quantized ones: the smallest exact type).
            "f32", "f16", "bf16" for all matrices. "q8_0" rounds a plain checkpoint's layers. "tq1_0", "tq2_0", "q4_0",
            "q4_1" only where they hold quantized layers exactly. Embedding and head of "q8_0" and smaller stay as
            they are.
        tokenizer_pre: see `save_gguf`.

    Returns:
        each tensor's type, by its name in the file.

    Raises:
        FileExistsError: something is at `path`.
        ValueError: a type that is none, or that the checkpoint cannot be written in.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from ...quantization.bitcpm4.quantizer import PackedWeights
    from ...quantization.export.checkpoint_files import own_tokenizer, quantized_by
    from ...quantization.export.gguf import gptq_to_gguf, save_gguf

    if type not in TYPES:
        raise ValueError(f"type is one of {', '.join(TYPES)}, got {type!r}.")
    if Path(path).exists():
        raise FileExistsError(f"{path} is there already; give another name, or remove it first.")
    options = {
        "quantization": "auto" if type in ("auto", "bf16") else type.upper(),
        "float_type": type.upper() if type in FLOAT_TYPES else "auto",
        "tokenizer_pre": tokenizer_pre,
    }
    method = quantized_by(AutoConfig.from_pretrained(folder))
    if method not in (None, "gptq", "bitcpm4"):
        raise ValueError(f"{folder} is quantized by {method}; gguf takes plain, gptq and bitcpm4 checkpoints.")
    if type == "bf16" and method is not None:
        raise ValueError("bf16 would round quantized layers; use f16, f32 or auto.")
    if method == "gptq":
        return gptq_to_gguf(folder, path, **options)
    if method is None and type not in ("auto", "q8_0", *FLOAT_TYPES):
        raise ValueError(
            f"{folder} is not quantized, and {type} is written only where it changes no value; quantize or ternarize "
            "it first, or use q8_0, f16 or f32."
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if method == "bitcpm4":
        weights = PackedWeights(model)
    else:
        weights = _EightBits(model) if type == "q8_0" else None
    return save_gguf(path, model, weights, tokenizer=own_tokenizer(folder), **options)


__all__ = ["TYPES", "GGUFExecutor", "export_gguf"]
