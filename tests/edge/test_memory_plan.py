"""Planned bytes equal those of real models, packed checkpoints and caches; the bounds are the spec's table."""

import itertools
import json
import random

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from conftest import SHARED, make_config
from small_models import make
from transformers_minicpm4 import BitCPM4Config, InfLLMv2Config, MiniCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.edge.device_profile import GB, DeviceProfile, device_profile
from transformers_minicpm4.edge.memory_plan import (
    DoesNotFit,
    DraftSpec,
    Packing,
    PlanError,
    activation_bytes,
    break_even,
    cache_bytes,
    draft_bytes,
    model_shape,
    plan_memory,
    step_bytes,
    tokens_per_second,
    weight_bytes,
)
from transformers_minicpm4.edge.runner import SlotRunner


SIZES = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama head_dim": LlamaConfig(**{**SIZES, "head_dim": 24}),
    "llama biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama without groups": LlamaConfig(**{**SIZES, "num_key_value_heads": None}),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "smollm3": SmolLM3Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "minicpm4": make_config(),
    "minicpm4 untied": make_config(tie_word_embeddings=False, head_dim=24),
}


def machine(available, bandwidth=1e11, **changes):
    fields = {"name": "box", "kind": "cpu", "memory_total": 10**15, "unified": True}
    return DeviceProfile(**{**fields, "memory_available": int(available), "bandwidth": bandwidth, **changes})


def tensor_bytes(folder):
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return total


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("dtype, name", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_a_real_model(family, dtype, name):
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype)
    table = weight_bytes(model_shape(model.config), Packing(name))
    assert sum(table.values()) == sum(parameter.nbytes for parameter in model.parameters())
    head = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight
    assert table["embeddings"] == model.get_input_embeddings().weight.nbytes
    assert table["head"] == (0 if is_tied else head.weight.nbytes)
    for part, word in (("norms", "norm"), ("mlp", ".mlp."), ("attention", ".self_attn.")):
        own = [p for n, p in model.named_parameters() if word in n and ("norm" in n) == (part == "norms")]
        assert table[part] == sum(parameter.nbytes for parameter in own), part
    assert table["other"] == 0


@pytest.mark.parametrize("tied, bias, head_dim, q_norm", list(itertools.product((0, 1), (0, 1), (16, 24), (0, 1))))
def test_parameters_by_the_formula(tied, bias, head_dim, q_norm):
    """The architecture's own arithmetic, written out: independent of how the planner counts."""
    kind = Qwen3Config if q_norm else LlamaConfig
    config = kind(**SIZES, head_dim=head_dim, attention_bias=bool(bias), tie_word_embeddings=bool(tied))
    h, m, v, layers, heads, groups = 64, 96, 120, 3, 4, 2
    attention = 2 * h * heads * head_dim + 2 * h * groups * head_dim
    attention += bias * ((heads + 2 * groups) * head_dim + h)
    norms = 2 * h + q_norm * 2 * head_dim
    assert model_shape(config).parameters == v * h * (2 - tied) + layers * (attention + 3 * h * m + norms) + h


@pytest.fixture(scope="module")
def config_8b():
    """MiniCPM4-8B as released, with the sparse attention of its successor."""
    file = SHARED / "specs" / "minicpm4_configs.json"
    if not file.is_file():
        pytest.skip("../shared/specs/minicpm4_configs.json is not beside this checkout")
    from transformers_minicpm4.model.conversion import modernize_config

    released = json.loads(file.read_text())["checkpoints"]["openbmb/MiniCPM4-8B"]["config"]
    config = MiniCPM4Config.from_dict(modernize_config(released))
    config.sparse_config = InfLLMv2Config()
    return config


def test_the_8b_model_has_its_published_size(config_8b):
    shape = model_shape(config_8b)
    assert shape.parameters == pytest.approx(8.185e9, rel=1e-4)
    layer = [linear for linear in shape.linears if ".layers.7." in linear.name]
    assert sum(linear.outputs * linear.inputs for linear in layer) == pytest.approx(237e6, rel=1e-3)
    assert plan_memory(config_8b, machine(1e12), precision="bf16").weight_bytes == 2 * shape.parameters


