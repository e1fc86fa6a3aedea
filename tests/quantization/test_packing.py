"""Packing against the definition: one long integer per column, cut into words of 32 bits."""

import pytest
import torch

from transformers_minicpm4.quantization.packing import BITS, pack_codes, pack_unit, unpack_codes


def words_of(codes: list[int], bits: int) -> list[int]:
    """The layout as Python integers: code k at bit k * bits, then words of 32 bits, as signed numbers."""
    stream = sum(code << (k * bits) for k, code in enumerate(codes))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(codes) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_words_are_the_bit_stream_and_unpack_gives_the_codes_back(bits, dim):
    codes = torch.randint(0, 2**bits, (96, 64), dtype=torch.uint8)
    codes[:, 0], codes[0] = 2**bits - 1, 2**bits - 1  # sign bits everywhere in one row and one column
    words = pack_codes(codes, bits, dim)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    columns = codes.T if dim == 0 else codes
    expected = torch.tensor([words_of(column.tolist(), bits) for column in columns], dtype=torch.int32)
    assert torch.equal(words, expected.T if dim == 0 else expected)
    back = unpack_codes(words, bits, dim)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


def test_three_bits_cross_word_borders_as_the_first_release_had_them():
    """Code 10: bits 30, 31 of word 0 and bit 0 of word 1; code 21: bit 31 of word 1 and bits 0, 1 of word 2."""
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[10], codes[21] = 0b111, 0b101
    words = [int(word) & 0xFFFFFFFF for word in pack_codes(codes, 3)]
    assert words == [0b11 << 30, (1 << 31) | 1, 0b10]


def test_any_width_of_integers_is_taken():
    codes = torch.arange(16).reshape(16, 1)
    assert torch.equal(pack_codes(codes, 4), pack_codes(codes.to(torch.uint8), 4))


@pytest.mark.parametrize("bits, unit", [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_a_dimension_that_fills_no_whole_words_is_named(bits, unit):
    assert pack_unit(bits) == unit
    with pytest.raises(ValueError, match=rf"{unit - 1} codes of {bits} bits .* divisible by {unit}"):
        pack_codes(torch.zeros(unit - 1, 2, dtype=torch.uint8), bits)


def test_bad_codes_and_words_are_refused():
    with pytest.raises(ValueError, match=r"0 \.\. 15, got 0 \.\. 16"):
        pack_codes(torch.tensor([0, 16] * 4), 4)
    with pytest.raises(ValueError, match=r"0 \.\. 3, got -1 \.\. 0"):
        pack_codes(torch.tensor([-1] + [0] * 15), 2)
    with pytest.raises(ValueError, match="5 bits"):
        pack_codes(torch.zeros(32, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match=r"int32 words, got torch\.int64"):
        unpack_codes(torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"4 words of 3-bit codes: .* divisible by 3"):
        unpack_codes(torch.zeros(4, dtype=torch.int32), 3)
