"""`minicpm4 chunk-plan`: the table, its picture, and a sentence for every unusable log of lengths."""

import json

import numpy as np
import pytest

from transformers_minicpm4.rl.schedule import PAPER_COSTS, plan


RUN = ("--max-completion-length", 256, "--batch", 32, "--num-generations", 4, "--steps", 8)


@pytest.fixture
def lengths(tmp_path):
    """A log of 200 lengths with a long tail, and what is in it."""
    values = np.random.default_rng(0).lognormal(3.3, 1.0, 200).round().clip(1, 256).astype(int).tolist()
    path = tmp_path / "lengths.jsonl"
    path.write_text("".join(json.dumps({"completion_length": value}) + "\n" for value in values))
    return path, values


def test_the_table_has_a_row_for_each_chunk_length(run_cli, lengths):
    result = run_cli("chunk-plan", lengths[0], *RUN)
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines() if line.startswith("  ") and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["256", "128", "64", "32", "16"]
    assert rows[0][1:3] == ["1.00", "1.00"]
    assert "200 lengths: mean" in result.out
    assert "costs: fitted to the paper's table" in result.out
    assert "recommended: " in result.out.splitlines()[-1]


def test_json_says_what_the_library_says(run_cli, lengths):
    result = run_cli("chunk-plan", lengths[0], *RUN, "--chunk-lengths", 64, "--processes", 2, "--json")
    told = json.loads(result.out)
    found = plan(lengths[1], 256, 4, 8, chunk_lengths=[64], steps=8, processes=2)
    assert told["recommended"] == found.recommended
    assert [row["chunk_length"] for row in told["chunk_lengths"]] == [256, 64]
    assert told["chunk_lengths"][1]["staleness_mean"] == found.predictions[1].staleness_mean
    assert told["chunk_lengths"][1]["sampling_seconds"] == found.predictions[1].sampling_seconds


def test_all_forms_of_a_log_give_the_same_plan(run_cli, lengths, tmp_path):
    path, values = lengths
    (tmp_path / "plain.txt").write_text("".join(f"{value}\n\n" for value in values))
    (tmp_path / "numbers.jsonl").write_text("".join(f"{value}\n" for value in values))
    (tmp_path / "table.csv").write_text("step, tokens\n" + "".join(f"1, {value}.0\n" for value in values))
    expected = run_cli("chunk-plan", path, *RUN).out
    for name, more in (("plain.txt", ()), ("numbers.jsonl", ()), ("table.csv", ("--column", "tokens"))):
        assert run_cli("chunk-plan", tmp_path / name, *RUN, *more).out == expected, name


def test_own_costs_replace_the_papers(run_cli, lengths, tmp_path):
    entry = {
        "rollout/iterations": 1.0,
        "rollout/slot_utilization": 0.25,
        "rollout/tokens_generated": 1000.0,
        "rollout/groups_dropped": 0.0,
        "completions/max_length": 250.0,
        "time/sampling": 2.0,
        "time/logprobs": 0.5,
        "time/train": 1.5,
    }
    log = tmp_path / "trainer_state.json"
    log.write_text(json.dumps({"log_history": [entry] * 4}))
    result = run_cli("chunk-plan", lengths[0], *RUN, "--log", f"{log}=256")
    assert result.code == 0, result.err
    assert "costs: decode step" in result.out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib 3.11 and its own fonts
def test_a_picture(run_cli, lengths, tmp_path):
    pytest.importorskip("matplotlib")
    result = run_cli("chunk-plan", lengths[0], *RUN, "--plot", tmp_path / "plan.png")
    assert result.code == 0, result.err
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "picture: " in result.out


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.txt", "", "has no lengths; give a file with one completion length in tokens on each line."),
        ("a.csv", "", "has no lengths"),
        ("a.txt", "12\nlong\n", "line 2: 'long' is no whole number of tokens"),
        ("a.txt", "12\n\n1.5\n", "line 3: '1.5' is no whole number"),
        ("a.txt", "nan\n", "line 1: 'nan' is no whole number"),
        ("a.txt", "inf\n", "line 1: 'inf' is no whole number"),
        ("a.txt", "12\n-3\n", "line 2: -3 tokens; a completion has 1 or more."),
        ("a.txt", "12\n0\n", "line 2: 0 tokens"),
        ("a.txt", "12\n257\n", "line 2: 257 tokens are more than --max-completion-length 256; give the value of"),
        ("a.jsonl", "{", "line 1: '{' is no JSON"),
        ("a.jsonl", "true", "line 1: 'True' is no whole number"),
        ("a.jsonl", '{"tokens": 3}', "line 1 has no 'completion_length'; it has tokens: set --column."),
        ("a.csv", "tokens\n3\n", "has no column 'completion_length'; its columns are tokens: set --column."),
        ("a.csv", "step,completion_length\n1\n", "line 2: '' is no whole number"),
        ("a.parquet", b"\xff\xfe\x00", "is no text in UTF-8"),
    ],
    ids=str,
)
def test_an_unusable_log_is_one_sentence_with_its_line(run_cli, tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run_cli("chunk-plan", path, *RUN)
    assert result.code == 2
    assert sentence in result.sentence
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("gone.txt", *RUN), "gone.txt cannot be read: No such file or directory."),
        (("--batch", 8), "LENGTHS, --max-completion-length, --num-generations missing"),
        (("LOG", *RUN, "--num-generations", 5), "--batch 32 is no multiple of --num-generations 5"),
        (("LOG", *RUN, "--processes", 5), "cannot be shared evenly by 5 processes"),
        (("LOG", *RUN, "--dropped", 1), "share from 0 to below 1"),
        (("LOG", *RUN, "--log", "state.json"), "'state.json' is not FILE=CHUNK"),
        (("LOG", *RUN, "--log", "LOG=64"), "is no trainer_state.json"),
        (("LOG", *RUN, "--log", "gone.json=64"), "No such file or directory: 'gone.json'"),
        (("LOG", *RUN, "--max-live-rows", 2), "max_live_rows=2 has no room for one group of 4"),
        (("LOG", *RUN, "--plot", "plan.txt"), "does not name a picture"),
    ],
    ids=str,
)
def test_unusable_settings_are_one_sentence(run_cli, lengths, arguments, sentence):
    given = [str(argument).replace("LOG", str(lengths[0])) for argument in arguments]
    result = run_cli("chunk-plan", *given)
    assert result.code == 2
    assert sentence in result.sentence


def test_the_papers_table(run_cli, monkeypatch):
    """The fits themselves are tested with the simulator; here what is printed of them."""
    from transformers_minicpm4.rl import schedule

    found = schedule.Fit(schedule.PAPER_MEDIAN, 1.0, PAPER_COSTS, 0.01, schedule.PAPER_SETTING)
    monkeypatch.setattr(schedule, "paper_hold_outs", lambda ordinary=True: {8192: found})
    result = run_cli("chunk-plan", "--paper")
    assert result.code == 0, result.err
    assert "8,192 left out; fitted on 32,768, 16,384, 4,096" in result.out
    assert "8,192 left out; fitted on 16,384, 4,096" in result.out
    assert "paper  173.97" in result.out
    assert json.loads(run_cli("chunk-plan", "--paper", "--json").out)[1]["fitted_on"] == [16384, 4096]