def random_gptq(linear, group_size):
    from transformers_minicpm4.quantization.quantized_weight import QuantizedWeight

    outputs, inputs = linear.weight.shape
    groups = -(-inputs // group_size)
    return QuantizedWeight(
        codes=torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8),
        scales=torch.ones(outputs, groups),
        zeros=torch.full((outputs, groups), 8, dtype=torch.uint8),
        bits=4,
        group_size=group_size,
    )


@pytest.mark.parametrize("kind, group_size", [("llama", 32), ("qwen", 32), ("minicpm4", 64), ("llama", 128)])
def test_int4_weights_are_those_of_an_exported_checkpoint(tmp_path, kind, group_size):
    from transformers_minicpm4.quantization.export.gptq import save_gptq

    model = make(kind).to(torch.bfloat16)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    save_gptq(tmp_path / "int4", model, {name: random_gptq(m, group_size) for name, m in linears.items()})
    planned = weight_bytes(model_shape(model.config), Packing("int4", "bf16", group_size))
    assert sum(planned.values()) == tensor_bytes(tmp_path / "int4")


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind, group_size", [("llama", 32), ("qwen", -1), ("minicpm4", 16)])
def test_ternary_weights_are_those_of_a_packed_checkpoint(tmp_path, kind, group_size, scale_dtype):
    from transformers_minicpm4.quantization.bitcpm4.quantizer import packed_sizes, round_to_ternary, save_packed

    model = make(kind).to(torch.bfloat16)
    config = BitCPM4Config(group_size, weight_format="packed", scale_dtype=scale_dtype)
    model = round_to_ternary(model, config)
    save_packed(model, tmp_path / "ternary")
    packing = Packing("ternary", "bf16", group_size, scale_bytes=4 if scale_dtype == "float32" else 2)
    planned = sum(weight_bytes(model_shape(model.config), packing).values())
    assert planned == tensor_bytes(tmp_path / "ternary")
    sizes = packed_sizes(model)
    assert planned == sizes["ternary"] + sizes["rest"]
    # And the checkpoint's own configuration leads there without being told.
    plan = plan_memory(model.config, machine(1e12))
    assert (plan.precision, plan.group_size, plan.weight_bytes) == ("ternary", group_size, planned)


def test_a_checkpoint_of_gptq_is_planned_as_it_is(tmp_path):
    from transformers import AutoConfig

    from transformers_minicpm4.quantization.export.gptq import save_gptq

    model = make("llama").to(torch.bfloat16)
    some = {n: random_gptq(m, 32) for n, m in model.named_modules() if n.endswith(("up_proj", "down_proj"))}
    save_gptq(tmp_path / "int4", model, some)
    config = AutoConfig.from_pretrained(tmp_path / "int4")
    plan = plan_memory(config, machine(1e12))
    assert (plan.precision, plan.group_size) == ("int4", 32)
    assert plan.weight_bytes == tensor_bytes(tmp_path / "int4")
    with pytest.raises(PlanError, match="stored as int4 in groups of 32.*'bf16'"):
        plan_memory(config, machine(1e12), precision="bf16")


def test_layers_that_fill_no_words_stay_as_they_are():
    config = LlamaConfig(**{**SIZES, "intermediate_size": 90})
    plan = plan_memory(config, machine(1e12), precision="int4")
    shape = model_shape(config)
    assert plan.table["weights"]["mlp"] == 2 * sum(l.outputs * l.inputs for l in shape.linears if l.part == "mlp")
    assert any("9 layers stay in bf16" in note for note in plan.notes)


# -------------------------------------------------------------------------------------------------------------- cache


SPARSE = InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=3, dense_len=-1)


