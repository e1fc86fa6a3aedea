"""Frequency-ranked vocabularies against independent counting, on real text with the real SmolLM2 tokenizer."""

import gzip
import json
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transformers_minicpm4.generation.draft_tree import DraftTree, grow_tree
from transformers_minicpm4.generation.drafts import Draft
from transformers_minicpm4.generation.fr_spec import (
    FrequencyVocabulary,
    build_frequency_vocabulary,
    count_tokens,
    kept_ids,
    tokenizer_fingerprint,
)
from transformers_minicpm4.generation.speculative import speculative_decode


VOCABULARY = 49152


@pytest.fixture
def tokenizer(real_checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_checkpoint)


@pytest.fixture
def wikitext(shared_data):
    """Rows of both splits, as two datasets."""
    from datasets import Dataset

    folder = shared_data / "wikitext2"
    if not folder.is_dir():
        pytest.skip("../shared/data/wikitext2 is not beside this checkout")
    return {name: Dataset.from_parquet(str(folder / f"{name}.parquet")) for name in ("validation", "test")}


@pytest.fixture
def chinese(shared_data):
    file = shared_data / "debian-docs-quality" / "zh.jsonl.gz"
    if not file.is_file():
        pytest.skip("../shared/data/debian-docs-quality is not beside this checkout")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(next(lines))["text"] for _ in range(60)]


