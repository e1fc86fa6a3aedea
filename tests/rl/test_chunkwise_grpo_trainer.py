"""Chunk-wise GRPO through TRL's real training loop: what it equals, what it keeps, and what it refuses."""

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from arithmetic import make_policy, make_tokenizer, make_trainer, prompts, settings, share_of_digits
from tolerances import within
from transformers_minicpm4.rl import ChunkwiseGRPOConfig, ChunkwiseGRPOTrainer
from transformers_minicpm4.rl.checkpoints import digest_of
from transformers_minicpm4.rl.chunkwise_grpo_trainer import _spread
from transformers_minicpm4.rl.dropout import dropout_places
from transformers_minicpm4.rl.garble import REASONS


VANILLA = {
    "chunk_length": 24,
    "sampling_streams": "global",
    "dynamic_sampling": False,
    "garble_filter": False,
    "mask_truncated_completions": False,
    "epsilon_high": None,
    "delta": None,
}
TESTS = str(Path(__file__).resolve().parents[1])


class Recorder:
    """A reward function that keeps what it saw."""

    __name__ = "recorder"

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        self.seen += list(zip(prompts, completions, map(tuple, completion_ids), strict=True))
        return share_of_digits(prompts, completions)


def difference(one, other) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def metric(trainer, name) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- What it equals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps": 8, "dataset": prompts(6)},  # more than two epochs
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "max_steps": 8},
        {"num_iterations": 2, "max_steps": 6},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"loss_type": "grpo", "scale_rewards": "batch"},
    ],
    ids=["plain", "epochs", "steps_per_generation", "num_iterations", "warpers", "grpo"],
)
def test_one_chunk_and_the_process_stream_is_vanilla_grpo(changes, tmp_path):
    """Same completions, rewards, losses and weights as `GRPOTrainer`."""
    ours, theirs = Recorder(), Recorder()
    changes = dict(changes)
    dataset = changes.pop("dataset", prompts())
    vanilla = GRPOTrainer(
        make_policy(),
        theirs,
        args=GRPOConfig(**settings(tmp_path / "v", use_bias_correction_kl=False, **changes)),
        train_dataset=dataset,
        processing_class=make_tokenizer(),
    )
    vanilla.train()
    chunked = make_trainer(tmp_path / "c", reward=ours, dataset=dataset, **VANILLA, **changes)
    chunked.train()
    assert ours.seen == theirs.seen
    # With several updates a batch TRL computes the old log-probabilities once more; ours were computed chunk by chunk.
    assert all(within(abs(a - b), "grpo_loss") for a, b in zip(losses(chunked), losses(vanilla), strict=True))
    for name in ("reward", "reward_std", "completions/mean_length", "completions/clipped_ratio", "num_tokens"):
        assert metric(chunked, name) == metric(vanilla, name)
    assert within(difference(chunked.model, vanilla.model), "grpo_weights")
    assert difference(vanilla.model, make_policy()) > 1e-3


def test_a_reference_model_makes_no_difference_to_that(tmp_path):
    make_policy().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    common = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    vanilla = GRPOTrainer(
        str(tmp_path / "policy"),
        share_of_digits,
        args=GRPOConfig(**settings(tmp_path / "v", use_bias_correction_kl=False, **common)),
        train_dataset=prompts(),
    )
    vanilla.train()
    chunked = make_trainer(tmp_path / "c", model=str(tmp_path / "policy"), **VANILLA, **common)
    chunked.train()
    assert metric(vanilla, "kl")[-1] > 0
    assert all(within(abs(a - b), "grpo_loss") for a, b in zip(losses(chunked), losses(vanilla), strict=True))
    assert within(difference(chunked.model, vanilla.model), "grpo_weights")


