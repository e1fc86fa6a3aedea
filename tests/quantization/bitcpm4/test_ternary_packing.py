"""Packing is exact, has the layout it documents, and says what is wrong with bytes that are none of its own."""

import pytest
import torch

from transformers_minicpm4.quantization.bitcpm4 import ternary_packing
from transformers_minicpm4.quantization.bitcpm4.ternary_packing import check_packed, pack_ternary, unpack_ternary


def make_codes(outputs, inputs):
    return torch.randint(-1, 2, (outputs, inputs), dtype=torch.int8)


@pytest.mark.parametrize("inputs", [1, 3, 4, 7, 8, 9, 16, 130, 576])
@pytest.mark.parametrize("outputs", [0, 1, 5])
def test_round_trip_in_two_bits_a_weight(outputs, inputs):
    codes = make_codes(outputs, inputs)
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (outputs, 2 * -(-inputs // 8))
    check_packed(packed, inputs)
    assert torch.equal(unpack_ternary(packed, inputs), codes)


def test_layout_is_the_documented_one():
    codes = make_codes(4, 21)
    packed = pack_ternary(codes)
    for o in range(4):
        for i in range(21):
            assert int(packed[o, i // 4]) >> 2 * (i % 4) & 3 == int(codes[o, i]) & 3
    assert packed.tolist() == [[sum((int(c) & 3) << 2 * i for i, c in enumerate(row[4 * b : 4 * b + 4]))
                                for b in range(6)] for row in codes]  # fmt: skip


def test_blocks_do_not_show(monkeypatch):
    codes = make_codes(37, 50)
    whole = pack_ternary(codes)
    monkeypatch.setattr(ternary_packing, "_CODES", 200)
    assert torch.equal(pack_ternary(codes), whole)
    assert torch.equal(unpack_ternary(whole, 50), codes)


def test_strided_codes_pack_like_their_copy():
    codes = make_codes(40, 24)
    assert torch.equal(pack_ternary(codes.T), pack_ternary(codes.T.contiguous()))


@pytest.mark.parametrize(
    "codes, error, said",
    [
        (torch.zeros(2, 8), TypeError, r"int8; got torch.float32.*codes.to\(torch.int8\)"),
        (torch.zeros(8, dtype=torch.int8), ValueError, r"matrix \[outputs, inputs\]; got shape \[8\]"),
        (torch.tensor([[0, 2], [-1, 1]], dtype=torch.int8), ValueError, "values from -1 to 2"),
        (torch.tensor([[0, -2]], dtype=torch.int8), ValueError, "values from -2 to 0"),
    ],
)
def test_other_codes_are_refused(codes, error, said):
    with pytest.raises(error, match=said):
        pack_ternary(codes)


@pytest.mark.parametrize(
    "packed, inputs, error, said",
    [
        (torch.zeros(2, 4, dtype=torch.int8), 16, TypeError, "are uint8; got torch.int8"),
        (torch.zeros(2, 4, dtype=torch.uint8), 17, ValueError, r"17 inputs have shape \[outputs, 6\]; got \[2, 4\]"),
        (torch.zeros(4, dtype=torch.uint8), 16, ValueError, r"\[outputs, 4\]; got \[4\]"),
        (torch.zeros(2, 0, dtype=torch.uint8), 0, ValueError, "0 inputs"),
    ],
)
def test_other_shapes_are_refused(packed, inputs, error, said):
    for read in (check_packed, unpack_ternary):
        with pytest.raises(error, match=said):
            read(packed, inputs)


@pytest.mark.parametrize("input", range(9))
def test_damaged_codes_are_named(input):
    packed = pack_ternary(make_codes(3, 9))
    place = 2 * (input % 4)
    packed[1, input // 4] = int(packed[1, input // 4]) & ~(3 << place) | 2 << place
    with pytest.raises(ValueError, match=f"output 1, input {input} is the bits 10"):
        check_packed(packed, 9)


@pytest.mark.parametrize("inputs, bad", [(9, 10), (11, 12), (15, 15), (4, 5)])
def test_bits_past_the_last_input_are_refused(inputs, bad):
    packed = pack_ternary(make_codes(2, inputs))
    packed[1, bad // 4] |= 1 << 2 * (bad % 4)
    with pytest.raises(ValueError, match=f"past the last of {inputs} inputs"):
        check_packed(packed, inputs)
