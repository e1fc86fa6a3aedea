"""
A short trainer of EAGLE-2 heads for any Llama-like target (arXiv 2401.15077).

The target is frozen; its hidden states are computed as training goes. Shape letters: B rows, S pairs of a row, C
hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import pad, smooth_l1_loss
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .eagle_head import EagleConfig, EagleHead, check_ids, check_target


logger = logging.get_logger(__name__)


def train_eagle(
    target: PreTrainedModel,
    rows: Sequence,
    steps: int = 400,
    *,
    head: EagleHead | None = None,
    length: int = 128,
    batch_size: int = 4,
    reuse: int = 4,
    own_steps: int = 1,
    learning_rate: float = 1e-3,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    max_grad_norm: float = 0.5,
    regression_weight: float = 0.1,
    vocabulary_ids: torch.Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> EagleHead:
    """
    Train a head for `EagleDraft`.

    Where the head drafts below the first level it reads its own hidden states, not the target's. Training does the
    same: after the pass over the target's states come `own_steps` passes, each over the outputs of the one before,
    with the keys that drafting would find (HASS, arXiv 2408.15766; "training-time test" in EAGLE-3, arXiv
    2503.01840). Every pass is asked for the target's next hidden state (smooth L1) and the target's distribution
    (cross-entropy), as in EAGLE, whose weights are 1 and 0.1 where ours are 0.1 and 1. The tokens are those of the
    text.

    Ctrl-C ends training; what has been trained by then is returned.

    Args:
        rows: token ids, one sequence a text; joined and cut into pieces of `length` tokens. Best are texts that the
            target wrote itself, or such as it will write.
        steps: optimizer steps.
        head: one to train further, changed in place; `None`: a new one from the target's last layer (`new_head`).
        length: tokens of a piece; its positions begin at 0.
        reuse: steps on each batch of hidden states, which cost more than the steps do.
        own_steps: passes over the head's own states.
        warmup: part of `steps` in which the learning rate rises; then it falls along a cosine to zero.
        vocabulary_ids: cross-entropy over these ids alone `[V]`; cheaper, and what an FR-Spec draft is asked for.

    Returns:
        The head, in the target's dtype.

    Raises:
        ValueError: fewer than `length` tokens, or an argument out of range.
    """
    if min(steps, batch_size, reuse) < 1 or own_steps < 0 or length < own_steps + 3:
        raise ValueError(
            "train_eagle: steps, batch_size and reuse are 1 or more, own_steps 0 or more and length at least "
            f"own_steps + 3; got {steps}, {batch_size}, {reuse}, {own_steps} and {length}."
        )
    pieces = torch.cat([torch.as_tensor(row, dtype=torch.long).flatten() for row in rows] or [torch.empty(0)])
    if len(pieces) < length:
        raise ValueError(f"the rows have {len(pieces)} tokens and one piece needs {length}; give more text.")
    pieces = pieces[: len(pieces) // length * length].reshape(-1, length).long()
    low, high, vocabulary = pieces.min(), pieces.max(), target.config.vocab_size
    if low < 0 or high >= vocabulary:
        raise ValueError(f"rows hold ids from {low} to {high}; the target's lie between 0 and {vocabulary - 1}.")
    if vocabulary_ids is not None:
        vocabulary_ids = check_ids(vocabulary_ids, target.config.vocab_size).to(target.device)
    random = torch.Generator().manual_seed(seed)
    if head is None:
        head = new_head(target, seed)
    check_target(head.config, target)
    head.to(device=target.device, dtype=_precision(target)).requires_grad_(True).train()
    score = _output_head(target, vocabulary_ids)
    optimizer = torch.optim.AdamW(head.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    ramp = max(1, round(warmup * steps))

    def rate(step: int) -> float:
        return min((step + 1) / ramp, 0.5 + 0.5 * math.cos(math.pi * max(step - ramp, 0) / max(steps - ramp, 1)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    # The batches in turn, and each again `reuse - 1` times, at random among those of late.
    order, recent = torch.randperm(len(pieces), generator=random), []
    drawn = 0
    bar = tqdm(range(steps), desc="EAGLE head", disable=not progress)
    try:
        for step in bar:
            if step % reuse == 0 or not recent:
                chosen = order[torch.arange(drawn, drawn + batch_size) % len(order)]
                drawn += batch_size
                ids = pieces[chosen].to(target.device)
                recent = [*recent[-63:], (ids, hidden_states(target, ids))]
                batch = recent[-1]
            else:
                batch = recent[int(torch.randint(len(recent), (1,), generator=random))]
            loss = sum(eagle_loss(head, target, score, *batch, own_steps, regression_weight)) / (own_steps + 1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), max_grad_norm)
            optimizer.step()
            scheduler.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    except KeyboardInterrupt:
        logger.warning(f"Stopped after {bar.n} of {steps} steps; the head is returned as it is.")
    finally:
        bar.close()
        optimizer.zero_grad(set_to_none=True)
        head.to(target.dtype).requires_grad_(False).eval()
    return head


@torch.no_grad()
def hidden_states(target: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The target's last hidden states of `ids` `[B, S]`, after the final norm; `[B, S, C]`, in float32 at least."""
    return target.model(input_ids=ids, use_cache=False).last_hidden_state.to(_precision(target))


