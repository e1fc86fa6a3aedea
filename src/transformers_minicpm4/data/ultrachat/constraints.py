"""
Constraints on a text that a program can verify, as the instruction-following track asks for them: length, required
content, structure, language, case (MiniCPM4, arXiv 2506.07900, UltraChat v2).

A constraint is plain JSON data, `{"type": "words", "at_least": 50}`. Counted types take `at_least`, `at_most` (both:
between, ends included) or `exactly`; what a word, a sentence, a heading is, `text_counts.py` defines.

| type | fields | passes when |
| --- | --- | --- |
| words, characters, sentences, lines, paragraphs | limits | their number is within the limits |
| capital_words | limits | so many words are all capitals |
| keywords | keywords; limits (default at_least 1); ignore_case (true) | each keyword stands so often |
| forbidden | keywords; ignore_case (true) | none of them stands in it |
| starts_with, ends_with | phrase; ignore_case (false) | the text, stripped, begins or ends with it |
| json | schema (object or JSON text); fenced (true: may stand in one ```json fence) | it is JSON, and valid |
| headings | limits (at_least 1); level | so many Markdown headings (of that level) |
| sections | titles | headings of these texts, in this order, each with text below it |
| bullets, numbered | limits (at_least 1) | so many items of such lists |
| code_block | limits (at_least 1); language | so many closed fences (of that language) |
| table | limits (at_least 1); columns | so many Markdown tables (of so many columns) |
| title | | a heading of level 1 opens the text |
| script | script; at_least (0.9), a share | that share of the letters belongs to the Unicode script, exactly |
| language | language | py3langid names this language (ISO 639-1) |
| case | case: lower, upper | no letter is of the other case, and there is a cased letter |
"""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import regex

from ..ultraclean.normalize import unicode_form
from .json_schemas import compile_schema, drop_nulls, parse_json, schema_errors
from .reasons import OK, column_of, join_reasons, shorten
from .text_counts import (
    count_capital_words,
    count_characters,
    count_keyword,
    count_lines,
    count_paragraphs,
    count_sentences,
    count_words,
    read_markdown,
    script_share,
)


_LIMITS = ("at_least", "at_most", "exactly")
_COUNTS = {
    "words": count_words,
    "characters": count_characters,
    "sentences": count_sentences,
    "lines": count_lines,
    "paragraphs": count_paragraphs,
    "capital_words": count_capital_words,
}
# Type: (fields it must have, fields it may have besides).
FIELDS = {
    **dict.fromkeys(_COUNTS, ((), _LIMITS)),
    "keywords": (("keywords",), (*_LIMITS, "ignore_case")),
    "forbidden": (("keywords",), ("ignore_case",)),
    "starts_with": (("phrase",), ("ignore_case",)),
    "ends_with": (("phrase",), ("ignore_case",)),
    "json": ((), ("schema", "fenced")),
    "headings": ((), (*_LIMITS, "level")),
    "sections": (("titles",), ()),
    "bullets": ((), _LIMITS),
    "numbered": ((), _LIMITS),
    "code_block": ((), (*_LIMITS, "language")),
    "table": ((), (*_LIMITS, "columns")),
    "title": ((), ()),
    "script": (("script",), ("at_least",)),
    "language": (("language",), ()),
    "case": (("case",), ()),
}
_DEFAULT_ONE = ("keywords", "headings", "bullets", "numbered", "code_block", "table")
_JSON_FENCE = regex.compile(r"\s*```(?:json)?[ \t]*(?:\r\n?|\n)(.*)[\r\n]```\s*", regex.DOTALL | regex.IGNORECASE)


def _refuse(constraint, what: str):
    raise ValueError(f"constraint {shorten(constraint, 120)}: {what}")


