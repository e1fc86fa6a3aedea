"""
Which prompts to train on (MiniCPM4, arXiv 2506.07900, section 3.2): without near-duplicates, and hard enough. A small
model answers each problem k times; what it solves k times of k is dropped, what it never solves is kept.

Scores are columns; dropping is a step of its own, so that every row can be counted:

    dataset = mark_duplicate_prompts(dataset).filter(DuplicateFilter(), batched=True)
    dataset = dataset.map(DifficultyScorer(generate, math_reward), batched=True, batch_size=8)
    dataset = dataset.filter(lambda row: row["difficulty_passed"])

`pass_at_k`, `DifficultyFilter` and `DuplicateFilter` are those of the data room.
"""

from collections.abc import Callable, Sequence

from ..data.ultrachat.difficulty import DifficultyFilter, pass_at_k
from ..data.ultraclean.deduplicate import DuplicateFilter, check_batch, mark_near_duplicates


__all__ = [
    "DifficultyFilter",
    "DifficultyScorer",
    "DuplicateFilter",
    "ModelSampler",
    "mark_duplicate_prompts",
    "pass_at_k",
    "prompt_text",
]


def prompt_text(prompt) -> str:
    """
    The text of a prompt: a string, or the contents of all messages that the user wrote, one a line. A system message
    that many prompts share would make them look alike.

    Raises:
        TypeError: neither a string nor a list of messages.
    """
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    if isinstance(prompt, list) and all(isinstance(message, dict) and "role" in message for message in prompt):
        return "\n".join(_content(message) for message in prompt if message["role"] == "user")
    raise TypeError(f"a prompt is {str(prompt)[:60]!r}; give a string, or a list of messages with role and content")


def _content(message: dict) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""


def mark_duplicate_prompts(
    dataset,
    threshold: float = 0.8,
    *,
    prompt_column: str = "prompt",
    id_column: str | None = None,
    shingle_size: int = 3,
    num_proc: int | None = None,
):
    """
    Adds `duplicate_of` and `similarity` to a dataset of prompts, plain or conversational; no row is dropped. It is
    `data.ultraclean.deduplicate.mark_near_duplicates` on [`prompt_text`].

    Problems that differ in a number are no duplicates to a reader, but may be to this measure if they are long: read
    the marked pairs before they are dropped. The paper used SemHash, which compares meanings; for that see
    `data.ultrachat.semantic_dedup`.

    Args:
        dataset (`datasets.Dataset`): with a column of prompts.
        threshold (`float`): Jaccard similarity of shingles from which prompts are near-duplicates, in (0, 1].
        prompt_column (`str`): strings, or lists of messages.
        id_column (`str`, *optional*): unique ids, of which the smallest of a cluster is kept; None: row numbers.
        shingle_size (`int`): words a shingle; shorter than for documents, as prompts are short.
        num_proc (`int`, *optional*): processes.

    Returns:
        `datasets.Dataset`: the same rows with `duplicate_of` (id of the kept row, null where the row is kept) and
        `similarity`.

    Raises:
        TypeError: a stream, or a prompt that is no text.
        ValueError: no such column; threshold out of range; ids that are not unique.
    """
    names = getattr(dataset, "column_names", None)
    if names is not None and prompt_column not in names:
        raise ValueError(f"no column {prompt_column!r}; the columns are {names}: set prompt_column to one of them")
    text_column = "_prompt_text"
    with_text = dataset.map(_PromptText(prompt_column, text_column), num_proc=num_proc, desc="prompts as text")
    marked = mark_near_duplicates(
        with_text,
        threshold,
        text_column=text_column,
        id_column=id_column,
        shingle_size=shingle_size,
        num_proc=num_proc,
    )
    return marked.remove_columns(text_column)


class _PromptText:
    def __init__(self, prompt_column: str, column: str):
        self.prompt_column = prompt_column
        self.column = column

    def __call__(self, row: dict) -> dict:
        return {self.column: prompt_text(row[self.prompt_column])}


