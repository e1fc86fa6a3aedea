"""
Rows that mean the same, found by the embeddings of any encoder (MiniCPM4, arXiv 2506.07900: semantic deduplication of
supervised and RL data; the idea of SemHash).
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .reasons import OK


if TYPE_CHECKING:
    from datasets import Dataset

# float32 matrix products differ in the last digits with the shape of the block; what is this near is computed again.
_SLACK = 1e-4
_ROUNDING = 1e-9  # so that equal vectors reach a threshold of 1


def _as_matrix(embeddings, rows: int) -> np.ndarray:
    """Unit vectors [rows, D] in float32; zeros where the encoder gave zeros or what is not finite."""
    if hasattr(embeddings, "detach"):  # torch
        embeddings = embeddings.detach().float().cpu().numpy()
    matrix = np.asarray(embeddings, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) != rows:
        raise ValueError(f"the encoder gave shape {matrix.shape} for {rows} texts; it must give [{rows}, dimensions]")
    finite = np.isfinite(matrix).all(axis=1)
    matrix = np.where(finite[:, None], matrix, 0.0)
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0).astype(np.float32)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / math.sqrt((one @ one) * (other @ other)))


def _best(vector: np.ndarray, kept: np.ndarray, candidates, threshold: float) -> tuple[int, float]:
    """(place, cosine) of the most similar candidate at or above the threshold, the earliest of equals; (-1, NaN)."""
    place, best = -1, math.nan
    for candidate in candidates:
        cosine = _cosine(vector, kept[candidate])
        if cosine >= threshold - _ROUNDING and not cosine <= best:
            place, best = int(candidate), cosine
    return place, best


def find_semantic_duplicates(
    embeddings, threshold: float = 0.9, block_size: int = 1024, against=None
) -> tuple[np.ndarray, np.ndarray]:
    """
    Rows whose cosine with an earlier kept row reaches the threshold, read in order: the first of its kind is kept.

    Exact: every row is compared with every kept row, `block_size` rows at a time, so that no more than two blocks of
    similarities [block_size, block_size] are held; the result does not depend on `block_size`.

    Args:
        embeddings: [N, D], NumPy or torch, of any length (they are normalised).
        threshold: cosine above 0 up to 1.
        against: [M, D], rows of another set, kept before the first row.
    Returns:
        (twin, similarity): int64 [N], the place of the most similar kept row (0 to M-1 in `against`, M + n for row n;
        -1 for a row that is kept), and float64 [N], its cosine (NaN for a row that is kept). A row without direction
        (zeros, NaN) is kept and is nobody's twin.
    Raises:
        ValueError: a threshold or block size outside the range, or embeddings of the wrong shape.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold = {threshold}; a cosine above 0 up to 1")
    if block_size < 1:
        raise ValueError(f"block_size = {block_size}; give 1 or more rows")
    rows = _as_matrix(embeddings, len(embeddings))
    before = np.zeros((0, rows.shape[1]), np.float32) if against is None else _as_matrix(against, len(against))
    if before.shape[1] != rows.shape[1]:
        raise ValueError(f"rows have {rows.shape[1]} dimensions and `against` {before.shape[1]}; use one encoder")
    everything = np.concatenate([before, rows])
    kept = list(range(len(before)))  # places in `everything`
    twin = np.full(len(rows), -1, np.int64)
    similarity = np.full(len(rows), math.nan)
    for start in range(0, len(rows), block_size):
        block = rows[start : start + block_size]
        candidates: list[list[int]] = [[] for _ in block]
        for begin in range(0, len(kept), block_size):
            places = kept[begin : begin + block_size]
            near = np.argwhere(block @ everything[places].T >= threshold - _SLACK)
            for row, column in near:
                candidates[row].append(places[column])
        inside = block @ block.T >= threshold - _SLACK
        kept_here: list[int] = []
        for row, vector in enumerate(block):
            near_here = [len(before) + start + other for other in kept_here if inside[row, other]]
            place, cosine = _best(vector, everything, candidates[row] + near_here, threshold)
            twin[start + row], similarity[start + row] = place, cosine
            if place < 0:
                kept_here.append(row)
        kept.extend(len(before) + start + row for row in kept_here if block[row].any())
    return twin, similarity