def _whole(value):
    """2 for the 2.0 that Arrow makes of a 2 where another row's value is 0.5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_phrase(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


def validate_constraint(constraint: dict) -> dict:
    """
    A constraint with its nulls dropped (Arrow writes them into a column of objects), checked field by field.

    Raises:
        ValueError: an unknown type or field, a missing field, limits that contradict each other, a value of the wrong
            kind; the message names the constraint and what is allowed.
    """
    if not isinstance(constraint, dict):
        _refuse(constraint, 'it is an object such as {"type": "words", "at_least": 50}')
    constraint = {name: _whole(value) for name, value in constraint.items() if value is not None}
    kind = constraint.get("type")
    if not isinstance(kind, str) or kind not in FIELDS:
        _refuse(constraint, f"unknown type {kind!r}; types are {', '.join(FIELDS)}")
    needed, allowed = FIELDS[kind]
    for name in needed:
        if name not in constraint:
            _refuse(constraint, f"{kind} needs the field {name!r}")
    for name in constraint:
        if name != "type" and name not in needed and name not in allowed:
            _refuse(constraint, f"unknown field {name!r}; {kind} takes {', '.join((*needed, *allowed)) or 'none'}")
    _validate_limits(kind, constraint)
    _validate_values(kind, constraint)
    return constraint


def _validate_limits(kind: str, constraint: dict):
    if kind == "script":
        share = constraint.get("at_least", 0.9)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            _refuse(constraint, f"at_least is a share above 0 and up to 1, not {share!r}")
        return
    limits = {name: constraint[name] for name in _LIMITS if name in constraint}
    for name, value in limits.items():
        if not _is_count(value):
            _refuse(constraint, f"{name} is a whole number from 0 on, not {value!r}")
    if kind in _COUNTS and not limits:
        _refuse(constraint, f"{kind} needs a limit: at_least, at_most or exactly")
    if "exactly" in limits and len(limits) > 1:
        _refuse(constraint, "exactly stands alone; drop at_least and at_most")
    if limits.get("at_least", 0) > limits.get("at_most", float("inf")):
        _refuse(constraint, "at_least is above at_most, so no text can pass")


def _validate_values(kind: str, constraint: dict):
    for name in ("ignore_case", "fenced"):
        if not isinstance(constraint.get(name, True), bool):
            _refuse(constraint, f"{name} is true or false, not {constraint[name]!r}")
    for name in ("keywords", "titles"):
        values = constraint.get(name, ["-"])
        if not isinstance(values, list) or not values or not all(map(_is_phrase, values)):
            _refuse(constraint, f"{name} is a list of at least one text that is not blank, not {values!r}")
    for name in ("phrase", "language", "script"):
        if not _is_phrase(constraint.get(name, "-")):
            _refuse(constraint, f"{name} is a text that is not blank, not {constraint[name]!r}")
    if kind == "script":
        try:
            if not constraint["script"].replace("_", "").isalpha():
                raise regex.error("a name is letters and underscores")
            regex.compile(rf"\p{{Script={constraint['script']}}}")
        except regex.error:
            _refuse(constraint, f"no Unicode script {constraint['script']!r}; scripts are Han, Latin, Cyrillic ...")
    if constraint.get("level") is not None and constraint["level"] not in range(1, 7):
        _refuse(constraint, f"level is 1 to 6, not {constraint['level']!r}")
    if "columns" in constraint and not (_is_count(constraint["columns"]) and constraint["columns"]):
        _refuse(constraint, f"columns is a whole number from 1 on, not {constraint['columns']!r}")
    if kind == "case" and constraint["case"] not in ("lower", "upper"):
        _refuse(constraint, f"case is lower or upper, not {constraint['case']!r}")
    if "schema" in constraint:
        schema = constraint["schema"]
        if not isinstance(schema, str) and drop_nulls(schema) != schema:
            _refuse(constraint, "a schema with nulls (Arrow writes such too) is ambiguous; give it as JSON text")
        try:
            compile_schema(_schema_text(constraint))
        except ValueError as error:
            _refuse(constraint, str(error))


def _schema_text(constraint: dict) -> str:
    schema = constraint["schema"]
    return schema if isinstance(schema, str) else json.dumps(schema, sort_keys=True)


def load_constraints(constraints) -> list[dict]:
    """
    Constraints out of a dataset's cell: a list of objects, JSON text of such a list, or None (no constraints).

    JSON text (`dump_constraints`) survives every file format unchanged. A list of objects does too where no schema is
    given as an object: Arrow fills such a schema with nulls, so give it as JSON text there.
    """
    if constraints is None:
        return []
    if isinstance(constraints, str):
        return copy.deepcopy(_load_text(constraints))
    if not isinstance(constraints, list | tuple):
        raise ValueError(f"constraints are a list of objects, not {shorten(constraints)}; put [ ] around a single one")
    return [validate_constraint(constraint) for constraint in constraints]


@lru_cache(maxsize=1024)
def _load_text(constraints: str) -> list[dict]:
    try:
        return load_constraints(parse_json(constraints))
    except json.JSONDecodeError as error:
        raise ValueError(f"constraints {shorten(constraints)!r} are no JSON: {error}") from error


def dump_constraints(constraints: Iterable[dict]) -> str:
    """Constraints as JSON text for a dataset's cell, read back by `load_constraints`. Raises ValueError as it does."""
    return json.dumps(load_constraints(list(constraints)), ensure_ascii=False, sort_keys=True)


