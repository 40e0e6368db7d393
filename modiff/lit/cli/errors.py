"""Errors of the parser in plain words: what was given, what is allowed, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from modiff.errors import ConfigError
from modiff.lit.cli.documents import check_arguments

KINDS = {"int": "whole numbers", "float": "numbers", "bool": "true, false", "str": "texts", "NoneType": "null"}
_TYPE = r"(?:<class '\w+'>|typing\.Literal\[[^\]]*\])"
_UNION = (
    rf"Does not validate against any of the Union subtypes Subtypes: .* Errors: ((?:- Expected a {_TYPE} ?)+)"
    r"Given value type: <class '\w+'> Given value: (.+)"
)


def parse_plainly(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Parse the arguments; a wrong option or value is reported once, in one plain sentence.

    Raises:
        ConfigError: The parser refuses the arguments.
    """
    check_arguments(args)
    try:
        return parser.parse_args(list(args))
    except (ArgumentError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(plain_error(error, parser)) from error


def plain_error(error: BaseException, parser: Any = None) -> str:
    """One line: the dotted field, and the innermost message, which is what a user can act on.

    Args:
        error: What parsing or building raised.
        parser: The parser, whose name and options the advice is made of.
    """
    fields: list[str] = []
    current: BaseException | None = error
    message = ""
    while current is not None:
        message = " ".join(str(current).split())
        found = re.match(r'Parser key "([^"]+)":?\s*', message)
        if found:
            message = message[found.end() :]
            if found[1] not in fields:
                fields.append(found[1])
        if isinstance(current, ConfigError) or re.fullmatch(_UNION, message):
            break
        current = current.__cause__ or current.__context__
    field = ".".join(fields)
    return _reworded(field, message, parser) or (f"{field}: {message}" if field else message)


def _reworded(field: str, message: str, parser: Any) -> str | None:
    """Say a known message of the parser in plain words; None for an unknown one."""
    for pattern, words in _WORDS.items():
        found = re.fullmatch(pattern, message)
        if found:
            return words(field, found, parser)
    return None


def _unknown_option(_: str, found: re.Match[str], parser: Any) -> str:
    word = found[1].split()[0].partition("=")[0]
    help_ = "" if parser is None else f" {parser.prog} --help lists all."
    if not word.startswith("-"):
        recipe = f" A recipe is given by --config {word}." if word.endswith((".yaml", ".yml")) else ""
        return f"{word!r} belongs to no option.{recipe}{help_}"
    options = [] if parser is None else list(parser._option_string_actions)
    return f"There is no option {word}{_nearest(word, options)}.{help_}"


def _nearest(word: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.75)
    return f"; {near[0]} is the nearest" if near else ""


def _missing(_: str, found: re.Match[str], parser: Any) -> str:
    help_ = "" if parser is None else f" {parser.prog} --help explains them."
    return f"These are missing: {found[1]}.{help_}"


def _wrong_value(field: str, found: re.Match[str], _: Any) -> str:
    kinds = [KINDS.get(name, name) for name in re.findall(r"<class '(\w+)'>", found[1])]
    members = [word.strip(" '") for words in re.findall(r"Literal\[([^\]]*)\]", found[1]) for word in words.split(",")]
    return f"{field} is {found[2]!r}; allowed are {', '.join(dict.fromkeys(members + kinds))}."


_WORDS: dict[str, Callable[[str, re.Match[str], Any], str]] = {
    r"unrecognized arguments: (.+)": _unknown_option,
    r"argument (\S+): expected one argument": lambda _, found, __: (
        f"{found[1]} is given without a value. Give one: {found[1]}=VALUE."
    ),
    r"the following arguments are required: (.+)": _missing,
    rf"Expected a ({_TYPE})\. Got value: (.+)": _wrong_value,
    _UNION: _wrong_value,
    r"Group '(.+)' does not accept option '(.+)'": lambda _, found, parser: _unknown_field(
        f"{found[1]}.{found[2]}", parser
    ),
    r"Option '(.+)' is not accepted": lambda _, found, parser: _unknown_field(found[1], parser),
    r"Unable to load config \"(.+)\"": lambda field, found, _: (
        f"{field} is {found[1]!r}, which is no mapping. Give its fields one by one: --{field}.FIELD=VALUE."
    ),
    r"File does not exist: '(.+)'": lambda field, found, _: f"--{field} {found[1]} does not exist. Give a file.",
}


def _unknown_field(field: str, parser: Any) -> str:
    options = [] if parser is None else [option.removeprefix("--") for option in parser._option_string_actions]
    help_ = "" if parser is None else f" {parser.prog} --help lists all fields."
    return f"A recipe has no field {field}{_nearest(field, options)}.{help_}"