@torch.no_grad()
def fill(config, calls, batch=1, dtype=torch.bfloat16):
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    cache = DynamicCache(config=model.config)
    for tokens in calls:
        model(torch.ones(batch, tokens, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    return cache


def held(cache):
    """Bytes of a cache of InfLLM v2, the room it keeps to grow included."""
    found = dict.fromkeys(("keys_and_values", "compressed_keys", "unrotated_keys"), 0)
    rows = {"keys": "keys_and_values", "values": "keys_and_values", "selection_keys": "unrotated_keys"}
    for layer in cache.layers:
        for name, stored in layer._stored.items():
            found[rows.get(name, "compressed_keys")] += 0 if stored.buffer is None else stored.buffer.nbytes
    return found


@pytest.mark.parametrize("use_nope", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 8, 31, 32, 150])
def test_a_sparse_cache_after_one_call(tokens, use_nope):
    config = make_config(sparse_config=SPARSE.to_dict() | {"use_nope": use_nope})
    assert cache_bytes(config, tokens, batch=2) == held(fill(config, [tokens], batch=2))


def test_a_sparse_cache_never_holds_more_however_it_was_filled():
    config = make_config(sparse_config=SPARSE.to_dict() | {"use_nope": True})
    generator = random.Random(0)
    touched = 0
    for last in (1, 1, 50, 50, 50, 150):  # growth ends on the last token, or left room before it
        calls = [generator.randint(1, 90) for _ in range(generator.randint(0, 3))] + [last]
        measured, planned = held(fill(config, calls)), cache_bytes(config, sum(calls))
        assert all(measured[name] <= planned[name] for name in planned), calls
        touched += any(measured[name] == planned[name] for name in planned)
    assert touched  # the bound is reached


@pytest.mark.parametrize("tokens", [1, 64, 150, 1000])
@pytest.mark.parametrize(
    "changes",
    [None, {}, {"use_nope": True}, {"block_size": 24, "kernel_size": 24, "kernel_stride": 12, "window_size": 48},
     {"block_size": 128, "window_size": 128}],
)  # fmt: skip
def test_a_static_cache_is_that_of_an_engine(changes, tokens):
    config = make_config(sparse_config=None if changes is None else SPARSE.to_dict() | changes)
    model = MiniCPM4ForCausalLM._from_config(config, attn_implementation="sdpa" if changes is None else "infllm_v2")
    cache = SlotRunner(model, tokens, batch=2).cache
    planned = cache_bytes(config, tokens, batch=2, dtype_bytes=4, cache="static")
    assert planned["keys_and_values"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert sum(planned.values()) == cache.nbytes()


def test_a_static_cache_has_no_room_to_grow():
    config = make_config(sparse_config=SPARSE.to_dict())
    layer = 2 * 2 * 16 * 2  # heads, size, bytes, twice
    assert cache_bytes(config, 150, cache="static") == {
        "keys_and_values": 3 * 192 * layer,  # whole blocks, in multiples of 64
        "compressed_keys": 3 * (192 // 4 + 18 + 192 // 16 + 6) * layer // 2,  # and entries for steps near the end
        "unrotated_keys": 0,
    }


@pytest.mark.parametrize("family", ["llama head_dim", "llama without groups", "qwen2", "qwen3", "minicpm4"])
def test_a_dense_cache(family):
    cache = fill(FAMILIES[family], [33, 4], batch=2)
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(FAMILIES[family], 37, batch=2)["keys_and_values"] == measured


@pytest.mark.parametrize("calls", [[10], [40], [40, 40, 40], [30, 1, 1]])
def test_a_sliding_window_holds_the_last_call_beside_it(calls):
    config = MistralConfig(**SIZES, head_dim=16, sliding_window=16)
    cache = fill(config, calls)
    measured = sum(layer.keys.untyped_storage().nbytes() * 2 for layer in cache.layers)
    planned = cache_bytes(config, sum(calls), chunk=max(calls))["keys_and_values"]
    assert measured <= planned
    if len(set(calls)) == 1:
        assert measured == planned


# -------------------------------------------------------------------------------------------------------- activations


def peak_bytes(run):
    """The most that was allocated at once during a call, as the allocator reports it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as report:
        run()
    held = highest = 0
    for event in report.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "mode, chunk, tokens, batch",
    [("dense", 512, 512, 1), ("dense", 256, 1024, 1), ("sparse", 512, 512, 1), ("sparse", 256, 2048, 1),
     ("sparse", 64, 1536, 2), ("late", 256, 1024, 1), ("picked", 256, 3072, 1)],
)  # fmt: skip
def test_a_prefill_allocates_no_more_than_planned(mode, chunk, tokens, batch, dtype):
    settings = InfLLMv2Config(topk=8, window_size=256, dense_len={"late": 4096, "picked": -1}.get(mode, 512))
    sizes = {"num_attention_heads": 8, "intermediate_size": 768}
    if mode == "picked":  # sixteen query heads on one key head, and a small MLP: attention is what needs most
        sizes = {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 256}
    config = make_config(
        vocab_size=1024,
        hidden_size=256,
        num_hidden_layers=2,
        max_position_embeddings=4096,
        sparse_config=None if mode == "dense" else settings,
        **sizes,
    )
    model = MiniCPM4ForCausalLM(config).to(dtype).eval()
    ids = torch.ones(batch, chunk, dtype=torch.long)

    @torch.inference_mode()
    def prefill():
        cache = DynamicCache(config=model.config)
        for _ in range(tokens // chunk):
            model(ids, past_key_values=cache, logits_to_keep=1)

    shared = {"batch": batch, "dtype_bytes": dtype.itemsize}
    planned = activation_bytes(config, chunk, tokens, **shared)
    needed = sum(planned.values()) + sum(cache_bytes(config, tokens, chunk=chunk, **shared).values())
    measured = peak_bytes(prefill)
    assert measured <= needed <= 1.5 * measured, needed / measured


@pytest.mark.real
@pytest.mark.parametrize("attention", ["sdpa", "infllm_v2"])
def test_smollm2_needs_what_was_planned(real_checkpoint, attention):
    model = AutoModelForCausalLM.from_pretrained(
        real_checkpoint, dtype=torch.bfloat16, attn_implementation=attention
    ).eval()
    torch.set_num_threads(1)
    tokens, chunk = 1024, 256
    ids = torch.randint(0, 40000, (1, tokens))

    @torch.inference_mode()
    def prefill():
        cache = DynamicCache(config=model.config)
        for start in range(0, tokens, chunk):
            model(ids[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)

    options = {"context": tokens, "chunk": chunk, "precision": "bf16", "sparse": attention != "sdpa"}
    plan = plan_memory(model.config, machine(1e12), runtime_bytes=0, **options)
    assert plan.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    measured = plan.weight_bytes + peak_bytes(prefill)
    assert measured <= plan.total_bytes <= 1.15 * measured, plan.total_bytes / measured


# ----------------------------------------------------------------------------------------------------------- roofline


# Section 7 of the project's inference spec: tokens a second at batch 1; the ternary column has no scales of groups.
TABLE = {
    "orin-nano": (6.4, 22, 11.6, 21, 35),
    "agx-orin": (12.9, 44, 23, 42, 71),
    "thor": (17.2, 59, 31, 56, 94),
    "rtx-4090": (63, 217, 114, 208, 348),
    "h200": (302, 1032, 545, 989, 1658),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_specs_table(name, config_8b):
    shape, bandwidth = model_shape(config_8b), device_profile(name).bandwidth
    columns = [
        (Packing("fp16"), 4096, True),
        (Packing("int4"), 4096, True),
        (Packing("int4"), 131072, False),
        (Packing("int4"), 131072, True),
        (Packing("ternary", group_size=-1), 131072, True),
    ]
    for expected, (packing, tokens, sparse) in zip(TABLE[name], columns):
        read = step_bytes(shape, config_8b, packing, tokens, sparse=sparse)
        assert tokens_per_second(read, bandwidth) == pytest.approx(expected, rel=0.03), packing
    in_groups = step_bytes(shape, config_8b, Packing("ternary"), 131072)  # BitCPM4's 64: 2.25 bits a weight
    assert tokens_per_second(in_groups, bandwidth) == pytest.approx(0.93 * TABLE[name][-1], rel=0.03)


def test_what_a_step_reads_by_the_formula(config_8b):
    shape = model_shape(config_8b)
    kilobytes = 2 * 32 * 2 * 128 * 2  # keys and values of a token: 32 KiB
    assert step_bytes(shape, config_8b, Packing("bf16"), 4096)["cache"] == 4096 * kilobytes
    assert step_bytes(shape, config_8b, Packing("bf16"), 131072, sparse=False)["cache"] == 131072 * kilobytes
    blocks, fine, coarse = 96 * 64 * kilobytes, (131072 - 32) // 16 + 1, (131072 - 128) // 64 + 1
    assert step_bytes(shape, config_8b, Packing("bf16"), 131072)["cache"] == blocks + (fine + coarse) * kilobytes // 2
    # Everything but the embedding table is read; a tied one is, as the head.
    read = step_bytes(shape, config_8b, Packing("bf16"), 1)["weights"]
    assert read == 2 * (shape.parameters - config_8b.vocab_size * config_8b.hidden_size)
    tied = FAMILIES["llama tied"]
    assert step_bytes(model_shape(tied), tied, Packing("bf16"), 1)["weights"] == 2 * model_shape(tied).parameters


def test_rows_of_a_batch_share_the_weights(config_8b):
    shape = model_shape(config_8b)
    one, four = (step_bytes(shape, config_8b, Packing("int4"), 4096, batch=batch) for batch in (1, 4))
    assert four == {"weights": one["weights"], "cache": 4 * one["cache"]}
    assert tokens_per_second(four, 1e9, batch=4) == pytest.approx(4e9 / (one["weights"] + 4 * one["cache"]))


# -------------------------------------------------------------------------------------------------------------- draft


def eagle_modules(config, kind, vocabulary):
    """The tensors that CPM.cu loads for a head, as modules (../shared/specs/inference.md 2.1 and 2.2)."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    read, fused = (2 * hidden, 3 * hidden) if kind == "eagle3" else (hidden, 2 * hidden)
    linears = [
        nn.Linear(fused, hidden, bias=False),
        nn.Linear(read, heads * size, bias=False),
        nn.Linear(read, groups * size, bias=False),
        nn.Linear(read, groups * size, bias=False),
        nn.Linear(heads * size, hidden, bias=False),
        nn.Linear(hidden, inner, bias=False),
        nn.Linear(hidden, inner, bias=False),
        nn.Linear(inner, hidden, bias=False),
    ]
    norms = [nn.RMSNorm(hidden) for _ in range(4)]
    head = nn.Linear(hidden, vocabulary, bias=False)
    return nn.ModuleList(linears + norms), head


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_heads_weights_are_those_of_its_tensors(kind):
    config = make_config()
    body, head = eagle_modules(config, kind, 32)
    counted = draft_bytes(config, DraftSpec(kind=kind, vocabulary=32, window=100, tree_size=8), Packing("fp32"), 2)
    of_body = sum(parameter.nbytes for parameter in body.parameters())
    assert counted.weights == of_body + head.weight.nbytes + 32 * torch.int64.itemsize
    assert counted.per_step == of_body + head.weight.nbytes
    assert counted.cache == torch.empty(2, 2, 2, 108, 16).nbytes  # keys and values, rows, heads, slots, size


def test_a_shared_head_is_read_and_not_kept():
    config = make_config()
    body, head = eagle_modules(config, "eagle", config.vocab_size)
    counted = draft_bytes(config, DraftSpec(vocabulary=None), Packing("fp32"))
    assert counted.weights == sum(parameter.nbytes for parameter in body.parameters())
    assert counted.per_step == counted.weights + head.weight.nbytes
    assert draft_bytes(config, DraftSpec(vocabulary=10**6), Packing("fp32")) == counted


def test_the_specs_draft_costs(config_8b):
    """140 MB and 268 MB of 4.5 GB: 9 %, 25 % for a head in FP16; 2.5 accepted tokens give 2.1, 1.66 and 2.28 times."""
    shape = model_shape(config_8b)
    read = {"weights": step_bytes(shape, config_8b, Packing("int4"), 1)["weights"]}
    bounds = []
    for spec in (DraftSpec(), DraftSpec(vocabulary=None, precision="bf16"), DraftSpec(quantize_head=True)):
        draft = draft_bytes(config_8b, spec, Packing("int4"))
        bounds.append(2.5 / break_even(read, draft, 2))
    assert bounds == pytest.approx([2.1, 1.66, 2.28], rel=0.015)


def test_a_draft_is_part_of_the_plan(config_8b):
    profile = device_profile("orin-nx")
    plain = plan_memory(config_8b, profile, context=8000, precision="int4")
    drafted = plan_memory(config_8b, profile, context=8000, precision="int4", draft="eagle")
    assert drafted.table["draft"]["weights"] == pytest.approx(140e6 + 268e6, rel=0.01)
    assert drafted.table["cache"]["keys_and_values"] > plain.table["cache"]["keys_and_values"]  # the tree's nodes
    assert drafted.table["activations"]["logits"] == 12 * plain.table["activations"]["logits"]
    assert drafted.roofline == plain.roofline
    assert (plain.break_even, drafted.break_even > 1.1) == (None, True)
    assert plan_memory(config_8b, profile, context=8000, draft="lookup").table["draft"] == {"weights": 0, "cache": 0}


# --------------------------------------------------------------------------------------------------------------- plan


def total(plan):
    return sum(count for section in plan.table.values() for count in section.values())


@pytest.mark.parametrize("seed", range(6))
def test_the_chosen_context_fits_and_one_more_token_does_not(seed):
    generator = random.Random(seed)
    config = make_config(
        num_key_value_heads=generator.choice((1, 2, 4)),
        max_position_embeddings=10**6,
        sparse_config=generator.choice((None, SPARSE)),
    )
    options = {
        "batch": generator.choice((1, 3)),
        "chunk": generator.choice((16, 256)),
        "precision": generator.choice(("bf16", "int4")),
        "draft": generator.choice((None, "eagle", "lookup")),
        "runtime_bytes": 1000,
        "cache": generator.choice(("dynamic", "static")),
    }
    profile = machine(generator.randint(4_000_000, 40_000_000))
    plan = plan_memory(config, profile, **options)
    assert total(plan) == plan.total_bytes <= plan.budget_bytes == int(0.9 * profile.memory_available)
    assert plan_memory(config, profile, context=plan.context, **options) == plan
    with pytest.raises(DoesNotFit) as refused:
        plan_memory(config, profile, context=plan.context + 1, **options)
    assert refused.value.missing_bytes > 0
    assert refused.value.fits[plan.precision] == plan.context


def test_more_memory_never_plans_less(config_8b):
    contexts = [
        plan_memory(config_8b, machine(gigabytes * GB), precision="int4", context_limit=131072).context
        for gigabytes in (7, 7.5, 8, 10, 12, 16)
    ]
    assert contexts == sorted(contexts)
    assert contexts[0] < contexts[-1] == 131072


def test_the_missing_bytes_are_what_is_missing(config_8b):
    profile = machine(8 * GB)
    with pytest.raises(DoesNotFit) as refused:
        plan_memory(config_8b, profile, context=100_000, precision="int4")
    error = refused.value
    assert f"{error.missing_bytes:,} bytes) are missing" in str(error)
    # Exactly these, scaled by the share that may be used, and not one less.
    enough = -(-error.needed_bytes * 10 // 9)
    assert plan_memory(config_8b, machine(enough + 1), context=100_000, precision="int4").context == 100_000
    with pytest.raises(DoesNotFit):
        plan_memory(config_8b, machine(enough - 2), context=100_000, precision="int4")
    # What it says would fit does fit, and no more.
    for precision, tokens in error.fits.items():
        assert f"{tokens:,} tokens with {precision}" in str(error)
        assert plan_memory(config_8b, profile, context=tokens, precision=precision).context == tokens
    assert set(error.fits) == {"int4", "ternary"}


def test_nothing_fits(config_8b):
    with pytest.raises(DoesNotFit, match="No precision leaves room") as refused:
        plan_memory(config_8b, machine(1 * GB))
    assert refused.value.fits == {}


@pytest.mark.parametrize(
    "gigabytes, context, expected",
    [(64, None, "bf16"), (16, None, "int4"), (6.6, None, "int4"), (5.5, None, "ternary"), (64, 131072, "bf16"),
     (16, 32768, "int4"), (7, 32768, "ternary")],
)  # fmt: skip
def test_the_choice_of_precision(config_8b, gigabytes, context, expected):
    plan = plan_memory(config_8b, machine(gigabytes * GB), context=context, context_limit=131072)
    assert plan.precision == expected
    assert any("trained so" in note for note in plan.notes) == (expected == "ternary")


def test_gpus_before_capability_8_compute_in_float16(config_8b):
    old = machine(100 * GB, kind="cuda", compute_capability=(7, 5), unified=False)
    assert plan_memory(config_8b, old).precision == "fp16"
    assert plan_memory(config_8b, old, precision="int4").dtype == "fp16"


def test_a_ternary_group_that_does_not_divide_is_no_candidate():
    config = LlamaConfig(**SIZES)  # 96 inputs are not groups of 64
    plan = plan_memory(config, machine(1e10))
    assert any("ternary was not considered" in note for note in plan.notes)
    with pytest.raises(PlanError, match="down_proj has 96 inputs.*64"):
        plan_memory(config, machine(1e10), precision="ternary")
    assert plan_memory(config, machine(1e10), precision="ternary", group_size=32).group_size == 32


def test_an_engines_own_workspace_takes_the_place_of_the_formula():
    plan = plan_memory(make_config(), machine(1e10), workspace_bytes=12345)
    assert plan.table["activations"]["prefill_chunk"] == 12345


def test_without_bandwidth_there_is_no_speed():
    plan = plan_memory(make_config(), machine(1e10, bandwidth=None))
    assert plan.roofline == {}
    assert any("no bandwidth" in note for note in plan.notes)


def test_beyond_the_models_context_it_says_so():
    plan = plan_memory(make_config(), machine(1e10), context=600)
    assert any("600 tokens are beyond the 512" in note for note in plan.notes)
    assert plan_memory(make_config(), machine(1e10)).context == 512


def test_a_configuration_is_left_as_it_was():
    config = make_config(sparse_config=SPARSE)
    before = config.to_dict()
    plan_memory(config, machine(1e10))
    assert config.to_dict() == before


def test_a_plan_is_plain_values(config_8b):
    plan = plan_memory(config_8b, device_profile("thor"), draft="eagle")
    read = json.loads(json.dumps(plan.to_dict()))
    assert read["total_bytes"] == total(plan)
    assert read["table"] == plan.table
    assert read["draft"]["kind"] == "eagle"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"context": 0}, "context must be a whole number of 1 or more, got 0"),
        ({"batch": 1.5}, "batch must be a whole number"),
        ({"chunk": True}, "chunk must be"),
        ({"precision": "int3"}, "bf16.*int4, ternary.*'int3'"),
        ({"precision": "int4", "group_size": 0}, "group_size is 1 or more inputs, or -1.*got 0"),
        ({"group_size": 64}, "without a precision"),
        ({"draft": "medusa"}, "eagle, eagle3, lookup.*'medusa'"),
        ({"cache": "paged"}, "'dynamic' or 'static', got 'paged'"),
        ({"memory_share": 1.5}, "above 0 and not above 1, got 1.5"),
    ],
)
def test_arguments_that_cannot_be_planned(options, words):
    with pytest.raises(PlanError, match=words):
        plan_memory(make_config(), machine(1e10), **options)


