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
# # UltraClean: from seeds to a filtered corpus
#
# A small classifier learns what good text looks like from two pools of seeds and scores a corpus with it; a small
# annealing run then says whether what was kept helps. Everything here comes from this Python and its packages, and
# runs on a CPU in about a minute. `examples/ultraclean_pipeline.py` is the same as a script, for your own corpora.

# %%
import importlib.util
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path


if importlib.util.find_spec("transformers_minicpm4") is None:  # on Colab
    package = "transformers_minicpm4[data,notebooks]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
warnings.filterwarnings("ignore", "IProgress not found")  # without ipywidgets, progress is shown as text

# %%
import ast
import random
import sysconfig
from importlib import metadata
from pydoc_data.topics import topics

from datasets import Dataset, disable_progress_bars

from transformers_minicpm4.data.ultraclean import (
    QualityFilter,
    QualityScorer,
    efficient_verification,
    mine,
    plot_scores,
    summarize,
)


disable_progress_bars()
logging.getLogger("transformers_minicpm4").setLevel(logging.ERROR)
folder = Path(tempfile.mkdtemp())
generator = random.Random(0)

# %% [markdown]
# ## Text
#
# Good: the language reference. Bad: lists of files. The corpus to be filtered holds more of both, and docstrings,
# program text and package descriptions, of which the seeds know nothing.


# %%
def pieces(text, length=600):
    return [text[start : start + length] for start in range(0, len(text) - 100, length)]


reference = [piece for text in topics.values() for piece in pieces(text)]
records = [p for package in metadata.distributions() for p in pieces(package.read_text("RECORD") or "")[:3]]
stories = [p for package in metadata.distributions() for p in pieces(package.metadata.get_payload() or "")[:3]]
library = [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
nodes = [node for text in library for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
docstrings = [text for node in nodes if len(text := ast.get_docstring(node) or "") > 200]
code = [piece for text in library for piece in pieces(text)[5:8]]
for texts in (reference, records, stories, docstrings, code):
    generator.shuffle(texts)

seeds = {
    "reference": Dataset.from_dict({"text": reference[:300], "label": ["pos"] * 300}),
    "records": Dataset.from_dict({"text": records[:150], "label": ["neg"] * 150}),
}
pools = {
    "reference": reference[300:600],
    "records": records[150:300],
    "docstrings": docstrings[:300],
    "code": code[:300],
    "descriptions": stories[:300],
}
rows = [{"text": text, "source": source} for source, texts in pools.items() for text in texts]
rows += [{"text": "", "source": "reference"}, {"text": None, "source": "code"}]
generator.shuffle(rows)
corpus = Dataset.from_list(rows)
print(f"{len(corpus):,} documents, {sum(len(row['text'] or '') for row in rows):,} characters")

# %% [markdown]
# ## Train, and mine one round
#
# The paper's settings are the defaults; with so few seeds more epochs are needed. Mining scores the corpus, takes
# what the classifier is sure of as further seeds, and trains again; it stops when that no longer helps on held-out
# documents.

# %%
small = {"bucket": 20_000, "dim": 32, "epochs": 15, "lr": 0.3}
mined = mine(seeds, corpus, folder / "classifier", rounds=1, **small)
for entry in mined["rounds"]:
    print(f"round {entry['round']}: AUC {entry['overall']['auc']:.3f} on held-out seeds; mined {entry['mined']}")

# %% [markdown]
# ## Score and filter
#
# Every row stays and gets a score, or the reason why it has none. Filtering is a step of its own, and counts.

# %%
scored = corpus.map(QualityScorer(mined["best"]["file"]), batched=True)
kept, diverted, counts = QualityFilter(0.5).split(scored)
print(counts)
summary = summarize(scored)
plot_scores(summary, folder / "scores.png")

# %%
from IPython.display import Image


Image(folder / "scores.png", width=480)

# %% [markdown]
# ## Does it help?
#
# A tiny Llama, annealed from the same weights with the same steps three times with the corpus as it is, and three
# times with 30 % of its tokens from what was kept. The verdict is about this much data and this small a model, and
# says so when the difference is not beyond noise.

# %%
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging


transformers_logging.set_verbosity_error()
bpe = ByteLevelBPETokenizer()
texts = [text for text in corpus["text"] if text]
bpe.train_from_iterator(texts, vocab_size=600, special_tokens=["<end>"], show_progress=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=0, tie_word_embeddings=True,
    )
)  # fmt: skip
evaluation = {
    "reference": Dataset.from_dict({"text": reference[600:700]}),
    "records": Dataset.from_dict({"text": records[300:380]}),
}
base = Dataset.from_dict({"text": texts})
report = efficient_verification(
    model, tokenizer, base, kept.select_columns(["text"]), evaluation, folder / "verification",
    steps=40, batch_size=16, block_length=64, learning_rate=5e-3, on_leak="remove",
)  # fmt: skip
print(report.summary)
print(report.to_markdown())
