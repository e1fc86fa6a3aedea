"""
What efficient verification finds on a test bed where the answer is known.

Manuals of Debian packages against index pages and message catalogues (`--data en.jsonl.gz`: JSON lines with `text`,
`pool` and `source_set`); held out are three whole manuals and, with `--wikitext`, Wikipedia. A small Llama is trained
with a constant learning rate on half manuals, half raw text; candidates are other manuals of the same packages, and
other raw text.

    python benchmarks/bench_verification.py --data en.jsonl.gz --wikitext test.parquet --json verification.json
"""

import argparse
import gzip
import json
import random
import tempfile
import time

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from harness import report
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


HELD_OUT = ("en.pos.handbook", "en.pos.reference", "en.pos.maintguide")
BLOCK, BATCH, RATE = 128, 8, 2e-3
EVALUATED = 300_000  # characters of each domain


def stable_phase(tokenizer, texts: list[str], steps: int) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, verbose=False)["input_ids"]]
    columns = {"input_ids": rows, "length": [len(row) for row in rows], "largest": [max(row) for row in rows]}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=LlamaForCausalLM(config),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=RATE,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=50,
                train_sampling_strategy="sequential",
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Mixture(Packed(Dataset.from_dict(columns), BLOCK), None, steps * BATCH, 1, seed=0),
            data_collator=default_data_collator,
        )
        trainer.train()
    return trainer.model.cpu()


def first(texts: list[str]) -> list[str]:
    """As many as EVALUATED characters need."""
    taken, size = [], 0
    for text in texts:
        if size < EVALUATED:
            taken.append(text)
            size += len(text)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--wikitext")
    parser.add_argument("--stable_steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    disable_progress_bars()

    pools = {"prose": [], "raw": []}
    held_out = []
    with gzip.open(arguments.data, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            (held_out if row["source_set"] in HELD_OUT else pools[row["pool"]]).append(row["text"])
    generator = random.Random(0)
    for texts in pools.values():
        texts[:] = dict.fromkeys(texts)
        generator.shuffle(texts)
    generator.shuffle(held_out)
    half = min(map(len, pools.values())) // 2
    base = pools["prose"][:half] + pools["raw"][:half]
    candidates = {"manuals": pools["prose"][half:], "raw": pools["raw"][half:]}
    evaluation = {"held-out manuals": held_out}
    if arguments.wikitext:
        lines = load_dataset("parquet", data_files=arguments.wikitext, split="train")
        evaluation["wikitext-2"] = [text for text in lines["text"] if text.strip()]
    evaluation = {name: Dataset.from_dict({"text": first(texts)}) for name, texts in evaluation.items()}

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(base, vocab_size=2048, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|end|>")
    model = stable_phase(tokenizer, base, arguments.stable_steps)

    rows = []
    for name, texts in candidates.items():
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = efficient_verification(
                model,
                tokenizer,
                Dataset.from_dict({"text": base}),
                Dataset.from_dict({"text": texts}),
                evaluation,
                folder,
                steps=arguments.steps,
                batch_size=BATCH,
                block_length=BLOCK,
                learning_rate=RATE,
                seeds=range(arguments.seeds),
                on_leak="remove",
            )
        for domain, result in found.domains.items():
            rows.append(
                {
                    "candidate": name,
                    "domain": domain,
                    "start": round(result.start, 4),
                    "base": [round(loss, 4) for loss in result.base],
                    "with candidate": [round(loss, 4) for loss in result.candidate],
                    "difference": round(result.difference, 4),
                    "interval": [round(end, 4) for end in result.interval],
                    "verdict": result.verdict,
                    "confidence": found.confidence,
                    "left_out": found.left_out,
                    "data": found.data,
                    "cpu_seconds_of_all_runs": round(time.process_time() - start, 1),
                    "settings": found.settings,
                }
            )
    report(rows, ["candidate", "domain", "start", "difference", "interval", "verdict"], arguments.json)


if __name__ == "__main__":
    main()
