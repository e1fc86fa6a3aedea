# /// script
# dependencies = ["transformers_minicpm4[data]", "matplotlib"]
# ///
"""
Does a corpus help? Ask a small annealing run before the large training run does.

Without arguments everything comes from this Python: a tiny Llama learns the docstrings of the standard library (the
stable phase), then two candidates for its decay phase are verified: sections of the Python language reference, and
docstrings with their words shuffled. A minute on a CPU, most of it training:

    python examples/efficient_verification.py

Your own checkpoint and corpora, JSON lines or parquet with a column `text`:

    python examples/efficient_verification.py \
        --model openbmb/MiniCPM4-0.5B \
        --base base.jsonl --candidate candidate.jsonl --evaluation manuals=manuals.jsonl --evaluation wiki=wiki.jsonl \
        --steps 500 --batch_size 64 --block_length 2048 --learning_rate 1e-4 --seeds 0 1 2 3 4 \
        --output_dir outputs/candidate

The second call with the same arguments goes on where the first one ended. docs/efficient_verification.md says how to
read the table.
"""

import argparse
import ast
import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from transformers_minicpm4.data.ultraclean.verification import Mixture, Packed, efficient_verification


EOS = "<|end|>"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--model", help="folder or Hub id of a causal language model before its decay phase")
    parser.add_argument("--base", help="file of the mix that training would use anyway")
    parser.add_argument("--candidate", help="file of the corpus under test")
    parser.add_argument("--evaluation", action="append", metavar="DOMAIN=FILE", help="held-out file of a domain")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/efficient_verification"))
    parser.add_argument("--stable_steps", type=int, default=200, help="of the tiny model; unused with --model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--block_length", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--candidate_share", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    given = [bool(getattr(arguments, name)) for name in ("model", "base", "candidate", "evaluation")]
    if any(given) and not all(given):
        parser.error("--model, --base, --candidate and --evaluation go together; give all of them or none")
    return arguments


def docstrings() -> list[str]:
    """Of modules, classes and functions of the standard library, read without importing it."""
    found = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    found[text] = None
    return list(found)


def shuffle_words(text: str, generator: random.Random) -> str:
    words = text.split()
    generator.shuffle(words)
    return " ".join(words)


def sections(text: str, length: int = 600) -> list[str]:
    """Whole paragraphs of at least `length` characters together."""
    found, current = [], ""
    for paragraph in text.strip().split("\n\n"):
        current = f"{current}\n\n{paragraph}" if current else paragraph
        if len(current) >= length:
            found.append(current)
            current = ""
    return [*found, current] if current else found


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=1024, special_tokens=[EOS], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=EOS)


def stable_phase(tokenizer, texts: list[str], arguments) -> LlamaForCausalLM:
    """A tiny Llama trained with a constant learning rate, as a WSD run is before its decay."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, verbose=False)["input_ids"]]
    lengths, largest = [len(row) for row in rows], [max(row) for row in rows]
    packed = Packed(
        Dataset.from_dict({"input_ids": rows, "length": lengths, "largest": largest}), arguments.block_length
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=str(arguments.output_dir / "stable"),
            max_steps=arguments.stable_steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=min(20, arguments.stable_steps // 2),
            train_sampling_strategy="sequential",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Mixture(packed, None, arguments.stable_steps * arguments.batch_size, 1, seed=0),
        data_collator=default_data_collator,
    )
    trainer.train()
    return trainer.model.cpu()


def load(path: str) -> Dataset:
    kind = "parquet" if path.endswith(".parquet") else "json"
    return load_dataset(kind, data_files=path, split="train")


def verify(arguments, model, tokenizer, base, candidate, evaluation, output_dir):
    report = efficient_verification(
        model,
        tokenizer,
        base,
        candidate,
        evaluation,
        output_dir,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        block_length=arguments.block_length,
        learning_rate=arguments.learning_rate,
        candidate_share=arguments.candidate_share,
        seeds=arguments.seeds,
        on_leak="remove",
    )
    print(report.to_markdown())
    return report


def main(argv: list[str] | None = None) -> list:
    arguments = parse_arguments(argv)
    if arguments.model:
        evaluation = dict(pair.split("=", 1) for pair in arguments.evaluation)
        evaluation = {name: load(path) for name, path in evaluation.items()}
        base, candidate = load(arguments.base), load(arguments.candidate)
        return [verify(arguments, arguments.model, arguments.model, base, candidate, evaluation, arguments.output_dir)]

    disable_progress_bars()
    generator = random.Random(0)
    chapters = [sections(text) for text in topics.values()]
    generator.shuffle(chapters)  # whole chapters are held out: neighbouring sections would be too easy
    known = docstrings()
    generator.shuffle(known)
    held_out = {"docstrings": known[::10], "reference": sum(chapters[::5], [])}
    known = [text for number, text in enumerate(known) if number % 10]
    reference = sum((chapter for number, chapter in enumerate(chapters) if number % 5), [])
    trained = {*known, *reference}
    held_out = {name: [text for text in texts if text not in trained] for name, texts in held_out.items()}
    tokenizer = train_tokenizer(known)
    model = stable_phase(tokenizer, known, arguments)
    candidates = {"reference": reference, "shuffled": [shuffle_words(text, generator) for text in known]}
    evaluation = {name: Dataset.from_dict({"text": documents}) for name, documents in held_out.items()}
    reports = []
    for name, documents in candidates.items():
        print(f"## Candidate: {name}\n")
        base, candidate = Dataset.from_dict({"text": known}), Dataset.from_dict({"text": documents})
        reports.append(verify(arguments, model, tokenizer, base, candidate, evaluation, arguments.output_dir / name))
    return reports


if __name__ == "__main__":
    main()
