"""
What a scored or filtered dataset is, in numbers and pictures: counts and score distributions by source, and a
dataset card that shows them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from numbers import Real
from pathlib import Path

from .files import write_text


BINS = 40
LARGEST = 30  # sources that a table shows
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def summarize(
    rows: Iterable[dict],
    *,
    threshold: float = 0.5,
    score_column: str = "quality_score",
    reason_column: str = "quality_reason",
    source_column: str | None = "source",
    text_column: str = "text",
) -> dict:
    """
    Counts and score histograms of scored rows, overall and by source, in memory of the sources and not of the rows.

    Args:
        rows: scored rows (a `Dataset`, a streaming one, or any iterable of dicts).
        threshold: a row with a score at or above it is kept.
        source_column: rows without it, or with `None` in it, are counted under "(no source)".

    Returns:
        `{"threshold", "sources": {name: {"rows", "characters", "kept", "rejected", "without_score", "reasons",
        "histogram", "quantiles"}}, "total": the same}`. `histogram` counts scores in 40 bins of [0, 1]; quantiles are
        those of the bins.

    Raises:
        ValueError: a row has no score column, or something else than a number in it; a threshold outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}: scores are probabilities, give a value from 0 to 1")
    groups: dict[str, dict] = {}
    for row in rows:
        if score_column not in row:
            raise ValueError(
                f"A row has no column {score_column!r}, only {', '.join(row)}: score the dataset first "
                "(QualityScorer), or name the column that holds the scores."
            )
        source = row.get(source_column) if source_column else None
        own = groups.setdefault("(no source)" if source is None else str(source), _empty())
        _count(own, row, threshold, score_column, reason_column, text_column)
    total = _sum(groups.values())
    report = {"threshold": threshold, "sources": dict(sorted(groups.items())), "total": total}
    for own in (*groups.values(), total):
        own["quantiles"] = _quantiles(own["histogram"])
        own["reasons"] = dict(own["reasons"])
    return report


def _empty() -> dict:
    counts = dict.fromkeys(("rows", "characters", "kept", "rejected", "without_score"), 0)
    return {**counts, "reasons": Counter(), "histogram": [0] * BINS}


def _sum(counts: Iterable[dict]) -> dict:
    total = _empty()
    for own in counts:
        for name in total:
            if name == "histogram":
                total[name] = [a + b for a, b in zip(total[name], own[name])]
            else:
                total[name] += Counter(own[name]) if name == "reasons" else own[name]
    return total


def _count(own, row, threshold, score_column, reason_column, text_column) -> None:
    text, score = row.get(text_column), row[score_column]
    own["rows"] += 1
    own["characters"] += len(text) if isinstance(text, str) else 0
    if score is None:
        own["without_score"] += 1
        own["reasons"][row.get(reason_column) or "no reason given"] += 1
        return
    if isinstance(score, bool) or not isinstance(score, Real) or not 0 <= score <= 1:
        raise ValueError(
            f"column {score_column!r} holds {score!r}: a number from 0 to 1, or None, is needed; score the dataset "
            "again (QualityScorer), or name the column that holds the scores."
        )
    own["kept" if score >= threshold else "rejected"] += 1
    own["histogram"][min(int(score * BINS), BINS - 1)] += 1


def _quantiles(histogram: list[int]) -> dict[str, float] | None:
    """Middle of the bin in which each quantile lies."""
    total = sum(histogram)
    if not total:
        return None
    found, seen = {}, 0
    wanted = list(QUANTILES)
    for index, count in enumerate(histogram):
        seen += count
        while wanted and seen >= wanted[0] * total:
            found[f"{wanted.pop(0):g}"] = (index + 0.5) / BINS
    return found


def as_table(summary: dict, *, filtered: bool = True, most: int = LARGEST) -> str:
    """
    The counts as a Markdown table: the `most` sources with most rows, the others in one row.

    Args:
        filtered: False where the rows below the threshold are still in the dataset.
    """
    above, below = ("kept", "rejected") if filtered else (f"at or above {summary['threshold']:g}", "below")
    lines = [f"| source | rows | {above} | {below} | no score | share {above} | median score |", "| --- " * 7 + "|"]
    sources = sorted(summary["sources"].items(), key=lambda item: -item[1]["rows"])
    others = [own for _, own in sources[most:]]
    shown = [(_cell(name), own) for name, own in sources[:most]]
    if others:
        rest = _sum(others)
        rest["quantiles"] = _quantiles(rest["histogram"])
        shown.append((f"({len(others):,} smaller sources)", rest))
    for name, own in [*shown, ("all", summary["total"])]:
        median = "" if own["quantiles"] is None else f"{own['quantiles']['0.5']:.2f}"
        share = f"{own['kept'] / own['rows']:.0%}" if own["rows"] else ""
        lines.append(
            f"| {name} | {own['rows']:,} | {own['kept']:,} | {own['rejected']:,} | {own['without_score']:,} | "
            f"{share} | {median} |"
        )
    return "\n".join(lines)


