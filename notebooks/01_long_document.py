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
# # Read a long document with sparse attention
#
# In InfLLM v2, the attention of MiniCPM4, a token does not read everything before it: it scores blocks of 64 tokens
# and reads the best few. This notebook asks a real model about a document twice, with sparse attention and without,
# and then draws which blocks were read. It runs on a CPU in about a minute.

# %%
import importlib.util
import subprocess
import sys
import warnings


if importlib.util.find_spec("transformers_minicpm4") is None:  # on Colab
    package = "transformers_minicpm4[edge,notebooks]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
warnings.filterwarnings("ignore", "IProgress not found")  # without ipywidgets, progress is shown as text

# %% [markdown]
# ## A model
#
# SmolLM2-135M-Instruct is a Llama, and a Llama is a MiniCPM4 whose three constants are neutral: its weights are taken
# over unchanged, once (a download of 93 MB), and give the same answers. The name of any MiniCPM4 checkpoint on the Hub
# would do as well.
#
# `sparse_config` switches sparse attention on. Past the first 768 tokens, a token reads 12 blocks: the first, its
# own, the 4 before it (`window_size`), and 6 that it chooses (`topk` counts the first block, its own, and those 6).

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from transformers_minicpm4 import InfLLMv2Config
from transformers_minicpm4.cli.assets import make_smollm2


logging.disable_progress_bar()
folder = make_smollm2()
sparse = InfLLMv2Config(topk=8, window_size=256, dense_len=768)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, sparse_config=sparse.to_dict(), dtype="float32")

# %% [markdown]
# ## A document
#
# Every Python interpreter carries its language reference. Ten chapters of it, and a question about one in the middle:

# %%
from pydoc_data.topics import topics


chapters = ("assert", "while", "pass", "del", "return", "lambda", "global", "numbers", "booleans", "else")
document = "\n\n".join(topics[chapter] for chapter in chapters)
question = "What are lambda expressions used for?"
messages = [{"role": "user", "content": f"{document}\n\n{question}"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(prompt, return_tensors="pt", return_offsets_mapping=True)
offsets = inputs.pop("offset_mapping")[0]
length = inputs["input_ids"].shape[1]
blocks = -(-length // sparse.block_size)
print(f"{length} tokens in {blocks} blocks, of which a token reads {sparse.selected_blocks} at most")


# %% [markdown]
# ## Two answers


# %%
def ask(attention: str):
    model.set_attn_implementation(attention)
    output = model.generate(
        **inputs, max_new_tokens=22, do_sample=False, return_dict_in_generate=True, output_hidden_states=True
    )
    print(f"{attention}: {tokenizer.decode(output.sequences[0, length:], skip_special_tokens=True).strip()}")
    return output.hidden_states[0]  # those of the prompt, one tensor a layer


hidden_states = ask("infllm_v2")

# %% [markdown]
# The same weights with dense attention (the library remarks that the `sparse_config` is now unused):

# %%
_ = ask("sdpa")

# %% [markdown]
# ## Which blocks were read
#
# `infllm_v2_attention` is the operator by itself, and returns the blocks on request. Here it is given the queries and
# keys of one layer, rebuilt from the hidden states that entered the layer.

# %%
import torch

from transformers_minicpm4 import infllm_v2_attention
from transformers_minicpm4.model.modeling_minicpm4 import apply_rotary_pos_emb


@torch.no_grad()
def blocks_read(index: int, tokens: int = length) -> torch.Tensor:
    """Which blocks each of the last tokens reads, for each key/value head: bool `[heads, tokens, blocks]`."""
    layer = model.model.layers[index]
    states = layer.input_layernorm(hidden_states[index])
    query, key, value = (
        project(states).unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
        for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    cos, sin = model.model.rotary_emb(states, torch.arange(length)[None])
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return infllm_v2_attention(query[:, :, -tokens:], key, value, sparse, return_blocks=True)[1][0]


# %% [markdown]
# A row of the picture is a token, a column a block. The diagonal is the window, the left edge the first block; above
# the line, at `dense_len`, attention is dense; what stands alone was chosen.

# %%
import matplotlib.pyplot as plt


read = blocks_read(15)
figure, axis = plt.subplots(figsize=(4.5, 4.5), dpi=80)
axis.imshow(read[0], aspect="auto", cmap="Greys", interpolation="nearest", extent=(0, blocks, length, 0))
axis.axhline(sparse.dense_len, color="tab:red", linewidth=1)
axis.set(xlabel="block of 64 tokens", ylabel="token", title="Layer 15, first key/value head")
plt.show()

# %% [markdown]
# Did the last token, which begins the answer, read the chapter that the question is about?

# %%
start = prompt.index(topics["lambda"])
inside = (offsets[:, 0] >= start) & (offsets[:, 0] < start + len(topics["lambda"]))
wanted = torch.arange(length)[inside].div(sparse.block_size, rounding_mode="floor").unique()
layers = range(model.config.num_hidden_layers)
hits = sum(blocks_read(index, tokens=1)[..., wanted].any().item() for index in layers)
share = read[:, -1].sum(-1).float().mean().item() / blocks
print(f"The chapter is in blocks {wanted.tolist()}; it was read in {hits} of {len(layers)} layers.")
print(f"In each layer the last token reads {share:.0%} of the document.")

# %% [markdown]
# Fewer blocks cost less and miss more: try `topk=4`, or a chapter of your own. What the released models use is
# `InfLLMv2Config()`: 64 blocks and a window of 2,048 tokens, dense below 8,192. From where on that is faster is in
# [docs/benchmarks.md](../docs/benchmarks.md).
