"""llama.cpp computes what PyTorch computes, from the file that is written here; and where it does not, it shows."""

import pytest
import torch

from transformers_minicpm4.edge.alignment import align
from transformers_minicpm4.edge.executors import CallNotOffered, open_executor
from transformers_minicpm4.edge.executors.gguf_executor import GGUFExecutor, export_gguf
from transformers_minicpm4.edge.trace import Trace


pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
pytest.importorskip("gguf", reason="gguf is not installed (extra `edge`)")

CONTEXT = 100


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """Path of a form of a checkpoint, written once."""
    folder = tmp_path_factory.mktemp("gguf")

    def path(name, kind):
        file = folder / f"{name}-{kind}.gguf"
        if not file.exists():
            export_gguf(checkpoints / name, file, kind)
        return file

    return path


def compare(checkpoint, file, token_ids, top=16):
    with open_executor(file, CONTEXT) as other:
        return align(open_executor(checkpoint, CONTEXT, dtype="float32"), other, token_ids, top)


# Largest difference in nats; measured 4.0e-6, 5.5e-6, 2.3e-6, 8.3e-3, 0.11, 6.2e-2, 6.2e-2. Of 16-bit and block types
# llama.cpp rounds the activations too.
@pytest.mark.parametrize(
    ("name", "kind", "largest", "agreement"),
    [
        ("plain", "f32", 2e-5, 1.0),
        ("short", "f32", 2e-5, 1.0),
        ("ternary", "f32", 2e-5, 1.0),
        ("plain", "f16", 3e-2, 0.9),
        ("plain", "q8_0", 0.4, 0.85),
        ("ternary", "tq2_0", 0.2, 0.9),
        ("ternary", "tq1_0", 0.2, 0.9),
    ],
)
def test_llama_cpp_agrees_with_torch(name, kind, largest, agreement, checkpoints, exported, token_ids):
    found = compare(checkpoints / name, exported(name, kind), token_ids)
    assert abs(found.slope - 1) < (1e-4 if kind == "f32" else 0.01), found.report()
    assert found.max_difference < largest, found.report()
    assert found.agreement >= agreement, found.report()
    assert found.candidates > 10 * found.tokens


def planted(file, copy, write):
    """A copy of a GGUF file, changed in place by `write(reader)`."""
    import gguf

    copy.write_bytes(file.read_bytes())
    reader = gguf.GGUFReader(copy, "r+")
    write(reader)
    reader.data.flush()
    return copy


def set_original(reader, tokens):
    for name in ("minicpm.context_length", "minicpm.rope.scaling.original_context_length"):
        reader.fields[name].parts[-1][0] = tokens


def test_a_wrong_logit_scale_shows_in_the_slope_alone(checkpoints, exported, token_ids, tmp_path):
    def halve(reader):
        reader.fields["minicpm.logit_scale"].parts[-1][0] /= 2

    found = compare(checkpoints / "plain", planted(exported("plain", "f32"), tmp_path / "x.gguf", halve), token_ids)
    # Logits are divided by the key: half of it doubles them.
    assert found.slope == pytest.approx(2, abs=1e-3)
    assert not found.within(0.01)
    assert found.agreement == 1
    assert found.divergence is None


def test_a_missing_scale_key_is_found_too(checkpoints, exported, token_ids, tmp_path):
    """llama.cpp then takes a scale of its own, which divides where it should multiply."""

    def rename(reader):
        part = reader.fields["minicpm.logit_scale"].parts[1]
        part[-1] = ord("x")

    file = planted(exported("plain", "f32"), tmp_path / "x.gguf", rename)
    found = compare(checkpoints / "plain", file, token_ids)
    # 256 / 256 in place of hidden_size 256 / dim_model_base 64 (the key's fallback knows a base of 256 alone).
    assert found.slope == pytest.approx(4, abs=1e-2), found.report()
    assert found.agreement == 1


