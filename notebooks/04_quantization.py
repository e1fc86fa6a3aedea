# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why the first token is left out: P-GPTQ on one layer, and ternary weights in 2 bits
#
# GPTQ rounds a weight so that its outputs change least on calibration text. The first token of a text draws huge
# activations, so it rules what "least" means. P-GPTQ (MiniCPM4, arXiv 2506.07900, 4.1.2) leaves it out of the
# calibration, and stores its keys and values with the checkpoint instead. This notebook shows both on the real weights
# of SmolLM2-135M. The whole model is quantized by `examples/p_gptq.py`.

# %%
import importlib.util
import subprocess
import sys
import warnings


if importlib.util.find_spec("transformers_minicpm4") is None:  # on Colab
    package = "transformers_minicpm4[quantization,notebooks]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
warnings.filterwarnings("ignore", "IProgress not found")  # without ipywidgets, progress is shown as text

# %%
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from transformers_minicpm4.cli.assets import smollm2_path
from transformers_minicpm4.quantization.bitcpm4.packed_linear import TernaryLinear
from transformers_minicpm4.quantization.bitcpm4.ternary import ternary_codes_and_scales
from transformers_minicpm4.quantization.p_gptq.hessian import Hessian, position_weights
from transformers_minicpm4.quantization.p_gptq.solver import round_to_nearest, solve


disable_progress_bar()
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
text = "\n\n".join(topics[name] for name in sorted(topics))
ids = torch.tensor(tokenizer(text[:60_000], verbose=False)["input_ids"][: 16 * 255]).view(16, 255)
rows = torch.cat([torch.full((16, 1), tokenizer.bos_token_id), ids], dim=1)

# %% [markdown]
# ## The inputs of every down projection, position by position

# %%
inputs: dict[int, torch.Tensor] = {}
handles = [
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, index=index: inputs.update({index: args[0]}))
    for index, layer in enumerate(model.model.layers)
]
with torch.no_grad():
    model(rows)
for handle in handles:
    handle.remove()

norms = torch.stack([inputs[index].norm(dim=-1).mean(0) for index in range(len(inputs))])
largest = int((norms[:, 0] / norms[:, 8:].mean(1)).argmax())
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for index in sorted({2, largest, 28}):
    axes.semilogy(norms[index, :32], ".-", label=f"block {index}")
axes.set(xlabel="position", ylabel="norm of down_proj's input", title="The first token stands out in a few blocks")
axes.legend()
share = norms[largest, 0] ** 2 / norms[largest].square().sum()
print(f"block {largest}: one position of {rows.shape[1]} holds {share:.1%} of the Hessian's trace")

# %% [markdown]
# ## GPTQ and P-GPTQ on that layer
#
# The error is the share of the outputs' energy that 3-bit rounding turns into noise: at the first position, and at all
# others. Leaving the first position out serves the others better and ruins the first one, which the stored prefix then
# has to replace.

# %%
weight, x = model.model.layers[largest].mlp.down_proj.weight.detach(), inputs[largest]
calibration, held_out = x[:12], x[12:]


def errors(quantized) -> list[float]:
    change = quantized.dequantize() - weight
    return [
        float((part @ change.T).square().sum() / (part @ weight.T).square().sum())
        for part in (held_out[:, :1], held_out[:, 1:])
    ]


settings = {"bits": 3, "group_size": 64}
results = {"rounding": errors(round_to_nearest(weight, **settings))}
for name, skip_first in (("GPTQ", 0), ("P-GPTQ", 1)):
    hessian = Hessian(weight.shape[1])
    hessian.add(calibration, position_weights(torch.ones(calibration.shape[:2]), skip_first))
    results[name] = errors(solve(weight, hessian.finish(), **settings)[0])
for name, (first, others) in results.items():
    print(f"{name:9} first position {first:8.4%}   all others {others:8.4%}")

# %% [markdown]
# ## Ternary weights, packed
#
# BitCPM4 stores each weight as -1, 0 or 1 with one scale a group: 2 bits and a little. Rounding alone ruins a model
# that was not trained for it (docs/bitcpm4.md has the training); here only the size, and that packing loses nothing.

# %%
codes, scales = ternary_codes_and_scales(weight, 64)
packed = TernaryLinear.from_codes(codes, scales, 64)
size = packed.weight.nbytes + packed.weight_scale.nbytes
print(f"{size / (weight.numel() * 2):.3f} of the bytes in bfloat16")
dense = codes.float().view(len(codes), -1, 64) * scales.float()[:, :, None]
with torch.no_grad():
    difference = (packed(held_out) - held_out @ dense.view_as(weight).T).abs().max()
    largest_output = packed(held_out).abs().max()
print(f"largest difference from the dense product: {difference:.1e}, outputs up to {largest_output:.1f}")
