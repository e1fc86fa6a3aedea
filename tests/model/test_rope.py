"""LongRoPE: which factors, which amplitude, and no memory of earlier calls."""

import math

import pytest
import torch

from tolerances import assert_close
from transformers_minicpm4.model.modeling_minicpm4 import MiniCPM4RotaryEmbedding


SHORT = [1.0 + 0.1 * i for i in range(8)]
LONG = [1.0 + 0.7 * i for i in range(8)]


def longrope(original=64, short=SHORT, long=LONG):
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
    }


def table(positions, factors, amplitude):
    frequency = [10_000 ** (-2 * i / 16) / factor for i, factor in enumerate(factors)]
    angle = torch.tensor([[float(p) * f for f in frequency] for p in positions], dtype=torch.float64)
    return torch.cat([angle, angle], -1).cos() * amplitude, torch.cat([angle, angle], -1).sin() * amplitude


@pytest.mark.parametrize(
    "max_positions, length, factors, amplitude",
    [
        (64, 64, SHORT, 1.0),
        (64, 65, LONG, 1.0),  # longer than the original length
        (64, 3, SHORT, 1.0),
        (128, 3, LONG, math.sqrt(1 + math.log(2) / math.log(64))),  # raised maximum: long at every length
        (32, 40, SHORT, 1.0),
    ],
)
def test_list_and_amplitude(tiny_config, max_positions, length, factors, amplitude):
    rope = MiniCPM4RotaryEmbedding(tiny_config(max_position_embeddings=max_positions, rope_parameters=longrope()))
    got = rope(torch.zeros(1), torch.arange(length)[None])
    for name, mine, wanted in zip(("cos", "sin"), got, table(range(length), factors, amplitude)):
        assert_close(mine[0].double(), wanted, "rope_float32", name)


def test_rows_choose_for_themselves_and_nothing_is_remembered(tiny_config):
    rope = MiniCPM4RotaryEmbedding(tiny_config(max_position_embeddings=64, rope_parameters=longrope()))
    short, long = torch.arange(60), torch.arange(10, 70)
    before = rope(torch.zeros(1), short[None])
    both = rope(torch.zeros(1), torch.stack([short, long]))
    after = rope(torch.zeros(1), short[None])
    for mine, again, together in zip(before, after, both):
        assert torch.equal(mine, again)
        assert torch.equal(mine[0], together[0])
    assert_close(both[0][1].double(), table(range(10, 70), LONG, 1.0)[0], "rope_float32", "cos of the long row")


def test_factor_in_the_config_is_not_read(tiny_config):
    """InfLLM-V2-Long-Sparse-Base carries factor 1.0; the amplitude follows from the two lengths alone."""
    plain = MiniCPM4RotaryEmbedding(tiny_config(max_position_embeddings=128, rope_parameters=longrope()))
    named = MiniCPM4RotaryEmbedding(
        tiny_config(max_position_embeddings=128, rope_parameters={**longrope(), "factor": 1.0})
    )
    assert plain.attention_scaling == named.attention_scaling > 1


def test_buffers_survive_loading(tiny_config, tmp_path):
    """Non-persistent tables are rebuilt when a checkpoint is loaded through the meta device."""
    from transformers_minicpm4 import MiniCPM4ForCausalLM

    model = MiniCPM4ForCausalLM(tiny_config(max_position_embeddings=64, rope_parameters=longrope())).eval()
    model.save_pretrained(tmp_path)
    loaded = MiniCPM4ForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 120, (1, 70))
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_crossing_the_original_length_in_a_cache_is_said_once(tiny_model, caplog, monkeypatch):
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.warning_once.cache_clear()
    for name in ("transformers_minicpm4", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    ids = torch.randint(1, 120, (1, 60))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}

    def said():
        return [r for r in caplog.records if "original_max_position_embeddings (64 tokens)" in r.message]

    tiny_model("sdpa", max_position_embeddings=64, rope_parameters=longrope(long=SHORT)).generate(ids, **options)
    assert not said()  # equal lists, as in every released config: nothing to say
    model = tiny_model("sdpa", max_position_embeddings=64, rope_parameters=longrope())
    model.generate(ids, **options)
    model.generate(ids, **options)
    assert len(said()) == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"short_factor": SHORT[:-1]}, "short_factor must be a list of head_dim / 2 = 8 numbers, got 7"),
        ({"long_factor": None}, "long_factor"),
        ({"original_max_position_embeddings": "64"}, "must be an integer above 1"),
    ],
)
def test_bad_factors_are_refused(tiny_config, change, words):
    with pytest.raises(Exception, match=words):
        tiny_config(rope_parameters={**longrope(), **change})
