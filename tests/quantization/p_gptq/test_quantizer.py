"""The whole way of a model: in memory and from files, killed and resumed, saved and read back."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GemmaForCausalLM,
    Lfm2Config,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
)

from small_models import OPTIONS, ROWS, SIZES, logits, make
from transformers_minicpm4 import InfLLMv2Config
from transformers_minicpm4.model.prefix_cache import PrefixCache
from transformers_minicpm4.quantization.export.gptq import load_gptq, read_gptq
from transformers_minicpm4.quantization.p_gptq.calibration import CalibrationError
from transformers_minicpm4.quantization.p_gptq.configuration import PGPTQConfig
from transformers_minicpm4.quantization.p_gptq.quantizer import PGPTQQuantizer
from transformers_minicpm4.quantization.p_gptq.solver import CannotFactor


@pytest.mark.parametrize("kind", ["llama", "qwen", "minicpm4"])
def test_from_files_is_as_in_memory_and_what_is_saved_is_what_ran(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    PGPTQQuantizer.from_pretrained(tmp_path / "source", **OPTIONS).quantize(tmp_path / "int4")
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before
    assert not (tmp_path / "int4.unfinished").exists()

    PGPTQQuantizer(**OPTIONS).quantize_model(model)
    read = load_gptq(tmp_path / "int4", torch.float32)
    assert torch.equal(logits(read), logits(model))
    weights = read_gptq(tmp_path / "int4")
    assert len(weights) == 7 * SIZES["num_hidden_layers"]
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert set(weights) == linears


def test_layers_that_read_one_input_are_solved_together_in_their_order():
    quantizer = PGPTQQuantizer(**OPTIONS)
    quantizer.quantize_model(make())
    first = [row["layer"].rpartition(".")[2] for row in quantizer.report if row["block"] == 0]
    assert first == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert all(row["rows"] == 12 * 24 for row in quantizer.report)
    assert sum(row["error"] for row in quantizer.report) < 0.7 * sum(row["rounding_error"] for row in quantizer.report)


def test_padding_never_counts():
    """Rows of unlike lengths, padded to run together, give what they give one by one."""
    rows = [row[: 24 - 2 * index] for index, row in enumerate(ROWS[:6])]
    weights = []
    for batch_size in (1, 3):
        quantizer = PGPTQQuantizer(**{**OPTIONS, "dataset": rows, "batch_size": batch_size})
        quantizer.quantize_model(make())
        weights.append([quantizer.weights[name].codes for name in quantizer.weights])
    different = sum(int((one != two).sum()) for one, two in zip(*weights, strict=True))
    # Other orders of float32 sums: 0.3 % of the codes, each from a value between two; counting the padding changes 20
    # %.
    assert different < 0.01 * sum(codes.numel() for codes in weights[0])


def test_skipping_nothing_is_gptq_and_skipping_is_not():
    def codes(**options):
        quantizer = PGPTQQuantizer(**{**OPTIONS, **options})
        quantizer.quantize_model(make())
        return torch.cat([quantizer.weights[name].codes.flatten() for name in quantizer.weights])

    plain = codes()
    assert torch.equal(plain, codes(skip_first=0, prefix_weight=0.0))
    assert torch.equal(plain, codes(skip_first=4, prefix_weight=1.0))
    assert not torch.equal(plain, codes(skip_first=4, prefix_weight=0.0))


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from small_models import OPTIONS
from transformers_minicpm4.quantization.p_gptq import quantizer as module
solve, count = module.PGPTQQuantizer._solve_block, 0
def slow(self, *args):
    global count
    count += 1
    if count == 3:
        print("third", flush=True)
        import time; time.sleep(60)
    solve(self, *args)
module.PGPTQQuantizer._solve_block = slow
module.PGPTQQuantizer.from_pretrained(sys.argv[1], **OPTIONS).quantize(sys.argv[2])
"""


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    model = make("qwen")
    model.save_pretrained(tmp_path / "source")
    PGPTQQuantizer.from_pretrained(tmp_path / "source", **OPTIONS).quantize(tmp_path / "whole")
    command = [
        sys.executable,
        "-c",
        SCRIPT.format(tests=str(Path(__file__).parents[2])),
        tmp_path / "source",
        tmp_path / "int4",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "third"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "int4").exists()
    assert len(list((tmp_path / "int4.unfinished").glob("block-*"))) == 2

    with pytest.raises(ValueError, match="another unfinished run .it differs in config"):
        PGPTQQuantizer.from_pretrained(tmp_path / "source", **OPTIONS, bits=8).quantize(tmp_path / "int4")
    solved = []
    solve = PGPTQQuantizer._solve_block
    monkeypatch.setattr(
        PGPTQQuantizer, "_solve_block", lambda self, *args: (solved.append(args[2]), solve(self, *args))
    )
    PGPTQQuantizer.from_pretrained(tmp_path / "source", **OPTIONS).quantize(tmp_path / "int4")
    assert solved == [2]
    for name in ("model.safetensors", "config.json", "quantize_config.json"):
        assert (tmp_path / "int4" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_a_checkpoint_in_bfloat16_solved_in_float32_keeps_its_dtype(kind, tmp_path):
    """The codes are those of a float32 model; what is not quantized is the source's, bit for bit."""
    make(kind).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    options = {**OPTIONS, "prefix_ids": [5]}
    PGPTQQuantizer.from_pretrained(tmp_path / "source", **options, compute_dtype=torch.float32).quantize(
        tmp_path / "int4"
    )
    PGPTQQuantizer.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32), **options
    ).quantize(tmp_path / "float32")
    got, wanted = read_gptq(tmp_path / "int4"), read_gptq(tmp_path / "float32")
    assert set(got) == set(wanted)
    for name in got:
        assert torch.equal(got[name].codes, wanted[name].codes)
        assert torch.equal(got[name].scales, wanted[name].scales)
    source = load_file(tmp_path / "source" / "model.safetensors")
    stored = load_file(tmp_path / "int4" / "model.safetensors")
    kept = {name for name in source if name in stored}
    assert {name.rpartition(".")[2] for name in kept} == ({"weight", "bias"} if kind == "qwen" else {"weight"})
    assert all(torch.equal(stored[name], source[name]) for name in kept)
    assert all(tensor.dtype != torch.float32 for tensor in stored.values())
    assert json.loads((tmp_path / "int4" / "config.json").read_text())["dtype"] == "bfloat16"
    prefix = PrefixCache.load(tmp_path / "int4")
    assert {tensor.dtype for tensor in prefix.keys + prefix.values} == {torch.bfloat16}


