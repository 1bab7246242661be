"""A large JSON object read entry by entry, in the memory of one entry."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_WHITESPACE = re.compile(r'[ \t\n\r]*')
# An error this close to the end of what has been read may be a token that is not complete: \uXXXX, -Infinity, 1.5e-300.
_MAX_TOKEN = 32


class MalformedJsonError(ValueError):
    """Not a JSON object, with line and column."""


def iterate(
    path: str | Path, chunk: int = 1 << 22, parse_constant: Callable[[str], Any] | None = None
) -> Iterator[tuple[str, int | None, Any]]:
    """Read a file that holds one JSON object, such as COCO's.

    Args:
        path: The file.
        chunk: Characters that are read at once.
        parse_constant: Gives the value of ``NaN``, ``Infinity`` and ``-Infinity``, as in :func:`json.load`.

    Yields:
        For each value that is a list, its key, index and element; for any other, its key, ``None`` and the value. An
        empty list gives ``(key, None, [])``.

    Raises:
        MalformedJsonError: The file is no JSON, truncated, no object, or not UTF-8.
        OSError: It cannot be read.
    """
    with Path(path).open(encoding='utf-8') as file:
        reader = _Reader(file, chunk, parse_constant)
        try:
            yield from reader.entries()
        except UnicodeDecodeError as error:
            raise MalformedJsonError(f'after line {reader.line}: not UTF-8 ({error.reason})') from error


class _Reader:
    def __init__(self, file: IO[str], chunk: int, parse_constant: Callable[[str], Any] | None) -> None:
        self._file, self._chunk = file, chunk
        self._text, self._position, self._at_end = '', 0, False
        self._lines, self._columns = 0, 0  # dropped from the text: whole lines, and characters of the current line
        self._decode = json.JSONDecoder(parse_constant=parse_constant).raw_decode

    @property
    def line(self) -> int:
        """Number of the line that is being read."""
        return self._lines + self._text.count('\n', 0, self._position) + 1

    def entries(self) -> Iterator[tuple[str, int | None, Any]]:
        if self._peek() != '{':
            raise self._error('expected an object, {"images": ...')
        for _ in self._items('}'):
            if self._peek() != '"':
                raise self._error('expected a name in quotes')
            key = self._value()
            self._expect(':')
            if self._peek() != '[':
                yield key, None, self._value()
                continue
            index = -1
            for index, _ in enumerate(self._items(']')):
                yield key, index, self._value()
            if index < 0:
                yield key, None, []
        if self._peek():
            raise self._error('more text after the object')

    def _items(self, end: str) -> Iterator[None]:
        """Skip the opening bracket, the commas and the closing bracket; the caller reads an item at each step."""
        self._position += 1
        if self._peek() != end:
            yield
            while self._peek() == ',':
                self._position += 1
                yield
        self._expect(end, f'expected a comma or {end}')

    def _expect(self, character: str, message: str = '') -> None:
        if self._peek() != character:
            raise self._error(message or f'expected {character}')
        self._position += 1

    def _peek(self) -> str:
        """The next character that is no whitespace, '' at the end."""
        while True:
            match = _WHITESPACE.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if self._at_end:
                return ''
            self._fill()

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decode(self._text, self._position)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith('Unterminated string') or error.pos > len(self._text) - _MAX_TOKEN
                if self._at_end or not unfinished:
                    self._position = error.pos
                    raise self._error(error.msg) from None
            else:
                # The rest of a number may not be read yet, such as .25 of -8.25 or e-3 of 1e-3.
                if self._at_end or end <= len(self._text) - (3 if isinstance(value, int | float) else 0):
                    self._position = end
                    return value
            self._fill()

    def _fill(self) -> None:
        """Drop what has been used, and read at least as much as is left, so that long values take linear time."""
        dropped = self._text[: self._position]
        lines = dropped.count('\n')
        self._lines += lines
        self._columns = len(dropped) - dropped.rfind('\n') - 1 if lines else self._columns + len(dropped)
        rest = self._text[self._position :]
        new = self._file.read(max(self._chunk, len(rest)))
        self._text, self._position, self._at_end = rest + new, 0, not new

    def _error(self, message: str) -> MalformedJsonError:
        start = self._text.rfind('\n', 0, self._position)
        column = self._position - start if start >= 0 else self._columns + self._position + 1
        where = 'at the end of the file' if self._position >= len(self._text) else f'column {column}'
        return MalformedJsonError(f'line {self.line}, {where}: {message}')
