"""`minicpm4 demo`: a real model answers from a long real text, with dense attention beside sparse."""

import argparse
import sys
import textwrap
from time import perf_counter

from . import blocks_plot, demo_engine
from .document import BUNDLED_TOKENS, Prompts, unwrapped
from .errors import UserError, one_line
from .generate import (
    DTYPES,
    at_least_one,
    choose_device,
    load_minicpm4_config,
    load_model,
    load_tokenizer,
    stop_tokens,
)


EXAMPLES = """\
examples:
  minicpm4 demo                                     three questions to the Python language reference
  minicpm4 demo --plot blocks.png                   and a picture of what sparse attention read
  minicpm4 demo --file report.txt --question "Who wrote the report?"
  minicpm4 demo --model openbmb/MiniCPM4-0.5B --question "What is a generator?" --dense-len 1024

The bundled model is SmolLM2-135M-Instruct in the form of MiniCPM4. Exit code 1: sparse attention was wrong where dense
was right.
"""
# Sparse already within a few thousand tokens, where the released settings begin at 8,192.
SETTINGS = {"dense_len": 1024, "topk": 16, "window_size": 512}
# Tokens of the text given to the model at once: a second or two of work, so that the bar moves.
CHUNK = 512
# Enough for a rate, little enough to wait for.
TIMED_TOKENS = 24
WIDTH = 100


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="a real model answers from a long real text, dense beside sparse",
        description="A real model answers from a long real text, with dense attention beside sparse (InfLLM v2).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="MODEL", help="folder or Hub id of a MiniCPM4; default: the bundled one")
    parser.add_argument("--file", metavar="FILE", help="text in UTF-8; default: the Python language reference")
    parser.add_argument("--question", action="append", metavar="TEXT", help="ask this instead; may be repeated")
    parser.add_argument(
        "--context-tokens",
        type=at_least_one,
        metavar="N",
        help=f"most tokens of the text to take; default: all of FILE, {BUNDLED_TOKENS:,} of the reference",
    )
    parser.add_argument("--max-new-tokens", type=at_least_one, default=48, metavar="N", help="default 48")
    parser.add_argument(
        "--compile", action="store_true", help="let the engine at the end compile its steps (a minute or two more)"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw which blocks were read (needs the extra: notebooks)")
    attention = parser.add_argument_group(
        "sparse attention (default: the model's own sparse_config; where it has none, as named)"
    )
    attention.add_argument("--dense-len", type=int, metavar="TOKENS", help="dense below this, -1: never; 1024")
    attention.add_argument("--topk", type=int, metavar="BLOCKS", help="blocks read beside the window; 16")
    attention.add_argument("--window-size", type=int, metavar="TOKENS", help="nearest tokens, always read; 512")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--dtype", choices=DTYPES, help="default: float32; auto (as stored) with --model")
    where.add_argument("--device", metavar="NAME", help="e.g. cpu, cuda; default: a GPU if there is one")


def run(args) -> int:
    try:
        return demonstrate(args)
    except KeyboardInterrupt:
        print("\nminicpm4 demo: stopped", file=sys.stderr)
        return 130


def demonstrate(args) -> int:
    # In the order of cost, so that nothing is loaded for an input that cannot be used.
    blocks_plot.check(args.plot)
    args.dtype = args.dtype or ("auto" if args.model else "float32")
    bundled = args.model is None
    if bundled:
        args.model = bundled_model()
    say("loading the libraries and the tokenizer (a few seconds)")
    config = load_minicpm4_config(args.model)
    settings = sparse_settings(args, config)
    config.sparse_config = None  # each reading sets its own
    device = choose_device(args.device)
    tokenizer = load_tokenizer(args.model)
    prompts = Prompts(args, tokenizer, config, at_least=TIMED_TOKENS)

    say(f"loading {'SmolLM2-135M-Instruct as MiniCPM4' if bundled else args.model} ({args.dtype}, {device})")
    model = load_model(args, config, "sdpa", device)
    introduce(prompts, settings)
    recorder = blocks_plot.Recorder(model)
    dense = Reading("dense", model, tokenizer, None)
    sparse = Reading("sparse", model, tokenizer, settings)
    dense.read(prompts.document_ids)
    recorder.forget()
    sparse.read(prompts.document_ids)
    document_blocks = recorder.take(sparse.cache, settings)

    asked, replies = [], []
    for number, question in enumerate(prompts.questions, 1):
        print(f"\n{number}. {question.text}")
        answer = prompts.answer_tokens(question)
        if answer is not None:
            print(f'   known answer: "{question.answer}", {whereabouts(answer, prompts, settings)}')
        if question.lead:
            print(f"   given:  {question.lead} ...")
        ids = prompts.question_ids(question)
        first = dense.answer(prompts.document_ids, ids, args.max_new_tokens, bool(question.lead))
        end_line(verdict(question, first))
        recorder.forget()
        second = sparse.answer(prompts.document_ids, ids, args.max_new_tokens, bool(question.lead), recorder)
        end_line(verdict(question, second, first))
        replies.append((first, second))
        asked.append((f"question {number}", sparse.blocks, answer and answer[0] // settings.block_size))
    recorder.close()

    say("\nmeasuring how fast answers are written")
    ids = prompts.question_ids(prompts.questions[-1])
    for reading in (dense, sparse):
        reading.time(prompts.document_ids, ids, TIMED_TOKENS)
    print()
    print_table(dense, sparse, document_blocks, asked[-1][1], settings)
    say("\nthe same model in the edge engine (a few seconds)")
    dense.switch()
    demo_engine.show_engine(model, tokenizer, prompts.text, args.compile, make_column(tokenizer, None))
    if args.plot:
        print(blocks_plot.draw(args.plot, recorder.layer, settings, document_blocks, asked))
    if not any(question.answer for question in prompts.questions):
        return 0
    text, agreed = conclusion(prompts, replies)
    print(text)
    return 0 if agreed else 1


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def bundled_model() -> str:
    from .assets import smollm2_path

    try:
        return str(smollm2_path())
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def sparse_settings(args, config):
    """The model's own settings or the demo's, with what the arguments change."""
    from transformers_minicpm4 import InfLLMv2Config

    own = config.infllm_v2 if config.sparse_config is not None else InfLLMv2Config(**SETTINGS)
    changes = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    try:
        return InfLLMv2Config.from_dict({**own.to_dict(), **changes})
    except (ValueError, TypeError) as error:
        raise UserError(one_line(error)) from error


class Reading:
    """One kind of attention: the text is read once, and every question starts again from there."""

    def __init__(self, name: str, model, tokenizer, settings):
        self.name, self.model, self.tokenizer, self.settings = name, model, tokenizer, settings
        self.cache = self.blocks = None

    def switch(self) -> None:
        """Make the one model attend this way; both kinds share its weights."""
        self.model.config.sparse_config = self.settings
        self.model.set_attn_implementation("sdpa" if self.settings is None else "infllm_v2")

    def read(self, ids: list[int]) -> None:
        """Fill the cache in chunks: the answer is the same, and there is something to see meanwhile."""
        import torch
        from transformers import DynamicCache
        from transformers.utils.logging import tqdm

        self.switch()
        self.cache = DynamicCache(config=self.model.config)
        begin = perf_counter()
        with torch.no_grad(), tqdm(total=len(ids), unit=" tokens", desc=f"reading, {self.name:6}") as bar:
            for start in range(0, len(ids), CHUNK):
                chunk = torch.tensor([ids[start : start + CHUNK]], device=self.model.device)
                self.model.model(chunk, past_key_values=self.cache, use_cache=True)
                bar.update(chunk.shape[1])
        self.read_rate = len(ids) / (perf_counter() - begin)

    def answer(self, document_ids, question_ids, max_new_tokens: int, one_sentence: bool, recorder=None) -> str:
        """Stream the answer. With a recorder, `blocks` then says what question and answer read."""
        column = make_column(self.tokenizer, f"   {self.name:7} ")
        stop = [end_of_sentence(self.tokenizer, len(document_ids) + len(question_ids))] if one_sentence else None
        self.generate(document_ids, question_ids, column, max_new_tokens, stopping_criteria=stop)
        if recorder is not None:
            self.blocks = recorder.take(self.cache, self.settings)
        self.forget(len(document_ids))
        return column.text

    def time(self, document_ids, question_ids, count: int) -> None:
        """Measure how fast the answer is written, on more tokens than a short answer has."""
        clock = make_column(self.tokenizer, None)
        self.generate(document_ids, question_ids, clock, count, min_new_tokens=count)
        self.forget(len(document_ids))
        self.write_rate = (count - 1) / (clock.times[-1] - clock.times[1])

    def generate(self, document_ids, question_ids, streamer, max_new_tokens: int, **options) -> None:
        import torch

        self.switch()
        ids = torch.tensor([document_ids + question_ids], device=self.model.device)
        stop = stop_tokens(self.model, self.tokenizer)
        pad = self.model.generation_config.pad_token_id
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop[0] if pad is None and stop else pad,
            streamer=streamer,
            **options,
        )

    def forget(self, length: int) -> None:
        """Crop the cache back to the text."""
        self.cache.crop(length - self.cache.get_seq_length())


def make_column(tokenizer, label: str | None):
    """A streamer that writes words behind a label, wrapped, and notes when each token came; silent without label."""
    from transformers import TextStreamer

    class Column(TextStreamer):
        def __init__(self):
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times, self.text, self.position = [], "", WIDTH
            if label is not None:
                print(label, end="", flush=True)
                self.position = len(label)

        def put(self, value):
            self.times.append(perf_counter())
            super().put(value)

        def on_finalized_text(self, text, stream_end=False):
            self.text += text
            if label is None:
                return
            for word in text.split():
                if self.position + 1 + len(word) > WIDTH - 14:  # room for the verdict
                    print("\n" + " " * (len(label) - 1), end="")
                    self.position = len(label) - 1
                print(" " + word, end="", flush=True)
                self.position += 1 + len(word)

    return Column()


def end_of_sentence(tokenizer, start: int):
    """Stops at a full stop, where the rest of the sentence was asked for and the model would go on about something."""
    import torch
    from transformers import StoppingCriteria

    class EndOfSentence(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            ended = [tokenizer.decode(row[start:]).rstrip().endswith(".") for row in input_ids]
            return torch.tensor(ended, device=input_ids.device)

    return EndOfSentence()


def verdict(question, reply: str, dense: str | None = None) -> str:
    words = []
    if question.answer:
        words.append("right" if question.is_right(reply) else "wrong")
    elif dense is not None:
        words.append("same words" if unwrapped(reply) == unwrapped(dense) else "other words")
    return "".join(f"  [{word}]" for word in words)


def end_line(text: str) -> None:
    print(text, flush=True)


def whereabouts(answer: tuple[int, int], prompts, settings) -> str:
    """Where the answer lies, and whether a sparse query finds it without choosing."""
    size = settings.block_size
    total = len(prompts.document_ids)
    block, own = answer[0] // size, total // size
    text = f"token {answer[0] + 1:,} of {total:,}"
    if block < settings.init_blocks:
        return f"{text}, in an initial block"
    if block >= own - settings.window_blocks:
        return f"{text}, in the window"
    return f"{text}, to be selected"


def introduce(prompts, settings) -> None:
    total = len(prompts.document_ids)
    print(textwrap.fill(f"text: {total:,} tokens, {prompts.source}", WIDTH, subsequent_indent="      "))
    reads = f"a query reads at most {settings.selected_blocks} blocks of {settings.block_size} tokens"
    first = settings.first_sparse_position(total)
    print(f"sparse attention (InfLLM v2): {reads}, from token {first + 1:,} on")
    if first >= total:
        print(
            "      The text ends before that, so sparse attention reads everything, as dense attention does; give a\n"
            "      longer text, or lower --dense-len, --topk and --window-size."
        )


def print_table(dense, sparse, document, last, settings) -> None:
    """Reads, as counted in the recorded layer, and rates; dense attention reads all that a query can see."""
    seen, read = document.visible_tokens().double(), document.read_tokens(settings.block_size)
    last_seen, last_read = float(last.visible_tokens()[-1]), float(last.read_tokens(settings.block_size)[-1])
    rows = [
        ("tokens a query of the text could see, mean", f"{seen.mean():,.0f}", f"{seen.mean():,.0f}"),
        ("                            and read, mean", f"{seen.mean():,.0f}", f"{read.mean():,.0f}"),
        ("tokens the last query could see", f"{last_seen:,.0f}", f"{last_seen:,.0f}"),
        ("                       and read", f"{last_seen:,.0f}", f"{last_read:,.0f}"),
        ("reading the text, tokens/s (prefill)", f"{dense.read_rate:,.1f}", f"{sparse.read_rate:,.1f}"),
        ("writing the answer, tokens/s (decode)", f"{dense.write_rate:,.1f}", f"{sparse.write_rate:,.1f}"),
    ]
    print(f"{f'context: {len(seen):,} tokens':44}{'dense':>12}{'sparse':>12}")
    for name, *cells in rows:
        print(f"{name:44}" + "".join(f"{cell:>12}" for cell in cells))
    reading, writing = sparse.read_rate / dense.read_rate, sparse.write_rate / dense.write_rate
    print(
        f"speed, sparse to dense: {reading:.2f}x reading, {writing:.2f}x writing. In a text this short attention is a "
        "small\npart of the work and sparse need not be faster; the gain grows with the length of the text."
    )


def conclusion(prompts, replies) -> tuple[str, bool]:
    """The closing line, and whether sparse attention was right wherever dense was."""
    known = [(q.is_right(a), q.is_right(b)) for q, (a, b) in zip(prompts.questions, replies) if q.answer]
    dense, sparse = sum(a for a, _ in known), sum(b for _, b in known)
    lost = sum(a and not b for a, b in known)
    text = f"of {len(known)} known answers, dense attention finds {dense} and sparse {sparse}"
    if dense < len(known):
        text += "; what dense attention misses is the model's own error"
    text += f"; sparse is wrong in {lost} that dense has right" if lost else "; sparse is right wherever dense is"
    return text, lost == 0