def test_what_blocks_compute_in(tmp_path, monkeypatch):
    make().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    for capability, wanted in (("AVX2", torch.float32), ("AVX512", torch.bfloat16)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        quantizer = PGPTQQuantizer.from_pretrained(tmp_path / "source", **OPTIONS)
        assert quantizer.blocks.first_inputs({"input_ids": ROWS[0][None]})[0].dtype == wanted
    with pytest.raises(ValueError, match="computes in its own dtype"):
        PGPTQQuantizer.from_pretrained(make(), **OPTIONS, compute_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"torch.float16 .* torch.bfloat16, whose values it does not hold"):
        PGPTQQuantizer.from_pretrained(tmp_path / "source", **OPTIONS, compute_dtype="float16")
    with pytest.raises(ValueError, match="compute_dtype='half precision' was given"):
        PGPTQQuantizer.from_pretrained(tmp_path / "source", **OPTIONS, compute_dtype="half precision")
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used"):
        PGPTQQuantizer.from_pretrained(tmp_path / "source", **OPTIONS, device="cuda:99")


def test_a_config_without_dtype_keeps_the_files(tmp_path):
    make().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    PGPTQQuantizer.from_pretrained(tmp_path / "source", **OPTIONS).quantize(tmp_path / "int4")
    assert load_file(tmp_path / "int4" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "int4" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("work_dir", [True, False])
def test_rows_that_lie_in_files_are_the_rows(work_dir, tmp_path, monkeypatch):
    from transformers_minicpm4.quantization.p_gptq import hidden_states

    in_memory = make()
    PGPTQQuantizer(**OPTIONS).quantize_model(in_memory)
    monkeypatch.setattr(hidden_states, "IN_MEMORY", 0)
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(
        torch, "from_file", lambda *args, **kwargs: mapped.append(args[0]) or from_file(*args, **kwargs)
    )
    model = make()
    PGPTQQuantizer(**OPTIONS).quantize_model(model, work_dir=tmp_path if work_dir else None)
    assert len(mapped) == 3
    assert torch.equal(logits(model), logits(in_memory))
    assert not any(path.name.startswith(".rows") for path in tmp_path.iterdir())


def test_a_stopped_run_goes_on_from_what_it_stored(tmp_path, monkeypatch):
    """Factors folded into norms and biases, in float32 over a bfloat16 checkpoint: as solved and as put back."""
    # As many heads for keys as for queries: v_proj, which has a bias, takes a factor too.
    make("qwen", num_key_value_heads=4).to(torch.bfloat16).save_pretrained(tmp_path / "source")

    def quantize(folder, compute_dtype):
        quantizer = PGPTQQuantizer.from_pretrained(
            tmp_path / "source", **OPTIONS, smoothing=True, compute_dtype=compute_dtype
        )
        quantizer.quantize(tmp_path / folder)
        return quantizer

    report = quantize("whole", torch.float32).report
    found = {row["layer"].rpartition(".")[2] for row in report if row["block"] < 2 and row["alpha"]}
    assert {"q_proj", "o_proj", "up_proj"} <= found
    solve = PGPTQQuantizer._solve_block

    def stopped(self, block, name, index, *args):
        if index == 2:
            raise KeyboardInterrupt
        solve(self, block, name, index, *args)

    monkeypatch.setattr(PGPTQQuantizer, "_solve_block", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize("int4", torch.float32)
    monkeypatch.setattr(PGPTQQuantizer, "_solve_block", solve)
    with pytest.raises(ValueError, match="differs in compute dtype"):
        quantize("int4", torch.bfloat16)
    quantize("int4", torch.float32)
    whole, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "int4"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_the_folder_holds(tmp_path):
    model = make()
    quantizer = PGPTQQuantizer(**OPTIONS, prefix_ids=[5])
    quantizer.quantize_model(model)
    quantizer.save(model, tmp_path / "int4")
    config = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "int4" / "quantize_config.json").read_text())
    wanted = {"bits": 4, "quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False, "sym": True}
    assert wanted.items() <= {**config, "static_groups": True, "lm_head": False}.items()
    assert config["meta"]["skip_first"] == 1
    assert config["meta"]["method"] == "P-GPTQ"
    assert config["meta"]["prefix_ids"] == [5]
    assert "dataset" not in json.dumps(config)
    report = json.loads((tmp_path / "int4" / "quantization_report.json").read_text())
    assert len(report["layers"]) == 21
    assert "| down_proj |" in (tmp_path / "int4" / "README.md").read_text()
    assert (tmp_path / "int4" / "quantization_error.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FileExistsError):
        quantizer.save(model, tmp_path / "int4")


def test_the_stored_prefix_is_the_models_own():
    model = make()
    expected = PrefixCache.from_model(model, [5, 6])
    quantizer = PGPTQQuantizer(**OPTIONS, prefix_ids=[5, 6])
    quantizer.quantize_model(model)
    for got, want in zip(
        quantizer.prefix.keys + quantizer.prefix.values, expected.keys + expected.values, strict=True
    ):
        assert torch.allclose(got, want, atol=1e-6)


def test_smoothing_changes_no_output_but_by_rounding(monkeypatch):
    """Scaled weights and what their factors were folded into err as 8-bit rounding does without them, about 2 %."""
    from transformers_minicpm4.quantization.p_gptq import quantizer as module

    monkeypatch.setattr(
        module, "solve", lambda weight, *_, **__: (module.round_to_nearest(weight, bits=8, group_size=8), 0.0)
    )
    errors = []
    for smoothing in (False, True):
        model = make(num_key_value_heads=4)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.input_layernorm.weight.mul_(torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5)
        before = logits(model)
        quantizer = PGPTQQuantizer(**{**OPTIONS, "group_size": 8}, smoothing=smoothing)
        quantizer.quantize_model(model)
        errors.append(float((logits(model) - before).norm() / before.norm()))
    # All of q/k/v, o, gate/up and down found a factor in some block.
    assert {row["layer"].rpartition(".")[2] for row in quantizer.report if row["alpha"]} >= {
        "q_proj",
        "o_proj",
        "up_proj",
        "down_proj",
    }
    assert errors[0] < 0.05
    assert errors[1] < 1.5 * errors[0]


def test_a_grouping_by_hand_quantizes_that_alone(tmp_path):
    model = make()
    o_proj = model.model.layers[1].self_attn.o_proj.weight.clone()
    quantizer = PGPTQQuantizer(**OPTIONS, modules_in_block_to_quantize=[["mlp.gate_proj", "mlp.up_proj"]])
    quantizer.quantize_model(model)
    assert len(quantizer.weights) == 6
    assert torch.equal(model.model.layers[1].self_attn.o_proj.weight, o_proj)
    quantizer.save(model, tmp_path / "part")
    assert torch.equal(logits(load_gptq(tmp_path / "part", torch.float32)), logits(model))


def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path, monkeypatch):
    from transformers_minicpm4.quantization.export import gptq

    model = make()
    quantizer = PGPTQQuantizer(**OPTIONS)
    quantizer.quantize_model(model)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gptq, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        quantizer.save(model, tmp_path / "int4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dataset": None}, CalibrationError, "no calibration data"),
        (
            {"dataset": [torch.tensor([3, 4])], "prefix_weight": 0.0},
            CalibrationError,
            "no calibration position counts",
        ),
        ({"dataset": [torch.tensor([3, 500])]}, CalibrationError, "token 500 and the model knows 128"),
        ({"dataset": [torch.tensor([3, -100])]}, CalibrationError, "token -100 and the model knows 128"),
        ({"prefix_ids": [999]}, CalibrationError, "token 999 and the model knows 128"),
        ({"dataset": [{"input_ids": torch.ones(2, 8, dtype=torch.long)}]}, CalibrationError, "a batch of shape"),
        ({"dataset": [{"input_ids": [1, 2, 3], "attention_mask": [1]}]}, CalibrationError, "attention_mask of 1"),
        ({"group_size": 48}, ValueError, "64 inputs, which group_size=48 does not divide"),
        ({"modules_in_block_to_quantize": [["mlp.fc"]]}, ValueError, "no linear layer 'mlp.fc'; it has self_attn"),
    ],
)
def test_bad_input_is_refused_before_any_work(options, error, message):
    model = make()
    before = logits(model)
    with pytest.raises(error, match=message):
        PGPTQQuantizer(**{**OPTIONS, **options}).quantize_model(model)
    assert torch.equal(logits(model), before)


