"""
Linear layers whose weight stays packed: `x @ W.T` with `W = scale * code` and codes of -1, 0 and 1 (BitCPM4).

The definition is `x.float() @ dequantize_ternary(...).T`; every path answers that with sums in float32:

- on a CPU, few rows (decoding): C++ that reads the packed bytes, see `ternary_cpu`;
- on a CPU, many rows (prefill): blocks of outputs, unpacked into a few MB and multiplied by PyTorch;
- on CUDA and ROCm: Triton, see `ternary_triton`;
- elsewhere, in `torch.compile` and `torch.jit.trace`, and without a compiler: the blocks alone, in PyTorch.

No path ever holds the whole dense weight.

Shape letters: `O` outputs, `I` inputs, `B` bytes of a packed row (`2 * ceil(I / 8)`), `Q` groups
(`ceil(I / group_size)`), `M` rows of `x`.
"""

from __future__ import annotations

import functools

import torch

from .ternary_cpu import kernels
from .ternary_packing import check_shape, row_blocks, unpack_rows


# Above these many rows, unpacking once for all of them costs less than reading codes for each (measured).
DIRECT_ROWS = 32
# Weights unpacked at a time. The C++ code writes them as float32: 4 MB, which stay in cache until they are used.
BLOCK_WEIGHTS = 1 << 20

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCALE_TYPES = (torch.float16, torch.float32)


