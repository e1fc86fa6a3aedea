"""
A JSON schema checked and rewritten, so that the engine (llguidance 1.9.1) enforces all of it or it is refused.

Nothing of a schema is ignored: a keyword that is not enforced is named in the error. The lists below were found by
asking the engine about accepted and refused documents of each keyword, against an independent validator;
`docs/constrained.md` shows them. A place is a JSON pointer to a schema in the document, such as `#/properties/a`.
"""

from __future__ import annotations

import itertools
import json
import math
import reprlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from urllib.parse import quote, unquote


# fmt: off
ENFORCED = frozenset([
    "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "$id", "$anchor",
    "properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties",
    "items", "prefixItems", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
])
ANNOTATIONS = frozenset([
    "title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly", "$schema",
    "discriminator",
])
# fmt: on
FORMATS = frozenset(["date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"])
# Drafts in which the keywords above mean the same; "items" as a list is refused apart.
_DRAFTS = ("2020-12/schema", "2019-09/schema", "draft-07/schema", "draft-06/schema")
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

# The engine recurses: its reader of JSON gives up at 127 values inside each other, and its compiler has no limit but
# the stack, of which it took up to 5.4 kB for each schema inside another (measured 2026-11-28).
MAX_NESTING = 100  # JSON values inside each other
MAX_DEPTH = 400  # schemas inside each other, through $ref as well; 2.1 MB of stack
MAX_PLACES = 20_000_000  # characters of all places, which are kept while a schema is read
MAX_OPTIONAL = 450  # properties that may be left out, of one schema: at some 500 the engine gives up in mid-answer

# The engine's dates have a 29 February in every year, and a year 0, which calendars have not.
_LEAP = "[0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00"
_REAL_DATE = f"^([0-9]{{4}}-(0[13-9]|1[0-2]|02-([01]|2[0-8]))|({_LEAP})-02-29)"

_DEFINITIONS = ("$defs", "definitions")
# And seconds 60 in every minute, where RFC 3339 has them in the last of a day alone and most readers have none; and
# names of any length.
_DAY = [{"pattern": _REAL_DATE}, {"pattern": "^0{0,3}[1-9]"}]
_SECONDS = [{"pattern": "^([0-9-]{10}[Tt])?[0-9]{2}:[0-5][0-9]:[0-5][0-9]"}]
_NARROWER = {
    "date": _DAY,
    "date-time": [*_DAY, *_SECONDS],
    "time": _SECONDS,
    "hostname": [{"maxLength": 253}],
    "email": [{"maxLength": 254}],
}

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_FURTHEST = 2**63 - 1024  # float64's last number before 2**63
_JOINS = ("allOf", "anyOf", "oneOf")
_PARTS = ("properties", "patternProperties", "additionalProperties", "items", "prefixItems")


def enforceable(schema: dict, closed: bool = False) -> tuple[dict, bool]:
    """
    A copy of a schema that means to the engine what the schema means.

    Args:
        closed: whether schemas with `properties` that do not say `additionalProperties` allow no others.

    Returns:
        the copy, and whether the engine tells names of properties apart by their spelling: then `"a"` must not be
        written as `"\\u0061"`.

    Raises:
        ValueError: malformed, too deep, or asking for what is not enforced; each is named with its place.
    """
    _check_values(schema)
    schema = json.loads(json.dumps(schema))
    places = dict(_schemas(schema))
    if closed:
        for one in _dicts(places).values():
            if "properties" in one:
                one.setdefault("additionalProperties", False)
        places = dict(_schemas(schema))
    dicts = _dicts(places)
    _say_otherwise(dicts)
    _refuse(_not_enforced(dicts))
    malformed = list(_malformed(dicts))
    if malformed:
        raise ValueError(f"the JSON schema is malformed: {_first(malformed)}. Mend it, or take it out.")
    targets = _targets(places)
    _check_depth(places, targets)
    by_spelling = [(one, place) for place, one in dicts.items() if _has_names(one) and not _is_closed(one)]
    _refuse(
        [
            *_narrow(dicts, targets),
            *_counted(dicts),
            *_many_optional(dicts),
            *_unspeakable(by_spelling),
            *_rounded(dicts),
        ]
    )
    for place in [place for place, one in dicts.items() if "oneOf" in one and _is_exclusive(place, dicts, targets)]:
        # The engine's own way of telling options apart does not look behind references.
        one = dicts[place]
        one.pop("discriminator", None)
        options = {"anyOf": one.pop("oneOf")}
        one |= {"allOf": [*one.get("allOf", []), options]} if "anyOf" in one else options
    for place, one in dicts.items():
        if place in targets:
            one["$ref"] = "#" + quote(targets[place][1:], safe="/~-._!$&'()*+,;=:@")
        # Without these the engine resolves references as above, and reads all drafts as one.
        for keyword in ("$id", "$anchor", "$schema"):
            one.pop(keyword, None)
        for keyword in ("minimum", "maximum"):
            if keyword in one:
                one[keyword] = _inward(one[keyword], math.inf if keyword == "minimum" else -math.inf)
        narrower = _NARROWER.get(one.get("format"), [])
        if narrower:
            one["allOf"] = [*one.get("allOf", []), *narrower]
    return schema, bool(by_spelling)


