"""The `sparse_config` of a MiniCPM4 checkpoint, validated."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any


# What a checkpoint's `sparse_config` must name. `dense_switch`, `implementation` and `kernel` are ours and optional.
CHECKPOINT_FIELDS = (
    "kernel_size",
    "kernel_stride",
    "init_blocks",
    "block_size",
    "window_size",
    "topk",
    "use_nope",
    "dense_len",
)

# What `implementation` may say.
IMPLEMENTATION_CHOICES = ("auto", "kernel", "blockwise", "reference")

# Coarse means only estimate the softmax normaliser, so they may be this much wider than the fine ones (MiniCPM4.1).
COARSE_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class InfLLMv2Config:
    r"""
    Which earlier tokens a query reads under InfLLM v2 (MiniCPM4, arXiv 2506.07900, section 2.1; InfLLM-V2,
    arXiv 2509.24663). The defaults are those of the released checkpoints.

    Args:
        kernel_size (`int`, *optional*, defaults to 32):
            Tokens averaged into one compressed key.
        kernel_stride (`int`, *optional*, defaults to 16):
            Tokens between the starts of two compressed keys.
        init_blocks (`int`, *optional*, defaults to 1):
            Blocks at the start of the sequence that every query reads. May be 0.
        block_size (`int`, *optional*, defaults to 64):
            Tokens a block; a multiple of `kernel_stride`.
        window_size (`int`, *optional*, defaults to 2048):
            Tokens before the query's own block that are always read, rounded down to whole blocks. May be 0: the
            query's own block is always read.
        topk (`int`, *optional*, defaults to 64):
            Blocks read beside the window; the initial blocks and the query's own block count among them.
        use_nope (`bool`, *optional*, defaults to `False`):
            Select blocks with the un-rotated queries and keys (attention itself always uses the rotated ones).
        dense_len (`int`, *optional*, defaults to 8192):
            Length in tokens below which attention is dense. -1: always sparse.
        dense_switch (`str`, *optional*, defaults to `"position"`):
            `"position"`: a query at position p is dense iff p + 1 < dense_len, so that what a token reads never
            depends on how the sequence was cut into calls. `"call"`: the whole call is dense iff its longest row is
            shorter than `dense_len`, as in the released code.
        implementation (`str`, *optional*, defaults to `"auto"`):
            `"kernel"` (an error where it cannot run), `"blockwise"`, `"reference"`, or `"auto"`: the kernel if one is
            named and can run, else blockwise. The environment variable `INFLLM_V2_IMPLEMENTATION` goes before it.
        kernel (`str`, *optional*):
            Hub repository of the kernel, `"owner/repo"` or `"owner/repo@revision"`. The environment variable
            `INFLLM_V2_KERNEL` goes before it. Never a folder: a checkpoint must not choose code on your disk.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field, or two together, have a value the rule does not admit.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    use_nope: bool = False
    dense_len: int = 8192
    dense_switch: str = "position"
    implementation: str = "auto"
    kernel: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wanted = {"int": int, "bool": bool, "str": str, "str | None": (str, type(None))}[field.type]
            if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
                raise TypeError(
                    f"sparse_config: {field.name} must be {field.type}, got {value!r} ({type(value).__name__})."
                )
        for name, low in (("kernel_size", 1), ("kernel_stride", 1), ("block_size", 1), ("topk", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"sparse_config: {name} must be at least {low}, got {getattr(self, name)}.")
        for name in ("init_blocks", "window_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"sparse_config: {name} must be 0 or more, got {getattr(self, name)}.")
        if self.kernel_size < self.kernel_stride:
            raise ValueError(
                f"sparse_config: kernel_size ({self.kernel_size}) must be at least kernel_stride "
                f"({self.kernel_stride}), or some tokens are in no compressed key."
            )
        if self.block_size % self.kernel_stride:
            raise ValueError(
                f"sparse_config: block_size ({self.block_size}) must be a multiple of kernel_stride "
                f"({self.kernel_stride})."
            )
        if self.topk < self.init_blocks + 1:
            raise ValueError(
                f"sparse_config: topk ({self.topk}) must be at least init_blocks + 1 ({self.init_blocks + 1}): the "
                "initial blocks and the query's own block count among the top-k. Raise topk or lower init_blocks."
            )
        if self.dense_len < -1:
            raise ValueError(
                f"sparse_config: dense_len must be -1 (always sparse) or 0 or more, got {self.dense_len}."
            )
        if self.dense_switch not in ("position", "call"):
            raise ValueError(f"sparse_config: dense_switch must be 'position' or 'call', got {self.dense_switch!r}.")
        if self.implementation not in IMPLEMENTATION_CHOICES:
            raise ValueError(
                f"sparse_config: implementation must be one of {', '.join(IMPLEMENTATION_CHOICES)}, got "
                f"{self.implementation!r}."
            )
        if self.kernel is not None and not re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", self.kernel):
            raise ValueError(
                f"sparse_config: kernel must name a Hub repository, 'owner/repo' or 'owner/repo@revision', got "
                f"{self.kernel!r}. A local folder can only be named in the environment variable INFLLM_V2_KERNEL."
            )

    @property
    def window_blocks(self) -> int:
        """Whole blocks before the query's own that are always read."""
        return self.window_size // self.block_size

    @property
    def selected_blocks(self) -> int:
        """Most blocks one query reads, forced ones included (`topk + window_blocks`)."""
        return self.topk + self.window_blocks

    def windows(self, coarse: bool = False) -> tuple[int, int]:
        """(size, stride) in tokens of the fine or the coarse compressed keys."""
        ratio = COARSE_RATIO if coarse else 1
        return self.kernel_size * ratio, self.kernel_stride * ratio

    def first_sparse_position(self, length: int) -> int:
        """
        First position of a row whose query has blocks to choose from; all queries before it read everything they may.

        Args:
            length (`int`): tokens of the longest row of the call; only `dense_switch="call"` looks at it.
        """
        covered = self.selected_blocks * self.block_size
        if self.dense_len == -1:
            return covered
        if self.dense_switch == "call":
            return length if length < self.dense_len else covered
        return max(self.dense_len - 1, covered)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; who computes (`implementation`, `kernel`) only where it was set."""
        fields = dataclasses.asdict(self)
        for name in ("implementation", "kernel"):
            if fields[name] == getattr(InfLLMv2Config, name):
                del fields[name]
        return fields

    @classmethod
    def from_dict(cls, sparse_config: dict[str, Any]) -> InfLLMv2Config:
        """
        Read a checkpoint's `sparse_config`. All documented fields must be there: a half-written entry would change its
        meaning with our defaults.

        Raises:
            ValueError: a field is missing, unknown, or has a value the rule does not admit.
            TypeError: not a mapping, or a field has the wrong type.
        """
        if isinstance(sparse_config, cls):
            return sparse_config
        if not isinstance(sparse_config, dict):
            raise TypeError(
                f"sparse_config must be a dict with the fields {', '.join(CHECKPOINT_FIELDS)}, or an InfLLMv2Config; "
                f"got {type(sparse_config).__name__}."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(sparse_config) - known)
        if unknown:
            raise ValueError(
                f"sparse_config has unknown field(s) {', '.join(unknown)}; allowed are {', '.join(sorted(known))}."
            )
        missing = [name for name in CHECKPOINT_FIELDS if name not in sparse_config]
        if missing:
            released = {name: getattr(cls(), name) for name in missing}
            raise ValueError(
                f"sparse_config lacks {', '.join(missing)}. Write every field (released values: {released}), or pass "
                "InfLLMv2Config(...), which fills them in."
            )
        return cls(**sparse_config)
