"""`minicpm4 ultraclean`: train a quality classifier, score and filter a corpus with it, verify and report."""

import argparse
import json
import sys
from pathlib import Path

from .errors import UserError, one_line


EXAMPLES = """\
examples:
  minicpm4 ultraclean train --pos books.jsonl manuals.jsonl --neg crawl.jsonl -o quality.bin --bucket 200000
  minicpm4 ultraclean score crawl/*.parquet --model quality.bin -o scored
  minicpm4 ultraclean filter crawl/*.parquet --model openbmb/Ultra-FineWeb-classifier:en -o kept --threshold 0.5
  minicpm4 ultraclean report kept
  minicpm4 ultraclean verify ./stable-checkpoint --base mix.jsonl --candidate kept --eval manuals=held_out.jsonl \\
      -o verification --steps 500

Corpora are jsonl, jsonl.gz, json or parquet files, folders of them, or ids of datasets on the Hub. A run that was
stopped goes on where it was when the same command is given again.
"""
SETTINGS = "ultraclean.json"
OTHERWISE = "name a folder that score or filter wrote"
# Endings of names that are files, not ids of the Hub.
FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".gz", ".zst", ".csv", ".txt", ".arrow", ".bin", ".ftz")


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "ultraclean",
        help="train, score, filter, verify, report: the UltraClean recipe on a corpus",
        description="The UltraClean data recipe (MiniCPM4, section 3.1) on files, folders and datasets of the Hub.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)

    train = actions.add_parser(
        "train", help="a fastText classifier from positive and negative pools, and a report by source"
    )
    train.add_argument(
        "--pos", nargs="+", required=True, metavar="POOL", help="positive pools; NAME=PATH names a source"
    )
    train.add_argument("--neg", nargs="+", required=True, metavar="POOL", help="negative pools")
    train.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="the model, .bin; its report goes beside it"
    )
    train.add_argument("--epochs", type=int, default=3, help="default 3, the paper's")
    train.add_argument(
        "--bucket", type=int, default=2_000_000, help="n-gram buckets; 2,000,000 (default) is a 2 GB model"
    )
    train.add_argument("--dim", type=int, default=256, help="default 256, the paper's")
    train.add_argument("--threads", type=int, default=1, help="1 (default) gives the same model in every run")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--held-out", type=float, default=0.1, metavar="SHARE", help="kept for the report (default 0.1)"
    )
    train.add_argument("--overwrite", action="store_true", help="replace FILE")
    _add_text(train)

    score = actions.add_parser(
        "score", help="add quality_score, quality_label and quality_reason to every row that can be read"
    )
    chosen = actions.add_parser(
        "filter", help="keep rows at or above a threshold; dropped rows are kept apart, with reasons"
    )
    for action in (score, chosen):
        action.add_argument("inputs", nargs="+", metavar="CORPUS", help="files, folders, or one dataset id of the Hub")
        action.add_argument("-o", "--output", required=True, metavar="FOLDER")
        action.add_argument("--format", choices=["parquet", "jsonl"], default="parquet", help="of the shards")
        action.add_argument("--rows-per-shard", type=int, default=20_000, metavar="N", help="default 20,000")
        _add_text(action)
    score.add_argument(
        "--model", required=True, help="file of `train`, or a Hub id such as openbmb/Ultra-FineWeb-classifier:en"
    )
    chosen.add_argument("--model", help="as for score; leave it out where the corpus is scored already")
    chosen.add_argument("--threshold", type=float, default=0.5, help="default 0.5, as released")

    report = actions.add_parser("report", help="counts and score distributions by source; writes a dataset card")
    report.add_argument("folder", metavar="FOLDER", help="what score or filter wrote")
    report.add_argument(
        "--threshold", type=float, help="of a scored folder, to count with (default 0.5); a filtered one has its own"
    )
    report.add_argument("--source-column", default="source", metavar="NAME", help="default source")
    report.add_argument("--title", help="of the card")
    report.add_argument("--license", help="of the data, as the Hub spells it")
    report.add_argument("--json", action="store_true", help="print JSON")

    verify = actions.add_parser("verify", help="does the candidate help? anneal a checkpoint with and without it")
    verify.add_argument("model", metavar="MODEL", help="folder or Hub id of a causal LM before its decay phase")
    verify.add_argument("--base", required=True, nargs="+", metavar="CORPUS", help="the mix training would use anyway")
    verify.add_argument("--candidate", required=True, nargs="+", metavar="CORPUS", help="the data under test")
    verify.add_argument("--eval", required=True, nargs="+", metavar="NAME=PATH", help="held-out documents by domain")
    verify.add_argument("-o", "--output", required=True, metavar="FOLDER")
    verify.add_argument("--steps", type=int, required=True, help="optimizer steps of one run")
    verify.add_argument("--batch-size", type=int, default=8, help="blocks a step (default 8)")
    verify.add_argument("--block-length", type=int, default=1024, metavar="TOKENS", help="default 1024")
    verify.add_argument("--learning-rate", type=float, default=1e-3, help="peak (default 1e-3)")
    verify.add_argument("--share", type=float, default=0.3, help="of the candidate (default 0.3, the paper's)")
    verify.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least three (default 0 1 2)")
    verify.add_argument("--text-column", default="text", metavar="NAME", help="default text")