@pytest.fixture(autouse=True)
def no_caches(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def counter(texts, tokenizer):
    """Token by token, through another interface of the tokenizer."""
    counts = Counter()
    for text in texts:
        counts.update(tokenizer.encode(text, add_special_tokens=False))
    return counts


# --- Counting and ranking --------------------------------------------------------------------------------------------


def test_the_list_is_that_of_an_independent_count(tokenizer, wikitext):
    texts = wikitext["validation"]["text"][:1200]
    counts = counter(texts, tokenizer)
    found = build_frequency_vocabulary(texts, tokenizer, 2000, vocab_size=VOCABULARY, corpus="wikitext")
    kept = set(range(17))  # SmolLM2's added tokens
    best = sorted(set(counts) - kept, key=lambda token: (-counts[token], token))[: 2000 - len(kept)]
    assert list(found.ids) == sorted(kept | set(best), key=lambda token: (-counts[token], token))
    assert found.counts == tuple(counts[token] for token in found.ids)
    facts = found.facts
    assert facts["tokens"] == sum(counts.values())
    assert facts["covered"] == sum(counts[token] for token in found.ids)
    assert (facts["different_tokens"], facts["filled"], facts["corpus"]) == (len(counts), 0, "wikitext")


def test_batches_order_and_streaming_change_nothing(tokenizer, wikitext, chinese):
    rows = wikitext["validation"].select(range(200))
    texts = [*rows["text"], *chinese[:5]]
    whole = count_tokens(texts, tokenizer, VOCABULARY)
    forms = {
        "small batches": count_tokens(texts, tokenizer, VOCABULARY, batch_size=7),
        "one by one": count_tokens(iter(texts), tokenizer, VOCABULARY, batch_size=1),
        "backwards": count_tokens(reversed(texts), tokenizer, VOCABULARY),
        "in two": count_tokens(texts[:99], tokenizer, VOCABULARY) + count_tokens(texts[99:], tokenizer, VOCABULARY),
    }
    assert all(torch.equal(counts, whole) for counts in forms.values())
    dataset = count_tokens(texts[:200], tokenizer, VOCABULARY)
    renamed = rows.rename_column("text", "content").add_column("number", list(range(200)))
    assert torch.equal(count_tokens(rows, tokenizer, VOCABULARY), dataset)
    assert torch.equal(count_tokens(renamed, tokenizer, VOCABULARY, column="content"), dataset)
    streamed = renamed.to_iterable_dataset().shuffle(seed=1, buffer_size=100)
    assert torch.equal(count_tokens(streamed, tokenizer, VOCABULARY, column="content", batch_size=64), dataset)


def test_a_stream_is_held_a_batch_at_a_time(tokenizer):
    """No text is taken before the batch before it was counted."""
    taken, sizes = 0, []

    def stream():
        nonlocal taken
        for number in range(25):
            taken += 1
            yield f"text {number}"

    class Watched:
        def __call__(self, batch, **options):
            sizes.append((taken, len(batch)))
            return tokenizer(batch, **options)

    count_tokens(stream(), Watched(), VOCABULARY, batch_size=10)
    assert sizes == [(10, 10), (20, 10), (25, 5)]


@pytest.mark.parametrize("size", [20, 64])
def test_ends_of_text_and_special_tokens_are_always_kept(tokenizer, size):
    text = ["plain words and nothing else, " * 30]
    found = build_frequency_vocabulary(text, tokenizer, size, eos_token_id=[2, 48_000], keep=[47_000])
    assert {*range(17), 48_000, 47_000} <= set(found.ids)
    assert len(found) == size
    assert found.facts["kept"] == [*range(17), 47_000, 48_000]
    alone = build_frequency_vocabulary(text, tokenizer, size, eos_token_id=48_000)
    assert 48_000 in alone.ids
    # Beyond the target's head there is no row to keep.
    assert kept_ids(tokenizer, 10) == set(range(10))


def test_a_small_corpus_is_filled_with_the_lowest_ids():
    counts = torch.zeros(50, dtype=torch.int64)
    counts[[7, 30, 9, 41]] = torch.tensor([2, 5, 2, 1])
    found = FrequencyVocabulary.from_counts(counts, 10, keep=[45, 3])
    # By count, the lower id first; then those that did not occur: kept ones and 0 to 3, of which 3 is kept anyway.
    assert found.ids == (30, 7, 9, 41, 0, 1, 2, 3, 4, 45)
    assert found.counts == (5, 2, 2, 1, 0, 0, 0, 0, 0, 0)
    assert (found.facts["filled"], found.facts["different_tokens"]) == (4, 4)
    assert FrequencyVocabulary.from_counts(counts, 50).ids == (30, 7, 9, 41, *sorted(set(range(50)) - {30, 7, 9, 41}))
    # Kept tokens take the place of the rarest: 41 is as rare as can be, and the tie of 7 and 9 goes to 7.
    assert FrequencyVocabulary.from_counts(counts, 4, keep=[45, 46]).ids == (30, 7, 45, 46)


# --- Coverage --------------------------------------------------------------------------------------------------------


def test_coverage_is_the_share_that_is_counted_by_hand(tokenizer, wikitext, chinese):
    found = build_frequency_vocabulary(wikitext["validation"].select(range(800)), tokenizer, 3000)
    test = wikitext["test"].select(range(300))
    shares = found.coverage({"wikitext": test, "zh": chinese}, tokenizer, batch_size=50)
    for name, texts in (("wikitext", test["text"]), ("zh", chinese)):
        counts = counter(texts, tokenizer)
        covered = sum(number for token, number in counts.items() if token in set(found.ids))
        assert (shares[name].covered, shares[name].tokens) == (covered, sum(counts.values()))
        assert shares[name].share == covered / sum(counts.values())
    assert shares["zh"].share < shares["wikitext"].share


def test_coverage_grows_with_the_size_up_to_one(tokenizer, wikitext):
    counts = count_tokens(wikitext["validation"].select(range(800)), tokenizer, VOCABULARY)
    other = count_tokens(wikitext["test"].select(range(300)), tokenizer, VOCABULARY)
    lists = [FrequencyVocabulary.from_counts(counts, size, range(17)) for size in (17, 100, 1000, 8000, VOCABULARY)]
    for smaller, larger in zip(lists, lists[1:], strict=False):
        assert set(smaller.ids) < set(larger.ids)
        for one in (counts, other):
            assert smaller.coverage_of(one).share <= larger.coverage_of(one).share
        assert smaller.coverage_of(other).share < larger.coverage_of(other).share
    assert lists[-1].coverage_of(other).share == 1
    # On the counted text no list of this size covers more.
    best = int(counts.topk(1000 - 17).values.sum())
    assert best <= lists[2].coverage_of(counts).covered <= int(counts.topk(1000).values.sum())


# --- Files -----------------------------------------------------------------------------------------------------------


def small(**changes):
    counts = torch.tensor([3, 0, 9, 9, 1, 4, 0, 2])
    return FrequencyVocabulary.from_counts(counts, **{"size": 5, "keep": [6], "facts": {"corpus": "数"}, **changes})


def test_a_list_comes_back_as_it_was(tokenizer, tmp_path):
    for found in (small(), build_frequency_vocabulary(["some words"], tokenizer, 40, corpus="two words")):
        file = found.save(tmp_path / "lists" / str(len(found)))
        assert file.name == f"freq_{len(found)}.pt"
        assert FrequencyVocabulary.load(file) == found
        assert FrequencyVocabulary.load(file.parent, vocab_size=found.vocab_size, eos_token_id=[found.ids[0]]) == found
        shares = {"other": found.coverage_of(torch.arange(found.vocab_size))}
        file = found.save(tmp_path / "named.pt", shares)
        assert file == tmp_path / "named.pt"
        noted = json.loads((tmp_path / "named.json").read_text(encoding="utf-8"))["coverage"]["other"]
        assert (noted["tokens"], noted["share"]) == (shares["other"].tokens, shares["other"].share)
        assert (
            FrequencyVocabulary.load(file).save(tmp_path / "again.pt").with_suffix(".json").read_text()
            == (tmp_path / "named.json").read_text()
        )
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_file_is_what_cpm_cu_reads(tmp_path):
    ids = torch.load(small().save(tmp_path), weights_only=True)
    assert type(ids) is list
    assert {type(token) for token in ids} == {int}
    assert ids == [2, 3, 5, 0, 6]
    assert torch.equal(small().to_tensor(), torch.tensor(ids))


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)])
def test_a_file_of_another_program(tmp_path, form):
    torch.save(form([2, 3, 5, 0, 7]), tmp_path / "freq_5.pt")
    found = FrequencyVocabulary.load(tmp_path, vocab_size=8, eos_token_id=7)
    assert found == FrequencyVocabulary((2, 3, 5, 0, 7), 8)
    assert FrequencyVocabulary.load(found.save(tmp_path / "ours")) == found
    with pytest.raises(ValueError, match="says nothing of the vocabulary"):
        FrequencyVocabulary.load(tmp_path)