def _encode(dataset, encode: Callable, text_column: str, batch_size: int) -> tuple[np.ndarray, list[int]]:
    """Embeddings of the rows that have text, and their places."""
    from datasets.utils import tqdm

    places, parts = [], []
    for start in tqdm(range(0, len(dataset), batch_size), desc="Encoding texts"):
        texts = dataset[start : start + batch_size][text_column]
        wrong = [text for text in texts if text is not None and not isinstance(text, str)]
        if wrong:
            raise TypeError(f"column {text_column!r} holds {type(wrong[0]).__name__}; name the column that holds text")
        filled = [row for row, text in enumerate(texts) if text and text.strip()]
        if filled:
            parts.append(_as_matrix(encode([texts[row] for row in filled]), len(filled)))
            places.extend(start + row for row in filled)
    sizes = {part.shape[1] for part in parts}
    if len(sizes) > 1:
        raise ValueError(f"the encoder gave vectors of {sorted(sizes)} dimensions; they must be of one size")
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32), places


def semantic_deduplicate(
    dataset: "Dataset",
    encode: Callable,
    threshold: float = 0.9,
    text_column: str = "text",
    id_column: str | None = None,
    against: "Dataset | None" = None,
    batch_size: int = 256,
    block_size: int = 1024,
) -> "Dataset":
    """
    The dataset with four columns more: `dedup_passed` (bool), `dedup_reason` (`ok`, `duplicate`, `no_text`,
    `no_embedding`; rows of the last two are kept), `duplicate_of` (str, id of the most similar kept row, null for kept
    rows) and `duplicate_similarity` (float, its cosine). No row is dropped.

    Args:
        encode: list of texts -> embeddings [texts, D], NumPy or torch; any sentence encoder's `encode`.
        threshold: cosine from which two texts mean the same; fit it to the encoder.
        id_column: column of ids (None: the row's number).
        against: another dataset with the same columns, as the SFT data for RL data: its rows count as kept before, and
            `duplicate_of` names them with `against:` in front.
        batch_size: texts an encoder gets at a time. block_size: see `find_semantic_duplicates`.
    Raises:
        TypeError: a streaming dataset (each row is compared with all others), or a column without text.
        KeyError: a column is missing.  ValueError: see `find_semantic_duplicates`.
    """
    import pyarrow as pa
    from datasets import Value

    for part in (dataset,) if against is None else (dataset, against):
        if not hasattr(part, "__len__"):
            raise TypeError("semantic_deduplicate compares all rows; save the stream first and load it as a Dataset")
        for name in (text_column, id_column):
            if name is not None and name not in part.column_names:
                raise KeyError(f"no column {name!r}; this dataset has {part.column_names}")
    rows, places = _encode(dataset, encode, text_column, batch_size)
    known, known_places = (None, []) if against is None else _encode(against, encode, text_column, batch_size)
    if known is not None and (not len(known) or not len(rows)):
        known, known_places = None, []
    twin, similarity = find_semantic_duplicates(rows, threshold, block_size, against=known)
    ids = range(len(dataset)) if id_column is None else dataset[id_column]
    known_ids = () if against is None else range(len(against)) if id_column is None else against[id_column]
    reasons, twins, cosines = ["no_text"] * len(dataset), [None] * len(dataset), [None] * len(dataset)
    for row, place in enumerate(places):
        if twin[row] < 0:
            reasons[place] = OK if rows[row].any() else "no_embedding"
            continue
        other = int(twin[row])
        earlier = other < len(known_places)
        name = f"against:{known_ids[known_places[other]]}" if earlier else ids[places[other - len(known_places)]]
        reasons[place] = f"duplicate: of {name} with cosine {similarity[row]:.4f}"
        twins[place], cosines[place] = str(name), float(similarity[row])
    passed = [not reason.startswith("duplicate") for reason in reasons]
    return (
        dataset.add_column("dedup_passed", pa.array(passed, pa.bool_()), feature=Value("bool"))
        .add_column("dedup_reason", pa.array(reasons, pa.string()), feature=Value("string"))
        .add_column("duplicate_of", pa.array(twins, pa.string()), feature=Value("string"))
        .add_column("duplicate_similarity", pa.array(cosines, pa.float64()), feature=Value("float64"))
    )
