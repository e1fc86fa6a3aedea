"""Exact and near-duplicate documents.

Near: MinHash with locality-sensitive hashing proposes pairs, the exact Jaccard similarity of their shingles decides.
Finding duplicates adds columns; dropping them is a step of its own (`DuplicateFilter`), so nothing leaves unseen.

MinHash: Broder, "On the resemblance and containment of documents", 1997; through the library datasketch.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .normalize import unicode_form


# Scripts written without spaces between words: Han, kana. One character of them counts as one token.
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_TOKEN = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+")
_EMPTY = 2**32 - 1  # datasketch's value of a set without elements


def tokenize(text: str) -> list[str]:
    """Words, and single characters of Chinese and Japanese, after NFKC and case folding; punctuation is left out."""
    return _TOKEN.findall(unicode_form("NFKC", text).casefold())


def shingles(text: str, size: int = 5) -> frozenset[str]:
    """Set of all runs of `size` tokens, joined by a space; a shorter text is one shingle, one without tokens none."""
    tokens = tokenize(text)
    if not tokens:
        return frozenset()
    return frozenset(" ".join(tokens[i : i + size]) for i in range(max(1, len(tokens) - size + 1)))


def jaccard(a: frozenset, b: frozenset) -> float:
    """Size of the intersection over the size of the union; 0.0 for two empty sets."""
    union = len(a | b)
    return len(a & b) / union if union else 0.0


def is_null(value) -> bool:
    """None, pandas' NA (which has no truth value), or what does not equal itself: NaN of any library, NaT."""
    if value is None or type(value).__name__ == "NAType":
        return True
    return getattr(value, "ndim", 0) == 0 and bool(value != value)


def check_batch(batch, column: str) -> None:
    """
    Refuses a single row, which `map` and `filter` give without `batched=True`: its text would pass for a list of rows.

    A row in Arrow or pandas format is a table of one row, and fine.

    Raises:
        TypeError: a row.
    """
    if hasattr(batch, "pa_table"):
        # Reading the value of a batch that `datasets` holds in Arrow would convert the column.
        single = type(batch).__name__ == "LazyRow"
    else:
        value = batch[column]
        single = (
            isinstance(value, (str, bytes, dict)) or not hasattr(value, "__iter__") or getattr(value, "ndim", 1) == 0
        )
    if single:
        raise TypeError(
            f"a single row was given, where column {column!r} should be a list of the values of many rows: pass "
            "batched=True to map or filter"
        )


def check_texts(batch: dict[str, list], column: str) -> list[str]:
    """Texts of a batch, None as the empty string.

    Raises:
        KeyError: the batch has no such column.
        TypeError: a row is neither a string nor None, or a single row was given, not a batch.
    """
    if column not in batch:
        raise KeyError(f"no column {column!r}; the columns are {sorted(batch)}: set text_column to one of them")
    check_batch(batch, column)
    for row, text in enumerate(batch[column]):
        if text is not None and not isinstance(text, str):
            raise TypeError(
                f"column {column!r} must hold strings or None, but row {row} of the batch holds "
                f"{type(text).__name__}: cast the column, or set text_column to another"
            )
    return [text or "" for text in batch[column]]


@dataclass(frozen=True)
class MinHashSignature:
    """Batched callable for `Dataset.map`: adds the MinHash signature of each text's shingles.

    Deterministic and picklable: the same under `num_proc`, streaming and Spark.

    Args:
        num_perm (`int`, *optional*, defaults to 128): values per signature; the standard error of the estimated
            similarity is at most 0.5 / sqrt(num_perm).
        shingle_size (`int`, *optional*, defaults to 5): tokens per shingle: words, or characters of Chinese.
        seed (`int`, *optional*, defaults to 1): of the permutations; signatures of different seeds do not compare.
        text_column (`str`, *optional*, defaults to `"text"`): column to read.
        column (`str`, *optional*, defaults to `"minhash"`): column to add, `num_perm` integers below 2**32 a row; a
            text without tokens has 2**32 - 1 everywhere.
    """

    num_perm: int = 128
    shingle_size: int = 5
    seed: int = 1
    text_column: str = "text"
    column: str = "minhash"

    def __post_init__(self):
        if self.num_perm < 2 or self.shingle_size < 1:
            raise ValueError(
                f"num_perm={self.num_perm} and shingle_size={self.shingle_size}: at least 2 and 1 are needed"
            )

    @property
    def added_columns(self) -> dict[str, Any]:
        """Name and Arrow type of the added column."""
        import pyarrow as pa

        return {self.column: pa.list_(pa.int64())}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """`batch[text_column]`: list of n strings or None -> `{column: n lists of num_perm integers}`."""
        MinHash, permutations = _permutations(self.num_perm, self.seed)
        rows = []
        for text in check_texts(batch, self.text_column):
            sketch = MinHash(self.num_perm, self.seed, permutations=permutations, scheme="affine32")
            sketch.update_batch([s.encode("utf-8", "surrogatepass") for s in shingles(text, self.shingle_size)])
            rows.append(sketch.hashvalues.tolist())
        return {self.column: rows}


