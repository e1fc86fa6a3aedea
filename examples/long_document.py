"""
Ask about a long document, with sparse attention on and off: python examples/long_document.py [QUESTION]

Needs the weights that `make assets` makes; MODEL=openbmb/MiniCPM4-0.5B and the like work the same.
"""

import os
import sys
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_minicpm4 import InfLLMv2Config
from transformers_minicpm4.cli.assets import smollm2_path


name = os.environ.get("MODEL") or smollm2_path()
question = sys.argv[1] if len(sys.argv) > 1 else "What are lambda expressions used for?"

# Of the 64-token blocks before it, a token reads the first, its own and 4 neighbours, and the 6 it scores highest.
sparse = InfLLMv2Config(topk=8, window_size=256, dense_len=1024)
model = AutoModelForCausalLM.from_pretrained(name, sparse_config=sparse.to_dict())
tokenizer = AutoTokenizer.from_pretrained(name)

# Some 2,500 tokens of the Python language reference, which every interpreter carries.
chapters = ("assert", "while", "pass", "del", "return", "lambda", "global", "with", "numbers")
document = "\n\n".join(topics[chapter] for chapter in chapters)
messages = [{"role": "user", "content": f"{document}\n\n{question}"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
length = inputs["input_ids"].shape[1]
blocks = -(-length // sparse.block_size)

for attention in ("infllm_v2", "sdpa"):
    model.set_attn_implementation(attention)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()
    read = min(sparse.selected_blocks, blocks) if attention == "infllm_v2" else blocks
    print(f"{attention}: the answer's first token read {read} of {blocks} blocks ({read / blocks:.0%})\n{answer}\n")
