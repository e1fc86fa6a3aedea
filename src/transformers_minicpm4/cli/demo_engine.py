"""The end of `minicpm4 demo`: one task by `generate`, by the edge engine, and by the engine with a draft."""

from .generate import stop_tokens


# A sentence of the text, which the model is asked to repeat: what a draft that copies is made for.
SENTENCE_TOKENS = 64
TASK = "Repeat the following text word for word.\n\n{text}"


def show_engine(model, tokenizer, text: str, compile: bool, clock) -> None:
    """Three rows: tokens a second, tokens a pass, and whether the tokens are the same. `clock`: a silent streamer."""
    from transformers_minicpm4.edge.engine import EdgeEngine
    from transformers_minicpm4.generation.drafts import PromptLookupDraft

    part = tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:SENTENCE_TOKENS])
    task = TASK.format(text=part)
    prompt = [{"role": "user", "content": task}] if tokenizer.chat_template else task
    context = 4 * SENTENCE_TOKENS + 64
    plain = EdgeEngine(model, tokenizer, context=context, compile=compile)
    drafting = EdgeEngine(model, tokenizer, context=context, draft=PromptLookupDraft(), compile=compile)
    ids = plain.encode(prompt)
    options = {"max_new_tokens": SENTENCE_TOKENS}
    for engine in (plain, drafting):
        engine.generate(ids[:-1], max_new_tokens=12 if compile else 1)  # programs are compiled outside the clock
        engine.reset()
    rate, expected = generate_rate(model, tokenizer, ids, options, clock)
    beginning = " ".join(part.split())[:28]
    print(f'\nthe edge engine, asked to repeat {SENTENCE_TOKENS} tokens of the text ("{beginning} ..."):')
    print(f"{'':32}{'tokens/s':>12}{'a pass':>12}")
    print(f"{'model.generate':32}{rate:>12,.1f}{1:>12.2f}")
    name = "engine, compiled" if plain.compiles else "engine, eager steps"
    for label, engine in ((name, plain), (f"{name}, prompt lookup", drafting)):
        answer = engine.generate(ids, **options)
        same = "same tokens" if answer.token_ids == expected else "other tokens"
        yielded = len(answer.token_ids) / answer.passes
        print(f"{label:32}{answer.tokens_per_second:>12,.1f}{yielded:>12.2f}  {same}")


def generate_rate(model, tokenizer, ids, options, clock) -> tuple[float, list[int]]:
    """Tokens a second of `generate` while it writes, the prompt's time left out, and the tokens."""
    import torch

    prompt = torch.tensor([ids], device=model.device)
    stop = stop_tokens(model, tokenizer)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=stop, pad_token_id=stop[0],
        streamer=clock, **options,
    )  # fmt: skip
    tokens = output[0, len(ids) :].tolist()
    # The streamer gets the prompt first; the first token's time is the prompt's.
    if len(tokens) < 2:
        return 0.0, tokens
    return (len(tokens) - 1) / (clock.times[-1] - clock.times[1]), tokens