def _say_otherwise(dicts: dict[str, dict]) -> None:
    """What means nothing goes; bounds beyond the engine's numbers move inward to what it has; in place."""
    for one in dicts.values():
        # Notes of other tools; the engine's own take effect.
        for keyword in [name for name in one if name.startswith("x-") and name != "x-guidance" or name == "example"]:
            del one[keyword]
        names = one.get("propertyNames")
        if names is True or names == {} or names == {"type": "string"}:
            del one["propertyNames"]
        if one.get("uniqueItems") is False:
            del one["uniqueItems"]
        for keyword in _COUNTS:
            if isinstance(one.get(keyword), float) and one[keyword].is_integer():
                one[keyword] = int(one[keyword])
        for side, tighter, inside in (("Minimum", max, math.inf), ("Maximum", min, -math.inf)):
            exclusive, plain = f"exclusive{side}", side.lower()
            bound = one.get(exclusive)
            reachable = _is_number(bound) and (bound < _FURTHEST if inside > 0 else bound > -_FURTHEST)
            if reachable and abs(bound) >= 2**53:
                moved = float(bound)
                while moved <= bound if inside > 0 else moved >= bound:
                    moved = math.nextafter(moved, inside)
                del one[exclusive]
                held = one.get(plain)
                one[plain] = tighter(held, int(moved)) if _is_number(held) else int(moved)
            if _is_number(one.get(plain)):
                one[plain] = tighter(one[plain], -_FURTHEST if inside > 0 else _FURTHEST)


def alone(schema: dict, most: int = 3000) -> Iterator[tuple[str, dict]]:
    """What the first `most` schemas of a document say by themselves, each with its place, to find the one at fault."""
    for place, one in itertools.islice(_dicts(dict(_schemas(schema))).items(), most):
        itself = {keyword: value for keyword, value in one.items() if keyword not in (*_PARTS, *_JOINS, "$ref")}
        if one.get("patternProperties"):
            itself["patternProperties"] = dict.fromkeys(one["patternProperties"], True)
        yield _shown(place), {keyword: value for keyword, value in itself.items() if keyword not in _DEFINITIONS}


def _refuse(problems) -> None:
    problems = list(problems)
    if problems:
        raise ValueError(
            f"the JSON schema asks for what constrained decoding cannot enforce: {_first(problems)}. Take that "
            "out of the schema and check it after decoding, or say it otherwise."
        )


def _first(problems: list[str]) -> str:
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")


# --- Values ----------------------------------------------------------------------------------------------------------