@pytest.mark.parametrize(
    "options, words",
    [({"tree_size": 65}, "2 to 64.*65"), ({"window": 0}, "window"), ({"vocabulary": 0}, "None for all")],
)
def test_drafts_that_cannot_be_planned(options, words):
    with pytest.raises(PlanError, match=words):
        DraftSpec(**options)


def test_sparse_attention_is_refused_where_the_cache_has_none():
    with pytest.raises(PlanError, match="llama_to_minicpm4"):
        plan_memory(FAMILIES["llama"], machine(1e10), sparse=True)
    assert not plan_memory(make_config(sparse_config=SPARSE), machine(1e10), sparse=False).sparse


def test_models_of_another_kind_are_refused():
    from transformers import BertConfig, DeepseekV3Config, GPT2Config, MixtralConfig, T5Config

    for config, words in (
        (MixtralConfig(**SIZES), "mixture of 8 experts"),
        (DeepseekV3Config(), "experts|latent"),
        (GPT2Config(), "gpt2"),
        (T5Config(), "t5"),
        (BertConfig(), "bert"),
    ):
        with pytest.raises(PlanError, match=words):
            plan_memory(config, machine(1e12))


def test_other_quantizations_are_refused():
    config = make_config()
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(PlanError, match="'awq'.*GPTQ of 4 bits and BitCPM4"):
        plan_memory(config, machine(1e10))