def _add_text(parser) -> None:
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default text")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="words by this tokenizer; the one the model was trained with"
    )


def run(args) -> int | None:
    action = {"train": train, "score": process, "filter": process, "report": report, "verify": verify}[args.action]
    try:
        return action(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(one_line(error)) from error


def train(args) -> None:
    from transformers_minicpm4.data.ultraclean.classifier import train_classifier

    pools = {}
    for label, given in (("pos", args.pos), ("neg", args.neg)):
        for name, path in map(_named, given):
            if name in pools:
                raise UserError(f"two pools are named {name!r}; tell them apart as NAME=PATH.")
            pool = load(path)
            if args.text_column not in pool.column_names:
                raise UserError(
                    f"the pool {path} has no column {args.text_column!r}; its columns are "
                    f"{', '.join(pool.column_names)}: set --text-column to one of them."
                )
            pool = pool.select_columns([args.text_column])
            pools[name] = pool.add_column("label", [label] * len(pool))
    settings = ("epochs", "bucket", "dim", "threads", "seed", "held_out", "overwrite", "text_column", "tokenizer")
    found = train_classifier(pools, args.output, **{name: getattr(args, name) for name in settings})
    print(f"{'source':<28} {'label':<5} {'held out':>8} {'AUC':>6} {'kept':>6}")
    for row in found["held_out"]["sources"]:
        kept = row.get("tpr") if row["label"] == "pos" else row.get("fpr")
        figures = ["" if value is None else f"{value:.3f}" for value in (row["auc"], kept)]
        print(f"{row['source']:<28} {row['label']:<5} {row['documents']:>8} {figures[0]:>6} {figures[1]:>6}")
    print(f"model: {args.output}\nreport: {Path(args.output).with_suffix('.json')}")


def process(args) -> int:
    from transformers_minicpm4.data.ultraclean.files import write_text
    from transformers_minicpm4.data.ultraclean.scorer import QualityFilter, QualityScorer
    from transformers_minicpm4.data.ultraclean.shards import process_shards

    if args.tokenizer is not None and args.model is None:
        raise UserError(
            "--tokenizer without --model: words are made for a model only, and the scores of the corpus are taken as "
            "they are; give --model too, or leave --tokenizer out."
        )
    functions, facts = [], {"action": args.action, "threshold": getattr(args, "threshold", None)}
    if args.model is not None:
        scorer = QualityScorer(args.model, tokenizer=args.tokenizer, text_column=args.text_column)
        functions.append(scorer)
        facts.update(model=scorer.model, digest=scorer.digest, tokenizer=args.tokenizer)
    else:
        facts.update(_scored_by(args.inputs))
    if args.action == "filter":
        functions.append(QualityFilter(args.threshold))
    inputs, options = _corpus(args.inputs)
    manifest = process_shards(
        inputs, args.output, functions, output_format=args.format, rows_per_shard=args.rows_per_shard,
        text_column=args.text_column, **options,
    )  # fmt: skip
    write_text(Path(args.output) / SETTINGS, json.dumps(facts, indent=1) + "\n")
    counts = manifest["counts"]
    print(f"read {counts['read']:,}, kept {counts['kept']:,}")
    for kind in ("dropped", "rejected"):
        for reason, count in sorted(counts[kind].items()):
            print(f"{kind} {count:,}: {reason}")
    print(f"folder: {args.output}")
    if not counts["read"]:
        print(f"minicpm4 ultraclean: no records in {' '.join(args.inputs)}: nothing was written", file=sys.stderr)
    if counts["read"] and sum(counts["rejected"].values()) == counts["read"]:
        print(
            f"minicpm4 ultraclean: none of the {counts['read']:,} records could be read; "
            f"{args.output}/rejects-* say why, line by line",
            file=sys.stderr,
        )
        return 1
    return 0


def report(args) -> None:
    from tqdm import tqdm

    from transformers_minicpm4.data.ultraclean.card import as_table, summarize, write_card
    from transformers_minicpm4.data.ultraclean.records import MANIFEST, read_manifest, read_rows

    folder = Path(args.folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds no {MANIFEST}: {OTHERWISE}.")
    manifest = read_manifest(folder / MANIFEST)
    if manifest is None:
        raise UserError(f"{folder / MANIFEST} is damaged or of another program: {OTHERWISE}.")
    if not manifest["finished"]:
        raise UserError(f"the run in {folder} is not finished; give its command again and it goes on.")
    facts = _read_settings(folder)
    if facts is None:
        raise UserError(f"{folder} holds no {SETTINGS}: give the command that wrote the folder once more.")
    filtered = facts["action"] == "filter"
    if filtered and args.threshold not in (None, facts["threshold"]):
        raise UserError(
            f"{folder} was filtered with the threshold {facts['threshold']:g}; a card with {args.threshold:g} would "
            "not be true of it: leave --threshold out, or filter into another folder with the threshold you want."
        )
    threshold = next(value for value in (args.threshold, facts["threshold"], 0.5) if value is not None)
    files = [
        folder / shard["files"][name]["name"]
        for name in ("part", "dropped")
        for shard in manifest["shards"]
        if name in shard["files"]
    ]
    rows = tqdm(read_rows(files), total=manifest["counts"]["read"], desc="reading", unit=" rows", disable=None)
    settings = manifest["settings"]
    summary = summarize(
        rows, threshold=threshold, source_column=args.source_column, text_column=settings["text_column"]
    )
    card = write_card(
        folder, summary, title=args.title or folder.resolve().name, model=_shown(facts.get("model", "unknown")),
        model_digest=facts.get("digest", "unknown"), tokenizer=_shown(facts.get("tokenizer", "unknown")),
        license=args.license, files=f"part-*.{settings['output_format']}", filtered=filtered,
    )  # fmt: skip
    print(json.dumps(summary, indent=2) if args.json else f"{as_table(summary, filtered=filtered)}\ncard: {card}")


def verify(args) -> int:
    from transformers_minicpm4.data.ultraclean.verification import efficient_verification

    found = efficient_verification(
        args.model, args.model, _all(args.base), _all(args.candidate), {name: load(path) for name, path in map(_named,
        args.eval)}, args.output, steps=args.steps, batch_size=args.batch_size, block_length=args.block_length,
        learning_rate=args.learning_rate, candidate_share=args.share, seeds=args.seeds, text_column=args.text_column,
    )  # fmt: skip
    print(found.to_markdown())
    print(f"folder: {args.output}")
    return 0


def load(path: str):
    """A `Dataset` from a file, a folder of files, or the train split of a dataset on the Hub."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    from transformers_minicpm4.data.ultraclean.records import Files, read_rows

    place = Path(path).expanduser()
    if not place.exists():
        if not _may_be_on_the_hub(path):
            raise UserError(f"no such file or folder: {path}")
        return _from_hub(path)
    files = Files(place).paths
    files = [file for file in files if file.name.startswith("part-")] or files
    kinds = {_kind(file) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise UserError(f"{path} must be jsonl, jsonl.gz, json or parquet, or a folder of files of one such kind.")
    try:
        return load_dataset(kinds.pop(), data_files=[str(file) for file in files], split="train")
    except DatasetGenerationError as error:
        # The loader does not say where: reading it once more does.
        for _ in read_rows(files):
            pass
        raise UserError(f"{path} cannot be loaded: {one_line(error.__cause__ or error)}") from error


def _kind(file: Path) -> str | None:
    suffixes = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json"}
    return suffixes.get(Path(file.name.removesuffix(".gz")).suffix) if file.is_file() else None


def _all(paths: list[str]):
    from datasets import concatenate_datasets

    return concatenate_datasets([load(path) for path in paths])


def _named(given: str) -> tuple[str, str]:
    """`NAME=PATH`, or a path whose file name without suffixes is the name."""
    name, mark, path = given.partition("=")
    if Path(given).expanduser().exists():  # a path may have a "=" of its own: date=2024/crawl.jsonl
        mark = ""
    return (name, path) if mark else (Path(Path(given).name.removesuffix(".gz")).stem or given, given)


def _corpus(inputs: list[str]) -> tuple:
    """What `process_shards` reads, and how it knows a stream of the Hub again."""
    here = [Path(name).expanduser() for name in inputs]
    if all(path.exists() for path in here):
        return here, {}
    missing = [name for name, path in zip(inputs, here) if not path.exists()]
    if len(inputs) > 1 or not _may_be_on_the_hub(inputs[0]):
        raise UserError(f"no such file or folder: {', '.join(missing)}")
    return _from_hub(inputs[0], streaming=True), {"input_name": inputs[0]}


def _may_be_on_the_hub(name: str) -> bool:
    """Whether a name that is no file here can be a Hub id: `owner/name`, or a name alone; `:file` may follow."""
    repository = name.partition(":")[0]
    if repository.endswith(FILE_SUFFIXES) or repository.startswith((".", "/", "~")):
        return False
    # Names may have dots (owner/name-v1.0), those without an owner have none.
    return repository.count("/") == 1 or not ("/" in repository or Path(repository).suffix)


def _from_hub(name: str, **options):
    from datasets import load_dataset

    try:
        return load_dataset(name, split="train", **options)
    except OSError as error:
        raise UserError(
            f"{name} is no file or folder here, nor could it be loaded from the Hub: {one_line(error)}"
        ) from error


def _shown(name: str | None) -> str | None:
    """What a card calls a model or tokenizer: its Hub id, or the file's name without the folders of this machine."""
    if name is None or (_may_be_on_the_hub(name) and not Path(name).exists()):
        return name
    return Path(name).name


def _read_settings(folder: Path) -> dict | None:
    """What `process` noted in a folder that it wrote; None where there is no note."""
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or not _are_settings(facts):
        raise UserError(f"{path} is damaged or of another program: give the command that wrote the folder once more.")
    return facts


def _are_settings(facts: dict) -> bool:
    threshold = facts.get("threshold", "")
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    texts = [facts.get("model", ""), facts.get("digest", ""), facts.get("tokenizer") or ""]
    of_action = {"score": threshold is None, "filter": number}
    return all(isinstance(text, str) for text in texts) and any(
        facts.get("action") == action and fits for action, fits in of_action.items()
    )


def _scored_by(inputs: list[str]) -> dict:
    """Model, digest and tokenizer of the scores in the inputs, where all are folders scored by the same."""
    from transformers_minicpm4.data.ultraclean.records import MANIFEST

    found = []
    for folder in (Path(name).expanduser() for name in inputs):
        facts = _read_settings(folder) if (folder / MANIFEST).is_file() else None
        if facts is None or not {"model", "digest", "tokenizer"} <= facts.keys():
            return {}
        found.append({name: facts[name] for name in ("model", "digest", "tokenizer")})
    return found[0] if all(facts == found[0] for facts in found) else {}
