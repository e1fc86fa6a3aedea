"""
MiniCPM4's dense path against the in-tree Llama of the same shape, and sparse against dense through the whole model.

    python benchmarks/bench_model.py --quick
    python benchmarks/bench_model.py --json benchmarks/results/model_cpu.json

Shapes are SmolLM2-135M's, random weights, float32. "ratio" is Llama's (or dense's) time over ours.
"""

from __future__ import annotations

import argparse

import torch
from harness import interleave, report, summarize
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from transformers_minicpm4 import InfLLMv2Config, llama_to_minicpm4


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65_536,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def same_shape(layers: int, rounds: int) -> list[dict]:
    """Below dense_len: nothing sparse runs, only the overhead of ours over Llama is seen."""
    theirs = llama(layers)
    ours = llama_to_minicpm4(theirs, sparse_config=InfLLMv2Config())  # sparse by default, dense below 8,192 tokens
    plain = llama_to_minicpm4(theirs)
    ids = torch.randint(0, 49_152, (1, 512))
    rows = []
    for what, call in {
        "forward, 512 tokens": lambda model: lambda: model(ids, use_cache=False, logits_to_keep=1),
        "generate, 64 + 48 tokens": lambda model: (
            lambda: model.generate(ids[:, :64], max_new_tokens=48, do_sample=False)
        ),
    }.items():
        arms = {"llama": call(theirs), "minicpm4 sdpa": call(plain), "minicpm4 infllm_v2": call(ours)}
        times = interleave(arms, rounds, what)
        for name in ("minicpm4 sdpa", "minicpm4 infllm_v2"):
            row = summarize(times, name, ["llama"])
            row.update(what=f"{what}: {name} against llama")
            rows.append(row)
    return rows


def sparse_against_dense(layers: int, length: int, rounds: int) -> dict:
    """Decode steps on a filled cache: the whole model, sparse against dense."""
    model = llama_to_minicpm4(llama(layers), sparse_config=InfLLMv2Config())
    cache = DynamicCache()
    ids = torch.randint(0, 49_152, (1, 1))
    state = torch.randn(1, 3, length, 64)
    for layer in range(layers):
        cache.update(state, state, layer)

    def step(implementation):
        def run():
            model.set_attn_implementation(implementation)
            model(ids, past_key_values=cache)
            cache.crop(-1)

        return run

    step("infllm_v2")()  # the cache layers become sparse ones; dense reads the same
    row = summarize(
        interleave({"sdpa": step("sdpa"), "infllm_v2": step("infllm_v2")}, rounds, f"decode {length}"),
        "infllm_v2",
        ["sdpa"],
    )
    row.update(what=f"decode step at {length:,} tokens: infllm_v2 against sdpa, whole model")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer layers and rounds, under a minute")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    layers, rounds = (6, 5) if args.quick else (30, 15)
    with torch.no_grad():
        rows = same_shape(layers, rounds)
        for length in (16_384,) if args.quick else (8_192, 32_768):
            rows.append(sparse_against_dense(layers, length, 5 if args.quick else 11))
    for row in rows:
        row["median ms"] = ", ".join(f"{name} {value:,.1f}" for name, value in row["median_ms"].items())
        row["range"] = " to ".join(map(str, row["ratio_range"]))
    report(rows, ["what", "ratio", "range", "median ms"], args.json)


if __name__ == "__main__":
    main()
