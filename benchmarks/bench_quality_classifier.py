"""
Leave-one-source-out table of the UltraClean classifier: a source never seen in training beside the same documents with
their source in training. Paper settings with 200,000 buckets, one thread, both classes at equal weight.

    python benchmarks/bench_quality_classifier.py --json benchmarks/results/quality_classifier.json

Documents of one file are held out together. The corpus names its pools `prose` (manuals) and `raw` (indexes, UI
strings, verse): a proxy for quality, not a judgement.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from datasets import load_dataset
from harness import report

from transformers_minicpm4.data.ultraclean.classifier import leave_one_source_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "debian-docs-quality"
    parser.add_argument("--data", default=str(default), help="folder with en.jsonl.gz and zh.jsonl.gz")
    parser.add_argument("--languages", nargs="+", default=["en", "zh"])
    parser.add_argument("--tokenizer", help="tokenizer of the preprocessing; without it, words end at blanks")
    parser.add_argument("--bucket", type=int, default=200_000, help="buckets of word n-grams (default 200,000)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training set (the paper's 3)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate (the paper's 0.1)")
    parser.add_argument("--balance", default="oversample", choices=["oversample", "undersample", "none"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write all figures there as JSON")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    rows = []
    for language in args.languages:
        dataset = load_dataset("json", data_files=f"{args.data}/{language}.jsonl.gz", split="train")
        dataset = dataset.add_column("label", [pool == "prose" for pool in dataset["pool"]])
        start = time.process_time()
        table = leave_one_source_out(
            dataset,
            source_column="source_set",
            group_column="source",
            tokenizer=args.tokenizer,
            bucket=args.bucket,
            epochs=args.epochs,
            lr=args.lr,
            balance=None if args.balance == "none" else args.balance,
            seed=args.seed,
        )
        seconds = round(time.process_time() - start, 1)
        for row in table["sources"]:
            rate = "tpr" if row["label"] == "pos" else "fpr"
            kept = {"kept": row[rate], "in-source kept": row[f"in_source_{rate}"]}
            rows.append({**row, "unseen AUC": row["auc"], "in-source AUC": row["in_source_auc"], **kept})
        mean = table["mean"]
        for name, end in {"all": "", "pos": "_positive_sources", "neg": "_negative_sources"}.items():
            rows.append(
                {
                    "source": f"{language}: mean",
                    "label": name,
                    "unseen AUC": mean[f"auc{end}"],
                    "in-source AUC": mean[f"in_source_auc{end}"],
                }
            )
        rows[-3] |= {"table": table, "cpu_seconds": seconds}
    for row in rows:
        row.update({name: round(value, 3) for name, value in row.items() if isinstance(value, float)})
    columns = ["source", "label", "documents", "unseen AUC", "in-source AUC", "kept", "in-source kept"]
    report(rows, columns, args.json)


if __name__ == "__main__":
    main()
