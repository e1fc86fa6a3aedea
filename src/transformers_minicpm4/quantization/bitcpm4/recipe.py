"""
Training ternary weights with the ordinary `Trainer`: the two-stage schedule, and callbacks.

The recipe (MiniCPM4, arXiv 2506.07900, section 4.2): start from a checkpoint in high precision, warm the learning rate
up again when quantization-aware training (QAT) starts, and give QAT at least 40 % of all tokens; twice the tokens of
the decay is about as good as QAT from the first step. A teacher, if at all, comes after pure QAT: `distillation`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..export.checkpoint_files import new_file
from .qat import TernaryQATLinear, is_rounding, qat_layers, set_qat


logger = logging.get_logger(__name__)

# Peak learning rates of the paper's study with 5 million parameters trained from scratch: before and during QAT.
# BitCPM-CANN takes 1e-2 for QAT and finds 1.5e-2 too large. Fine-tuning of a trained checkpoint wants far less: see
# docs/bitcpm4.md for what worked.
STAGE_ONE_LEARNING_RATE = 1e-2
QAT_LEARNING_RATE = 5e-3
SMALLEST_QAT_SHARE = 0.4


def rewarmed_wsd_schedule(
    optimizer: torch.optim.Optimizer,
    num_training_steps: int,
    qat_share: float = SMALLEST_QAT_SHARE,
    num_warmup_steps: int = 0,
    num_rewarmup_steps: int | None = None,
    decay_share: float = 0.2,
    qat_lr_ratio: float = QAT_LEARNING_RATE / STAGE_ONE_LEARNING_RATE,
    min_lr_ratio: float = 0.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """
    Warmup-stable-decay in two stages: warm up to the optimizer's learning rate and hold it; where QAT starts, warm up
    again from 0 to `qat_lr_ratio` times that rate, hold it, and decay along a straight line.

    Args:
        optimizer: its learning rate is the peak of the first stage.
        num_training_steps: optimizer steps of both stages.
        qat_share: share of the steps (and of the tokens, where all steps have as many) that are QAT, the last ones.
            1 means that the first stage was trained elsewhere: the schedule is the second stage alone.
        num_warmup_steps: of the first stage, 0 or more.
        num_rewarmup_steps: steps of the second warmup, 0 or more; by default 5 % of the QAT steps.
        decay_share: share of all steps that decay, the last ones; 0 holds the rate to the end.
        qat_lr_ratio: peak of the second stage over that of the first, above 0; the paper's is 5e-3 / 1e-2.
        min_lr_ratio: learning rate at the end, over the first stage's peak; at most `qat_lr_ratio`.
        last_epoch: step to go on from, -1 to begin.

    Returns:
        the scheduler, for `Trainer(optimizers=(optimizer, scheduler))`.

    Raises:
        ValueError: an argument out of its range, by name; or stages that do not fit into the steps.

    Warns:
        UserWarning: a `qat_share` below the 40 % that the paper finds necessary.
    """
    _check_schedule(
        num_training_steps, qat_share, num_warmup_steps, num_rewarmup_steps, decay_share, qat_lr_ratio, min_lr_ratio,
        last_epoch,
    )  # fmt: skip
    if qat_share < SMALLEST_QAT_SHARE:
        warnings.warn(
            f"qat_share={qat_share} is below {SMALLEST_QAT_SHARE}: the paper comes close to QAT from the first step "
            "only from there on.",
            stacklevel=2,
        )
    start = qat_start_step(num_training_steps, qat_share)
    qat_steps = num_training_steps - start
    rewarmup = math.ceil(0.05 * qat_steps) if num_rewarmup_steps is None else num_rewarmup_steps
    decay = round(decay_share * num_training_steps)
    if num_warmup_steps > start or rewarmup + decay > qat_steps:
        raise ValueError(
            f"the stages do not fit: {start} steps before QAT hold {num_warmup_steps} of warmup, and {qat_steps} "
            f"steps of QAT hold {rewarmup} of re-warmup and {decay} of decay. Take fewer of these, or more steps."
        )
    factor = partial(
        _rewarmed_wsd_factor,
        warmup=num_warmup_steps,
        start=start,
        rewarmup=rewarmup,
        decay=decay,
        total=num_training_steps,
        ratio=qat_lr_ratio,
        floor=min_lr_ratio,
    )
    return LambdaLR(optimizer, factor, last_epoch)


def _check_schedule(
    num_training_steps, qat_share, num_warmup_steps, num_rewarmup_steps, decay_share, qat_lr_ratio, min_lr_ratio,
    last_epoch,
) -> None:  # fmt: skip
    counts = (
        ("num_training_steps", num_training_steps, 1),
        ("num_warmup_steps", num_warmup_steps, 0),
        ("num_rewarmup_steps", 0 if num_rewarmup_steps is None else num_rewarmup_steps, 0),
        ("last_epoch", last_epoch, -1),
    )
    for name, value, low in counts:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} is a whole number of steps, {low} or more; got {value!r}.")
    # Written so that NaN is refused too.
    if not 0 < qat_share <= 1:
        raise ValueError(f"qat_share is a share of the steps, above 0 and at most 1; got {qat_share}.")
    if not 0 <= decay_share <= 1:
        raise ValueError(f"decay_share is a share of the steps, 0 to 1; got {decay_share}.")
    if not 0 < qat_lr_ratio < math.inf:
        raise ValueError(f"qat_lr_ratio is a factor on the optimizer's learning rate, above 0; got {qat_lr_ratio}.")
    if not 0 <= min_lr_ratio <= qat_lr_ratio:
        raise ValueError(
            f"min_lr_ratio is where the decay ends, 0 to qat_lr_ratio={qat_lr_ratio}, where it begins; got "
            f"{min_lr_ratio}."
        )


def _rewarmed_wsd_factor(step, *, warmup, start, rewarmup, decay, total, ratio, floor) -> float:
    # + 1: the first step of a warmup moves already, or it would be spent on nothing.
    if step < start:
        return min(1.0, (step + 1) / max(1, warmup))
    if step - start < rewarmup:
        return ratio * (step - start + 1) / rewarmup
    left = max(0, total - step)
    return ratio if left >= decay else floor + (ratio - floor) * left / decay


def qat_start_step(num_training_steps: int, qat_share: float) -> int:
    """The first step of QAT, so that QAT has at least `qat_share` of the steps."""
    return num_training_steps - math.ceil(qat_share * num_training_steps - 1e-9)


class QATStartCallback(TrainerCallback):
    """
    Trains in full precision first and switches ternary rounding on at one step, after resuming from a checkpoint too.

    Args:
        qat_share: share of the optimizer steps, the last ones, that are QAT; the same as the schedule's. It is the
            share of tokens where every step has as many.
        start_step: first step of QAT, instead of `qat_share`.

    Raises:
        ValueError: both or none given, or out of range.

    Warns:
        UserWarning: training ended before QAT began, or `load_best_model_at_end` may go back to before it.
    """

    def __init__(self, qat_share: float | None = None, start_step: int | None = None):
        if (qat_share is None) == (start_step is None):
            raise ValueError(f"give qat_share or start_step, one of them; got {qat_share} and {start_step}.")
        if qat_share is not None and not 0 < qat_share <= 1:
            raise ValueError(f"qat_share is a share of the steps, above 0 and at most 1; got {qat_share}.")
        if start_step is not None and start_step < 0:
            raise ValueError(f"start_step is a step, 0 or more; got {start_step}.")
        self.qat_share = qat_share
        self.start_step = start_step

    def _start(self, state) -> int:
        return qat_start_step(state.max_steps, self.qat_share) if self.start_step is None else self.start_step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        set_qat(model, state.global_step >= self._start(state))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        _require_latents(model, type(self).__name__)
        start = self._start(state)
        state.qat_start_step = start  # for DistillationCallback, whichever stands first
        if args.load_best_model_at_end and start > 0:
            warnings.warn(
                f"load_best_model_at_end=True with QAT from step {start} on: the best evaluation may be one in full "
                "precision from before QAT, and its weights were not trained to be ternary. Set it to False, or "
                "train the two stages in two runs.",
                stacklevel=2,
            )
        self.on_step_begin(args, state, control, model=model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not is_rounding(model):
            warnings.warn(
                f"training ended at step {state.global_step} of {state.max_steps} before QAT began (step "
                f"{self._start(state)}): the weights were not trained to be ternary. Train on, or start QAT earlier "
                "(qat_share, start_step).",
                stacklevel=2,
            )


class TernaryMonitorCallback(TrainerCallback):
    """
    Watches the codes at every logging step. Adds to the log, and keeps in `history`:

    - `ternary/flip_rate`: share of the weights whose code changed since the last logging step. It should fall as the
      learning rate decays; 0 from early on says that the learning rate is too small to move latents over a threshold.
    - `ternary/zero_fraction`: share of codes that are 0.
    - `ternary/scale_drift`: mean over groups of |scale / scale at the start of training - 1|. The first scales
      lie in each checkpoint (`SCALES_FILE`) for a run that resumes from it; where the file is missing the drift counts
      from the checkpoint, and a warning says so.

    The entries are in `trainer.state.log_history`, and reach callbacks that stand behind this one. Needs 1 byte a
    ternary weight on the weights' device.
    """

    SCALES_FILE = "ternary_monitor/first_scales.safetensors"

    def __init__(self):
        self.history: list[dict[str, float]] = []
        self._codes: dict[str, torch.Tensor] = {}
        self._first_scales: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        _require_latents(model, type(self).__name__)
        for name, codes, scales in _codes_and_scales(model):
            self._codes[name], self._first_scales[name] = codes, scales
        if state.global_step:
            self._read_first_scales(self._file(args, state))

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self._file(args, state).parents[1].is_dir():
            with new_file(self._file(args, state)) as work:
                save_file(self._first_scales, work)

    def _file(self, args, state) -> Path:
        return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", self.SCALES_FILE)

    def _read_first_scales(self, file: Path) -> None:
        found = load_file(file) if file.is_file() else {}
        now = self._first_scales
        if found.keys() == now.keys() and all(found[name].shape == now[name].shape for name in now):
            self._first_scales = {name: found[name].to(now[name].device) for name in now}
        else:
            logger.warning(
                f"{file} has no scales of this model: ternary/scale_drift counts from the checkpoint that was resumed."
            )

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not self._codes or "loss" not in (logs or {}):  # evaluations and the end of training log too
            return
        flips = zeros = weights = groups = 0
        drift = 0.0
        for name, codes, scales in _codes_and_scales(model):
            flips += int((codes != self._codes[name]).sum())
            zeros += int((codes == 0).sum())
            weights += codes.numel()
            drift += float((scales.float() / self._first_scales[name].float() - 1).abs().sum())
            groups += scales.numel()
            self._codes[name] = codes
        entry = {
            "ternary/flip_rate": flips / weights,
            "ternary/zero_fraction": zeros / weights,
            "ternary/scale_drift": drift / groups,
        }
        self.history.append({"step": state.global_step, **entry})
        logs.update(entry)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entry)

    def on_train_end(self, args, state, control, **kwargs):
        self._codes, self._first_scales = {}, {}


def _codes_and_scales(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, codes, scales) of every ternary layer in training, with what LoRA adapters add to the latents."""
    adapters = {
        id(module.base_layer): module
        for module in model.modules()
        if isinstance(getattr(module, "base_layer", None), TernaryQATLinear)
    }
    for name, layer in qat_layers(model):
        with torch.no_grad():
            adapter = adapters.get(id(layer))
            yield name, *layer.codes_and_scales(*(() if adapter is None else adapter.deltas()))


def _require_latents(model: nn.Module, who: str) -> None:
    if next(qat_layers(model), None) is None:
        raise ValueError(
            f"{who} found no ternary layer in training. Load the model with quantization_config=BitCPM4Config(), or "
            "call prepare_qat(model)."
        )
