"""Is a distribution's license permissive? Decided from its metadata alone.

Order of trust, as packaging metadata grew: `License-Expression` (SPDX, PEP 639), then the license
classifiers, then the free-text `License` field. Anything that isn't recognised counts as not
permissive.
"""

import re
from email.message import Message

PERMISSIVE_IDS = frozenset(
    (
        "0bsd apache-2.0 blueoak-1.0.0 bsd-1-clause bsd-2-clause bsd-3-clause bsl-1.0 cc0-1.0 hpnd "
        "isc "
        "mit mit-0 mit-cmu ncsa psf-2.0 python-2.0 python-2.0.1 unlicense zlib"
    ).split()
)
PERMISSIVE_CLASSIFIERS = frozenset(
    f"License :: OSI Approved :: {name}"
    for name in (
        "Apache Software License",
        "BSD License",
        "Boost Software License 1.0 (BSL-1.0)",
        "Historical Permission Notice and Disclaimer (HPND)",
        "ISC License (ISCL)",
        "MIT License",
        "MIT No Attribution License (MIT-0)",
        "Python Software Foundation License",
        "The Unlicense (Unlicense)",
        "zlib/libpng License",
    )
)
# Whole first line of the free-text field, lower case, "the" and "license" taken out.
_FREE_TEXT = re.compile(
    r"(mit|mit-0|isc|0bsd|zlib|unlicense|cc0-1\.0|psf(-2\.0)?|python software foundation"
    r"|((new|modified|simplified) )?bsd|bsd[- ][23][- ]clause|[23][- ]clause bsd"
    r"|apache|apache software|apache,?[- ]?(version )?2(\.0)?)"
)
_TOKENS = re.compile(r"\(|\)|[^\s()]+")


def permissive_expression(expression: str) -> bool:
    """Whether permissive licenses fulfil an SPDX expression: all sides of AND, one of OR."""
    tokens = _TOKENS.findall(expression)
    value, rest = _any_of(tokens)
    return value and not rest


def _any_of(tokens: list[str]) -> tuple[bool, list[str]]:
    value, tokens = _all_of(tokens)
    while tokens and tokens[0].upper() == "OR":
        other, tokens = _all_of(tokens[1:])
        value = value or other
    return value, tokens


def _all_of(tokens: list[str]) -> tuple[bool, list[str]]:
    value, tokens = _single(tokens)
    while tokens and tokens[0].upper() == "AND":
        other, tokens = _single(tokens[1:])
        value = value and other
    return value, tokens


def _single(tokens: list[str]) -> tuple[bool, list[str]]:
    if not tokens:
        return False, []
    if tokens[0] == "(":
        value, tokens = _any_of(tokens[1:])
        closed = tokens[:1] == [")"]
        return value and closed, tokens[1:]
    value, tokens = tokens[0].lower() in PERMISSIVE_IDS, tokens[1:]
    if tokens and tokens[0].upper() == "WITH":  # an exception only ever grants more
        tokens = tokens[2:]
    return value, tokens


def permissive(metadata: Message) -> bool:
    """Whether a distribution with this core metadata is under permissive licenses only."""
    expression = metadata.get("License-Expression")
    if expression:
        return permissive_expression(expression)
    classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License :: ")]
    named = [c for c in classifiers if c != "License :: OSI Approved"]
    if named:
        return all(c in PERMISSIVE_CLASSIFIERS for c in named)
    text = (metadata.get("License") or "").strip()
    line = text.splitlines()[0].strip().lower() if text else ""
    line = " ".join(re.sub(r"\b(the|licen[cs]ed?)\b", " ", line).split())
    return permissive_expression(text) or _FREE_TEXT.fullmatch(line) is not None
