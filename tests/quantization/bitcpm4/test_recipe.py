"""Both stages with the real Trainer: schedule, start of QAT, resuming, and what the monitor sees."""

import logging
import re
import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from ternary_training import prepare, train, train_sft
from transformers_minicpm4.quantization.bitcpm4.configuration import BitCPM4Config
from transformers_minicpm4.quantization.bitcpm4.distillation import DistillationCallback
from transformers_minicpm4.quantization.bitcpm4.qat import prepare_qat, qat_layers, set_qat
from transformers_minicpm4.quantization.bitcpm4.quantizer import BitCPM4Quantizer, freeze
from transformers_minicpm4.quantization.bitcpm4.recipe import (
    QATStartCallback,
    TernaryMonitorCallback,
    qat_start_step,
    rewarmed_wsd_schedule,
)


# ------------------------------------------------------------------------------------------------------------ training


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tiny_llama, rows, tmp_path):
    """With QAT switched on after the checkpoint is written, and with it on before."""
    for start in (1, 5):
        folder = tmp_path / str(start)
        common = {"steps": 8, "save_strategy": "steps", "save_steps": 4}
        callbacks = [QATStartCallback(start_step=start)]
        whole = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
        train(whole, rows, folder, callbacks=callbacks, **common)
        resumed = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-4", dtype=torch.float32)
        train(resumed, rows, folder, callbacks=callbacks, resume=str(folder / "checkpoint-4"), **common)
        wanted = whole.state_dict()
        for name, tensor in resumed.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name


