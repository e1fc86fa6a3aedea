"""`minicpm4 generate`: one prompt, one streamed answer, and a closing line that says what ran and how fast."""

import argparse
import logging
import sys
from pathlib import Path

from .checkpoint import load_config, locate, read_headers
from .describe import context_length
from .errors import UserError, one_line


EXAMPLES = """\
examples:
  minicpm4 generate openbmb/MiniCPM4-0.5B --prompt "Name three rivers."
  minicpm4 generate ./my-checkpoint --prompt-file report.txt --sparse --dense-len 1024
  cat report.txt | minicpm4 generate ./my-checkpoint --raw --max-new-tokens 64
  minicpm4 generate ./my-checkpoint --prompt-file report.txt --engine edge --draft lookup

The answer goes to standard output, everything else to standard error.
"""
ENGINES = ("generate", "edge")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="answer one prompt, streamed",
        description="Answer one prompt and stream the answer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a MiniCPM4 checkpoint")

    prompt = parser.add_argument_group("prompt (standard input if neither is given)").add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help="text file in UTF-8")
    form = parser.add_argument_group("form").add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="ask as a user (default where there is a chat template)")
    form.add_argument("--raw", action="store_true", help="continue the text as it is")
    parser.add_argument("--no-thinking", action="store_true", help="MiniCPM4.1: answer without thinking first")

    attention = parser.add_argument_group("attention (default: what the checkpoint says)")
    which = attention.add_mutually_exclusive_group()
    which.add_argument("--dense", action="store_true", help="read every earlier token")
    which.add_argument("--sparse", action="store_true", help="read selected blocks (InfLLM v2)")
    attention.add_argument("--dense-len", type=int, metavar="TOKENS", help="dense below this; -1: always sparse")
    attention.add_argument("--topk", type=int, metavar="BLOCKS", help="blocks read beside the window")
    attention.add_argument("--window-size", type=int, metavar="TOKENS", help="nearest tokens, always read")

    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max-new-tokens", type=at_least_one, default=256, metavar="N", help="default 256")
    decoding.add_argument("--greedy", action="store_true", help="take the likeliest token (default)")
    decoding.add_argument("--temperature", type=positive, metavar="T", help="sample; e.g. 0.8, lower is tamer")
    decoding.add_argument("--top-p", type=share, metavar="P", help="sample from the likeliest tokens, e.g. 0.8")
    decoding.add_argument("--seed", type=int, metavar="N", help="make sampling repeatable")

    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--engine",
        choices=ENGINES,
        default="generate",
        help="generate: Transformers' own loop (default); edge: memory planned and taken once, compiled steps, drafts",
    )
    engine.add_argument(
        "--draft",
        metavar="DRAFT",
        help="edge: what guesses ahead; lookup (copies from the prompt) or a model's folder",
    )
    engine.add_argument("--stop", action="append", metavar="TEXT", help="edge: ends the answer; may be repeated")
    engine.add_argument("--no-compile", action="store_true", help="edge: start at once, with slower steps")

    parser.add_argument(
        "--extend-context", action="store_true", help="MiniCPM4-8B, MiniCPM4.1-8B: the published extension to 128K"
    )
    where = parser.add_argument_group("where it runs")
    where.add_argument("--dtype", choices=DTYPES, default="auto", help="default auto: as stored")
    where.add_argument("--device", metavar="NAME", help="e.g. cpu, cuda, cuda:1, mps; default: a GPU if there is one")


