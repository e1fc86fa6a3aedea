"""`minicpm4 align`: whether two runtimes, or two forms of one model, compute the same."""

import argparse
import contextlib
import importlib.util
from pathlib import Path

from .errors import UserError, one_line
from .generate import at_least
from .quantization import refuse_missing


PICTURES = (".png", ".svg", ".pdf")
EXAMPLES = """\
examples:
  minicpm4 align ./model model.gguf --text some.txt
  minicpm4 align ./model ./model-openvino --text some.txt --tokens 1024 --plot pairs.png
  minicpm4 align ./model model-q8.gguf --text some.txt --trace calls.json --json

A and B are checkpoints (PyTorch), GGUF files (llama.cpp) or folders of `minicpm4 export --to openvino`; A is the
reference. A wrong scale of the logits, which the chosen tokens hide, shows in the slope. The exit code is 1 where the
slope is further from 1 than --tolerance. Checkpoints attend densely here unless both are checkpoints, since the other
runtimes do. --trace writes a timeline for chrome://tracing or ui.perfetto.dev.
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "align",
        help="compare the log-probabilities of two runtimes on a text",
        description="Compare the log-probabilities that two runtimes give one text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A", help="the reference")
    parser.add_argument("second", metavar="B", help="what is checked")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text; its beginning is compared")
    parser.add_argument("--tokens", type=at_least(2), default=256, metavar="N", help="of the text; default 256")
    parser.add_argument("--top", type=at_least(2), default=16, metavar="K", help="candidates a place; default 16")
    parser.add_argument("--tolerance", type=float, default=0.01, metavar="T", help="of the slope; default 0.01")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="default: A's, or B's where A is a .gguf file; needed where both are"
    )
    parser.add_argument("--plot", metavar="FILE", help="picture of all pairs (.png, .svg, .pdf)")
    parser.add_argument("--trace", metavar="FILE", help="timeline of the calls (.json)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot draws with matplotlib, which is not installed: pip install matplotlib")
    if args.plot and Path(args.plot).suffix not in PICTURES:
        raise UserError(f"--plot {args.plot}: the name must end in {', '.join(PICTURES)}")
    for place in (args.first, args.second):
        refuse_missing(place)
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--text {args.text} cannot be read: {one_line(error)}") from error
    try:
        result = compare(args, text)
        print(result.json() if args.json else result.report())
        if args.plot:
            result.plot(args.plot)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(one_line(error)) from error
    return 0 if result.within(args.tolerance) else 1


def compare(args: argparse.Namespace, text: str):
    from transformers import AutoTokenizer

    from transformers_minicpm4.edge.alignment import align
    from transformers_minicpm4.edge.executors import open_executor, runtime_of
    from transformers_minicpm4.edge.trace import trace

    places = (args.first, args.second)
    source = args.tokenizer or next((place for place in places if runtime_of(place) != "gguf"), None)
    if source is None:
        raise UserError("two .gguf files were given; say whose tokenizer reads the text with --tokenizer FOLDER")
    token_ids = AutoTokenizer.from_pretrained(source)(text[: 32 * args.tokens])["input_ids"][: args.tokens]
    checkpoints = [runtime_of(place) == "torch" for place in places]
    names = [Path(place).name for place in places]
    if names[0] == names[1]:
        names = list(places)
    dense = {} if all(checkpoints) else {"attn_implementation": "sdpa"}
    executors = [None, None]
    with contextlib.ExitStack() as stack:
        timeline = stack.enter_context(trace(args.trace)) if args.trace else None
        for index in sorted((0, 1), key=checkpoints.__getitem__):  # a file that is no good is told of at once
            options = dense | {"dtype": "float32"} if checkpoints[index] else {}
            executors[index] = stack.enter_context(
                open_executor(
                    places[index], context=max(len(token_ids), 2), trace=timeline, name=names[index], **options
                )
            )
        return align(*executors, token_ids, top=args.top)