def test_tokens_within_a_character_are_scored_as_the_others(exported, checkpoints):
    """llama.cpp's server says nothing of a token that ends within a character."""
    from transformers import AutoTokenizer

    token_ids = AutoTokenizer.from_pretrained(checkpoints / "plain")("the 日本 и th")["input_ids"]
    reference = open_executor(checkpoints / "plain", CONTEXT, dtype="float32").score(token_ids, 4)
    with open_executor(exported("plain", "f32"), CONTEXT) as made:
        got = made.score(token_ids, 4)
    assert (got.logprobs - reference.logprobs).abs().max() < 2e-5
    assert torch.equal(got.top_ids, reference.top_ids)
    assert (got.top_logprobs - reference.top_logprobs).abs().max() < 2e-5


def test_each_evaluation_is_in_the_timeline(exported):
    timeline = Trace()
    with open_executor(exported("plain", "f32"), CONTEXT, trace=timeline) as made:
        before = len(timeline.events)
        made.score([1, 2, 3, 4])
    *inside, whole = timeline.events[before:]
    assert (whole["name"], {span["name"] for span in inside}) == ("score", {"evaluate"})
    assert {span["args"]["position"] for span in inside} == {1, 2, 3}


def test_generate_gives_the_reference_tokens_and_stops(exported, checkpoints, token_ids):
    reference = open_executor(checkpoints / "plain", CONTEXT, dtype="float32")
    with open_executor(exported("plain", "f32"), CONTEXT) as made:
        answer = made.generate(token_ids, 20)
        assert answer == reference.generate(token_ids, 20)
        stop = next(token for token in answer[1:] if token != answer[0])
        assert made.generate(token_ids, 20, [stop]) == answer[: answer.index(stop) + 1]


def test_what_llama_cpp_offers_and_what_it_refuses(exported, checkpoints, tmp_path):
    with open_executor(exported("plain", "f32"), CONTEXT) as made:
        with pytest.raises(CallNotOffered, match="gguf does not offer prefill; it offers generate, score"):
            made.prefill([1])
        with pytest.raises(ValueError, match="101 tokens do not fit"):
            made.score([1] * 101)
        with pytest.raises(ValueError, match=r"knows 0 \.\. 259"):
            made.score([1, 260])
        assert made.score([1] * 100).logprobs.shape == (99,)  # a full context
    with pytest.raises(ValueError, match="there is no file"):
        GGUFExecutor(tmp_path / "none.gguf")
    (tmp_path / "x.gguf").write_bytes(exported("plain", "f32").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"x\.gguf"):
        GGUFExecutor(tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="not quantized, and tq2_0"):
        export_gguf(checkpoints / "plain", tmp_path / "y.gguf", "tq2_0")
    with pytest.raises(ValueError, match="type is one of"):
        export_gguf(checkpoints / "plain", tmp_path / "y.gguf", "q3")
    assert not (tmp_path / "y.gguf").exists()
    with pytest.raises(FileExistsError, match=r"x\.gguf is there already"):
        export_gguf(checkpoints / "plain", tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").stat().st_size == 5000
    with open_executor(exported("short", "f32"), 1000) as made:
        assert made.context == 256  # the model's
    odd = planted(exported("short", "f32"), tmp_path / "odd.gguf", lambda reader: set_original(reader, 300))
    with open_executor(odd, 1000) as made:
        assert made.context == 256
        assert made.score([1, 2, 3]).logprobs.shape == (2,)
    odd = planted(exported("short", "f32"), tmp_path / "odd.gguf", lambda reader: set_original(reader, 255))
    with pytest.raises(ValueError, match="below 255 tokens"):
        GGUFExecutor(odd)
    (tmp_path / "bare").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / file).write_bytes((checkpoints / "plain" / file).read_bytes())
    export_gguf(tmp_path / "bare", tmp_path / "bare.gguf")
    with pytest.raises(ValueError, match="has no tokenizer"):
        GGUFExecutor(tmp_path / "bare.gguf")