def at_least(least: int):
    def number(text: str) -> int:
        if (given := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{given} is given, at least {least} is needed")
        return given

    return number


at_least_one = at_least(1)


def positive(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is given, a number above 0 is needed (without it: greedy)")
    return number


def share(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is given, a number above 0 and up to 1 is needed")
    return number


def run(args) -> None:
    # In the order of cost: arguments, configuration, headers of the weights, tokenizer, and only then the weights.
    if args.greedy and (args.temperature is not None or args.top_p is not None):
        raise UserError("--greedy takes the likeliest token, --temperature and --top-p sample; give one or the other.")
    if args.engine != "edge" and (args.draft or args.stop or args.no_compile):
        raise UserError("--draft, --stop and --no-compile belong to --engine edge; add it, or leave them out.")
    prompt = read_prompt(args)
    config = load_minicpm4_config(args.model)
    if args.extend_context:
        extend(config)
    attn_implementation = choose_attention(args, config)
    folder = locate(args.model)
    if Path(args.model).expanduser().is_dir():
        read_headers(folder)
    device = choose_device(args.device)

    tokenizer = load_tokenizer(args.model)
    inputs = encode(tokenizer, prompt, args)
    max_new_tokens = room_for_answer(inputs["input_ids"].shape[1], args.max_new_tokens, config)
    if args.engine == "edge":
        from .generate_edge import answer_with_engine

        answer_with_engine(args, config, attn_implementation, device, tokenizer, inputs, max_new_tokens, folder)
        return
    model = load_model(args, config, attn_implementation, device)
    answer(model, tokenizer, with_prefix(model, inputs.to(device), folder), max_new_tokens, args)


def read_prompt(args) -> str:
    if args.prompt is not None:
        text, source = args.prompt, "--prompt"
    elif args.prompt_file is not None:
        source = args.prompt_file
        try:
            text = decode(Path(source).read_bytes(), source)
        except OSError as error:
            raise UserError(f"The prompt file {source!r} cannot be read: {error.strerror}.") from error
    elif sys.stdin.isatty():
        raise UserError("No prompt is given; use --prompt TEXT or --prompt-file FILE, or pipe a text in.")
    else:
        text, source = decode(sys.stdin.buffer.read(), "standard input"), "standard input"
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"The prompt in {source!r} is not text in UTF-8; convert it first.")
    if not text.strip():
        raise UserError(f"The prompt is empty ({source}); give at least one word.")
    return text


def decode(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt in {source!r} is not text in UTF-8; convert it first.") from error


def load_minicpm4_config(model: str):
    from transformers_minicpm4 import MiniCPM4Config

    config = load_config(model)
    if not isinstance(config, MiniCPM4Config):
        raise UserError(
            f"{model!r} is a {config.model_type!r} checkpoint and this command runs MiniCPM4; convert it with "
            "transformers_minicpm4.model.conversion if it is Llama-like, or run it with Transformers itself."
        )
    return config


def extend(config) -> None:
    from transformers_minicpm4.model.conversion import extend_context

    try:
        extend_context(config)
    except ValueError as error:
        raise UserError(f"--extend-context: {one_line(error)}") from error


def choose_attention(args, config) -> str | None:
    """Write the wished `sparse_config` into the configuration; returns the `attn_implementation` to load with."""
    from transformers_minicpm4 import InfLLMv2Config

    names = ("dense_len", "topk", "window_size")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.dense:
        if changes:
            flags = ", ".join("--" + name.replace("_", "-") for name in changes)
            raise UserError(f"--dense reads every token, so {flags} would do nothing; leave out one or the other.")
        config.sparse_config = None
        return "sdpa"
    if not (args.sparse or changes):
        return None
    try:
        config.sparse_config = InfLLMv2Config.from_dict({**config.infllm_v2.to_dict(), **changes}).to_dict()
    except (ValueError, TypeError) as error:
        raise UserError(one_line(error)) from error
    return "infllm_v2"


def choose_device(name: str | None):
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"The device {name!r} cannot be used ({one_line(error)}); `minicpm4 env` lists the devices here."
        ) from error
    return device


def load_tokenizer(model: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:
        # A missing file, a missing package and a broken file all arrive as different types.
        raise UserError(f"The tokenizer of {model!r} cannot be loaded: {one_line(error)}") from error


def encode(tokenizer, prompt: str, args):
    """Token ids of the prompt. The chat templates write no `<s>`, so the tokenizer adds it as for any other text."""
    if args.chat and tokenizer.chat_template is None:
        raise UserError(
            f"The tokenizer of {args.model!r} has no chat template; use --raw, or store one: "
            'tokenizer.chat_template = transformers_minicpm4.generation.chat_template("minicpm4").'
        )
    from transformers_minicpm4.generation.chat import encode_rendered

    if args.raw or tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt", verbose=False)
    switch = {"enable_thinking": False} if args.no_thinking else {}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **switch
    )
    return encode_rendered(tokenizer, text, return_tensors="pt")


def room_for_answer(num_prompt_tokens: int, max_new_tokens: int, config) -> int:
    """The number of new tokens that fit behind the prompt, at most `max_new_tokens`."""
    limit = context_length(config)
    room = limit - num_prompt_tokens
    if room < 1:
        raise UserError(
            f"The prompt has {num_prompt_tokens:,} tokens and the model has {limit:,} positions, of which the answer "
            "needs some too; shorten the prompt, or raise the limit of MiniCPM4-8B and MiniCPM4.1-8B with "
            "--extend-context (the 128K preset)."
        )
    if room < max_new_tokens:
        print(f"The answer is cut to {room:,} tokens: the model has {limit:,} positions.", file=sys.stderr)
    return min(room, max_new_tokens)


def with_prefix(model, inputs, folder: Path) -> dict:
    """The inputs with the checkpoint's stored prefix in front, as a filled cache; as they are where it has none."""
    from transformers_minicpm4.model.prefix_cache import PrefixCache

    try:
        prefix = PrefixCache.load(folder)
        if prefix is None:
            return dict(inputs)
        ids, mask = prefix.prepend(inputs["input_ids"], inputs["attention_mask"])
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": prefix.to_cache(model)}
    except ValueError as error:
        raise UserError(one_line(error)) from error


def load_model(args, config, attn_implementation: str | None, device):
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from transformers_minicpm4.edge.loading import gptq_is_unpacked

    if gptq_is_unpacked(config):
        from transformers_minicpm4.quantization.export.gptq import load_gptq

        print("gptqmodel is not installed: the INT4 weights are unpacked into dense ones.", file=sys.stderr)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        try:
            return load_gptq(
                locate(args.model), None if args.dtype == "auto" else getattr(torch, args.dtype), config
            ).to(device)
        except (OSError, ValueError) as error:
            raise UserError(f"The weights of {args.model!r} cannot be loaded: {one_line(error)}") from error
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    choice = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    # Its table of keys that do not match becomes one sentence below. (A higher level would make it say more.)
    loading_log = logging.getLogger("transformers.modeling_utils")
    loading_log.disabled = True
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            args.model,
            config=config,
            dtype=dtype,
            device_map=device,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **choice,
        )
    except SafetensorError as error:
        raise UserError(
            f"The weights of {args.model!r} are truncated or corrupt ({one_line(error)}); download them again."
        ) from error
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"The weights of {args.model!r} cannot be loaded: {one_line(error)}") from error
    finally:
        loading_log.disabled = False
    if absent := sorted(report["missing_keys"]):
        raise UserError(
            f"The weights of {args.model!r} lack {len(absent)} of the tensors that its configuration asks for (first: "
            f"{absent[0]}); restore the weights or the configuration."
        )
    if misfits := sorted(report["mismatched_keys"]):
        name, stored, wanted = misfits[0]
        raise UserError(
            f"{len(misfits)} tensors of {args.model!r} do not have the shape that its configuration asks for (first: "
            f"{name}, stored {list(stored)}, asked {list(wanted)}); restore the weights or the configuration."
        )
    if unused := sorted(report["unexpected_keys"]):
        print(f"{len(unused)} stored tensors have no place in the model (first: {unused[0]}).", file=sys.stderr)
    return model.eval()


