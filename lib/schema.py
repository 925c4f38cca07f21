"""The shape of JSON that others may have written: a file, a line and a field are named in every refusal.

    settings = schema.read_json(path, {"total_batch_tokens": int, "run_name": str | None})
    schema.check_fields(item, {"ctx": str, "endings": list[str]}, f"{path}, line {number}")
    schema.check_format(manifest, newest=1, where=path)

A missing field is refused, unless its hint allows None or `optional` is true. More fields may be there.
"""

import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
NAMES |= {dict: "an object", list: "a list"}
UPDATE = "update this project: git pull"


class LaterVersionError(ValueError):
    """A file is whole, but this version cannot read it."""


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type: str, int, float, bool, None, list[...], dict[str, ...], a Literal, a
    union of these, or Any. A whole number is also a float; true is no number."""
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Annotated:
        return fits(value, args[0])
    if kind is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if kind in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(part, args[0]) for part in value)
    if kind is dict:
        return isinstance(value, dict) and all(fits(part, args[1]) for part in value.values())
    if hint is float:
        return type(value) in (int, float)
    return hint is Any or value is hint or type(value) is hint or (hint is type(None) and value is None)


def describe(hint: Any) -> str:
    """A type in words."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        return describe(args[0])
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(arg) for arg in args)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args if arg is not type(None))
    if typing.get_origin(hint) in (list, tuple):
        return f"a list, each element {describe(args[0])}"
    return NAMES.get(typing.get_origin(hint) or hint, "null")


def check_fields(value: Any, hints: Mapping[str, Any], where: Path | str, optional: bool = False):
    """Raises ValueError, naming the place and the field, unless value is an object whose fields fit."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: it is {shorten(value)}; it must be an object")
    for name, hint in hints.items():
        if name not in value:
            if not optional and not fits(None, hint):
                raise ValueError(f"{where}: the field {name} is missing; it must be {describe(hint)}")
        elif not fits(value[name], hint):
            raise ValueError(
                f"{where}: the field {name} is {shorten(value[name])}; it must be {describe(hint)}"
            )


def check_format(content: Mapping[str, Any], newest: int, where: Path | str):
    """Raises LaterVersionError for a file whose format has a higher number than the newest known here, and
    ValueError for a number that never was one."""
    check_fields(content, {"format": int | None}, where)
    number = content.get("format")
    if number is not None and number < 1:
        raise ValueError(f"{where}: format is {number}; formats are 1 to {newest}")
    if number is not None and number > newest:
        raise LaterVersionError(
            f"{where}: format is {number}; this code reads up to {newest}. A later version wrote it: {UPDATE}"
        )


def shorten(value: Any) -> str:
    """A value as JSON, of at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(path: Path, hints: Mapping[str, Any], optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming file and field, for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    check_fields(value, hints, path, optional)
    return value
