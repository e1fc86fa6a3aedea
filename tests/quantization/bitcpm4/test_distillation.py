"""Distillation after pure QAT: the loss by its definition, when the teacher joins, and which trainers it fits."""

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from torch.nn import functional as F
from transformers import TrainerCallback

from ternary_training import prepare, train
from tolerances import relative_rms
from transformers_minicpm4.quantization.bitcpm4.configuration import BitCPM4Config
from transformers_minicpm4.quantization.bitcpm4.distillation import DistillationCallback, distillation_loss
from transformers_minicpm4.quantization.bitcpm4.qat import prepare_qat, qat_layers, set_qat
from transformers_minicpm4.quantization.bitcpm4.recipe import QATStartCallback


def test_distillation_loss_is_the_divergence_over_labelled_positions():
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, -100, 1, 2, -100]])
    total, count = 0.0, 0
    for row in range(2):
        for place in range(4):
            if labels[row, place + 1] != -100:
                p, q = (F.softmax(logits[row, place] / 2, -1) for logits in (teacher, student))
                total += float((p * (p / q).log()).sum()) * 4
                count += 1
    found = distillation_loss(student, teacher, labels, temperature=2.0)
    assert found.item() == pytest.approx(total / count, rel=1e-12)
    assert distillation_loss(student, student, labels).item() == pytest.approx(0, abs=1e-15)
    assert distillation_loss(student, teacher, labels, 2.0, 10).item() == pytest.approx(total / 10, rel=1e-12)


def test_distillation_joins_after_pure_qat(tiny_llama, rows, tmp_path):
    """Until then the run is the run without it; from then on it is not."""
    weights = {}
    for name, callbacks in (("pure", []), ("distilled", [DistillationCallback(tiny_llama(), start_share=0.5)])):
        seen = weights[name] = []

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, seen=seen, **kwargs):
                seen.append(next(qat_layers(model))[1].weight.detach().clone())

        model = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
        train(model, rows, tmp_path, steps=6, callbacks=[*callbacks, Watch()])
        assert not model._forward_hooks
    same = [torch.equal(a, b) for a, b in zip(weights["pure"], weights["distilled"])]
    assert same == [True, True, True, False, False, False]


def test_distillation_waits_for_pure_qat_after_full_precision(tiny_llama, rows, tmp_path):
    """The defaults with the paper's share of QAT: 6 steps in full precision, 2 of pure QAT, 2 with the teacher."""
    for place in (0, 1):
        seen = []
        distillation = DistillationCallback(tiny_llama())

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, seen=seen, callback=distillation, **kwargs):
                seen.append((next(qat_layers(model))[1].quantize, callback.active))

        callbacks = [QATStartCallback(qat_share=0.4), Watch()]
        callbacks.insert(place, distillation)
        train(prepare(tiny_llama), rows, tmp_path, steps=10, callbacks=callbacks)
        assert seen == [(False, False)] * 6 + [(True, False)] * 2 + [(True, True)] * 2


def test_distillation_that_cannot_be_as_asked_is_refused_before_the_first_step(tiny_llama, rows, tmp_path):
    never = [QATStartCallback(start_step=9), DistillationCallback(tiny_llama())]
    with pytest.raises(ValueError, match="would never join: QAT begins at step 9 of 10, and start_share=0.5"):
        train(prepare(tiny_llama), rows, tmp_path, steps=10, callbacks=never)
    off = prepare(tiny_llama)
    before = copy.deepcopy(off.state_dict())
    set_qat(off, False)
    with pytest.raises(ValueError, match="the rounding is off, .*QATStartCallback"):
        train(off, rows, tmp_path, steps=10, callbacks=[DistillationCallback(tiny_llama())])
    assert all(torch.equal(tensor, before[name]) for name, tensor in off.state_dict().items())


def test_distillation_alone_follows_the_teacher(tiny_llama, rows, tmp_path):
    torch.manual_seed(3)
    teacher = tiny_llama()
    model = prepare_qat(copy.deepcopy(teacher), BitCPM4Config(group_size=16))
    batch = torch.stack([rows[index]["input_ids"] for index in range(8)])

    def divergence():
        with torch.no_grad():
            return distillation_loss(model(batch).logits, teacher(batch).logits, batch).item()

    before = divergence()
    callback = DistillationCallback(teacher, start_share=1e-6, weight=1.0)
    train(model, rows, tmp_path, steps=40, callbacks=[callback])
    assert divergence() < 0.5 * before


def test_distillation_counts_accumulated_batches_like_the_loss(tiny_llama, rows, tmp_path):
    """Two batches of 2 are one batch of 4."""
    found = []
    for size, accumulated in ((4, 1), (2, 2)):
        model = prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))
        train(
            model,
            rows,
            tmp_path,
            steps=2,
            callbacks=[DistillationCallback(tiny_llama(), start_share=1e-6, weight=1.0)],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
        )
        found.append(next(qat_layers(model))[1].weight.detach() - next(qat_layers(prepare(tiny_llama)))[1].weight)
    # 3.4e-6 measured: float32 sums in another order, as a share of small updates.
    assert relative_rms(found[1], found[0]) < 1.3e-5


