"""From a folder to an engine: the tokens of the same checkpoint in `generate`, in no more memory than was planned."""

import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import SPARSE, make_config
from transformers_minicpm4 import BitCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.edge import loading
from transformers_minicpm4.edge.device_profile import DeviceProfile
from transformers_minicpm4.edge.engine import EdgeEngine
from transformers_minicpm4.edge.memory_plan import DoesNotFit
from transformers_minicpm4.generation.drafts import PromptLookupDraft
from transformers_minicpm4.model.prefix_cache import PrefixCache
from transformers_minicpm4.quantization.bitcpm4.quantizer import round_to_ternary, save_packed
from transformers_minicpm4.quantization.export.gptq import load_gptq, save_gptq
from transformers_minicpm4.quantization.quantized_weight import QuantizedWeight


LLAMA = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "eos_token_id": 127,
    "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
PROMPT = torch.randint(3, 100, (1, 40), generator=torch.Generator().manual_seed(0))
# Above what Python and PyTorch are planned with.
PLENTY = 10**10


def machine(available=PLENTY, **changes):
    fields = {"name": "box", "kind": "cpu", "memory_total": 10**15, "unified": True, "bandwidth": 1e11}
    return DeviceProfile(**{**fields, "memory_available": int(available), **changes})


def words():
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(128)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0", eos_token="127", pad_token="0")


