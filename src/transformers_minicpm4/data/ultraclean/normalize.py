"""UltraClean's text preparation for fastText, in the order of the released inference script.

The script (openbmb/Ultra-FineWeb-classifier, `scripts/local_scripts/infer_folder.py`) and the paper (arXiv 2505.05427,
section 3.3) order the steps differently. A classifier must see the words it was trained on, so the script wins:

1. runs of three or more `"\\n"` become two,
2. lower case,
3. NFKD without nonspacing marks (category Mn),
4. tokenizer ids without special tokens, every id decoded alone, joined by a space,
5. `"\\n"`, `"\\r"`, `"\\t"` become the two characters backslash and n, r, t; runs of spaces become one; strip.

Lower case comes before NFKD, so a TM sign leaves an upper-case "TM". Doing it all twice changes words again.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from itertools import groupby
from weakref import WeakKeyDictionary

import regex


# The paper's tokenizer. Loaded only where somebody asks for it by this name.
DEFAULT_TOKENIZER = "deepseek-ai/DeepSeek-V2"

_NEWLINES = re.compile(r"\n{3,}")
# Code points below are in NFKD form as they are and no marks.
_FIRST_MARK = "\u0300"
_DECODED: WeakKeyDictionary = WeakKeyDictionary()
# All characters whose decomposition begins with a combining class are marks, or these two of half-width kana.
_MANY_MARKS = regex.compile(r"[\p{M}\uff9e\uff9f]{31,}", regex.V1)


def unicode_form(form: str, text: str) -> str:
    """`unicodedata.normalize`, which sorts a run of marks in quadratic time: long runs come to it sorted."""
    if text.isascii():
        return text
    return unicodedata.normalize(form, _MANY_MARKS.sub(lambda run: _in_canonical_order(form, run[0]), text))


def _in_canonical_order(form, marks):
    """Marks decomposed one by one, and those between two of class 0 stably sorted by class, as Unicode defines it."""
    decomposition = "NFKD" if "K" in form else "NFD"
    marks = "".join(unicodedata.normalize(decomposition, mark) for mark in marks)
    pieces = groupby(marks, key=lambda mark: unicodedata.combining(mark) > 0)
    return "".join("".join(sorted(piece, key=unicodedata.combining) if moves else piece) for moves, piece in pieces)


def normalize(text: str) -> str:
    """
    Steps 1 to 3: blank lines, case, compatibility decomposition without marks.

    Han ideographs stay; full-width forms become ASCII, Hangul falls into jamo, Japanese voicing marks and Thai or
    Hindi marks go. `"\\r\\n"` and lines of spaces count as no blank lines.

    Args:
        text (`str`): One document.
    """
    if "\n\n\n" in text:
        text = _NEWLINES.sub("\n\n", text)
    text = text.lower()
    if text.isascii():
        return text
    text = unicode_form("NFKD", text)
    # Few distinct characters, many characters: asking for each one's category once is the fast way.
    marks = [c for c in set(text) if c >= _FIRST_MARK and unicodedata.category(c) == "Mn"]
    return text.translate({ord(mark): None for mark in marks}) if marks else text


def to_words(text: str, tokenizer=None) -> str:
    """
    Steps 1 to 5: the line of words that fastText reads.

    Args:
        text (`str`): One document.
        tokenizer (*optional*): As `load_tokenizer` takes it. `None` leaves out step 4: words end at white space.

    Raises:
        `ValueError`: with a tokenizer, a text with a lone surrogate.
    """
    return to_words_batch([text], tokenizer)[0]


def to_words_batch(texts: list[str], tokenizer=None) -> list[str]:
    """
    `to_words` of many texts at once: the same words, tokenized as one batch and each distinct id decoded once.

    Args:
        texts (`list[str]`): Documents.
        tokenizer (*optional*): As `load_tokenizer` takes it; `None` leaves out step 4.

    Returns:
        `list[str]`: one line for each text, in order, without newlines.

    Raises:
        `ValueError`: with a tokenizer, a text with a lone surrogate.
    """
    texts = [normalize(text) for text in texts]
    if tokenizer is None:
        return [_one_line(text) for text in texts]
    if not texts:
        return []
    tokenizer = load_tokenizer(tokenizer)
    for text in texts:
        if has_lone_surrogate(text):
            raise ValueError(f"a lone surrogate is no text to a tokenizer: {text[:60]!r}; drop or repair the document")
    ids = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    words = _DECODED.get(tokenizer)
    if words is None:
        words = _DECODED[tokenizer] = _Words(tokenizer)
    return [" ".join(filter(None, map(words.__getitem__, row))).strip() for row in ids]


class _Words(dict):
    """
    Token id -> its word after step 5, decoded alone when first met.

    Step 5 may be done before joining: the join puts a space on both sides of every word, so spaces at its ends, and
    words of spaces alone, would collapse into that one.
    """

    def __init__(self, tokenizer):
        super().__init__()
        # Weak, or the tokenizer's entry in the cache would keep its own key alive.
        self.decode = _weak_decode(tokenizer)

    def __missing__(self, token_id: int) -> str:
        word = self[token_id] = _escape(self.decode(token_id))
        return word


def _weak_decode(tokenizer):
    from weakref import ref

    tokenizer = ref(tokenizer)
    return lambda token_id: tokenizer().decode([token_id])


def _escape(text: str) -> str:
    if not text.isprintable():
        text = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return " ".join(filter(None, text.split(" ")))


def _one_line(text: str) -> str:
    return _escape(text).strip()


def has_lone_surrogate(text: str) -> bool:
    """Whether UTF-8 cannot write the text."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def load_tokenizer(name_or_object):
    """
    A tokenizer to call, from a name, a folder or an object.

    Args:
        name_or_object (`str`, `os.PathLike`, tokenizer or `None`):
            A Hub id or folder (loaded once per process), any Transformers tokenizer, or a `tokenizers.Tokenizer`.
            The paper's is `DEFAULT_TOKENIZER`.

    Raises:
        `OSError`: no tokenizer of that name here, and none can be fetched.
        `TypeError`: no tokenizer.
    """
    if name_or_object is None or hasattr(name_or_object, "batch_decode"):
        return name_or_object
    if isinstance(name_or_object, str) or hasattr(name_or_object, "__fspath__"):
        return _load_tokenizer(str(name_or_object))
    if hasattr(name_or_object, "encode_batch"):
        return _wrap(name_or_object)
    raise TypeError(
        f"tokenizer is a {type(name_or_object).__name__}; give a name, a folder, a Transformers tokenizer or a "
        "tokenizers.Tokenizer"
    )


@lru_cache(maxsize=4)
def _load_tokenizer(name: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(
            f"no tokenizer {name!r}: neither a folder here nor a Hub id that could be read; download it once while "
            "online, or give the tokenizer that the classifier was trained with"
        ) from error


@lru_cache(maxsize=4)
def _wrap(backend):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend)
