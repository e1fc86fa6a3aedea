"""`minicpm4 export`: a checkpoint as a file or folder that another runtime reads."""

import argparse

from .errors import UserError, one_line
from .quantization import refuse_missing


EXAMPLES = """\
examples:
  minicpm4 export openbmb/MiniCPM4-0.5B -o model.gguf --to gguf --type q8_0
  minicpm4 export ./model-ternary -o model.gguf --to gguf --type tq2_0
  minicpm4 export ./model -o ./model-openvino --to openvino --type f16
  minicpm4 align ./model model.gguf --text some.txt       what the export changed

gguf: for llama.cpp. auto keeps what is there; f32, f16 and bf16 are for all matrices, q8_0 rounds the layers of a
plain checkpoint, and tq1_0, tq2_0, q4_0 and q4_1 are written where they hold quantized layers exactly. openvino: f32,
or f16 for stored weights. Both runtimes attend densely: InfLLM v2 is PyTorch's. docs/executors.md has more.
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint for llama.cpp (GGUF) or OpenVINO",
        description="Write a checkpoint for another runtime, its scales and LongRoPE factors included.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="checkpoint folder or Hub id: plain, bitcpm4, for gguf also gptq"
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="file (gguf) or new folder (openvino)")
    parser.add_argument("--to", required=True, choices=["gguf", "openvino"], help="what to write")
    parser.add_argument("--type", default="auto", metavar="TYPE", help="of the weights; default auto (openvino: f32)")
    parser.add_argument(
        "--tokenizer-pre",
        metavar="NAME",
        help="gguf: llama.cpp's name of the pre-tokenizer (default: recognized from tokenizer.json)",
    )


def run(args: argparse.Namespace) -> None:
    refuse_missing(args.model)
    kind = args.type.lower()
    if args.to == "openvino" and args.tokenizer_pre is not None:
        raise UserError("--tokenizer-pre is for gguf; leave it out")
    try:
        if args.to == "gguf":
            from transformers_minicpm4.edge.executors.gguf_executor import export_gguf

            types = export_gguf(args.model, args.output, kind, args.tokenizer_pre)
            counts = {kind: list(types.values()).count(kind) for kind in sorted(set(types.values()))}
            print(f"{args.output}: written ({', '.join(f'{count} {kind}' for kind, count in counts.items())} tensors)")
        else:
            from transformers_minicpm4.edge.executors.openvino_executor import export_openvino

            export_openvino(args.model, args.output, "f32" if kind == "auto" else kind)
            print(f"{args.output}: written")
    except (ValueError, OSError, ImportError) as error:
        raise UserError(one_line(error)) from error
