r"""
What a word, a sentence, a heading is: the exact definitions that the constraints of `constraints.py` count by.

- word: every Chinese character (Unicode script Han) and every kana counts as one word; of all other writing, a longest
  run of letters, marks, digits and underscores counts as one, going on over an apostrophe or hyphen inside it
  ("don't", "state-of-the-art") and over a point or comma between digits ("1,000.5"). So "我用 Python 3" has 4 words.
  Writing without spaces other than Chinese and Japanese (Thai, Khmer ...) is not split: count characters there.
- character: a code point after NFC, white space around the text not counted, white space inside counted.
- sentence: a piece of a line that holds a word and ends at 。！？…, at . ! ? before white space, or with the line.
  The full stop of an abbreviation with stops inside ("e.g.", "U.S.") or of Mr Mrs Ms Dr Prof St vs cf ends nothing.
  Closing quotes and brackets belong to the sentence that they close.
- paragraph: a longest run of lines that are not blank. line: a line that is not blank. Lines end at \n, \r\n or \r.

Markdown is read line by line as CommonMark does at the outermost level: fenced code is code, whatever stands in it.
"""

import unicodedata
from dataclasses import dataclass, field

import regex


_CHARACTER_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}"
_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{_CHARACTER_SCRIPTS}]]"
WORD = regex.compile(
    rf"[{_CHARACTER_SCRIPTS}]|{_LETTER}+(?:(?:['’\-]|(?<=\p{{N}})[.,](?=\p{{N}})){_LETTER}+)*", regex.V1
)
_CLOSERS = r"[\"'”’»」』）)\]]*"
_ABBREVIATION = r"(?:\b\p{L}\.\p{L}|\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|cf))"
# Possessive, and tried only where a run of stops begins: nothing is read twice, so time is linear in any text.
_SENTENCE_END = regex.compile(
    rf"[。！？…]++{_CLOSERS}+|(?<![.!?])(?!(?<={_ABBREVIATION})\.(?![.!?]))[.!?]++{_CLOSERS}+(?=\s|$)", regex.V1
)
_LINE_END = regex.compile(r"\r\n?|\n")
_MANY_MARKS = regex.compile(r"\p{M}{31}")
_PIECES = regex.compile(r"\P{M}*+\p{M}{1,30}|\P{M}++")


def split_lines(text: str) -> list[str]:
    """Lines as CommonMark and editors see them; str.splitlines also ends them at form feeds, U+0085, U+2028 ..."""
    return _LINE_END.split(text)


def _nfc(text: str) -> str:
    """NFC. Runs of more than 30 marks (no writing has such) go in pieces: Python sorts a run in quadratic time."""
    if not _MANY_MARKS.search(text):
        return unicodedata.normalize("NFC", text)
    return "".join(unicodedata.normalize("NFC", piece) for piece in _PIECES.findall(text))


def find_words(text: str) -> list[str]:
    """The words of a text in order, as this module defines them."""
    return WORD.findall(text)


def count_words(text: str) -> int:
    return sum(1 for _ in WORD.finditer(text))


def count_characters(text: str) -> int:
    return len(_nfc(text).strip())


def count_sentences(text: str) -> int:
    pieces = (piece for line in split_lines(text) for piece in _SENTENCE_END.split(line))
    return sum(1 for piece in pieces if WORD.search(piece))


def count_lines(text: str) -> int:
    return sum(1 for line in split_lines(text) if line.strip())


def count_paragraphs(text: str) -> int:
    filled = [bool(line.strip()) for line in split_lines(text)]
    return sum(1 for before, now in zip([False, *filled], filled) if now and not before)


def count_capital_words(text: str) -> int:
    """Words of at least two letters, all of them capitals ("NASA", not "I")."""
    return sum(1 for word in find_words(text) if word.isupper() and sum(map(str.isalpha, word)) > 1)


def count_keyword(text: str, keyword: str, ignore_case: bool = True) -> int:
    """
    How often a keyword stands in a text, occurrences not overlapping.

    A keyword that begins (ends) with a letter of a script with spaces must begin (end) a word: "cat" is not in
    "concatenate". Chinese, kana and punctuation count wherever they stand. Both sides are compared in NFC.
    """
    keyword, text = (_nfc(part) for part in (keyword, text))
    before = rf"(?<!{_LETTER})" if regex.match(_LETTER, keyword, regex.V1) else ""
    after = rf"(?!{_LETTER})" if regex.match(_LETTER, keyword[-1:], regex.V1) else ""
    flags = regex.V1 | (regex.IGNORECASE if ignore_case else 0)
    return sum(1 for _ in regex.finditer(before + regex.escape(keyword) + after, text, flags))


