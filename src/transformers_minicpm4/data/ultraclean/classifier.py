"""
Training of the UltraClean quality classifier: seeds by pool, a balanced sample, fastText, and a report split by source
(Ultra-FineWeb, arXiv 2505.05427; MiniCPM4, arXiv 2506.07900, section 3.1).

A pool (its name is the *source* of its documents) almost always carries one label. A classifier can then learn the
pool instead of the quality, and documents held out at random from the same pools cannot show it. Hence every figure
here is given by source, and `leave_one_source_out` gives it for sources the classifier has never seen.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from .fasttext_model import digest, import_fasttext, predict_positive
from .files import write_json
from .seeds import LABEL_PREFIX, LABELS, Documents, cells, prepare, sample, split


logger = logging.getLogger(__name__)

# Below this the paper's 3 epochs under-train: with 7,300 documents AUC 0.82, with 10 epochs at lr 0.5 0.94 (measured).
SMALL = 100_000


# ---- training -------------------------------------------------------------------------------------------------------


def fit(documents: Documents, order: np.ndarray, path: Path, settings: Mapping):
    """Train on the documents in that order; save the model at `path`, whole or not at all, and return it."""
    train = getattr(import_fasttext(), "train_supervised", None)
    if train is None:
        raise ImportError(
            "the installed `fasttext` has no `train_supervised` (some builds only predict); "
            "`pip install transformers_minicpm4[data]` brings one that trains"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".training-", dir=path.parent) as folder:
        text = Path(folder) / "train.txt"
        # Bytes: text mode would translate line ends, and every document is one line.
        with text.open("wb") as file:
            for positive, line in zip(documents.positive[order], documents.lines(order)):
                file.write(f"{LABEL_PREFIX}{LABELS[not positive]} {line}\n".encode())
        model = train(
            input=str(text),
            dim=settings["dim"],
            lr=settings["lr"],
            wordNgrams=settings["word_ngrams"],
            minCount=settings["min_count"],
            epoch=settings["epochs"],
            bucket=settings["bucket"],
            thread=settings["threads"],
            seed=settings["seed"],
            loss="softmax",
            verbose=0,
        )
        partial_model = Path(folder) / "model.bin"
        model.save_model(str(partial_model))
        partial_model.replace(path)
    return model


def scores(model, documents: Documents) -> np.ndarray:
    """P(positive) of each document, shape `[documents]`, from a loaded model."""
    found, batch = [], []
    for line in documents.lines():
        batch.append(line)
        if len(batch) == 1000:
            found += predict_positive(model, batch)
            batch = []
    if batch:
        found += predict_positive(model, batch)
    return np.array(found, dtype=np.float64)


# ---- report ---------------------------------------------------------------------------------------------------------


def roc_auc(positive_scores: np.ndarray, negative_scores: np.ndarray) -> float | None:
    """
    Probability that a positive document scores above a negative one, ties counted half (Mann-Whitney U over the number
    of pairs); `None` without documents on either side.
    """
    n, m = len(positive_scores), len(negative_scores)
    if n == 0 or m == 0:
        return None
    _, place, counts = np.unique(
        np.concatenate([positive_scores, negative_scores]), return_inverse=True, return_counts=True
    )
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def by_source(score: np.ndarray, documents: Documents, threshold: float) -> list[dict]:
    """
    One row for each source and label: documents, AUC of these documents against *all* those of the other label, the
    share at or above the threshold (`tpr` of a positive source, `fpr` of a negative one), and the mean score.
    """
    rows = []
    for (positive, source), members in cells(documents).items():
        own, other = score[members], score[documents.positive != positive]
        rows.append(
            {
                "source": source,
                "label": LABELS[not positive],
                "documents": len(members),
                "auc": roc_auc(own, other) if positive else roc_auc(other, own),
                "tpr" if positive else "fpr": float((own >= threshold).mean()),
                "mean_score": float(own.mean()),
            }
        )
    return rows


def overall(score: np.ndarray, documents: Documents, threshold: float, rows: list[dict]) -> dict:
    """AUC, TPR and FPR over all documents, and the mean of the sources' AUC, in which each source counts once."""
    positive, negative = score[documents.positive], score[~documents.positive]
    aucs = [row["auc"] for row in rows if row["auc"] is not None]
    return {
        "documents": len(documents),
        "positives": len(positive),
        "negatives": len(negative),
        "auc": roc_auc(positive, negative),
        "tpr": float((positive >= threshold).mean()) if len(positive) else None,
        "fpr": float((negative >= threshold).mean()) if len(negative) else None,
        "mean_source_auc": float(np.mean(aucs)) if aucs else None,
    }


