"""JSON read entry by entry, compared with :mod:`json`."""

from __future__ import annotations

import json
import re

import pytest

from vheat_mm.datasets.checks import json_stream

TEXT = json.dumps(
    dict(
        info=dict(a=[1, 2.5e-3, None]),
        images=[dict(id=1, file_name='ä"\\ \n'), dict(id=20)],
        empty=[],
        numbers=[1234567, -8.25, True],
        last=-1234567,
    ),
    indent=2,
    ensure_ascii=True,
)


@pytest.mark.parametrize('chunk', [1, 2, 3, 7, 64, 10_000])
def test_streamed_json_is_the_same(tmp_path, chunk):
    (tmp_path / 'x.json').write_text(TEXT, encoding='utf-8')
    found: dict = {}
    for key, index, value in json_stream.iterate(tmp_path / 'x.json', chunk):
        if index is None:
            found[key] = value
        else:
            assert index == len(found.setdefault(key, []))
            found[key].append(value)
    assert found == json.loads(TEXT)


@pytest.mark.parametrize('chunk', [5, 10_000])
def test_streamed_json_fails_at_the_line_where_json_does(tmp_path, chunk):
    broken = [TEXT[:end] for end in range(0, len(TEXT) - 1, 3)] + [TEXT.replace(',', ' ', 4), TEXT + 'x']
    for number, text in enumerate(broken):
        path = tmp_path / f'{number}.json'
        path.write_text(text, encoding='utf-8')
        with pytest.raises(json.JSONDecodeError) as theirs:
            json.loads(text)
        with pytest.raises(json_stream.MalformedJsonError) as ours:
            list(json_stream.iterate(path, chunk))
        line = int(re.match(r'line (\d+)', str(ours.value))[1])
        assert abs(line - theirs.value.lineno) <= 1, text
