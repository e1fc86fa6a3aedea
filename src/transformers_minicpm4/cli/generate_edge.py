"""`minicpm4 generate --engine edge`: the plan, then the answer by the edge engine, then what it cost."""

import sys
from pathlib import Path

from .errors import UserError, one_line
from .generate import attention_that_ran, load_model, rate, sampling_options, stop_tokens


# Tokens that a smaller model guesses ahead.
DRAFT_DEPTH = 4
COMPILING = "[the first steps are compiled, which takes up to a minute or two: --no-compile]"


def answer_with_engine(args, config, attn_implementation, device, tokenizer, inputs, max_new_tokens, folder) -> None:
    from transformers_minicpm4.edge.engine import EdgeEngine
    from transformers_minicpm4.model.prefix_cache import PrefixCache

    ids = inputs["input_ids"][0].tolist()
    if args.draft not in (None, "lookup") and not Path(args.draft).is_dir():
        raise UserError(f"--draft {args.draft!r} is neither 'lookup' nor a folder with a model; give one of them.")
    kind = draft_kind(args.draft)
    try:
        prefix = PrefixCache.load(folder)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    held = len(ids) + max_new_tokens + (0 if prefix is None else len(prefix.token_ids))
    plan = make_plan(args, config, attn_implementation, device, held, kind)
    if plan is not None:
        print(plan_line(plan), file=sys.stderr)
    model = load_model(args, config, attn_implementation, device)
    try:
        engine = EdgeEngine(
            model,
            tokenizer,
            context=held,
            draft=make_draft(args, kind, model),
            compile=False if args.no_compile else None,
            prefix=prefix,
            plan=plan,
        )
        if engine.compiles:
            print(COMPILING, file=sys.stderr)
        sampling = sampling_options(args)
        pieces = engine.stream(
            ids,
            max_new_tokens=max_new_tokens,
            do_sample=bool(sampling),
            eos_token_id=stop_tokens(model, tokenizer),
            stop=args.stop or (),
            seed=args.seed,
            **sampling,
        )
    except ValueError as error:
        raise UserError(one_line(error)) from error
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    print(f"[{closing_line(engine, model)}]", file=sys.stderr)


def plan_line(plan) -> str:
    return (
        f"[plan for {plan.device.name}: {plan.total_bytes / 1e9:.2f} GB of {plan.budget_bytes / 1e9:.2f} GB, "
        f"{plan.precision}, {plan.context:,} tokens]"
    )


def make_plan(args, config, attn_implementation, device, tokens: int, kind: str | None):
    """The plan for this machine; `None` where the checkpoint's sizes cannot be planned."""
    from transformers_minicpm4.edge.device_profile import detect
    from transformers_minicpm4.edge.memory_plan import DoesNotFit, DraftSpec, PlanError, plan_memory

    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    precision = names.get(stored if args.dtype == "auto" else args.dtype, "fp32")
    if getattr(config, "quantization_config", None) is not None:
        precision = None
    profile = detect() if device.type != "cpu" else detect(cuda=())
    if kind == "model":
        size = sum(path.stat().st_size for path in Path(args.draft).glob("*.safetensors"))
        profile = profile.replace(memory_available=max(profile.memory_available - size, 0))
    try:
        return plan_memory(
            config,
            profile,
            context=tokens,
            precision=precision,
            sparse=attn_implementation == "infllm_v2"
            or (attn_implementation is None and config.sparse_config is not None),
            cache="static",
            draft=DraftSpec(kind=kind if kind in ("eagle", "eagle3") else "lookup") if kind else None,
        )
    except DoesNotFit as error:
        raise UserError(one_line(error)) from error
    except PlanError as error:
        print(f"[no plan: {one_line(error)}]", file=sys.stderr)
        return None


def make_draft(args, kind: str | None, model):
    from transformers_minicpm4.generation.drafts import ModelDraft, PromptLookupDraft
    from transformers_minicpm4.generation.eagle import Eagle3Draft, EagleDraft

    if kind is None:
        return None
    if kind == "lookup":
        return PromptLookupDraft()
    if kind in ("eagle", "eagle3"):
        return (EagleDraft if kind == "eagle" else Eagle3Draft).from_pretrained(args.draft, model)
    from transformers import AutoModelForCausalLM

    try:
        draft, report = AutoModelForCausalLM.from_pretrained(
            args.draft,
            dtype=model.dtype,
            attn_implementation="sdpa",
            device_map=model.device,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"The draft in {args.draft!r} cannot be loaded: {one_line(error)}") from error
    if report["missing_keys"]:
        raise UserError(
            f"The draft in {args.draft!r} lacks {len(report['missing_keys'])} tensors (first: "
            f"{min(report['missing_keys'])}); it is neither a whole model nor an EAGLE head."
        )
    return ModelDraft(draft.eval(), depth=DRAFT_DEPTH)


def tensor_names(folder: Path) -> list[str]:
    """By which an EAGLE head is told from a model."""
    from safetensors import safe_open

    names = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names += file.keys()
    if not names:
        import torch

        for path in sorted(folder.glob("*.bin")):
            names += torch.load(path, map_location="cpu", weights_only=True)
    return names


def draft_kind(draft: str | None) -> str | None:
    """`"lookup"`, `"eagle"`, `"eagle3"`, `"model"`, or `None` without a draft."""
    import pickle

    from safetensors import SafetensorError

    if draft in (None, "lookup"):
        return draft
    try:
        names = tensor_names(Path(draft))
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"The weights in {draft!r} are truncated or corrupt ({one_line(error)}).") from error
    if any(name.startswith("midlayer.") for name in names):
        return "eagle3"
    return "eagle" if any(name.endswith("fc.weight") for name in names) else "model"


def closing_line(engine, model) -> str:
    last = engine.last
    line = f"prompt: {last.prompt_tokens:,} tokens, {rate(last.prompt_tokens, last.prefill_seconds)}"
    line += f"; answer: {len(last.token_ids):,} tokens, {rate(len(last.token_ids), last.decode_seconds)}"
    if engine.draft is not None:
        line += f"; {len(last.token_ids) / max(last.passes, 1):.2f} tokens a pass"
    return f"{line}; attention: {attention_that_ran(model.config, last.prompt_tokens + len(last.token_ids))}"
