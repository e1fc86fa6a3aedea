"""`minicpm4 generate` prints what the model says, by the attention that was asked for, and says what ran."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils.logging import warning_once

from transformers_minicpm4 import InfLLMv2Config, MiniCPM4ForCausalLM, PGPTQQuantizer
from transformers_minicpm4.cli.errors import UserError
from transformers_minicpm4.cli.generate import extend, load_minicpm4_config, room_for_answer
from transformers_minicpm4.model.prefix_cache import PrefixCache
from transformers_minicpm4.quantization.export.gptq import load_gptq


LONG = "three rivers and two lakes; the user asks and the assistant answers. " * 12
SPARSE = {**InfLLMv2Config().to_dict(), "topk": 2, "window_size": 0, "dense_len": 64}


def expected(folder, text, new_tokens=8, **changes):
    """The greedy answer, by the model itself."""
    model = MiniCPM4ForCausalLM.from_pretrained(folder, **changes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=new_tokens, eos_token_id=[2, tokenizer.eos_token_id], pad_token_id=2
    )
    start = inputs["input_ids"].shape[1]
    return tokenizer.decode(output[0, start:], skip_special_tokens=True) + "\n", start, output.shape[1] - start


@pytest.fixture
def generate(run_cli):
    def run(model, *options, stdin=None):
        result = run_cli("generate", model, "--max-new-tokens", "8", *options, stdin=stdin)
        assert result.code == 0, result.err
        return result

    return run


def test_a_raw_prompt_is_continued(generate, checkpoint):
    text, num_prompt_tokens, num_new_tokens = expected(checkpoint, "three rivers")
    result = generate(checkpoint, "--raw", "--prompt", "three rivers")
    assert result.out == text
    assert result.sentence.startswith(f"[prompt: {num_prompt_tokens} tokens, ")
    assert f"; answer: {num_new_tokens} tokens" in result.sentence


@pytest.mark.parametrize("options, opening", [([], ""), (["--chat", "--no-thinking"], "<think>\n\n</think>\n")])
def test_a_chat_prompt_is_a_user_turn_behind_the_start_token(generate, checkpoint, options, opening):
    rendered = f"<|im_start|>user\nthree rivers<|im_end|>\n<|im_start|>assistant\n{opening}"
    text, num_prompt_tokens, _ = expected(checkpoint, rendered)  # the tokenizer puts <s> in front
    result = generate(checkpoint, "--prompt", "three rivers", *options)
    assert result.out == text
    assert f"[prompt: {num_prompt_tokens} tokens" in result.sentence


@pytest.mark.parametrize("form", ["minicpm", "unnamed"])
def test_a_released_form_answers_as_ours(generate, make_checkpoint, as_released, checkpoint, form):
    ours = generate(checkpoint, "--prompt", "three").out
    assert generate(as_released(make_checkpoint(), form), "--prompt", "three").out == ours


def test_an_int4_checkpoint_answers_with_its_stored_prefix(generate, checkpoint, tmp_path):
    """Without gptqmodel, through the dense reader; the answer is the one that the prefix's keys and values give."""
    rows = [torch.randint(5, 200, (24,)) for _ in range(8)]
    options = {"dataset": rows, "num_samples": 8, "group_size": 32, "prefix_ids": [1]}
    folder = PGPTQQuantizer.from_pretrained(checkpoint, **options).quantize(tmp_path / "int4")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_gptq(folder)
    prefix = PrefixCache.load(folder)
    inputs = tokenizer("three rivers", return_tensors="pt")
    output = model.generate(
        **inputs, past_key_values=prefix.to_cache(model), do_sample=False, max_new_tokens=8,
        eos_token_id=[2, tokenizer.eos_token_id], pad_token_id=2,
    )  # fmt: skip
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    result = generate(folder, "--raw", "--prompt", "three rivers")
    assert result.out == expected + "\n"
    assert "unpacked into dense ones" in result.err


