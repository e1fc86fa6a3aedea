"""
GPTQ for the weights that read one input: each column is rounded, and what it lost is spread over the columns to come.

The solver knows a weight and a Hessian, no model. P-GPTQ (MiniCPM4, arXiv 2506.07900, 4.1.2) differs from GPTQ (arXiv
2210.17323, algorithm 1) in the rows that enter the Hessian alone, see `hessian`.

Shape letters: `O` outputs (of all layers that share the input), `I` inputs, `Q` groups of inputs.
"""

from __future__ import annotations

import torch

from ..quantized_weight import QuantizedWeight


# Columns whose updates are applied to the rest at once: a matrix product instead of many rank-one updates.
BLOCK = 128
# Up to this width the factors are computed in float64, which is cheap there.
FLOAT64_WIDTH = 4096
# Damping is raised by this factor until the Hessian has a Cholesky factor.
ESCALATION = 10.0
ATTEMPTS = 6

# Shares of the group's range tried by the scale search: below 1 a few large weights are clipped for the sake of the
# rest.
SHRINK = tuple(1.0 - 0.03 * step for step in range(17))


class CannotFactor(ValueError):
    """The Hessian has no Cholesky factor, or is not finite."""


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    desc_act: bool = False,
    act_group_aware: bool = False,
    scale_search: bool = True,
    damp_percent: float = 0.01,
) -> tuple[QuantizedWeight, float]:
    """
    Quantize `weight` so that its outputs change least where `hessian` says inputs lie.

    Args:
        weight: `[O, I]`; not changed.
        hessian: `[I, I]`, the sum of `x x^T` over calibration rows, in any scale; not changed.
        group_size: inputs that share a scale; `-1` for all.
        desc_act: columns by falling `diag(hessian)`, with the scales of the unchanged weight ("static groups"), so
            that files need no order.
        act_group_aware: the same order within each group and among groups; scales are those of the updated weight.
        scale_search: choose each scale by the error that it makes, weighted by `diag(hessian)`; else the range
            decides.
        damp_percent: share of the mean diagonal added to it; raised where that is not enough.

    Returns:
        the quantized weight, and the damping that it took.

    Raises:
        CannotFactor: the Hessian is not finite, or stays indefinite with the strongest damping.
    """
    outputs, inputs = weight.shape
    group_size = inputs if group_size == -1 else group_size
    # Columns become rows: each step then touches memory in order.
    columns = weight.detach().to(torch.float32, copy=True).t().contiguous()
    diagonal = hessian.diagonal().to(torch.float32).clone()
    if not bool(torch.isfinite(diagonal).all()):
        raise CannotFactor("the Hessian is not finite: calibration rows contain NaN or infinite activations")
    # A column that no row excites is rounded by itself: nothing is known that would correct it or that it could spoil.
    dead = diagonal <= 0
    importance = diagonal.masked_fill(dead, 0.0)

    order = _order(importance, group_size, desc_act, act_group_aware)
    factor, damp = inverse_factor(hessian, dead, damp_percent, order)
    if order is not None:
        columns = columns[order]
    # Which group a position of the order belongs to; without a static order, groups are whole runs of it.
    group_of = torch.arange(inputs, device=columns.device) // group_size
    group_of = group_of if order is None else group_of[order]
    num_groups = -(-inputs // group_size)

    steps = torch.empty(num_groups, outputs, device=columns.device)
    zeros = torch.empty(num_groups, outputs, device=columns.device)
    if desc_act:
        original = weight.detach().to(torch.float32).t()
        for group in range(num_groups):
            rows = slice(group * group_size, (group + 1) * group_size)
            steps[group], zeros[group] = group_scale(original[rows], importance[rows], bits, symmetric, scale_search)
    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=columns.device)
    groups, largest, last = group_of.tolist(), float(2**bits - 1), None
    weights_of_error = importance if order is None else importance[order]

    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        block, lost = columns[start:end], torch.empty(end - start, outputs, device=columns.device)
        inside = factor[start:end, start:end]
        diagonal_inside = inside.diagonal().tolist()
        for row in range(end - start):
            group = groups[start + row]
            if not desc_act and group != last:
                # A group may reach beyond this block: its later columns lack this block's updates so far.
                stop, known = min(start + row + group_size, inputs), end
                members = columns[start + row : stop]
                if stop > known:
                    pending = factor[start : start + row, known:stop]
                    tail = members[known - start - row :] - pending.t() @ lost[:row]
                    members = torch.cat([members[: known - start - row], tail])
                steps[group], zeros[group] = group_scale(
                    members, weights_of_error[start + row : stop], bits, symmetric, scale_search
                )
                last = group
            step, zero = steps[group], zeros[group]
            column = block[row]
            code = torch.div(column, step).round_().add_(zero).clamp_(0.0, largest)
            codes[start + row] = code
            lost[row] = column.sub_(code.sub_(zero).mul_(step)).div_(diagonal_inside[row])
            if row + 1 < end - start:
                block[row + 1 :].addr_(inside[row, row + 1 :], lost[row], alpha=-1.0)
        if end < inputs:
            columns[end:].addmm_(factor[start:end, end:].t(), lost, alpha=-1.0)

    if order is not None:
        restored = torch.empty_like(codes)
        restored[order] = codes
        codes = restored
    solved = QuantizedWeight(
        codes=codes.t().contiguous(),
        scales=steps.t().to(torch.float16).contiguous(),
        zeros=zeros.t().to(torch.uint8).contiguous(),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )
    return solved, damp


