# /// script
# dependencies = ["transformers_minicpm4"]
# ///
"""
A model with ternary weights: full-weight QAT of SmolLM2-135M with the ordinary Trainer, then 2 bits a weight on disk.

Prints the held-out log-perplexity of the model in full precision, rounded to ternary without training, and trained as
a ternary model; then of the packed checkpoint, loaded again. Without arguments a minute on a CPU, enough to see
the direction (`make assets` fetches the weights); the real run is benchmarks/bench_bitcpm4_qat.py:

    python examples/bitcpm4.py
    python examples/bitcpm4.py --text train.txt --held_out test.txt --steps 200 --batch_size 8 --length 512

docs/bitcpm4.md explains the recipe.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from transformers_minicpm4.cli.assets import smollm2_path
from transformers_minicpm4.quantization.bitcpm4.configuration import BitCPM4Config
from transformers_minicpm4.quantization.bitcpm4.qat import set_qat
from transformers_minicpm4.quantization.bitcpm4.quantizer import BitCPM4Quantizer, packed_sizes
from transformers_minicpm4.quantization.bitcpm4.recipe import TernaryMonitorCallback, rewarmed_wsd_schedule


WIKITEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--model", help="folder or Hub id; by default what `make assets` made")
    parser.add_argument("--text", type=Path, help="text or parquet file to train on")
    parser.add_argument("--held_out", type=Path, help="text or parquet file to measure on")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--eval_blocks", type=int, default=2, help="blocks of the held-out text to measure on")
    parser.add_argument("--eval_steps", type=int, default=0, help="steps between measurements; 0: at the end alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bitcpm4"))
    arguments = parser.parse_args(argv)
    if (arguments.text is None) != (arguments.held_out is None):
        parser.error("--text and --held_out go together; give both or none")
    return arguments


def read(path: Path) -> str:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return "".join(pyarrow.parquet.read_table(path)["text"].to_pylist())
    return path.read_text(encoding="utf-8")


def texts(arguments: argparse.Namespace) -> tuple[str, str]:
    """(training, held out); by default WikiText-2 where the project has it, else the Python language reference."""
    if arguments.text is not None:
        return read(arguments.text), read(arguments.held_out)
    if WIKITEXT.is_dir():
        return read(WIKITEXT / "validation.parquet"), read(WIKITEXT / "test.parquet")
    chapters = list(topics.values())
    return "\n\n".join(chapters[::2]), "\n\n".join(chapters[1::2])


class Blocks(Dataset):
    """Rows of `length` tokens, one after the other."""

    def __init__(self, tokenizer, text: str, length: int, limit: int | None = None):
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        if len(ids) < length:
            raise SystemExit(f"the text has {len(ids)} tokens, and a block takes {length}: give more text.")
        self.rows = ids[: len(ids) // length * length].view(-1, length)[:limit]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@torch.no_grad()
def log_perplexity(model: PreTrainedModel, blocks: Blocks) -> float:
    """Mean negative log-likelihood of a token, in nats."""
    model.eval()
    losses = [
        model(input_ids=row[None].to(model.device), labels=row[None].to(model.device)).loss for row in blocks.rows
    ]
    return torch.stack(losses).mean().item()


def train(arguments: argparse.Namespace, model: PreTrainedModel, training: Blocks, held_out: Blocks):
    """QAT with the second stage's schedule: the first stage is the checkpoint's own pretraining."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = rewarmed_wsd_schedule(
        optimizer,
        arguments.steps,
        qat_share=1.0,
        num_rewarmup_steps=max(1, arguments.steps // 10),
        decay_share=0.4,
        qat_lr_ratio=1.0,
    )
    monitor = TernaryMonitorCallback()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output_dir / "trainer"),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=1,
            # Processors without instructions for bfloat16 are several times slower in it than in float32.
            bf16=torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2"),
            use_cpu=not torch.cuda.is_available(),
            max_grad_norm=1.0,
            logging_steps=arguments.eval_steps or arguments.steps,
            eval_strategy="steps" if arguments.eval_steps else "no",
            eval_steps=arguments.eval_steps or None,
            prediction_loss_only=True,
            save_strategy="no",
            report_to="none",
            seed=arguments.seed,
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        optimizers=(optimizer, schedule),
        callbacks=[monitor],
    )
    trainer.train()
    return trainer, monitor


def run(arguments: argparse.Namespace) -> dict:
    packed_folder = arguments.output_dir / "packed"
    if packed_folder.exists():
        raise SystemExit(f"{packed_folder} is there already: remove it, or give another --output_dir.")
    source = arguments.model or smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=BitCPM4Config(group_size=arguments.group_size)
    )
    model.config.use_cache = False
    training, held_out = (
        Blocks(tokenizer, text, arguments.length, limit)
        for text, limit in zip(texts(arguments), (None, arguments.eval_blocks))
    )
    set_qat(model, False)
    found = {"full precision": log_perplexity(model, held_out)}
    set_qat(model, True)
    found["rounded to ternary"] = log_perplexity(model, held_out)
    trainer, monitor = train(arguments, model, training, held_out)
    # bf16 wraps the model in autocast; figures before packing are float32.
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    found["ternary after QAT"] = log_perplexity(model, held_out)

    quantizer = BitCPM4Quantizer.from_pretrained(model)
    folder = quantizer.quantize(packed_folder, tokenizer=tokenizer, dtype=torch.bfloat16)
    packed = AutoModelForCausalLM.from_pretrained(folder)
    sizes = packed_sizes(packed)
    found["packed, loaded again"] = log_perplexity(packed, held_out)
    gap = found["rounded to ternary"] - found["full precision"]
    return {
        "log_perplexity": found,
        "gap_closed": (found["rounded to ternary"] - found["ternary after QAT"]) / gap,
        "bytes": {**sizes, "files": sum(file.stat().st_size for file in folder.glob("*.safetensors"))},
        "log_history": trainer.state.log_history,
        "monitor": monitor.history,
        "tokens_trained": arguments.steps * arguments.batch_size * arguments.length,
        "tokens_measured": held_out.rows.numel(),
    }


def main(argv: list[str] | None = None) -> dict:
    result = run(parse_arguments(argv))
    for name, value in result["log_perplexity"].items():
        print(f"{name:22} {value:7.3f} nats a token")
    print(f"\nQAT on {result['tokens_trained']:,} tokens closed {result['gap_closed']:.0%} of the gap.")
    size = result["bytes"]
    print(
        f"Ternary layers: {size['ternary'] / 1e6:.1f} MB, {size['ternary'] / size['ternary_bfloat16']:.3f} of "
        f"bfloat16; everything else {size['rest'] / 1e6:.1f} MB."
    )
    return result


if __name__ == "__main__":
    main()
