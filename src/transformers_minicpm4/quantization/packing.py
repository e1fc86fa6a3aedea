"""
Codes of 2, 3, 4 or 8 bits in int32 words, as the GPTQ format has them.

Along one dimension the codes form a stream of bits, lowest bit first: code `k` lies at bits `k * bits ...` of it, and
a word holds 32 consecutive bits. With 2, 4 and 8 bits a word holds `32 / bits` whole codes; with 3 bits the unit is
32 codes in three words, and codes 10 and 21 of it cross a border (the layout of the first GPTQ release).
"""

from __future__ import annotations

import math

import torch


BITS = (2, 3, 4, 8)


def pack_unit(bits: int) -> int:
    """
    The smallest number of codes that fill whole words: what a packed dimension must be divisible by.

    Raises:
        ValueError: a width that the format has no layout for.
    """
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits have no int32 layout; use 2, 3, 4 or 8 bits.")
    return 32 // math.gcd(32, bits)


def pack_codes(codes: torch.Tensor, bits: int, dim: int = 0) -> torch.Tensor:
    """
    Packs codes along one dimension.

    Args:
        codes: integer tensor of any shape, each value in `0 .. 2**bits - 1`.
        bits: width of a code: 2, 3, 4 or 8.
        dim: the dimension that shrinks, from `n` codes to `n * bits / 32` words.

    Returns:
        contiguous int32, the shape of `codes` with `dim` shrunk.

    Raises:
        ValueError: an unsupported width, a dimension not divisible by [`pack_unit`], or a code out of range.
    """
    unit = pack_unit(bits)
    length = codes.shape[dim]
    if length % unit:
        raise ValueError(
            f"{length} codes of {bits} bits do not fill int32 words: the packed dimension must be divisible by "
            f"{unit}. Leave this layer unquantized, or pad it."
        )
    if codes.numel():
        low, high = (int(value) for value in torch.aminmax(codes))
        if low < 0 or high >= 2**bits:
            raise ValueError(f"codes of {bits} bits lie in 0 .. {2**bits - 1}, got {low} .. {high}.")
    units = codes.movedim(dim, 0).unflatten(0, (length // unit, unit))
    words = torch.zeros((length // unit, unit * bits // 32, *units.shape[2:]), dtype=torch.int32, device=codes.device)
    code = torch.empty_like(words[:, 0])  # one buffer: memory fresh from the system costs more than the shifts
    for k in range(unit):
        word, shift = divmod(k * bits, 32)
        code.copy_(units[:, k])
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
        code <<= shift  # bits beyond the word's end fall off
        words[:, word] |= code
    return words.flatten(0, 1).movedim(0, dim).contiguous()


def unpack_codes(words: torch.Tensor, bits: int, dim: int = 0) -> torch.Tensor:
    """
    The inverse of [`pack_codes`].

    Args:
        words: int32 tensor of any shape.
        bits: width of a code: 2, 3, 4 or 8.
        dim: the dimension that grows, from `n` words to `n * 32 / bits` codes.

    Returns:
        contiguous uint8, the shape of `words` with `dim` grown.

    Raises:
        ValueError: an unsupported width, words that are not int32, or a number of words no whole unit fills.
    """
    unit = pack_unit(bits)
    if words.dtype != torch.int32:
        raise ValueError(f"packed codes are int32 words, got {words.dtype}.")
    per_unit = unit * bits // 32
    length = words.shape[dim]
    if length % per_unit:
        raise ValueError(
            f"{length} words of {bits}-bit codes: {unit} codes take {per_unit} words, so their number must be "
            f"divisible by {per_unit}."
        )
    units = words.movedim(dim, 0).unflatten(0, (length // per_unit, per_unit))
    codes = torch.empty((length // per_unit, unit, *units.shape[2:]), dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    code = torch.empty(units[:, 0].shape, dtype=torch.int32, device=words.device)
    for k in range(unit):
        word, shift = divmod(k * bits, 32)
        torch.bitwise_right_shift(units[:, word], shift, out=code)
        if shift + bits > 32:  # the shift brought copies of the sign bit down: only 32 - shift bits are the code's
            code &= 2 ** (32 - shift) - 1
            code |= units[:, word + 1] << (32 - shift)
        code &= mask
        codes[:, k] = code
    return codes.flatten(0, 1).movedim(0, dim).contiguous()