def _check_values(document) -> None:
    """Refuses what is no JSON, or too deep for the engine's reader."""
    left, written = [(document, "#", 1)], 0
    while left:
        value, place, depth = left.pop()
        written += len(place)
        if written > MAX_PLACES:
            raise ValueError(
                f"the JSON schema is too large: the places of its values take more than {MAX_PLACES:,} characters. "
                "Make it smaller, or its names shorter."
            )
        wrong = None
        if isinstance(value, dict | list | tuple):
            if depth > MAX_NESTING:
                wrong = f"more than {MAX_NESTING} values inside each other"
            elif isinstance(value, dict):
                if not all(isinstance(name, str) and is_text(name) for name in value):
                    wrong = "a name that is no text (a number, or half a surrogate pair)"
                else:
                    left += [(one, _at(place, name), depth + 1) for name, one in value.items()]
            else:
                left += [(one, f"{place}/{number}", depth + 1) for number, one in enumerate(value)]
        elif isinstance(value, str):
            wrong = None if is_text(value) else "a string with half a surrogate pair"
        elif isinstance(value, int | float):
            wrong = None if _is_finite(value) else "a number that is not finite, or too large for a float"
        elif value is not None:
            wrong = f"a value of type {type(value).__name__}"
        if wrong:
            raise ValueError(f"the JSON schema has {wrong} at {_shown(place)}, which JSON or the engine cannot read.")


