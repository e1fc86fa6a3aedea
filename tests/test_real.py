"""Real weights on real text: SmolLM2-135M-Instruct as MiniCPM4."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_minicpm4 import InfLLMv2Config


pytestmark = pytest.mark.real

SPARSE = InfLLMv2Config(dense_len=512, topk=8, window_size=512)  # 16 blocks: 1,024 of up to 2,048 tokens


@pytest.fixture
def model(real_checkpoint):
    return AutoModelForCausalLM.from_pretrained(real_checkpoint, dtype=torch.float32, sparse_config=SPARSE).eval()


@pytest.fixture
def tokenizer(real_checkpoint):
    return AutoTokenizer.from_pretrained(real_checkpoint)


def test_it_speaks(model, tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_perplexity_dense_and_sparse_are_close(model, tokenizer, shared_data, record_property):
    """WikiText-2, 2,048 tokens, the last 512 scored: 16 of up to 32 blocks read."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(shared_data / "wikitext2" / "test.parquet"), split="train")
    ids = tokenizer("".join(rows["text"][:80]), return_tensors="pt")["input_ids"][:, :2048]
    assert ids.shape[1] == 2048
    loss = {}
    for name in ("sdpa", "infllm_v2"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits = model(ids, use_cache=False, logits_to_keep=513).logits[0, :-1]
        loss[name] = torch.nn.functional.cross_entropy(logits, ids[0, -512:]).item()
    assert loss["sdpa"] < 3.5  # a language model, not noise (ln 49152 = 10.8)
    assert loss["sdpa"] != loss["infllm_v2"]  # and it was sparse
    assert abs(loss["infllm_v2"] - loss["sdpa"]) < 0.05
    record_property("loss", loss)


def test_long_cached_generation_equals_no_cache(model, tokenizer):
    """The answer crosses dense_len; float32, so the last logits are compared too, not the tokens alone."""
    from pydoc_data.topics import topics

    ids = tokenizer(topics["assignment"], return_tensors="pt")["input_ids"][:, :505]
    with torch.no_grad():
        cached = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None)
        logits = model(cached, use_cache=False).logits[0]
    assert torch.equal(logits[504:-1].argmax(-1), cached[0, 505:])