def test_every_source_of_the_prompt_gives_the_same(generate, checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("two lakes — 湖", encoding="utf-8")
    given = generate(checkpoint, "--prompt", "two lakes — 湖").out
    assert generate(checkpoint, "--prompt-file", tmp_path / "prompt.txt").out == given
    assert generate(checkpoint, stdin="two lakes — 湖".encode()).out == given


def test_attention_is_the_checkpoints_unless_told_otherwise(generate, make_checkpoint, checkpoint, caplog):
    sparse = make_checkpoint(sparse_config=SPARSE)
    text = ("--raw", "--prompt", LONG)
    assert "attention: infllm_v2, sparse from token 129 on" in generate(sparse, *text).sentence
    warning_once.cache_clear()
    dense = generate(sparse, *text, "--dense")
    assert "attention: dense (sdpa)" in dense.sentence
    assert "sparse_config" not in caplog.text  # that it is not used was asked for, so no warning
    assert "attention: dense" in generate(checkpoint, *text).sentence
    assert "shorter than dense_len (8,192 tokens)" in generate(checkpoint, *text, "--sparse").sentence
    everything = ("--topk", "64", "--dense-len", "-1")
    assert "fits in the 96 blocks of 64 tokens" in generate(checkpoint, *text, *everything).sentence


def test_sparse_and_dense_answer_as_the_model_does(generate, make_checkpoint):
    folder = make_checkpoint(sparse_config=SPARSE)
    sparse, dense = (expected(folder, LONG, attn_implementation=name)[0] for name in ("infllm_v2", "sdpa"))
    assert sparse != dense, "the prompt does not tell the two apart"
    assert generate(folder, "--raw", "--prompt", LONG).out == sparse
    assert generate(folder, "--raw", "--prompt", LONG, "--dense").out == dense
    # Enough blocks for the whole text: selection changes nothing.
    assert generate(folder, "--raw", "--prompt", LONG, "--topk", "64").out == dense


def test_overrides_make_a_dense_checkpoint_sparse(generate, checkpoint, make_checkpoint):
    options = ("--topk", "2", "--window-size", "0", "--dense-len", "64")
    result = generate(checkpoint, "--raw", "--prompt", LONG, *options)
    assert "sparse from token 129 on: a query reads at most 2 blocks of 64 tokens" in result.sentence
    assert result.out == expected(make_checkpoint(sparse_config=SPARSE), LONG)[0]


def test_sampling_repeats_with_its_seed_and_varies_with_another(generate, checkpoint):
    def sample(seed):
        return generate(checkpoint, "--prompt", "three", "--temperature", "3", "--top-p", "0.99", "--seed", seed).out

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_asked_for(generate, checkpoint, monkeypatch, dtype):
    seen = []
    plain = MiniCPM4ForCausalLM.generate

    def spy(self, *args, **kwargs):
        seen.append(self.dtype)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(MiniCPM4ForCausalLM, "generate", spy)
    generate(checkpoint, "--prompt", "three", "--dtype", dtype)
    generate(checkpoint, "--prompt", "three")
    assert seen == [getattr(torch, dtype), torch.float32]


@pytest.mark.parametrize("eos_token, num_new_tokens", [("<unk>", 1), ("<|im_end|>", 8)])
def test_the_answer_also_ends_at_the_tokenizers_end_token(generate, make_checkpoint, eos_token, num_new_tokens):
    folder = make_checkpoint(eos_token_id=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].zero_()  # all logits are equal, so greedy says token 0, which is <unk>, for ever
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = eos_token
    tokenizer.save_pretrained(folder)
    assert f"answer: {num_new_tokens} tokens" in generate(folder, "--prompt", "three").sentence


def test_an_answer_that_does_not_fit_is_cut_and_said_to_be(generate, make_checkpoint):
    folder = make_checkpoint(max_position_embeddings=32)
    prompt = "a" * 26  # 26 tokens and <s>
    result = generate(folder, "--raw", "--prompt", prompt)
    assert "cut to 5 tokens: the model has 32 positions" in result.err
    assert "answer: 5 tokens" in result.sentence


def refused(run_cli, *arguments, stdin=None):
    result = run_cli("generate", *arguments, stdin=stdin)
    assert (result.code, result.out) == (2, "")
    return result.sentence


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_an_empty_prompt(run_cli, checkpoint, tmp_path, prompt):
    (tmp_path / "prompt.txt").write_text(prompt)
    assert "empty (--prompt)" in refused(run_cli, checkpoint, "--prompt", prompt)
    assert "prompt.txt" in refused(run_cli, checkpoint, "--prompt-file", tmp_path / "prompt.txt")
    assert "standard input" in refused(run_cli, checkpoint, stdin=prompt.encode())


def test_no_prompt_at_a_terminal(run_cli, checkpoint):
    assert "--prompt-file FILE" in refused(run_cli, checkpoint)


def test_a_prompt_file_that_cannot_be_read(run_cli, checkpoint, tmp_path):
    assert "No such file" in refused(run_cli, checkpoint, "--prompt-file", tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("Flüsse".encode("latin-1"))
    assert "UTF-8" in refused(run_cli, checkpoint, "--prompt-file", tmp_path / "latin.txt")
    assert "UTF-8" in refused(run_cli, checkpoint, stdin="Flüsse".encode("latin-1"))


@pytest.mark.parametrize("length, fits", [(31, True), (32, False), (5000, False)])
def test_a_prompt_longer_than_the_positions(run_cli, make_checkpoint, length, fits):
    folder = make_checkpoint(max_position_embeddings=32)
    arguments = (folder, "--raw", "--prompt", "a" * (length - 1))
    if fits:
        assert run_cli("generate", *arguments).code == 0
        return
    sentence = refused(run_cli, *arguments)
    assert f"{length:,} tokens" in sentence
    assert "32 positions" in sentence
    assert "128K preset" in sentence


def test_the_published_extension_raises_the_limit(make_checkpoint, run_cli):
    factors = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32768}
    # The 8B's rotary embedding (head size 128) in a small model; only the limit is looked at.
    folder = make_checkpoint(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=32768,
        rope_parameters={**factors, "short_factor": [1.0] * 64, "long_factor": [1.0] * 64},
    )
    config = load_minicpm4_config(str(folder))
    with pytest.raises(UserError, match=r"40,000 tokens and the model has 32,768 positions.*128K preset"):
        room_for_answer(40_000, 8, config)
    extend(config)
    assert room_for_answer(40_000, 8, config) == 8
    assert room_for_answer(131_071, 8, config) == 1
    with pytest.raises(UserError, match="131,072 positions"):
        room_for_answer(131_072, 8, config)
    assert run_cli("generate", folder, "--prompt", "three", "--extend-context", "--max-new-tokens", "2").code == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (["--dense", "--topk", "2"], "--topk would do nothing"),
        (["--extend-context"], "published for MiniCPM4-8B"),
        (["--topk", "1"], "topk (1) must be at least init_blocks + 1"),
        (["--sparse", "--window-size", "-1"], "window_size must be 0 or more"),
        (["--greedy", "--temperature", "1"], "one or the other"),
        (["--device", "abacus"], "'abacus' cannot be used"),
        (["--temperature", "0"], "above 0"),
        (["--temperature", "nan"], "above 0"),
        (["--top-p", "1.5"], "up to 1"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--dense", "--sparse"], "not allowed with"),
        (["--dtype", "int8"], "bfloat16"),
    ],
)
def test_options_that_do_not_go(run_cli, checkpoint, options, words):
    assert words in refused(run_cli, checkpoint, "--prompt", "three", *options)


def test_chat_without_a_template(run_cli, make_checkpoint, generate):
    folder = make_checkpoint()
    (folder / "chat_template.jinja").unlink()
    assert "chat_template" in refused(run_cli, folder, "--chat", "--prompt", "three")
    assert generate(folder, "--prompt", "three").out == expected(folder, "three")[0]


def test_weights_that_lack_a_tensor(run_cli, make_checkpoint):
    folder = make_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sentence = refused(run_cli, folder, "--prompt", "three")
    assert "lack 1 of the tensors" in sentence
    assert "model.layers.1.self_attn.o_proj.weight" in sentence


def test_weights_of_another_size(run_cli, make_checkpoint, checkpoint):
    folder = make_checkpoint(intermediate_size=80)
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    sentence = refused(run_cli, folder, "--prompt", "three")
    assert "6 tensors" in sentence
    assert "stored [64, 80], asked [64, 96]" in sentence


def test_a_checkpoint_without_a_tokenizer(run_cli, make_checkpoint):
    folder = make_checkpoint()
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in refused(run_cli, folder, "--prompt", "three")
