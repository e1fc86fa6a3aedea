"""GGUF files, read back with the `gguf` package and with Transformers' own GGUF loader."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast, Qwen2Config

from transformers_minicpm4.quantization.export.gguf import gptq_to_gguf, save_gguf
from transformers_minicpm4.quantization.export.gguf_blocks import LossyExport, gguf_blocks
from transformers_minicpm4.quantization.export.gptq import save_gptq
from transformers_minicpm4.quantization.export.ternary_gptq import ternary_weight
from transformers_minicpm4.quantization.quantized_weight import QuantizedWeight


LICENSE = Path(__file__).resolve().parents[3] / "LICENSE"
gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (extra `edge`)")


def dequantize(kind: str, blocks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))


def read(path):
    """(fields, tensors as float32 by name, types by name) as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
    }
    return fields, tensors, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def ternary(outputs=32, inputs=512, group_size=64) -> QuantizedWeight:
    codes = torch.randint(-1, 2, (outputs, inputs), dtype=torch.int8)
    return ternary_weight(codes, (torch.rand(outputs, inputs // group_size) + 0.1).half(), group_size)


def int4(zeros=8, inputs=512, group_size=32, bits=4) -> QuantizedWeight:
    shape = (32, inputs // group_size)
    codes = torch.randint(0, 2**bits, (32, inputs), dtype=torch.uint8)
    scales = torch.rand(shape).half().float()
    return QuantizedWeight(
        codes, scales, torch.full(shape, zeros, dtype=torch.uint8), bits, group_size, zeros == 2 ** (bits - 1)
    )


@pytest.mark.parametrize(
    "kind, weight",
    [
        ("TQ2_0", lambda: ternary(group_size=512)),
        ("TQ1_0", lambda: ternary(group_size=256)),
        ("Q4_0", lambda: ternary(group_size=64)),
        ("Q8_0", lambda: ternary(group_size=32)),
        ("Q4_0", lambda: int4(group_size=32)),
        ("Q4_0", lambda: int4(group_size=128)),
        ("Q4_1", lambda: int4(zeros=4, group_size=64)),
        ("Q8_0", lambda: int4(zeros=5)),
        ("Q8_0", lambda: int4(zeros=128, bits=8)),
    ],
)
def test_blocks_read_back_exactly(kind, weight):
    weight = weight()
    found, blocks = gguf_blocks(weight, kind)
    assert found == kind
    assert blocks.dtype == np.uint8
    assert torch.equal(dequantize(kind, blocks), weight.dequantize(torch.float32))


@pytest.mark.parametrize(
    "kind, weight",
    [
        ("TQ2_0", lambda: ternary(group_size=512)),
        ("TQ2_0", lambda: ternary(group_size=256)),
        ("Q4_0", lambda: ternary(group_size=128)),
        ("Q4_0", lambda: ternary(inputs=96, group_size=96)),
        ("Q4_0", lambda: int4()),
        ("Q4_1", lambda: int4(zeros=4)),
        ("Q8_0", lambda: int4(zeros=3)),
        ("Q8_0", lambda: int4(zeros=128, bits=8)),
    ],
)
def test_auto_takes_the_smallest_exact_type(kind, weight):
    assert gguf_blocks(weight())[0] == kind


@pytest.mark.parametrize(
    "kind, weight, reason",
    [
        ("TQ2_0", lambda: ternary(group_size=64), "several scales"),
        ("TQ1_0", lambda: ternary(inputs=96, group_size=96), "blocks are 256 inputs and rows have 96"),
        ("TQ2_0", lambda: int4(), r"steps lie in -8 \.\. 7"),
        ("Q4_0", lambda: int4(zeros=7), r"steps lie in -7 \.\. 8"),
        ("Q4_1", lambda: int4(zeros=3), "not a float16 number"),
        ("Q4_1", lambda: int4(zeros=128, bits=8), "8 bits"),
        ("Q4_0", lambda: int4(group_size=16), "group_size 16 gives 32 consecutive inputs several scales"),
        ("auto", lambda: int4(group_size=16), "no block type holds this weight"),
        ("auto", lambda: int4(zeros=0, bits=8), r"Q8_0: steps lie in 0 \.\. 255"),
    ],
)
def test_a_lossy_type_is_refused_with_its_reason(kind, weight, reason):
    with pytest.raises(LossyExport, match=reason):
        gguf_blocks(weight(), kind)


def test_scales_and_orders_that_blocks_cannot_hold_are_refused():
    weight = int4()
    weight.g_idx = (torch.randperm(512) // 32).to(torch.int32)
    with pytest.raises(LossyExport, match="g_idx gives"):
        gguf_blocks(weight, "Q4_0")
    weight = int4()
    weight.scales[0, 0] = 0.1
    with pytest.raises(LossyExport, match="not float16 numbers"):
        gguf_blocks(weight, "Q8_0")


def pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp's llama rotates them, by index: pair i of a head is its rows i and i + D / 2."""
    size = weight.shape[0] // heads
    rows = [h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[rows]


def test_transformers_reads_a_dense_llama(llama, tmp_path):
    """Another reader, of our names, keys and row order: the same logits."""
    model = llama(tie_word_embeddings=False)
    save_gguf(tmp_path / "x.gguf", model)
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    ids = torch.arange(24)[None]
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_a_quantized_llama_reads_back_exactly(llama, quantized, tmp_path):
    model = llama(hidden_size=256, attention_bias=True)
    weights = quantized(model, group_size=64)
    types = save_gguf(tmp_path / "x.gguf", model, weights)
    fields, tensors, stored = read(tmp_path / "x.gguf")
    assert types == stored
    assert stored["blk.1.ffn_down.weight"] == "Q4_0"
    assert stored["blk.0.attn_norm.weight"] == stored["token_embd.weight"] == "F32"
    assert "output.weight" not in stored  # tied
    for name, heads in (("q", 4), ("k", 2)):
        layer = f"model.layers.1.self_attn.{name}_proj"
        assert torch.equal(tensors[f"blk.1.attn_{name}.weight"], pairs(weights[layer].dequantize(), heads))
        assert torch.equal(tensors[f"blk.1.attn_{name}.bias"], pairs(weights[layer].bias, heads))
    plain = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj"}
    for own, name in plain.items():
        assert torch.equal(tensors[f"blk.0.{own}.weight"], weights[f"model.layers.0.{name}"].dequantize())
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 64
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight.dequantize()
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    layer = "model.layers.0.self_attn.q_proj"
    assert torch.equal(other.get_submodule(layer).weight, model.get_submodule(layer).weight)


FACTORS = [1.0 + i / 8 for i in range(8)]


def test_minicpm4_keeps_its_constants_and_factors(tiny_model, quantized, tmp_path):
    model = tiny_model(
        intermediate_size=128,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": FACTORS,
            "long_factor": [2 * factor for factor in FACTORS],
            "original_max_position_embeddings": 128,
        },
    ).bfloat16()
    weights = quantized(model)
    save_gguf(tmp_path / "x.gguf", model, weights)
    fields, tensors, types = read(tmp_path / "x.gguf")
    assert fields["general.architecture"] == "minicpm"
    assert fields["minicpm.embedding_scale"] == 12
    assert fields["minicpm.residual_scale"] == pytest.approx(1.4 / 3**0.5)
    assert fields["minicpm.logit_scale"] == 4  # hidden_size 64 / dim_model_base 16: llama.cpp divides by it
    assert fields["minicpm.rope.scaling.type"] == "longrope"
    assert fields["minicpm.rope.scaling.original_context_length"] == 128
    attention = model.model.rotary_emb.attention_scaling
    assert fields["minicpm.rope.scaling.attn_factor"] == pytest.approx(attention)
    assert tensors["rope_factors_short.weight"].tolist() == FACTORS
    assert tensors["rope_factors_long.weight"].tolist() == [2 * factor for factor in FACTORS]
    assert types["token_embd.weight"] == "BF16"
    assert torch.equal(tensors["token_embd.weight"], model.model.embed_tokens.weight.float())
    layer = "model.layers.2.self_attn.k_proj"
    assert torch.equal(tensors["blk.2.attn_k.weight"], pairs(weights[layer].dequantize(), 2))


def test_llama3_frequencies_are_divisors(llama, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = llama(rope_parameters=rope)
    save_gguf(tmp_path / "x.gguf", model)
    fields, tensors, _ = read(tmp_path / "x.gguf")
    plain = 10000.0 ** -(torch.arange(0, 32, 2).float() / 32)
    torch.testing.assert_close(plain / tensors["rope_freqs.weight"], model.model.rotary_emb.inv_freq)
    assert "llama.rope.scaling.type" not in fields


def test_qwen2_keeps_the_order_of_rows(tmp_path):
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    save_gguf(tmp_path / "x.gguf", model)
    _, tensors, _ = read(tmp_path / "x.gguf")
    attention = model.model.layers[0].self_attn
    assert torch.equal(tensors["blk.0.attn_q.weight"], attention.q_proj.weight)
    assert torch.equal(tensors["blk.0.attn_q.bias"], attention.q_proj.bias)


def test_a_gptq_folder_becomes_gguf(llama, quantized, tmp_path):
    """Ternary layers of one scale a row: 2 bits in both files, and the same values."""
    model = llama(hidden_size=256, intermediate_size=512).half()
    weights = {}
    for name in quantized(model):
        outputs, inputs = model.get_submodule(name).weight.shape
        weights[name] = ternary(outputs, inputs, group_size=inputs)
    save_gptq(tmp_path / "gptq", model, weights, max_shard_size="100KB")
    types = gptq_to_gguf(tmp_path / "gptq", tmp_path / "x.gguf")
    _, tensors, _ = read(tmp_path / "x.gguf")
    assert types["blk.0.ffn_up.weight"] == "TQ2_0"
    assert types["token_embd.weight"] == "F16"
    assert torch.equal(tensors["blk.0.ffn_up.weight"], weights["model.layers.0.mlp.up_proj"].dequantize())
    dense = gptq_to_gguf(tmp_path / "gptq", tmp_path / "y.gguf", quantization="F16")
    assert dense["blk.0.ffn_up.weight"] == "F16"
    assert (tmp_path / "x.gguf").stat().st_size < 0.5 * (tmp_path / "y.gguf").stat().st_size


def packed_ternary(llama, group_size, dtype):
    """A packed ternary model with scales that are numbers of `dtype`, and its dense float32 weights by layer."""
    from transformers_minicpm4.quantization.bitcpm4.quantizer import import_fake_quantized

    model = llama(hidden_size=256, intermediate_size=512)
    dense = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                outputs, inputs = module.weight.shape
                group = inputs if group_size == -1 else group_size
                scales = (torch.rand(outputs, inputs // group) + 0.1).to(dtype).float()
                codes = torch.randint(-1, 2, (outputs, inputs))
                dense[name] = codes * scales.repeat_interleave(group, 1)
                module.weight.copy_(dense[name])
    return import_fake_quantized(model), dense


@pytest.mark.parametrize("group_size, kind", [(64, "Q4_0"), (-1, "TQ2_0")])
def test_a_packed_ternary_checkpoint_is_exact_in_gguf(llama, tmp_path, group_size, kind):
    """From the folder through `export_ternary`, against the values it was made from."""
    from transformers_minicpm4.quantization.bitcpm4.export import export_ternary
    from transformers_minicpm4.quantization.bitcpm4.quantizer import save_packed

    model, dense = packed_ternary(llama, group_size, torch.float16)
    save_packed(model, tmp_path / "packed")
    export_ternary(tmp_path / "packed", tmp_path / "x.gguf", to="gguf")
    _, tensors, types = read(tmp_path / "x.gguf")
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, weight in dense.items():
        _, _, layer, part = name.split(".", 3)
        own = f"blk.{layer}.{parts[part]}.weight"
        heads = {"attn_q": 4, "attn_k": 2}.get(parts[part])
        assert types[own] == kind
        assert torch.equal(tensors[own], weight if heads is None else pairs(weight, heads)), name
    assert torch.equal(tensors["token_embd.weight"], model.model.embed_tokens.weight)


def test_scales_that_float16_rounds_are_written_as_float32_alone(llama, tmp_path):
    from transformers_minicpm4.quantization.bitcpm4.export import export_ternary

    model, dense = packed_ternary(llama, -1, torch.float32)
    with pytest.raises(LossyExport, match=r"0\.self_attn\.q_proj: its scales are not float16 numbers, and F16 would"):
        export_ternary(model, tmp_path / "x.gguf", to="gguf", quantization="F16")
    assert not list(tmp_path.iterdir())
    export_ternary(model, tmp_path / "x.gguf", to="gguf", quantization="F32")
    _, tensors, types = read(tmp_path / "x.gguf")
    assert types["blk.0.ffn_up.weight"] == "F32"
    assert torch.equal(tensors["blk.0.ffn_up.weight"], dense["model.layers.0.mlp.up_proj"])


def test_refusals_name_the_layer_and_leave_nothing(llama, quantized, tmp_path):
    model = llama()
    with pytest.raises(LossyExport, match=r"model\.layers\.0\.self_attn\.q_proj: TQ2_0 cannot"):
        save_gguf(tmp_path / "x.gguf", model, quantized(model), quantization="TQ2_0")
    with pytest.raises(ValueError, match="quantization is one of auto"):
        save_gguf(tmp_path / "x.gguf", model, quantization="Q5_K")
    with pytest.raises(ValueError, match="rope_type 'yarn'"):
        save_gguf(
            tmp_path / "x.gguf",
            llama(
                rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}, max_position_embeddings=512
            ),
        )
    model.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="hidden_act 'gelu'"):
        save_gguf(tmp_path / "x.gguf", model)
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="model_type 'gpt2' has no GGUF writer"):
        save_gguf(tmp_path / "x.gguf", model)
    model = llama()
    model.model.embed_tokens.weight.data[0, 0] = 1e30
    with pytest.raises(LossyExport, match="token_embd.weight has values beyond F16's range"):
        save_gguf(tmp_path / "x.gguf", model, float_type="F16")
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_when_a_new_one_fails(llama, quantized, tmp_path):
    model = llama()
    save_gguf(tmp_path / "x.gguf", model)
    before = (tmp_path / "x.gguf").read_bytes()
    with pytest.raises(LossyExport):
        save_gguf(tmp_path / "x.gguf", model, quantized(model), quantization="TQ1_0")
    assert (tmp_path / "x.gguf").read_bytes() == before


def test_a_missing_package_is_named(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"transformers_minicpm4\[edge\]"):
        save_gguf(tmp_path / "x.gguf", llama())


TEXTS = [
    "Hello world, it's 2025!",
    "  two  spaces\nand\tlines",
    "日本語 и кириллица 🙂",
    "<|im_start|>user\nhi<|im_end|>",
]


@pytest.mark.real
def test_a_byte_level_tokenizer_splits_as_before(real_checkpoint, llama, tmp_path):
    """SmolLM2's: the ids of Transformers' GGUF loader equal the original's."""
    tokenizer = AutoTokenizer.from_pretrained(real_checkpoint)
    model = llama(vocab_size=49160, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    save_gguf(tmp_path / "x.gguf", model, tokenizer=tokenizer)
    fields, *_ = read(tmp_path / "x.gguf")
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert len(fields["tokenizer.ggml.tokens"]) == 49160
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD49159]"
    assert fields["tokenizer.ggml.token_type"][1] == gguf.TokenType.CONTROL
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    other = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in TEXTS:
        assert other(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    """A SentencePiece-BPE model of 400 pieces with byte fallback, as a fast tokenizer; and the model itself."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed (extra `test`)")
    from transformers import LlamaTokenizer

    text = " ".join(LICENSE.read_text(encoding="utf-8").split())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text[i : i + 200] for i in range(0, len(text), 200)]),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {processor.id_to_piece(i): i for i in range(400)}
    pieces = [
        (index, piece)
        for piece, index in vocab.items()
        if not (processor.is_byte(index) or processor.is_control(index) or processor.is_unknown(index))
    ]
    pairs_of = [
        (-processor.get_score(index), piece[:cut], piece[cut:])
        for index, piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges = [(left, right) for _, left, right in sorted(pairs_of, key=lambda entry: entry[0])]
    return LlamaTokenizer(vocab=vocab, merges=merges), processor


def spm_ids(tokens, scores, types, text, space_prefix):
    """llama.cpp's SentencePiece tokenizer (src/llama-vocab.cpp, llm_tokenizer_spm): best score first, left first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    symbols = list((" " if space_prefix else "") + text)
    symbols = ["▁" if symbol == " " else symbol for symbol in symbols]
    while True:
        joined = [(scores[vocab[a + b]], -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in vocab]
        if not joined:
            break
        place = -max(joined)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    ids = []
    for symbol in symbols:
        ids += [vocab[symbol]] if symbol in vocab else [vocab[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


def test_a_sentencepiece_tokenizer_splits_as_sentencepiece_does(sentencepiece_tokenizer, llama, tmp_path):
    tokenizer, processor = sentencepiece_tokenizer
    model = llama(vocab_size=416, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    save_gguf(tmp_path / "x.gguf", model, tokenizer=tokenizer)
    fields, *_ = read(tmp_path / "x.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == 416
    assert types[tokens.index("<0x41>")] == gguf.TokenType.BYTE
    assert types[tokens.index("<unk>")] == gguf.TokenType.UNKNOWN
    assert types[tokens.index("<s>")] == gguf.TokenType.CONTROL
    assert types[-1] == gguf.TokenType.UNUSED
    scores = fields["tokenizer.ggml.scores"]
    words = LICENSE.read_text(encoding="utf-8").split()
    for text in (" ".join(words[:200]), "the quick brown fox reasserts unlicensed derivations", "wörter 日本"):
        ids = spm_ids(tokens, scores, types, text, fields["tokenizer.ggml.add_space_prefix"])
        assert ids == processor.encode(text)


def byte_level(pre_tokenizer) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_how_text_is_split_has_llama_cpps_name(llama, tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    from transformers_minicpm4.quantization.export.gguf_tokenizer import PATTERNS

    def pre(pre_tokenizer, **arguments):
        model = llama(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
        save_gguf(tmp_path / "x.gguf", model, tokenizer=byte_level(pre_tokenizer), **arguments)
        return read(tmp_path / "x.gguf")[0]["tokenizer.ggml.pre"]

    def split(pattern):
        parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        return pre_tokenizers.Sequence(parts)

    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    assert pre(pre_tokenizers.Sequence(digits)) == "smollm"
    assert pre(pre_tokenizers.ByteLevel(add_prefix_space=False)) == "gpt-2"
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    assert set(PATTERNS) == {llama3, llama3.replace("{1,3}", "")}
    assert pre(split(llama3)) == "llama-bpe"
    with pytest.raises(ValueError, match="has no name known here; pass llama.cpp's as tokenizer_pre="):
        pre(split(r"\d+"))
    assert pre(split(r"\d+"), tokenizer_pre="mine") == "mine"
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
    with pytest.raises(ValueError, match="a Unigram tokenizer is neither"):
        save_gguf(tmp_path / "y.gguf", llama(), tokenizer=unigram)
    with pytest.raises(ValueError, match="token 255 and the embedding 128 rows"):
        save_gguf(tmp_path / "y.gguf", llama(), tokenizer=byte_level(pre_tokenizers.ByteLevel()))