@pytest.mark.parametrize("failing", ["torch.save", "os.replace"])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch, failing):
    old = small()
    file = old.save(tmp_path / "list.pt")

    def fail(*arguments):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match="disk is full"):
            small(size=6).save(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.json", "list.pt"]
    assert FrequencyVocabulary.load(file) == old


@pytest.mark.parametrize(
    "content, words",
    [
        ([2, 3, 8], r"token id 8 is outside the target's vocabulary of 8 \(0 to 7\)"),
        ([2, -1, 7], "token id -1 is outside"),
        ([2, 3, 2, 7], "token id 2 stands in the list twice"),
        ([2, 3, 5], "lacks the end-of-text id 7"),
        ([], "at least one token id"),
        ([1.0, 7], "no list of token ids"),
        ([True, 7], "no list of token ids"),
        (torch.tensor([1.0, 7.0]), "holds a Tensor that is no list"),
        (torch.tensor([[1, 7]]), "holds a Tensor that is no list"),
        ({"ids": [7]}, "holds a dict that is no list"),
    ],
)
def test_lists_that_are_none(tmp_path, content, words):
    torch.save(content, tmp_path / "freq.pt")
    with pytest.raises(ValueError, match=words):
        FrequencyVocabulary.load(tmp_path / "freq.pt", vocab_size=8, eos_token_id=[2, 7] if content != [] else None)


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no freq_"):
        FrequencyVocabulary.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        FrequencyVocabulary.load(tmp_path / "absent.pt")
    file = small().save(tmp_path)
    with pytest.raises(ValueError, match="made for a vocabulary of 8 tokens and the target has 9"):
        FrequencyVocabulary.load(file, vocab_size=9)
    small(size=6).save(tmp_path)
    with pytest.raises(ValueError, match=r"holds freq_5.pt, freq_6.pt; give the one"):
        FrequencyVocabulary.load(tmp_path)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="describes other ids than freq_5.pt"):
        FrequencyVocabulary.load(file)
    file.write_bytes(b"not torch's")
    with pytest.raises(ValueError, match="cannot be read as a list of token ids"):
        FrequencyVocabulary.load(file)
    small().save(tmp_path)
    file.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match="freq_5.json is no JSON"):
        FrequencyVocabulary.load(file)
    file.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="not of this program"):
        FrequencyVocabulary.load(file)