def cautions(
    train: Documents, order: np.ndarray, held_out: Documents, *, balance: str | None, ratio: float
) -> list[str]:
    """What a reader of the figures must know first: one sentence each."""
    found = []
    sides: dict[str, set] = {}
    for positive, source in cells(train):
        sides.setdefault(source, set()).add(positive)
    single = sorted(source for source, labels in sides.items() if len(labels) == 1)
    if single:
        found.append(
            f"{len(single)} of {len(sides)} sources have one label only ({_some(single)}): the source can stand in "
            "for the label. Trust leave_one_source_out more than held-out documents of the same sources."
        )
    shared = sorted(set(train.source[order]) & set(held_out.source))
    if shared:
        found.append(
            f"{len(shared)} sources are in training and held out ({_some(shared)}): the figures are in-source, and "
            "say little about a new source."
        )
    documents = len(set(order.tolist()))
    if documents < SMALL:
        found.append(
            f"{documents:,} training documents; below about {SMALL:,} the paper's 3 epochs at learning rate 0.1 "
            "under-train. More documents, or more epochs and a higher rate, help."
        )
    have = int(train.positive.sum()), int((~train.positive).sum())
    if not 0.8 <= have[1] / (ratio * have[0]) <= 1.25:
        remedy = {
            "oversample": "the shorter class was repeated to that ratio, and its documents weigh more",
            "undersample": f"only {documents:,} documents of that ratio train",
            None: "nothing was done about it, so scores lean to the larger class",
        }[balance]
        found.append(f"Unbalanced: {have[0]:,} positives and {have[1]:,} negatives, {ratio:g} to 1 wanted; {remedy}.")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ---- the public functions -------------------------------------------------------------------------------------------


