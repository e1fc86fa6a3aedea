# /// script
# dependencies = ["transformers_minicpm4[rl,edge]"]
# ///
"""
Fine-tune MiniCPM4 on conversations with sparse attention on, and with the loss on the assistant's words alone.

LoRA. Without arguments a real 135 M model learns to answer with a sentence and its source, in a minute on a CPU:

    python examples/sft_lora.py

    python examples/sft_lora.py \
        --model_name_or_path openbmb/MiniCPM4-0.5B \
        --dataset_name trl-lib/Capybara \
        --topk 64 --window_size 2048 --dense_len 8192 --max_length 16384 \
        --max_steps -1 --num_train_epochs 1 --gradient_accumulation_steps 8 --learning_rate 2e-4 \
        --eval_rows 50 --output_dir MiniCPM4-0.5B-Capybara-LoRA

All weights, on conversations of your own:

    python examples/sft_lora.py \
        --full \
        --model_name_or_path openbmb/MiniCPM4-0.5B \
        --dataset_name conversations.jsonl \
        --topk 64 --window_size 2048 --dense_len 8192 --max_length 16384 \
        --max_steps -1 --num_train_epochs 1 --gradient_accumulation_steps 8 --learning_rate 2e-5 \
        --eval_rows 50 --output_dir MiniCPM4-0.5B-conversations

Any setting of TRL's `SFTConfig` is an argument, and `--config FILE.yaml` reads them from a file. docs/training.md says
what to choose, and how to load, merge and publish the result.
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
        default=None, metadata={"help": "Hub id or folder. Default: SmolLM2-135M-Instruct as `make assets` made it."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id or .json(l) file with a `messages` column. Default: the Python language reference."},
    )
    eval_rows: int = field(default=2, metadata={"help": "Conversations kept back to measure the loss on."})
    chat_template: str = field(default="minicpm4", metadata={"help": "minicpm4 or minicpm4.1."})
    topk: int = field(default=2, metadata={"help": "Blocks of 64 tokens that a query reads beside its window."})
    window_size: int = field(default=64, metadata={"help": "Nearest tokens, always read."})
    dense_len: int = field(default=-1, metadata={"help": "Attention is dense below this many tokens; -1: never."})
    full: bool = field(default=False, metadata={"help": "Train all weights instead of a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's settings, gradient checkpointing among them; the defaults here are for a minute on a CPU."""

    output_dir: str = "outputs/sft_lora"
    assistant_only_loss: bool = True
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    max_steps: int = 10
    per_device_train_batch_size: int = 1
    logging_steps: float = 1
    save_strategy: str = "no"
    bf16: bool = field(default_factory=torch.cuda.is_available)
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)


def reference_conversations(seed: int = 0) -> Dataset:
    """Two passages of the Python language reference each, answered by their first sentence and where it stands."""
    passages = {}
    for topic, text in topics.items():
        title, *paragraphs = re.split(r"\n{2,}|\n[*=-]+\n", text)
        paragraphs = [" ".join(paragraph.split()) for paragraph in paragraphs if re.match(r"[A-Z]", paragraph)]
        for passage in [paragraph for paragraph in paragraphs if 150 < len(paragraph) < 400][:1]:
            answer = re.split(r"(?<=[.:]) ", passage)[0]
            passages[passage] = [
                {"role": "user", "content": f"{title}\n\n{passage}\n\nWhat is this about?"},
                {"role": "assistant", "content": f"{answer} (Python language reference, help({topic!r}))"},
            ]
    exchanges = list(passages.values())
    random.Random(seed).shuffle(exchanges)
    pairs = range(0, len(exchanges) - 1, 2)
    return Dataset.from_dict({"messages": [exchanges[first] + exchanges[first + 1] for first in pairs]})


def main(argv: list[str] | None = None) -> SFTTrainer:
    script, training = TrlParser((ScriptArguments, TrainingArguments)).parse_args_and_config(argv)
    if script.dataset_name is None:
        dataset = reference_conversations()
    elif Path(script.dataset_name).suffix in (".json", ".jsonl"):
        dataset = load_dataset("json", data_files=script.dataset_name, split="train")
    else:
        dataset = load_dataset(script.dataset_name, split="train")
    dataset = dataset.train_test_split(test_size=script.eval_rows, seed=training.seed)

    name = script.model_name_or_path or str(smollm2_path())
    sparse_config = InfLLMv2Config(topk=script.topk, window_size=script.window_size, dense_len=script.dense_len)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        attn_implementation="infllm_v2",
        sparse_config=sparse_config.to_dict(),
        # Weights that are trained themselves stay in float32: in bfloat16 a small step rounds away.
        dtype=torch.bfloat16 if training.bf16 and not script.full else torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = chat_template(script.chat_template, training=True)
    # No target_modules: `import transformers_minicpm4` has told PEFT that they are the seven linears of a layer.
    lora = LoraConfig(task_type="CAUSAL_LM", r=script.lora_r, lora_alpha=2 * script.lora_r)
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        peft_config=None if script.full else lora,
    )
    # The data is tokenized; from here on the tokenizer has the form that belongs beside the weights it is saved with.
    tokenizer.chat_template = chat_template(script.chat_template)

    longest = max(len(row) for row in trainer.train_dataset["input_ids"])
    most = sparse_config.selected_blocks * sparse_config.block_size
    print(f"conversations of up to {longest} tokens; where attention is sparse, a token reads {most} of them")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"loss on {script.eval_rows} conversations kept back: {before:.3f} before training, {after:.3f} after")
    print(f"saved to {training.output_dir}")
    return trainer


if __name__ == "__main__":
    main()
