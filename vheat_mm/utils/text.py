"""Lists, shapes and errors as short text for messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_COLOUR = re.compile(r'\x1b\[[0-9;]*m')


def is_address(text: str) -> bool:
    """Whether a text is an http(s) address."""
    return re.match('https?://', text, re.IGNORECASE) is not None


def first_line(text: object, limit: int = 200) -> str:
    """The first line of a text from outside, at most ``limit`` characters, without control characters."""
    line = next(iter(str(text).strip().splitlines()), '') or type(text).__name__
    line = line if len(line) <= limit else f'{line[:limit]}...'
    return line if line.isprintable() else ascii(line)[1:-1]


def summarize_error(error: BaseException, limit: int = 160) -> str:
    """An error's type and the first line of its message, without terminal colours."""
    message = _COLOUR.sub('', str(error)).strip()
    return f'{type(error).__name__}: {first_line(message, limit)}' if message else type(error).__name__


def some_of(items: Iterable, limit: int = 8) -> str:
    """The first ``limit`` items, and how many more there are: ``'a, b and 3 more'``; ``'none'`` without items."""
    listed = list(items)
    shown = ', '.join(first_line(item) for item in listed[:limit]) or 'none'
    return shown if len(listed) <= limit else f'{shown} and {len(listed) - limit} more'


def count(number: int, noun: str) -> str:
    """``'1 image'``, ``'2 images'``."""
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'


def format_shape(shape: Sequence[int]) -> str:
    """``'56x56x96'``, or ``'scalar'`` for a shape without dimensions."""
    return 'x'.join(map(str, shape)) or 'scalar'
