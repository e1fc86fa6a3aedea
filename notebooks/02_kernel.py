# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The InfLLM v2 kernel, step by step
#
# The kernel is a repository for the `kernels` library: Triton on NVIDIA and ROCm GPUs, C++ on a CPU. This notebook
# takes it from the checkout beside it, walks through its operators, and times a decode step as the text grows. It runs
# on a CPU in about half a minute, most of it building the C++ once.

# %%
import os
import runpy
import statistics
import time
import warnings
from pathlib import Path


warnings.filterwarnings("ignore", "IProgress not found")  # without ipywidgets, progress is shown as text

import matplotlib.pyplot as plt
import torch
from kernels import get_kernel, get_local_kernel


checkout = Path("../hub_kernels/infllm_v2") if Path("../hub_kernels").is_dir() else Path("hub_kernels/infllm_v2")
if name := os.environ.get("INFLLM_V2_KERNEL"):  # a published one: "<owner>/infllm-v2"
    kernel = get_kernel(name, version=1, trust_remote_code=[name])
else:
    runpy.run_path(str(checkout / "scripts" / "build.py"))["build"](checkout / "build")
    kernel = get_local_kernel(checkout.resolve())
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
torch.set_num_threads(min(torch.get_num_threads(), 2))
print(f"device: {device}, compiled code answers: {kernel.is_compiled(torch.zeros(1, device=device))}")

# %% [markdown]
# ## Rows, packed
#
# Two rows of 3,000 and 1,000 tokens lie one after the other, as in FlashAttention's variable-length functions. 16
# query heads share one key/value head.

# %%
lengths, heads, size = [3000, 1000], 16, 64
cu_seqlens = torch.tensor([0, 3000, 4000], dtype=torch.int32, device=device)
query = torch.randn(4000, heads, size, device=device)
topics = torch.randn(4000 // 200, 1, size, device=device).repeat_interleave(200, 0)  # neighbours speak of one thing
key, value = torch.randn(4000, 1, size, device=device) + 2 * topics, torch.randn(4000, 1, size, device=device)
query += 2 * topics.roll(1, 0)

# %% [markdown]
# ## Compress, score, choose, attend

# %%
fine, coarse = kernel.compress_keys(key, cu_seqlens, 3000)
scores = kernel.block_scores(query, fine, coarse, cu_seqlens, cu_seqlens, 3000, 3000)
positions = torch.cat([torch.arange(length, device=device) for length in lengths]).int()
blocks = kernel.select_blocks(scores, positions, num_selected=12, window_blocks=4)
output, lse = kernel.sparse_attention(query, key, value, blocks, cu_seqlens, cu_seqlens, 3000, 3000)
print(f"4,000 keys -> {len(fine)} fine and {len(coarse)} coarse means")
print(f"the last query of the first row reads blocks {blocks[0, 2999].tolist()} of {-(-3000 // 64)}")

# %% [markdown]
# The first block, the query's own and the four before it are always among them; the others were chosen by score. Here
# is what every query of the first row reads:

# %%
read = torch.zeros(3000, 48)
for s, chosen in enumerate(blocks[0, :3000].tolist()):
    read[s, [block for block in chosen if block >= 0]] = 1
plt.figure(figsize=(5, 5))
plt.imshow(read, aspect="auto", cmap="Blues", interpolation="none")
plt.xlabel("block of 64 keys")
plt.ylabel("query")
plt.title("blocks read")
plt.show()

# %% [markdown]
# ## Right?
#
# Attention over everything, masked to the same blocks, in float64:

# %%
rows = slice(2500, 3000)
mask = (read[rows].repeat_interleave(64, 1)[:, :3000] > 0) & (torch.arange(3000) <= torch.arange(2500, 3000)[:, None])
exact = [tensor[:3000].double().cpu() for tensor in (query, key, value)]
logits = torch.einsum("shd,nd->hsn", exact[0][rows], exact[1][:, 0]) * size**-0.5
want = (logits.masked_fill(~mask, -torch.inf).softmax(-1) @ exact[2][:, 0]).transpose(0, 1)
error = ((output[rows].double().cpu() - want).pow(2).mean() / want.pow(2).mean()).sqrt().item()
print(f"relative root mean square error: {error:.1e}")

# %% [markdown]
# ## How a decode step grows
#
# One new token against a growing cache, with the released settings: 96 blocks of 64 tokens, however long the text.
# Below 8,192 tokens the rule is dense, as released. The dense arm is PyTorch's with the group folded into the query
# axis, which reads each key once.

# %%
sizes, curves = [4096, 8192, 16_384, 32_768, 65_536], {"dense": [], "InfLLM v2": []}
for total in sizes:
    one = torch.randn(1, 16, 1, 64, device=device)
    keys, values = torch.randn(2, 1, 1, total, 64, device=device)
    own = keys[0].transpose(0, 1)
    bounds = torch.tensor([0, total], dtype=torch.int32, device=device)
    compressed = tuple(part.transpose(0, 1)[None] for part in kernel.compress_keys(own, bounds, total))

    def dense(one=one, keys=keys, values=values):
        return torch.nn.functional.scaled_dot_product_attention(one.view(1, 1, 16, 64), keys, values)

    def sparse(one=one, keys=keys, values=values, compressed=compressed):
        return kernel.infllm_v2_attention(one, keys, values, compressed_keys=compressed)

    times = {"dense": [], "InfLLM v2": []}
    for _ in range(15):
        for name, run in (("dense", dense), ("InfLLM v2", sparse)):
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    for name, values_ in times.items():
        curves[name].append(statistics.median(values_) * 1e3)
plt.figure(figsize=(5, 3))
for name, milliseconds in curves.items():
    plt.plot(sizes, milliseconds, marker="o", label=name)
plt.xscale("log", base=2)
plt.yscale("log")
plt.xlabel("tokens in the cache")
plt.ylabel("ms a layer")
plt.legend()
plt.show()
print(f"at 65,536 tokens: {curves['dense'][-1] / curves['InfLLM v2'][-1]:.1f} times faster than dense here")

# %% [markdown]
# In a model: `INFLLM_V2_KERNEL=<owner>/infllm-v2` (or the checkout's folder) in the environment, and
# `attn_implementation="infllm_v2"`. `transformers_minicpm4` then asks the kernel wherever it can answer. Training
# works the same way on a GPU: `sparse_attention` has a backward pass that gives the same bits in every run.