def limits_of(constraint: dict) -> tuple[int, float]:
    """(least, most) that a counted constraint allows, both included."""
    if "exactly" in constraint:
        return constraint["exactly"], constraint["exactly"]
    limited = any(name in constraint for name in _LIMITS)
    least = 1 if constraint["type"] in _DEFAULT_ONE and not limited else 0
    return constraint.get("at_least", least), constraint.get("at_most", float("inf"))


def _asked(constraint: dict) -> str:
    least, most = limits_of(constraint)
    if least == most:
        return f"exactly {least}"
    if most == float("inf"):
        return f"at least {least}"
    return f"at most {most}" if least == 0 else f"{least} to {most}"


def _outside(constraint: dict, count: int) -> bool:
    least, most = limits_of(constraint)
    return not least <= count <= most


def failure(text: str, constraint: dict) -> str | None:
    """Why `text` breaks one valid constraint, as `"type: detail"`; None where it keeps it."""
    kind = constraint["type"]
    ignore_case = constraint.get("ignore_case", True)
    detail = None
    if kind in _COUNTS:
        count = _COUNTS[kind](text)
        if _outside(constraint, count):
            detail = f"{count}, asked {_asked(constraint)}"
    elif kind == "keywords":
        counts = {keyword: count_keyword(text, keyword, ignore_case) for keyword in constraint["keywords"]}
        bad = [f"{shorten(word)!r} {count} times" for word, count in counts.items() if _outside(constraint, count)]
        detail = f"{', '.join(bad)}, asked {_asked(constraint)} each" if bad else None
    elif kind == "forbidden":
        bad = [shorten(word) for word in constraint["keywords"] if count_keyword(text, word, ignore_case)]
        detail = f"has {', '.join(map(repr, bad))}" if bad else None
    elif kind in ("starts_with", "ends_with"):
        whole, phrase = text.strip(), constraint["phrase"].strip()
        if constraint.get("ignore_case", False):
            whole, phrase = whole.casefold(), phrase.casefold()
        if not (whole.startswith(phrase) if kind == "starts_with" else whole.endswith(phrase)):
            seen = whole[:40] if kind == "starts_with" else whole[-40:]
            detail = f"asked {shorten(phrase)!r}, found {shorten(seen)!r}"
    elif kind == "json":
        detail = _json_failure(text, constraint)
    elif kind == "script":
        share, least = script_share(text, constraint["script"]), constraint.get("at_least", 0.9)
        if share is None or share < least:
            found = "no letters" if share is None else f"{share:.3f} of the letters are {constraint['script']}"
            detail = f"{found}, asked at least {least}"
    elif kind == "language":
        found = _identify(text)
        if found != constraint["language"].lower():
            detail = f"looks like {found}, asked {constraint['language'].lower()}"
    elif kind == "case":
        if text != getattr(text, constraint["case"])() or not any(map(_is_cased, text)):
            detail = f"not all letters are {constraint['case']} case"
    else:
        detail = _structure_failure(text, constraint)
    return None if detail is None else f"{kind}: {detail}"


def _is_cased(character: str) -> bool:
    return character.lower() != character or character.upper() != character


