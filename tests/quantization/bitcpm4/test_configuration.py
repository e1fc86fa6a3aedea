"""`BitCPM4Config`: round trips and what it refuses."""

import json

import pytest
from transformers.quantizers.auto import AutoQuantizationConfig

from transformers_minicpm4.quantization.bitcpm4.configuration import BitCPM4Config


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"group_size": -1, "weight_format": "packed"},
        {"group_size": 32, "modules_to_not_convert": ["down_proj"], "scale_dtype": "float32"},
        {"modules_to_not_convert": ["model.layers.*.mlp", "mlp.up_proj"], "rounding": False},
    ],
)
def test_a_config_survives_json_and_the_auto_class(fields):
    config = BitCPM4Config(**fields)
    written = json.loads(json.dumps(config.to_dict()))
    read = AutoQuantizationConfig.from_dict(written)
    assert type(read) is BitCPM4Config
    assert read.to_dict() == config.to_dict()
    assert read.quant_method == "bitcpm4"
    assert {name: getattr(read, name) for name in fields} == fields


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"group_size": 0}, ValueError, "1 or more, or -1.*got 0"),
        ({"group_size": -2}, ValueError, "got -2"),
        ({"group_size": 64.0}, TypeError, r"must be int, got 64\.0"),
        ({"group_size": True}, TypeError, "must be int, got True"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "must be a list of layer names"),
        ({"modules_to_not_convert": [3]}, TypeError, "must be a list of layer names"),
        (
            {"modules_to_not_convert": ["up_proj", "*.mlp"]},
            ValueError,
            r"has '\*\.mlp', which is no regular expression",
        ),
        ({"rounding": 1}, TypeError, "rounding must be bool, got 1"),
        ({"rounding": False, "weight_format": "packed"}, ValueError, "rounding=False is for latents"),
        ({"weight_format": "int4"}, ValueError, "'latent' .* or 'packed' .* got 'int4'"),
        ({"scale_dtype": "bfloat16"}, ValueError, "'float16' or 'float32', got 'bfloat16'"),
        ({"bits": 2}, ValueError, "unknown field.*bits.*allowed are group_size"),
        ({"quant_method": "gptq"}, ValueError, "must be 'bitcpm4', got 'gptq'"),
    ],
)
def test_a_bad_field_is_named_at_construction(fields, error, words):
    with pytest.raises(error, match=words):
        BitCPM4Config(**fields)


def test_a_list_given_is_not_shared():
    names = ["down_proj"]
    config = BitCPM4Config(modules_to_not_convert=names)
    names.append("up_proj")
    assert config.modules_to_not_convert == ["down_proj"]