def output_error(weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor) -> float:
    """`tr(dW H dW^T) / tr(W H W^T)`: how much of the outputs' energy on calibration rows becomes error."""
    weight, hessian = weight.detach().to(torch.float32), hessian.to(torch.float32)
    change = quantized.dequantize() - weight
    energy = float(((weight @ hessian) * weight).sum())
    return float(((change @ hessian) * change).sum()) / energy if energy > 0 else 0.0


def inverse_factor(
    hessian: torch.Tensor, dead: torch.Tensor, damp_percent: float, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """
    The upper triangular `U` with `U^T U = (hessian + damping)^-1`, float32 `[I, I]`, in the order of `order`, and the
    damping that it took.

    Row `i` of `U` tells how an error in column `i` is spread over the columns after it (GPTQ, equation 4).
    """
    if not bool(torch.isfinite(hessian).all()):
        raise CannotFactor("the Hessian is not finite: calibration rows contain NaN or infinite activations")
    # Apple's GPUs have no float64.
    wide = torch.float64 if hessian.shape[0] <= FLOAT64_WIDTH and hessian.device.type != "mps" else torch.float32
    matrix = hessian.to(wide)
    matrix = matrix[order][:, order] if order is not None else matrix.clone()
    dead = dead if order is None else dead[order]
    diagonal = matrix.diagonal()
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    diagonal[dead] = mean
    undamped = diagonal.clone()
    for attempt in range(ATTEMPTS):
        damp = damp_percent * ESCALATION**attempt
        diagonal.copy_(undamped + damp * mean)
        # In reversed order a lower factor L of the matrix gives U = (L^-1) reversed, with no inverse in between.
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if int(failed) == 0:
            identity = torch.eye(len(matrix), dtype=wide, device=matrix.device)
            factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if bool(torch.isfinite(factor).all()):
                return factor.to(torch.float32).contiguous(), damp
    raise CannotFactor(
        f"the Hessian [{len(matrix)}, {len(matrix)}] has no Cholesky factor even with damping {damp:g} of its mean "
        "diagonal; give more or other calibration text, or a larger damp_percent"
    )


def group_scale(
    rows: torch.Tensor, importance: torch.Tensor, bits: int, symmetric: bool, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Step and zero point of one group.

    Args:
        rows: float32 `[n, O]`, the group's columns.
        importance: float32 `[n]`, weight of each column's squared error.

    Returns:
        step `[O]`, as float16 can store it, and zero `[O]`, whole numbers in `0 .. 2**bits - 1`.
    """
    largest = 2**bits - 1
    low, high = rows.amin(0).clamp_(max=0.0), rows.amax(0).clamp_(min=0.0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)

    def scale(share: float) -> tuple[torch.Tensor, torch.Tensor]:
        # Rounded to what the file holds before anything is rounded with it; float16's range is the file's too.
        step = ((high - low) * (share / largest)).clamp_(1e-7, 65504.0).to(torch.float16).to(torch.float32)
        zero = (
            torch.full_like(step, 2 ** (bits - 1)) if symmetric else (-low * share / step).round_().clamp_(0, largest)
        )
        return step, zero

    best_step, best_zero = scale(1.0)
    if not search:
        return best_step, best_zero
    importance = importance[:, None] if float(importance.sum()) > 0 else torch.ones_like(importance)[:, None]
    best = torch.full_like(best_step, torch.inf)
    for share in SHRINK:
        step, zero = scale(share)
        error = torch.div(rows, step).round_().add_(zero).clamp_(0.0, float(largest)).sub_(zero).mul_(step).sub_(rows)
        error = error.square_().mul_(importance).sum(0)
        better = error < best
        best = torch.where(better, error, best)
        best_step, best_zero = torch.where(better, step, best_step), torch.where(better, zero, best_zero)
    return best_step, best_zero


def round_to_nearest(
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    importance: torch.Tensor | None = None,
    scale_search: bool = False,
) -> QuantizedWeight:
    """
    Each weight rounded by itself ("RTN"), with `group_scale`'s steps: the base line, and the search of smoothing.
    """
    outputs, inputs = weight.shape
    group_size = inputs if group_size == -1 else group_size
    whole = inputs // group_size
    rows = weight.detach().to(torch.float32)
    importance = torch.ones(inputs, device=rows.device) if importance is None else importance.to(torch.float32)
    parts = []
    if whole:
        # All whole groups at once: [n, Q * O] with the group's columns first.
        grouped = rows[:, : whole * group_size].reshape(outputs, whole, group_size).permute(2, 1, 0)
        if importance.min() == importance.max():
            parts.append(_round_groups(grouped, importance[:group_size], bits, symmetric, scale_search))
        else:
            parts += [
                _round_groups(
                    grouped[:, [group]], importance[group * group_size :][:group_size], bits, symmetric, scale_search
                )
                for group in range(whole)
            ]
    if whole * group_size < inputs:
        rest = rows[:, whole * group_size :].t()[:, None, :]
        parts.append(_round_groups(rest, importance[whole * group_size :], bits, symmetric, scale_search))
    codes = torch.cat([part[0].permute(2, 1, 0).reshape(outputs, -1) for part in parts], dim=1)
    return QuantizedWeight(
        codes=codes.contiguous(),
        scales=torch.cat([part[1] for part in parts]).t().to(torch.float16).contiguous(),
        zeros=torch.cat([part[2] for part in parts]).t().to(torch.uint8).contiguous(),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )


def _round_groups(grouped, importance, bits, symmetric, search):
    """`[n, Q, O]` to uint8 codes `[n, Q, O]`, steps and zeros `[Q, O]`."""
    size, groups, outputs = grouped.shape
    flat = grouped.reshape(size, groups * outputs)
    step, zero = group_scale(flat, importance, bits, symmetric, search)
    codes = torch.div(flat, step).round_().add_(zero).clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes.reshape(grouped.shape), step.reshape(groups, outputs), zero.reshape(groups, outputs)


def _order(importance: torch.Tensor, group_size: int, desc_act: bool, act_group_aware: bool) -> torch.Tensor | None:
    """int64 `[I]`: the columns in the order in which they are rounded, or `None` for their own."""
    if desc_act:
        return torch.argsort(importance, descending=True, stable=True)
    if not act_group_aware:
        return None
    groups = [
        torch.argsort(part, descending=True, stable=True) + start
        for part, start in zip(importance.split(group_size), range(0, len(importance), group_size), strict=True)
    ]
    # A shorter last group stays last: groups are found by position.
    full = [group for group in groups if len(group) == group_size]
    rest = [group for group in groups if len(group) < group_size]
    strongest = torch.stack([importance[group].max() for group in full]) if full else torch.empty(0)
    ranked = torch.argsort(strongest, descending=True, stable=True).tolist()
    return torch.cat([full[index] for index in ranked] + rest)