def test_what_is_not_finite_names_its_layer():
    model = make()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(CannotFactor, match=r"model\.layers\.1\.mlp\.gate_proj .* weights that are not finite"):
        PGPTQQuantizer(**OPTIONS).quantize_model(model)
    model = make()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = torch.inf
    with pytest.raises(CannotFactor, match=r"model\.layers\.1\.mlp\.gate_proj: .* not finite"):
        PGPTQQuantizer(**OPTIONS).quantize_model(model)


def test_a_model_is_quantized_once_and_saved_as_it_was_quantized(tmp_path):
    model = make()
    quantizer = PGPTQQuantizer(**OPTIONS)
    quantizer.quantize_model(model)
    with pytest.raises(ValueError, match="was quantized by P-GPTQ"):
        PGPTQQuantizer(**OPTIONS).quantize_model(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj was changed after it was quantized"):
        quantizer.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_in_memory_is_not_quantized_anew_by_another_way(tmp_path):
    quantizer = PGPTQQuantizer.from_pretrained(make(), **OPTIONS)
    quantizer.quantize(tmp_path / "once")
    with pytest.raises(ValueError, match="was quantized by P-GPTQ"):
        quantizer.quantize(tmp_path / "twice")
    quantizer = PGPTQQuantizer(**OPTIONS)
    quantizer.quantize_model(make())
    with pytest.raises(ValueError, match="was quantized by P-GPTQ"):
        quantizer.quantize(tmp_path / "twice", resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def test_changes_beside_the_quantized_weights_are_saved_and_of_them_refused(tmp_path):
    """Training norms, or layers that were left out, after quantization is nobody's mistake."""
    model = make("qwen")
    quantizer = PGPTQQuantizer(**OPTIONS, modules_in_block_to_quantize=[["mlp.gate_proj", "mlp.up_proj"]])
    quantizer.quantize_model(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
        model.model.layers[1].input_layernorm.weight.mul_(3)
    quantizer.save(model, tmp_path / "changed")
    assert torch.equal(logits(load_gptq(tmp_path / "changed", torch.float32)), logits(model))

    model = make("qwen")
    quantizer = PGPTQQuantizer(**OPTIONS)
    quantizer.quantize_model(model)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.bias.add_(1)
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.v_proj was changed"):
        quantizer.save(model, tmp_path / "bias")


def test_a_cast_is_no_change(tmp_path):
    model = make("qwen").bfloat16()
    quantizer = PGPTQQuantizer(**OPTIONS)
    quantizer.quantize_model(model)
    quantizer.save(model.half(), tmp_path / "half")
    quantizer.save(model.float(), tmp_path / "float")
    half, single = (read_gptq(tmp_path / name) for name in ("half", "float"))
    assert all(torch.equal(half[name].codes, single[name].codes) for name in single)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="was changed after it was quantized"):
        quantizer.save(model, tmp_path / "changed")


def test_a_prefix_needs_keys_and_values():
    config = Lfm2Config(**{**SIZES, "layer_types": ["conv", "full_attention", "conv"]})
    with pytest.raises(ValueError, match="layers of kind conv, which have no keys and values"):
        PGPTQQuantizer(**OPTIONS, prefix_ids=[1]).quantize_model(AutoModelForCausalLM.from_config(config))


def test_every_blocks_widths_are_looked_at(tmp_path):
    model = make()
    model.model.layers[2].mlp.up_proj = nn.Linear(64, 100, bias=False)
    model.model.layers[2].mlp.gate_proj = nn.Linear(64, 100, bias=False)
    model.model.layers[2].mlp.down_proj = nn.Linear(100, 64, bias=False)
    before = logits(model)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.gate_proj has 64 inputs and 100 outputs"):
        PGPTQQuantizer(**OPTIONS).quantize_model(model)
    assert torch.equal(logits(model), before)


def test_an_adapter_is_not_taken_for_weights():
    model = get_peft_model(make(), LoraConfig(r=64, target_modules=["q_proj"]))
    for given in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"has adapters that are not merged"):
            PGPTQQuantizer(**OPTIONS).quantize_model(given)
        with pytest.raises(ValueError, match=r"has adapters that are not merged"):
            PGPTQQuantizer.from_pretrained(given, **OPTIONS)


def test_a_mixture_says_what_stays(tmp_path, monkeypatch):
    from transformers_minicpm4.quantization.p_gptq import quantizer as module

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)).eval()
    said = []
    monkeypatch.setattr(module.logger, "warning_once", said.append)
    quantizer = PGPTQQuantizer(**OPTIONS)
    quantizer.quantize_model(model)
    (line,) = (line for line in said if "stay as they are" in line)
    assert line.startswith("9 matrices within the blocks, such as model.layers.0.")  # router and two of the experts'
    quantizer.save(model, tmp_path / "int4")
    assert "and 9 matrices within the blocks" in (tmp_path / "int4" / "README.md").read_text()
    assert torch.equal(logits(load_gptq(tmp_path / "int4", torch.float32)), logits(model))