def train_classifier(
    dataset,
    output: str | os.PathLike,
    *,
    text_column: str = "text",
    label_column: str = "label",
    source_column: str | None = "source",
    group_column: str | None = None,
    tokenizer=None,
    dim: int = 256,
    lr: float = 0.1,
    word_ngrams: int = 3,
    min_count: int = 5,
    epochs: int = 3,
    bucket: int = 2_000_000,
    threads: int = 1,
    seed: int = 0,
    balance: str | None = "oversample",
    ratio: float = 1.0,
    held_out=0.1,
    threshold: float = 0.5,
    num_proc: int | None = None,
    overwrite: bool = False,
) -> dict:
    """
    Train a fastText quality classifier on labelled seeds, and report it by source.

    The defaults are the paper's (Ultra-FineWeb, arXiv 2505.05427; `bucket` and softmax are fastText's
    own, the paper does not state them): 2 million buckets of 256 floats make a model file of 2 GB. With `threads=1`
    the same documents, in whatever row order, and the same seed give the same model, byte for byte, in every process
    on one machine; more threads are faster and race.

    Args:
        dataset (`datasets.Dataset`, or mapping of pool name to `datasets.Dataset`): seeds. Of a mapping, the names
            are the sources. Rows without usable text are dropped and counted in the report.
        output: model file to write (`.bin`); the report is written beside it with the suffix `.json`.
        label_column: "pos"/"neg", booleans, or a `ClassLabel` with those names.
        source_column: the pool of a document; `None` for a single source.
        group_column: documents with the same value (a file, a site) are held out together or not at all.
        tokenizer: for `to_words`; use the same one to score.
        dim, lr, word_ngrams, min_count, epochs, bucket, threads: fastText's `dim`, `lr`, `wordNgrams`, `minCount`,
            `epoch`, `bucket`, `thread`.
        balance: how to come to `ratio` negatives a positive. "oversample" uses every document and repeats those of
            the class that is short; "undersample" repeats nothing and takes the largest sample of that ratio, spread
            evenly over the sources of each label; `None` takes every document once.
        held_out (`float`, `datasets.Dataset` or mapping): share of each source that is kept from training and
            reported on (0: none), or labelled documents with the same columns.
        threshold: score from which a document counts as kept in `tpr` and `fpr`.
        num_proc: processes for the preprocessing.
        overwrite: replace `output` where it exists.

    Returns:
        The report, a JSON-ready dict: `model` (file, sha256), `settings`, `train` (by source and label: documents, and
        lines, which count repetitions), `dropped` (documents by reason), `held_out` (`sources`: rows of source, label,
        documents, auc, tpr or fpr, mean_score; `overall`), `warnings` (logged as well).

    Raises:
        FileExistsError: `output` exists and `overwrite` is false.
        ImportError: no fastText that trains is installed.
        TypeError: `dataset` is not a `Dataset`.
        ValueError: a missing column, an empty pool, a wrong label, one class only, or a number out of range.
    """
    settings = training_settings(
        dim=dim,
        lr=lr,
        word_ngrams=word_ngrams,
        min_count=min_count,
        epochs=epochs,
        bucket=bucket,
        threads=threads,
        seed=seed,
        balance=balance,
        ratio=ratio,
        threshold=threshold,
    )
    output = Path(output)
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists: give another name, or overwrite=True to replace it.")
    report_file = output.with_suffix(".json")
    if report_file == output or (report_file.exists() and not overwrite):
        raise FileExistsError(f"The report would replace {report_file}: give the model another name, ending in .bin.")
    read = partial(
        prepare,
        text_column=text_column,
        label_column=label_column,
        source_column=source_column,
        group_column=group_column,
        tokenizer=tokenizer,
        num_proc=num_proc,
    )
    documents = read(dataset)
    if isinstance(held_out, int | float):
        check_share(held_out, lowest=0.0)
        mask = split(documents, held_out, seed)
        train, test = documents.take(~mask), documents.take(mask)
    else:
        train, test = documents, read(held_out)
    report = train_prepared(train, test, output, settings)
    for sentence in report["warnings"]:
        logger.warning(sentence)
    return report


def train_prepared(train: Documents, test: Documents, output: Path, settings: Mapping) -> dict:
    """`train_classifier` after preprocessing and split; the warnings are in the report only."""
    train, same = without(train, test)
    check_classes(train)
    order = sample(train, balance=settings["balance"], ratio=settings["ratio"], seed=settings["seed"])
    warnings = cautions(train, order, test, balance=settings["balance"], ratio=settings["ratio"])
    if same:
        warnings.append(f"{same:,} training documents had the text of a held-out one and were left out of training.")
    model = fit(train, order, output, settings)
    report = {
        "model": {"file": output.name, "sha256": digest(output)},
        "settings": dict(settings),
        "train": count(train, order),
        "dropped": {**train.dropped, **({"same text as a held-out document": same} if same else {})},
        "held_out": evaluate(model, test, settings["threshold"]),
        "warnings": warnings,
    }
    write_json(output.with_suffix(".json"), report)
    return report


def evaluate(model, documents: Documents, threshold: float) -> dict:
    """Rows by source and the overall figures of a loaded model on labelled documents."""
    score = scores(model, documents)
    rows = by_source(score, documents, threshold)
    return {"sources": rows, "overall": overall(score, documents, threshold, rows), "dropped": documents.dropped}


def count(documents: Documents, order: np.ndarray | None = None) -> list[dict]:
    """Documents by source and label; of a training order, how many of them, and lines with repetitions."""
    rows = []
    for (positive, source), members in cells(documents if order is None else documents.take(order)).items():
        row = {"source": source, "label": LABELS[not positive], "documents": len(members)}
        if order is not None:
            row |= {"documents": len(set(order[members].tolist())), "lines": len(members)}
        rows.append(row)
    return rows


