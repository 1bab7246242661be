"""Texts for messages."""

from __future__ import annotations


def printable(text: object, limit: int = 200) -> str:
    """The first line of a text from outside, without characters that could steer a terminal."""
    line = next(iter(str(text).strip().splitlines()), '') or type(text).__name__
    line = line if len(line) <= limit else f'{line[:limit]}...'
    return line if line.isprintable() else ascii(line)[1:-1]


def some_of(keys: list, limit: int = 8) -> str:
    """The first of some names, and how many more there are, for messages."""
    shown = ', '.join(printable(key) for key in keys[:limit]) or 'none'
    return shown if len(keys) <= limit else f'{shown} and {len(keys) - limit} more'
