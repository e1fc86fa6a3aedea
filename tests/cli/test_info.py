"""What `minicpm4 info` says equals what the loaded model and its cache are."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from transformers_minicpm4 import InfLLMv2Config, MiniCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.cli.describe import kv_cache_bytes
from transformers_minicpm4.infllm_v2 import infllm_v2_attention
from transformers_minicpm4.infllm_v2.cache import InfLLMv2CacheLayer


SPARSE = {**InfLLMv2Config().to_dict(), "topk": 3, "window_size": 128, "dense_len": 64}


def info(run_cli, folder, *options):
    result = run_cli("info", folder, "--json", *options)
    assert result.code == 0, result.err
    return json.loads(result.out)


@pytest.mark.parametrize("save_options", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_equal_those_of_the_loaded_model(run_cli, make_checkpoint, tied, save_options):
    folder = make_checkpoint(save_options, tie_word_embeddings=tied, dtype=torch.bfloat16)
    model = MiniCPM4ForCausalLM.from_pretrained(folder)
    report = info(run_cli, folder)
    parameters = list(model.parameters())  # a tied one counts once
    assert report["weights"]["parameters"] == sum(parameter.numel() for parameter in parameters)
    assert report["weights"]["bytes"] == sum(parameter.nbytes for parameter in parameters)
    assert report["weights"]["tensors"] == len(parameters)
    assert report["weights"]["files"] == len(list(folder.glob("*.safetensors")))
    assert report["dtype"] == "bfloat16"
    assert report["tie_word_embeddings"] is tied


def test_a_large_checkpoint_is_described_without_reading_its_weights(run_cli, tmp_path):
    # The 8B model as a header and a hole: a file with a size but no content on the disk.
    config = MiniCPM4Config(
        vocab_size=73448,
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        state = MiniCPM4ForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    try:
        os.truncate(file, 8 + len(text) + end)
    except OSError:
        pytest.skip("this file system keeps no file of 16 GB with a hole")
    report = info(run_cli, tmp_path)
    assert report["weights"]["parameters"] == sum(tensor.numel() for tensor in state.values())
    # The repository on the Hub has 16.4 GB; 32 layers of 2 heads of 128 in bfloat16 are 32 KiB of cache a token.
    assert report["weights"]["bytes"] == pytest.approx(16.4e9, abs=0.05e9)
    assert report["kv_cache"][-1]["keys_and_values"] == 131072 * 32 * 1024


def test_sizes_are_those_of_the_configuration(run_cli, make_checkpoint):
    report = info(run_cli, make_checkpoint(num_key_value_heads=1, max_position_embeddings=777))
    assert report["context_length"] == 777
    assert (report["num_attention_heads"], report["num_key_value_heads"], report["head_dim"]) == (4, 1, 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [1, 31, 130])
def test_dense_cache_bytes_equal_those_of_a_real_cache(checkpoint, num_tokens, dtype):
    model = MiniCPM4ForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, num_tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    computed = kv_cache_bytes(model.config, num_tokens, dtype)
    assert computed == {"keys_and_values": measured, "compressed_keys": 0, "unrotated_keys": 0}


@pytest.mark.parametrize("use_nope", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 127, 128, 300])
def test_sparse_cache_bytes_equal_those_of_a_real_layer(num_tokens, use_nope):
    config = MiniCPM4Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        sparse_config={**SPARSE, "use_nope": use_nope},
    )
    layer = InfLLMv2CacheLayer(InfLLMv2Config.from_dict(config.sparse_config))
    keys, values = torch.randn(2, 1, 2, num_tokens, 16).to(torch.bfloat16)
    layer.update(keys, values, selection_key=keys if use_nope else None, row_starts=[0])
    assert kv_cache_bytes(config, num_tokens, "bfloat16") == {
        "keys_and_values": 3 * (layer.keys.nbytes + layer.values.nbytes),
        "compressed_keys": 3 * sum(means.nbytes for means in layer.compressed_keys),
        "unrotated_keys": 3 * keys.nbytes if use_nope else 0,
    }


@pytest.mark.parametrize("form", ["minicpm", "unnamed"])
def test_a_released_form_is_described_as_ours(run_cli, make_checkpoint, as_released, form):
    folder = make_checkpoint(sparse_config=SPARSE)
    before = info(run_cli, folder)
    assert info(run_cli, as_released(folder, form)) == before


def test_the_table_holds_the_stated_lengths(run_cli, make_checkpoint):
    folder = make_checkpoint(sparse_config=SPARSE)
    config = MiniCPM4Config.from_pretrained(folder)
    table = info(run_cli, folder)["kv_cache"]
    assert table == [
        {"tokens": length, **kv_cache_bytes(config, length, "float32")} for length in (4096, 32768, 131072)
    ]


def test_blocks_read_are_the_most_that_a_query_reads(run_cli, make_checkpoint):
    attention = info(run_cli, make_checkpoint(sparse_config=SPARSE))["attention"]
    assert attention["mode"] == "infllm_v2"
    assert attention["sparse_config"] == SPARSE
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 900, 8, generator=generator)
    key = torch.randn(1, 1, 900, 8, generator=generator)
    _, blocks = infllm_v2_attention(query, key, key, InfLLMv2Config.from_dict(SPARSE), return_blocks=True)
    assert int(blocks.sum(-1).max()) == attention["blocks_per_query"]
    assert attention["tokens_per_query"] == attention["blocks_per_query"] * SPARSE["block_size"]


def test_the_text_says_what_the_json_says(run_cli, make_checkpoint):
    folder = make_checkpoint(sparse_config=SPARSE)
    report, text = info(run_cli, folder), run_cli("info", folder).out
    assert f"{report['weights']['parameters']:,} parameters" in text
    assert f"at most {report['attention']['blocks_per_query']} blocks of 64 tokens" in text
    assert "dense below 64 tokens" in text
    assert text.count("(beyond the context)") == 3
    assert all(f"{field} {value}" in text for field, value in SPARSE.items())


def test_a_dense_checkpoint_says_how_to_make_it_sparse(run_cli, checkpoint):
    text = run_cli("info", checkpoint).out
    assert 'dense: a query reads every earlier token; sparse with attn_implementation="infllm_v2"' in text


def damage(folder, file, name, position, value):
    tensors = load_file(folder / file)
    tensors[name].view(-1)[position] = value
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("value, counts", [("nan", (1, 0)), ("inf", (0, 1)), ("-inf", (0, 1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_names_the_tensor_that_is_not_finite(run_cli, make_checkpoint, dtype, value, counts):
    folder = make_checkpoint({"max_shard_size": "60KB"}, dtype=dtype)
    name = "model.layers.1.mlp.up_proj.weight"
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    assert info(run_cli, folder, "--check")["not_finite"] == []
    damage(folder, file, name, -1, float(value))
    result = run_cli("info", folder, "--check", "--json")
    assert result.code == 1
    assert json.loads(result.out)["not_finite"] == [{"file": file, "tensor": name, "nan": counts[0], "inf": counts[1]}]
    assert f"{name}: {counts[0]} NaN, {counts[1]} Inf ({file})" in run_cli("info", folder, "--check").out


def test_check_looks_at_every_chunk(run_cli, make_checkpoint, monkeypatch):
    from transformers_minicpm4.cli import info as command

    monkeypatch.setattr(command, "CHECK_CHUNK", 1000)
    folder = make_checkpoint()
    name = "model.embed_tokens.weight"
    for position in (0, 999, 1000, -1):
        damage(folder, "model.safetensors", name, position, float("nan"))
    result = run_cli("info", folder, "--check", "--json")
    assert json.loads(result.out)["not_finite"] == [{"file": "model.safetensors", "tensor": name, "nan": 4, "inf": 0}]


def test_check_reads_8_bit_floats_and_passes_over_integers(run_cli, make_checkpoint):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    small = torch.ones(8).to(torch.float8_e5m2)
    small[3] = float("inf")
    save_file({**tensors, "small": small, "count": torch.arange(4)}, folder / "model.safetensors")
    found = json.loads(run_cli("info", folder, "--check", "--json").out)["not_finite"]
    assert found == [{"file": "model.safetensors", "tensor": "small", "nan": 0, "inf": 1}]


def test_a_quantized_checkpoint_says_so(run_cli, make_checkpoint):
    folder = make_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert info(run_cli, folder)["quantization"] == config["quantization_config"]
    text = run_cli("info", folder).out
    assert "quant_method gptq, bits 4, group_size 128, sym True" in text
    assert "stored elements" in text


def test_a_hub_checkpoint_out_of_reach_is_described_without_weights(run_cli, checkpoint, tmp_path, monkeypatch):
    # Only the configuration is in the local cache.
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: str(tmp_path / "config.json"))
    config = MiniCPM4Config.from_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda model: config)
    report = info(run_cli, "somebody/something")
    assert report["weights"] is None
    assert "out of reach" in run_cli("info", "somebody/something").out
    result = run_cli("info", "somebody/something", "--check")
    assert result.code == 2
    assert "hf download somebody/something" in result.sentence