def _cell(name: str) -> str:
    """A name that neither ends its cell of a Markdown table nor the table."""
    return " ".join(name.replace("\\", "\\\\").replace("|", "\\|").split())


def plot_scores(summary: dict, path: str | os.PathLike, most: int = 12) -> Path:
    """
    Score distributions by source as small pictures with one axis, the threshold marked; the `most` largest sources.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install transformers_minicpm4[data].") from error
    sources = sorted(summary["sources"].items(), key=lambda item: -item[1]["rows"])[:most]
    figure = Figure(figsize=(6, 0.6 + 0.55 * max(len(sources), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(len(sources), 1), 1, sharex=True, squeeze=False)[:, 0]
    edges = [(index + 0.5) / BINS for index in range(BINS)]
    for axis, (name, own) in zip(axes, sources):
        total = max(sum(own["histogram"]), 1)
        axis.bar(edges, [count / total for count in own["histogram"]], width=1 / BINS, color="#4878a8")
        axis.axvline(summary["threshold"], color="#c44e52", linewidth=1)
        axis.set_yticks([])
        name = " ".join(name.split())
        label = f"{name if len(name) <= 40 else name[:37] + '...'}\n{own['rows']:,}"
        # A name is a name: "$" begins no formula.
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7, parse_math=False)
    axes[-1].set_xlim(0, 1)
    axes[-1].set_xlabel("quality score")
    path = Path(path)
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)
    return path


def write_card(
    folder: str | os.PathLike,
    summary: dict,
    *,
    title: str,
    model: str,
    model_digest: str,
    tokenizer: str | None = None,
    license: str | None = None,
    notes: str = "",
    files: str | None = None,
    filtered: bool = True,
) -> Path:
    """
    Write `README.md` (a dataset card for the Hub), `summary.json` and, with matplotlib, `scores.png` into a
    dataset's folder.

    Args:
        summary: from `summarize`.
        model, model_digest: the classifier's name and the SHA-256 of its content.
        tokenizer: of the words the classifier was given; `None` if words end at white space, `"unknown"` if it is
            not known.
        license: of the *data*, as the Hub spells it (`apache-2.0`, `other`); left out of the card if unknown.
        files: pattern of the data files of the `train` split in the folder, for `load_dataset(folder)`.
        filtered: False for a dataset that is scored and still holds the rows below the threshold.

    Returns:
        the card's path.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        picture = plot_scores(summary, folder / "scores.png").name
    except ImportError:
        picture = None
    total, threshold = summary["total"], summary["threshold"]
    data = DatasetCardData(
        license=license,
        tags=["ultraclean", "quality-filtered" if filtered else "quality-scored"],
        size_categories=_size_category(total["kept" if filtered else "rows"]),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": files}]}] if files else None,
    )
    reasons = "\n".join(f"- {count:,}: {reason}" for reason, count in sorted(total["reasons"].items()))
    words = "white space" if tokenizer is None else tokenizer if tokenizer == "unknown" else f"`{tokenizer}`"
    above, below = ("kept", "rejected") if filtered else ("at or above the threshold", "below it")
    facts = [
        f"classifier: `{model}`, SHA-256 `{model_digest}`",
        f"words by: {words}",
        f"threshold: {threshold:g}",
        f"rows seen: {total['rows']:,}; {above}: {total['kept']:,}; {below}: {total['rejected']:,}; without a score: "
        f"{total['without_score']:,}",
    ]
    what = "Filtered" if filtered else "Scored"
    use = f"documents at {threshold:g} or above are kept" if filtered else "every document is still here"
    largest = f"The largest sources; `summary.json` lists all {len(summary['sources']):,}."
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"{what} by the UltraClean recipe (MiniCPM4, arXiv 2506.07900, section 3.1): a fastText classifier gives "
        f"each document the probability of being of the positive class; {use}.",
        "\n".join(f"- {fact}" for fact in facts),
        "## By source",
        as_table(summary, filtered=filtered, most=LARGEST),
        largest if len(summary["sources"]) > LARGEST else "",
        f"![score distributions by source]({picture})" if picture else "",
        "## Rows without a score" if reasons else "",
        reasons,
        notes,
        "A score says how much a document resembles the classifier's positive seeds. It is not a judgement of truth, "
        "safety or licence, and it is only as good as the verification of those seeds.",
    ]
    card = DatasetCard("\n\n".join(part for part in parts if part) + "\n")
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / "README.md", str(card))
    return folder / "README.md"


def _size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
    power = next((index for index in range(7) if rows < 1000 * 10**index), 7)
    if power == 0:
        return "n<1K"
    return f"{names[power - 1]}<n<{names[power]}" if power < 7 else "n>1B"