@pytest.mark.parametrize("behavior", ["recompute", "generation"])
def test_stored_log_probabilities_are_those_of_the_policy_that_sampled(behavior, tmp_path):
    """Recomputed from a copy of the weights of each step; with the newest weights they would be others."""
    weights, trained = {}, []

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            weights[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    trainer = make_trainer(
        tmp_path, callbacks=[Keep()], behavior_logprobs=behavior, max_steps=8, learning_rate=1e-2, temperature=0.8
    )
    take = trainer.rollouts.take

    def taking():
        batch = take()
        trained.extend(batch or [])
        return batch

    trainer.rollouts.take = taking
    trainer.train()
    model = make_policy().eval()
    stale = 0.0
    spans = Counter()
    for group in trained:
        for row in group.trajectories:
            ids = torch.tensor([group.prompt_ids + row.token_ids.tolist()])
            place = 0
            spans[len({version for version, _ in row.chunks})] += 1
            for version, length in row.chunks:
                own, last = (logprobs(model, weights[at], ids, len(group.prompt_ids)) for at in (version, 7))
                piece = torch.tensor(row.logprobs[place : place + length])
                error = (piece - own[place : place + length]).abs().max().item()
                assert within(error, "behavior_logprobs_float32")
                stale = max(stale, (piece - last[place : place + length]).abs().max().item())
                place += length
    assert max(spans) >= 3, spans
    assert stale > 0.1


def logprobs(model, state, ids, width):
    model.load_state_dict(state)
    with torch.no_grad():
        values = (model(ids).logits[:, width - 1 : -1] / 0.8).log_softmax(-1)
    return values.gather(-1, ids[:, width:, None])[0, :, 0]


def test_loss_and_gradient_are_the_papers(tmp_path):
    """Equations 7 and 8 by themselves, in float64: chunk ratio, clip-higher, dual clip, KL, token mean, two masks."""
    make_policy().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    batches = []

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            batches.append({name: tensor.clone() for name, tensor in trainer._buffered_inputs[0].items()})

    trainer = make_trainer(
        tmp_path / "c",
        model=str(tmp_path / "policy"),
        callbacks=[Stop()],
        max_steps=6,
        learning_rate=3e-2,
        beta=0.05,
        epsilon=0.1,
        delta=1.5,
    )
    # Every third row counts as garbled.
    trainer.garble_filter = lambda ids, text: "planted" if sum(ids) % 3 == 0 else None
    trainer.train()
    model = trainer.model
    double = make_policy().double()
    double.load_state_dict(model.state_dict())
    reached = Counter()
    # The last weights against every batch: the older it is, the further its ratios are from 1.
    for batch in batches:
        model.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        got = torch.cat([p.grad.flatten() for p in model.parameters()]).double()

        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width = batch["prompt_ids"].shape[1]
        values = double(input_ids=ids, attention_mask=mask).logits[:, width - 1 : -1].log_softmax(-1)
        now = values.gather(-1, ids[:, width:, None])[..., 0]
        ratio = (now - batch["old_per_token_logps"]).exp()
        gain = batch["advantages"][:, None].double()
        surrogate = torch.minimum(ratio * gain, ratio.clamp(0.9, 1.28) * gain)
        surrogate = torch.where(gain < 0, torch.maximum(surrogate, 1.5 * gain), surrogate)
        gap = batch["ref_per_token_logps"] - now
        per_token = -surrogate + 0.05 * (gap.exp() - gap - 1)
        garbled = batch.get("tool_mask", torch.ones_like(batch["completion_mask"]))
        counted = (batch["completion_mask"] * garbled).double()
        want_loss = (per_token * counted).sum() / counted.sum().clamp(min=1)
        double.zero_grad()
        want_loss.backward()
        want = torch.cat([p.grad.flatten() for p in double.parameters()])
        assert batch["num_items_in_batch"].item() == counted.sum().item()
        assert within(abs(loss.item() - want_loss.item()) / max(1.0, abs(want_loss.item())), "grpo_loss")
        assert within(((got - want).norm() / want.norm().clamp(min=1e-9)).item(), "grpo_gradient_float32")
        kept = counted.bool()
        reached["dual clip"] += (kept & (gain < 0) & (ratio > 1.5)).sum().item()
        reached["clip-higher"] += (kept & (gain > 0) & (ratio > 1.28)).sum().item()
        reached["lower clip"] += (kept & (gain < 0) & (ratio < 0.9)).sum().item()
        reached["garbled"] += garbled.any(1).logical_not().sum().item()
        reached["truncated"] += batch["completion_mask"].any(1).logical_not().sum().item()
    assert len(reached) == 5
    assert min(reached.values()) > 0, reached


def test_streams_of_their_own_make_the_schedule_invisible(tmp_path):
    """Under frozen weights the same completions, whatever the chunk length and the calls they are sampled in."""

    def sampled(**changes):
        recorder = Recorder()
        trainer = make_trainer(
            tmp_path, reward=recorder, learning_rate=0.0, max_steps=4, dynamic_sampling=False, **changes
        )
        trainer.train()
        return Counter(recorder.seen)

    whole = sampled(chunk_length=24)
    assert whole.total() == 32
    for changes in ({"chunk_length": 1}, {"chunk_length": 7}, {"chunk_length": 5, "rollout_batch_size": 3}):
        assert not whole - sampled(**changes)
    assert whole - sampled(chunk_length=24, seed=4)


def test_lora_trains_and_its_reference_is_the_base_model(tmp_path):
    from peft import LoraConfig

    base = make_policy()
    trainer = make_trainer(
        tmp_path, model=base, peft_config=LoraConfig(r=4, target_modules="all-linear"), beta=0.05, learning_rate=1e-2
    )
    trainer.train()
    assert metric(trainer, "kl")[0] == 0
    assert metric(trainer, "kl")[-1] > 0
    frozen = dict(make_policy().named_parameters())
    for name, value in trainer.model.named_parameters():
        if "lora_" in name:
            assert value.requires_grad
        else:
            plain = name.replace("base_model.model.", "").replace(".base_layer", "")
            assert torch.equal(value, frozen[plain])


def test_minicpm4_with_sparse_attention_learns_chunk_wise(tmp_path, tiny_config, sparse_config):
    """Log-probabilities noted while sampling from a cache equal training's: it reads the same blocks."""
    from transformers_minicpm4 import MiniCPM4ForCausalLM

    torch.manual_seed(0)
    model = MiniCPM4ForCausalLM(
        tiny_config(vocab_size=43, eos_token_id=1, sparse_config=sparse_config.to_dict(), initializer_range=0.2)
    )
    trainer = make_trainer(
        tmp_path, model=model, max_completion_length=96, chunk_length=24, behavior_logprobs="generation"
    )
    trainer.train()
    # The first batch has not been updated on yet: a ratio of 1 means equal log-probabilities.
    assert metric(trainer, "clip_ratio/region_mean")[0] == 0
    assert abs(losses(trainer)[0]) < 10


@pytest.mark.parametrize("given", ["path", "model"])
def test_minicpm4_has_a_reference_that_is_replaced(given, tmp_path, tiny_config):
    """TRL loads the reference from the policy's folder, and asks its configuration for things of remote code."""
    from transformers_minicpm4 import MiniCPM4ForCausalLM

    policy = str(tmp_path / "policy")
    MiniCPM4ForCausalLM(tiny_config(vocab_size=43, eos_token_id=1, initializer_range=0.2)).save_pretrained(policy)
    make_tokenizer().save_pretrained(policy)
    kept = {}

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            kept[state.global_step] = [value.clone() for value in model.parameters()]

    trainer = make_trainer(
        tmp_path / "c",
        model=policy if given == "path" else MiniCPM4ForCausalLM.from_pretrained(policy),
        callbacks=[Keep()],
        beta=0.1,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        max_steps=3,
        learning_rate=1e-2,
    )
    assert type(trainer.model) is type(trainer.ref_model) is MiniCPM4ForCausalLM
    trainer.train()
    kl = metric(trainer, "kl")
    assert kl[0] == kl[2] == 0 < kl[1]
    assert all(torch.equal(one, other) for one, other in zip(trainer.ref_model.parameters(), kept[2], strict=True))


def gpt2():
    fields = {"vocab_size": 43, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.2}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**fields, eos_token_id=1, bos_token_id=None, pad_token_id=0))


