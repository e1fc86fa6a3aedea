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
# # One model, several runtimes
#
# A checkpoint goes to llama.cpp, and a report says whether it computes the same there. A schema that the answer cannot
# leave. Tool calls, read and checked. At the end a server that OpenAI's client talks to.

# %%
import importlib.util
import subprocess
import sys
import warnings


if importlib.util.find_spec("transformers_minicpm4") is None:  # on Colab
    package = "transformers_minicpm4[notebooks,executors,serve]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package, "openai"], check=True)
warnings.filterwarnings("ignore", "IProgress not found")  # without ipywidgets, progress is shown as text

# %%
import json
import tempfile
import threading
from pathlib import Path

import torch
from IPython.display import Image, display
from transformers.utils.logging import disable_progress_bar

from transformers_minicpm4.cli.assets import smollm2_path
from transformers_minicpm4.edge.alignment import align
from transformers_minicpm4.edge.engine import EdgeEngine
from transformers_minicpm4.edge.executors import CallNotOffered, open_executor
from transformers_minicpm4.edge.executors.gguf_executor import export_gguf
from transformers_minicpm4.generation.constrained import ConstrainedLogitsProcessor, Grammar
from transformers_minicpm4.generation.drafts import PromptLookupDraft
from transformers_minicpm4.generation.responses import parse_response
from transformers_minicpm4.generation.tool_schemas import check_arguments


torch.set_num_threads(2)
disable_progress_bar()
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Export, and compare
#
# The same weights in PyTorch and in llama.cpp, there with layers rounded to 8 bits. The report compares the
# log-probabilities of a text; what is *said* would hide most mistakes.

# %%
TEXT = (
    "The Danube rises in the Black Forest and flows east for 2,850 kilometres, through or along the border of ten "
    "countries, before it empties into the Black Sea. No other river in the world passes through so many capitals."
)
export_gguf(smollm2_path(), folder / "model.gguf", "q8_0")
engine = EdgeEngine.from_pretrained(
    str(smollm2_path()), context=1024, precision="fp32", draft=PromptLookupDraft(), compile=False
)
tokenizer = engine.tokenizer
token_ids = tokenizer(TEXT)["input_ids"]
reference = open_executor(smollm2_path(), 512, dtype="float32")
llama_cpp = open_executor(folder / "model.gguf", 512)
found = align(reference, llama_cpp, token_ids)
print(found.report())

# %% [markdown]
# A mistake that no answer shows: a logit scale that is off by a tenth. The likeliest token is the same everywhere; the
# slope says what is wrong, and by how much.

# %%
with torch.no_grad():
    reference.model.lm_head.weight = torch.nn.Parameter(reference.model.lm_head.weight / 1.1)
wrong = align(reference, llama_cpp, token_ids)
print(wrong.report())
wrong.plot(folder / "pairs.png")
display(Image(folder / "pairs.png", width=420))

# %% [markdown]
# Each runtime declares what it offers. llama.cpp's interface has no check of a drafted tree.

# %%
print(sorted(llama_cpp.calls))
try:
    llama_cpp.prefill(token_ids)
except CallNotOffered as error:
    print(error)
llama_cpp.close()

# %% [markdown]
# ## An answer of a given form
#
# Tokens that would leave the schema are impossible. It works with drafts too: where a draft is refused, the grammar
# goes back with it. The same tokens in fewer passes.

# %%
schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"enum": ["France", "Spain", "Italy"]},
        "million_people": {"type": "integer", "minimum": 0, "maximum": 40},
    },
    "required": ["city", "country", "million_people"],
    "additionalProperties": False,
}
messages = [{"role": "user", "content": f"Describe Paris as JSON. Its schema: {json.dumps(schema)}"}]
prompt = torch.tensor([engine.encode(messages)])


def constraint():
    return [ConstrainedLogitsProcessor(Grammar.json_schema(schema), tokenizer, eos_token_id=tokenizer.eos_token_id)]


plain = engine.model.generate(prompt, max_new_tokens=80, do_sample=False, logits_processor=constraint())
plain = plain[0, prompt.shape[1] :].tolist()
answer = engine.generate(messages, max_new_tokens=80, logits_processor=constraint())
print("without drafts:", tokenizer.decode(plain, skip_special_tokens=True), f"({len(plain)} tokens, as many passes)")
print("with drafts:", json.loads(answer.text), f"({len(answer.token_ids)} tokens in {answer.passes} passes)")
print("the same tokens:", plain == answer.token_ids)

# %% [markdown]
# ## Tool calls
#
# MiniCPM4 calls tools in Python. The text is read, never evaluated; a call that cannot be read comes back with a
# sentence for the model, and so does one whose arguments the tool's schema refuses.

# %%
WRITTEN = """<|thought_start|>
Both cities, and the exchange rate.
<|thought_end|>
<|tool_call_start|>
```python
get-weather(city="Bern", days="3")
get-weather(city="Basel", options={"unit": "C", "wind": None})
get-rate(currency=chf)
```
<|tool_call_end|>"""
tools = [
    {
        "type": "function",
        "function": {
            "name": "get-weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "options": {"type": "object"}},
                "required": ["city"],
            },
        },
    }
]
response = parse_response(WRITTEN)
print("thought:", response.thinking.strip())
for call in response.tool_calls:
    print("call:", call.name, call.arguments)
for error in response.errors:
    print("not read:", error.message)
for sentence in check_arguments(response.tool_calls, tools):
    print("refused:", sentence)

# %% [markdown]
# ## A server
#
# `minicpm4 serve MODEL` from the shell; here the same app in a thread, over the engine from above.

# %%
import openai

from transformers_minicpm4.edge.server import listen, make_app, make_server


listener = listen("127.0.0.1", 0)
ready = threading.Event()
server = make_server(make_app(engine, "smollm2"), on_ready=ready.set)
thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
thread.start()
ready.wait(60)
client = openai.OpenAI(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", api_key="none")
stream = client.chat.completions.create(
    model="smollm2",
    messages=[{"role": "user", "content": "Count from one to five."}],
    temperature=0,
    max_tokens=40,
    stream=True,
)
print("streamed:", "".join(chunk.choices[0].delta.content or "" for chunk in stream).split())
answer = client.chat.completions.create(
    model="smollm2",
    messages=[{"role": "user", "content": "The capital of France, as JSON."}],
    temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
)
print("in form:", json.loads(answer.choices[0].message.content))
try:
    client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "Hi"}], temperature=7)
except openai.BadRequestError as error:
    print("refused:", error.body["message"])
server.should_exit = True
thread.join(30)