def _json_failure(text: str, constraint: dict) -> str | None:
    fenced = _JSON_FENCE.fullmatch(text) if constraint.get("fenced", True) else None
    try:
        value = parse_json(fenced[1] if fenced else text)
    except ValueError as error:
        return f"not valid JSON, {shorten(error, 100)}"
    if "schema" in constraint:
        for _, path, error in schema_errors(_schema_text(constraint), value):
            return f"{path or 'the whole'}: {shorten(getattr(error, 'message', error), 100)}"
    return None


def _structure_failure(text: str, constraint: dict) -> str | None:
    kind, found = constraint["type"], read_markdown(text)
    if kind == "title":
        return None if found.title else "no heading of level 1 opens the text"
    if kind == "sections":
        return _sections_failure(text, constraint["titles"])
    if kind == "headings":
        count = sum(1 for level, _ in found.headings if level == constraint.get("level", level))
    elif kind == "code_block":
        wanted = constraint.get("language")
        count = sum(1 for language, _ in found.code_blocks if wanted is None or language.lower() == wanted.lower())
    elif kind == "table":
        count = sum(1 for columns, _ in found.tables if columns == constraint.get("columns", columns))
    else:
        count = getattr(found, kind)
    return f"{count}, asked {_asked(constraint)}" if _outside(constraint, count) else None


def _sections_failure(text: str, titles: list[str]) -> str | None:
    sections = [(title.casefold(), body) for title, body in read_markdown(text).sections]
    for title in titles:
        wanted = title.strip().casefold()
        place = next((n for n, (name, _) in enumerate(sections) if name == wanted), None)
        if place is None:
            return f"no section {shorten(title)!r} in its place"
        if not sections[place][1]:
            return f"the section {shorten(title)!r} is empty"
        sections = sections[place + 1 :]
    return None


def _identify(text: str) -> str:
    try:
        import py3langid
    except ImportError as error:
        raise ImportError(
            "The constraint 'language' asks the package py3langid: pip install transformers_minicpm4[data]; "
            "the constraint 'script' needs nothing"
        ) from error
    return py3langid.classify(unicode_form("NFC", text))[0]  # py3langid's own NFC is quadratic in runs of marks


def check_constraints(text: str | None, constraints) -> str:
    """
    `"ok"`, or why a text breaks constraints: each failure as `"type: detail"`, joined by `"; "`.

    Args:
        text: the text; None and blank text break every list of constraints as `"empty"`.
        constraints: what `load_constraints` takes.
    Raises:
        ValueError: the constraints are not valid.
        TypeError: the text is neither a string nor None.
    """
    constraints = load_constraints(constraints)
    if text is not None and not isinstance(text, str):
        raise TypeError(f"a text is a string or None, not {type(text).__name__}; name the column that holds text")
    if text is None or not text.strip():
        return "empty: no text"
    return join_reasons(found for constraint in constraints if (found := failure(text, constraint)))


@dataclass(frozen=True)
class ConstraintChecker:
    """
    For `map`, row by row: does a text keep its constraints? Adds `constraints_passed` (bool) and
    `constraints_reason` (`"ok"` or the failures). Drop with `.filter(lambda row: row["constraints_passed"])`.

    Args:
        constraints: constraints for every row, or None to read them from `constraints_column`.
        text_column: column of the text.
        constraints_column: column of a list of constraints, or of its JSON text.
    Raises:
        ValueError: constraints that are not valid: at construction those given here, in `map` those of a row.
        KeyError: a column is missing.
    """

    constraints: list[dict] | str | None = None
    text_column: str = "response"
    constraints_column: str = "constraints"

    def __post_init__(self):
        if self.constraints is not None:
            object.__setattr__(self, "constraints", dump_constraints(load_constraints(self.constraints)))

    def _constraints(self, row):
        if self.constraints is not None:
            return self.constraints
        return column_of(row, self.constraints_column, "ConstraintChecker")

    def __call__(self, row: dict) -> dict:
        text = column_of(row, self.text_column, "ConstraintChecker")
        reason = check_constraints(text, self._constraints(row))
        return {"constraints_passed": reason == OK, "constraints_reason": reason}


