# /// script
# dependencies = ["transformers_minicpm4[rl]"]
# ///
"""
Reinforcement learning whose longest replies hold nothing up: chunk-wise GRPO of a small model, from nothing.

The task is a running sum: `a3b2c3d3?` is to be answered by `a3=3 b2=5 c3=8 d3=1 =1`, sums modulo 10, and the reward is
1 where the last number is right. Most lists are short and a few are long, so reply lengths have a long tail. A model
of 0.3 M parameters first learns the format from examples, then from its own replies. A minute on a CPU:

    python examples/chunkwise_grpo.py

Longer, with another chunk, and with every setting of `ChunkwiseGRPOConfig` (TRL's `GRPOConfig` and ours) an argument:

    python examples/chunkwise_grpo.py \
        --max_steps 120 --chunk_length 32 --max_staleness 8 --output_dir outputs/running_sum

For a model and data of your own take the same trainer, or `minicpm4 grpo`; docs/chunkwise_grpo.md explains it.
"""

import math
import random
import string
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import TrlParser

from transformers_minicpm4 import MiniCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.rl import ChunkwiseGRPOConfig, ChunkwiseGRPOTrainer


LABELS = string.ascii_letters
# Tokens of the longest reply: 5 for each of 50 digits, 2 for the answer, 1 for the end.
REPLY_LENGTH = 256


@dataclass
class ScriptArguments:
    warm_start_steps: int = field(default=180, metadata={"help": "Supervised steps of 16 worked examples."})
    problems: int = field(default=4096, metadata={"help": "Different prompts to train on."})
    tested: int = field(default=128, metadata={"help": "Other prompts, one reply each, to measure accuracy on."})


@dataclass
class TrainingArguments(ChunkwiseGRPOConfig):
    """TRL's settings and ours; the defaults here are for a minute on a CPU."""

    output_dir: str = "outputs/chunkwise_grpo"
    max_steps: int = 24
    per_device_train_batch_size: int = 32
    num_generations: int = 4
    max_completion_length: int = REPLY_LENGTH
    learning_rate: float = 5e-4
    lr_scheduler_type: str = "constant"
    dynamic_sampling: bool = False
    logging_steps: float = 1
    save_strategy: str = "no"
    report_to: str = "none"
    gradient_checkpointing: bool = False
    bf16: bool = field(default_factory=torch.cuda.is_available)
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    disable_tqdm: bool = True


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {name: number for number, name in enumerate(["<pad>", "<eos>", *"?= ", *string.digits, *LABELS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_policy(seed: int = 0) -> MiniCPM4ForCausalLM:
    torch.manual_seed(seed)
    config = MiniCPM4Config(
        vocab_size=5 + len(string.digits + LABELS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        dim_model_base=128,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return MiniCPM4ForCausalLM(config)


def problem(chooser: random.Random) -> dict[str, str]:
    """Replies are log-normal in length: median 28 tokens, sigma 1, at most 253."""
    size = min(max(round(5 * math.exp(chooser.gauss(0, 1))), 1), 50)
    total, prompt, reply = 0, "", ""
    for label in LABELS[:size]:
        digit = chooser.randrange(4)
        total = (total + digit) % 10
        prompt += f"{label}{digit}"
        reply += f"{label}{digit}={total} "
    return {"prompt": f"{prompt}?", "reply": f"{reply}={total}", "answer": str(total)}


def problems(count: int, seed: int) -> Dataset:
    chooser = random.Random(seed)
    return Dataset.from_list([problem(chooser) for _ in range(count)])


def right_answer(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """1 where what follows the last `=` is the answer, and nothing else."""
    return [float(text.rpartition("=")[2] == wanted) for text, wanted in zip(completions, answer)]


def warm_start(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int = 0) -> None:
    """Learn from worked examples, 16 of like length a step, with the loss on the reply."""
    chooser = random.Random(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30, 3 * (steps - step) / steps)
    )
    policy.train()
    batches = []
    for _ in range(steps):
        if not batches:
            rows = sorted((problem(chooser) for _ in range(16 * 8)), key=lambda row: len(row["prompt"]))
            batches = [rows[first : first + 16] for first in range(0, len(rows), 16)]
            chooser.shuffle(batches)
        rows = batches.pop()
        batch = tokenizer([f"{row['prompt']}{row['reply']}<eos>" for row in rows], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for line, row in zip(labels, rows):
            line[: len(row["prompt"])] = -100
        policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Dataset) -> float:
    """Share of right answers, one reply a prompt, sampled at temperature 1."""
    policy.eval()
    # Of like length, 32 at a time: a short reply does not wait for a long one.
    rows = sorted(rows, key=lambda row: len(row["prompt"]))
    right = 0.0
    for first in range(0, len(rows), 32):
        part = rows[first : first + 32]
        batch = tokenizer([row["prompt"] for row in part], padding=True, padding_side="left", return_tensors="pt").to(
            policy.device
        )
        ids = policy.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=REPLY_LENGTH,
        )
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(right_answer(texts, [row["answer"] for row in part]))
    return right / len(rows)


class ProgressTable(TrainerCallback):
    """The figures that tell how chunk-wise rollouts are doing; `report_to` gets all of them."""

    columns = {
        "reward": "reward",
        "live rows": "rollout/live_rows",
        "slots used": "rollout/slot_utilization",
        "staleness": "rollout/staleness/mean",
        "generated / trained": "rollout/tokens_generated_per_trained",
        "mean length": "completions/mean_length",
    }

    def on_train_begin(self, args, state, control, **kwargs):
        print("| step | " + " | ".join(self.columns) + " |")
        print("| --- |" + " --- |" * len(self.columns))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            print(f"| {state.global_step} | " + " | ".join(f"{logs[key]:.2f}" for key in self.columns.values()) + " |")


def main(argv: list[str] | None = None) -> ChunkwiseGRPOTrainer:
    script, training = TrlParser((ScriptArguments, TrainingArguments)).parse_args_and_config(argv)
    tokenizer, policy = make_tokenizer(), make_policy(training.seed)
    tested = problems(script.tested, seed=-1)
    warm_start(policy, tokenizer, script.warm_start_steps, training.seed)
    before = accuracy(policy, tokenizer, tested)
    print(f"after the warm start: {before:.2f} of {script.tested} answers right\n")
    trainer = ChunkwiseGRPOTrainer(
        model=policy,
        reward_funcs=right_answer,
        args=training,
        train_dataset=problems(script.problems, training.seed),
        processing_class=tokenizer,
        callbacks=[ProgressTable()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    after = accuracy(policy, tokenizer, tested)
    print(f"\nafter {training.max_steps} steps: {after:.2f} of {script.tested} answers right")
    return trainer


if __name__ == "__main__":
    main()
