"""The schedule without its tokens: equal to a real run's, and right where the answer is known in closed form."""

import json
from dataclasses import replace

import numpy as np
import pytest

from arithmetic import make_trainer
from transformers_minicpm4.rl.rollout_store import RolloutStore
from transformers_minicpm4.rl.schedule import (
    PAPER_COSTS,
    PAPER_MEDIAN,
    PAPER_SECONDS,
    PAPER_SETTING,
    StepCosts,
    costs_from_logs,
    fit,
    log_normal,
    paper_hold_outs,
    plan,
    simulate,
)


COSTS = StepCosts(0.01, 0.001, 1e-7, 1e-4, 1e-4, 0.1, 3e-4)


def drawn(count=400, longest=64, seed=0):
    return np.random.default_rng(seed).lognormal(2.5, 1.0, count).round().clip(1, longest).astype(int)


# --- Against a real run ----------------------------------------------------------------------------------------------


def any_nine(completions, **kwargs):
    """0 or 1, so that some groups have no spread and are dropped."""
    return [float("9" in text) for text in completions]


@pytest.fixture
def recorded(monkeypatch):
    """Groups as they leave the store of a run: those that were trained and those that were dropped."""
    trained, dropped = [], []
    take, drop = RolloutStore.take, RolloutStore.drop

    def taking(store):
        batch = take(store)
        trained.extend(batch or [])
        return batch

    def dropping(store, group):
        dropped.append(group)
        drop(store, group)

    monkeypatch.setattr(RolloutStore, "take", taking)
    monkeypatch.setattr(RolloutStore, "drop", dropping)
    return trained, dropped


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk_length": 6},
        {"chunk_length": 6, "max_live_rows": 12, "max_staleness": 2},
        {"chunk_length": 7, "max_staleness": 1, "rollout_batch_size": 5},
        {"chunk_length": 24},
    ],
    ids=["chunks", "capped", "calls", "ordinary"],
)
def test_replayed_lengths_give_the_metrics_of_the_real_run(recorded, tmp_path, settings):
    trainer = make_trainer(tmp_path, reward=any_nine, max_steps=6, **settings)
    trainer.train()
    trained, dropped = recorded
    groups = {group.number: group for group in [*trained, *dropped, *trainer.rollouts.groups]}
    assert sorted(groups) == list(range(trainer.rollouts.admitted))
    # What was left unfinished would have gone on: any length beyond what it has gives the same schedule so far.
    lengths = [
        [len(row.token_ids) if row.finished else 24 for row in groups[number].trajectories]
        for number in sorted(groups)
    ]
    caps = {name: value for name, value in settings.items() if name != "chunk_length"}
    prediction = simulate(
        lengths, settings["chunk_length"], 24, 4, 2, COSTS, steps=6, warmup_steps=0,
        dropped={group.number for group in dropped}, **caps,
    )  # fmt: skip
    logged = [entry for entry in trainer.state.log_history if "rollout/iterations" in entry]
    assert len(logged) == len(prediction.steps) == 6
    if "max_live_rows" not in settings:
        assert dropped
    for step, entry in zip(prediction.steps, logged, strict=True):
        ages = sum(age * tokens for age, tokens in step.ages.items())
        simulated = {
            "iterations": step.iterations,
            "live_rows": step.live_rows,
            "waiting_rows": step.waiting_rows,
            "tokens_generated": step.tokens_generated,
            "tokens_generated_per_trained": step.tokens_generated / step.trained,
            "groups_dropped": step.groups_dropped,
            "staleness/mean": ages / step.trained,
            "staleness/max": max(step.ages),
        }
        if "rollout_batch_size" not in settings:  # rows of one call depend on the prompts' lengths as well
            simulated["slot_utilization"] = step.slot_utilization
        assert simulated == {name: entry[f"rollout/{name}"] for name in simulated}


