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
# # Chunk-wise rollouts: who samples what, and when
#
# In GRPO a batch of completions is sampled, rewarded and trained on. The batch waits for its longest completion, and
# while it waits most of its rows are already done. MiniCPM4 (arXiv 2506.07900, 3.2.3) samples only a chunk of each
# completion a step; what is unfinished goes on in the next step, beside fresh prompts and under newer weights. This
# notebook trains the same tiny policy both ways and draws what happens.

# %%
import importlib.util
import os
import subprocess
import sys
import warnings


if importlib.util.find_spec("transformers_minicpm4") is None:  # on Colab
    package = "transformers_minicpm4[rl,notebooks]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports the start of a training otherwise
warnings.filterwarnings("ignore", "IProgress not found")  # without ipywidgets, progress is shown as text

# %%
import random
import string
import tempfile

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from matplotlib.colors import BoundaryNorm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from transformers_minicpm4 import MiniCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.rl import ChunkwiseGRPOConfig, ChunkwiseGRPOTrainer


torch.set_num_threads(1)
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A policy and a task
#
# A random model of 40 characters ends each reply with a probability of about 1 in 40 at every character, so lengths
# differ widely. It is rewarded for digits.

# %%
characters = [*"\n+=", *string.digits, *string.ascii_lowercase[:25]]
vocabulary = {name: number for number, name in enumerate(["<pad>", "<eos>", *characters])}
core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")

chooser = random.Random(0)
problems = Dataset.from_list([{"prompt": f"{chooser.randrange(100)}+{chooser.randrange(100)}="} for _ in range(64)])


def digits(completions, **kwargs):
    return [sum(character.isdigit() for character in text) / (1 + len(text)) for text in completions]


