"""
Mining rounds: what the classifier is sure of in an unlabelled pool becomes training data of the next classifier
(Ultra-FineWeb, arXiv 2505.05427: inferred positives and negatives join the seeds, iteratively).

The paper accepts a round by efficient verification (training a language model); here a round is accepted by the report
on fixed held-out documents, which is cheap and says less. Verify the last classifier before filtering with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from .classifier import (
    check_classes,
    check_share,
    count,
    scores,
    train_prepared,
    training_settings,
    without,
)
from .fasttext_model import check_file, import_fasttext
from .files import write_json
from .seeds import LABELS, Documents, joined, prepare, split


logger = logging.getLogger(__name__)


def mine(
    seeds,
    pool,
    folder: str | os.PathLike,
    *,
    rounds: int = 3,
    held_out=0.1,
    positive_threshold: float = 0.9,
    negative_threshold: float = 0.1,
    max_per_source: int = 10_000,
    min_gain: float = 0.0,
    text_column: str = "text",
    label_column: str = "label",
    source_column: str | None = "source",
    group_column: str | None = None,
    tokenizer=None,
    num_proc: int | None = None,
    **training,
) -> dict:
    """
    Train on seeds, then up to `rounds` times: score the pool with the last classifier, add what it is sure of to the
    seeds, train again. Stops when the mean of the sources' AUC on the held-out documents no longer improves.

    What was mined in a round replaces what was mined before, so that an early mistake can be unlearnt. A document with
    the text of a seed, of a held-out document or of another document of the pool is not mined. With `threads=1`
    (default) the whole is deterministic: a killed run, started again with the same arguments, takes up after its last
    finished round and ends with the same files.

    Args:
        seeds (`datasets.Dataset` or mapping of pool name to `datasets.Dataset`): labelled, as for `train_classifier`.
        pool (`datasets.Dataset` or mapping of source name to `datasets.Dataset`): unlabelled.
        folder: for `state.json`, and for each round `round_N.bin`, its report `round_N.json`, and the mined documents
            `round_N.parquet` (key, source, label, score, used: whether within the cap).
        rounds: mining rounds after the first training (round 0); a finished folder goes on with a larger number.
        held_out (`float`, `datasets.Dataset` or mapping): the fixed test set, a share of the seeds (by source and
            group) or labelled documents.
        positive_threshold, negative_threshold: scores at or above the first and at or below the second are sure.
        max_per_source: most documents that one source of the pool may give a label in a round. Among the sure ones
            the choice does not favour the surest: those teach least.
        min_gain: a round must improve the mean AUC by more than this, or it is the last.
        training: further settings of `train_classifier` (`dim`, `lr`, `epochs`, `bucket`, `balance`, `seed`, ...).

    Returns:
        `{"rounds", "best", "stopped", "pool"}`: per round the model file, its held-out report, documents mined by
        source and label, and how many were sure; `best` the round with the best mean AUC (the earliest of equals) and
        its file; `stopped` why no further round was run.

    Raises:
        ValueError: the folder holds rounds of other data or settings; thresholds that overlap; and as
            `train_classifier`.
        TypeError: an unknown training setting, or data that are no `Dataset`.
    """
    settings = training_settings(**training)
    if not 0 <= negative_threshold < positive_threshold <= 1:
        raise ValueError(
            f"negative_threshold {negative_threshold!r} and positive_threshold {positive_threshold!r} must lie in "
            "[0, 1], the negative one below."
        )
    for name, value in {"rounds": rounds, "max_per_source": max_per_source}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; a whole number of at least 1 is needed.")
    columns = {
        "text_column": text_column,
        "source_column": source_column,
        "tokenizer": tokenizer,
        "num_proc": num_proc,
    }
    labelled = {**columns, "label_column": label_column, "group_column": group_column}
    documents = prepare(seeds, **labelled)
    if isinstance(held_out, int | float):
        check_share(held_out, lowest=1e-9)
        mask = split(documents, held_out, settings["seed"])
        train, test = documents.take(~mask), documents.take(mask)
    else:
        train, test = documents, prepare(held_out, **labelled)
    check_classes(test, "The held-out set of a mining")
    candidates, dropped = _candidates(prepare(pool, label_column=None, **columns), train, test)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {
        "settings": settings,
        "positive_threshold": positive_threshold,
        "negative_threshold": negative_threshold,
        "max_per_source": max_per_source,
        "seeds": _contents(train),
        "held_out": _contents(test),
        "pool": _contents(candidates),
    }
    done = _resume(folder / "state.json", inputs)
    stopped = _stop(done, min_gain)
    while stopped is None and len(done) <= rounds:
        number = len(done)
        mined, sure = candidates.take(np.zeros(0, dtype=int)), dict.fromkeys(LABELS, 0)
        if number:
            chosen = folder / f"round_{number}.parquet"
            mined, sure = _mined(
                candidates,
                folder / done[-1]["model"]["file"],
                chosen,
                positive_threshold,
                negative_threshold,
                max_per_source,
            )
        if number and not len(mined):
            stopped = f"round {number}: the classifier is sure of no document of the pool"
            break
        report = train_prepared(joined(train, mined), test, folder / f"round_{number}.bin", settings)
        for sentence in report["warnings"] if number == 0 else ():
            logger.warning(sentence)
        done.append(
            {"round": number, "model": report["model"], "sure": sure, "mined": count(mined), **report["held_out"]}
        )
        # The last thing a round does: without this entry the round has not been.
        write_json(folder / "state.json", {"inputs": inputs, "rounds": done})
        logger.info("round %d: mean AUC by source %.4f", number, _mean(done[-1]))
        stopped = _stop(done, min_gain)
    best = max(done, key=_mean)
    return {
        "rounds": done,
        "best": {"round": best["round"], "file": str(folder / best["model"]["file"]), **best["overall"]},
        "stopped": stopped or f"all {rounds} rounds done",
        "pool": {"documents": len(candidates), "dropped": dropped},
    }


def _candidates(pool: Documents, train: Documents, test: Documents) -> tuple[Documents, dict[str, int]]:
    """The pool without known and repeated texts, in an order that its row order does not change; counts by reason."""
    dropped = dict(pool.dropped)
    for reason, others in {"same text as a held-out document": test, "same text as a seed": train}.items():
        pool, same = without(pool, others)
        if same:
            dropped[reason] = same
    order = sorted(range(len(pool)), key=lambda row: (pool.key[row], pool.source[row]))
    first = [row for place, row in enumerate(order) if place == 0 or pool.key[order[place - 1]] != pool.key[row]]
    if len(first) < len(order):
        dropped["same text twice in the pool"] = len(order) - len(first)
    return pool.take(np.array(first, dtype=int)), dropped


def _mined(
    candidates: Documents, model: Path, path: Path, positive_from: float, negative_to: float, cap: int
) -> tuple[Documents, dict[str, int]]:
    """The documents a round adds, with their labels, and how many were sure; scores are not computed twice."""
    from datasets import Dataset

    if not path.is_file():
        # Not load_model: its cache would hold a model of each round, of 2 GB each at the paper's size.
        check_file(model)
        score = scores(import_fasttext().load_model(str(model)), candidates)
        sides = {"pos": score >= positive_from, "neg": score <= negative_to}
        table = {"key": [], "source": [], "label": [], "score": [], "used": []}
        for label, sure in sides.items():
            taken: dict[str, int] = {}
            # Candidates are sorted by a hash of their text: the first of each source are a random choice.
            for row in np.flatnonzero(sure):
                source = candidates.source[row]
                taken[source] = taken.get(source, 0) + 1
                table["key"].append(candidates.key[row])
                table["source"].append(source)
                table["label"].append(label)
                table["score"].append(float(score[row]))
                table["used"].append(taken[source] <= cap)
        partial_file = path.with_name(f".{path.name}.{os.getpid()}")
        Dataset.from_dict(table).to_parquet(partial_file)
        partial_file.replace(path)
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path).to_pydict()
    place = {key: row for row, key in enumerate(candidates.key)}
    used = [row for row, use in enumerate(table["used"]) if use]
    mined = candidates.take(np.array([place[table["key"][row]] for row in used], dtype=int))
    positive = np.array([table["label"][row] == "pos" for row in used], dtype=bool)
    return replace(mined, positive=positive), {label: table["label"].count(label) for label in LABELS}


def _mean(entry: dict) -> float:
    return entry["overall"]["mean_source_auc"]


def _stop(done: list[dict], min_gain: float) -> str | None:
    """Why the last finished round is the last, if it is."""
    if len(done) < 2:
        return None
    best, last = max(map(_mean, done[:-1])), _mean(done[-1])
    if last > best + min_gain:
        return None
    return f"round {len(done) - 1}: mean AUC by source {last:.4f} does not improve on {best:.4f}"


def _contents(documents: Documents) -> str:
    """A digest of the documents, whatever their order."""
    lines = sorted(
        f"{key} {source} {label}" for key, source, label in zip(documents.key, documents.source, documents.positive)
    )
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _resume(path: Path, inputs: dict) -> list[dict]:
    """The finished rounds in `path`, which must be of these inputs."""
    if not path.is_file():
        # A round's scores are read back rather than computed twice: they must not be those of other data.
        stale = sorted(file.name for file in path.parent.glob("round_*"))
        if stale:
            raise ValueError(
                f"{path.parent} has no {path.name} but holds {', '.join(stale[:3])} of earlier rounds: put the "
                "state back, delete those files, or give another folder."
            )
        write_json(path, {"inputs": inputs, "rounds": []})
        return []
    try:
        state = json.loads(path.read_bytes())
        before, rounds = state["inputs"], list(state["rounds"])
        other = [name for name, value in inputs.items() if before.get(name) != value]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or not the state of a mining: put it back, or give another folder to start anew."
        ) from error
    if other:
        raise ValueError(
            f"{path.parent} holds mining rounds with other {', '.join(other)}: give the same data and settings to go "
            "on, or another folder to start anew."
        )
    return rounds
