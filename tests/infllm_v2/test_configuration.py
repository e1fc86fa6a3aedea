"""The sparse_config of a checkpoint: what is admitted, what is refused and how, and the numbers that follow."""

import json

import pytest

from transformers_minicpm4 import InfLLMv2Config, MiniCPM4Config
from transformers_minicpm4.infllm_v2.configuration import CHECKPOINT_FIELDS


RELEASED = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}


def test_released_config_gives_the_published_numbers():
    config = InfLLMv2Config.from_dict(RELEASED)
    assert config == InfLLMv2Config()
    assert config.selected_blocks == 96  # |I| of the InfLLM-V2 paper
    assert config.first_sparse_position(100_000) == 8191
    by_call = InfLLMv2Config(dense_switch="call")
    assert by_call.first_sparse_position(8191) == 8191  # the whole call is dense
    assert by_call.first_sparse_position(8192) == 96 * 64  # the two switches differ from here to dense_len only


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": 65}, ["block_size (65)", "multiple of kernel_stride (16)"]),
        ({"kernel_size": 8}, ["kernel_size (8)", "at least kernel_stride (16)"]),
        ({"topk": 1}, ["topk (1)", "init_blocks + 1 (2)"]),
        ({"topk": 0}, ["topk", "at least 1", "0"]),
        ({"window_size": -1}, ["window_size", "0 or more", "-1"]),
        ({"dense_len": -2}, ["dense_len", "-1 (always sparse)", "-2"]),
        ({"dense_switch": "row"}, ["dense_switch", "'position' or 'call'", "'row'"]),
    ],
)
def test_values_the_rule_does_not_admit_are_named(changes, words):
    with pytest.raises(ValueError, match="sparse_config") as error:
        InfLLMv2Config(**changes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("value", ["64", 64.0, True, None])
def test_wrong_types_are_named(value):
    with pytest.raises(TypeError, match=r"topk must be int"):
        InfLLMv2Config(topk=value)


@pytest.mark.parametrize("name", CHECKPOINT_FIELDS)
def test_a_checkpoint_must_write_every_field(name):
    partial = {key: value for key, value in RELEASED.items() if key != name}
    with pytest.raises(ValueError, match=f"lacks {name}") as error:
        InfLLMv2Config.from_dict(partial)
    assert repr(RELEASED[name]) in str(error.value)  # says what the released value is


def test_unknown_field_lists_what_is_allowed():
    with pytest.raises(ValueError, match="unknown field.*top_k.*allowed are.*topk"):
        InfLLMv2Config.from_dict({**RELEASED, "top_k": 3})


def test_model_config_checks_it_at_construction_and_on_assignment():
    with pytest.raises(Exception, match="multiple of kernel_stride"):
        MiniCPM4Config(sparse_config={**RELEASED, "block_size": 24})
    config = MiniCPM4Config()
    with pytest.raises(Exception, match="lacks"):
        config.sparse_config = {"topk": 64}


def test_round_trip_through_config_json(tmp_path):
    config = MiniCPM4Config(sparse_config=InfLLMv2Config(topk=7, dense_switch="call"))
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["sparse_config"]
    assert stored == {**RELEASED, "topk": 7, "dense_switch": "call"}
    assert MiniCPM4Config.from_pretrained(tmp_path).infllm_v2 == InfLLMv2Config(topk=7, dense_switch="call")


def test_window_and_init_may_be_zero():
    config = InfLLMv2Config(window_size=0, init_blocks=0, topk=1)
    assert config.selected_blocks == 1
