"""A JSON file that names the place of whatever is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from vheat_mm.utils.files import read_regular

_DEPTH = 200  # levels; COCO's has seven
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
_LONG_NUMBER = re.compile(r'\d{4301,}')  # Python refuses to convert them


class MalformedJsonError(ValueError):
    """Not a JSON object, with line and column."""


def read_object(path: str, reduce: Callable[[list[tuple[str, Any]]], Any]) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        reduce: Gives the value of each object, from its keys and values, as soon as it has been read. What it drops
            takes no memory. Its result for the outermost object is a dict.

    Raises:
        MalformedJsonError: The file is no JSON, truncated, no object, nested too deeply, or not UTF-8.
        OSError: It cannot be read, or is no regular file.
    """
    content = read_regular(path)
    try:
        text = content.decode('utf-8')
    except UnicodeDecodeError as error:
        line = content.count(b'\n', 0, error.start) + 1
        raise MalformedJsonError(f'line {line}: not UTF-8 ({error.reason} 0x{content[error.start]:02x})') from error
    del content
    if text.startswith('\ufeff'):
        raise MalformedJsonError('line 1, column 1: a byte order mark; save the file as UTF-8 without it')
    try:
        found = json.loads(text, object_pairs_hook=reduce)
    except json.JSONDecodeError as error:
        raise _error(text, error.pos, error.msg if error.pos else f'expected an object, found {text[:40]!r}') from error
    except RecursionError as error:
        raise _error(text, _find_depth(text), f'nested more than {_DEPTH} levels deep') from error
    except ValueError as error:  # of int()
        match = _LONG_NUMBER.search(text)
        place = match.start() if match else 0
        raise _error(text, place, f'a number of {len(match[0]) if match else "too many"} digits') from error
    if not isinstance(found, dict):
        raise _error(text, 0, f'expected an object, found {text[:40]!r}')
    return found


def _find_depth(text: str) -> int:
    """Where the brackets are nested too deeply."""
    depth = 0
    for match in _TOKENS.finditer(text):
        depth += (match[0] in '[{') - (match[0] in ']}')
        if depth > _DEPTH:
            return match.start()
    return 0


def _error(text: str, place: int, message: str) -> MalformedJsonError:
    line, column = text.count('\n', 0, place) + 1, place - text.rfind('\n', 0, place)
    where = 'at the end of the file' if place >= len(text) else f'column {column}'
    return MalformedJsonError(f'line {line}, {where}: {message}')