def script_share(text: str, script: str) -> float | None:
    """Share of the letters of a text that belong to a Unicode script ("Han", "Latin", ...); None without letters."""
    letters = regex.findall(r"\p{L}", text)
    if not letters:
        return None
    wanted = regex.compile(rf"\p{{Script={script}}}")
    return sum(1 for letter in letters if wanted.match(letter)) / len(letters)


@dataclass
class Markdown:
    """The outermost blocks of a Markdown text, in order."""

    headings: list[tuple[int, str]] = field(default_factory=list)  # (level 1-6, text), written with "#"
    code_blocks: list[tuple[str, str]] = field(default_factory=list)  # (language, code), closed fences only
    bullets: int = 0  # lines that begin with "-", "*" or "+" and white space, at any depth
    numbered: int = 0  # lines that begin with "1." or "1)" and white space, at any depth
    tables: list[tuple[int, int]] = field(default_factory=list)  # (columns, rows under the header)
    title: str | None = None  # the heading of level 1 that opens the text
    sections: list[tuple[str, bool]] = field(default_factory=list)  # (heading, is there text before the next heading)


# Possessive where a failure must not be tried again from every place of a long line.
_FENCE = regex.compile(r" {0,3}(`{3,}+|~{3,}+)[ \t]*+([^\s`]*+)[^`]*+$")
_HEADING = regex.compile(r" {0,3}(#{1,6}+)(?![^ \t])(.*)", regex.DOTALL)
_RULE = regex.compile(r" {0,3}([-*_])(?:[ \t]*+\1){2,}+[ \t]*+$")
_BULLET = regex.compile(r"[ \t]*[-*+][ \t]+\S")
_NUMBERED = regex.compile(r"[ \t]*\d{1,9}[.)][ \t]+\S")
_CELL = r"[ \t]*+:?-++:?[ \t]*+"
_DELIMITERS = regex.compile(rf" {{0,3}}(?!-[ \t])\|?{_CELL}(?:\|{_CELL})*+\|?[ \t]*+$")


def _opens_block(line: str) -> bool:
    return any(block.match(line) for block in (_FENCE, _HEADING, _RULE, _BULLET, _NUMBERED))


def _heading_text(rest: str) -> str:
    """What stands after the opening #s, without the closing ones."""
    rest = rest.strip()
    text = rest.rstrip("#")
    return text.rstrip() if not text or text[-1] in " \t" else rest


def _cells(line: str) -> int:
    """Number of cells of a table's row; `\\|` is not a border."""
    line = line.strip().replace("\\|", "")
    return line.removeprefix("|").removesuffix("|").count("|") + 1


def read_markdown(text: str) -> Markdown:
    """The outermost blocks of `text`. Headings underlined with === or --- are not counted: constraints ask for "#"."""
    found = Markdown()
    lines = split_lines(text)
    first = next((line for line in lines if line.strip()), "")
    opening = _HEADING.match(first)
    if opening and len(opening[1]) == 1:
        found.title = _heading_text(opening[2]) or None
    fence, start, language = None, 0, ""
    row = 0
    while row < len(lines):
        line = lines[row]
        if found.sections and line.strip() and (fence or not _HEADING.match(line)):
            found.sections[-1] = (found.sections[-1][0], True)
        if fence:
            closing = line.strip(" \t")
            indent = len(line) - len(line.lstrip(" "))
            if closing and set(closing) == {fence[0]} and len(closing) >= len(fence) and indent < 4:
                found.code_blocks.append((language, "\n".join(lines[start:row])))
                fence = None
        elif match := _FENCE.match(line):
            fence, language, start = match[1], match[2], row + 1
        elif match := _HEADING.match(line):
            found.headings.append((len(match[1]), _heading_text(match[2])))
            found.sections.append((found.headings[-1][1], False))
            row += 1
            continue
        elif "|" in line and row + 1 < len(lines) and _DELIMITERS.match(lines[row + 1]):
            if _cells(line) == _cells(lines[row + 1]):
                begin = row + 2
                row = begin
                while row < len(lines) and lines[row].strip() and not _opens_block(lines[row]):
                    row += 1
                found.tables.append((_cells(line), row - begin))
                continue
        elif _RULE.match(line):
            pass
        elif _BULLET.match(line):
            found.bullets += 1
        elif _NUMBERED.match(line):
            found.numbered += 1
        row += 1
    return found