@lru_cache(maxsize=8)
def _permutations(num_perm, seed):
    # Drawing them costs more than hashing a short document: once per process.
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise ImportError("MinHash needs datasketch: pip install transformers_minicpm4[data]") from error
    return MinHash, MinHash(num_perm, seed, scheme="affine32").permutations


def lsh_bands(threshold: float, num_perm: int, recall: float = 0.99) -> tuple[int, int]:
    """Bands and rows per band: the longest rows that still propose a pair at `threshold` with probability `recall`.

    A pair of Jaccard similarity s is proposed with probability 1 - (1 - s**rows)**bands.
    """
    for rows in range(num_perm, 0, -1):
        bands = num_perm // rows
        if bands >= 2 and 1 - (1 - threshold**rows) ** bands >= recall:
            return bands, rows
    raise ValueError(
        f"threshold={threshold} with num_perm={num_perm} cannot find {recall:.0%} of the pairs: raise num_perm"
    )


class _Clusters:
    """Disjoint sets of row numbers; the smallest number represents its set."""

    def __init__(self, size):
        self.parent = list(range(size))

    def find(self, i):
        while self.parent[i] != i:
            self.parent[i] = i = self.parent[self.parent[i]]
        return i

    def join(self, i, j):
        i, j = sorted((self.find(i), self.find(j)))
        self.parent[j] = i


def mark_near_duplicates(
    dataset,
    threshold: float = 0.8,
    *,
    text_column: str = "text",
    id_column: str | None = "id",
    shingle_size: int = 5,
    num_perm: int = 128,
    seed: int = 1,
    num_proc: int | None = None,
):
    """Adds `duplicate_of` and `similarity` to every row; no row is dropped.

    Two documents are linked if the Jaccard similarity of their shingle sets is at least `threshold`; a cluster is a
    connected component of these links; the document with the smallest id of a cluster is kept. MinHash only proposes
    pairs (at least 99 % of those at the threshold, more above it); links are decided by the exact similarity, so a
    document is never marked by an estimate.

    Args:
        dataset (`datasets.Dataset`): with a text column.
        threshold (`float`, *optional*, defaults to 0.8): in (0, 1].
        text_column (`str`, *optional*, defaults to `"text"`): strings or None.
        id_column (`str`, *optional*, defaults to `"id"`): unique, sortable values; None takes the row number.
        shingle_size (`int`, *optional*, defaults to 5): tokens (words, or characters of Chinese) per shingle.
        num_perm (`int`, *optional*, defaults to 128): values per signature; 4 bytes each are held per document.
        seed (`int`, *optional*, defaults to 1): of the permutations.
        num_proc (`int`, *optional*): processes that compute signatures.

    Returns:
        `datasets.Dataset`: same rows and order, with `duplicate_of` (id of the kept document, null for kept and unique
        ones and for texts without tokens) and `similarity` (Jaccard similarity to that document; below `threshold`
        where a chain of links leads to it).

    Raises:
        TypeError: a streaming dataset (all documents must be known), or a text that is not a string.
        ValueError: threshold out of range; ids missing, null or not unique.
    """
    try:
        from datasketch import MinHashLSH
    except ImportError as error:
        raise ImportError("mark_near_duplicates needs datasketch: pip install transformers_minicpm4[data]") from error
    import numpy as np
    from tqdm.auto import tqdm

    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: a Jaccard similarity in (0, 1] is needed")
    order, ids = _id_order(dataset, id_column, text_column)
    signature = MinHashSignature(num_perm, shingle_size, seed, text_column, "minhash")
    signed = dataset.select_columns([text_column]).map(
        signature, batched=True, remove_columns=[text_column], num_proc=num_proc, desc="MinHash signatures"
    )
    texts = dataset.select_columns([text_column]).with_format(None)

    @lru_cache(maxsize=4096)
    def shingles_of(row):
        return shingles(texts[row][text_column] or "", shingle_size)

    # Clusters hold places in id order, so that the representative, the smallest place, is the smallest id.
    clusters = _Clusters(len(order))
    MinHash, permutations = _permutations(num_perm, seed)
    lsh = MinHashLSH(num_perm=num_perm, params=lsh_bands(threshold, num_perm))
    signatures = signed.with_format("numpy", dtype=np.uint32)
    exact = {}
    for place, row in enumerate(tqdm(order, desc="near duplicates", unit="doc")):
        values = signatures[row]["minhash"]
        if (values == _EMPTY).all():
            continue
        # Copies share their signature: they join without a comparison of every pair of them.
        text = shingles_of(row)
        copies = exact.setdefault(values.tobytes(), [])
        twin = next((other for other in copies if shingles_of(order[other]) == text), None)
        if twin is not None:
            clusters.join(twin, place)
            continue
        copies.append(place)
        sketch = MinHash(hashvalues=values, permutations=permutations, scheme="affine32", seed=seed)
        for other in sorted(lsh.query(sketch)):
            # A pair that is connected already cannot change the components.
            if clusters.find(other) != clusters.find(place) and jaccard(shingles_of(order[other]), text) >= threshold:
                clusters.join(other, place)
        lsh.insert(place, sketch, check_duplication=False)

    duplicate_of, similarity = [None] * len(order), [None] * len(order)
    for place, row in enumerate(order):
        kept = clusters.find(place)
        if kept != place:
            duplicate_of[row] = ids[order[kept]]
            similarity[row] = jaccard(shingles_of(order[kept]), shingles_of(row))
    return _with_marks(dataset, duplicate_of, similarity, id_column)