def test_a_prefix_in_front_of_sparse_attention(tmp_path):
    """MiniCPM4.1's config: blocks ask the cache for compressed keys, in calibration too."""
    sparse = InfLLMv2Config(dense_len=0, kernel_size=4, kernel_stride=2, block_size=4, topk=3, window_size=8)
    model = make("minicpm4", sparse_config=sparse)
    expected = PrefixCache.from_model(model, [5, 6])
    model.save_pretrained(tmp_path / "source")
    quantizer = PGPTQQuantizer.from_pretrained(tmp_path / "source", **OPTIONS, prefix_ids=[5, 6])
    quantizer.quantize(tmp_path / "int4")
    found = quantizer.prefix
    for got, want in zip(found.keys + found.values, expected.keys + expected.values, strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    in_memory = PGPTQQuantizer(**OPTIONS, prefix_ids=[5, 6])
    in_memory.quantize_model(model)
    read = load_gptq(tmp_path / "int4", torch.float32)
    assert torch.equal(logits(read), logits(model))
    ids, mask = found.prepend(ROWS[0][None])
    with torch.no_grad():
        given = read(ids[:, 2:], attention_mask=mask, past_key_values=found.to_cache(read)).logits
        computed = read(ids).logits[:, 2:]
    assert not torch.equal(given, computed)  # full precision's keys and values, not its own
    assert (given - computed).norm() < 0.5 * computed.norm()


def test_foreign_models_and_arguments_are_refused(tmp_path):
    model = make()
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(ValueError, match="quantized already .quant_method 'awq'"):
        PGPTQQuantizer(**OPTIONS).quantize_model(model)
    with pytest.raises(ValueError, match="file_name"):
        PGPTQQuantizer.from_pretrained(make(), "model.onnx", **OPTIONS)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        PGPTQQuantizer.from_pretrained(make(), **OPTIONS).quantize(tmp_path / "there")
    with pytest.raises(ValueError, match="nothing was quantized"):
        PGPTQQuantizer(**OPTIONS).save(model, tmp_path / "new")
    mixed = [["self_attn.q_proj", "self_attn.o_proj"]]
    with pytest.raises(ValueError, match="do not read the same input"):
        PGPTQQuantizer(**OPTIONS, modules_in_block_to_quantize=mixed).quantize_model(make())


def test_a_resumed_run_never_mixes_two_models(tmp_path):
    """Same config, same embeddings, other layers: another model, in memory and from files."""
    other = make()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    PGPTQQuantizer(**OPTIONS).quantize_model(make(), work_dir=tmp_path / "work")
    with pytest.raises(ValueError, match="another unfinished run .it differs in weights"):
        PGPTQQuantizer(**OPTIONS).quantize_model(other, work_dir=tmp_path / "work")


def test_a_block_file_cut_short_is_solved_again(tmp_path):
    model = make()
    PGPTQQuantizer(**OPTIONS).quantize_model(model, work_dir=tmp_path)
    whole = (tmp_path / "block-00001.safetensors").read_bytes()
    (tmp_path / "block-00001.safetensors").write_bytes(whole[:100])
    again = make()
    PGPTQQuantizer(**OPTIONS).quantize_model(again, work_dir=tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_ids": [1]},  # the stored values would be those of the unscaled v_proj
        {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]},  # k and v read that norm too
    ],
)
def test_smoothing_leaves_alone_what_others_read(options):
    quantizer = PGPTQQuantizer(**OPTIONS, smoothing=True, **options)
    quantizer.quantize_model(make(num_key_value_heads=4))
    touched = {row["layer"].rpartition(".")[2] for row in quantizer.report if row["alpha"] is not None}
    assert touched.isdisjoint({"o_proj"} if "prefix_ids" in options else {"q_proj"})