# --- Use -------------------------------------------------------------------------------------------------------------


class Restricted(Draft):
    """A draft that scores `vocabulary_ids` only, by a fixed table: row r of the head is token `ids[r]`."""

    def __init__(self, ids, table):
        self.ids, self.table = ids, table[:, ids].log_softmax(-1)

    def propose(self, token_ids, limit):
        def expand(nodes):
            return self.table[[int(self.ids[row]) for _, row in nodes]]

        tree = grow_tree(expand, self.table[token_ids[-1]], min(3, limit), 3, 12)
        return DraftTree(tuple(int(self.ids[row]) for row in tree.tokens), tree.parents, tree.worths)


@pytest.mark.parametrize("size", [2, 20, 128])
def test_a_restricted_draft_changes_nothing(size):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, pad_token_id=None,
    )).double().eval()  # fmt: skip
    prompt = torch.randint(3, 60, (1, 12))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0  # the last token alone matters, and the draft knows the rest
        table = model(torch.arange(128)[:, None]).logits[:, 0]
    plain = model.generate(prompt, max_new_tokens=40, do_sample=False)
    counts = torch.bincount(plain[0], minlength=128)
    found = FrequencyVocabulary.from_counts(counts, size, keep=[127])
    draft = Restricted(found.to_tensor(), table)
    got = model.generate(prompt, custom_generate=speculative_decode, draft=draft, max_new_tokens=40, do_sample=False)
    assert torch.equal(got, plain)
    assert draft.proposed > 40
    if size == 128:
        assert draft.passes <= 11  # all is right: three drafted tokens and one more a pass, but where one was cut


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_sizes_and_corpora_that_cannot_be(tokenizer):
    def build(texts=("words",), size=100, **options):
        return build_frequency_vocabulary(texts, tokenizer, size, **options)

    with pytest.raises(ValueError, match="at least 17 .* at most the vocabulary's 49,152"):
        build(size=49_153)
    with pytest.raises(ValueError, match="16 tokens was asked for; it has at least 17"):
        build(size=16)
    with pytest.raises(ValueError, match="at least 18"):
        build(size=17, eos_token_id=[2, 300])
    with pytest.raises(ValueError, match="token id 60000 must be kept but is outside"):
        build(eos_token_id=60_000)
    for texts in ([], ["", ""], iter(())):
        with pytest.raises(ValueError, match="the corpus holds no token"):
            build(texts)
    with pytest.raises(ValueError, match="produced the id .* and the vocabulary has 100 tokens"):
        build(vocab_size=100, size=50)
    with pytest.raises(TypeError, match="one string is given"):
        build("words")
    with pytest.raises(TypeError, match="text 2 is of type NoneType"):
        build(["words", None])
    with pytest.raises(TypeError, match="text 1 has no column 'text'; its columns are content"):
        build([{"content": "words"}])


def test_coverage_of_nothing_and_of_another_tokenizer(tokenizer):
    found = build_frequency_vocabulary(["words"], tokenizer, 100)
    with pytest.raises(ValueError, match="'empty' holds no token"):
        found.coverage({"empty": [""]}, tokenizer)
    tokenizer.add_tokens(["<|new|>"])
    assert tokenizer_fingerprint(tokenizer) != found.facts["tokenizer"]
    with pytest.raises(ValueError, match="counted with another tokenizer"):
        found.coverage({"text": ["words"]}, tokenizer)


def test_a_list_checks_itself():
    with pytest.raises(ValueError, match="2 counts for 1 token ids"):
        FrequencyVocabulary((1,), 5, (1, 2))
