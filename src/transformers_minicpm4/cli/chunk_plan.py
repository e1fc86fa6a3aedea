"""`minicpm4 chunk-plan`: which chunk length suits the completion lengths of a user's own runs."""

import argparse
import csv
import json
from pathlib import Path

from . import blocks_plot
from .errors import UserError, one_line
from .generate import at_least_one


EXAMPLES = """\
examples:
  minicpm4 chunk-plan lengths.jsonl --max-completion-length 8192 --batch 256 --num-generations 8
  minicpm4 chunk-plan lengths.txt --max-completion-length 8192 --batch 256 --num-generations 8 --processes 8 \\
      --log out/checkpoint-50/trainer_state.json=2048 --plot plan.png
  minicpm4 chunk-plan --paper

LENGTHS has the completion lengths of an earlier run, in tokens: a text file with a number in each line; a csv with a
header; or jsonl with a number or an object in each line. Long ones must be as frequent as they will be, so take all
completions of some steps, not a choice of them.

How to read the table: `sampling` and `step` are relative to ordinary GRPO, whose row is the first. `staleness` says
how many batches were trained between a token's sampling and its own batch; `live rows` are the completions under way
in one iteration, and `kv tokens` what the fullest process must hold of them. Costs are the paper's unless --log gives
the metrics of your own runs of ChunkwiseGRPOTrainer; two runs of different chunk length tell the most.
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "chunk-plan",
        help="chunk length for RL, planned from a log of completion lengths",
        description="Play the schedule of chunk-wise rollouts (MiniCPM4, section 3.2.3) with the completion lengths "
        "of a run, and say which chunk_length to train with. Nothing is sampled or trained.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lengths", metavar="LENGTHS", nargs="?", help="file of completion lengths in tokens")
    parser.add_argument("--column", default="completion_length", metavar="NAME", help="default completion_length")
    run = parser.add_argument_group("the run to plan")
    run.add_argument("--max-completion-length", type=at_least_one, metavar="TOKENS", help="as in GRPOConfig")
    run.add_argument("--batch", type=at_least_one, metavar="N", help="completions of a batch (generation_batch_size)")
    run.add_argument("--num-generations", type=at_least_one, metavar="N", help="completions of a prompt")
    run.add_argument("--processes", type=at_least_one, default=1, metavar="N", help="default 1")
    run.add_argument("--prompt-tokens", type=int, default=0, metavar="N", help="length of a prompt (default 0)")
    run.add_argument("--rollout-batch-size", type=at_least_one, metavar="N", help="as in ChunkwiseGRPOConfig")
    run.add_argument("--max-live-rows", type=at_least_one, metavar="N", help="as in ChunkwiseGRPOConfig")
    run.add_argument("--max-staleness", type=int, metavar="BATCHES", help="as in ChunkwiseGRPOConfig")
    run.add_argument(
        "--dropped",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of prompts that dynamic_sampling drops (default 0)",
    )
    parser.add_argument(
        "--chunk-lengths", type=at_least_one, nargs="+", metavar="TOKENS", help="default: maximum / 2, 4, 8, 16"
    )
    parser.add_argument(
        "--log",
        action="append",
        default=[],
        metavar="FILE=CHUNK",
        help="trainer_state.json of a run with these settings, and its chunk_length; may be repeated",
    )
    parser.add_argument("--steps", type=at_least_one, default=50, metavar="N", help="simulated steps (default 50)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the lengths drawn (default 0)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the table (needs the extra: notebooks)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--paper", action="store_true", help="fit the paper's table instead, each chunk length left out once"
    )


def run(args) -> None:
    if args.paper:
        return paper(args)
    needed = ("lengths", "max_completion_length", "batch", "num_generations")
    missing = [name for name in needed if getattr(args, name) is None]
    if missing:
        names = ["LENGTHS" if name == "lengths" else f"--{name.replace('_', '-')}" for name in missing]
        raise UserError(f"{', '.join(names)} missing; a run is planned from all of LENGTHS and the three settings.")
    if args.batch % args.num_generations:
        raise UserError(
            f"--batch {args.batch} is no multiple of --num-generations {args.num_generations}; it counts completions, "
            "as generation_batch_size does."
        )
    blocks_plot.check(args.plot)
    lengths = read_lengths(Path(args.lengths), args.column, args.max_completion_length)
    logs = dict(_log(text) for text in args.log)

    from ..rl.schedule import costs_from_logs, plan

    run = (lengths, args.max_completion_length, args.num_generations, args.batch // args.num_generations)
    shared = {name: getattr(args, name) for name in ("processes", "prompt_tokens", "rollout_batch_size")}
    try:
        costs = costs_from_logs(logs, *run, **shared) if logs else None
        found = plan(
            *run,
            costs,
            args.chunk_lengths,
            **shared,
            steps=args.steps,
            seed=args.seed,
            max_live_rows=args.max_live_rows,
            max_staleness=args.max_staleness,
            dropped=args.dropped,
        )
    except (ValueError, OSError) as error:
        raise UserError(one_line(error)) from error
    if args.json:
        print(
            json.dumps(
                {"recommended": found.recommended, "chunk_lengths": [_row(found, p) for p in found.predictions]}
            )
        )
    else:
        show(args, lengths, costs, found)
    if args.plot:
        draw(args.plot, found)
    return None


def read_lengths(path: Path, column: str, longest: int) -> list[int]:
    """The lengths in a file; the sentence of an error names the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8; give lengths as .txt, .csv or .jsonl.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    suffix = path.suffix.lower()
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if suffix == ".csv":
        values = _of_csv(path, lines, column)
    elif suffix in (".jsonl", ".ndjson", ".json"):
        values = _of_jsonl(path, lines, column)
    else:
        values = lines
    if not values:
        raise UserError(f"{path} has no lengths; give a file with one completion length in tokens on each line.")
    return [_length(path, number, value, longest) for number, value in values]