def is_text(text: str) -> bool:
    """Whether a string has no half of a surrogate pair alone, which is no Unicode text."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _at(place: str, name: str) -> str:
    return f"{place}/{name.replace('~', '~0').replace('/', '~1')}"


def _repr(value) -> str:
    return ascii(value) if isinstance(value, str) and len(value) < 100 else reprlib.repr(value)


def _shown(place: str) -> str:
    return place if len(place) < 200 else f"{place[:90]} ... {place[-90:]}"


# --- Places and references -------------------------------------------------------------------------------------------


def _schemas(schema) -> Iterator[tuple[str, dict | bool]]:
    """The place of a schema and of each inside it, with the schema there; those outside first."""
    left = [("#", schema)]
    while left:
        place, one = left.pop()
        yield place, one
        if isinstance(one, dict):
            left += reversed([(f"{place}/{step}", part) for step, part in _inside(one)])


def _inside(schema: dict) -> Iterator[tuple[str, dict | bool]]:
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict | bool):
            yield keyword, schema[keyword]
    for keyword in (*_JOINS, "prefixItems"):
        if isinstance(schema.get(keyword), list):
            yield from ((f"{keyword}/{n}", one) for n, one in enumerate(schema[keyword]) if _is_schema(one))
    for keyword in ("properties", "patternProperties", *_DEFINITIONS):
        if isinstance(schema.get(keyword), dict):
            yield from ((_at(keyword, name), one) for name, one in schema[keyword].items() if _is_schema(one))


def _dicts(places: dict) -> dict[str, dict]:
    return {place: one for place, one in places.items() if isinstance(one, dict)}


def _targets(places: dict) -> dict[str, str]:
    """Of each place with a `$ref`: the place that it points to."""
    dicts = _dicts(places)
    document = dicts["#"].get("$id", "").removesuffix("#")
    anchors, targets, problems = {}, {}, []
    for place, one in dicts.items():
        if "$anchor" in one and anchors.setdefault(one["$anchor"], place) != place:
            problems.append(f"'$anchor': {one['$anchor']!r} at {_shown(place)} (a second one of that name)")
        if "$id" in one and place != "#":
            problems.append(f"'$id' at {_shown(place)} (known at the root only)")
    for place, one in dicts.items():
        if "$ref" in one:
            base, _, fragment = one["$ref"].partition("#")
            fragment = unquote(fragment)
            target = anchors.get(fragment)
            if fragment == "" or fragment.startswith("/"):
                steps = [step.replace("~1", "/").replace("~0", "~") for step in fragment.split("/")[1:]]
                target = "#"
                for step in steps:
                    target = _at(target, step)
            if (base and base != document) or target not in places:
                problems.append(f"'$ref': {_repr(one['$ref'])} at {_shown(place)} (no schema of this document)")
            else:
                targets[place] = target
    _refuse(problems)
    return targets


def _check_depth(places: dict, targets: dict[str, str]) -> None:
    """
    Bounds the longest way through schemas inside schemas and references. In a group of schemas that contain each
    other the engine may come through all before it finds none new, so each counts.
    """
    inside = {place: [] for place in places}
    outside = {place: [] for place in places}
    edges = list(targets.items())
    for place, one in places.items():
        if isinstance(one, dict):
            edges += [(place, f"{place}/{step}") for step, _ in _inside(one)]
    for start, end in edges:
        inside[start].append(end)
        outside[end].append(start)
    # Kosaraju's strongly connected components, without recursion.
    order, seen = [], set()
    for root in places:
        left = [(root, False)]
        while left:
            place, done = left.pop()
            if done:
                order.append(place)
            elif place not in seen:
                seen.add(place)
                left.append((place, True))
                left += [(one, False) for one in inside[place] if one not in seen]
    depth = {}
    for root in reversed(order):  # groups in an order in which those outside come first
        if root in depth:
            continue
        group, left = {root}, [root]
        while left:
            for one in outside[left.pop()]:
                if one not in depth and one not in group:
                    group.add(one)
                    left.append(one)
        before = max((depth[one] for place in group for one in outside[place] if one not in group), default=0)
        if before + len(group) > MAX_DEPTH:
            raise ValueError(
                f"the JSON schema has more than {MAX_DEPTH} schemas inside each other, references included, down to "
                f"{_shown(root)} (in a group that contains itself each counts). Make it flatter."
            )
        depth |= dict.fromkeys(group, before + len(group))


# --- Form ------------------------------------------------------------------------------------------------------------


def _is_schema(value) -> bool:
    return isinstance(value, dict | bool)


def _is_schemas(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_schema, value))


def _is_named_schemas(value) -> bool:
    return isinstance(value, dict) and all(map(_is_schema, value.values()))


def _is_string(value) -> bool:
    return isinstance(value, str)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_names(value) -> bool:
    return isinstance(value, list) and all(map(_is_string, value)) and len(set(value)) == len(value)


def _is_type(value) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and _is_names(names) and all(name in _TYPES for name in names)


# fmt: off
_FORMS: dict[str, tuple[Callable[[object], bool], str]] = {
    "type": (_is_type, f"one of {', '.join(_TYPES)}, or a list of different ones"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list of one value or more"),
    "required": (_is_names, "a list of different strings"),
    "multipleOf": (lambda value: _is_number(value) and 0 < value < 2**53, "a number above 0 and below 2**53"),
    **dict.fromkeys(["minimum", "maximum"],
                    (lambda value: _is_number(value) and abs(value) < 2**63, "a number below 2**63 in size")),
    **dict.fromkeys(["exclusiveMinimum", "exclusiveMaximum"],
                    (lambda value: _is_number(value) and abs(value) < 2**53, "a number below 2**53 in size")),
    **dict.fromkeys([*_JOINS, "prefixItems"], (_is_schemas, "a list of one schema or more")),
    **dict.fromkeys(["items", "additionalProperties"], (_is_schema, "a schema")),
    **dict.fromkeys(["properties", "patternProperties", "$defs", "definitions"],
                    (_is_named_schemas, "an object of schemas")),
    **dict.fromkeys(_COUNTS,
                    (_is_count, "a whole number from 0 to 2147483647, without a decimal point")),
    **dict.fromkeys(["$ref", "$id", "$anchor", "$schema", "pattern", "format"], (_is_string, "a string")),
}
# fmt: on


def _malformed(dicts: dict[str, dict]) -> Iterator[str]:
    for place, one in dicts.items():
        for keyword, value in one.items():
            fits, form = _FORMS.get(keyword, (None, ""))
            if fits and not fits(value):
                yield f"{keyword!r}: {_repr(value)} at {_shown(place)} (it is {form})"


# --- What is not enforced --------------------------------------------------------------------------------------------


def _not_enforced(dicts: dict[str, dict]) -> Iterator[str]:
    old = [one["$schema"] for one in dicts.values() if "$schema" in one and "2020-12" not in str(one["$schema"])]
    for place, one in dicts.items():
        shown = _shown(place)
        for keyword, value in one.items():
            if keyword not in ENFORCED and keyword not in ANNOTATIONS:
                yield f"{_repr(keyword)} at {shown}"
            elif keyword == "items" and isinstance(value, list):
                yield f"'items' as a list at {shown} (write 'prefixItems')"
            elif keyword == "prefixItems" and old:
                yield f"'prefixItems' at {shown} (not in the draft of '$schema')"
            elif keyword in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
                yield f"{keyword!r} as true or false at {shown} (write the bound itself)"
            elif keyword == "format" and isinstance(value, str) and value not in FORMATS:
                yield f"'format': {_repr(value)} at {shown} (known: {', '.join(sorted(FORMATS))})"
            elif keyword == "$schema" and isinstance(value, str) and not value.rstrip("#").endswith(_DRAFTS):
                yield f"'$schema': {_repr(value)} at {shown} (drafts 06, 07, 2019-09 and 2020-12 are known)"


def _narrow(dicts: dict[str, dict], targets: dict[str, str]) -> Iterator[str]:
    """
    A whole number that is excluded next to another bound less than 1 away: the engine lets it pass. Told by groups of
    schemas that it joins by `allOf`, `anyOf`, `oneOf` and `$ref`; where it joins objects or arrays, whose properties
    or items then have the bounds of both, all bounds of the document are one group.
    """
    group = {place: place for place in dicts}  # union-find

    def find(place):
        while group[place] != place:
            group[place] = place = group[group[place]]
        return place

    whole, pointed = set(), set(targets.values())
    for place, one in dicts.items():
        kinds = one.get("type", "number")
        outside, _, number = place.rpartition("/")
        outside, _, keyword = outside.rpartition("/")
        joined = keyword in _JOINS and number.isdecimal() and outside in dicts and keyword in dicts[outside]
        if "number" not in kinds or (joined and outside in whole and place not in pointed):
            whole.add(place)  # only integers, or no numbers: the engine is right there
        if joined:
            group[find(place)] = find(outside)
        if targets.get(place) in dicts:
            group[find(place)] = find(targets[place])
    all_one = any(_joins_parts(one, dicts.get(targets.get(place))) for place, one in dicts.items())
    above, below = {}, {}  # by group and whole part: bounds, each with its keyword and place
    for place, one in dicts.items():
        for keyword in _BOUNDS:
            if keyword in one and place not in whole:
                side = above if keyword.endswith("aximum") else below
                key = "#" if all_one else find(place), math.floor(one[keyword])
                side.setdefault(key, {})[one[keyword], keyword] = place
    for side, others in ((below, above), (above, below)):
        for (name, floor), bounds in side.items():
            near = {**others.get((name, floor - 1), {}), **others.get((name, floor), {})}
            for (bound, keyword), place in bounds.items():
                if not keyword.startswith("exclusive") or bound != floor:
                    continue
                found = next((one for one in near if abs(one[0] - bound) < 1), None)
                if found:
                    yield (
                        f"{keyword!r}: {bound} with {found[1]!r}: {found[0]}, less than 1 away, at {_shown(place)}"
                        + (f" and {_shown(near[found])}" if near[found] != place else "")
                    )


def _joins_parts(schema: dict, target: dict | None) -> bool:
    """Whether two things that may say something of properties or items hold at once."""

    def has_parts(one) -> bool:
        return isinstance(one, dict) and any(keyword in one for keyword in (*_PARTS, *_JOINS, "$ref"))

    sources = sum(map(has_parts, schema.get("allOf", []))) + has_parts(target)
    sources += sum(any(map(has_parts, schema.get(keyword, []))) for keyword in ("anyOf", "oneOf"))
    sources += any(keyword in schema for keyword in _PARTS)
    return sources > 1 or bool(schema.get("properties") and schema.get("patternProperties"))


def _counted(dicts: dict[str, dict]) -> Iterator[str]:
    """Free keys may be the same: one more than the required ones is sure to be another one, two are not."""
    for place, one in dicts.items():
        least = len(one.get("required", [])) + 1
        if one.get("minProperties", 0) > least and not _is_closed(one):
            yield (
                f"'minProperties': {one['minProperties']} at {_shown(place)} (free keys may repeat; at most {least}, "
                "one more than 'required' names)"
            )


def _is_exclusive(place: str, dicts: dict[str, dict], targets: dict[str, str]) -> bool:
    """Whether a `oneOf`'s options cannot hold at once: other types, or other values of themselves or of a property."""

    def meant(place: str) -> tuple[str, dict]:
        seen = set()
        while place in targets and place not in seen and dicts[place].keys() <= {"$ref", *ANNOTATIONS}:
            seen.add(place)
            place = targets[place]
        return place, dicts.get(place, {})

    def values(one: dict) -> set | None:
        found = [one["const"]] if "const" in one else one.get("enum")
        if found is None or any(isinstance(value, dict | list) for value in found):
            return None
        return {(isinstance(value, bool), value) for value in found}  # 1 is 1.0, and not true

    def kinds(one: dict) -> set[str]:
        found = values(one)
        if found is not None:
            return {_kind(value) for _, value in found}
        given = one.get("type", _TYPES)
        given = {given} if isinstance(given, str) else set(given)
        return given | {"integer"} if "number" in given else given

    def apart(first: tuple[str, dict], second: tuple[str, dict]) -> bool:
        (place, one), (other_place, other) = first, second
        if not kinds(one) & kinds(other):
            return True
        if values(one) is not None and values(other) is not None:
            return not values(one) & values(other)
        if kinds(one) != {"object"} or kinds(other) != {"object"}:
            return False
        for name in one.get("properties", {}).keys() & other.get("properties", {}).keys():
            step = _at("properties", name)
            tags = [values(meant(f"{where}/{step}")[1]) for where in (place, other_place)]
            required = name in one.get("required", []) or name in other.get("required", [])
            if required and None not in tags and not tags[0] & tags[1]:
                return True
        return False

    options = [meant(f"{place}/oneOf/{number}") for number in range(len(dicts[place]["oneOf"]))]
    return len(options) <= 200 and all(apart(*pair) for pair in itertools.combinations(options, 2))