def answer(model, tokenizer, inputs, max_new_tokens: int, args) -> None:
    import time

    from transformers import TextStreamer, set_seed

    class Clock(TextStreamer):
        """Streams the answer and notes when each call of the model ended."""

        def put(self, value):
            self.times = [*getattr(self, "times", []), time.perf_counter()]
            super().put(value)

    sampling = sampling_options(args)
    if args.seed is not None:
        set_seed(args.seed)
    streamer = Clock(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = stop_tokens(model, tokenizer)
    # A batch of one has no padding, but generate() warns where no token is named for it.
    pad = model.generation_config.pad_token_id
    if pad is None and stop:
        pad = stop[0]
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=bool(sampling),
        eos_token_id=stop,
        pad_token_id=pad,
        streamer=streamer,
        **sampling,
    )
    num_prompt_tokens = inputs["input_ids"].shape[1]
    num_new_tokens = output.shape[1] - num_prompt_tokens
    # The streamer sees the prompt first, before the model does, then every new token.
    begin, first, last = streamer.times[0], streamer.times[1], streamer.times[-1]
    line = f"prompt: {num_prompt_tokens:,} tokens, {rate(num_prompt_tokens, first - begin)}"
    line += f"; answer: {num_new_tokens:,} tokens"
    if num_new_tokens > 1:
        line += f", {rate(num_new_tokens - 1, last - first)}"
    print(f"[{line}; attention: {attention_that_ran(model.config, output.shape[1])}]", file=sys.stderr)


def sampling_options(args) -> dict[str, float]:
    options = {"temperature": args.temperature, "top_p": args.top_p}
    return {name: value for name, value in options.items() if value is not None}


def stop_tokens(model, tokenizer) -> list[int] | None:
    """The model's end tokens and the tokenizer's: a configuration that lacks `<|im_end|>` would talk on."""
    from transformers_minicpm4.generation.chat import as_ids

    ids = as_ids(model.generation_config.eos_token_id)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids or None


def rate(count: int, seconds: float) -> str:
    return f"{count / seconds:,.1f} tokens/s" if seconds > 0 else "in no measurable time"


def attention_that_ran(config, num_tokens: int) -> str:
    """What the queries of a text of `num_tokens` did; the last token was written but never asked anything."""
    implementation = config._attn_implementation
    if implementation != "infllm_v2":
        return f"dense ({implementation})"
    settings = config.infllm_v2
    reads = f"{settings.selected_blocks} blocks of {settings.block_size} tokens"
    num_queries = num_tokens - 1
    first_sparse = settings.first_sparse_position(num_queries)
    if num_queries > first_sparse:
        return f"infllm_v2, sparse from token {first_sparse + 1:,} on: a query reads at most {reads}"
    if num_queries < settings.dense_len:
        return f"infllm_v2, dense throughout: the text is shorter than dense_len ({settings.dense_len:,} tokens)"
    return f"infllm_v2, dense throughout: the text fits in the {reads} that a query reads"
