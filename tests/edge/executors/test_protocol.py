"""What an executor declares is what it does, and a call beyond that is refused by name."""

import json

import pytest
import torch

from conftest import SPARSE, make_config
from transformers_minicpm4 import MiniCPM4ForCausalLM
from transformers_minicpm4.edge.executors import CALLS, CallNotOffered, Executor
from transformers_minicpm4.edge.executors.torch_executor import TorchExecutor
from transformers_minicpm4.edge.trace import Trace, trace
from transformers_minicpm4.generation.draft_tree import ROOT, DraftTree


IDS = torch.randint(0, 127, (30,), generator=torch.Generator().manual_seed(1)).tolist()


def executor(sparse_config=None, **options):
    torch.manual_seed(0)
    config = make_config(sparse_config=sparse_config)
    return TorchExecutor(MiniCPM4ForCausalLM(config).double().eval(), context=64, **options)


def logits(model, token_ids):
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0]


class ScoresOnly(Executor):
    name, calls, vocab_size, context = "scorer", frozenset({"score", "generate"}), 128, 64


def test_an_undeclared_call_is_refused_and_the_declared_ones_are_named():
    tree = DraftTree((1,), (ROOT,))
    calls = {
        "prefill": lambda: ScoresOnly().prefill([1]),
        "decode": lambda: ScoresOnly().decode(1),
        "verify": lambda: ScoresOnly().verify(1, tree),
        "reset": lambda: ScoresOnly().reset(),
    }
    for name, call in calls.items():
        with pytest.raises(CallNotOffered, match=f"scorer does not offer {name}; it offers generate, score."):
            call()
    with pytest.raises(CallNotOffered):
        ScoresOnly().keep([0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda made: made.score([]), "no tokens"),
        (lambda made: made.score([5]), "two tokens"),
        (lambda made: made.score([5, 6], top=1), "top is 2 or more"),
        (lambda made: made.score([5, 128]), "token 128 was given; torch knows 0 .. 127"),
        (lambda made: made.prefill([1] * 65), "65 tokens do not fit into torch's context of 64"),
        (lambda made: made.generate([1] * 60, 5), "65 tokens do not fit"),
    ],
)
def test_bad_input_is_refused_at_the_door(call, message):
    with pytest.raises(ValueError, match=message):
        call(executor())


def test_the_context_counts_what_the_text_holds():
    made = executor()
    made.prefill([1] * 64)
    with pytest.raises(ValueError, match="65 tokens do not fit"):
        made.decode(1)
    made.reset()
    made.decode(1)