@dataclass(frozen=True)
class OutputsChecker(ConstraintChecker):
    """
    For `map`, row by row: the same for several outputs of one instruction, a column of lists of texts (`text_column`,
    here "outputs"). Adds `outputs_passed` (list of bool) and `outputs_reason` (list of str), one entry an output, and
    `passed_count` (int). `KeepPassing` turns them into rows.
    """

    text_column: str = "outputs"

    def __call__(self, row: dict) -> dict:
        outputs = column_of(row, self.text_column, "OutputsChecker")
        if outputs is not None and (isinstance(outputs, str | bytes) or not hasattr(outputs, "__iter__")):
            raise TypeError(f"outputs are a list of texts or None, not {type(outputs).__name__}; name their column")
        reasons = [check_constraints(output, self._constraints(row)) for output in outputs or []]
        passed = [reason == OK for reason in reasons]
        return {"outputs_passed": passed, "outputs_reason": reasons, "passed_count": sum(passed)}


@dataclass(frozen=True)
class KeepPassing:
    """
    For batched `map`, after `OutputsChecker`: one row for every output that passed, in order, with the output in
    `response` (str) and its place in `output_index` (int); the other columns are repeated, and rows without a passing
    output end here. Call it as `ds.map(KeepPassing(), batched=True, remove_columns=ds.column_names)`.
    """

    outputs_column: str = "outputs"
    response_column: str = "response"

    def __call__(self, batch: dict) -> dict:
        outputs = column_of(batch, self.outputs_column, "KeepPassing")
        verdicts = column_of(batch, "outputs_passed", "KeepPassing")
        kept = [(row, n) for row, passed in enumerate(verdicts) for n, ok in enumerate(passed or []) if ok]
        dropped = (self.outputs_column, "outputs_passed", "outputs_reason")
        rest = {name: [values[row] for row, _ in kept] for name, values in batch.items() if name not in dropped}
        return {
            **rest,
            self.response_column: [outputs[row][n] for row, n in kept],
            "output_index": [n for _, n in kept],
        }


_NOUNS = {"capital_words": "words in capitals", "headings": "Markdown headings", "bullets": "bullet points"}
_NOUNS |= {"numbered": "numbered list items", "code_block": "fenced code blocks", "table": "Markdown tables"}


def describe_constraint(constraint: dict) -> str:
    """The constraint as an English instruction, for prompts: `"Write at least 50 words."`"""
    constraint = validate_constraint(constraint)
    kind = constraint["type"]
    quoted = ", ".join(f'"{word}"' for word in constraint.get("keywords", constraint.get("titles", [])))
    if kind == "keywords":
        return f"Use each of these {_asked(constraint)} time(s): {quoted}."
    if kind in _COUNTS or kind in _DEFAULT_ONE:
        of = {
            "headings": lambda: f" of level {constraint['level']}" if "level" in constraint else "",
            "code_block": lambda: f" in {constraint['language']}" if "language" in constraint else "",
            "table": lambda: f" of {constraint['columns']} columns" if "columns" in constraint else "",
        }.get(kind, lambda: "")()
        return f"Write {_asked(constraint)} {_NOUNS.get(kind, kind)}{of}."
    if kind == "json":
        valid = f", valid under this JSON Schema: {_schema_text(constraint)}" if "schema" in constraint else "."
        return f"Answer with nothing but JSON{valid}"
    return {
        "forbidden": lambda: f"Do not use any of these: {quoted}.",
        "starts_with": lambda: f'Begin with "{constraint["phrase"].strip()}".',
        "ends_with": lambda: f'End with "{constraint["phrase"].strip()}".',
        "sections": lambda: f"Write Markdown sections under these headings, in this order: {quoted}.",
        "title": lambda: "Open with a title, a Markdown heading of level 1.",
        "script": lambda: (
            f"Write {constraint.get('at_least', 0.9):.0%} of it or more in {constraint['script']} script."
        ),
        "language": lambda: f"Write in the language with the ISO 639-1 code {constraint['language'].lower()}.",
        "case": lambda: f"Write all letters in {constraint['case']} case.",
    }[kind]()
