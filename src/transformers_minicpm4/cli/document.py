"""What `minicpm4 demo` reads, the reference that every Python carries or a file, and what it asks about it."""

import re
from dataclasses import dataclass
from pathlib import Path

from .describe import context_length
from .errors import UserError


BUNDLED_TOKENS = 4000
MARK = "\u241e"  # stands for text and question while the chat template is applied


@dataclass(frozen=True)
class Question:
    """
    A question to the text.

    `lead` is the beginning of the answer, which the model is given. `answer` is a part of the right answer and
    `evidence` a piece of the text, `answer` included, that says so; both are empty where no answer is known.
    """

    text: str
    lead: str = ""
    answer: str = ""
    evidence: str = ""
    topic: str = ""

    def is_right(self, reply: str) -> bool:
        return unwrapped(self.answer) in unwrapped(reply)


# The first three whose evidence is in the text are asked; the others are spare, for a Python whose reference is worded
# differently. The wording of question and lead was chosen on the dense model, which is too small to chat across 4,000
# tokens but finds a sentence whose beginning it is given; sparse agreement with a margin was part of the choice.
QUESTIONS = (
    Question(
        "In which order does the deletion of a target list delete each target?",
        "Deletion of a target list recursively deletes each target, from",
        "left to right",
        "recursively deletes each target, from left to right",
        "del",
    ),
    Question(
        "What does the interpreter do when an exception is not handled at all?",
        "It terminates execution of the program, or returns to its",
        "interactive main loop",
        "terminates execution of the program, or returns to its interactive main loop",
        "exceptions",
    ),
    Question(
        'What do "and" and "or" return?',
        "They return the last",
        "evaluated argument",
        "return the last evaluated argument",
        "booleans",
    ),
    Question(
        "Which radix is used for the integer and exponent parts of floating point literals?",
        "The integer and exponent parts are always interpreted using radix",
        "10",
        "are always interpreted using radix 10",
        "floating",
    ),
)
ASKED = 3
WITHOUT_A_QUESTION = Question("What is the text about?")

# In the order of the text.
TOPICS = (
    "return",
    "global",
    "break",
    "continue",
    "pass",
    "del",
    "assert",
    "exceptions",
    "integers",
    "floating",
    "imaginary",
    "numbers",
    "context-managers",
    "booleans",
    "yield",
)


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    questions: tuple[Question, ...]


def count_tokens(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def collect(args, tokenizer, room: int) -> Document:
    """
    The text and the questions that the arguments ask for.

    Args:
        room: positions of the model that text and questions can have.
    """
    asked = tuple(Question(text) for text in args.question or ())
    if any(not question.text.strip() for question in asked):
        raise UserError("A --question is empty; give at least one word.")
    if args.file is not None:
        text = from_file(args.file, args.context_tokens, tokenizer)
        return Document(text, args.file, asked or (WITHOUT_A_QUESTION,))
    text, topics = from_reference(args.context_tokens or min(BUNDLED_TOKENS, room), tokenizer, bool(asked))
    if not asked:
        asked = tuple(question for question in QUESTIONS if find(question.evidence, text))[:ASKED]
    return Document(text, f"the Python language reference, topics {', '.join(topics)}", asked)


def from_file(name: str, budget: int | None, tokenizer) -> str:
    try:
        text = Path(name).expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"The text file {name!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The file {name!r} is not text in UTF-8; convert it first.") from error
    if not text.strip():
        raise UserError(f"The text file {name!r} is empty; give a file with a text to ask about.")
    if budget is not None:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > budget:
            # The cut may fall inside a character of several tokens.
            text = tokenizer.decode(ids[:budget]).rstrip("\ufffd")
    return text


