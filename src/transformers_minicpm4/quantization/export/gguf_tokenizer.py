"""
A tokenizer as GGUF metadata: SentencePiece-BPE ("llama": Llama 2, MiniCPM4), byte-level BPE ("gpt2": SmolLM2, Qwen).

Read from the fast tokenizer itself (`tokenizer.json`). llama.cpp (src/llama-vocab.cpp) joins SentencePiece pieces by
score and byte-level ones by merge rank, and knows by the name in `tokenizer.ggml.pre` how text is split beforehand.
"""

from __future__ import annotations

import json
import re
from typing import Any


# How text is split before merging, by the pattern in tokenizer.json. Both differ in the length of runs of digits.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {PATTERN.format("{1,3}"): "llama-bpe", PATTERN.format(""): "qwen2"}
SPECIAL = ("bos", "eos", "unk", "pad")


def add_tokenizer(writer, tokenizer, vocab_size: int, pre: str | None = None) -> None:
    """
    Writes the tokenizer's metadata.

    Args:
        writer: a `gguf.GGUFWriter`.
        tokenizer: a fast tokenizer, or `None` for a file without one ("none": llama.cpp then takes token ids alone).
        vocab_size: rows of the embedding; rows without a token are named `[PAD...]`.
        pre: llama.cpp's name of the splitting before byte-level BPE, where it cannot be told from the tokenizer.

    Raises:
        ValueError: a tokenizer of another kind, a splitting without known name, more tokens than rows.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no tokenizer.json behind it; load the fast tokenizer with AutoTokenizer."
        )
    stored = json.loads(backend.to_str())
    model = stored["model"]
    kind = _kind(stored)
    tokens, types = _tokens(stored, vocab_size, tokenizer.unk_token_id)
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        writer.add_tokenizer_pre(pre or _pre(stored.get("pre_tokenizer")))
    else:
        writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if kind == "gpt2":
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_token_types(types)
        writer.add_add_space_prefix(_space_prefix(stored))
    for name in SPECIAL:
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    # What the tokenizer does to a text, rather than what its config says.
    ids = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_add_bos_token(bos is not None and ids[:1] == [bos])
    writer.add_add_eos_token(eos is not None and len(ids) > 1 and ids[-1:] == [eos])
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _kind(stored: dict[str, Any]) -> str:
    model = stored["model"]
    if model["type"] == "BPE":
        if model.get("byte_fallback"):
            return "llama"
        if "ByteLevel" in [part["type"] for part in _parts(stored.get("pre_tokenizer"))]:
            return "gpt2"
    raise ValueError(
        f"a {model['type']} tokenizer is neither SentencePiece-BPE with byte fallback nor byte-level BPE, the two "
        "kinds written here; convert this model with llama.cpp's own convert_hf_to_gguf.py."
    )


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _pre(pre_tokenizer: dict[str, Any] | None) -> str:
    parts = _parts(pre_tokenizer)
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = PATTERNS.get(parts[0]["pattern"].get("Regex"))
        if name:
            return name
    raise ValueError(
        f"how this tokenizer splits text ({' + '.join(kinds)}) has no name known here; pass llama.cpp's as "
        "tokenizer_pre= (see get_vocab_base_pre in its conversion/base.py), such as 'llama-bpe', 'qwen2' or 'smollm'."
    )


def _tokens(stored: dict[str, Any], vocab_size: int, unknown: int | None) -> tuple[list[str], list[int]]:
    """Texts and types (`gguf.TokenType`) of all ids."""
    from gguf import TokenType

    model = stored["model"]
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for index, token in tokens.items():
        if model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[index] = TokenType.BYTE
    for added in stored["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if unknown is not None and model.get("byte_fallback"):  # SentencePiece's own kind of token
        types[unknown] = TokenType.UNKNOWN
    if max(tokens) >= vocab_size:
        raise ValueError(
            f"the tokenizer has token {max(tokens)} and the embedding {vocab_size} rows; give the model's own "
            "tokenizer, or resize the embeddings."
        )
    ids = range(vocab_size)
    return [tokens.get(i, f"[PAD{i}]") for i in ids], [int(types.get(i, TokenType.UNUSED)) for i in ids]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece's own order: minus the rank of the merge that makes a piece; what no merge makes comes last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _space_prefix(stored: dict[str, Any]) -> bool:
    normalizer = stored.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    return any(
        part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        for part in _parts(stored.get("pre_tokenizer"))
    )