# --- In closed form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_length", [64, 1000])
def test_without_chunks_it_is_the_longest_row(chunk_length):
    lengths = drawn(160).reshape(40, 4)
    prediction = simulate(lengths, chunk_length, 64, 4, 4, COSTS, steps=10, warmup_steps=0, prompt_tokens=7)
    longest = lengths.reshape(10, 16).max(1)
    decode = 0.01 * longest + 16 * (0.001 * longest + 1e-7 * (7 * longest + longest * (longest - 1) / 2))
    assert prediction.sampling_seconds == pytest.approx((decode + 1e-4 * 16 * 7).mean(), abs=0, rel=1e-12)
    assert prediction.logprob_seconds == pytest.approx(1e-4 * 16 * (7 + longest).mean(), abs=0, rel=1e-12)
    assert prediction.training_seconds == pytest.approx(0.1 + 3e-4 * 16 * (7 + longest).mean(), abs=0, rel=1e-12)
    assert prediction.slot_utilization == lengths.sum() / (16 * longest).sum()
    assert (prediction.iterations, prediction.staleness_max, prediction.tokens_generated_per_trained) == (1, 0, 1)
    assert (prediction.live_rows_mean, prediction.live_rows_peak) == (16, 16)
    assert prediction.context_tokens_peak == 16 * (7 + longest.max())


def test_without_padding_a_row_costs_what_it_is_long():
    lengths = drawn(160).reshape(40, 4)
    prediction = simulate(lengths, 64, 64, 4, 4, replace(COSTS, padded=False), steps=10, warmup_steps=0)
    rows = lengths.reshape(10, 16)
    decode = 0.01 * rows.max(1) + (0.001 * rows + 1e-7 * rows * (rows - 1) / 2).sum(1)
    assert prediction.sampling_seconds == pytest.approx(decode.mean(), abs=0, rel=1e-12)
    assert prediction.training_seconds == pytest.approx(0.1 + 3e-4 * rows.sum(1).mean(), abs=0, rel=1e-12)


@pytest.mark.parametrize("chunk_length", [5, 16, 64])
@pytest.mark.parametrize("caps", [{}, {"max_live_rows": 24}, {"max_staleness": 1}, {"dropped": 0.4}], ids=str)
def test_no_token_appears_or_is_lost(chunk_length, caps):
    lengths = drawn(4000).reshape(1000, 4)
    prediction = simulate(lengths, chunk_length, 64, 4, 4, COSTS, steps=30, warmup_steps=0, **caps)
    generated = sum(step.tokens_generated for step in prediction.steps)
    trained = sum(step.trained for step in prediction.steps)
    gone = sum(step.groups_dropped for step in prediction.steps)
    assert generated >= trained
    if not gone:
        last = prediction.steps[-1]
        # Besides what was trained there are rows under way and waiting groups, none longer than the limit.
        assert generated - trained <= 64 * (last.live_rows * 4 + last.waiting_rows)
    if "max_live_rows" in caps:
        assert prediction.live_rows_peak <= 24
    if "max_staleness" in caps:
        assert prediction.staleness_max <= 1
    if chunk_length == 64 and not caps:
        assert generated == trained


def test_seeds_decide_and_chunk_lengths_see_the_same_completions():
    one, again = (simulate(drawn(), 16, 64, 4, 4, COSTS, steps=10, seed=5) for _ in range(2))
    assert one == again
    assert simulate(drawn(), 16, 64, 4, 4, COSTS, steps=10, seed=6) != one
    # A cap that binds nothing: every group is trained in its turn, and both lengths have trained the same tokens.
    first, second = (
        simulate(drawn(), chunk, 64, 4, 4, COSTS, steps=40, warmup_steps=0, seed=5, max_staleness=0)
        for chunk in (8, 64)
    )
    assert [step.trained for step in first.steps] == [step.trained for step in second.steps]


@pytest.mark.parametrize("name", [name for name in vars(COSTS) if name != "padded"])
def test_dearer_is_never_faster(name):
    seconds = [
        simulate(
            drawn(), 16, 64, 4, 4, replace(COSTS, **{name: factor * getattr(COSTS, name)}), steps=10, prompt_tokens=3
        ).step_seconds
        for factor in (0, 1, 2)
    ]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[2]