def from_reference(budget: int, tokenizer, any_topic: bool) -> tuple[str, list[str]]:
    """Whole topics of at most `budget` tokens in all: those with the answers first, then as many others as fit."""
    from pydoc_data.topics import topics

    answering = [] if any_topic else [q.topic for q in QUESTIONS if find(q.evidence, topics.get(q.topic, ""))][:ASKED]
    order = [name for name in (*TOPICS, *sorted(set(topics) - set(TOPICS))) if name in topics]
    taken, total = [], 0
    for name in (*answering, *(name for name in order if name not in answering)):
        size = count_tokens(tokenizer, topics[name].strip() + "\n\n")
        if total + size <= budget:
            taken.append(name)
            total += size
        elif name not in answering:
            break  # going on with the smaller ones would make a text that depends on the version of Python
    if not taken or not (any_topic or set(taken) & set(answering)):
        sizes = [count_tokens(tokenizer, topics[name].strip() + "\n\n") for name in answering or order]
        raise UserError(
            f"The text may have {budget:,} tokens, and the shortest topic of the Python reference that answers a "
            f"question has {min(sizes):,}; allow more with --context-tokens, or bring a text with --file."
        )
    taken.sort(key=order.index)
    return "\n\n".join(topics[name].strip() for name in taken), taken


def find(passage: str, text: str) -> re.Match | None:
    """The passage in the text, whatever the line breaks; `None` also for an empty passage."""
    return re.search(r"\s+".join(map(re.escape, passage.split())), text) if passage else None


def find_answer(question: Question, text: str) -> tuple[int, int] | None:
    """First and last-plus-one character of the answer in the text."""
    evidence = find(question.evidence, text)
    if evidence is None:
        return None
    answer = find(question.answer, evidence.group())
    return evidence.start() + answer.start(), evidence.start() + answer.end()


def unwrapped(text: str) -> str:
    return " ".join(text.split()).lower()


class Prompts:
    """The text and its questions as tokens: one beginning for all, and an end for each question."""

    def __init__(self, args, tokenizer, config, at_least: int):
        self.tokenizer = tokenizer
        self.limit = context_length(config)
        # The template's own words and a question; exact figures follow below, this sizes the bundled text.
        document = collect(args, tokenizer, self.limit - args.max_new_tokens - 256)
        self.text, self.source, self.questions = document.text, document.source, document.questions
        self.before, self.after = self.render(self.text)
        self.prefix = self.before + self.text + "\n\n"
        from transformers_minicpm4.generation.chat import encode_rendered

        self.document_ids = encode_rendered(tokenizer, self.prefix)["input_ids"]
        longest = max(len(self.question_ids(question)) for question in self.questions)
        needed = longest + max(args.max_new_tokens, at_least)
        if len(self.document_ids) + needed > self.limit:
            raise UserError(
                f"The text has {len(self.document_ids):,} tokens and the model has {self.limit:,} positions, of which "
                f"question and answer need {needed:,}; take less with --context-tokens {self.limit - needed - 64:,}, "
                "or a model with a longer context."
            )

    def render(self, text: str) -> tuple[str, str]:
        """What the chat template writes before the text and behind the question, which share the user's turn."""
        if self.tokenizer.chat_template is None:
            return "", "\nAnswer: "
        turn = [{"role": "user", "content": MARK}]
        before, _, after = self.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True
        ).partition(MARK)
        return before, after

    def question_ids(self, question) -> list[int]:
        end = question.text + self.after + question.lead
        return self.tokenizer(end.rstrip(" "), add_special_tokens=False, verbose=False)["input_ids"]

    def answer_tokens(self, question) -> tuple[int, int] | None:
        """First and last-plus-one token of the known answer in the text."""
        found = find_answer(question, self.text)
        if found is None:
            return None
        shift = len(self.document_ids) - count_tokens(self.tokenizer, self.prefix)  # 1 with a start token
        # A token at the end of the passage may go on into what follows, so the end is the next token's beginning.
        start, stop = (count_tokens(self.tokenizer, self.before + self.text[:place]) for place in found)
        return shift + start, max(shift + stop, shift + start + 1)
