# /// script
# dependencies = ["transformers_minicpm4[data]"]
# ///
"""
UltraClean from seeds to a dataset with its card: verify the seeds, train a classifier, mine, filter, verify what was
kept.

Without arguments everything comes from this Python and its packages, and a tiny Llama stands for the checkpoint, in
about two minutes on a CPU:

    python examples/ultraclean_pipeline.py

Your own corpora, JSON lines or parquet with columns `text` and, for the card, `source`:

    python examples/ultraclean_pipeline.py --corpus crawl.jsonl \
        --positive books=books.jsonl --positive manuals=manuals.jsonl --negative crawl=raw.jsonl \
        --evaluation manuals=held_out.jsonl --model ./stable-checkpoint --bucket 2000000 --steps 500

A second call with the same arguments goes on where the first one ended. At toy size a verdict is often "no difference
beyond noise": that is what it should say.
"""

import argparse
import random
import shutil
import sysconfig
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

from datasets import Dataset, concatenate_datasets, disable_progress_bars
from efficient_verification import docstrings, load, sections, stable_phase, train_tokenizer

from transformers_minicpm4.data.ultraclean.card import as_table, summarize, write_card
from transformers_minicpm4.data.ultraclean.mining import mine
from transformers_minicpm4.data.ultraclean.scorer import QualityFilter, QualityScorer
from transformers_minicpm4.data.ultraclean.shards import process_shards
from transformers_minicpm4.data.ultraclean.verification import efficient_verification


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--corpus", help="file to filter")
    parser.add_argument("--positive", action="append", metavar="NAME=FILE", help="a positive seed pool; repeat it")
    parser.add_argument("--negative", action="append", metavar="NAME=FILE", help="a negative seed pool; repeat it")
    parser.add_argument("--evaluation", action="append", metavar="NAME=FILE", help="held-out documents of a domain")
    parser.add_argument(
        "--model", help="causal language model before its decay phase; without it a tiny one is trained"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ultraclean"))
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--bucket", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10, help="the paper's 3 under-train on seeds this few")
    parser.add_argument("--learning_rate", type=float, default=0.3, help="of the classifier")
    parser.add_argument("--stable_steps", type=int, default=150, help="of the tiny model; unused with --model")
    parser.add_argument("--steps", type=int, default=30, help="of each annealing run")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--block_length", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    given = [bool(value) for value in (arguments.corpus, arguments.positive, arguments.negative, arguments.evaluation)]
    if any(given) and not all(given):
        parser.error("--corpus, --positive, --negative and --evaluation go together; give all of them or none")
    return arguments


def carried(seed: int) -> tuple[dict, dict, dict, Dataset]:
    """Positive and negative pools, held-out documents and an unlabelled corpus, from what this Python carries."""
    generator = random.Random(seed)
    chapters = [sections(text) for text in topics.values()]
    known = docstrings()
    generator.shuffle(chapters)
    generator.shuffle(known)
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = [part for path in library for part in sections(path.read_text(encoding="utf-8"))[:8]]
    packages = sorted(metadata.distributions(), key=lambda package: package.metadata["Name"].lower())
    records = [part for package in packages for part in pieces(package.read_text("RECORD") or "")[:4]]
    stories = [part for package in packages for part in sections(package.metadata.get_payload() or "")[:6]]
    licences = [
        part
        for package in packages
        for file in package.files or ()
        if file.name.upper().startswith(("LICENSE", "COPYING")) and file.locate().is_file()
        for part in sections(file.locate().read_text(encoding="utf-8", errors="replace"))[:3]
    ]
    generator.shuffle(code)
    generator.shuffle(records)
    half = len(code) // 2
    positive = {"reference": sum(chapters[: len(chapters) // 2], []), "docstrings": known[: len(known) // 2]}
    negative = {"code": code[:half][:600], "records": records[:200]}
    evaluation = {"reference": sum(chapters[-10:], []), "docstrings": known[-150:]}
    unlabelled = {
        "more reference": sum(chapters[len(chapters) // 2 : -10], []),
        "more docstrings": known[len(known) // 2 : -150],
        "package descriptions": stories,
        "licences": licences[:300],
        "more code": code[half:][:600],
        "more records": records[200:500],
    }
    rows = [{"text": text, "source": source} for source, texts in unlabelled.items() for text in texts]
    generator.shuffle(rows)
    return *({name: dataset(texts) for name, texts in pools.items()} for pools in (positive, negative, evaluation)), (
        Dataset.from_list(rows)
    )


def pieces(text: str, length: int = 800) -> list[str]:
    return [text[start : start + length] for start in range(0, len(text), length)]


def dataset(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts})


def named(pairs: list[str]) -> dict[str, Dataset]:
    return {name: load(path) for name, path in (pair.split("=", 1) for pair in pairs)}


def labelled(positive: dict, negative: dict) -> dict:
    """Pools with the column `label` that the classifier is trained on."""
    pools = {}
    for label, group in (("pos", positive), ("neg", negative)):
        for name, pool in group.items():
            pools[name] = pool.select_columns(["text"]).add_column("label", [label] * len(pool))
    return pools


def main(argv: list[str] | None = None) -> dict:
    arguments = parse_arguments(argv)
    disable_progress_bars()
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.corpus:
        positive, negative, evaluation = map(named, (arguments.positive, arguments.negative, arguments.evaluation))
        corpus = load(arguments.corpus)
    else:
        positive, negative, evaluation, corpus = carried(seed=0)
    print(f"seeds: { {name: len(pool) for name, pool in {**positive, **negative}.items()} }; corpus: {len(corpus):,}")

    model, tokenizer = arguments.model, arguments.model
    if model is None:
        tokenizer = train_tokenizer(corpus["text"])
        stable = argparse.Namespace(**{**vars(arguments), "learning_rate": 3e-3})
        model = stable_phase(tokenizer, list(corpus["text"]), stable)

    def verify(name: str, candidate: Dataset):
        print(f"\n## Verification: {name}\n")
        report = efficient_verification(
            model, tokenizer, corpus, candidate, evaluation, folder / "verification" / name, steps=arguments.steps,
            batch_size=arguments.batch_size, block_length=arguments.block_length, seeds=arguments.seeds,
            learning_rate=3e-3, on_leak="remove",
        )  # fmt: skip
        print(report.to_markdown())
        return report

    # 1. A pool of seeds is admitted unless it does harm; the paper asks for a gain, which takes a run of its size.
    admitted = {}
    for name, pool in positive.items():
        verdicts = {domain: result.verdict for domain, result in verify(f"seeds-{name}", pool).domains.items()}
        if "worse" in verdicts.values() and "better" not in verdicts.values():
            print(f"left out: {name} ({verdicts})")
        else:
            admitted[name] = pool

    # 2 and 3. Classify, and mine one round for what the seeds lack.
    training = {
        "bucket": arguments.bucket,
        "dim": arguments.dim,
        "epochs": arguments.epochs,
        "lr": arguments.learning_rate,
    }
    mined = mine(labelled(admitted or positive, negative), corpus, folder / "classifier", rounds=1, **training)
    best = mined["best"]
    print(f"\nclassifier: round {best['round']} of {len(mined['rounds']) - 1}; {mined['stopped']}")

    # 4. Score and filter; what is dropped stays, with the reason.
    scorer = QualityScorer(best["file"])
    kept_folder = folder / "dataset"
    manifest = process_shards(
        corpus, kept_folder, [scorer, QualityFilter(arguments.threshold)], rows_per_shard=5000, progress=False
    )
    print(f"counts: {manifest['counts']}")
    files = {
        name: [str(path) for path in sorted(kept_folder.glob(f"{name}-*.parquet"))] for name in ("part", "dropped")
    }
    kept, dropped = (Dataset.from_parquet(paths) if paths else None for paths in files.values())
    scored = concatenate_datasets(
        [part.select_columns(kept.column_names) for part in (kept, dropped) if part is not None]
    )
    summary = summarize(scored, threshold=arguments.threshold)
    write_card(
        kept_folder, summary, title="UltraClean example", model=Path(scorer.model).name, model_digest=scorer.digest,
        files="part-*.parquet", notes=f"Seeds: {', '.join([*positive, *negative])}; one round of mining.",
    )  # fmt: skip
    print(as_table(summary))

    # 5. Does what was kept help more than the mix it came from?
    report = verify("kept", kept.select_columns(["text"]))
    picture = folder / "verification" / "kept" / "losses.png"
    if picture.exists():
        shutil.copy(picture, kept_folder / "verification.png")
    print(f"\ndataset and card: {kept_folder}")
    return {"summary": summary, "verification": report, "mined": mined}


if __name__ == "__main__":
    main()