@pytest.mark.parametrize("sharing", ["dealt", "balanced"])
def test_processes_change_the_clock_and_not_the_schedule(sharing):
    alone, shared = (
        simulate(drawn(), 16, 64, 4, 4, replace(COSTS, padded=False), steps=20, processes=processes, sharing=sharing)
        for processes in (1, 4)
    )
    for name in ("iterations", "staleness_mean", "live_rows_mean", "live_rows_peak", "tokens_generated_per_trained"):
        assert getattr(alone, name) == getattr(shared, name)
    assert [replace(step, slots=0) for step in alone.steps] == [replace(step, slots=0) for step in shared.steps]
    # The slowest of four has at least a quarter of the work, and less than all of it.
    assert alone.step_seconds / 4 <= shared.step_seconds < alone.step_seconds


def test_equal_rows_are_shared_exactly():
    """With costs that are linear in tokens and nothing to wait for, P processes take a P-th of the time."""
    costs = StepCosts(decode_row=0.001, prefill_token=1e-4, logprob_token=1e-4, train_token=3e-4)
    alone, shared = (simulate([32], 8, 32, 4, 4, costs, steps=5, processes=processes) for processes in (1, 8))
    assert alone.step_seconds == pytest.approx(8 * shared.step_seconds, abs=0, rel=1e-12)


def test_calls_of_few_rows_pad_less_and_decode_longer():
    one, many = (simulate(drawn(), 16, 64, 4, 4, COSTS, steps=20, rollout_batch_size=size) for size in (None, 4))
    assert many.logprob_seconds < one.logprob_seconds
    assert many.slot_utilization > one.slot_utilization
    assert many.context_tokens_peak < one.context_tokens_peak


# --- Fits and plans --------------------------------------------------------------------------------------------------


def test_the_papers_third_chunk_length_is_predicted_within_a_tenth():
    for left_out, found in paper_hold_outs().items():
        predicted = found.predict(left_out)
        step, sampling = PAPER_SECONDS[left_out]
        rest = predicted.step_seconds - predicted.sampling_seconds
        assert predicted.sampling_seconds == pytest.approx(sampling, rel=0.1, abs=0), left_out
        assert rest == pytest.approx(step - sampling, rel=0.1, abs=0), left_out
        assert predicted.step_seconds == pytest.approx(step, rel=0.1, abs=0), left_out


def test_the_stored_costs_are_those_of_the_paper():
    for chunk_length, (step, sampling) in PAPER_SECONDS.items():
        predicted = PAPER_SETTING.play(PAPER_MEDIAN, 1.0, chunk_length).priced(PAPER_COSTS)
        assert predicted.sampling_seconds == pytest.approx(sampling, rel=0.02, abs=0)
        assert predicted.step_seconds == pytest.approx(step, rel=0.02, abs=0)


def test_a_fit_finds_the_costs_that_made_the_seconds():
    setting = replace(PAPER_SETTING, max_completion_length=1024, groups_per_batch=8, processes=8)
    costs = StepCosts(0.01, 0.002, 0.0, 0.001, 0.001, 0.0, 0.003, padded=False)
    made = {chunk: setting.play(128, 1.0, chunk).priced(costs) for chunk in (1024, 256, 128)}
    found = fit({chunk: (p.step_seconds, p.sampling_seconds) for chunk, p in made.items()}, setting)
    assert found.median == 128
    assert vars(found.costs) == pytest.approx(vars(costs), rel=1e-6)
    assert found.error < 1e-9
    with pytest.raises(ValueError, match="1 chunk length"):
        fit({1024: (2.0, 1.0)}, setting)


