"""
The package with the InfLLM v2 kernel: who answers, how far it is from the blocked PyTorch form, how long both take.

    make kernels
    export LOCAL_KERNELS="local/infllm-v2=hub_kernels/infllm_v2" INFLLM_V2_KERNEL=local/infllm-v2
    python examples/kernel.py

With a published kernel INFLLM_V2_KERNEL=<owner>/infllm-v2 alone does it. Runs on a CPU in half a minute, on a GPU too.
"""

import os
import statistics
import sys
import time

import torch
from kernels import get_loaded_kernels

from transformers_minicpm4 import InfLLMv2Config, MiniCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.infllm_v2 import InfLLMv2CacheLayer, infllm_v2_attention


LENGTH, HEADS, GROUPS, SIZE = 16_384, 16, 1, 64
ROUNDS = 3

if not os.environ.get("INFLLM_V2_KERNEL"):
    sys.exit(f"INFLLM_V2_KERNEL names no kernel.\n{__doc__}")
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
config = InfLLMv2Config()  # the released rule: 96 blocks of 64 tokens


def both(run) -> tuple[dict, dict]:
    """Results and median seconds of the two implementations, in turns."""
    results, seconds = {}, {"kernel": [], "blockwise": []}
    for _ in range(ROUNDS + 1):
        for name, times in seconds.items():
            start = time.perf_counter()
            results[name] = run(name)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return results, {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first one loads


# 1. One layer: a decode step, and the last 256 tokens of a prompt.
keys, values = (torch.randn(1, GROUPS, LENGTH, SIZE, device=device) for _ in range(2))
cache = InfLLMv2CacheLayer(config)
keys, values = cache.update(keys, values, row_starts=[0])
print(f"{LENGTH:,} keys, {HEADS} query heads, {GROUPS} key/value head of {SIZE}, float32, {device}:")
with torch.no_grad():
    for what, count in (("decode step", 1), ("last 256 tokens", 256)):
        query = torch.randn(1, HEADS, count, SIZE, device=device)

        def attend(name, query=query):
            given = {"compressed_keys": cache.compressed_keys, "implementation": name}
            return infllm_v2_attention(query, keys, values, config, **given)

        outputs, seconds = both(attend)
        difference = (outputs["kernel"] - outputs["blockwise"]).abs().max().item()
        times = ", ".join(f"{name} {1000 * median:.1f} ms" for name, median in seconds.items())
        print(f"  {what:16} {times}; largest difference {difference:.0e}")

# 2. A model, here a small one with random weights. "auto" is the default, and takes the kernel because it is named.
fields = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
model = MiniCPM4ForCausalLM(
    MiniCPM4Config(
        vocab_size=512,
        num_key_value_heads=1,
        max_position_embeddings=16_384,
        dim_model_base=256,
        eos_token_id=None,
        **fields,
    )
).to(device)
prompt = torch.randint(512, (1, 8_500), device=device)
tokens = {}
for name in ("auto", "blockwise"):
    model.config.sparse_config = InfLLMv2Config(implementation=name)
    model.set_attn_implementation("infllm_v2")
    tokens[name] = model.generate(prompt, max_new_tokens=8, do_sample=False)
print(f"generate after {prompt.shape[1]:,} tokens: the same tokens? {torch.equal(*tokens.values())}")

for kernel in get_loaded_kernels():
    print(f"the kernel that answered: {os.environ['INFLLM_V2_KERNEL']}, build {kernel.metadata.id}")