def policy():
    torch.manual_seed(0)
    config = MiniCPM4Config(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, scale_emb=1, dim_model_base=32,
        scale_depth=1.4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return MiniCPM4ForCausalLM(config)


STEPS, ROWS, GROUP, LONGEST, CHUNK = 16, 16, 4, 96, 24
settings = {
    "output_dir": tempfile.mkdtemp(), "max_steps": STEPS, "per_device_train_batch_size": ROWS,
    "num_generations": GROUP, "max_completion_length": LONGEST, "learning_rate": 2e-3, "logging_steps": 1,
    "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
    "mask_truncated_completions": False, "seed": 1,
}  # fmt: skip

# %% [markdown]
# ## The same steps, both ways
#
# `ChunkwiseGRPOTrainer` takes what `GRPOTrainer` takes. Its store of rollouts is watched here to draw it afterwards:
# when a group of completions came in, and which batch took it.

# %%
vanilla = GRPOTrainer(policy(), digits, GRPOConfig(**settings), train_dataset=problems, processing_class=tokenizer)
vanilla.remove_callback(PrinterCallback)
vanilla.train()

chunkwise = ChunkwiseGRPOTrainer(
    policy(), digits, ChunkwiseGRPOConfig(chunk_length=CHUNK, **settings), problems, processing_class=tokenizer
)
chunkwise.remove_callback(PrinterCallback)

store, iterations, groups, begun, trained = chunkwise.rollouts, 0, [], {}, {}
admission, admit, take = store.admission, store.admit, store.take


def noting_admission():
    global iterations
    iterations += 1
    return admission()


def noting_admit(*args):
    groups.append(admit(*args))
    begun[groups[-1].number] = iterations
    return groups[-1]


def noting_take():
    batch = take()
    trained.update({group.number: iterations for group in batch or []})
    return batch


store.admission, store.admit, store.take = noting_admission, noting_admit, noting_take
chunkwise.train()
print(
    f"{STEPS} steps of {ROWS} completions; chunk-wise in {iterations} iterations, {len(store.unfinished())} under way"
)

# %% [markdown]
# ## Which completion gets a chunk when
#
# One line is one completion, four lines are a prompt. A bar is a chunk, as long as it has tokens; its colour is the
# number of optimizer steps its weights had seen. A group is trained (dot) once all four of its completions are done,
# and those of three other groups: that takes two iterations at the start, and mostly one afterwards. A long completion
# is sampled by several policies on its way.

# %%
shown = groups[:14]
versions = torch.tensor([made for group in shown for row in group.trajectories for made, _ in row.chunks]).max() + 1
norm = BoundaryNorm(range(int(versions) + 1), plt.cm.viridis.N)
figure, axes = plt.subplots(figsize=(9, 6.5), layout="constrained")
for place, group in enumerate(shown):
    for row in group.trajectories:
        line = place * (GROUP + 1) + row.sample
        for number, (made, tokens) in enumerate(row.chunks):
            start = begun[group.number] + number - 0.5
            axes.barh(line, 0.94 * tokens / CHUNK, left=start, height=0.85, color=plt.cm.viridis(norm(made)))
    if group.number in trained:
        axes.plot(trained[group.number] + 0.5, place * (GROUP + 1) + (GROUP - 1) / 2, "o", color="black", markersize=4)
axes.set(
    xlabel="iteration", ylabel="prompt, with four completions", title="Chunks, and when their group is trained (dot)"
)
axes.set_yticks([place * (GROUP + 1) + (GROUP - 1) / 2 for place in range(len(shown))], range(1, len(shown) + 1))
for edge in range(1, max(trained[group.number] for group in shown) + 1):
    axes.axvline(edge + 0.5, color="0.85", linewidth=0.8, zorder=0)
axes.set_xticks(range(1, max(trained[group.number] for group in shown) + 1))
axes.set_xlim(0.45, None)
axes.invert_yaxis()
axes.margins(y=0.01)
colours = figure.colorbar(plt.cm.ScalarMappable(norm, "viridis"), ax=axes, label="optimizer steps before the chunk")
colours.set_ticks([place + 0.5 for place in range(int(versions))], labels=range(int(versions)))

# %% [markdown]
# ## How old the trained tokens are
#
# Age counts the optimizer steps between sampling a token and training on it. The loss needs to know: each token's
# importance ratio is taken against the policy that sampled its chunk (equation 8), so old tokens count for what they
# were. The first three steps are left out: the shortest completions finish first and would flatter the picture.

# %%
history = [entry for entry in chunkwise.state.log_history if "rollout/staleness/mean" in entry][3:]
names = [*range(8), "8_or_more"]
shares = [sum(entry[f"rollout/staleness/{name}"] for entry in history) / len(history) for name in names]
last = max(place for place, share in enumerate(shares) if share) + 1
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
bars = axes.bar([str(name).replace("_or_more", "+") for name in names[:last]], shares[:last], color="tab:blue")
axes.bar_label(bars, [f"{share:.0%}" for share in shares[:last]])
axes.set(xlabel="age, in optimizer steps", ylabel="share of trained tokens", title="Age of the tokens in a batch")
axes.margins(y=0.12)
stale = sum(len({made for made, _ in row.chunks}) > 1 for group in groups for row in group.trajectories)
print(f"{stale} of {len(groups) * GROUP} completions were sampled by more than one policy")

# %% [markdown]
# ## How many of the slots are used
#
# `generate` computes rows x steps. A slot is used where its row is not finished yet. Without chunks the longest reply
# of the batch sets the number of steps; with them nobody waits longer than a chunk.

# %%
plain = [
    entry["completions/mean_length"] / entry["completions/max_length"]
    for entry in vanilla.state.log_history
    if "completions/max_length" in entry
]
chunked = [entry["rollout/slot_utilization"] for entry in chunkwise.state.log_history if "reward" in entry]
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
for offset, values, name, colour in ((-0.2, plain, "whole", "tab:gray"), (0.2, chunked, "chunk-wise", "tab:blue")):
    mean = sum(values) / len(values)
    steps = range(1, STEPS + 1)
    axes.bar([step + offset for step in steps], values, width=0.4, color=colour, label=f"{name}, mean {mean:.2f}")
axes.set(xlabel="training step", ylabel="used slots", ylim=(0, 1.0), title="Share of sampling slots that give a token")
axes.set_xticks(steps)
axes.legend(loc="upper center", ncols=2, frameon=False)
print(f"used slots: whole {sum(plain) / STEPS:.2f}, chunk-wise {sum(chunked) / STEPS:.2f}")

# %% [markdown]
# The length of a chunk is a trade: shorter ones fill the slots better, but tokens grow older, and prefixes are read
# again more often. `minicpm4 grpo --help` has the settings.
