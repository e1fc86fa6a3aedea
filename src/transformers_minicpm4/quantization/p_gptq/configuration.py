"""What to quantize and how: `PGPTQConfig`, for `from_pretrained(..., quantization_config=...)` and the quantizer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin


QUANT_METHOD = "p_gptq"


@dataclass(kw_only=True)
class PGPTQConfig(QuantizationConfigMixin):
    """
    Prefix-aware GPTQ (MiniCPM4, arXiv 2506.07900, 4.1.2).

    Args:
        bits: width of a weight: 4, or 2, 3, 8. Marlin and most engines want 4 or 8.
        group_size: inputs that share a scale; a divisor of every layer's inputs, or -1 for one scale an output.
        sym: symmetric steps around 0; Marlin wants it.
        skip_first: real tokens at the start of each calibration row that count only `prefix_weight`. By default those
            of `prefix_ids`; 4, the paper's number, where there are none.
        prefix_weight: 0 leaves them out (the paper), 1 is plain GPTQ. By default 0 with `prefix_ids` and 1 without:
            positions that no calibration row speaks for must not be computed by the quantized model either
            (docs/p_gptq.md has what happens).
        prefix_ids: a constant prefix of every prompt. Its keys and values in full precision are stored with the
            checkpoint (`prefix_cache/`), and every calibration row begins with it. `None` stores nothing.
        smoothing: AWQ's scaling first (S-P-GPTQ), for Llama-like blocks.
        desc_act: columns by falling Hessian diagonal with static groups; files stay in order. Not with
            `act_group_aware`.
        act_group_aware: that order within and among groups.
        scale_search: choose scales by their error instead of by the range alone.
        damp_percent: share of the Hessian's mean diagonal added to it; raised where needed.
        modules_in_block_to_quantize: names within a block, as lists of layers that read one input. By default all
            linear layers, grouped by watching which read the same tensor.
        dataset: calibration data, see `calibration_rows`; never written into a checkpoint.
        tokenizer: for texts; a tokenizer, a folder or a Hub id. Never written either.
        num_samples: calibration rows.
        max_length: their tokens.
        batch_size: rows that run together.
        seed: which places become rows, of a text that is read until it gives twice the rows needed.
        text_column: where a dataset's row has its text.
        checkpoint_format: "gptq" (what most readers expect) or "gptq_v2".
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    skip_first: int | None = None
    prefix_weight: float | None = None
    prefix_ids: list[int] | None = None
    smoothing: bool = False
    desc_act: bool = False
    act_group_aware: bool = False
    scale_search: bool = True
    damp_percent: float = 0.01
    modules_in_block_to_quantize: list[list[str]] | None = None
    dataset: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    num_samples: int = 128
    max_length: int = 2048
    batch_size: int = 8
    seed: int = 0
    text_column: str = "text"
    checkpoint_format: str = "gptq"
    quant_method: str = QUANT_METHOD

    def __post_init__(self):
        self._check("quant_method", self.quant_method == QUANT_METHOD, f"{QUANT_METHOD!r}")
        self._check("bits", self.bits in (2, 3, 4, 8), "2, 3, 4 or 8")
        self._check("group_size", self.group_size == -1 or self.group_size >= 8, "-1 or at least 8")
        if self.prefix_ids is not None:
            if not isinstance(self.prefix_ids, list | tuple) or not all(
                isinstance(token, int) and token >= 0 for token in self.prefix_ids
            ):
                raise ValueError(f"prefix_ids={self.prefix_ids!r} was given; it is a list of token ids, or None")
            if not self.prefix_ids:
                raise ValueError("prefix_ids is empty; give the tokens, or None for no stored prefix")
            self.prefix_ids = list(self.prefix_ids)
        # What was left to its default is chosen anew where a copy changes what it depends on.
        self._defaulted = {name: None for name in ("skip_first", "prefix_weight") if getattr(self, name) is None}
        groups = self.modules_in_block_to_quantize
        if groups is not None and any(isinstance(group, str) for group in groups):
            raise ValueError(
                f"modules_in_block_to_quantize={groups!r} was given; it is a list of lists of layers that read one "
                "input, such as [['self_attn.q_proj', 'self_attn.k_proj'], ['mlp.down_proj']]"
            )
        if self.skip_first is None:
            self.skip_first = len(self.prefix_ids) if self.prefix_ids else 4
        if self.prefix_weight is None:
            self.prefix_weight = 0.0 if self.prefix_ids else 1.0
        self._check("skip_first", isinstance(self.skip_first, int) and self.skip_first >= 0, "0 or more tokens")
        self._check("prefix_weight", 0 <= self.prefix_weight <= 1, "from 0 (leave out) to 1 (plain GPTQ)")
        self._check("damp_percent", 0 < self.damp_percent < 1, "above 0 and below 1")
        self._check("checkpoint_format", self.checkpoint_format in ("gptq", "gptq_v2"), "'gptq' or 'gptq_v2'")
        self._check("batch_size", self.batch_size >= 1, "at least 1")
        if self.desc_act and self.act_group_aware:
            raise ValueError("desc_act and act_group_aware both choose the order of columns; set one of them")
        if not self.sym and self.checkpoint_format == "gptq":
            # Version 1 stores each zero point less one: 0 would wrap around.
            raise ValueError("sym=False needs checkpoint_format='gptq_v2': version 1 cannot hold a zero point of 0")

    def _check(self, name: str, good: bool, allowed: str) -> None:
        if not good:
            raise ValueError(f"{name}={getattr(self, name)!r} was given; it is {allowed}")

    @classmethod
    def minicpm4(cls, **changes: Any) -> PGPTQConfig:
        """
        The form of the released INT4 MiniCPM4 checkpoints, ready for CPM.cu's Marlin converter: 4 bits, groups of 128,
        symmetric, columns in order, 4 positions left out and 1,024 rows as in the paper, of 512 tokens (ours; the
        paper does not say), `<s>` as stored prefix.
        """
        paper = {"bits": 4, "group_size": 128, "skip_first": 4, "num_samples": 1024}
        return cls(**{**paper, "max_length": 512, "prefix_ids": [1], **changes})

    def changed(self, **changes: Any) -> PGPTQConfig:
        """A copy with other fields; `skip_first` and `prefix_weight`, where never given, follow them."""
        return replace(self, **{**self._defaulted, **changes})

    @property
    def method(self) -> str:
        """What the paper calls these settings: GPTQ, P-GPTQ, S-GPTQ or S-P-GPTQ."""
        plain = self.skip_first == 0 or self.prefix_weight == 1
        return ("S-" if self.smoothing else "") + ("GPTQ" if plain else "P-GPTQ")

    def to_dict(self) -> dict[str, Any]:
        """All fields but the data: a dataset in a config would end up in config.json."""
        names = [entry.name for entry in fields(self) if entry.name not in ("dataset", "tokenizer")]
        return {name: getattr(self, name) for name in names}