def without(documents: Documents, others: Documents) -> tuple[Documents, int]:
    """The documents whose text is none of the others', and how many are left out."""
    known = set(others.key)
    keep = np.array([key not in known for key in documents.key], dtype=bool)
    return documents.take(keep), int((~keep).sum())


def leave_one_source_out(
    dataset,
    *,
    text_column: str = "text",
    label_column: str = "label",
    source_column: str = "source",
    group_column: str | None = None,
    tokenizer=None,
    dim: int = 256,
    lr: float = 0.1,
    word_ngrams: int = 3,
    min_count: int = 5,
    epochs: int = 3,
    bucket: int = 2_000_000,
    threads: int = 1,
    seed: int = 0,
    balance: str | None = "oversample",
    ratio: float = 1.0,
    held_out: float = 0.3,
    threshold: float = 0.5,
    num_proc: int | None = None,
) -> dict:
    """
    How well the classifier does on a source it has never seen, beside how well it does on documents held out from
    sources it has seen.

    First, `held_out` of each source (by whole groups) is set aside, once. One model is trained on the rest of all
    sources: its figures are the *in-source* ones. Then, for each source in turn, a model is trained on the rest of
    all *other* sources. Both models are tested on the very same documents: the source's set-aside documents against
    the set-aside documents of the opposite label from all sources. So the two AUC of a row differ by one thing,
    whether the source was in training. The opposite documents are new, their sources are not.

    Args: as `train_classifier`. Nothing is kept: models are written to a temporary folder, one at a time.

    Returns:
        `{"sources": rows, "mean", "in_source", "dropped", "settings", "warnings"}`. A row: `source`, `label`,
        `documents` (tested), `auc`, `tpr` or `fpr` (share of the unseen source kept), `in_source_auc`, `in_source_tpr`
        or `in_source_fpr`, `train_documents`, `skipped` (why there are no figures: the only source of its label, else
        `None`). `mean`: the mean AUC over rows, over those of positive and of negative sources: `auc`,
        `auc_positive_sources`, `auc_negative_sources` and the same with `in_source_`.

    Raises:
        As `train_classifier`, and ValueError for fewer than three sources.
    """
    settings = training_settings(
        dim=dim,
        lr=lr,
        word_ngrams=word_ngrams,
        min_count=min_count,
        epochs=epochs,
        bucket=bucket,
        threads=threads,
        seed=seed,
        balance=balance,
        ratio=ratio,
        threshold=threshold,
    )
    check_share(held_out, lowest=1e-9)
    documents = prepare(
        dataset,
        text_column=text_column,
        label_column=label_column,
        source_column=source_column,
        group_column=group_column,
        tokenizer=tokenizer,
        num_proc=num_proc,
    )
    check_classes(documents)
    names = sorted(set(documents.source))
    if len(names) < 3:
        raise ValueError(
            f"Leaving one source out needs at least three sources (two of one label); there are {len(names)}: "
            f"{', '.join(names)}."
        )
    mask = split(documents, held_out, seed)
    train, test = documents.take(~mask), documents.take(mask)
    train, same = without(train, test)

    with tempfile.TemporaryDirectory(prefix="leave-one-source-out-") as folder:
        path = Path(folder) / "in_source.bin"
        whole = train_prepared(train, test, path, settings)
        path.unlink()
        rows = []
        for name in _progress(names):
            rows += _fold(name, train, test, Path(folder) / "fold.bin", settings, whole["held_out"]["sources"])
    rows.sort(key=lambda row: (row["label"] != "pos", row["source"]))
    warnings = [sentence for sentence in whole["warnings"] if "in-source" not in sentence]
    for sentence in warnings:
        logger.warning(sentence)
    return {
        "sources": rows,
        "mean": _means(rows),
        "in_source": whole["held_out"]["overall"],
        "train_documents": sum(row["documents"] for row in whole["train"]),
        "dropped": {**documents.dropped, **({"same text as a held-out document": same} if same else {})},
        "settings": {**settings, "held_out": held_out},
        "warnings": warnings,
    }


