"""`minicpm4 fr-spec`: the list of frequent tokens that a draft head keeps, counted on text and measured on other."""

import argparse
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError, one_line


EXAMPLES = """\
examples:
  minicpm4 fr-spec build openbmb/MiniCPM4-8B --text crawl.parquet chats.jsonl --size 32768 -o lists
  minicpm4 fr-spec build ./my-model --text corpus/ --size 8192 16384 32768 --held-out en=manual.txt zh=wiki_zh.jsonl \\
      -o lists
  zcat log.gz | minicpm4 fr-spec build ./my-model --text - --size 16384 -o freq_16384.pt
  minicpm4 fr-spec coverage lists/freq_32768.pt ./my-model en=manual.txt code=snippets.jsonl

A draft head that scores F tokens instead of all reads F rows of weights a step. What the model says does not change;
where it wants to say a token that is not in the list, the draft is wrong and one pass of the model is lost. So choose
the smallest F whose coverage of YOUR text is close to 1, and count on text like it: lists are bound to their domain.

Text is .txt, .jsonl, .json, .parquet (the first three also .gz), folders of jsonl and parquet files, or - for standard
input; NAME=FILE names a source in the table. Always in the list: end-of-text ids of the model and of its
generation_config.json, special and added tokens. If the text has fewer different tokens than F, the lowest ids that
did not occur fill the list. freq_F.pt is the plain list that CPM.cu reads, freq_F.json beside it has the facts.
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "fr-spec",
        help="a frequency-ranked vocabulary for a draft head: build it from text, measure its coverage",
        description="FR-Spec (arXiv 2502.14856): the tokens a draft head scores, and how much of a text they are.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    build = actions.add_parser("build", help="count tokens and write freq_F.pt")
    build.add_argument("model", metavar="MODEL_OR_TOKENIZER", help="folder or Hub id; its tokenizer is used")
    build.add_argument("--text", nargs="+", required=True, metavar="FILE", help="what to count")
    build.add_argument(
        "--size", nargs="+", type=int, default=[32768], metavar="F", help="default 32768; one list each"
    )
    build.add_argument("--held-out", nargs="+", default=[], metavar="FILE", help="other text, to measure coverage on")
    build.add_argument(
        "--eos", nargs="+", type=int, default=[], metavar="ID", help="end-of-text ids beyond those that are found"
    )
    build.add_argument("-o", "--output", required=True, metavar="OUT", help="folder, or a .pt file for one size")
    build.add_argument("--overwrite", action="store_true", help="replace lists that are there")
    coverage = actions.add_parser("coverage", help="share of text that a list covers, by source")
    coverage.add_argument("list", metavar="FREQ_FILE", help="of `build` or of CPM.cu")
    coverage.add_argument("model", metavar="MODEL_OR_TOKENIZER", help="folder or Hub id; its tokenizer is used")
    coverage.add_argument("files", nargs="+", metavar="FILE", help="text to measure on")
    for action in (build, coverage):
        action.add_argument("--text-column", default="text", metavar="NAME", help="of jsonl and parquet; default text")
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args) -> None:
    try:
        {"build": build, "coverage": coverage}[args.action](args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(one_line(error)) from error


def build(args) -> None:
    sizes = sorted(set(args.size))
    files = outputs(args.output, sizes)
    there = [file for file in files if file.exists()]
    if there and not args.overwrite:
        raise UserError(f"{there[0]} is there already; give --overwrite to replace it, or another -o.")
    text, held_out = sources(args.text), sources(args.held_out)
    refuse_standard_input_twice([*args.text, *args.held_out])

    from ..generation.fr_spec import FrequencyVocabulary, count_tokens, kept_ids, tokenizer_fingerprint

    tokenizer, vocab_size, eos = target(args.model)
    keep = kept_ids(tokenizer, vocab_size, [*eos, *args.eos])
    for size in sizes:
        if not len(keep) <= size <= vocab_size:
            raise UserError(
                f"--size {size}: a list of this model has {len(keep)} (its end-of-text, special and added tokens) to "
                f"{vocab_size:,} tokens (its vocabulary)."
            )

    def count(name, path):
        rows = texts(path, args.text_column)
        return count_tokens(rows, tokenizer, vocab_size, column=args.text_column, name=name)

    facts = {"corpus": list(text), "tokenizer": tokenizer_fingerprint(tokenizer)}
    counts = sum(count(name, path) for name, path in text.items())
    lists = [FrequencyVocabulary.from_counts(counts, size, keep, facts) for size in sizes]
    held_counts = {name: count(name, path) for name, path in held_out.items()}
    for name, found in held_counts.items():
        if not found.any():
            raise UserError(f"{held_out[name]} holds no text to measure coverage on; leave it out.")
    measured = [{name: found.coverage_of(held) for name, held in held_counts.items()} for found in lists]
    for found, file, shares in zip(lists, files, measured):
        found.save(file, shares)
    counted = {"counted text": [found.coverage_of(counts) for found in lists]}
    rows = {**counted, **{name: [shares[name] for shares in measured] for name in held_out}}
    if args.json:
        content = [
            {"file": str(file), "size": len(found), "filled": found.facts["filled"], **as_json(shares)}
            for file, found, shares in zip(files, lists, measured)
        ]
        print(json.dumps(content, indent=2))
        return
    print_table(sizes, rows)
    for found in lists:
        if found.facts["filled"]:
            print(
                f"{len(found)}: {found.facts['filled']:,} of the tokens did not occur in the counted text; more text "
                "makes a better list"
            )
    if not held_out:
        print("not measured on other text: name some with --held-out, its coverage is what counts")
    for file in files:
        print(f"list: {file}")


def coverage(args) -> None:
    files = sources(args.files)
    refuse_standard_input_twice(args.files)

    from ..generation.fr_spec import FrequencyVocabulary

    tokenizer, vocab_size, eos = target(args.model)
    found = FrequencyVocabulary.load(Path(args.list).expanduser(), vocab_size=vocab_size, eos_token_id=eos)
    rows = {name: texts(path, args.text_column) for name, path in files.items()}
    shares = found.coverage(rows, tokenizer, column=args.text_column)
    if args.json:
        print(json.dumps({"size": len(found), **as_json(shares)}, indent=2))
    else:
        print_table([len(found)], {name: [share] for name, share in shares.items()})


def as_json(shares) -> dict:
    return {"coverage": {name: {"tokens": found.tokens, "share": found.share} for name, found in shares.items()}}


def print_table(sizes: list[int], rows: dict) -> None:
    """Sources down, sizes across."""
    width = max(map(len, [*rows, "source"]))
    print(f"{'source':<{width}}  {'tokens':>12}" + "".join(f"  {size:>8,}" for size in sizes))
    for name, shares in rows.items():
        print(f"{name:<{width}}  {shares[0].tokens:>12,}" + "".join(f"  {found.share:>8.4f}" for found in shares))


def outputs(given: str, sizes: list[int]) -> list[Path]:
    path = Path(given).expanduser()
    if path.suffix == ".pt":
        if len(sizes) > 1:
            raise UserError(f"-o {given} is one file for {len(sizes)} sizes; give a folder, or one --size.")
        return [path]
    if path.is_file():
        raise UserError(f"-o {given} is a file that is no .pt; give a folder, or a name that ends in .pt.")
    return [path / f"freq_{size}.pt" for size in sizes]


def sources(given: list[str]) -> dict[str, str]:
    """Name to path: `NAME=PATH`, or a path, whose file name without suffixes is the name."""
    found = {}
    for word in given:
        name, mark, path = word.partition("=")
        if not mark or Path(word).expanduser().exists():  # a path may have a "=" of its own: date=2024/crawl.jsonl
            name, path = Path(Path(word).name.removesuffix(".gz")).stem or word, word
        if path == "-":
            name = name if mark else "standard input"
        elif not Path(path).expanduser().exists():
            raise UserError(f"no such file or folder: {path}")
        if name in found:
            raise UserError(f"two sources are named {name!r}; tell them apart as NAME=FILE.")
        found[name] = path
    return found


def refuse_standard_input_twice(given: list[str]) -> None:
    if sum(word.rpartition("=")[2] == "-" for word in given) > 1:
        raise UserError("standard input (-) is named twice and can be read once; save it to a file first.")


def target(model: str) -> tuple:
    """Tokenizer, size of the vocabulary and end-of-text ids, from a checkpoint or from a tokenizer alone."""
    from transformers import GenerationConfig, PreTrainedConfig

    from transformers_minicpm4.generation.chat import as_ids  # its package registers the architecture

    from .generate import load_tokenizer

    folder = Path(model).expanduser()
    if model.startswith((".", "/", "~")) and not folder.is_dir():
        raise UserError(f"There is no folder {model!r}; give the folder of a model or of a tokenizer, or a Hub id.")
    place = str(folder) if folder.is_dir() else model
    tokenizer = load_tokenizer(place)

    def read(name, load):
        if folder.is_dir() and not (folder / name).is_file():
            return None
        try:
            return load(place)
        except OSError as error:
            if folder.is_dir():
                raise UserError(f"{folder / name} cannot be read: {one_line(error)}") from error
            return None  # a repository without it

    config = read("config.json", lambda place: PreTrainedConfig.get_config_dict(place)[0]) or {}
    generation = read("generation_config.json", GenerationConfig.from_pretrained)
    eos = {*as_ids(tokenizer.eos_token_id), *as_ids(config.get("eos_token_id"))}
    eos |= set(as_ids(generation.eos_token_id)) if generation is not None else set()
    if not eos:
        print("minicpm4 fr-spec: no end of text is named by the model; give its id with --eos", file=sys.stderr)
    if "vocab_size" not in config:
        print(
            f"minicpm4 fr-spec: no configuration in {model}; the vocabulary is taken to be the tokenizer's "
            f"{len(tokenizer):,} tokens",
            file=sys.stderr,
        )
    return tokenizer, config.get("vocab_size", len(tokenizer)), sorted(eos)


def texts(given: str, column: str) -> Iterator:
    """Rows of a corpus, or pieces of a plain text."""
    path = Path(given).expanduser()
    if given == "-":
        yield from pieces(sys.stdin.buffer, "standard input")
    elif path.name.endswith((".txt", ".txt.gz")):
        with open(path, "rb") as raw, gzip.open(raw) if path.name.endswith(".gz") else raw as stream:
            yield from pieces(stream, given)
    else:
        from ..data.ultraclean.records import read_rows

        for number, row in enumerate(read_rows(path), 1):
            if not isinstance(row.get(column), str):
                raise UserError(
                    f"{given}, row {number}: no text in column {column!r}; its columns are {', '.join(row)}: set "
                    "--text-column to one that holds strings."
                )
            yield row


def pieces(stream, name: str) -> Iterator[str]:
    """A text in pieces of whole lines, so that no more than 64 KB of it is held."""
    try:
        while lines := stream.readlines(1 << 16):
            yield b"".join(lines).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not text in UTF-8 ({one_line(error)}); convert it first.") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{name} is damaged: {one_line(error)}") from error
