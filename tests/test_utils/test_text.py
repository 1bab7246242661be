"""Text for messages."""

import pytest

from vheat_mm.utils.text import first_line, format_shape, some_of, summarize_error


@pytest.mark.parametrize(
    ('text', 'line'),
    [
        ('one\ntwo', 'one'),
        ('x' * 300, 'x' * 200 + '...'),
        ('\x1b]0;title\x07', r'\x1b]0;title\x07'),
        (ValueError(), 'ValueError'),
    ],
)
def test_first_line(text, line):
    assert first_line(text) == line


def test_some_of():
    assert some_of([]) == 'none'
    assert some_of(range(3)) == '0, 1, 2'
    assert some_of({'a': 1, 'b\n': 2, 'c': 3}, limit=2) == 'a, b and 1 more'


def test_format_shape():
    assert (format_shape((56, 56, 96)), format_shape(())) == ('56x56x96', 'scalar')


def test_summarize_error():
    assert summarize_error(OSError('\x1b[31mred\x1b[0m\nmore')) == 'OSError: red'
    assert summarize_error(KeyboardInterrupt()) == 'KeyboardInterrupt'