def test_a_teacher_with_another_vocabulary_is_refused(tiny_llama, rows, tmp_path):
    callback = DistillationCallback(tiny_llama(vocab_size=100), start_share=1e-6)
    with pytest.raises(ValueError, match="need one vocabulary"):
        train(prepare(tiny_llama), rows, tmp_path, callbacks=[callback])
    for fields, words in (
        ({"start_share": 0}, "from the start"),
        ({"weight": 0}, "weight"),
        ({"temperature": 0}, "temp"),
    ):
        with pytest.raises(ValueError, match=words):
            DistillationCallback(tiny_llama(), **fields)


def test_distillation_without_loss_or_logits_fails_on_the_first_step(tiny_llama, rows, tmp_path):
    """Not where the teacher joins, and the reason is among those given."""
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    callbacks = [DistillationCallback(tiny_llama(), start_share=0.7), Count()]
    with pytest.raises(ValueError, match="output has no loss. .*label_smoothing_factor.*liger.*SFTTrainer"):
        train(prepare(tiny_llama), rows, tmp_path, callbacks=callbacks, label_smoothing_factor=0.1)
    assert not steps


def sft(trl, model, tokenizer, folder, texts, callbacks, **changes):
    fields = {
        "output_dir": str(folder),
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**fields),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("size, accumulated", [(2, 3), (6, 1)])
def test_distillation_in_the_sft_trainer_is_the_mixed_loss(tiny_llama, tokenizer, tmp_path, size, accumulated):
    """
    Losses, metrics and weights, against a loop of our own over the same six uneven rows one by one: a step without the
    teacher and two with it.
    """
    trl = pytest.importorskip("trl")
    if Version(trl.__version__) < Version("1.16"):
        pytest.skip("TRL before 1.16 hands over logits")
    texts = [" ".join(f"w{3 + (7 * row + step) % 90}" for step in range(4 + row)) for row in range(6)]
    torch.manual_seed(3)
    teacher = tiny_llama(initializer_range=0.1)
    model, by_hand = prepare(tiny_llama), prepare(tiny_llama).train()
    callback = DistillationCallback(teacher, start_share=0.3, weight=0.7, temperature=2.0)
    batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
    trainer = sft(trl, model, tokenizer, tmp_path, texts, [callback], max_steps=3, **batches)
    trainer.train()

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    rows = [torch.tensor([row["input_ids"]]) for row in trainer.train_dataset]
    count = sum(row.shape[1] - 1 for row in rows)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for step in range(3):
        total = entropy = right = 0.0
        for row in rows:
            found = by_hand(row).logits[0, :-1]
            own = F.cross_entropy(found, row[0, 1:], reduction="sum")
            with torch.no_grad():
                p = (teacher(row).logits[0, :-1] / 2).softmax(-1)
                entropy += torch.distributions.Categorical(logits=found).entropy().sum().item()
                right += (found.argmax(-1) == row[0, 1:]).sum().item()
            divergence = 4 * (p * (p.log() - (found / 2).log_softmax(-1))).sum()
            total = total + (own if step == 0 else 0.3 * own + 0.7 * divergence)
        assert logged[step]["loss"] == pytest.approx(total.item() / count, rel=1e-5)
        if accumulated == 1:  # else the trainer logs the mean of its batches' means
            assert logged[step]["entropy"] == pytest.approx(entropy / count, rel=1e-5)
            assert logged[step]["mean_token_accuracy"] == pytest.approx(right / count, rel=1e-5)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    start = next(qat_layers(prepare(tiny_llama)))[1].weight
    moved, wanted = (next(qat_layers(each))[1].weight.detach() - start for each in (model, by_hand))
    assert relative_rms(moved, wanted) < 1.3e-5
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"loss_type": "dft"}, "loss_type='dft' weighs that by itself. Set loss_type='nll'"),
        ({"label_smoothing_factor": 0.1}, "output has no loss.*SFTTrainer with label_smoothing_factor=0"),
    ],
)
def test_losses_of_the_sft_trainer_that_distillation_cannot_join(tiny_llama, tokenizer, tmp_path, changes, words):
    """Refused at the first step, not where the teacher joins."""
    trl = pytest.importorskip("trl")
    callbacks = [DistillationCallback(tiny_llama(), start_share=0.7)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*label_smoothing_factor")
        trainer = sft(
            trl, prepare(tiny_llama), tokenizer, tmp_path, ["w3 w4 w5 w6"] * 40, callbacks, max_steps=4, **changes
        )
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0