def test_smoothing_undoes_what_a_foreign_norm_does_not_take():
    """Gemma's norms multiply by 1 + weight: a factor folded into the weight is no factor of the output."""
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**{**SIZES, "head_dim": 16, "num_key_value_heads": 4})).eval()
    norms = [parameter for name, parameter in model.named_parameters() if "layernorm" in name]
    for weight in norms:
        nn.init.normal_(weight, std=0.3)
    before = [weight.clone() for weight in norms]
    quantizer = PGPTQQuantizer(**OPTIONS, smoothing=True)
    quantizer.quantize_model(model)
    assert all(map(torch.equal, norms, before))
    assert all(row["alpha"] in (None, 0.0) for row in quantizer.report if row["layer"].endswith(("q_proj", "up_proj")))


@pytest.mark.parametrize("kind", [Olmo2Config, Gemma2Config])
def test_smoothing_leaves_norms_alone_that_stand_behind_layers(kind):
    """Their `post_attention_layernorm` feeds the residual: a factor in it would be undone nowhere."""
    torch.manual_seed(0)
    options = {"head_dim": 16} if kind is Gemma2Config else {}
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, "num_key_value_heads": 4}, **options)).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e-4)  # in block 0 the norm's output is nearly all of the residual
    norms = {name: weight for name, weight in model.named_parameters() if "post_attention_layernorm" in name}
    before = {name: weight.clone() for name, weight in norms.items()}
    quantizer = PGPTQQuantizer(**OPTIONS, smoothing=True)
    quantizer.quantize_model(model)
    assert len(before) == 3
    assert all(torch.equal(norms[name], before[name]) for name in norms)


