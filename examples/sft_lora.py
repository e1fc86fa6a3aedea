# /// script
# dependencies = ["transformers_minicpm4[rl,edge]"]
# ///
"""
Fine-tune MiniCPM4 on conversations, with sparse attention on and the loss on the assistant's words alone.

LoRA (without arguments: a real 135 M model on questions about the Python language reference, under a minute on a CPU):

    python examples/sft_lora.py

    python examples/sft_lora.py \
        --model_name_or_path openbmb/MiniCPM4-0.5B \
        --dataset_name trl-lib/Capybara \
        --topk 64 --window_size 2048 --dense_len 8192 --max_length 16384 \
        --max_steps -1 --num_train_epochs 1 --gradient_accumulation_steps 8 --learning_rate 2e-4 \
        --output_dir MiniCPM4-0.5B-capybara-lora

All weights:

    python examples/sft_lora.py \
        --full \
        --model_name_or_path openbmb/MiniCPM4-0.5B \
        --dataset_name conversations.jsonl \
        --topk 64 --window_size 2048 --dense_len 8192 --max_length 16384 \
        --max_steps -1 --num_train_epochs 1 --gradient_accumulation_steps 8 --learning_rate 2e-5 \
        --output_dir MiniCPM4-0.5B-conversations

The adapter and the tokenizer are written to `output_dir`; docs/training.md says how to load, merge and publish them.
"""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

from transformers_minicpm4 import InfLLMv2Config
from transformers_minicpm4.cli.assets import smollm2_path
from transformers_minicpm4.generation.chat import chat_template


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder. Default: SmolLM2-135M-Instruct as made by `make assets`."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id or .jsonl file with a `messages` column. Default: the Python language reference."},
    )
    chat_template: str = field(default="minicpm4", metadata={"help": "minicpm4 or minicpm4.1."})
    topk: int = field(default=2, metadata={"help": "Blocks of 64 tokens that a query reads beside its window."})
    window_size: int = field(default=128, metadata={"help": "Nearest tokens, always read."})
    dense_len: int = field(default=-1, metadata={"help": "Length in tokens below which attention is dense; -1: 0."})
    full: bool = field(default=False, metadata={"help": "Train all weights instead of a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's own settings (gradient checkpointing among them) with defaults for a minute on a CPU."""

    output_dir: str = "outputs/sft_lora"
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    max_steps: int = 12
    max_length: int = 512
    per_device_train_batch_size: int = 1
    assistant_only_loss: bool = True
    logging_steps: float = 1
    save_strategy: str = "no"
    bf16: bool = field(default_factory=torch.cuda.is_available)


def reference_questions(num_rows: int = 64, passages: int = 5, seed: int = 0) -> Dataset:
    """Conversations over the Python language reference: several passages, and the first sentence of one of them."""
    openings = {}
    for text in topics.values():
        title, _, body = text.partition("\n")
        paragraphs = [part for part in re.split(r"\n{2,}", body.lstrip("*=-\n")) if re.match(r"[A-Z]", part)]
        if paragraphs and 150 < len(paragraphs[0]) < 700:
            openings[title] = " ".join(paragraphs[0].split())
    chance = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        chosen = chance.sample(sorted(openings), passages)
        asked = chance.choice(chosen)
        document = "\n\n".join(f"{title}\n{openings[title]}" for title in chosen)
        first_sentence = re.split(r"(?<=[.:]) ", openings[asked])[0]
        question = f"{document}\n\nHow does the passage on {asked} begin?"
        rows.append([{"role": "user", "content": question}, {"role": "assistant", "content": first_sentence}])
    return Dataset.from_dict({"messages": rows})


def main(argv: list[str] | None = None) -> SFTTrainer:
    script, training = TrlParser((ScriptArguments, TrainingArguments)).parse_args_and_config(argv)
    if script.dataset_name is None:
        dataset = reference_questions()
    elif Path(script.dataset_name).is_file():
        dataset = load_dataset("json", data_files=script.dataset_name, split="train")
    else:
        dataset = load_dataset(script.dataset_name, split="train")

    sparse_config = InfLLMv2Config(topk=script.topk, window_size=script.window_size, dense_len=script.dense_len)
    name = script.model_name_or_path or str(smollm2_path())
    model = AutoModelForCausalLM.from_pretrained(
        name,
        sparse_config=sparse_config.to_dict(),
        attn_implementation="infllm_v2",
        dtype=torch.bfloat16 if training.bf16 and not script.full else torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = chat_template(script.chat_template, training=True)
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        processing_class=tokenizer,
        # No target modules: transformers_minicpm4 has told PEFT which linears these are.
        peft_config=None if script.full else LoraConfig(task_type="CAUSAL_LM", r=script.lora_r),
    )
    # The trainer has tokenized the data by now. What it saves has the form for inference, which renders the same text.
    tokenizer.chat_template = chat_template(script.chat_template)

    length = max(len(row) for row in trainer.train_dataset["input_ids"])
    print(
        f"{len(dataset)} conversations of up to {length} tokens, of which a query reads at most "
        f"{sparse_config.selected_blocks * sparse_config.block_size} where attention is sparse"
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model()
    print(f"loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last; saved to {training.output_dir}")
    return trainer


if __name__ == "__main__":
    main()