def int4(model):
    """All linear layers of the blocks, rounded to nearest."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            weight = module.weight.detach()
            groups = weight.reshape(len(weight), -1, 32)
            scales = (groups.abs().amax(-1) / 7.6).half().float()
            codes = ((groups / scales[..., None]).round() + 8).clamp(0, 15).to(torch.uint8).view_as(weight)
            zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
            found[name] = QuantizedWeight(codes, scales, zeros, 4, 32, True)
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    sparse = MiniCPM4ForCausalLM(make_config(sparse_config=SPARSE.to_dict()))
    sparse.save_pretrained(folder / "sparse")
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    llama.save_pretrained(folder / "plain")
    save_gptq(folder / "int4", llama, int4(llama))
    save_packed(round_to_ternary(llama, BitCPM4Config(group_size=64)), folder / "ternary")
    for name in ("plain", "sparse", "int4", "ternary"):
        words().save_pretrained(folder / name)
    return folder


def load(folder, **options):
    return EdgeEngine.from_pretrained(
        str(folder), **{"context": 150, "profile": machine(), "compile": False, **options}
    )


def answer(model):
    return model.generate(PROMPT.to(model.device), max_new_tokens=30, do_sample=False)[0, 40:].tolist()


@pytest.mark.parametrize(
    "name, precision", [("plain", "fp32"), ("sparse", "fp32"), ("ternary", "ternary"), ("int4", "fp32")]
)
def test_a_checkpoint_says_what_it_says_in_generate(checkpoints, name, precision):
    engine = load(checkpoints / name)
    assert engine.plan.precision == precision
    if name == "int4":
        alone = load_gptq(checkpoints / name, torch.float32)
    else:
        alone = AutoModelForCausalLM.from_pretrained(checkpoints / name, dtype=engine.model.dtype)
    got = engine.generate(PROMPT, max_new_tokens=30)
    if engine.model.dtype == torch.float32:
        assert got.token_ids == answer(alone)
    assert got.token_ids == answer(engine.model)
    assert got.text == engine.tokenizer.decode(got.token_ids, skip_special_tokens=True)
    assert engine.model.config._attn_implementation == ("infllm_v2" if name == "sparse" else "sdpa")
    other = load(checkpoints / name, attn_implementation="eager")
    assert other.model.config._attn_implementation == "eager"
    assert not other.plan.sparse


@pytest.mark.parametrize("name", ["plain", "sparse", "ternary"])
@pytest.mark.parametrize("draft", [None, PromptLookupDraft()])
def test_the_memory_is_what_was_planned(checkpoints, name, draft):
    for context in (1, 100, 150):
        engine = load(checkpoints / name, context=context, batch=2, draft=draft)
        assert sum(engine.plan.table["cache"].values()) == engine._runner.cache.nbytes()
        held = sum(tensor.nbytes for tensor in engine.model.parameters())
        assert engine.plan.weight_bytes >= held
        assert engine.context == engine.plan.context == context


def test_without_a_context_the_most_that_fits(checkpoints):
    assert load(checkpoints / "plain", context=None).context == 512
    plan = load(checkpoints / "plain").plan
    # Room for a few tokens more than these in 32 bits.
    little = load(checkpoints / "plain", context=None, profile=machine(plan.total_bytes / 0.9 + 10), precision="fp32")
    assert 150 <= little.context < 512
    assert little.plan.total_bytes <= little.plan.budget_bytes
    # 32 bits with a short context or 16 with a long one: the long one.
    assert load(checkpoints / "plain", context=None, profile=machine(plan.total_bytes / 0.9 + 10)).model.dtype == (
        torch.bfloat16
    )
    assert load(checkpoints / "plain").model.dtype == torch.float32
    # With less, 16 bits in the place of 32.
    assert load(checkpoints / "plain", profile=machine(plan.total_bytes / 0.9 - 10)).model.dtype == torch.bfloat16


def test_too_little_memory_says_how_much_is_missing(checkpoints):
    with pytest.raises(DoesNotFit) as refused:
        load(checkpoints / "plain", profile=machine(10**8))
    assert refused.value.missing_bytes > 0
    assert f"{refused.value.missing_bytes:,} bytes" in str(refused.value)
    enough = machine((10**8 * 0.9 + refused.value.missing_bytes) / 0.9 + 10)
    assert load(checkpoints / "plain", profile=enough).generate(PROMPT, max_new_tokens=2).token_ids


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("plain", {"precision": "int4"}, "fp32, bf16, fp16.*'int4'.*quantize it first"),
        ("ternary", {"precision": "bf16"}, "'bf16' was given for a quantized checkpoint"),
        ("plain", {"dtype": torch.float16}, "dtype was given.*precision"),
        ("plain", {"device_map": "cpu"}, "device_map was given"),
        ("plain", {"context": 0}, "context must be a whole number"),
        ("plain", {"attn_implementation": "infllm_v2"}, "llama_to_minicpm4"),
    ],
)
def test_what_cannot_be_loaded_is_refused(checkpoints, name, options, words):
    with pytest.raises(ValueError, match=words):
        load(checkpoints / name, **options)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_is_asked_for(checkpoints, precision):
    engine = load(checkpoints / "plain", precision=precision)
    assert engine.model.dtype == engine._runner.cache.layers[0].keys.dtype == loading.DTYPES[precision]
    assert len(engine.generate(PROMPT, max_new_tokens=5, min_new_tokens=5).token_ids) == 5


def test_a_prefix_comes_with_its_checkpoint(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "plain", tmp_path / "with")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    prefix = PrefixCache.from_model(model, [5, 6])
    prefix.keys[0] += 0.5
    prefix.save(tmp_path / "with")
    got = load(tmp_path / "with").generate(PROMPT, max_new_tokens=20).token_ids
    ids, mask = prefix.prepend(PROMPT)
    want = model.generate(
        ids, attention_mask=mask, past_key_values=prefix.to_cache(model), max_new_tokens=20, do_sample=False
    )
    assert got == want[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["plain", "int4"])
def test_a_checkpoint_of_the_hubs_cache(checkpoints, tmp_path, name):
    """Found by name and revision, without a network, with no prefix in it; and with one in another revision."""
    for number, revision in enumerate(("0" * 40, "1" * 40)):
        shutil.copytree(checkpoints / name, tmp_path / "models--me--tiny" / "snapshots" / revision)
        branch = tmp_path / "models--me--tiny" / "refs" / ("main", "other")[number]
        branch.parent.mkdir(exist_ok=True)
        branch.write_text(revision)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    PrefixCache.from_model(model, [5]).save(tmp_path / "models--me--tiny" / "snapshots" / ("1" * 40))
    engine = load("me/tiny", cache_dir=str(tmp_path))
    assert engine.prefix is None
    assert engine.generate(PROMPT, max_new_tokens=5).token_ids == answer(engine.model)[:5]
    assert load("me/tiny", cache_dir=str(tmp_path), revision="other").prefix.token_ids == [5]