def lora(dropout):
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)


@pytest.mark.parametrize("kind", ["gpt2", "attention", "lora"])
def test_a_model_with_dropout_trains_as_without(kind, tmp_path):
    """As `GRPOTrainer` trains it where there is none; with other units dropped in each pass no ratio would be 1."""
    ours, theirs, without = {
        "gpt2": (gpt2(), gpt2(), {"disable_dropout": True}),
        "attention": (make_policy(attention_dropout=0.3), make_policy(), {}),
        "lora": (make_policy(), make_policy(), {}),
    }[kind]
    torch.manual_seed(0)
    vanilla = GRPOTrainer(
        theirs,
        share_of_digits,
        args=GRPOConfig(**settings(tmp_path / "v", use_bias_correction_kl=False, **without)),
        train_dataset=prompts(),
        processing_class=make_tokenizer(),
        peft_config=lora(0.0) if kind == "lora" else None,
    )
    vanilla.train()
    torch.manual_seed(0)
    peft_config = lora(0.2) if kind == "lora" else None
    chunked = make_trainer(tmp_path / "c", model=ours, peft_config=peft_config, **VANILLA)
    chunked.train()
    assert metric(chunked, "clip_ratio/region_mean") == [0.0] * 4
    assert all(within(abs(a - b), "grpo_loss") for a, b in zip(losses(chunked), losses(vanilla), strict=True))
    assert within(difference(chunked.model, vanilla.model), "grpo_weights")
    # What is saved still says what the model was made with.
    config = chunked.model.config
    saved = {
        "gpt2": lambda: config.attn_pdrop,
        "attention": lambda: config.attention_dropout,
        "lora": lambda: chunked.model.peft_config["default"].lora_dropout,
    }
    assert saved[kind]() > 0


def test_dropout_stays_off_after_resuming(tmp_path):
    whole, resumed = run_and_resume(tmp_path, 3, {"learning_rate": 1e-2, "peft_config": lora(0.2)})
    assert difference(whole.model, resumed.model) == 0
    assert list(dropout_places(resumed.model)) == []


# --- What it keeps ---------------------------------------------------------------------------------------------------


def run_and_resume(folder, first, changes, model=None):
    """Weights and store of a run of 8 steps, and of one stopped after `first` and resumed."""
    whole = make_trainer(folder / "whole", model=model, max_steps=8, **changes)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": first}
    make_trainer(folder / "cut", model=model, max_steps=8, **saving, **changes).train()
    resumed = make_trainer(folder / "cut", model=model, max_steps=8, **changes)
    resumed.train(resume_from_checkpoint=str(folder / "cut" / f"checkpoint-{first}"))
    return whole, resumed