def test_copies_of_a_config_choose_their_defaults_anew():
    assert PGPTQConfig().method == "GPTQ"
    assert PGPTQQuantizer(PGPTQConfig(), prefix_ids=[1]).config.method == "P-GPTQ"
    assert PGPTQConfig.minicpm4(prefix_ids=None).method == "GPTQ"
    assert PGPTQConfig(skip_first=2, prefix_weight=0.0).changed(prefix_ids=[1]).skip_first == 2


def test_dropout_is_off_while_calibrating(tmp_path):
    quantized = []
    for training in (False, True):
        model = make(attention_dropout=0.5).train(training)
        PGPTQQuantizer.from_pretrained(model, **OPTIONS).quantize(tmp_path / str(training))
        assert model.training == training
        quantized.append((tmp_path / str(training) / "model.safetensors").read_bytes())
    assert quantized[0] == quantized[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5 was given; it is 2, 3, 4 or 8"),
        ({"prefix_weight": 1.5}, "prefix_weight=1.5"),
        ({"desc_act": True, "act_group_aware": True}, "set one of them"),
        ({"sym": False}, "gptq_v2"),
        ({"prefix_ids": []}, "prefix_ids is empty"),
        ({"prefix_ids": 1}, "prefix_ids=1 was given; it is a list"),
        ({"modules_in_block_to_quantize": ["mlp.down_proj"]}, "a list of lists"),
        ({"group_size": 0}, "group_size=0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PGPTQConfig(**options)


def test_the_presets_files_suit_the_marlin_converter():
    config = PGPTQConfig.minicpm4(dataset=ROWS)
    assert (config.bits, config.group_size, config.sym, config.desc_act) == (4, 128, True, False)
    assert (config.method, config.skip_first) == ("P-GPTQ", 4)
    assert PGPTQConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert "dataset" not in config.to_dict()


def test_time_is_not_lost_on_what_is_there(tmp_path):
    """A finished work folder only runs the blocks forward: no layer is solved again."""
    model = make()
    PGPTQQuantizer(**OPTIONS).quantize_model(model, work_dir=tmp_path)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    time.sleep(0.01)
    again = make()
    PGPTQQuantizer(**OPTIONS).quantize_model(again, work_dir=tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert torch.equal(logits(again), logits(model))