def _fold(name: str, train: Documents, test: Documents, path: Path, settings: Mapping, in_source: list[dict]):
    """Rows (one a label) of the source `name`, from a model that has not seen it."""
    rest = train.take(train.source != name)
    lacks = [label for label, positive in zip(LABELS, (True, False)) if not (rest.positive == positive).any()]
    figures, trained = {}, None
    if not lacks:
        report = train_prepared(rest, test, path, settings)
        path.unlink()
        trained = sum(row["documents"] for row in report["train"])
        figures = {row["label"]: row for row in report["held_out"]["sources"] if row["source"] == name}
    for before in in_source:
        if before["source"] != name:
            continue
        label = before["label"]
        rate = "tpr" if label == "pos" else "fpr"
        now = figures.get(label, {})
        yield {
            "source": name,
            "label": label,
            "documents": before["documents"],
            "auc": now.get("auc"),
            rate: now.get(rate),
            "in_source_auc": before["auc"],
            f"in_source_{rate}": before[rate],
            "train_documents": trained,
            "skipped": f"the only source with label {lacks[0]!r}" if lacks else None,
        }


def _means(rows: list[dict]) -> dict:
    rows = [row for row in rows if row["skipped"] is None]
    chosen = {
        "": rows,
        "_positive_sources": [row for row in rows if row["label"] == "pos"],
        "_negative_sources": [row for row in rows if row["label"] == "neg"],
    }
    found = {}
    for start in ("auc", "in_source_auc"):
        for end, members in chosen.items():
            values = [row[start] for row in members if row[start] is not None]
            found[start + end] = float(np.mean(values)) if values else None
    return found


# ---- small things ---------------------------------------------------------------------------------------------------


def training_settings(
    *,
    dim: int = 256,
    lr: float = 0.1,
    word_ngrams: int = 3,
    min_count: int = 5,
    epochs: int = 3,
    bucket: int = 2_000_000,
    threads: int = 1,
    seed: int = 0,
    balance: str | bool | None = "oversample",
    ratio: float = 1.0,
    threshold: float = 0.5,
) -> dict:
    """The settings of `train_classifier` as one checked dict; `balance` True is "oversample", False is `None`."""
    balance = {True: "oversample", False: None}.get(balance, balance)
    if balance not in ("oversample", "undersample", None):
        raise ValueError(f"balance is {balance!r}; 'oversample', 'undersample' or None is needed.")
    numbers = {
        "dim": dim,
        "word_ngrams": word_ngrams,
        "min_count": min_count,
        "epochs": epochs,
        "bucket": bucket,
        "threads": threads,
    }
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; a whole number of at least 1 is needed.")
    for name, value in {"lr": lr, "ratio": ratio}.items():
        if not value > 0:
            raise ValueError(f"{name} is {value!r}; a number above 0 is needed.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}; scores lie in [0, 1].")
    return {**numbers, "lr": lr, "seed": seed, "balance": balance, "ratio": ratio, "threshold": threshold}


def check_share(value: float, lowest: float) -> None:
    if not lowest <= value < 1:
        raise ValueError(f"held_out is {value!r}; a share of the documents in [0, 1) is needed, such as 0.1.")


def check_classes(documents: Documents, purpose: str = "Training") -> None:
    positives = int(documents.positive.sum())
    negatives = len(documents) - positives
    if positives == 0 or negatives == 0:
        dropped = f" Dropped: {documents.dropped}." if documents.dropped else ""
        raise ValueError(
            f"{purpose} needs documents of both labels; there are {positives} 'pos' and {negatives} 'neg' (held-out "
            f"ones do not train).{dropped}"
        )


def _progress(names: list[str]):
    from datasets.utils import tqdm  # obeys datasets.disable_progress_bars()

    return tqdm(names, desc="sources left out")
