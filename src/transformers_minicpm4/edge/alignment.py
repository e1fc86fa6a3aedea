"""
Whether two runtimes compute the same model: their log-probabilities of one text against each other.

Most mistakes of an export leave the likeliest token as it is and pass unseen in what a model says. A wrong scale of
the logits shows in the slope: a log-probability is a logit less a constant of its place, so differences within a place
are differences of logits, and the second executor's against the first's have the slope `scale of the second / scale of
the first`, 1 where both are right.

Shape letters: `S` tokens of a text, `K` candidates of a place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from ..quantization.export.checkpoint_files import new_file
from .executors.protocol import Executor


@dataclass(frozen=True)
class Divergence:
    """
    The first place where the likeliest tokens differ, the text before it being the same.

    Attributes:
        position: of the token that is predicted, from 0.
        first, second: the likeliest tokens.
        first_gap, second_gap: log-probability of the likeliest less that of the next, in nats, for each executor.
    """

    position: int
    first: int
    second: int
    first_gap: float
    second_gap: float


@dataclass(frozen=True)
class Alignment:
    """
    Attributes:
        first, second: the executors' names.
        tokens: of the text that were predicted, `S - 1`.
        candidates: log-probabilities compared: the text's own token and those among the likeliest of both, a place.
        slope: least squares of the second's on the first's, each less its mean over the place.
        max_difference, mean_difference: absolute, in nats.
        agreement: share of places with the same likeliest token.
        divergence: the first place without, or `None`.
        pairs: what was compared, as (first's, second's).
    """

    first: str
    second: str
    tokens: int
    candidates: int
    slope: float
    max_difference: float
    mean_difference: float
    agreement: float
    divergence: Divergence | None
    pairs: tuple[tuple[float, float], ...] = field(repr=False)

    def within(self, tolerance: float = 0.01) -> bool:
        """Whether the slope is 1 but for `tolerance`."""
        return abs(self.slope - 1) <= tolerance

    def report(self) -> str:
        lines = [
            f"{self.second} against {self.first}: {self.tokens} tokens, {self.candidates} log-probabilities",
            f"  slope               {self.slope:.4f} (1 where right)",
            f"  largest difference  {self.max_difference:.2e} nats, mean {self.mean_difference:.2e}",
            f"  same likeliest      {self.agreement:.1%} of places",
        ]
        where = self.divergence
        if where is None:
            lines.append("  first divergence    none")
        else:
            lines.append(
                f"  first divergence    place {where.position}: token {where.first} (ahead by {where.first_gap:.2e}) "
                f"and {where.second} (by {where.second_gap:.2e})"
            )
        return "\n".join(lines)

    def json(self) -> str:
        """The figures, without `pairs`."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "pairs"}, indent=2)

    def plot(self, path: str | os.PathLike) -> None:
        """
        All pairs, with the line on which they should lie; a `.png`, `.svg` or `.pdf`.

        Raises:
            ImportError: `matplotlib` is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        low = min(map(min, self.pairs))
        axes.plot([low, 0], [low, 0], color="silver", linewidth=3)
        axes.scatter(*zip(*self.pairs), s=4, linewidths=0)
        axes.set_xlabel(f"{self.first}: log-probability (nats)")
        axes.set_ylabel(f"{self.second}: log-probability (nats)")
        axes.set_title(f"slope {self.slope:.4f}, largest difference {self.max_difference:.1e}")
        kind = os.path.splitext(path)[1].lstrip(".") or "png"
        with new_file(path) as work:
            figure.savefig(work, format=kind)


def align(first: Executor, second: Executor, token_ids: Sequence[int], top: int = 16) -> Alignment:
    """
    Compare two executors that offer `score` on one text.

    Args:
        first: the reference.
        second: what is checked.
        token_ids: `S` tokens, two or more.
        top: candidates a place, `K`.

    Raises:
        CallNotOffered: one of them has no `score`.
        ValueError: vocabularies of different size, a text that one of them refuses, or one in which nothing but a
            single candidate a place is common to both.
    """
    if first.vocab_size != second.vocab_size:
        raise ValueError(
            f"{first.name} knows {first.vocab_size} tokens and {second.name} {second.vocab_size}: not the same model."
        )
    token_ids = list(token_ids)
    one, other = first.score(token_ids, top), second.score(token_ids, top)
    pairs, products, squares, same, divergence = [], 0.0, 0.0, 0, None
    for place, token in enumerate(token_ids[1:]):
        known, also = (_candidates(scores, place, token) for scores in (one, other))
        found = [(known[candidate], also[candidate]) for candidate in known if candidate in also]
        means = [sum(values) / len(found) for values in zip(*found)]
        products += sum((a - means[0]) * (b - means[1]) for a, b in found)
        squares += sum((a - means[0]) ** 2 for a, _ in found)
        pairs += found
        if one.top_ids[place, 0] == other.top_ids[place, 0]:
            same += 1
        elif divergence is None:
            gaps = [float(scores.top_logprobs[place, 0] - scores.top_logprobs[place, 1]) for scores in (one, other)]
            divergence = Divergence(place + 1, int(one.top_ids[place, 0]), int(other.top_ids[place, 0]), *gaps)
    if squares == 0:
        raise ValueError(f"of the {top} likeliest tokens none but the text's own is common to both; raise `top`.")
    differences = [abs(a - b) for a, b in pairs]
    return Alignment(
        first=first.name,
        second=second.name,
        tokens=len(token_ids) - 1,
        candidates=len(pairs),
        slope=products / squares,
        max_difference=max(differences),
        mean_difference=sum(differences) / len(differences),
        agreement=same / (len(token_ids) - 1),
        divergence=divergence,
        pairs=tuple(pairs),
    )


def _candidates(scores, place: int, token: int) -> dict[int, float]:
    likeliest = zip(scores.top_ids[place].tolist(), scores.top_logprobs[place].tolist())
    return {**dict(likeliest), token: float(scores.logprobs[place])}


__all__ = ["Alignment", "Divergence", "align"]
