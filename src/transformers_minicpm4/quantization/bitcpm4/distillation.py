"""
A teacher in the loss of quantization-aware training (QAT), with the ordinary `Trainer` or TRL's `SFTTrainer`.

BitCPM-CANN (same team as MiniCPM4): distil, if at all, after pure QAT; distilling from the start is worse.

Shape letters: `B` sequences, `N` tokens, `V` vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback

from .qat import is_rounding


class DistillationCallback(TrainerCallback):
    """
    Adds a teacher to the loss from one step of QAT on: `(1 - weight) * loss + weight * KL(teacher || student)`, both
    means over the tokens that have labels. Works with trainers that take the loss from the model's output and let the
    model compute logits, as `Trainer` does (without label smoothing, a loss function of its own, or Liger's fused
    loss); and with TRL's `SFTTrainer` (1.16, `loss_type="nll"`), which asks for the labels' log-probabilities instead
    of logits: once the teacher joins, logits are computed and the log-probabilities made from them. Where it cannot
    work the first training pass says so, not the first one with the teacher.

    Args:
        teacher: a causal LM with the student's vocabulary, as a rule the checkpoint that QAT started from. It is
            frozen, and moved to the student's device.
        start_share: share of the QAT steps, the first ones, that are pure QAT. All steps are QAT, or those that
            `QATStartCallback` makes so, wherever it stands in the list. Not 0: distilling from the start was worse
            than pure QAT (BitCPM-CANN).
        weight: of the KL term, above 0 and at most 1.
        temperature: both distributions are softened by it, and the term is multiplied by its square.

    Raises:
        ValueError: a setting out of its range; in training, a trainer whose loss it cannot join, steps so few that it
            would never join, or rounding that is off.
    """

    def __init__(
        self, teacher: PreTrainedModel, start_share: float = 0.5, weight: float = 0.5, temperature: float = 1.0
    ):
        if not 0 < start_share < 1:
            raise ValueError(
                f"start_share is the share of QAT steps before distillation, between 0 and 1; got {start_share}. "
                "Distilling from the start is worse than not at all."
            )
        if not 0 < weight <= 1:
            raise ValueError(f"weight of the KL term is above 0 and at most 1; got {weight}.")
        if temperature <= 0:
            raise ValueError(f"temperature is above 0; got {temperature}.")
        self.teacher = teacher.eval().requires_grad_(False)
        self.start_share = start_share
        self.weight = weight
        self.temperature = temperature
        self.active = False
        self._hooks = []
        self._labels = None  # of the pass that is running, where the trainer wants log-probabilities

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if getattr(args, "loss_type", "nll") == "dft":
            raise ValueError(
                "DistillationCallback adds to the negative log-likelihood, and loss_type='dft' weighs that by itself. "
                "Set loss_type='nll'."
            )
        self.teacher.to(model.device)
        self.on_train_end(args, state, control)  # an earlier training may have been interrupted
        self._hooks = [
            model.register_forward_pre_hook(self._ask_for_logits, with_kwargs=True),
            model.register_forward_hook(self._add_teacher, with_kwargs=True),
        ]

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        # Now every on_train_begin has been called, and the first step is still to come.
        qat = getattr(state, "qat_start_step", None)
        if qat is None and not is_rounding(model):
            raise ValueError(
                "the rounding is off, and the teacher is for a student that rounds. Begin QAT with QATStartCallback, "
                "or call set_qat(model, True)."
            )
        qat = qat or 0
        start = qat + math.ceil(self.start_share * (state.max_steps - qat))
        if start >= state.max_steps:
            raise ValueError(
                f"DistillationCallback would never join: QAT begins at step {qat} of {state.max_steps}, and "
                f"start_share={self.start_share} of what follows is pure QAT. Train more steps, or take a smaller "
                "start_share or an earlier start of QAT."
            )
        self.active = state.global_step >= start

    def on_train_end(self, args, state, control, **kwargs):
        while self._hooks:
            self._hooks.pop().remove()

    def _ask_for_logits(self, module, args, kwargs):
        """TRL's `fused_lm_head=True` skips them; without it the forward is the model's own."""
        self._labels = None
        if module.training and self.active and kwargs.get("fused_lm_head") and kwargs.get("labels") is not None:
            self._labels = kwargs["labels"]
            kwargs = {name: value for name, value in kwargs.items() if name not in ("fused_lm_head", "labels")}
        return args, kwargs

    def _add_teacher(self, module, args, kwargs, output):
        if not module.training:
            return output
        if self._labels is not None:
            return self._as_log_probabilities(output, self._teacher_logits(args, kwargs, output.logits))
        if not self.active and kwargs.get("fused_lm_head") and hasattr(output, "log_probs"):
            return output
        # Before distillation starts too: half a run would be lost otherwise.
        missing = [part for part in ("loss", "logits") if getattr(output, part, None) is None]
        if missing:
            raise ValueError(
                f"DistillationCallback needs the model's loss and logits, and its output has no "
                f"{' and no '.join(missing)}. Either the batches have no labels, or the trainer computes the loss "
                "itself: label_smoothing_factor and compute_loss_func keep the labels from the model, and "
                "use_liger_kernel fuses logits into the loss. Use transformers.Trainer or TRL's SFTTrainer with "
                "label_smoothing_factor=0, no compute_loss_func, use_liger_kernel=False."
            )
        if not self.active:
            return output
        teacher = self._teacher_logits(args, kwargs, output.logits)
        divergence = distillation_loss(
            output.logits, teacher, kwargs["labels"], self.temperature, kwargs.get("num_items_in_batch")
        )
        output.loss = (1 - self.weight) * output.loss + self.weight * divergence
        return output

    def _teacher_logits(self, args, kwargs, student: torch.Tensor) -> torch.Tensor:
        inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in kwargs}
        with torch.no_grad():
            teacher = self.teacher(*args, **inputs, use_cache=False).logits
        if teacher.shape != student.shape:
            raise ValueError(
                f"teacher logits {list(teacher.shape)} and student logits {list(student.shape)} differ in "
                "shape: they need one vocabulary. Take the checkpoint that QAT started from as the teacher."
            )
        return teacher

    def _as_log_probabilities(self, output, teacher: torch.Tensor):
        """
        What `SFTTrainer` reads of the output, `[B, N - 1]` each and 0 where there is no label. Its loss is the sum of
        `-log_probs` over a count of its own (tokens of accumulated batches and of other processes too); so the
        teacher's share goes in there.
        """
        labels = self._labels[:, 1:].to(output.logits.device)
        self._labels = None
        counted = labels != -100
        wide = output.logits[:, :-1].to(torch.promote_types(output.logits.dtype, torch.float32))
        student = F.log_softmax(wide, -1)
        own = student.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        divergence = _divergence(wide, teacher[:, :-1].to(wide.dtype), self.temperature)
        output.log_probs = torch.where(counted, (1 - self.weight) * own - self.weight * divergence, 0)
        output.label_mask = counted
        with torch.no_grad():  # the trainer's metrics
            output.entropy = torch.where(counted, -(student.exp() * student).sum(-1), 0)
            output.is_top1 = counted & (student.argmax(-1) == labels)
        return output


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `temperature**2 * KL(teacher || student)` in nats, summed over positions that predict a label.

    Args:
        student: logits `[B, N, V]`.
        teacher: logits `[B, N, V]`.
        labels: `[B, N]`, -100 where there is none; position n predicts label n + 1.
        temperature: softens both distributions.
        num_items_in_batch: what to divide by, as `Trainer` counts it over accumulated batches; by default the number
            of positions that count here.

    Returns:
        scalar, float32 or wider.
    """
    counted = labels[:, 1:] != -100
    wide = torch.promote_types(student.dtype, torch.float32)
    total = _divergence(student[:, :-1][counted].to(wide), teacher[:, :-1][counted].to(wide), temperature).sum()
    return total / (counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """`temperature**2 * KL(teacher || student)` of each position, `[..., V]` to `[...]`."""
    student, teacher = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * temperature**2
