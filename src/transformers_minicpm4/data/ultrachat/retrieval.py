"""BM25 over a corpus that fits in memory: finds the distractors of `long_context.py`."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .text_counts import find_words


class BM25Index:
    """
    BM25 (Robertson and Zaragoza, 2009; the non-negative idf that Lucene uses) with every score computed at the build:
    a query only adds up the lists of its words. Words as in `text_counts`, in small letters, so Chinese goes by
    characters. Picklable; read it only.

    Args:
        texts: the corpus, N texts; None counts as empty.
        ids: their ids, all different (None: 0 to N-1).
        k1: saturation of repeated words, 0 or more. b: correction for length, 0 to 1.
    Raises:
        ValueError: no texts, ids of another number or repeated, k1 or b outside the range.
    """

    def __init__(self, texts: Sequence[str], ids: Sequence | None = None, k1: float = 1.2, b: float = 0.75):
        self.texts = [text or "" for text in texts]
        self.ids = list(range(len(self.texts))) if ids is None else list(ids)
        if not self.texts:
            raise ValueError("no texts to build an index from; give at least one")
        if len(self.ids) != len(self.texts) or len(set(self.ids)) != len(self.ids):
            raise ValueError(f"{len(self.texts)} texts and {len(set(self.ids))} different ids; give each text its own")
        if k1 < 0 or not 0 <= b <= 1:
            raise ValueError(f"k1 = {k1} is 0 or more, b = {b} is 0 to 1")
        counts = [Counter(words_of(text)) for text in self.texts]
        lengths = np.array([sum(count.values()) for count in counts], np.float64)
        norms = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-12))
        postings: dict[str, tuple[list[int], list[int]]] = {}
        for place, count in enumerate(counts):
            for word, times in count.items():
                places, frequencies = postings.setdefault(word, ([], []))
                places.append(place)
                frequencies.append(times)
        self.idf: dict[str, float] = {}
        self.postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, (places, frequencies) in postings.items():
            found, times = np.array(places, np.int32), np.array(frequencies, np.float64)
            self.idf[word] = float(np.log1p((len(self.texts) - len(found) + 0.5) / (len(found) + 0.5)))
            self.postings[word] = found, self.idf[word] * times * (k1 + 1) / (times + norms[found])

    def scores(self, query: str, max_terms: int | None = None) -> np.ndarray:
        """
        BM25 of every text, float64 [N]. Each different word of the query counts once; of more than `max_terms` words
        the rarest in the corpus are used (equals in alphabetical order).
        """
        words = sorted(set(words_of(query)) & self.idf.keys(), key=lambda word: (-self.idf[word], word))
        total = np.zeros(len(self.texts))
        for word in words[:max_terms]:
            places, weights = self.postings[word]
            total[places] += weights
        return total

    def rank(self, query: str, max_terms: int | None = None) -> list[int]:
        """Places of the texts that share a word with the query, best first, equals in the order of the corpus."""
        scores = self.scores(query, max_terms)
        order = np.argsort(-scores, kind="stable")
        return order[scores[order] > 0].tolist()


def words_of(text: str) -> list[str]:
    return [word.lower() for word in find_words(text)]


def word_runs(text: str, size: int = 5) -> set[tuple[str, ...]]:
    """The different runs of `size` words of a text; a shorter text is one run, a text without words none."""
    words = words_of(text)
    return {tuple(words[n : n + size]) for n in range(max(1, len(words) - size + 1))} if words else set()


def containment(one: set, other: set) -> float:
    """Shared elements as a share of the smaller set: 1.0 for an excerpt and its source, 0.0 where either is empty."""
    smaller = min(len(one), len(other))
    return len(one & other) / smaller if smaller else 0.0
