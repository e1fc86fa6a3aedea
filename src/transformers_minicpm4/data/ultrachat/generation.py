"""
Prompts of UltraChat v2's generation tracks (MiniCPM4, arXiv 2506.07900: knowledge, reasoning, instruction following,
long context, tools) in our own words, and the loop that asks a model until the answer passes its checks.

Whatever writes the text is a function `generate(messages) -> str`; `PipelineGenerator` makes one of a `transformers`
pipeline and `ChatGenerator` one of an OpenAI-like client. The templates are the files `prompts/*.jinja`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import regex

from .code_filter import check_code
from .constraints import check_constraints, describe_constraint, load_constraints
from .json_schemas import drop_nulls
from .reasons import OK, shorten, writable
from .text_counts import read_markdown
from .tool_calls import check_tool_calls


# Prompt: (fields it needs, fields it may use).
PROMPTS = {
    "knowledge": (("knowledge_point",), ("subject", "language")),
    "evolve_question": (("question",), ("direction",)),
    "evolve_answer": (("question", "answer"), ()),
    "math": (("topic", "level"), ("solutions",)),
    "code": (("snippet",), ("snippet_language", "language", "tests")),
    "instruction": (("task",), ("persona", "constraints")),
    "reverse_instruction": (("text",), ("language",)),
    "long_context": (("document",), ("language",)),
    "tools": (("tools", "request"), ()),
}
_SECTIONS = {
    "knowledge": ["Question", "Answer"],
    "long_context": ["Question", "Answer"],
    "code": ["Task", "Solution", "Tests"],
}
_TOOL_ANSWER = regex.compile(r"\s*<think>(.*?)</think>\s*(\[.*)", regex.DOTALL)


@lru_cache(maxsize=1)
def _templates():
    from jinja2 import FileSystemLoader
    from jinja2.sandbox import SandboxedEnvironment

    folder = Path(__file__).parent / "prompts"
    return SandboxedEnvironment(loader=FileSystemLoader(folder), trim_blocks=True, lstrip_blocks=True)


def render_prompt(prompt: str, row: dict) -> list[dict]:
    """
    The messages that ask a model for one item of a track: `[{"role": "user", "content": ...}]`.

    Args:
        prompt: a name from `PROMPTS`.
        row: the fields that it needs and may use; others are ignored, and null means "not given". Text in it is text,
            never template. `constraints` (what `load_constraints` takes) are written out as rules.
    Raises:
        ValueError: unknown prompt, a field that is missing or blank, constraints that are not valid.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"no prompt {prompt!r}; prompts are {', '.join(PROMPTS)}")
    needed, optional = PROMPTS[prompt]
    fields = {name: row.get(name) for name in (*needed, *optional)}
    missing = [name for name in needed if fields[name] is None or not str(fields[name]).strip()]
    if missing:
        raise ValueError(f"prompt {prompt!r} needs {', '.join(needed)}; missing or blank: {', '.join(missing)}")
    if prompt == "math":
        solutions = fields["solutions"] or 2
        if isinstance(solutions, bool) or not isinstance(solutions, int) or not 1 <= solutions <= 100:
            raise ValueError(f"prompt 'math' asks for 1 to 100 solutions, not {shorten(repr(solutions))}")
    if prompt == "instruction":
        fields["constraint_texts"] = [describe_constraint(each) for each in load_constraints(fields["constraints"])]
    if prompt == "tools":
        tools = fields["tools"]
        fields["tools_json"] = (
            tools if isinstance(tools, str) else json.dumps(drop_nulls(tools), ensure_ascii=False, default=str)
        )
    text = _templates().get_template(f"{prompt}.jinja").render(fields)
    return [{"role": "user", "content": text.strip()}]


def check_answer(prompt: str, answer: str, row: dict) -> str:
    """
    `"ok"`, or what is wrong with a model's answer to a prompt, by all that can be checked without a model: the
    sections asked for; the syntax, imports and user interaction of code and tests where they are Python; the tool
    calls against the tools, after a thought; the constraints of the row.
    """
    if not answer.strip():
        return "empty: no text"
    if prompt == "instruction":
        return check_constraints(answer, row.get("constraints"))
    if prompt == "tools":
        match = answer.rstrip().endswith("]") and _TOOL_ANSWER.fullmatch(answer)
        if not match:
            return "format: asked <think>thoughts</think> and then a JSON list of calls"
        if not match[1].strip():
            return "no_thought: before the call"
        return check_tool_calls(match[2], row.get("tools"))
    titles = _SECTIONS.get(prompt)
    if prompt == "math":
        titles = ["Problem", *(f"Solution {number}" for number in range(1, int(row.get("solutions") or 2) + 1))]
    if titles:
        reason = check_constraints(answer, [{"type": "sections", "titles": titles}])
        if reason != OK or prompt != "code":
            return reason
        blocks = [code for _, code in read_markdown(answer).code_blocks]
        if len(blocks) != 2:
            return f"code_block: {len(blocks)}, asked exactly 2"
        if (row.get("language") or "python").lower() == "python":
            return check_code("\n".join(blocks))
    return OK


