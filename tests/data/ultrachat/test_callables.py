"""What all callables of the room share: they travel to workers, hash alike, cannot change, and the example runs."""

import pickle
import re
import runpy
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from datasets.fingerprint import Hasher

from transformers_minicpm4.data.ultrachat.code_filter import CodeFilter
from transformers_minicpm4.data.ultrachat.constraints import ConstraintChecker, KeepPassing, OutputsChecker
from transformers_minicpm4.data.ultrachat.difficulty import DifficultyFilter
from transformers_minicpm4.data.ultrachat.generation import TrackGenerator
from transformers_minicpm4.data.ultrachat.long_context import LongContextPacker
from transformers_minicpm4.data.ultrachat.reasons import join_reasons, reason_counts
from transformers_minicpm4.data.ultrachat.retrieval import BM25Index
from transformers_minicpm4.data.ultrachat.text_counts import count_words
from transformers_minicpm4.data.ultrachat.tool_calls import ToolCallFilter


CALLS = [
    (ConstraintChecker([{"type": "words", "at_least": 2}]), {"response": "one"}),
    (OutputsChecker([{"type": "title"}]), {"outputs": ["# a", "b"]}),
    (KeepPassing(), {"outputs": [["a", "b"]], "outputs_passed": [[True, False]], "id": [3]}),
    (ToolCallFilter(), {"tools": [], "messages": []}),
    (CodeFilter(allowed_imports=("numpy",)), {"code": "import numpy"}),
    (DifficultyFilter(), {"results": [1, 0, 1, 1]}),
    (LongContextPacker(BM25Index(["a b", "b c d"]), count_words, 3, 9), {"id": "x", "text": "b e"}),
    (TrackGenerator("evolve_question", str, max_attempts=2), {"question": "Why?"}),
]


@pytest.mark.parametrize("call, row", CALLS, ids=lambda value: type(value).__name__)
def test_callables_travel_and_hash_alike(call, row):
    before = Hasher.hash(call)
    result = call(row)
    copy = pickle.loads(pickle.dumps(call))
    assert copy(row) == result
    assert Hasher.hash(call) == Hasher.hash(copy) == before  # so that datasets' cache finds what was done
    assert None not in result.values()  # a null in a first row would fix the column's type
    with pytest.raises(FrozenInstanceError):
        call.text_column = "other"


def test_settings_change_the_hash():
    checkers = [ConstraintChecker([{"type": "words", "at_least": n}]) for n in (2, 3)]
    assert Hasher.hash(checkers[0]) != Hasher.hash(checkers[1])


def test_reasons_count_rows_once():
    reasons = ["ok", join_reasons([]), join_reasons(["words: 1", "title: none"]), "words: 2"]
    assert reason_counts(reasons) == {"ok": 2, "words": 2}


def test_the_example_prints_every_part(capsys):
    example = Path(__file__).resolve().parents[3] / "examples" / "ultrachat.py"
    from datasets import enable_progress_bars

    runpy.run_path(str(example), run_name="__main__")
    enable_progress_bars()
    out = capsys.readouterr().out
    for title in ("Constraints", "Tool calls", "Code", "Difficulty", "Semantic dedup", "Long context", "Generation"):
        assert re.search(rf"^{title}", out, re.MULTILINE), title
    for reason in (
        "words: 2, asked 5 to 40",
        "unknown_tool",
        "external_import",
        "all_right: 4 of 4",
        "duplicate: of 0",
    ):
        assert reason in out
    # The page quotes the example's output; lines that it shows are lines that it prints.
    page = (example.parents[1] / "docs" / "ultrachat.md").read_text(encoding="utf-8")
    quoted = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1]
    assert set(quoted.splitlines()) <= set(out.splitlines())