def _kind(value) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if float(value).is_integer() else "number"
    return "string"


def _many_optional(dicts: dict[str, dict]) -> Iterator[str]:
    for place, one in dicts.items():
        optional = set(one.get("properties", ())) - set(one.get("required", ()))
        if len(optional) > MAX_OPTIONAL:
            yield f"{len(optional)} properties that may be left out at {_shown(place)} (at most {MAX_OPTIONAL})"


def _is_closed(schema: dict) -> bool:
    """Whether its properties have no names but those of `properties`."""
    return schema.get("additionalProperties") is False and not schema.get("patternProperties")


def _has_names(schema: dict) -> bool:
    return any(schema.get(keyword) for keyword in ("properties", "required", "patternProperties"))


def _unspeakable(by_spelling: list[tuple[dict, str]]) -> Iterator[str]:
    """A control character can be written in two ways, of which the engine knows one as that of a named property."""
    for one, place in by_spelling:
        for name in (*one.get("properties", ()), *one.get("required", ())):
            if any(letter < " " or letter == "\x7f" for letter in name):
                yield f"{_repr(name)} as a name beside free ones at {_shown(place)} (no control characters there)"


def _rounded(dicts: dict[str, dict]) -> Iterator[str]:
    """The engine reads whole numbers as float64, and others of 16 digits or more to the last bit but one."""
    for place, one in dicts.items():
        for keyword in ("const", "enum", "multipleOf", *_BOUNDS):
            left = [one[keyword]] if keyword in one else []
            while left:
                value = left.pop()
                if isinstance(value, dict | list):
                    left += value.values() if isinstance(value, dict) else value
                elif (
                    _is_number(value) and not _is_exact(value) and not (keyword in _BOUNDS and isinstance(value, int))
                ):
                    yield f"{value} in {keyword!r} at {_shown(place)} (the engine rounds it; use 15 digits at most)"


def _is_exact(number: float) -> bool:
    if isinstance(number, int):
        return abs(number) < 2**63 and int(float(number)) == number
    _, digits, exponent = Decimal(repr(number)).as_tuple()
    return int("".join(map(str, digits))) <= 2**53 and abs(exponent) <= 22


def _inward(bound: float, inside: float) -> float:
    """A bound of whole numbers, moved inward to one that float64 knows."""
    rounded = float(bound)
    if isinstance(bound, int) and (rounded < bound if inside > 0 else rounded > bound):
        rounded = math.nextafter(rounded, inside)
    return int(rounded) if isinstance(bound, int) else bound