def _of_csv(path: Path, lines: list[tuple[int, str]], column: str) -> list[tuple[int, object]]:
    if not lines:
        return []
    header, *rows = [(number, next(csv.reader([line]))) for number, line in lines]
    names = [name.strip() for name in header[1]]
    if column not in names:
        raise UserError(f"{path} has no column {column!r}; its columns are {', '.join(names)}: set --column.")
    place = names.index(column)
    return [(number, row[place] if place < len(row) else "") for number, row in rows]


def _of_jsonl(path: Path, lines: list[tuple[int, str]], column: str) -> list[tuple[int, object]]:
    values = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number}: {line[:40]!r} is no JSON; give a value on each line.") from None
        if isinstance(value, dict):
            if column not in value:
                raise UserError(
                    f"{path}, line {number} has no {column!r}; it has {', '.join(value) or 'nothing'}: set --column."
                )
            value = value[column]
        values.append((number, value))
    return values


def _length(path: Path, number: int, value, longest: int) -> int:
    try:
        if isinstance(value, bool):
            raise ValueError
        length = float(value)
        if not length.is_integer():
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise UserError(
            f"{path}, line {number}: {str(value)[:40]!r} is no whole number of tokens; give one length on each line."
        ) from None
    if length < 1:
        raise UserError(f"{path}, line {number}: {int(length)} tokens; a completion has 1 or more.")
    if length > longest:
        raise UserError(
            f"{path}, line {number}: {int(length):,} tokens are more than --max-completion-length {longest:,}; give "
            "the value of the run that wrote the log, or cut its lengths first."
        )
    return int(length)


def _log(text: str) -> tuple[str, int]:
    path, _, chunk_length = text.rpartition("=")
    if not path or not chunk_length.isdigit() or not int(chunk_length):
        raise UserError(f"--log {text!r} is not FILE=CHUNK; e.g. out/checkpoint-50/trainer_state.json=2048.")
    return path, int(chunk_length)


def _row(found, prediction) -> dict:
    ordinary = found.predictions[0]
    return {
        "chunk_length": prediction.chunk_length,
        "sampling": prediction.sampling_seconds / ordinary.sampling_seconds,
        "step": prediction.step_seconds / ordinary.step_seconds,
        "staleness_mean": prediction.staleness_mean,
        "staleness_max": prediction.staleness_max,
        "live_rows_mean": prediction.live_rows_mean,
        "live_rows_peak": prediction.live_rows_peak,
        "kv_tokens_peak": prediction.context_tokens_peak,
        "slot_utilization": prediction.slot_utilization,
        "sampling_seconds": prediction.sampling_seconds,
        "logprob_seconds": prediction.logprob_seconds,
        "training_seconds": prediction.training_seconds,
    }