def _id_order(dataset, id_column, text_column):
    """Row numbers sorted by id, and the ids by row."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{type(dataset).__name__} given: duplicates are found among all documents, which a datasets.Dataset "
            f"holds; load without streaming, or write the stream to parquet and load that"
        )
    for column in {text_column, *([id_column] if id_column else [])} & {"duplicate_of", "similarity"}:
        raise ValueError(f"column {column!r} would be overwritten: rename it")
    for column in (text_column, id_column):
        if column is not None and column not in dataset.column_names:
            raise ValueError(
                f"no column {column!r}; the columns are {dataset.column_names} (id_column=None: row number)"
            )
    marks = {"duplicate_of", "similarity"} & set(dataset.column_names)
    if marks:
        raise ValueError(f"the dataset has {sorted(marks)} already: remove_columns({sorted(marks)}) first")
    if id_column is None:
        return list(range(len(dataset))), list(range(len(dataset)))
    ids = dataset.with_format(None)[id_column][:]
    if any(value is None for value in ids):
        raise ValueError(f"column {id_column!r} has null ids: every document needs one, or pass id_column=None")
    if len(set(ids)) != len(ids):
        raise ValueError(
            f"column {id_column!r} has {len(ids) - len(set(ids))} repeated ids: they must be unique, or pass "
            f"id_column=None"
        )
    return sorted(range(len(ids)), key=ids.__getitem__), ids


def _with_marks(dataset, duplicate_of, similarity, id_column):
    from datasets import Value

    kind = dataset.features[id_column] if id_column else Value("int64")
    return dataset.add_column("duplicate_of", duplicate_of, feature=kind).add_column(
        "similarity", similarity, feature=Value("float64")
    )


@dataclass(frozen=True)
class TextHash:
    """Batched callable for `Dataset.map`: adds a hash that texts share if they differ only in case, spaces and forms.

    Texts are compared after NFKC, case folding and with each run of white space as one space. None and blank texts
    get the empty string.

    Args:
        text_column (`str`, *optional*, defaults to `"text"`): column to read.
        column (`str`, *optional*, defaults to `"text_hash"`): column to add: 32 hexadecimal digits
            (128 bits, BLAKE2b).
    """

    text_column: str = "text"
    column: str = "text_hash"

    @property
    def added_columns(self) -> dict[str, Any]:
        """Name and Arrow type of the added column."""
        import pyarrow as pa

        return {self.column: pa.string()}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """`batch[text_column]`: list of n strings or None -> `{column: n strings}`."""
        return {self.column: [_text_hash(text) for text in check_texts(batch, self.text_column)]}


def _text_hash(text):
    text = " ".join(unicode_form("NFKC", text).casefold().split())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() if text else ""


def mark_exact_duplicates(
    dataset, *, text_column: str = "text", id_column: str | None = "id", num_proc: int | None = None
):
    """Adds `duplicate_of` and `similarity` (1.0) to texts that are equal as `TextHash` compares; no row is dropped.

    Arguments, columns and errors are those of [`mark_near_duplicates`]; blank texts are never duplicates.
    """
    order, ids = _id_order(dataset, id_column, text_column)
    hashes = dataset.select_columns([text_column]).map(
        TextHash(text_column, "text_hash"),
        batched=True,
        remove_columns=[text_column],
        num_proc=num_proc,
        desc="text hashes",
    )["text_hash"][:]
    first = {}
    for row in order:
        first.setdefault(hashes[row], row)
    duplicate_of = [ids[first[h]] if h and first[h] != row else None for row, h in enumerate(hashes)]
    return _with_marks(dataset, duplicate_of, [None if kept is None else 1.0 for kept in duplicate_of], id_column)


@dataclass(frozen=True)
class DuplicateFilter:
    """Batched callable for `Dataset.filter`: keeps the rows whose `duplicate_of` is null.

    `reasons(batch)` gives, for each row, None or why it goes.
    """

    column: str = "duplicate_of"

    def __call__(self, batch: dict[str, list]) -> list[bool]:
        """n rows -> n booleans, True for the rows to keep."""
        return [reason is None for reason in self.reasons(batch)]

    def reasons(self, batch: dict[str, list]) -> list[str | None]:
        """n rows -> for each None (kept) or `"duplicate"`."""
        if self.column not in batch:
            raise KeyError(f"no column {self.column!r}: run mark_near_duplicates or mark_exact_duplicates first")
        check_batch(batch, self.column)
        return [None if is_null(kept) else "duplicate" for kept in batch[self.column]]
