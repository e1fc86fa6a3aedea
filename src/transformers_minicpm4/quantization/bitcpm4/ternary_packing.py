"""
Ternary codes in 2 bits each.

Four neighbouring inputs share a byte, the first in the lowest bits, and each code is a two's complement number of
2 bits: 0 is `00`, 1 is `01`, -1 is `11`, and `10` is no code.

    packed[o, i // 4] >> 2 * (i % 4) & 3 == code[o, i] & 3

A row of `I` inputs takes `2 * ceil(I / 8)` bytes; what is past the last input is 0. Rows follow each other without a
gap, so that on a little-endian machine 32 bits are 16 neighbouring inputs.

Shape letters: `O` outputs, `I` inputs, `B` bytes of a row (`2 * ceil(I / 8)`).
"""

from __future__ import annotations

import torch


# Codes unpacked at a time: what lies between takes some bytes a code.
_CODES = 1 << 22


def pack_ternary(codes: torch.Tensor) -> torch.Tensor:
    """
    Pack codes of -1, 0 and 1.

    Args:
        codes: int8 `[O, I]`.

    Returns:
        uint8 `[O, 2 * ceil(I / 8)]` in the layout above.

    Raises:
        TypeError: the codes are not int8.
        ValueError: they are not a matrix, or one of them is not -1, 0 or 1.
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"ternary codes are int8; got {codes.dtype}. Convert them with `codes.to(torch.int8)`.")
    if codes.ndim != 2:
        raise ValueError(f"ternary codes are a matrix [outputs, inputs]; got shape {list(codes.shape)}.")
    if codes.numel() and codes.device.type != "meta":
        low, high = (int(value) for value in codes.aminmax())
        if low < -1 or high > 1:
            raise ValueError(
                f"ternary codes are -1, 0 or 1; got values from {low} to {high}. Divide by the scale and round first."
            )
    outputs, inputs = codes.shape
    width = packed_bytes(inputs)
    packed = torch.empty((outputs, width), dtype=torch.uint8, device=codes.device)
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
    for rows in row_blocks(outputs, 4 * width, _CODES):
        padded = torch.nn.functional.pad(codes[rows], (0, 4 * width - inputs)).unflatten(1, (width, 4))
        packed[rows] = ((padded & 3).view(torch.uint8) << places).sum(2, dtype=torch.uint8)
    return packed


def unpack_ternary(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """
    The codes that `pack_ternary` packed.

    Args:
        packed: uint8 `[O, 2 * ceil(I / 8)]`.
        in_features: `I`, which the padding hides.

    Returns:
        int8 `[O, I]`.

    Raises:
        TypeError, ValueError: as `check_shape`.
    """
    check_shape(packed, in_features)
    codes = torch.empty((len(packed), in_features), dtype=torch.int8, device=packed.device)
    for rows in row_blocks(len(packed), in_features, _CODES):
        codes[rows] = unpack_rows(packed[rows], in_features)
    return codes


def check_packed(packed: torch.Tensor, in_features: int) -> None:
    """
    Whether bytes from elsewhere are packed ternary codes; reads all of them, so once at loading is enough.

    Args:
        packed: uint8 `[O, 2 * ceil(I / 8)]`.
        in_features: `I`.

    Raises:
        TypeError, ValueError: as `check_shape`.
        ValueError: two bits are `10`, which is no code, or a bit past the last input is set.
    """
    check_shape(packed, in_features)
    wrong = packed & ~(packed << 1) & 0xAA  # the high bit of each code that has it alone
    if wrong.any():
        row, byte = wrong.nonzero()[0].tolist()
        bits = int(wrong[row, byte])
        place = 4 * byte + ((bits & -bits).bit_length() - 1) // 2
        raise ValueError(
            f"the packed weight of output {row}, input {place} is the bits 10, which is no ternary code: "
            "these bytes are damaged, or were packed in another layout. Pack the codes again with `pack_ternary`."
        )
    rest = in_features % 8
    if rest and ((packed[:, -1].int() << 8 | packed[:, -2]) >> 2 * rest).any():
        raise ValueError(
            f"bits past the last of {in_features} inputs are set, which `pack_ternary` leaves 0: these bytes are "
            "damaged, or in_features is not the one they were packed with."
        )


def check_shape(packed: torch.Tensor, in_features: int) -> None:
    """
    What can be told of `packed` (uint8 `[O, 2 * ceil(I / 8)]`) without reading it.

    Raises:
        TypeError: it is not uint8.
        ValueError: it is not a matrix of the width that `in_features` inputs take.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed ternary codes are uint8; got {packed.dtype}. Pack codes with `pack_ternary`.")
    if packed.ndim != 2 or in_features < 1 or packed.shape[1] != packed_bytes(in_features):
        raise ValueError(
            f"packed ternary codes of {in_features} inputs have shape [outputs, {packed_bytes(in_features)}]; got "
            f"{list(packed.shape)}."
        )


def packed_bytes(in_features: int) -> int:
    """`B`, the bytes that a row of `in_features` inputs takes."""
    return 2 * -(-in_features // 8)


def row_blocks(outputs: int, width: int, budget: int) -> list[slice]:
    """Slices of rows with at most `budget` elements each (at least one row), for rows of `width`."""
    step = max(budget // max(width, 1), 1)
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]


def unpack_rows(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """int8 `[O, I]` of uint8 `[O, B]`, all at once and unchecked."""
    places = torch.arange(6, -1, -2, dtype=torch.int8, device=packed.device)
    # torch.jit.trace cannot write down a view in another dtype; a cast wraps around to the same bits.
    signed = packed.to(torch.int8) if torch.jit.is_tracing() else packed.view(torch.int8)
    # To the top of the byte and back down: the shift to the right repeats the sign.
    return ((signed[..., None] << places) >> 6).flatten(1)[:, :in_features]