def train_by_the_recipe(model, rows, folder, resume=False, **changes):
    """Both stages, bfloat16, every callback: the weights and what the monitor saw."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = rewarmed_wsd_schedule(optimizer, 10, qat_share=0.6, num_warmup_steps=2, num_rewarmup_steps=2)
    torch.manual_seed(5)
    teacher = AutoModelForCausalLM.from_config(model.config)  # frozen: any weights do
    monitor = TernaryMonitorCallback()
    fields = {
        "output_dir": str(folder),
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**fields),
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=[monitor, QATStartCallback(qat_share=0.6), DistillationCallback(teacher, start_share=0.5)],
        optimizers=(optimizer, schedule),
    )
    trainer.train(resume_from_checkpoint=resume)
    logged = [(entry["loss"], entry["learning_rate"]) for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model.state_dict(), logged, monitor.history


@pytest.mark.parametrize("step", [2, 6, 8])
def test_the_whole_recipe_resumes_bit_for_bit(tiny_llama, rows, tmp_path, step):
    """Before QAT (from step 4), in pure QAT, and with the teacher (from step 7)."""
    wanted, logged, history = train_by_the_recipe(prepare(tiny_llama), rows, tmp_path)
    resume = str(tmp_path / f"checkpoint-{step}")
    found, logged_again, rest = train_by_the_recipe(prepare(tiny_llama), rows, tmp_path, resume)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert logged_again == logged
    assert rest == history[step:]  # scale_drift too, which counts from the very first scales


def test_the_drift_counts_from_the_checkpoint_where_the_first_scales_are_lost(tiny_llama, rows, tmp_path, caplog):
    common = {"steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(prepare(tiny_llama), rows, tmp_path, callbacks=[TernaryMonitorCallback()], **common)
    (tmp_path / "checkpoint-2" / TernaryMonitorCallback.SCALES_FILE).unlink()
    monitor = TernaryMonitorCallback()
    logging.getLogger("transformers_minicpm4").propagate = True
    resume = str(tmp_path / "checkpoint-2")
    train(prepare(tiny_llama), rows, tmp_path, callbacks=[monitor], resume=resume, **common)
    assert "scale_drift counts from the checkpoint" in caplog.text
    assert [entry["step"] for entry in monitor.history] == [3, 4]


def test_latents_from_before_qat_stay_so_on_disk(tiny_llama, rows, ids, tmp_path, caplog):
    """Loaded they compute what they computed, and are not packed; from the switch on they are as any other."""
    config = BitCPM4Config(group_size=16)
    model = prepare_qat(tiny_llama(), config)
    callbacks = [QATStartCallback(start_step=3)]
    train(model, rows, tmp_path, steps=4, callbacks=callbacks, save_strategy="steps", save_steps=2)
    logging.getLogger("transformers_minicpm4").propagate = True
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert "saved before QAT began" in caplog.text
    plain = tiny_llama()
    plain.load_state_dict(before.state_dict())
    with torch.no_grad():
        assert torch.equal(before(ids).logits, plain(ids).logits)
    with pytest.raises(ValueError, match="rounding is off in 14 of 14"):
        BitCPM4Quantizer.from_pretrained(tmp_path / "checkpoint-2").quantize(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    caplog.clear()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").eval()
    assert not caplog.text
    with torch.no_grad():
        assert torch.equal(after(ids).logits, model.eval()(ids).logits)
    set_qat(before, True)
    assert freeze(before).config.quantization_config.rounding
    assert config.rounding  # the caller's is no one's state


def test_qat_starts_at_its_step(tiny_llama, rows, tmp_path):
    model = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({layer.quantize for _, layer in qat_layers(model)})

    train(model, rows, tmp_path, steps=5, callbacks=[QATStartCallback(qat_share=0.6), Watch()])
    assert seen == [{False}, {False}, {True}, {True}, {True}]


def test_the_stage_before_qat_is_plain_training(tiny_llama, rows, tmp_path):
    model = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
    with pytest.warns(UserWarning, match=r"ended at step 4 of 4 before QAT began .step 100."):
        train(model, rows, tmp_path, steps=4, callbacks=[QATStartCallback(start_step=100)])
    plain = tiny_llama()
    train(plain, rows, tmp_path, steps=4)
    wanted = plain.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("start, warned", [(2, True), (0, False)])
def test_the_best_model_may_be_from_before_qat(tiny_llama, rows, tmp_path, start, warned):
    model = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
    arguments = TrainingArguments(str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", use_cpu=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        QATStartCallback(start_step=start).on_train_begin(arguments, TrainerState(max_steps=4), None, model=model)
    assert any("load_best_model_at_end=True with QAT from step 2" in str(each.message) for each in found) == warned


def test_qat_that_began_ends_without_a_warning(tiny_llama, rows, tmp_path):
    model = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*before QAT began")
        train(model, rows, tmp_path, steps=2, callbacks=[QATStartCallback(start_step=1)])


def test_callbacks_refuse_a_model_without_latents(tiny_llama, rows, tmp_path):
    with pytest.raises(ValueError, match="QATStartCallback found no ternary layer"):
        train(tiny_llama(), rows, tmp_path, callbacks=[QATStartCallback(qat_share=0.5)])
    for fields in ({}, {"qat_share": 0.5, "start_step": 1}, {"qat_share": 1.5}, {"start_step": -1}):
        with pytest.raises(ValueError, match="qat_share|start_step"):
            QATStartCallback(**fields)


def test_sft_trainer_trains_with_gradient_checkpointing(tiny_llama, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    model = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
    callbacks = [TernaryMonitorCallback(), QATStartCallback(start_step=0)]
    settings = {"learning_rate": 3e-3, "bf16": False}
    trainer, losses = train_sft(trl, model, tokenizer, tmp_path, settings, callbacks=callbacks)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# ------------------------------------------------------------------------------------------------------------ schedule


def rates(steps, **fields):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = rewarmed_wsd_schedule(optimizer, steps, **fields)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found, optimizer.param_groups[0]["lr"]


def test_the_schedule_warms_up_twice_and_decays_once():
    found, end = rates(100, num_warmup_steps=10, num_rewarmup_steps=5)
    assert found[0] == pytest.approx(1e-3)
    assert found[9:60] == pytest.approx([1e-2] * 51)  # stable until QAT starts: 40 % are left
    assert found[60] == pytest.approx(1e-3)  # re-warmed from the bottom
    assert found[64:80] == pytest.approx([5e-3] * 16)  # the paper's rate of the second stage
    assert found[80:] == pytest.approx([5e-3 * left / 20 for left in range(20, 0, -1)])
    assert end == 0


def test_a_share_of_one_is_the_second_stage_alone():
    found, _ = rates(20, qat_share=1.0, num_rewarmup_steps=2, qat_lr_ratio=1.0, decay_share=0.5)
    assert found[:3] == pytest.approx([5e-3, 1e-2, 1e-2])
    assert max(found[2:10]) == pytest.approx(1e-2)


def test_schedule_and_callback_start_qat_together():
    for steps in (7, 10, 99, 100, 101):
        for share in (0.4, 0.5, 0.61, 1.0):
            start = qat_start_step(steps, share)
            assert (steps - start) / steps >= share
            assert (steps - start - 1) / steps < share


def test_a_short_qat_stage_warns_and_stages_that_do_not_fit_are_refused():
    with pytest.warns(UserWarning, match=re.escape("qat_share=0.3 is below 0.4")):
        rates(100, qat_share=0.3)
    with pytest.raises(ValueError, match="60 steps before QAT hold 70 of warmup"):
        rates(100, num_warmup_steps=70)
    with pytest.raises(ValueError, match="30 of re-warmup and 20 of decay"):
        rates(100, num_rewarmup_steps=30)
    with pytest.raises(ValueError, match="qat_share is a share"):
        rates(100, qat_share=0.0)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"num_training_steps": 0}, "num_training_steps is a whole number of steps, 1 or more; got 0"),
        ({"num_training_steps": 10.0}, "num_training_steps is a whole number of steps, 1 or more; got 10.0"),
        ({"qat_share": 1.1}, "qat_share is a share of the steps, above 0 and at most 1; got 1.1"),
        ({"qat_share": float("nan")}, "qat_share is a share of the steps, above 0 and at most 1; got nan"),
        ({"num_warmup_steps": -1}, "num_warmup_steps is a whole number of steps, 0 or more; got -1"),
        ({"num_rewarmup_steps": -2}, "num_rewarmup_steps is a whole number of steps, 0 or more; got -2"),
        ({"num_rewarmup_steps": 2.5}, "num_rewarmup_steps is a whole number of steps, 0 or more; got 2.5"),
        ({"decay_share": -0.1}, "decay_share is a share of the steps, 0 to 1; got -0.1"),
        ({"decay_share": 1.5}, "decay_share is a share of the steps, 0 to 1; got 1.5"),
        ({"qat_lr_ratio": 0.0}, "qat_lr_ratio is a factor on the optimizer's learning rate, above 0; got 0.0"),
        (
            {"qat_lr_ratio": float("inf")},
            "qat_lr_ratio is a factor on .* rate, above 0; got inf",
        ),
        ({"min_lr_ratio": -0.1}, "min_lr_ratio is where the decay ends, 0 to qat_lr_ratio=0.5, where .* got -0.1"),
        ({"min_lr_ratio": 0.6}, "min_lr_ratio is where the decay ends, 0 to qat_lr_ratio=0.5, where .* got 0.6"),
        ({"last_epoch": -2}, "last_epoch is a whole number of steps, -1 or more; got -2"),
        ({"qat_share": 1.0, "num_warmup_steps": 5}, "0 steps before QAT hold 5 of warmup"),
    ],
    ids=str,
)
def test_each_argument_of_the_schedule_has_its_range(fields, words):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    with pytest.raises(ValueError, match=f"(?s).*{words}"):
        rewarmed_wsd_schedule(optimizer, **{"num_training_steps": 100, **fields})


def test_the_edges_of_the_schedule_are_allowed():
    assert rates(10, qat_share=1.0, num_rewarmup_steps=0, decay_share=0, qat_lr_ratio=1.0)[0] == [1e-2] * 10
    found, _ = rates(10, qat_share=1.0, num_rewarmup_steps=0, decay_share=1.0, qat_lr_ratio=1.0, min_lr_ratio=1.0)
    assert found == pytest.approx([1e-2] * 10)


# --------------------------------------------------------------------------------------------------------- the monitor


def test_the_monitor_counts_what_changed(tiny_llama, rows, tmp_path):
    model = prepare(tiny_llama)
    codes = {}

    class Count(TrainerCallback):
        """Flips counted by hand, at every second step."""

        found = []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            codes.update({name: layer.codes_and_scales()[0] for name, layer in qat_layers(model)})

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % 2:
                return
            now = {name: layer.codes_and_scales()[0] for name, layer in qat_layers(model)}
            flips = sum(int((now[name] != codes[name]).sum()) for name in now)
            self.found.append(flips / sum(code.numel() for code in now.values()))
            codes.update(now)

    monitor, count = TernaryMonitorCallback(), Count()
    trainer = train(model, rows, tmp_path, steps=6, callbacks=[monitor, count], logging_steps=2)
    assert [entry["ternary/flip_rate"] for entry in monitor.history] == count.found
    assert count.found[0] > 0
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["ternary/flip_rate"] for entry in logged] == count.found
    zeros = sum(int((code == 0).sum()) for code in codes.values()) / sum(code.numel() for code in codes.values())
    assert monitor.history[-1]["ternary/zero_fraction"] == zeros
    first = prepare(tiny_llama)
    drifts = [
        (layer.weight.detach().unflatten(1, (-1, 16)).abs().mean(2).half().double() / start - 1).abs().flatten()
        for (name, layer), (_, begun) in zip(qat_layers(model), qat_layers(first))
        for start in [begun.weight.detach().unflatten(1, (-1, 16)).abs().mean(2).half().double()]
    ]
    assert monitor.history[-1]["ternary/scale_drift"] == pytest.approx(torch.cat(drifts).mean().item(), rel=1e-5)
    assert 0 < monitor.history[0]["ternary/scale_drift"] < monitor.history[-1]["ternary/scale_drift"] < 0.2


def test_the_monitor_sees_a_run_that_moves_nothing(tiny_llama, rows, tmp_path):
    monitor = TernaryMonitorCallback()
    train(prepare(tiny_llama), rows, tmp_path, steps=2, callbacks=[monitor], learning_rate=0.0)
    assert [entry["ternary/flip_rate"] for entry in monitor.history] == [0, 0]
    assert [entry["ternary/scale_drift"] for entry in monitor.history] == [0, 0]