class DifficultyScorer:
    """
    For `map(..., batched=True)`: samples answers to each problem and says how many are right (section 3.2: 4 samples
    of a small model, all right is too easy, all wrong stays).

    Adds `results` (a reward from 0 to 1 for each sample, null where it cannot be scored), `solved` (how many are
    exactly 1), and the three columns of `DifficultyFilter`: `pass_at_k`, `difficulty_passed` and `difficulty_reason`
    (`ok`, `all_right: 4 of 4`, `bad_result: ...` where a sample cannot be scored). No row is dropped.

    Sampling is random: seed the sampler, and remember that `map` returns a cached result for equal arguments.

    Args:
        generate (callable): a list of p prompts -> p completions, each a string or a list of messages. A prompt stands
            in the list `samples` times, side by side. [`ModelSampler`] is one; a client of a server may be another.
        reward (callable): a reward function, such as `math_reward`; it gets the completions, the prompts and all
            columns, each value repeated `samples` times.
        samples (`int`): answers a problem.
        k (`int`): the k of pass@k.
        prompt_column (`str`): prompts.
        answers_column (`str`, *optional*): also keep the completions, a list for each row, under this name.

    Raises:
        TypeError: generate or reward cannot be called; at the call, a single row.
        ValueError: samples or k out of range; at the call, another number of completions or rewards than asked for.
        KeyError: at the call, no such column.
    """

    def __init__(
        self,
        generate: Callable[[list], Sequence],
        reward: Callable,
        samples: int = 4,
        *,
        k: int = 1,
        prompt_column: str = "prompt",
        answers_column: str | None = None,
    ):
        for name, value in (("generate", generate), ("reward", reward)):
            if not callable(value):
                raise TypeError(f"DifficultyScorer: {name} is {type(value).__name__}; give a function")
        self.judge = DifficultyFilter("results", samples, k)
        self.generate = generate
        self.reward = reward
        self.samples = samples
        self.prompt_column = prompt_column
        self.answers_column = answers_column

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """A batch of n rows -> n values for each added column."""
        if self.prompt_column not in batch:
            raise KeyError(f"DifficultyScorer: no column {self.prompt_column!r}; the columns are {sorted(batch)}")
        check_batch(batch, self.prompt_column)
        repeated = {name: [value for value in batch[name] for _ in range(self.samples)] for name in batch}
        prompts = repeated.pop(self.prompt_column)
        completions = list(self.generate(prompts))
        rewards = list(self.reward(completions=completions, prompts=prompts, **repeated))
        for name, values in (("generate", completions), ("reward", rewards)):
            if len(values) != len(prompts):
                raise ValueError(f"DifficultyScorer: {name} gave {len(values)} values for {len(prompts)} samples")
        results = self._grouped([None if value is None else float(value) for value in rewards])
        judged = [self.judge({"results": values}) for values in results]
        added = {name: [row[name] for row in judged] for name in (judged[0] if judged else ())}
        added |= {"results": results, "solved": [sum(value == 1 for value in values) for values in results]}
        if self.answers_column is not None:
            added[self.answers_column] = self._grouped(completions)
        return added

    def _grouped(self, values: list) -> list[list]:
        return [values[start : start + self.samples] for start in range(0, len(values), self.samples)]


class ModelSampler:
    """
    The `generate` of [`DifficultyScorer`] for a Transformers model: prompts -> completions, sampled.

    Conversational prompts go through the chat template and come back as messages; strings are continued as they are.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer; it needs a token to pad with.
        max_new_tokens (`int`): length of an answer, in tokens.
        batch_size (`int`): prompts in one call of `generate`.
        seed (`int`, *optional*): of torch's generator, set before each call; the state is put back afterwards.
        generate_kwargs: further arguments of `model.generate`, such as `temperature` (default 1.0, `top_k` 0).

    Raises:
        ValueError: a size below 1, or no token to pad with.
    """

    def __init__(
        self,
        model,
        tokenizer,
        max_new_tokens: int = 512,
        batch_size: int = 8,
        seed: int | None = None,
        **generate_kwargs,
    ):
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(
                f"ModelSampler: max_new_tokens={max_new_tokens}, batch_size={batch_size}; give at least 1"
            )
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "ModelSampler: the tokenizer has no pad_token; set tokenizer.pad_token, e.g. to eos_token"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.generate_kwargs = {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "max_new_tokens": max_new_tokens,
            **generate_kwargs,
        }

    def __call__(self, prompts: list) -> list:
        import torch

        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self.seed is not None):
            if self.seed is not None:
                torch.manual_seed(self.seed)
            starts = range(0, len(prompts), self.batch_size)
            return [text for start in starts for text in self._sample(prompts[start : start + self.batch_size])]

    def _sample(self, prompts: list) -> list:
        import torch

        texts = [
            prompt
            if isinstance(prompt, str)
            else self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts
        ]
        # The template writes the special tokens itself.
        special = all(isinstance(prompt, str) for prompt in prompts)
        inputs = self.tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special
        ).to(self.model.device)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = self.model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **self.generate_kwargs)
        answers = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [
            answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
            for prompt, answer in zip(prompts, answers)
        ]
