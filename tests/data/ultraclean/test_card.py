"""The card's figures are those of the rows, counted here in another way, and the Hub's own readers read it back."""

import json
import random
import re
from collections import Counter

import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard

from transformers_minicpm4.data.ultraclean.card import _size_category, as_table, plot_scores, summarize, write_card


@pytest.fixture
def rows():
    random.seed(0)
    made = []
    for index in range(300):
        score = None if index % 17 == 0 else random.random()
        reason = ("empty" if index % 2 else "missing") if score is None else None
        source = ("web", "books", None)[index % 3]
        made.append({"text": "x" * index, "source": source, "quality_score": score, "quality_reason": reason})
    return made


def test_counts_are_conserved(rows):
    summary = summarize(rows, threshold=0.6)
    total = summary["total"]
    assert total["rows"] == total["kept"] + total["rejected"] + total["without_score"] == 300
    assert total["kept"] == sum(row["quality_score"] is not None and row["quality_score"] >= 0.6 for row in rows)
    assert total["reasons"] == Counter(row["quality_reason"] for row in rows if row["quality_score"] is None)
    assert total["characters"] == sum(len(row["text"]) for row in rows)
    for name in ("rows", "kept", "rejected", "without_score", "characters"):
        assert sum(own[name] for own in summary["sources"].values()) == total[name]
    assert sum(total["histogram"]) == 300 - total["without_score"]
    assert set(summary["sources"]) == {"web", "books", "(no source)"}


def test_quantiles_lie_in_the_bin_of_the_exact_ones(rows):
    scores = sorted(row["quality_score"] for row in rows if row["quality_score"] is not None)
    found = summarize(rows)["total"]["quantiles"]
    for name, value in found.items():
        exact = scores[max(int(-(-float(name) * len(scores) // 1)) - 1, 0)]
        assert abs(value - exact) <= 0.5 / 40 + 1e-9, name


def test_a_dataset_and_a_stream_give_the_same(rows):
    dataset = Dataset.from_list(rows)
    assert summarize(dataset) == summarize(dataset.to_iterable_dataset(num_shards=3)) == summarize(rows)


def test_unscored_rows_are_refused():
    with pytest.raises(ValueError, match="no column 'quality_score'.*score the dataset first"):
        summarize([{"text": "a"}])
    for score in ("0.7", True, 1.5, float("nan")):
        with pytest.raises(ValueError, match="'quality_score' holds .*a number from 0 to 1, or None, is needed"):
            summarize([{"text": "a", "quality_score": score}])
    with pytest.raises(ValueError, match="threshold=2"):
        summarize([], threshold=2)


def test_a_long_table_ends_with_the_smaller_sources_in_one_row(rows):
    for index in range(60):
        rows += [{"source": f"s{index:02d}", "quality_score": 0.25 if index < 3 else 0.9}] * (100 - index)
    summary = summarize(rows)
    lines = as_table(summary, most=20).splitlines()[2:]
    assert len(lines) == 20 + 2
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[20][0] == f"({len(summary['sources']) - 20} smaller sources)"
    for column in range(1, 5):  # the rows add up to the last
        *parts, total = (int(line[column].replace(",", "")) for line in cells)
        assert sum(parts) == total
    assert cells[20][6] == "0.91"
    assert len(as_table(summary).splitlines()) == 2 + 30 + 2


NAMES = ["$x_{$", "a$b$c", "cost $5 | cost $6", "tab\\|le", "two\nlines", "x" * 300, ""]


def test_names_of_sources_break_neither_picture_nor_table(tmp_path):
    summary = summarize({"source": name, "quality_score": 0.5} for name in NAMES)
    plot_scores(summary, tmp_path / "scores.png")
    table = as_table(summary).splitlines()
    assert len(table) == 2 + len(NAMES) + 1
    for line in table:
        # what remains of the pipes when escaped characters are gone are the borders of seven cells
        assert re.sub(r"\\.", "", line).count("|") == 8, line


def test_a_scored_dataset_is_not_called_filtered(rows, tmp_path):
    facts = {"title": "A corpus", "model": "m.bin", "model_digest": "ab" * 32, "tokenizer": "unknown"}
    write_card(tmp_path, summarize(rows, threshold=0.6), **facts, filtered=False)
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.data.tags == ["ultraclean", "quality-scored"]
    assert "every document is still here" in card.text
    assert "| at or above 0.6 | below |" in card.text
    for word in ("kept", "rejected", "iltered"):
        assert word not in card.text
    assert "words by: unknown" in card.text
    for tokenizer, words in ((None, "words by: white space"), ("owner/name", "words by: `owner/name`")):
        write_card(tmp_path, summarize(rows), **{**facts, "tokenizer": tokenizer})
        assert words in (tmp_path / "README.md").read_text()


def test_the_card_lists_the_largest_sources_and_the_file_all(tmp_path):
    summary = summarize({"source": f"s{index}", "quality_score": 0.5} for index in range(45))
    write_card(tmp_path, summary, title="Many", model="m.bin", model_digest="ab" * 32)
    assert "`summary.json` lists all 45" in (tmp_path / "README.md").read_text()
    assert len(json.loads((tmp_path / "summary.json").read_text())["sources"]) == 45


def test_the_card_loads_as_a_card_and_the_folder_as_a_dataset(rows, tmp_path):
    kept = [row for row in rows if row["quality_score"] is not None and row["quality_score"] >= 0.5]
    (tmp_path / "data").mkdir()
    Dataset.from_list(kept).to_parquet(tmp_path / "data" / "0.parquet")
    summary = summarize(rows)
    facts = {"title": "A corpus", "model": "m.bin", "model_digest": "ab" * 32}
    write_card(tmp_path, summary, **facts, license="apache-2.0", files="data/*.parquet")
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.size_categories == "n<1K"
    assert as_table(summary) in card.text
    assert "ab" * 32 in card.text
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert load_dataset(str(tmp_path), split="train").to_list() == kept
    assert not list(tmp_path.glob(".*partial*"))


def test_the_picture_is_a_picture_and_holds_no_more_sources_than_asked(rows, tmp_path):
    from matplotlib.image import imread

    two, three = (imread(plot_scores(summarize(rows), tmp_path / "scores.png", most=most)) for most in (2, 3))
    assert two.shape[0] < three.shape[0]
    assert two.std() > 0.01


@pytest.mark.parametrize(
    "rows, name", [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**7, "10M<n<100M"), (10**9, "n>1B")]
)
def test_size_categories_are_the_hubs(rows, name):
    assert _size_category(rows) == name