def show(args, lengths: list[int], costs, found) -> None:
    ordered, longest = sorted(lengths), args.max_completion_length
    at_most = sum(length == longest for length in lengths) / len(lengths)
    print(
        f"{len(lengths):,} lengths: mean {sum(lengths) / len(lengths):,.0f}, median {ordered[len(ordered) // 2]:,}, "
        f"95 % up to {ordered[int(0.95 * (len(ordered) - 1))]:,}, {at_most:.1%} at the maximum of {longest:,} tokens"
    )
    if costs is None:
        print("costs: fitted to the paper's table (1.5B model, A800); --log replaces them by your machine's")
    else:
        print(
            f"costs: decode step {1000 * costs.decode_step:.3g} ms and {1000 * costs.decode_row:.3g} ms a row, "
            f"log-prob pass {1000 * costs.logprob_token:.3g} ms a token, training {1000 * costs.train_token:.3g} ms"
        )
    print(f"\n{'':>8} {'seconds, first = 1':>18} {'staleness':>15} {'live rows':>15} {'kv tokens':>11} {'slots':>6}")
    pair = f"{'mean':>7} {'peak':>7}"
    print(f"{'chunk':>8} {'sampling':>11} {'step':>6} {'mean':>7} {'max':>7} {pair} {'peak':>11} {'used':>6}")
    for prediction in found.predictions:
        row = _row(found, prediction)
        print(
            f"{row['chunk_length']:>8,} {row['sampling']:>11.2f} {row['step']:>6.2f} {row['staleness_mean']:>7.1f} "
            f"{row['staleness_max']:>7} {row['live_rows_mean']:>7,.0f} {row['live_rows_peak']:>7,} "
            f"{row['kv_tokens_peak']:>11,} {row['slot_utilization']:>6.0%}"
        )
    if found.recommended == longest:
        print(f"\nrecommended: ordinary GRPO (chunk_length={longest}); no chunk length shortens the step by 3 %")
    else:
        print(
            f"\nrecommended: chunk_length={found.recommended}, the longest whose step is within 3 % of the shortest: "
            "longer chunks are less stale"
        )


def draw(file: str, found) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [_row(found, prediction) for prediction in found.predictions]
    chunks = [f"{row['chunk_length']:,}" for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    seconds, price = figure.subplots(1, 2)
    seconds.plot(chunks, [row["step"] for row in rows], "o-", color="#4477aa", label="step")
    seconds.plot(chunks, [row["sampling"] for row in rows], "s--", color="#ee7733", label="sampling")
    seconds.axvline(f"{found.recommended:,}", color="#bbbbbb", zorder=0, label="recommended")
    seconds.set(xlabel="chunk length (tokens)", ylabel="seconds, ordinary GRPO = 1", ylim=(0, None))
    seconds.legend(frameon=False)
    price.plot(
        chunks, [row["staleness_mean"] for row in rows], "o-", color="#4477aa", label="staleness, mean (batches)"
    )
    first = rows[0]["live_rows_peak"]
    price.plot(
        chunks, [row["live_rows_peak"] / first for row in rows], "s--", color="#ee7733",
        label=f"live rows, peak (1 = {first:,})",
    )  # fmt: skip
    price.set(xlabel="chunk length (tokens)", ylim=(0, None))
    price.legend(frameon=False)
    try:
        figure.savefig(Path(file).expanduser(), dpi=120)
    except OSError as error:
        raise UserError(f"The picture {file!r} cannot be written: {error.strerror}.") from error
    print(f"picture: {file}")


def paper(args) -> None:
    from ..rl.schedule import PAPER_SECONDS, paper_hold_outs

    fits = [
        (ordinary, left_out, found)
        for ordinary in (True, False)
        for left_out, found in paper_hold_outs(ordinary).items()
    ]
    lines = []
    for ordinary, left_out, found in fits:
        predicted = found.predict(left_out)
        step, sampling = PAPER_SECONDS[left_out]
        rest = predicted.step_seconds - predicted.sampling_seconds
        lines.append(
            {
                "left_out": left_out,
                "fitted_on": [
                    length for length in PAPER_SECONDS if length != left_out and (ordinary or length < 32768)
                ],
                "median_tokens": found.median,
                "decode_step_ms": 1000 * found.costs.decode_step,
                "decode_row_ms": 1000 * found.costs.decode_row,
                "forward_token_ms": 1000 * found.costs.logprob_token,
                "fit_error": found.error,
                "sampling": [predicted.sampling_seconds, sampling],
                "rest": [rest, step - sampling],
                "step": [predicted.step_seconds, step],
            }
        )
    if args.json:
        print(json.dumps(lines))
        return
    print("MiniCPM4, section 3.2.4: each chunk length predicted by a fit that has not seen it; seconds, and the error")
    for line in lines:
        print(f"\n{line['left_out']:,} left out; fitted on {', '.join(f'{length:,}' for length in line['fitted_on'])}")
        print(
            f"  median {line['median_tokens']:,} tokens, decode step {line['decode_step_ms']:.2f} ms, row "
            f"{line['decode_row_ms']:.2f} ms, token of a pass {line['forward_token_ms']:.3f} ms; fit error "
            f"{line['fit_error']:.1%}"
        )
        for name in ("sampling", "rest", "step"):
            guess, truth = line[name]
            print(f"  {name:<9} {guess:>7.1f}  paper {truth:>7.2f}  {guess / truth - 1:>+7.1%}")
