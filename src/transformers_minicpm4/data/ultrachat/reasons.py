"""
How every filter of this room says why: a string `"ok"`, or `"code: detail"` joined by `"; "`, never null.

A reason is a string in each row because `datasets` takes a column's type from the first rows it writes: a column of
nulls there cannot hold a string later.
"""

from collections import Counter
from collections.abc import Iterable


OK = "ok"


def writable(text: str) -> str:
    r"""The text with lone surrogates written out (`\ud800`): models' JSON holds such, and no file takes them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def join_reasons(problems: Iterable[str]) -> str:
    """One reason out of many problems (each `"code: detail"`); `"ok"` where there are none."""
    return writable("; ".join(problems)) or OK


def reason_counts(reasons: Iterable[str]) -> dict[str, int]:
    """Rows per reason code (the part before the first colon), most frequent first; the counts add up to the rows."""
    return dict(Counter(reason.split(":", 1)[0] for reason in reasons).most_common())


def shorten(value, length: int = 60) -> str:
    """A value as it may stand in a reason: one line, at most `length` characters."""
    try:
        text = str(value)
    except (RecursionError, ValueError):  # nested too deep; a number of more digits than Python writes
        text = f"a {type(value).__name__} too large to show"
    text = writable(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 3] + "..."


def column_of(row, name: str, owner: str):
    """`row[name]`, or a KeyError that says which columns there are."""
    if name not in row:
        raise KeyError(f"{owner} reads the column {name!r}; this dataset has {sorted(row)}. Name the right column.")
    return row[name]
