"""A large JSON object read entry by entry, in the memory of one entry."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_BLANKS = re.compile(r'[ \t\n\r]*')
# Characters that a cut value may hold behind the place where its error is noticed: \uXXXX, -Infinity, 1.5e-300.
_CUT = 32


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
        MalformedJsonError: The file is no JSON, cut off, no object, or not UTF-8.
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
        self._text, self._place, self._ended = '', 0, False
        self._before, self._column = 0, 0  # lines read and dropped, characters dropped of the line that goes on
        self._decode = json.JSONDecoder(parse_constant=parse_constant).raw_decode

    @property
    def line(self) -> int:
        """Number of the line that is being read."""
        return self._before + self._text.count('\n', 0, self._place) + 1

    def entries(self) -> Iterator[tuple[str, int | None, Any]]:
        if self._next() != '{':
            raise self._wrong('expected an object, {"images": ...')
        self._place += 1
        more = self._next() != '}'
        while more:
            if self._next() != '"':
                raise self._wrong('expected a name in quotes')
            key = self._value()
            self._take(':')
            if self._next() == '[':
                yield from self._elements(key)
            else:
                yield key, None, self._value()
            more = self._goes_on('}')
        self._take('}')
        if self._next():
            raise self._wrong('more text after the object')

    def _elements(self, key: str) -> Iterator[tuple[str, int | None, Any]]:
        self._take('[')
        if self._next() == ']':
            self._place += 1
            yield key, None, []
            return
        index, more = 0, True
        while more:
            yield key, index, self._value()
            index += 1
            more = self._goes_on(']')
        self._take(']')

    def _goes_on(self, end: str) -> bool:
        """Whether a comma follows, which is passed, or the end, which is not."""
        following = self._next()
        if following == ',':
            self._place += 1
        elif following != end:
            raise self._wrong(f'expected a comma or {end}')
        return following == ','

    def _take(self, sign: str) -> None:
        if self._next() != sign:
            raise self._wrong(f'expected {sign}')
        self._place += 1

    def _next(self) -> str:
        """The next character that is no blank, '' at the end."""
        while True:
            match = _BLANKS.match(self._text, self._place)
            self._place = match.end() if match else self._place
            if self._place < len(self._text):
                return self._text[self._place]
            if self._ended:
                return ''
            self._fill()

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self._decode(self._text, self._place)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith('Unterminated string') or error.pos > len(self._text) - _CUT
                if self._ended or not cut:
                    self._place = error.pos
                    raise self._wrong(error.msg) from None
            else:
                # A number goes on with what is not read yet, such as -8 with .25 or 1 with e-3.
                if self._ended or end <= len(self._text) - (3 if isinstance(value, int | float) else 0):
                    self._place = end
                    return value
            self._fill()

    def _fill(self) -> None:
        """Drop what has been read, and read at least as much as is left, so that long values cost linear time."""
        dropped = self._text[: self._place]
        lines = dropped.count('\n')
        self._before += lines
        self._column = len(dropped) - dropped.rfind('\n') - 1 if lines else self._column + len(dropped)
        rest = self._text[self._place :]
        new = self._file.read(max(self._chunk, len(rest)))
        self._text, self._place, self._ended = rest + new, 0, not new

    def _wrong(self, message: str) -> MalformedJsonError:
        start = self._text.rfind('\n', 0, self._place)
        column = self._place - start if start >= 0 else self._column + self._place + 1
        where = 'at the end of the file' if self._place >= len(self._text) else f'column {column}'
        return MalformedJsonError(f'line {self.line}, {where}: {message}')