@dataclass
class Attempts:
    """What came of asking: `output` (str, "" where nothing passed), `outputs` and their `reasons`, in order."""

    output: str = ""
    outputs: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return OK in self.reasons


def _ask(generate: Callable, messages: list[dict]) -> str:
    output = generate(messages)
    if not isinstance(output, str):
        raise TypeError(f"generate(messages) must give a string, not {type(output).__name__}: {shorten(output)}")
    return writable(output)  # one answer that no file takes would end a run of many hours


def generate_until(generate: Callable, messages: list[dict], check: Callable, max_attempts: int = 10) -> Attempts:
    """
    Ask until `check(output)` says `"ok"`, at most `max_attempts` times (the recipe's 10); every output is recorded.

    Raises:
        ValueError: max_attempts below 1.  TypeError: `generate` gives no string.
    """
    if max_attempts < 1:
        raise ValueError(f"max_attempts = {max_attempts}; give 1 or more")
    found = Attempts()
    for _ in range(max_attempts):
        found.outputs.append(_ask(generate, messages))
        found.reasons.append(check(found.outputs[-1]))
        if found.reasons[-1] == OK:
            found.output = found.outputs[-1]
            break
    return found


def sample_and_keep(generate: Callable, messages: list[dict], constraints, samples: int = 4) -> list[dict]:
    """
    Several outputs for one instruction, each with its verdict: `{"output", "passed", "reason"}`, in order. Keep those
    that passed; all are there. Constraints as `load_constraints` takes them; errors as there and in `generate_until`.
    """
    constraints = load_constraints(constraints)
    if samples < 1:
        raise ValueError(f"samples = {samples}; give 1 or more")
    found = []
    for _ in range(samples):
        output = _ask(generate, messages)
        reason = check_constraints(output, constraints)
        found.append({"output": output, "passed": reason == OK, "reason": reason})
    return found


@dataclass(frozen=True)
class TrackGenerator:
    """
    For `map`, row by row: render a track's prompt with the row, ask, check, and ask again until the answer passes.

    Adds `prompt` (str), `response` (str, "" where no attempt passed), `attempts` (list of the outputs),
    `attempt_reasons` (list of their reasons), `generation_passed` (bool) and `generation_reason` (`ok`, or `gave_up`
    with the last reason, or `bad_row` where the prompt cannot be rendered; such a row asks nothing and holds one empty
    attempt).

    Args:
        prompt: a name from `PROMPTS`.
        generate: messages -> text. For `num_proc` it must be picklable; without sampling all attempts are equal.
        check: (answer, row) -> reason, in place of `check_answer`.
        max_attempts: the recipe's 10.
    Raises:
        ValueError: unknown prompt, max_attempts below 1.  TypeError: `generate` gives no string.
    """

    prompt: str
    generate: Callable
    check: Callable | None = None
    max_attempts: int = 10

    def __post_init__(self):
        if self.prompt not in PROMPTS:
            raise ValueError(f"no prompt {self.prompt!r}; prompts are {', '.join(PROMPTS)}")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts = {self.max_attempts}; give 1 or more")

    def __call__(self, row: dict) -> dict:
        try:
            messages = render_prompt(self.prompt, row)
        except ValueError as error:
            reason = writable(f"bad_row: {error}")
            return self._row("", Attempts(outputs=[""], reasons=[reason]), reason)

        def check(answer: str) -> str:
            return self.check(answer, row) if self.check else check_answer(self.prompt, answer, row)

        found = generate_until(self.generate, messages, check, self.max_attempts)
        reason = OK if found.passed else f"gave_up: after {len(found.outputs)} attempts, last {found.reasons[-1]}"
        return self._row(messages[0]["content"], found, reason)

    def _row(self, prompt: str, found: Attempts, reason: str) -> dict:
        return {
            "prompt": writable(prompt),
            "response": found.output,
            "attempts": found.outputs,
            "attempt_reasons": [writable(reason) for reason in found.reasons],
            "generation_passed": reason == OK,
            "generation_reason": writable(reason),
        }


@dataclass(frozen=True)
class PipelineGenerator:
    """
    `generate(messages)` from a `transformers` text-generation pipeline whose tokenizer has a chat template.

    Args:
        pipeline: `pipeline("text-generation", model=...)`.
        generation: keyword arguments of every call, as `{"max_new_tokens": 512, "do_sample": True}`.
    """

    pipeline: Callable
    generation: dict = field(default_factory=dict)

    def __call__(self, messages: list[dict]) -> str:
        output = self.pipeline(messages, return_full_text=False, **self.generation)[0]["generated_text"]
        return output if isinstance(output, str) else output[-1]["content"]


@dataclass(frozen=True)
class ChatGenerator:
    """
    `generate(messages)` from an OpenAI-like client: anything with `client.chat.completions.create(...)`.

    Args:
        client: the client. model: the model's name there.
        generation: keyword arguments of every call, as `{"temperature": 0.8}`.
    """

    client: object
    model: str
    generation: dict = field(default_factory=dict)

    def __call__(self, messages: list[dict]) -> str:
        answer = self.client.chat.completions.create(model=self.model, messages=messages, **self.generation)
        return answer.choices[0].message.content or ""