def ternary_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    A linear layer on packed ternary weights (BitCPM4, arXiv 2506.07900, 4.2), differentiable in `x` and `bias`.

    The codes and scales are frozen: they get no gradient, whatever their `requires_grad` says. Under autocast `x` is
    cast first, as for `torch.nn.functional.linear`. On the C++ and Triton paths a row's answer is the same bit for bit
    whatever lies beside it and however many threads there are; the blocked path ends in PyTorch's own product, which
    promises that for one number of threads only.

    Args:
        x: `[..., I]`, float32, bfloat16 or float16; any strides.
        packed: uint8 `[O, 2 * ceil(I / 8)]`, see `ternary_packing`.
        scales: float16 or float32 `[O, ceil(I / group_size)]`.
        group_size: consecutive inputs that share a scale; the last group may be shorter, and `I` or more means one
            scale an output. The fast CPU path needs a multiple of 16, the GPU kernel one of 16, or one group.
        bias: `[O]` in any floating type, added in float32 (but in the type of `x` under autocast), or `None`.

    Returns:
        `[..., O]` in the dtype of `x`.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: shapes that do not fit each other, a group size below 1, or tensors on different devices.
    """
    _check(x, packed, scales, group_size, bias)
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast:
        x = x.to(torch.get_autocast_dtype(kind))
    rows = x.reshape(-1, x.shape[-1])
    needs_grad = rows.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and needs_grad:
        out = _TernaryLinear.apply(rows, packed, scales, group_size, bias)
    else:
        out = _linear(rows, packed, scales, group_size, bias)
    return out.reshape(*x.shape[:-1], len(packed))


def dequantize_ternary(packed: torch.Tensor, scales: torch.Tensor, group_size: int, in_features: int) -> torch.Tensor:
    """
    The dense weight, for exports and comparisons.

    Args:
        packed: uint8 `[O, 2 * ceil(I / 8)]`.
        scales: float16 or float32 `[O, ceil(I / group_size)]`.
        group_size: consecutive inputs that share a scale.
        in_features: `I`.

    Returns:
        float32 `[O, I]`; each element is 0, its scale or minus its scale, without rounding.

    Raises:
        TypeError, ValueError: as `ternary_linear`.
    """
    check_shape(packed, in_features)
    _check_scales(packed, scales, group_size, in_features)
    weight = torch.empty((len(packed), in_features), dtype=torch.float32, device=packed.device)
    for block in row_blocks(len(packed), in_features, BLOCK_WEIGHTS):
        weight[block] = _dequantize(packed[block], scales[block], group_size, in_features)
    return weight


# -------------------------------------------------------------------------------------------------------------- checks


def _check(x, packed, scales, group_size, bias) -> None:
    if x.dtype not in _TYPES:
        raise TypeError(
            f"ternary_linear multiplies float32, bfloat16 or float16 inputs; got {x.dtype}. Convert x with `.to(...)`."
        )
    if x.ndim < 1:
        raise ValueError("ternary_linear multiplies inputs of shape [..., in_features]; got a scalar.")
    check_shape(packed, x.shape[-1])
    _check_scales(packed, scales, group_size, x.shape[-1])
    if bias is not None and (bias.shape != packed.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"a bias is floating, of shape [{len(packed)}], one for each output; got {bias.dtype} {list(bias.shape)}."
        )
    devices = {tensor.device for tensor in (x, packed, scales, bias) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(
            f"inputs, codes, scales and bias lie on one device; got {', '.join(sorted(map(str, devices)))}. Move them "
            "with `.to(device)`."
        )


def _check_scales(packed, scales, group_size, in_features) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(
            f"group_size is a whole number of inputs, at least 1; got {group_size!r}. For one scale an output give "
            f"in_features, {in_features} here."
        )
    if scales.dtype not in _SCALE_TYPES:
        raise TypeError(
            f"scales are float16 or float32; got {scales.dtype}. bfloat16 would round them: keep them out of casts."
        )
    expected = [len(packed), -(-in_features // group_size)]
    if list(scales.shape) != expected:
        raise ValueError(
            f"{expected[0]} outputs of {in_features} inputs in groups of {group_size} have scales of shape {expected}"
            f"; got {list(scales.shape)}."
        )


# --------------------------------------------------------------------------------------------------------------- paths


def _linear(rows, packed, scales, group_size, bias) -> torch.Tensor:
    """`[M, O]` in the dtype of `rows` (`[M, I]`), whichever path it takes."""
    packed, scales = packed.contiguous(), scales.contiguous()
    with torch.no_grad(), without_autocast(rows.device.type):
        if not rows.numel() or not len(packed):
            out = torch.zeros((len(rows), len(packed)), dtype=torch.float32, device=rows.device)
        elif (gpu := _gpu(rows, group_size)) is not None:
            return gpu.ternary_matmul(rows, packed, scales, group_size, bias)
        elif len(rows) <= DIRECT_ROWS and (cpu := _cpu(rows, group_size)) is not None:
            out = cpu.product(rows.float().contiguous(), packed, scales, group_size)
        else:
            out = _blocked(rows.float(), packed, scales, group_size)
        if bias is not None:
            out += bias.float()
        return out.to(rows.dtype)


def _blocked(rows, packed, scales, group_size) -> torch.Tensor:
    out = torch.empty((len(rows), len(packed)), dtype=torch.float32, device=rows.device)
    for block in row_blocks(len(packed), rows.shape[1], BLOCK_WEIGHTS):
        out[:, block] = rows @ _dequantize(packed[block], scales[block], group_size, rows.shape[1]).T
    return out


def _dequantize(packed, scales, group_size, in_features) -> torch.Tensor:
    """float32 `[O, I]`, for as few outputs as its caller can afford."""
    if (cpu := _cpu(packed, group_size, in_features)) is not None:
        return cpu.dequantize(packed.contiguous(), scales.contiguous(), group_size, in_features)
    codes = unpack_rows(packed, in_features)
    if group_size >= in_features:
        return codes * scales.float()
    if in_features % group_size == 0:
        return (codes.unflatten(1, (-1, group_size)) * scales.float()[..., None]).flatten(1)
    return codes * scales.float().repeat_interleave(group_size, 1)[:, :in_features]


def _cpu(tensor, group_size, in_features=None):
    """The C++ kernels where they serve: not on other devices, not in a traced graph, not for odd groups."""
    if tensor.device.type != "cpu" or _is_traced():
        return None
    cpu = kernels()
    return cpu if cpu is not None and cpu.takes(in_features or tensor.shape[1], group_size) else None


def _is_traced() -> bool:
    """Whether PyTorch is writing down what is computed, and would not see what the kernels write."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _gpu(tensor, group_size):
    """The Triton kernels where they serve, else `None`."""
    if not tensor.is_cuda or _is_traced():
        return None
    gpu = _triton()
    return gpu if gpu is not None and gpu.takes(tensor.shape[1], group_size) else None


@functools.cache
def _triton():
    try:
        from . import ternary_triton
    except ImportError:
        return None
    return ternary_triton


def without_autocast(kind: str):
    """Context in which autocast is off on devices of `kind`."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else torch.no_grad()


class _TernaryLinear(torch.autograd.Function):
    """`grad @ W`, block by block of outputs, in float32."""

    @staticmethod
    def forward(ctx, rows, packed, scales, group_size, bias):
        ctx.save_for_backward(packed, scales)
        ctx.shape, ctx.group_size = rows.shape, group_size
        ctx.types = rows.dtype, None if bias is None else bias.dtype
        return _linear(rows, packed, scales, group_size, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        packed, scales = ctx.saved_tensors
        grad_rows = grad_bias = None
        with without_autocast(grad.device.type):
            grad = grad.float()
            if ctx.needs_input_grad[0]:
                total = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
                for block in row_blocks(len(packed), ctx.shape[1], BLOCK_WEIGHTS):
                    weight = _dequantize(packed[block], scales[block], ctx.group_size, ctx.shape[1])
                    total.addmm_(grad[:, block], weight)
                grad_rows = total.to(ctx.types[0])
            if ctx.needs_input_grad[4]:
                grad_bias = grad.sum(0).to(ctx.types[1])
        return grad_rows, None, None, None, grad_bias