@pytest.mark.parametrize(
    ("first", "changes"),
    [
        (3, {}),
        (3, {"sampling_streams": "global", "behavior_logprobs": "generation"}),
        (3, {"max_staleness": 1, "max_live_rows": 12}),
        (5, {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}),
        (3, {"num_iterations": 2, "per_device_train_batch_size": 4, "steps_per_generation": 2}),
    ],
    ids=["trajectory", "global", "caps", "mid-batch", "mid-batch-iterations"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(first, changes, tmp_path):
    whole, resumed = run_and_resume(tmp_path, first, {"learning_rate": 1e-2, **changes})
    assert difference(whole.model, resumed.model) == 0
    assert losses(whole) == losses(resumed)
    assert whole.rollouts.__dict__ == resumed.rollouts.__dict__
    assert whole.rollouts.unfinished(), "nothing was under way"


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_run_keeps_its_replaced_reference(tied, tmp_path):
    make_policy(tie_word_embeddings=tied).save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    changes = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "learning_rate": 1e-2}
    whole, resumed = run_and_resume(tmp_path, 3, changes, model=str(tmp_path / "policy"))
    assert difference(whole.model, resumed.model) == 0
    assert difference(whole.ref_model, resumed.ref_model) == 0
    assert difference(whole.ref_model, make_policy(tie_word_embeddings=tied)) > 0
    assert metric(whole, "kl") == metric(resumed, "kl")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from transformers import TrainerCallback
from arithmetic import make_trainer
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
make_trainer(sys.argv[2], max_steps=8, learning_rate=1e-2, save_strategy="steps", save_steps=2,
             save_total_limit=1, callbacks=[Kill()]).train()
"""


def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path):
    """SIGKILL after step 5, saved at 4; a checkpoint that was cut off while it was written is passed over."""
    folder = tmp_path / "cut"
    done = subprocess.run([sys.executable, "-c", KILLED, TESTS, str(folder)], env={**os.environ, "CI": "true"})
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "rollout_store.safetensors").write_bytes(b"half")
    resumed = make_trainer(folder, max_steps=8, learning_rate=1e-2)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", max_steps=8, learning_rate=1e-2)
    whole.train()
    assert difference(whole.model, resumed.model) == 0
    assert whole.rollouts.__dict__ == resumed.rollouts.__dict__


SAVING = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


def test_a_checkpoint_whose_state_is_cut_off_is_passed_over(tmp_path):
    make_trainer(tmp_path / "cut", max_steps=4, **SAVING).train()
    state = tmp_path / "cut" / "checkpoint-4" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:300])
    resumed = make_trainer(tmp_path / "cut", max_steps=6, learning_rate=1e-2, lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[:2] == resumed_losses(tmp_path / "cut" / "checkpoint-2")
    assert resumed.state.global_step == 6
    assert len(losses(resumed)) == 6
    # Alone, or named, it is refused.
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be resumed: its trainer_state.json is missing or cut"):
        make_trainer(tmp_path / "cut", max_steps=6).train(resume_from_checkpoint=str(state.parent))
    shutil.rmtree(tmp_path / "cut" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"none of the 1 checkpoint\(s\) .* checkpoint-4: its trainer_state.json is"):
        make_trainer(tmp_path / "cut", max_steps=6).train(resume_from_checkpoint=True)


def resumed_losses(checkpoint) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_finished_run_that_is_resumed_is_as_it_was(tmp_path):
    first = make_trainer(tmp_path, max_steps=4, lr_scheduler_type="constant", **SAVING)
    first.train()
    calls = []

    def share_again(prompts, completions, **kwargs):
        calls.append(prompts)
        return share_of_digits(prompts, completions)

    share_again.__name__ = "share_of_digits"
    # The second: with fewer steps than it has made.
    for steps in (4, 3):
        again = make_trainer(tmp_path, reward=share_again, max_steps=steps, lr_scheduler_type="constant", **SAVING)
        assert again.train(resume_from_checkpoint=True).global_step == 4
        assert difference(first.model, again.model) == 0
        assert again.rollouts.__dict__ == first.rollouts.__dict__
    assert calls == []


def test_a_new_run_does_not_mix_its_checkpoints_with_an_old_ones(tmp_path):
    make_trainer(tmp_path, max_steps=2, **SAVING).train()
    with pytest.raises(ValueError, match=r"checkpoints of an earlier run \(the last is checkpoint-2\).*resume_from"):
        make_trainer(tmp_path, max_steps=4, **SAVING).train()
    # Nothing to mix where nothing is saved.
    make_trainer(tmp_path, max_steps=1).train()
    make_trainer(tmp_path, max_steps=4, **SAVING).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_no_prompt_is_lost_or_scored_twice(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, reward=recorder, chunk_length=3, max_steps=20)
    trainer.train()
    store = trainer.rollouts
    assert store.admitted == store.trained + store.dropped + len(store.groups)
    assert store.trained == 40
    scored = store.trained + store.dropped + sum(group.scored for group in store.groups)
    assert len(recorder.seen) == 4 * scored
    order = [row["prompt"] for row in prompts()]
    sampler = trainer._get_train_sampler()
    expected = [order[row] for _ in range(3) for row in list(sampler)[::4]]
    # Each prompt that was admitted, as often as the sampler of GRPOTrainer has drawn it.
    still = Counter(order[group.row] for group in store.groups if not group.scored)
    seen = Counter(prompt for prompt, _, _ in recorder.seen)
    assert {name: count // 4 for name, count in seen.items()} == dict(Counter(expected[: store.admitted]) - still)


def test_caps_hold_in_a_real_run(tmp_path):
    free = make_trainer(tmp_path, chunk_length=2, max_steps=14)
    free.train()
    assert max(metric(free, "rollout/live_rows")) > 12
    assert max(metric(free, "rollout/staleness/max")) > 2
    capped = make_trainer(tmp_path, chunk_length=2, max_steps=14, max_live_rows=12, max_staleness=2)
    capped.train()
    assert max(metric(capped, "rollout/live_rows")) <= 12
    assert max(metric(capped, "rollout/staleness/max")) <= 2


def test_groups_without_spread_are_replaced(tmp_path):
    """Half of the prompts give every completion the same reward; no batch has one of them."""

    def reward(prompts, completions, **kwargs):
        return [
            1.0 if int(prompt[0]) % 2 else share_of_digits([prompt], [text])[0]
            for prompt, text in zip(prompts, completions, strict=True)
        ]

    trainer = make_trainer(tmp_path, reward=reward, max_steps=10)
    trained = []
    take = trainer.rollouts.take

    def taking():
        batch = take()
        trained.extend(batch or [])
        return batch

    trainer.rollouts.take = taking
    trainer.train()
    data = prompts()
    assert len(trained) == 20
    assert not any(int(data[group.row]["prompt"][0]) % 2 for group in trained)
    assert sum(metric(trainer, "rollout/groups_dropped")) == trainer.rollouts.dropped > 5
    assert metric(trainer, "frac_reward_zero_std") == [0.0] * 10


def test_what_is_logged_adds_up(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8)
    # Planted: a third of the rows, under two of the filter's reasons.
    reasons = {0: "token_run", 1: "repetition"}
    trainer.garble_filter = lambda ids, text: reasons.get(sum(ids) % 6)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    parts = [metric(trainer, f"time/{name}") for name in ("sampling", "logprobs", "rewards", "train")]
    assert all(len(values) == 8 and min(values) > 0 for values in parts)
    assert sum(map(sum, parts)) < seconds
    garbled = {reason: metric(trainer, f"rollout/garbled/{reason}") for reason in REASONS}
    assert [sum(step) for step in zip(*garbled.values(), strict=True)] == metric(trainer, "rollout/garbled_rows")
    assert sum(garbled["token_run"]) > 0 < sum(garbled["repetition"])


def test_evaluation_in_between_leaves_the_rollouts_alone(tmp_path):
    plain = make_trainer(tmp_path / "a", max_steps=6)
    plain.train()
    evaluated = make_trainer(
        tmp_path / "b", max_steps=6, eval_dataset=prompts(4, seed=9), eval_strategy="steps", eval_steps=2,
        per_device_eval_batch_size=8,
    )  # fmt: skip
    evaluated.train()
    assert len(metric(evaluated, "eval_reward")) == 3
    # Not to the bit: TRL shuffles a batch's rows by the global stream, which evaluation has moved on.
    assert within(difference(plain.model, evaluated.model), "grpo_weights")


def test_what_reward_functions_log_stays_with_its_row(tmp_path):
    def reward(prompts, completions, log_extra, log_metric, **kwargs):
        log_extra("text", [f"{prompt}|{text}" for prompt, text in zip(prompts, completions, strict=True)])
        log_metric("mean_length", sum(map(len, completions)) / len(completions))
        return share_of_digits(prompts, completions)

    trainer = make_trainer(tmp_path, reward=reward, log_completions=True)
    trainer.train()
    import pandas

    tables = [pandas.read_parquet(path) for path in sorted((tmp_path / "completions").glob("*.parquet"))]
    assert len(tables) == 4
    for table in tables:
        assert list(table["prompt"] + "|" + table["completion"]) == list(table["text"])
    assert metric(trainer, "mean_length")


# --- Several processes -----------------------------------------------------------------------------------------------

DISTRIBUTED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from arithmetic import make_trainer, share_of_digits
folder, changes, action = sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
seen = []
def reward(prompts, completions, completion_ids, **kwargs):
    if action == "raise" and torch.distributed.get_rank() == 1:
        raise KeyError("broken")
    seen.extend(zip(prompts, map(tuple, completion_ids)))
    return share_of_digits(prompts, completions)
trainer = make_trainer(folder, reward=reward, per_device_train_batch_size=4, **changes)
trainer.train(resume_from_checkpoint=True if action == "resume" else None)
rank = torch.distributed.get_rank()
state = trainer.rollouts.__dict__
with open(f"{folder}/rank_{rank}.json", "w") as file:  # a file each: lines longer than a pipe's buffer mix
    json.dump([sorted(set(seen)), str(state)], file)
if rank == 0:
    state = {name: value.contiguous().clone() for name, value in trainer.model.state_dict().items()}
    save_file(state, folder + "/final.safetensors")
torch.distributed.destroy_process_group()
"""


def distributed(folder, changes, action="run"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    script = Path(folder) / "run.py"
    script.write_text(DISTRIBUTED)
    for old in Path(folder).glob("rank_*.json"):
        old.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    env = {**os.environ, "CI": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, TESTS, str(folder), json.dumps(changes), action],
        capture_output=True,
        text=True,
        timeout=240,
        env=env,
    )
    return done, {int(path.stem[5:]): json.loads(path.read_text()) for path in Path(folder).glob("rank_*.json")}


def test_two_processes_sample_and_learn_as_one_does(tmp_path):
    """Five rollouts over two processes leave one a row short; both hold the same store at the end."""
    from safetensors.torch import load_file

    changes = {"max_steps": 5, "chunk_length": 5}
    done, found = distributed(tmp_path / "two", changes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert found[0][1] == found[1][1]
    recorder = Recorder()
    one = make_trainer(tmp_path / "one", reward=recorder, **changes)
    one.train()
    both = {(prompt, tuple(ids)) for rank in (0, 1) for prompt, ids in found[rank][0]}
    assert both == {(prompt, ids) for prompt, _, ids in recorder.seen}
    final = load_file(tmp_path / "two" / "final.safetensors")
    own = one.model.state_dict()
    assert within(max((final[name] - own[name]).abs().max().item() for name in final), "grpo_weights")


def test_two_processes_resume_and_one_takes_over_from_two(tmp_path):
    from safetensors.torch import load_file

    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    done, found = distributed(tmp_path / "whole", changes)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = load_file(tmp_path / "whole" / "final.safetensors")
    shutil.rmtree(tmp_path / "whole" / "checkpoint-6")
    done, again = distributed(tmp_path / "whole", changes, "resume")
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = load_file(tmp_path / "whole" / "final.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert found[0][1] == again[0][1]

    def reward(prompts, completions, **kwargs):  # of the name of the two processes'
        return share_of_digits(prompts, completions)

    one = make_trainer(tmp_path / "one", reward=reward, max_steps=6)
    one.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    own = one.model.state_dict()
    assert within(max((whole[name] - own[name]).abs().max().item() for name in whole), "grpo_weights")


def test_a_reward_function_that_raises_on_one_process_stops_both(tmp_path):
    began = time.monotonic()
    done, found = distributed(tmp_path, {"max_steps": 3}, "raise")
    assert done.returncode != 0
    assert not found
    assert "the reward function 'reward' raised KeyError: 'broken'" in done.stderr
    assert time.monotonic() - began < 200


# --- What it refuses -------------------------------------------------------------------------------------------------


def test_equal_rewards_for_ever_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path, reward=lambda completions, **kwargs: [1.0] * len(completions))
    with pytest.raises(RuntimeError, match=r"had equal rewards for all 4 completions \(the last: .*dynamic_sampling"):
        trainer.train()


@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_equal_rewards_are_equal_whatever_their_mean_rounds_to(size):
    for hundredths in range(-100, 201):
        equal = torch.full((size,), hundredths / 100)
        assert not _spread(equal)
        # As sums of two functions' rewards, in another order in each row.
        parts = torch.tensor([[0.1, equal[0]], [equal[0], 0.1]]).repeat(size, 1)[:size]
        assert not _spread(parts.cumsum(1)[:, 1] * 3)
        equal[-1] += 0.001
        assert _spread(equal)


def test_equal_rewards_whose_deviation_rounds_to_something_stop_the_run(tmp_path):
    """Eight rewards of 0.2 have a standard deviation above 1e-8 in float32."""
    trainer = make_trainer(tmp_path, reward=lambda completions, **kwargs: [0.2] * len(completions), num_generations=8)
    with pytest.raises(RuntimeError, match="had equal rewards for all 8 completions"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_only_groups_in_a_row_count(tmp_path):
    """Two batches' worth without spread in a row, again and again, are allowed; one more is not."""
    trainer = make_trainer(tmp_path, max_resampled_batches=2)

    def scored(pattern):
        groups = [trainer.rollouts.admit(0, [2]) for _ in pattern]
        for group, kind in zip(groups, pattern, strict=True):
            for place, row in enumerate(group.trajectories):
                row.rewards = [float(place) if kind == "S" else 1.0]
        trainer._counted = Counter()
        trainer._drop_without_spread(groups)

    scored("ddddSddddSdddd")
    scored("Sdddd")
    assert trainer.rollouts.dropped == 16
    with pytest.raises(RuntimeError, match="5 groups in a row had equal rewards"):
        scored("dS")


def test_rows_no_function_can_score_have_no_part(tmp_path):
    """As in TRL: None everywhere is no reward of 0, and a group with one scored row has no spread."""

    def picky(prompts, completions, **kwargs):
        return [
            None if len(text) % 4 == 0 else value
            for text, value in zip(completions, share_of_digits(prompts, completions))
        ]

    trainer = make_trainer(tmp_path, reward=picky)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_length": 0}, "chunk_length must be an integer of 1 or more"),
        ({"chunk_length": -5}, "chunk_length"),
        ({"max_live_rows": 3}, "max_live_rows must be an integer of 4 or more"),
        ({"max_staleness": -1}, "max_staleness"),
        ({"rollout_batch_size": 0}, "rollout_batch_size"),
        ({"max_resampled_batches": 0}, "max_resampled_batches"),
        ({"sampling_streams": "own"}, "sampling_streams must be one of"),
        ({"behavior_logprobs": "none"}, "behavior_logprobs must be one of"),
        ({"reward_timeout": 0}, "reward_timeout"),
        ({"delta": 1.2}, "delta=1.2 must be larger than"),
        ({"num_generations": 3}, "divisible by"),
        ({"use_vllm": True}, "use_vllm=True: chunk-wise rollouts are generated by Transformers"),
        ({"use_transformers_continuous_batching": True}, "continuous_batching"),
        ({"generation_kwargs": {"max_new_tokens": 5}}, "max_new_tokens"),
        ({"generation_kwargs": {"min_new_tokens": 5}}, "min_new_tokens"),
        ({"generation_kwargs": {"eos_token_id": 5}}, "eos_token_id"),
        ({"generation_kwargs": {"typical_p": 0.5}}, "typical_p"),
        ({"repetition_penalty": 1.1, "behavior_logprobs": "generation"}, "repetition_penalty"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ChunkwiseGRPOConfig(**settings(tmp_path, **changes))


def test_the_default_chunk_is_a_quarter_of_the_longest_completion(tmp_path):
    assert ChunkwiseGRPOConfig(**settings(tmp_path)).chunk_length == 6
    assert ChunkwiseGRPOConfig(**settings(tmp_path, max_completion_length=25)).chunk_length == 7


def refused(folder, error, message, **given):
    given = {"model": make_policy(), "reward_funcs": share_of_digits, "train_dataset": prompts(), **given}
    given.setdefault("args", ChunkwiseGRPOConfig(**settings(folder)))
    with pytest.raises(error, match=message):
        ChunkwiseGRPOTrainer(processing_class=make_tokenizer(), **given)


def test_what_a_chunk_cannot_continue_is_refused(tmp_path):
    refused(tmp_path, ValueError, "does not take tools", tools=[print])
    refused(tmp_path, ValueError, "does not take environment_factory", environment_factory=dict)
    refused(tmp_path, ValueError, "does not take rollout_func", rollout_func=print)
    refused(tmp_path, TypeError, "must be a datasets.Dataset", train_dataset=prompts().to_iterable_dataset())
    refused(tmp_path, ValueError, "has images", train_dataset=prompts().add_column("image", [None] * 64))
    refused(tmp_path, ValueError, "1 prompts, fewer than the 2", train_dataset=prompts(1))
    refused(tmp_path, TypeError, "must be a ChunkwiseGRPOConfig", args=GRPOConfig(**settings(tmp_path)))


def test_rules_of_the_model_that_count_by_call_are_refused(tmp_path):
    model = make_policy()
    model.generation_config.forced_eos_token_id = 1
    refused(tmp_path, ValueError, "forced_eos_token_id = None", model=model)


def test_a_cache_the_model_asks_for_is_used(tmp_path):
    model = make_policy()
    model.generation_config.cache_implementation = "static"
    trainer = make_trainer(tmp_path, model=model, max_steps=2)
    trainer.train()
    plain = make_trainer(tmp_path, max_steps=2)
    plain.train()
    assert within(difference(trainer.model, plain.model), "grpo_weights")


def test_dropout_is_refused_where_there_is_some(tmp_path):
    args = ChunkwiseGRPOConfig(**settings(tmp_path, disable_dropout=False))
    refused(tmp_path, ValueError, "has dropout of 0.1: .*Leave disable_dropout=True", model=gpt2(), args=args)
    refused(tmp_path, ValueError, "has dropout of 0.3", model=make_policy(attention_dropout=0.3), args=args)
    refused(tmp_path, ValueError, "has dropout of 0.2", peft_config=lora(0.2), args=args)
    make_trainer(tmp_path, disable_dropout=False, peft_config=lora(0.0))


def test_a_sharded_reference_is_refused_before_it_is_saved(tmp_path):
    """Accelerate shards on accelerators alone: here its flag stands for it."""
    trainer = make_trainer(tmp_path)
    trainer._refuse_sharded_reference()
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="sync_ref_model=True with FSDP or DeepSpeed"):
        trainer._refuse_sharded_reference()


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, **saving).train()
    checkpoint = tmp_path / "checkpoint-2"
    for changes, message in (
        ({"seed": 4}, "seed=3, now it is 4"),
        ({"dataset": prompts(32)}, "prompts_in_dataset=64, now it is 32"),
        ({"dataset": prompts(64, seed=77)}, "prompts_digest=.*Resume with the same data"),
        ({"dataset": prompts().select(range(63, -1, -1))}, "prompts_digest="),
        ({"reward": [share_of_digits, Recorder()]}, r"reward_functions=\['share_of_digits'\], now it is .*'recorder'"),
        ({"reward": Recorder()}, r"reward_functions=\['share_of_digits'\], now it is \['recorder'\]"),
        ({"max_completion_length": 30}, "max_completion_length=24"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, max_steps=4, **changes).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "rollout_store.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no rollout_store.safetensors.*ChunkwiseGRPOTrainer\(model="):
        make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(checkpoint))


def test_the_fingerprint_is_of_what_is_stored():
    """Not of what a transform draws from it, nor of the form in which it is given out."""
    stored = Dataset.from_dict({"prompt": ["a", "b"], "answer": [1, 2]})
    drawn = stored.with_transform(lambda rows: {"prompt": [f"{text}{torch.rand(())}" for text in rows["prompt"]]})
    want = digest_of(stored)
    assert {digest_of(drawn), digest_of(drawn), digest_of(stored.with_format("numpy"))} == {want}
    assert digest_of(stored.select([1, 0])) != want
    assert digest_of(stored.rename_column("prompt", "text")) is None


def test_resuming_with_smaller_caps_or_batches_goes_on(tmp_path):
    """Groups that are too late by the new setting are trained late, nothing waits for ever, and then the cap holds."""
    make_trainer(tmp_path, chunk_length=2, max_steps=6, save_strategy="steps", save_steps=6).train()
    checkpoint = str(tmp_path / "checkpoint-6")
    capped = make_trainer(tmp_path / "a", chunk_length=2, max_steps=26, max_staleness=1)
    capped.train(resume_from_checkpoint=checkpoint)
    assert metric(capped, "rollout/staleness/max")[-1] <= 1
    smaller = make_trainer(
        tmp_path / "b", chunk_length=2, max_steps=44, max_staleness=4, per_device_train_batch_size=4
    )
    smaller.train(resume_from_checkpoint=checkpoint)
    assert metric(smaller, "rollout/staleness/max")[-1] <= 4


def test_resuming_between_batches_with_another_accumulation_loses_no_rows(tmp_path):
    """8 rows a batch, as 2 x 4 and then 4 x 2: every later batch is trained whole before the next one is sampled."""
    first = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=3, **first).train()
    other = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    resumed = make_trainer(tmp_path, max_steps=5, **other)
    seen = []
    served = resumed._generate_and_score_completions
    resumed._generate_and_score_completions = lambda inputs: seen.append(resumed._step) or served(inputs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert seen == [0, 4]


def test_a_batch_cut_in_the_middle_needs_the_same_processes(tmp_path):
    changes = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, **changes).train()
    path = tmp_path / "checkpoint-1" / "rollout_store.safetensors"
    trainer = make_trainer(tmp_path, max_steps=2, **changes)
    facts = trainer.rollouts.load(path)
    trainer.rollouts.save(path, **{**facts, "processes": 2})
    with pytest.raises(ValueError, match=r"in the middle of a batch with processes=2, and now it is 1.*multiple of 4"):
        make_trainer(tmp_path, max_steps=2, **changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# --- The seams -------------------------------------------------------------------------------------------------------

SEAMS = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "_tokenize_prompts": ["self", "prompts"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
}


def test_the_private_methods_of_trl_are_as_they_were():
    """A canary: TRL's own names that this trainer builds on, with their arguments, and what they return."""
    for name, arguments in SEAMS.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == arguments, name
    used = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert list(used)[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    begun = inspect.signature(Trainer._init_training_state).parameters
    assert list(begun)[:4] == ["self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs"]
    source = inspect.getsource(GRPOTrainer)
    for name in ("_buffered_inputs", "_pending_extra_logs", "generation_kwargs", "eos_token_ids", "_dist", "_is_vlm"):
        assert f"self.{name}" in source, name


def test_the_private_methods_of_trl_return_what_they_did(tmp_path):
    """The shapes that this trainer's own versions, which serve stored rows, must have."""
    trainer = GRPOTrainer(
        make_policy(),
        [share_of_digits, share_of_digits],
        args=GRPOConfig(**settings(tmp_path)),
        train_dataset=prompts(),
        processing_class=make_tokenizer(),
    )
    prompt_ids, images, fields = trainer._tokenize_prompts(["12=", "345="])
    assert [len(ids) for ids in prompt_ids] == [3, 4]
    assert (images, fields) == (None, {})
    completion_ids, logprobs = trainer._generate_single_turn(prompt_ids, images, fields, 1, False)
    assert all(isinstance(ids, list) and isinstance(ids[0], int) for ids in completion_ids)
    assert logprobs is None
    texts = trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    rewards = trainer._calculate_rewards(list(prompts(2)), ["12=", "345="], texts, completion_ids)
    assert rewards.shape == (2, 2)
    assert torch.equal(rewards[:, 0], torch.tensor(share_of_digits(["12=", "345="], texts)))


def test_what_trl_hands_on_has_the_expected_keys(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    batch = trainer._buffered_inputs[0]
    assert set(batch) == {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
        "old_per_token_logps",
    }  # fmt: skip
    assert batch["old_per_token_logps"].shape == batch["completion_ids"].shape
    without = make_trainer(tmp_path, max_steps=1, chunk_importance_ratio=False)
    without.train()
    assert "old_per_token_logps" not in without._buffered_inputs[0]


def test_conversations_are_scored_as_messages(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts()]
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(completions)
        return share_of_digits(prompts, [completion[0]["content"] for completion in completions])

    trainer = ChunkwiseGRPOTrainer(
        make_policy(),
        reward,
        args=ChunkwiseGRPOConfig(**settings(tmp_path, chunk_length=6)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    assert all(len(completion) == 1 and completion[0]["role"] == "assistant" for completion in seen)