def test_torch_offers_every_call_and_each_gives_the_models_own_logits():
    made = executor()
    assert made.calls == frozenset(CALLS)
    want = logits(made.model, IDS)
    # Two pieces, then a token at a time.
    torch.testing.assert_close(made.prefill(IDS[:9]), want[8], rtol=0, atol=1e-12)
    torch.testing.assert_close(made.prefill(IDS[9:20]), want[19], rtol=0, atol=1e-12)
    for place in range(20, 25):
        torch.testing.assert_close(made.decode(IDS[place]), want[place], rtol=0, atol=1e-12)
    # A tree with the text's next tokens in it (nodes 1 and 2) and others; what is kept is as if it had been decoded.
    tree = DraftTree((3, IDS[26], IDS[27], 9), (ROOT, ROOT, 1, 2))
    got = made.verify(IDS[25], tree)
    torch.testing.assert_close(got[[0, 2, 3]], want[25:28], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], logits(made.model, [*IDS[:26], 3])[-1], rtol=0, atol=1e-12)
    made.keep([0, 2, 3])
    torch.testing.assert_close(made.decode(IDS[28]), want[28], rtol=0, atol=1e-12)
    made.reset()
    torch.testing.assert_close(made.decode(IDS[0]), want[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sparse", [None, SPARSE.to_dict()])
def test_scores_are_the_log_softmax_and_pieces_do_not_matter(sparse, monkeypatch):
    made = executor(sparse_config=sparse)
    assert (made.runner.settings is None) == (sparse is None)
    want = logits(made.model, IDS).log_softmax(-1)[:-1]
    for chunk in (512, 7):
        monkeypatch.setattr("transformers_minicpm4.edge.executors.torch_executor.CHUNK_TOKENS", chunk)
        got = made.score(IDS, top=5)
        following = torch.tensor(IDS[1:])[:, None]
        torch.testing.assert_close(got.logprobs, want.gather(1, following)[:, 0], rtol=0, atol=1e-12)
        torch.testing.assert_close(got.top_logprobs, want.topk(5).values, rtol=0, atol=1e-12)
        assert torch.equal(got.top_ids, want.topk(5).indices)


def test_generate_is_greedy_and_ends_with_a_stop_token():
    made = executor()
    want = made.model.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=False, eos_token_id=[])
    want = want[0, len(IDS) :].tolist()
    made.prefill(IDS[:4])  # what was there before does not matter
    assert made.generate(IDS, 8) == want
    stop = next(token for token in want[1:] if token != want[0])
    assert made.generate(IDS, 8, [stop]) == want[: want.index(stop) + 1]
    assert made.generate(IDS, 0) == []


def test_kept_rows_are_those_of_a_verify_just_before():
    made = executor()
    made.prefill(IDS[:4])
    with pytest.raises(ValueError, match="row 0 was given to keep, and verify was not called"):
        made.keep([0])
    made.verify(IDS[4], DraftTree((IDS[5],), (ROOT,)))
    with pytest.raises(ValueError, match=r"row 2 was given to keep, and verify has rows 0 \.\. 1"):
        made.keep([0, 2])
    made.keep([0, 1])
    torch.testing.assert_close(made.decode(IDS[6]), logits(made.model, IDS[:7])[-1], rtol=0, atol=1e-12)
    made.verify(IDS[7], DraftTree((IDS[8],), (ROOT,)))
    made.reset()
    with pytest.raises(ValueError, match="not called"):
        made.keep([0])


def test_tokens_are_whole_numbers_of_any_kind_and_a_closed_executor_says_so():
    made = executor()
    want = made.score(IDS[:5])
    assert torch.equal(made.score(torch.tensor(IDS[:5])).logprobs, want.logprobs)
    with pytest.raises(TypeError, match="float"):
        made.prefill([1.5])
    with pytest.raises(ValueError, match="max_new_tokens is 0 or more, got -1"):
        made.generate(IDS, -1)
    made.close()
    for call in (lambda: made.score(IDS), lambda: made.generate(IDS, 1), made.reset):
        with pytest.raises(ValueError, match="torch was closed; open it again"):
            call()


def test_a_trace_file_nests_calls_within_calls(tmp_path):
    with trace(tmp_path / "calls.json") as timeline:
        made = executor(trace=timeline, name="reference")
        with timeline.span("request", lane="reference", user="a"):
            made.generate(IDS, 3)
        with pytest.raises(ValueError, match="token -1"):
            made.decode(-1)
    events = json.loads((tmp_path / "calls.json").read_text())["traceEvents"]
    rows = [event for event in events if event["ph"] == "M"]
    assert [(row["name"], row["args"]["name"]) for row in rows] == [("thread_name", "reference")]
    spans = [event for event in events if event["ph"] == "X"]
    names = [span["name"] for span in spans]
    assert names == ["request", "generate", "reset", "prefill", "decode", "decode", "reset", "decode"]
    assert spans[0]["args"] == {"user": "a"}
    assert spans[3]["args"] == {"tokens": len(IDS)}
    assert [span["args"]["position"] for span in spans[4:6]] == [len(IDS), len(IDS) + 1]
    assert spans[-1]["args"]["error"] == "ValueError"
    for outer, inner in [(0, 1), *((1, inside) for inside in range(2, 7))]:
        begin, end = spans[outer]["ts"], spans[outer]["ts"] + spans[outer]["dur"]
        assert begin <= spans[inner]["ts"]
        assert spans[inner]["ts"] + spans[inner]["dur"] <= end + 1e-6
    for before, after in zip(spans[2:6], spans[3:7]):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-6
    assert len({(span["pid"], span["tid"]) for span in spans}) == 1


def test_a_trace_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "calls.json"
    path.write_text("older")
    timeline = Trace()
    with timeline.span("thing", value=float("nan")):
        pass
    with pytest.raises(ValueError, match="JSON"):
        timeline.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["calls.json"]
    assert path.read_text() == "older"
    with pytest.raises(KeyError), trace(path) as timeline, timeline.span("thing"):
        raise KeyError
    assert json.loads(path.read_text())["traceEvents"][1]["args"] == {"error": "KeyError"}
