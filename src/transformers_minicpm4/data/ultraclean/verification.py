"""
Efficient verification (Ultra-FineWeb, arXiv 2505.05427, section 3.1; MiniCPM4, arXiv 2506.07900, section 3.1): does a
candidate corpus help? Anneal one checkpoint twice, on the base mix and on the base mix with a share of the candidate,
and compare held-out losses over several seeds.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.utils import logging, tqdm

from .files import write_text


logger = logging.get_logger(__name__)

ARMS = ("base", "candidate")
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference beyond noise"
MANY_EPOCHS = 4  # up to about here repeated text is nearly as good as new text (Muennighoff et al., arXiv 2305.16264)

# What efficient_verification sets itself; both arms and every resumption depend on these.
MANAGED = {
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "seed", "data_seed"),
    *("train_sampling_strategy", "remove_unused_columns", "prediction_loss_only", "eval_strategy", "report_to"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "logging_strategy", "disable_tqdm"),
    *("ignore_data_skip", "load_best_model_at_end", "push_to_hub", "auto_find_batch_size", "use_cpu"),
}


@dataclass(frozen=True)
class DomainResult:
    """
    Held-out losses of one domain, in nats per token, and what they show.

    Args:
        start: loss of the checkpoint before annealing.
        base, candidate: one loss a seed and arm, in the order of the seeds.
        difference: mean over the seeds of candidate minus base; below zero the candidate helps.
        standard_error: of `difference`.
        interval: Student's t interval of `difference`, at the level that all domains together ask for.
        verdict: "better", "worse" or "no difference beyond noise".
    """

    start: float
    base: tuple[float, ...]
    candidate: tuple[float, ...]
    difference: float
    standard_error: float
    interval: tuple[float, float]
    verdict: str


@dataclass(frozen=True)
class VerificationReport:
    """
    What `efficient_verification` found.

    Args:
        domains: a [`DomainResult`] by evaluation domain.
        seeds: seeds of data order and dropout, one pair of runs each.
        confidence: probability that no domain is called better or worse by chance alone.
        data: by source: documents, tokens, what was skipped and why, and epochs seen by either arm.
        settings: everything the result depends on, digests of weights and data included.
    """

    domains: dict[str, DomainResult]
    seeds: tuple[int, ...]
    confidence: float
    data: dict
    settings: dict

    @property
    def summary(self) -> str:
        """One sentence: which domains are better, which worse, and where nothing was shown."""
        parts = []
        for verdict in (BETTER, WORSE, NO_DIFFERENCE):
            names = [name for name, result in self.domains.items() if result.verdict == verdict]
            if names:
                parts.append(f"{verdict}: {', '.join(names)}")
        return "; ".join(parts)

    @property
    def left_out(self) -> str:
        """Documents without text, and held-out documents that were trained on: how many of which source."""
        parts = []
        for name, counts in self.data.items():
            reasons = {**counts["skipped"], "also trained on": counts.get("leaked", 0)}
            parts += [f"{name} {count} {reason}" for reason, count in reasons.items() if count]
        return ", ".join(parts)

    def to_dict(self) -> dict:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, fields: dict) -> "VerificationReport":
        """The inverse of `to_dict`."""
        domains = {
            name: DomainResult(**{key: tuple(value) if isinstance(value, list) else value for key, value in d.items()})
            for name, d in fields["domains"].items()
        }
        return cls(**{**fields, "domains": domains, "seeds": tuple(fields["seeds"])})

    def to_markdown(self) -> str:
        """A table of the domains and the sentence that says what follows from it."""
        lines = [
            "| domain | start | base | candidate | difference | standard error | interval | verdict |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, result in self.domains.items():
            arms = (f"{statistics.mean(a):.4f} ± {statistics.stdev(a):.4f}" for a in (result.base, result.candidate))
            low, high = result.interval
            cells = (
                *(name.replace("|", "\\|"), f"{result.start:.4f}", *arms, f"{result.difference:+.4f}"),
                *(f"{result.standard_error:.4f}", f"[{low:+.4f}, {high:+.4f}]", result.verdict),
            )
            lines.append("| " + " | ".join(cells) + " |")
        setting = self.settings
        lines += [
            "",
            f"Held-out loss in nats per token, mean ± standard deviation over {len(self.seeds)} seeds; difference = "
            f"candidate - base of the same seed. {setting['steps']} steps of {setting['batch_size']} blocks of "
            f"{setting['block_length']} tokens, {self.data['candidate']['share']:.1%} of them the candidate's. "
            f"Intervals hold together at {self.confidence:.0%} (Student's t, Bonferroni over {len(self.domains)}).",
            *(["", f"Left out: {self.left_out}."] if self.left_out else []),
            "",
            f"**{self.summary}**",
            "",
        ]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """
        One panel a domain: the two losses of every seed, joined, and mean and standard deviation of each arm.

        Raises:
            ImportError: without matplotlib.
        """
        try:
            from matplotlib.figure import Figure  # no pyplot: it would keep figures and choose a display
        except ImportError as error:
            raise ImportError(
                "The plot needs matplotlib: pip install matplotlib, or pip install transformers_minicpm4[data]"
            ) from error
        columns = min(4, len(self.domains))
        rows = -(-len(self.domains) // columns)
        figure = Figure(figsize=(3.2 * columns, 3.2 * rows), layout="constrained")
        for axes, (name, result) in zip(
            figure.subplots(rows, columns, squeeze=False).flat, self.domains.items(), strict=False
        ):
            for pair in zip(result.base, result.candidate):
                axes.plot((0, 1), pair, color="0.7", marker=".", linewidth=0.8)
            for place, losses in enumerate((result.base, result.candidate)):
                axes.errorbar(
                    place, statistics.mean(losses), statistics.stdev(losses), fmt="o", capsize=5, color=f"C{place}"
                )
            axes.set_xticks((0, 1), ARMS)
            axes.set_xlim(-0.5, 1.5)
            axes.set_title(f"{name}\n{result.difference:+.4f} · {result.verdict}", fontsize=9)
            axes.set_ylabel("nats per token")
        for axes in list(figure.axes)[len(self.domains) :]:
            axes.remove()
        path = Path(path)
        partial = path.with_name(f".{path.stem}.partial.png")
        figure.savefig(partial, dpi=150)
        partial.replace(path)


def efficient_verification(
    model,
    tokenizer,
    base: Dataset,
    candidate: Dataset,
    evaluation: Mapping[str, Dataset],
    output_dir: str | Path,
    *,
    steps: int,
    batch_size: int = 8,
    block_length: int = 1024,
    learning_rate: float = 1e-3,
    candidate_share: float = 0.3,
    warmup_steps: int = 0,
    decay_type: str = "1-sqrt",
    seeds: Sequence[int] = (0, 1, 2),
    confidence: float = 0.95,
    text_column: str = "text",
    on_leak: str = "refuse",
    checkpoint_steps: int | None = None,
    training_arguments: Mapping | None = None,
    callbacks: Sequence = (),
) -> VerificationReport:
    """
    Verify that a candidate corpus helps before a training run is spent on it.

    For every seed the same weights are annealed twice, with the same steps and learning rates: on `base` alone, and on
    `base` with `candidate_share` of the tokens taken from `candidate`, spread evenly. Apart from the replaced blocks
    both arms read the same blocks at the same steps, so that the difference of a seed is the candidate's doing and the
    spread of the differences is what data order does. The start, every finished run and the report are kept in
    `output_dir`: a second call with the same arguments trains nothing, a killed one goes on from its last checkpoint.

    Args:
        model: causal language model before its decay phase: a folder, a Hub id or a model. A model is copied and stays
            as it is. Trained in float32, or with bfloat16 autocast where a GPU has it.
        tokenizer: its tokenizer, or where to load that from. Documents are joined by its eos token.
        base: documents of the mix that training would use anyway.
        candidate: documents under test.
        evaluation: held-out documents by domain, each at least one block long.
        output_dir: folder of this verification. Holds `report.json`, `report.md`, `losses.png` and `runs/`.
        steps: optimizer steps of one run.
        batch_size: blocks a step, in all.
        block_length: tokens a block.
        learning_rate: peak; falls to about zero with Transformers' `warmup_stable_decay`, which is all decay here.
        candidate_share: share of the candidate arm's tokens, exact to one block.
        warmup_steps: steps before the decay, for an optimizer that starts anew.
        decay_type: "linear", "cosine" or "1-sqrt".
        seeds: at least three. Fixed before the first run: adding seeds until a result appears is no test.
        confidence: probability that no domain at all is called better or worse by chance.
        text_column: name of the text in all datasets.
        on_leak: evaluation documents that are, to the letter, in `base` or `candidate`: "refuse" raises, "remove"
            takes them out of the evaluation and counts them.
        checkpoint_steps: steps between checkpoints; by default a quarter of a run.
        training_arguments: further fields of `TrainingArguments`, the same for all runs.
        callbacks: of the Trainer, for all runs.

    Returns:
        [`VerificationReport`]

    Raises:
        TypeError: a dataset is not a `datasets.Dataset`, or a text is not a string.
        ValueError: too few seeds, a missing column, too little text, leaked documents, a setting out of its range, or
            an `output_dir` that belongs to other settings, weights or data.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seeds = tuple(int(seed) for seed in seeds)
    _check_settings(
        steps, batch_size, block_length, candidate_share, warmup_steps, seeds, confidence, on_leak, evaluation
    )
    extra = dict(training_arguments or {})
    if MANAGED & set(extra):
        raise ValueError(
            f"training_arguments may not contain {', '.join(sorted(MANAGED & set(extra)))}: efficient_verification "
            "sets that from its own arguments, for both arms alike."
        )
    if isinstance(tokenizer, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos token to put between documents; set tokenizer.eos_token.")

    sources = {
        name: _Source.read(dataset, text_column, name)
        for name, dataset in {"base": base, "candidate": candidate, **_domains(evaluation)}.items()
    }
    trained = set().union(*(sources[arm].hashes for arm in ARMS))
    for name in _domains(evaluation):
        sources[name] = sources[name].without(trained, on_leak, name)

    if isinstance(model, (str, Path)):
        start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    else:
        start = copy.deepcopy(model).float()
    start.config.use_cache = False
    positions = getattr(start.config, "max_position_embeddings", None)
    if positions is not None and block_length > positions:
        raise ValueError(
            f"block_length is {block_length}, and the model has {positions} positions; take at most that."
        )

    settings = {
        "model": _model_digest(start),
        "tokenizer": _tokenizer_digest(tokenizer),
        "data": {name: source.digest for name, source in sources.items()},
        "steps": steps,
        "batch_size": batch_size,
        "block_length": block_length,
        "learning_rate": learning_rate,
        "candidate_share": candidate_share,
        "warmup_steps": warmup_steps,
        "decay_type": decay_type,
        "seeds": list(seeds),
        "confidence": confidence,
        "training_arguments": extra,
    }
    output_dir = Path(output_dir)
    settings = _claim(output_dir, settings)

    blocks = steps * batch_size
    replaced = round(candidate_share * blocks)
    packed = {name: source.tokenize(tokenizer, block_length, name) for name, source in sources.items()}
    largest = max(documents.largest_id for documents in packed.values())
    if largest >= start.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"The tokenizer gives the id {largest}, and the model embeds {start.get_input_embeddings().num_embeddings}"
            " ids; take the tokenizer that belongs to the model."
        )

    anneal = _Annealing(
        start=start,
        evaluation={name.removeprefix("evaluation/"): packed[name].whole_blocks() for name in _domains(evaluation)},
        output_dir=output_dir,
        arguments={
            **extra,
            "max_steps": steps,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": steps - warmup_steps, "decay_type": decay_type},
            "warmup_steps": warmup_steps,
            "save_steps": checkpoint_steps or max(1, steps // 4),
        },
        batch_size=batch_size,
        callbacks=list(callbacks),
        total=2 * len(seeds) * steps,
    )
    with anneal.bar:
        start_losses = anneal.run("start", None, None)
        losses = {arm: [] for arm in ARMS}
        for seed in seeds:
            for arm in ARMS:
                other = packed["candidate"] if arm == "candidate" else None
                mixture = Mixture(packed["base"], other, blocks, replaced, seed)
                losses[arm].append(anneal.run(arm, seed, mixture))

    level = 1 - (1 - confidence) / len(evaluation)  # Bonferroni: all intervals hold together at `confidence`
    domains = {}
    for name in evaluation:
        arms = [tuple(run[name] for run in losses[arm]) for arm in ARMS]
        domains[name] = DomainResult(start_losses[name], *arms, *paired_difference(*arms, level))
    data = {name: {**source.counts, **packed[name].counts} for name, source in sources.items()}
    data["candidate"]["share"] = replaced / blocks
    data["base"]["epochs"] = {
        "base": packed["base"].epochs(blocks),
        "candidate": packed["base"].epochs(blocks - replaced),
    }
    data["candidate"]["epochs"] = {"candidate": packed["candidate"].epochs(replaced)}
    for name in ARMS:
        most = max(data[name]["epochs"].values())
        if most > MANY_EPOCHS:
            logger.warning(
                f"The {name} text is read {most:.1f} times a run; beyond {MANY_EPOCHS} times repetition itself costs "
                "loss, so the arms are less comparable. Give more text or take fewer steps."
            )
    report = VerificationReport(domains, seeds, confidence, data, settings)
    write_text(output_dir / "report.json", json.dumps(report.to_dict(), indent=1) + "\n")
    write_text(output_dir / "report.md", report.to_markdown())
    try:
        report.plot(output_dir / "losses.png")
    except ImportError as error:
        logger.warning(f"No losses.png: {error}")
    return report


def paired_difference(
    base: Sequence[float], candidate: Sequence[float], confidence: float
) -> tuple[float, float, tuple[float, float], str]:
    """
    Compare two arms whose runs belong together seed by seed.

    Returns:
        Mean of candidate - base, its standard error, its two-sided Student interval at `confidence` with one degree of
        freedom less than pairs, and the verdict. A spread of exactly zero shows no noise to compare with, so nothing
        is claimed from it.
    """
    differences = [theirs - ours for ours, theirs in zip(base, candidate, strict=True)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = student_t_quantile((1 + confidence) / 2, len(differences) - 1) * error
    verdict = NO_DIFFERENCE
    if error > 0 and abs(mean) > half:
        verdict = BETTER if mean < 0 else WORSE
    return mean, error, (mean - half, mean + half), verdict


def student_t_quantile(probability: float, degrees: int) -> float:
    """
    Quantile of Student's t distribution with a whole number of degrees of freedom, for probabilities from 0.5 up.

    Bisects the closed form of the distribution function (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    if degrees < 1 or not 0.5 <= probability < 1:
        raise ValueError(f"needs degrees >= 1 and 0.5 <= probability < 1, got {degrees} and {probability}")

    def central(angle: float) -> float:
        """P(|t| < tan(angle) * sqrt(degrees))."""
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = degrees % 2
        term = cosine if odd else 1.0
        total = 0.0 if degrees == 1 else term
        for k in range(2 + odd, degrees, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        return 2 / math.pi * (angle + sine * total) if odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if central(middle) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(degrees)


def _check_settings(
    steps, batch_size, block_length, candidate_share, warmup_steps, seeds, confidence, on_leak, evaluation
):
    if len(set(seeds)) != len(seeds) or len(seeds) < 3:
        raise ValueError(
            f"seeds are {list(seeds)}; at least three different ones are needed to tell a difference from noise."
        )
    if min(steps, batch_size) < 1 or block_length < 2:
        raise ValueError(
            f"steps {steps}, batch_size {batch_size}, block_length {block_length}: steps and batch_size must be at "
            "least 1, block_length at least 2."
        )
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps is {warmup_steps} of {steps} steps; leave at least one step for the decay.")
    if not 0 < candidate_share <= 1 or round(candidate_share * steps * batch_size) == 0:
        raise ValueError(
            f"candidate_share is {candidate_share}: of {steps * batch_size} blocks that must be between one and all; "
            "the published recipe takes 0.3."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, as 0.95 does.")
    if on_leak not in ("refuse", "remove"):
        raise ValueError(f'on_leak is {on_leak!r}; "refuse" and "remove" are allowed.')
    if not isinstance(evaluation, Mapping) or not evaluation:
        raise ValueError('evaluation must be a dictionary of at least one domain, such as {"manuals": dataset}.')
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("efficient_verification runs in one process; start it without a distributed launcher.")


def _domains(evaluation: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Domains under names that cannot meet those of the arms."""
    return {f"evaluation/{name}": dataset for name, dataset in evaluation.items()}


@dataclass(frozen=True)
class _Source:
    """Documents with text, and a hash of each text. Rows without text are counted, by reason."""

    dataset: Dataset
    hashes: list[bytes]
    column: str
    counts: dict

    @classmethod
    def read(cls, dataset: Dataset, column: str, name: str) -> "_Source":
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"{name} is a {type(dataset).__name__}, and a datasets.Dataset is needed, whose rows can be read in "
                "any order; take as many rows of a stream as the steps need."
            )
        if column not in dataset.column_names:
            raise ValueError(
                f"{name} has no column {column!r}, only {', '.join(dataset.column_names)}; name it with text_column."
            )
        dataset = dataset.with_format(None).select_columns([column])
        hashes, kept, null, blank = [], [], 0, 0
        for first in range(0, len(dataset), 1000):
            for row, text in enumerate(dataset[first : first + 1000][column], first):
                if text is None:
                    null += 1
                elif not isinstance(text, str):
                    raise TypeError(f"{name}, row {row}: {column!r} is a {type(text).__name__}, and text is needed.")
                elif not text.strip():
                    blank += 1
                else:
                    kept.append(row)
                    hashes.append(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        if null or blank:
            dataset = dataset.select(kept)
        return cls(dataset, hashes, column, {"documents": len(kept), "skipped": {"null": null, "blank": blank}})

    @property
    def digest(self) -> str:
        """Of the texts in their order."""
        return hashlib.sha256(b"".join(self.hashes)).hexdigest()

    def without(self, trained: set[bytes], on_leak: str, name: str) -> "_Source":
        """The documents that are not trained on."""
        kept = [row for row, value in enumerate(self.hashes) if value not in trained]
        leaked = len(self.hashes) - len(kept)
        if leaked and on_leak == "refuse":
            raise ValueError(
                f"{name}: {leaked} of {len(self.hashes)} documents are also in base or candidate, so their loss would "
                'not be held out; remove them, or let on_leak="remove" do it.'
            )
        counts = {**self.counts, "documents": len(kept), "leaked": leaked}
        return _Source(self.dataset.select(kept), [self.hashes[row] for row in kept], self.column, counts)

    def tokenize(self, tokenizer, block_length: int, name: str) -> "Packed":
        documents = self.dataset.map(
            _tokenize,
            batched=True,
            remove_columns=[self.column],
            fn_kwargs={"tokenizer": tokenizer, "column": self.column},
            features=Features(
                {"input_ids": List(Value("int32")), "length": Value("int64"), "largest": Value("int64")}
            ),
            desc=f"tokenize {name}",
        )
        packed = Packed(documents, block_length)
        if packed.tokens < block_length:
            raise ValueError(
                f"{name} has {packed.tokens} tokens in {len(documents)} documents, fewer than the {block_length} of "
                "one block; give more text or a smaller block_length."
            )
        return packed


def _tokenize(batch: dict, tokenizer, column: str) -> dict:
    ids = tokenizer(batch[column], add_special_tokens=False, verbose=False)["input_ids"]
    ids = [[*document, tokenizer.eos_token_id] for document in ids]
    return {"input_ids": ids, "length": [len(document) for document in ids], "largest": [max(d) for d in ids]}


class Packed:
    """Tokenized documents, each closed by eos, as one stream of tokens cut into blocks."""

    def __init__(self, documents: Dataset, block_length: int):
        # Views of the Arrow file: a block in a long document reads its own tokens and no others.
        column = documents.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]
        self.chunks = [(np.asarray(chunk.offsets), np.asarray(chunk.values)) for chunk in column.chunks]
        self.first_rows = np.cumsum([0] + [len(offsets) - 1 for offsets, _ in self.chunks])
        self.lengths = np.asarray(documents["length"], dtype=np.int64)
        self.largest_id = max(documents["largest"], default=0)
        self.tokens = int(self.lengths.sum())
        self.block_length = block_length
        self.counts = {"tokens": self.tokens}

    def document(self, row: int) -> np.ndarray:
        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        offsets, values = self.chunks[number]
        row -= int(self.first_rows[number])
        return values[offsets[row] : offsets[row + 1]]

    def epochs(self, blocks: int) -> float:
        return blocks * self.block_length / self.tokens

    def order(self, seed: int, blocks: int) -> np.ndarray:
        """Rows of the documents for so many blocks: shuffled, and shuffled anew for every further epoch."""
        generator = np.random.default_rng(seed)
        epochs = -(-blocks * self.block_length // self.tokens)
        return np.concatenate([generator.permutation(len(self.lengths)) for _ in range(epochs)])

    def whole_blocks(self) -> "Stream":
        """All documents in their own order; the last tokens that fill no block are left out and counted."""
        self.counts["tokens_left_out"] = self.tokens % self.block_length
        return Stream(self, np.arange(len(self.lengths)), self.tokens // self.block_length)


class Stream:
    """Blocks of packed documents in a given order, put together when they are read."""

    def __init__(self, packed: Packed, order: np.ndarray, blocks: int):
        self.packed, self.order, self.blocks = packed, order, blocks
        self.ends = np.cumsum(packed.lengths[order])  # position after each document

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`input_ids` and `labels`, (block_length,) int64; the model shifts the labels."""
        if not 0 <= index < self.blocks:
            raise IndexError(index)
        length = self.packed.block_length
        start = index * length
        first, last = np.searchsorted(self.ends, (start, start + length - 1), side="right")
        tokens = np.concatenate([self.packed.document(row) for row in self.order[first : last + 1]])
        skip = start - (int(self.ends[first - 1]) if first else 0)
        block = tokens[skip : skip + length].astype(np.int64)
        return {"input_ids": block, "labels": block}


class Mixture:
    """
    The blocks of one run in training order.

    Of `blocks` places `replaced` ones, spread evenly, go to the candidate; without a candidate they go to the base.
    In both arms all other places hold the same base blocks. The places in question read the beginning of either
    stream: with the base as its own candidate both arms are equal.
    """

    def __init__(self, base: Packed, candidate: Packed | None, blocks: int, replaced: int, seed: int):
        self.blocks, self.replaced = blocks, replaced
        self.base = Stream(base, base.order(seed, blocks), blocks)
        self.other = self.base
        if candidate is not None:
            self.other = Stream(candidate, candidate.order(seed, replaced), replaced)

    def __len__(self) -> int:
        return self.blocks

    def is_replaced(self, place: int) -> bool:
        return (place + 1) * self.replaced // self.blocks > place * self.replaced // self.blocks

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        if not 0 <= place < self.blocks:
            raise IndexError(place)
        before = place * self.replaced // self.blocks  # replaced places so far
        return self.other[before] if self.is_replaced(place) else self.base[self.replaced + place - before]


class _Annealing:
    """Runs of the Trainer from one start, each kept as a JSON file once it is finished."""

    def __init__(self, start, evaluation, output_dir: Path, arguments: dict, batch_size: int, callbacks, total: int):
        self.start, self.evaluation, self.output_dir = start, evaluation, output_dir
        self.arguments, self.batch_size, self.callbacks = arguments, batch_size, callbacks
        self.bar = tqdm(total=total, desc="efficient verification", unit="step")

    def run(self, arm: str, seed: int | None, mixture: Mixture | None) -> dict[str, float]:
        """Losses by domain, in nats per token; `mixture` None only evaluates."""
        name = arm if seed is None else f"{arm}-seed{seed}"
        record = self.output_dir / "runs" / f"{name}.json"
        if record.is_file():
            self.bar.update(self.arguments["max_steps"] if mixture else 0)
            return json.loads(record.read_text(encoding="utf-8"))["losses"]
        self.bar.set_postfix_str(name)
        folder = self.output_dir / "checkpoints" / name
        trainer = self.trainer(folder, seed or 0, mixture)
        if mixture is not None:
            checkpoint = last_complete_checkpoint(folder)
            if checkpoint is not None:
                logger.info(f"{name} goes on from {checkpoint.name}")
            with _without_inner_bars():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        losses = {}
        for domain, blocks in self.evaluation.items():
            # All blocks have one length, so the Trainer's mean over blocks is the mean over tokens.
            losses[domain] = trainer.evaluate(eval_dataset=blocks)["eval_loss"]
            if not math.isfinite(losses[domain]):
                raise ValueError(
                    f"{name}: the loss on {domain} is {losses[domain]}; the run diverged. Lower learning_rate, or "
                    "give warmup_steps, in a new output_dir."
                )
        write_text(record, json.dumps({"arm": arm, "seed": seed, "losses": losses, **_versions()}, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        return losses

    def trainer(self, folder: Path, seed: int, mixture: Mixture | None):
        import torch
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

        bar = self.bar

        class Progress(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                bar.update(state.global_step)

            def on_step_end(self, args, state, control, **kwargs):
                bar.update(1)

        gpus = torch.cuda.device_count()
        share = self.arguments.get("gradient_accumulation_steps", 1) * max(1, gpus)
        if self.batch_size % share:
            raise ValueError(
                f"batch_size is {self.batch_size}, and {share} parts are asked for (GPUs times "
                "gradient_accumulation_steps); make it a multiple of them."
            )
        arguments = TrainingArguments(
            output_dir=str(folder),
            **{"bf16": gpus > 0 and torch.cuda.is_bf16_supported(), **self.arguments},
            per_device_train_batch_size=self.batch_size // share,
            per_device_eval_batch_size=self.batch_size // share,
            use_cpu=gpus == 0 and not torch.backends.mps.is_available(),
            seed=seed,
            train_sampling_strategy="sequential",  # the mixture is in training order
            remove_unused_columns=False,
            prediction_loss_only=True,
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            save_strategy="steps",
            save_total_limit=2,  # a process killed while it saves leaves the one before
        )
        trainer = Trainer(
            model=copy.deepcopy(self.start),
            args=arguments,
            train_dataset=mixture,
            data_collator=default_data_collator,
            callbacks=[Progress(), *self.callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


@contextmanager
def _without_inner_bars():
    """One bar for all runs, not one for every file of every checkpoint."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of the Trainer that was written to its end, which is where it writes its state."""
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        except (OSError, ValueError, KeyError):
            shutil.rmtree(checkpoint)  # half of one; the Trainer would count it among those to keep
        else:
            found.append((step, checkpoint))
    return max(found)[1] if found else None


def _claim(output_dir: Path, settings: dict) -> dict:
    """Write the settings into the folder; refuse one where something was trained under other settings."""
    try:
        settings = json.loads(json.dumps(settings))
    except TypeError as error:
        raise ValueError(f"training_arguments must be plain numbers, texts and lists ({error}).") from error
    path = output_dir / "settings.json"
    if not any((output_dir / "runs").glob("*.json")) and not (output_dir / "checkpoints").is_dir():
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return settings
    there = json.loads(path.read_text(encoding="utf-8"))
    old, new = _flat(there), _flat(settings)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        raise ValueError(
            f"{output_dir} holds a verification with other settings or data: "
            + "; ".join(f"{key} was {_short(old.get(key))} and is now {_short(new.get(key))}" for key in changed)
            + ". Give another output_dir, or delete that one."
        )
    return settings


def _flat(settings: dict) -> dict:
    nested = {f"data of {name}": digest for name, digest in settings["data"].items()}
    return {**{key: value for key, value in settings.items() if key != "data"}, **nested}


def _short(value) -> str:
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _model_digest(model) -> str:
    """sha256 of the config, and of names, types, shapes and bytes of all weights, whatever file they came from."""
    import torch

    config = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache"):
        config.pop(key, None)  # where it came from, not what it is
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer) -> str:
    if tokenizer.is_fast:
        # Truncation and padding are the state of the last call, not the tokenizer's.
        content = {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps([content, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()


def _versions() -> dict:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