def write_log(path, lengths, chunk_length, costs, steps=30):
    """A `trainer_state.json` as the trainer would log it on a machine with such costs, one process."""
    entries = []
    for step in range(1, steps + 1):
        run = {"steps": 1, "warmup_steps": step - 1}
        prediction = simulate(lengths, chunk_length, 64, 4, 4, costs, **run)
        last = prediction.steps[-1]
        entries.append(
            {
                "rollout/iterations": float(last.iterations),
                "rollout/slot_utilization": last.slot_utilization,
                "rollout/tokens_generated": float(last.tokens_generated),
                "rollout/groups_dropped": 0.0,
                "time/sampling": prediction.sampling_seconds,
                "time/logprobs": prediction.logprob_seconds,
                "time/train": prediction.training_seconds,
            }
        )
    path.write_text(json.dumps({"log_history": [*entries, {"train_runtime": 1.0}]}))
    return path


def test_costs_come_from_the_logs_of_runs(tmp_path):
    lengths = [*drawn(), *[64] * 40]  # someone always fills the chunk
    costs = StepCosts(0.01, 0.0005, 0.0, 1e-5, 1e-5, 0.0, 3e-5)
    logs = {write_log(tmp_path / f"{chunk}.json", lengths, chunk, costs): chunk for chunk in (8, 32)}
    found = costs_from_logs(logs, lengths, 64, 4, 4)
    assert vars(found) == pytest.approx(vars(costs), rel=0.05)
    (tmp_path / "no.json").write_text('{"log_history": [{"loss": 1.0}]}')
    with pytest.raises(ValueError, match="not of a run of ChunkwiseGRPOTrainer"):
        costs_from_logs({tmp_path / "no.json": 8}, lengths, 64, 4, 4)
    (tmp_path / "no.json").write_text("[1]")
    with pytest.raises(ValueError, match="no trainer_state.json"):
        costs_from_logs({tmp_path / "no.json": 8}, lengths, 64, 4, 4)


def test_a_plan_weighs_seconds_against_staleness():
    long_tailed = log_normal(60, 1.0, 1024)
    found = plan(long_tailed, 1024, 4, 16, replace(PAPER_COSTS, decode_row=1e-5), steps=20)
    assert [prediction.chunk_length for prediction in found.predictions] == [1024, 512, 256, 128, 64]
    assert found.recommended < 1024
    shortest = min(prediction.step_seconds for prediction in found.predictions)
    for prediction in found.predictions:
        if prediction.chunk_length > found.recommended:
            assert prediction.step_seconds > 1.03 * shortest
    staleness = [prediction.staleness_mean for prediction in found.predictions]
    assert staleness == sorted(staleness)
    # Where all are as long, nothing is gained.
    assert plan([1024] * 8, 1024, 4, 16, PAPER_COSTS, [512, 256], steps=5).recommended == 1024


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"lengths": []}, "not empty"),
        ({"lengths": [0, 3]}, "from 1 to max_completion_length=64; got values from 0 to 3"),
        ({"lengths": [65]}, "got values from 65 to 65"),
        ({"lengths": [1.5]}, "whole numbers"),
        ({"lengths": [[1, 2, 3]]}, "3 completions in a group, num_generations is 4"),
        ({"lengths": [[1, 2, 3, 4]]}, "has 1 groups, and the schedule asks for one more"),
        ({"chunk_length": 0}, "chunk_length must be 1 or more, got 0"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"processes": 3}, "cannot be shared evenly by 3 processes"),
        ({"dropped": 1.0}, "share from 0 to below 1, got 1.0"),
        ({"sharing": "fair"}, "'dealt' or 'balanced', got 'fair'"),
        ({"max_live_rows": 3}, "no room for one group of 4"),
    ],
    ids=str,
)
def test_what_cannot_be_simulated_is_said(changes, sentence):
    given = {"lengths": drawn(), "chunk_length": 16, "steps": 5, **changes}
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        simulate(max_completion_length=64, num_generations=4, groups_per_batch=4, costs=COSTS, **given)


def test_costs_are_seconds():
    with pytest.raises(ValueError, match="decode_row must be a number of seconds, 0 or more; got -1"):
        StepCosts(decode_row=-1)
