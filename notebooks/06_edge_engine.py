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
# # Generation on a small machine
#
# What fits on which device, before any weight is loaded; an engine that takes its memory once; a draft that guesses
# several tokens, all of which are checked in one pass of the model. The tokens stay those of `model.generate`.

# %%
import importlib.util
import subprocess
import sys
import warnings


if importlib.util.find_spec("transformers_minicpm4") is None:  # on Colab
    package = "transformers_minicpm4[notebooks]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
warnings.filterwarnings("ignore", "IProgress not found")  # without ipywidgets, progress is shown as text

# %%
import matplotlib.pyplot as plt
import torch
from transformers.utils.logging import disable_progress_bar

from transformers_minicpm4 import InfLLMv2Config, MiniCPM4Config
from transformers_minicpm4.cli.assets import smollm2_path
from transformers_minicpm4.edge.device_profile import device_profile
from transformers_minicpm4.edge.engine import EdgeEngine
from transformers_minicpm4.edge.memory_plan import DoesNotFit, plan_memory
from transformers_minicpm4.generation.drafts import Draft, PromptLookupDraft
from transformers_minicpm4.generation.fr_spec import build_frequency_vocabulary


torch.set_num_threads(2)
disable_progress_bar()

# %% [markdown]
# ## What fits
#
# MiniCPM4-8B's shape on three recorded devices. A plan needs the configuration alone; tokens a second are what the
# memory's bandwidth allows at most, not a measurement.

# %%
config = MiniCPM4Config(
    vocab_size=73_448, hidden_size=4096, intermediate_size=16_384, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=2, max_position_embeddings=131_072, sparse_config=InfLLMv2Config().to_dict(),
)  # fmt: skip
for name in ("orin-nano", "agx-orin", "thor"):
    for precision in ("bf16", "int4"):
        try:
            plan = plan_memory(config, device_profile(name), precision=precision, cache="static")
            print(f"{name:14} {precision}: {plan.context:7,} tokens, at most {plan.roofline['full']:5.1f} tokens/s")
        except DoesNotFit as error:
            print(f"{name:14} {precision}: {error.missing_bytes / 1e9:.1f} GB are missing")

# %% [markdown]
# ## An engine, and a draft that copies
#
# SmolLM2-135M, a real pretrained model in MiniCPM4's architecture. The draft copies what followed the same words
# earlier in the text. `compile=False` starts at once; with a compiler and patience, steps are faster.

# %%
text = (
    "The del statement deletes names. Deletion of a target list recursively deletes each target, from left to right. "
    "Deletion of a name removes the binding of that name from the local or global namespace."
)
prompt = [{"role": "user", "content": f"Repeat this text word for word:\n\n{text}"}]
plain = EdgeEngine.from_pretrained(str(smollm2_path()), context=512, compile=False)
drafting = EdgeEngine(plain.model, plain.tokenizer, context=512, compile=False, draft=PromptLookupDraft())

ids = torch.tensor([plain.encode(prompt)])
expected = plain.model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=2)
for name, engine in (("no draft", plain), ("prompt lookup", drafting)):
    answer = engine.generate(prompt, max_new_tokens=40)
    same = answer.token_ids == expected[0, ids.shape[1] :].tolist()
    print(f"{name:14} {len(answer.token_ids)} tokens in {answer.passes} passes; as model.generate: {same}")

# %% [markdown]
# ## Which guesses came true
#
# Each column is one pass of the model: grey what was guessed, green what the model agreed to, and the token above that
# it said itself.


# %%
class Watched(Draft):
    """A draft that writes down how many nodes it gave and how many were accepted."""

    def __init__(self, draft):
        self.draft, self.size, self.passes_seen = draft, draft.size, []

    def begin(self, target):
        super().begin(target)
        self.draft.begin(target)

    def observe(self, token_ids, hidden_states):
        if hidden_states == [] and self.passes_seen and self.passes_seen[-1][1] is None:
            self.passes_seen[-1][1] = len(token_ids) - 1
        self.draft.observe(token_ids, hidden_states)

    def propose(self, token_ids, limit):
        tree = self.draft.propose(token_ids, limit)
        self.passes_seen.append([len(tree), None])
        return tree


watched = Watched(PromptLookupDraft())
engine = EdgeEngine(plain.model, plain.tokenizer, context=512, compile=False, draft=watched)
engine.generate(prompt, max_new_tokens=40)
drafted, accepted = zip(*watched.passes_seen)
places = range(len(drafted))
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.bar(places, drafted, color="lightgrey", label="guessed")
axes.bar(places, accepted, color="tab:green", label="accepted")
axes.scatter(places, [count + 0.5 for count in accepted], color="black", s=12, label="the model's own")
axes.set(xlabel="pass", ylabel="tokens", xticks=list(places))
axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# ## Two turns
#
# What two requests have in common is not read again.

# %%
first = drafting.generate(prompt, max_new_tokens=40)
turns = [
    *prompt,
    {"role": "assistant", "content": first.text},
    {"role": "user", "content": "The first sentence again."},
]
second = drafting.generate(turns, max_new_tokens=24)
print(f"second prompt: {second.prompt_tokens} tokens, {second.reused_tokens} of them in the cache")
print(second.text)

# %% [markdown]
# ## Fewer tokens to score
#
# A draft head spends much of its time on a vocabulary of which few tokens are frequent (FR-Spec). The list is built
# from text like that which will be written; how much of other text it covers says whether it fits.

# %%
from pydoc_data.topics import topics


names = sorted(topics)
corpus, held_out = ([topics[name] for name in names[part::2]] for part in (0, 1))
for size in (512, 1024, 2048, 4096):
    vocabulary = build_frequency_vocabulary(corpus, plain.tokenizer, size)
    share = vocabulary.coverage({"held-out pages": held_out}, plain.tokenizer)["held-out pages"].share
    print(f"{size:5,} of {len(plain.tokenizer):,} tokens cover {share:.1%} of the manual's other pages")
