"""A task with answers that can be checked and replies of very different lengths, for real GRPO runs on a CPU."""

from __future__ import annotations

import random
import string

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    characters = [*"\n +=|", *string.digits, *string.ascii_lowercase]
    vocabulary = {name: number for number, name in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_policy(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 43,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))


def prompts(count: int = 64, seed: int = 0) -> Dataset:
    chooser = random.Random(seed)
    rows = []
    for _ in range(count):
        digits = [chooser.randrange(10) for _ in range(chooser.randint(2, 6))]
        rows.append({"prompt": "".join(map(str, digits)) + "=", "answer": str(sum(digits) % 10)})
    return Dataset.from_list(rows)


def share_of_digits(prompts, completions, **kwargs):
    """A reward that an untrained policy gets part of, and that differs within a group."""
    return [sum(character.isdigit() for character in text) / (1 + len(text)) for text in completions]


def settings(folder, **changes) -> dict:
    """Of a run of seconds on one CPU thread: 2 prompts x 4 completions of at most 24 tokens a batch."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **changes,
    }


def make_trainer(folder, model=None, reward=share_of_digits, dataset=None, **changes):
    """A `ChunkwiseGRPOTrainer` of `settings`, six tokens a chunk."""
    from transformers_minicpm4.rl import ChunkwiseGRPOConfig, ChunkwiseGRPOTrainer

    own = {name: changes.pop(name) for name in ("peft_config", "callbacks", "eval_dataset") if name in changes}
    return ChunkwiseGRPOTrainer(
        make_policy() if model is None else model,
        reward,
        args=ChunkwiseGRPOConfig(**settings(folder, **{"chunk_length": 6, **changes})),
        train_dataset=prompts() if dataset is None else dataset,
        processing_class=make_tokenizer(),
        **own,
    )