def eagle_loss(head, target, score, ids, hidden, own_steps: int, regression_weight: float) -> list[torch.Tensor]:
    """
    Losses of the pass over the target's states and of `own_steps` passes over the head's own, each a mean over pairs.

    Args:
        score: hidden states `[..., C]` to logits `[..., V]`.
        ids: `[B, S + 1]`; hidden: `[B, S + 1, C]`.
    """
    pairs = ids.shape[1] - 1
    with torch.no_grad():
        embeddings = target.get_input_embeddings()(ids[:, 1:]).to(hidden.dtype)
        wanted = score(hidden[:, 1:]).softmax(-1)
    positions = torch.arange(pairs, device=ids.device)
    rotation = target.model.rotary_emb(hidden, positions[None])
    back = positions[:, None] - positions
    read_hidden, keys, values, losses = hidden[:, :-1], [], [], []
    for step in range(own_steps + 1):
        stream, read = head.fuse(embeddings, read_hidden)
        own_keys, own_values = head.layer.self_attn.keys_values(read, rotation)
        keys.append(own_keys)
        values.append(own_values)
        # As in a chain drafted `step` deep: the target's states up to `step` back, then one row of each pass.
        mask = torch.cat([back >= step, *(back == step - place for place in range(1, step + 1))], dim=1)
        state = head.finish(stream, read, rotation, torch.cat(keys, dim=2), torch.cat(values, dim=2), mask)
        # The first `step` pairs have no chain that deep.
        logprobs = score(state[:, step:]).log_softmax(-1)
        loss = -(wanted[:, step:] * logprobs).sum(-1).mean()
        losses.append(loss + regression_weight * smooth_l1_loss(state[:, step:], hidden[:, 1 + step :]))
        read_hidden = pad(state[:, :-1], (0, 0, 1, 0))
    return losses


def new_head(target: PreTrainedModel, seed: int = 0, initialise: bool = True) -> EagleHead:
    """
    A head before training.

    Args:
        initialise: start from the target's last decoder layer, brought to the units behind the final norm, and from
            `fc` handing on the hidden state. Otherwise all weights are random.

    Raises:
        ValueError: the target's layers are not built like the head's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = EagleHead(EagleConfig.for_target(target.config))
    if not initialise:
        return head
    last, final = target.model.layers[-1], target.model.norm
    given = {name: tensor.detach().float().cpu() for name, tensor in last.state_dict().items()}
    own = head.layer.state_dict()
    if given.keys() != own.keys() or any(given[name].shape != own[name].shape for name in own):
        raise ValueError(
            f"the layers of {type(target).__name__} are not built like the head's; start from new_head(target, "
            "initialise=False)."
        )
    head.layer.load_state_dict(given)
    with torch.no_grad():
        weight, size = final.weight.detach().float().cpu(), _stream_size(target, seed)
        head.fc.weight.mul_(0.5)
        head.fc.weight[:, head.config.hidden_size :] += torch.eye(head.config.hidden_size)
        for norm in (head.layer.input_layernorm, head.layer.post_attention_layernorm):
            norm.weight.div_(weight.abs().clamp_min(0.1) * weight.sign())
        for projection in (head.layer.self_attn.o_proj, head.layer.mlp.down_proj):
            projection.weight.mul_(weight[:, None] / size)
    return head


def _stream_size(target: PreTrainedModel, seed: int) -> float:
    """Root mean square of what the final norm reads, on tokens at random."""
    sizes = []
    hook = target.model.norm.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].float()))
    try:
        random = torch.Generator().manual_seed(seed)
        hidden_states(target, torch.randint(target.config.vocab_size, (4, 16), generator=random).to(target.device))
    finally:
        hook.remove()
    return sizes[0].pow(2).mean().sqrt().item()


def _precision(target: PreTrainedModel) -> torch.dtype:
    return torch.promote_types(target.dtype, torch.float32)


def _output_head(target: PreTrainedModel, ids: torch.Tensor | None):
    layer, scaling = target.get_output_embeddings(), getattr(target.config, "logits_scaling", 1.0)
    weight, bias = (
        None if tensor is None else tensor.detach().to(_precision(target))
        for tensor in (layer.weight, getattr(layer, "bias", None))
    )
    if ids is not None:
        weight, bias = weight[ids], None if bias is None else bias[ids]
    return lambda hidden: torch.nn.functional.linear(hidden / scaling, weight, bias)


__all__ = ["new_head", "train_eagle"]
