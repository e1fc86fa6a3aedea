"""
Training ternary weights with the ordinary `Trainer`: layers, the two-stage schedule, and callbacks.

The recipe (MiniCPM4, arXiv 2506.07900, section 4.2): start from a checkpoint in high precision, warm the learning rate
up again when quantization-aware training (QAT) starts, and give QAT at least 40 % of all tokens; twice the tokens of
the decay is about as good as QAT from the first step. BitCPM-CANN (same team): distil, if at all, after pure QAT;
distilling from the start is worse.

Shape letters: `B` sequences, `N` tokens, `V` vocabulary, `O` outputs, `I` inputs.
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
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..export.checkpoint_files import new_file
from .adapters import refuse_adapters
from .configuration import QUANT_METHOD, BitCPM4Config
from .ternary import detect_group_size, fake_quantize, inputs_per_group, ternary_codes_and_scales


logger = logging.get_logger(__name__)

# Peak learning rates of the paper's study with 5 million parameters trained from scratch: before and during QAT.
# BitCPM-CANN takes 1e-2 for QAT and finds 1.5e-2 too large. Fine-tuning of a trained checkpoint wants far less: see
# docs/bitcpm4.md for what worked.
STAGE_ONE_LEARNING_RATE = 1e-2
QAT_LEARNING_RATE = 5e-3
SMALLEST_QAT_SHARE = 0.4


class TernaryQATLinear(nn.Linear):
    """
    `nn.Linear` whose weight is rounded to ternary in the forward pass. `weight` stays the ordinary floating-point
    parameter `[O, I]` (the latents): optimizers, checkpoints and other readers see a plain linear layer.

    Args:
        linear: the layer whose parameters it takes over (the same tensors, no copies).
        group_size: inputs that share a scale, or -1.
        scale_dtype: what scales are rounded to.
        name: of the layer, for errors.

    Raises:
        ValueError: the inputs are not divisible by `group_size`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        group_size: int,
        scale_dtype: torch.dtype = torch.float16,
        name: str = "this layer",
    ):
        inputs_per_group(linear.in_features, group_size, name)
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.group_size = group_size
        self.scale_dtype = scale_dtype
        self.quantize = True  # False: a plain linear layer, for the stage before QAT
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., I]` to `[..., O]`."""
        return F.linear(x, self.effective_weight(), self.bias)

    def effective_weight(self, *deltas: torch.Tensor) -> torch.Tensor:
        """`[O, I]`: what the layer multiplies by, with `deltas` `[O, I]` added to the latents."""
        weight = self._latents(deltas)
        return fake_quantize(weight, self.group_size, self.scale_dtype) if self.quantize else weight

    def codes_and_scales(self, *deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 `[O, I]` and `scale_dtype` `[O, I / group_size]` for the latents with `deltas` `[O, I]` added."""
        return ternary_codes_and_scales(self._latents(deltas), self.group_size, self.scale_dtype)

    def _latents(self, deltas: tuple[torch.Tensor, ...]) -> torch.Tensor:
        weight = self.weight
        for delta in deltas:  # one after the other, as PEFT merges them: another order is another number
            weight = (weight + delta).to(self.weight.dtype)
        return weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def convertible_linears(model: PreTrainedModel, config: BitCPM4Config) -> dict[str, nn.Linear]:
    """
    The linear layers that `config` makes ternary, by name.

    Raises:
        ValueError: there is none, or `config.group_size` does not divide the inputs of one (named), or the model has
            adapters, whose matrices are no layers of it.
    """
    refuse_adapters(model)
    kept = HfQuantizer.get_modules_to_not_convert(model, config.modules_to_not_convert, add_default_skips=True)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in config.modules_to_not_convert or ():
        if all(should_convert_module(linear, [name]) for linear in linears):
            logger.warning(f"modules_to_not_convert has {name!r}, which is the name of no linear layer: misspelt?")
    found = {name: module for name, module in linears.items() if should_convert_module(name, kept)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to make ternary beside those that stay: "
            f"{', '.join(sorted(kept))}."
        )
    for name, module in found.items():
        inputs_per_group(module.in_features, config.group_size, name)
    return found


def prepare_qat(model: PreTrainedModel, config: BitCPM4Config | None = None) -> PreTrainedModel:
    """
    Make the linear layers of a model in memory train as ternary ones, in place. `from_pretrained(...,
    quantization_config=BitCPM4Config())` does the same while it loads.

    Args:
        model: any model of Transformers; parameters stay the same objects, so an optimizer may exist already.
        config: what to convert; its `weight_format` must be `"latent"`.

    Returns:
        `model`.

    Raises:
        ValueError: the model is quantized already, its values are ternary already, or the config does not fit it.
    """
    config = BitCPM4Config() if config is None else config
    if config.weight_format != "latent":
        raise ValueError(
            f"prepare_qat trains latents: weight_format must be 'latent', got {config.weight_format!r}. Use freeze "
            "to pack a model."
        )
    refuse_quantized(model)
    replace_by_latents(model, config)
    mark_quantized(model, config)
    return model


def replace_by_latents(model: PreTrainedModel, config: BitCPM4Config) -> None:
    """
    Put a `TernaryQATLinear` in the place of every linear layer that `config` converts.

    Raises:
        ValueError: a weight is ternary already, or the config does not fit; nothing is changed then.
    """
    scale_dtype = getattr(torch, config.scale_dtype)
    linears = convertible_linears(model, config)
    for name, linear in linears.items():
        refuse_ternary(linear.weight, name)
    for name, linear in linears.items():
        if linear.weight.dtype in (torch.float16, torch.bfloat16):
            logger.warning_once(
                f"Latent weights in {linear.weight.dtype} swallow small updates. Load with dtype=torch.float32 to "
                "train, and let `bf16=True` of the TrainingArguments do the rest."
            )
        model.set_submodule(name, TernaryQATLinear(linear, config.group_size, scale_dtype, name))
    for _, layer in qat_layers(model):
        layer.quantize = config.rounding


def mark_quantized(model: PreTrainedModel, config: BitCPM4Config) -> None:
    """Say to Transformers (saving, Trainer, `dequantize()`) what `from_pretrained` would have said."""
    from .hf_quantizer import BitCPM4HfQuantizer
    from .peft_support import register_with_peft

    register_with_peft()
    model.config.quantization_config = config
    model.config._is_quantized = True
    model.hf_quantizer = BitCPM4HfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def refuse_quantized(model: PreTrainedModel | PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: the model, or the one of this configuration, is quantized; says by which method.
    """
    config = getattr(getattr(model, "config", model), "quantization_config", None)
    if config is None and not getattr(model, "is_quantized", False):
        return
    method, form = quantization_of(config)
    if method == QUANT_METHOD:
        raise ValueError(
            f"this model is a BitCPM4 model with {form} weights already. "
            + (
                "Train it as it is, or pack it with freeze."
                if form == "latent"
                else "Train LoRA adapters beside them, or all weights from the latents or the dense checkpoint that "
                "they were made from; dequantized they stay ternary, and are no latents."
            )
        )
    raise ValueError(
        f"this model is quantized with {method} already; ternary weights are made from unquantized ones. Load the "
        "original checkpoint, or call model.dequantize() first."
    )


def refuse_ternary(weight: torch.Tensor, name: str) -> None:
    """
    Raises:
        ValueError: the weight `[O, I]` is ternary already; names the layer. Absmean would shrink its scales.
    """
    if weight.is_meta or weight.dim() != 2:  # not read yet, or partitioned
        return
    # A few rows rule out nearly every weight. Rows of zeros (pruned) say nothing.
    rows = weight.detach().any(1).nonzero()[:8, 0]
    if detect_group_size(weight[rows]) is not None:
        raise ValueError(
            f"{name} is ternary already (fake-quantized): rounding it by absmean would shrink its scales to 0.6 to "
            "0.8 of their size. Pack such weights with import_fake_quantized, which is exact, and train LoRA adapters "
            "beside them; to train or round all weights, take the latents or the dense checkpoint that they were made "
            "from. If this layer alone is ternary, name it in modules_to_not_convert."
        )


def quantization_of(config: object) -> tuple[str, str | None]:
    """(quant_method, weight_format) of a quantization config, an object or a dict."""
    fields = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    method = fields.get("quant_method", "an unknown method")
    return str(getattr(method, "value", method)), fields.get("weight_format")


def qat_layers(model: nn.Module) -> Iterator[tuple[str, TernaryQATLinear]]:
    """(name, layer) of every ternary layer in training, within PEFT wrappers too."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TernaryQATLinear))


def set_qat(model: nn.Module, quantize: bool) -> None:
    """Switch the rounding of all `TernaryQATLinear` layers on or off, in what the model's config says too."""
    for _, layer in qat_layers(model):
        layer.quantize = quantize
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, BitCPM4Config) and config.rounding != quantize:
        # A new one: other models may hold the old one.
        model.config.quantization_config = BitCPM4Config(**{**config.to_dict(), "rounding": quantize})


def is_rounding(model: nn.Module) -> bool:
    """Whether every layer that can round does."""
    return all(layer.quantize for _, layer in qat_layers(model))


# --------------------------------------------------------------------------------------------------------- the recipe


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

    SCALES_FILE = "ternary_first_scales.safetensors"

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
        if state.is_world_process_zero and self._file(args, state).parent.is_dir():
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
