"""`minicpm4 plan`: what a model needs on a device, and which precision and context fit there, without its weights."""

import argparse
import json
import tempfile
from pathlib import Path

from .checkpoint import load_config
from .describe import context_length
from .errors import UserError, one_line
from .generate import at_least_one


PRECISIONS = ("bf16", "fp16", "fp32", "int4", "ternary")
DRAFTS = ("eagle", "eagle3", "lookup")

EXAMPLES = """\
examples:
  minicpm4 plan openbmb/MiniCPM4-8B                          on this machine, whatever it is
  minicpm4 plan openbmb/MiniCPM4-8B --device orin-nx --context 65536
  minicpm4 plan ./config.json --device agx-orin --precision int4 --draft eagle
  minicpm4 plan ./my-checkpoint --device rtx-4060 --batch 4 --json | jq .table
  minicpm4 plan Qwen/Qwen3-8B --device orin-nano --available 5.5     as `free` says on the board, in GB

devices: auto (this machine), orin-nano, orin-nx-8gb, orin-nx, agx-orin-32gb, agx-orin, thor, rtx-3060, rtx-3090,
rtx-4060, rtx-4090, rtx-5090, h200, cpu-ddr4, cpu-ddr5

How to read it: every row is bytes that must be there at once while the last prefill chunk of a full context runs;
their sum must not exceed nine tenths of the memory that is available. Without --context the plan takes the most
that fits. Without --precision it takes 16 bits where they fit, else INT4 (P-GPTQ), and ternary (BitCPM4, for models
trained so) where nothing else does. Tokens a second are a bound: what the memory's published bandwidth allows if
decoding did nothing but read. Nothing is measured. A plan that does not fit ends with exit code 2 and says what would.
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="precision, context and memory of a model on a device, before any weight is there",
        description="Plan precision, context and memory of a model on a device from its configuration alone.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, Hub id, or a config.json")
    parser.add_argument("--device", default="auto", metavar="NAME", help="see the list below (default auto)")
    parser.add_argument("--context", type=at_least_one, metavar="TOKENS", help="prompt and answer (default: most)")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: chosen")
    parser.add_argument("--group-size", type=int, metavar="N", help="inputs a scale (int4: 128, ternary: 64)")
    parser.add_argument("--batch", type=at_least_one, default=1, metavar="N", help="rows at once (default 1)")
    parser.add_argument("--draft", choices=DRAFTS, help="speculative decoding: what proposes tokens")
    parser.add_argument("--draft-window", type=at_least_one, metavar="TOKENS", help="cache of the head (default 1024)")
    parser.add_argument("--draft-vocabulary", type=int, metavar="N", help="FR-Spec ids (default 32768; 0: all)")
    parser.add_argument("--tree-size", type=int, metavar="NODES", help="of the draft, 2 to 64 (default 12)")
    parser.add_argument("--chunk", type=at_least_one, metavar="TOKENS", help="of a prefill call (default 2048)")
    parser.add_argument("--dense", action="store_true", help="plan a sparse checkpoint with dense attention")
    parser.add_argument("--available", type=float, metavar="GB", help="memory that is free, in place of the profile's")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of the memory, in place of the profile's")
    parser.add_argument("--json", action="store_true", help="print JSON; all sizes in bytes")


def run(args) -> None:
    config = read_config(args.model)

    from ..edge.memory_plan import DraftSpec, PlanError, plan_memory

    profile = choose_profile(args)
    try:
        plan = plan_memory(
            config,
            profile,
            context=args.context,
            batch=args.batch,
            precision=args.precision,
            group_size=args.group_size,
            draft=None if args.draft is None else DraftSpec(kind=args.draft, **draft_options(args)),
            chunk=args.chunk,
            sparse=False if args.dense else None,
            context_limit=context_length(config.get_text_config()),
        )
    except PlanError as error:
        raise UserError(one_line(error)) from error
    report = {"model": args.model, **plan.to_dict()}
    print(json.dumps(report, indent=2) if args.json else format_plan(args.model, plan))


def read_config(model: str):
    """The configuration of a folder, a Hub id, or a file."""
    path = Path(model).expanduser()
    if not path.is_file():
        return load_config(model)
    if path.name == "config.json":
        return load_config(str(path.parent))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{model!r} cannot be read as a configuration ({one_line(error)}); give a config.json.") from (
            error
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        try:
            return load_config(folder)
        except UserError as error:
            raise UserError(str(error).replace(str(Path(folder) / "config.json"), model).replace(folder, model)) from (
                error
            )


def choose_profile(args):
    from ..edge.device_profile import GB, PROFILES, detect

    if args.device == "auto":
        try:
            profile = detect()
        except ValueError as error:
            raise UserError(one_line(error)) from error
    elif args.device in PROFILES:
        profile = PROFILES[args.device]
    else:
        raise UserError(f"--device {args.device!r} is not known; known are auto, {', '.join(PROFILES)}.")
    changes = {}
    for name, field in (("available", "memory_available"), ("bandwidth", "bandwidth")):
        value = getattr(args, name)
        if value is None:
            continue
        if not 0 < value < float("inf"):
            raise UserError(f"--{name} {value:g} was given; give a number of GB above 0.")
        changes[field] = int(value * GB)
    available = changes.get("memory_available", 0)
    if available > profile.memory_total:
        raise UserError(
            f"--available {args.available:g} GB is more than the {profile.memory_total / GB:.2f} GB that "
            f"{profile.name} has; give what is free on it."
        )
    if available:  # the assumption is replaced by what the user read
        changes["notes"] = tuple(note for note in profile.notes if "assumption" not in note)
    return profile.replace(**changes)


def draft_options(args) -> dict:
    options = {"window": args.draft_window, "tree_size": args.tree_size}
    options = {name: value for name, value in options.items() if value is not None}
    if args.draft_vocabulary is not None:
        options["vocabulary"] = args.draft_vocabulary or None
    return options


def format_plan(model: str, plan) -> str:
    """The plan as aligned lines."""
    from ..edge.memory_plan import format_gb

    profile = plan.device
    kind = "unified memory" if profile.unified else "memory of its own"
    bandwidth = "bandwidth not known" if profile.bandwidth is None else f"{profile.bandwidth / 1e9:,.1f} GB/s"
    groups = (
        "" if plan.group_size is None else f" in groups of {plan.group_size}" if plan.group_size > 0 else " by row"
    )
    rest = f", the rest in {plan.dtype}" if plan.precision != plan.dtype else ""
    facts = [
        ("model", model),
        ("device", f"{profile.name}: {format_gb(profile.memory_available)} available, {kind}, {bandwidth}"),
        ("", profile.source),
        ("precision", f"{plan.precision}{groups}{rest}"),
        ("context", f"{plan.context:,} tokens (the model's: {plan.context_limit:,}), batch {plan.batch}"),
        ("attention", "InfLLM v2 (sparse)" if plan.sparse else "dense"),
    ]
    lines = [f"{name:<11} {value}" for name, value in facts if value]
    lines.append("")
    for section, rows in plan.table.items():
        for name, count in rows.items():
            if count:
                lines.append(f"{section:<12} {name.replace('_', ' '):<18} {format_gb(count):>10} {count:>18,}")
                section = ""
    share = plan.total_bytes / plan.budget_bytes
    lines.append(f"{'total':<31} {format_gb(plan.total_bytes):>10} {plan.total_bytes:>18,}")
    lines.append(
        f"{'may be used':<31} {format_gb(plan.budget_bytes):>10} {plan.budget_bytes:>18,}  ({share:.0%} used)"
    )
    if plan.roofline:
        rows = "" if plan.batch == 1 else f" of {plan.batch} rows together"
        lines += [
            "",
            f"tokens/s{rows}, at most: {plan.roofline['first']:.1f} at the start, {plan.roofline['full']:.1f} at "
            f"{plan.context:,} tokens ({format_gb(sum(plan.read.values()))} read a step)",
        ]
        if plan.break_even is not None and plan.draft.kind != "lookup":
            lines.append(
                f"draft: a round of {plan.draft.steps} passes and a verification reads {plan.break_even:.2f} times a "
                f"plain step; with 2.5 tokens a round at most {plan.roofline['full'] * 2.5 / plan.break_even:.1f} "
                "tokens/s"
            )
    lines += ["", *(f"note: {note}" for note in plan.notes)] if plan.notes else []
    return "\n".join(lines)
