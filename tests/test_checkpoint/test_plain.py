"""What the loader would refuse is converted before it is saved, or found with its place."""

import collections
import datetime
import enum
import pathlib

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from vheat_mm.checkpoint import pickle_inspector, pickle_rules, plain
from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.checkpoint.plain import drop_functions, find_refused, to_plain

Point = collections.namedtuple('Point', 'x y')
Colour = enum.Enum('Colour', dict(RED='red'))


class Named(torch.nn.Module):
    def get_extra_state(self):
        return ConfigDict(a=1)


CONVERTED = [
    (ConfigDict(a=[ConfigDict(b=1)]), dict(a=[dict(b=1)])),
    (collections.defaultdict(list, a=[1]), dict(a=[1])),
    ({np.int64(3): pathlib.PurePosixPath('a/b'), Colour.RED: Colour.RED}, {3: 'a/b', 'red': 'red'}),
    ((Point(1, 2), frozenset(['a']), range(2), np.str_('a')), ((1, 2), {'a'}, [0, 1], 'a')),
    ([np.array(['a', 'b']), np.array([1, 'a'], dtype=object), np.array([1], dtype='>i4')], [['a', 'b'], [1, 'a'], [1]]),
]


@pytest.mark.parametrize(('value', 'expected'), CONVERTED)
def test_converted_to_what_the_loader_reads(tmp_path, value, expected):
    converted = to_plain(value)
    assert converted == expected
    assert find_refused(converted) is None
    torch.save(dict(value=converted), tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth')['value'] == expected


def test_plain_values_are_not_copied():
    state = Named().state_dict()
    converted = to_plain(state)
    assert converted._metadata == state._metadata
    assert type(converted['_extra_state']) is dict
    value = dict(a=[1, (2.0, b'c')], b=b'', c={1, None}, d=np.ones(2), e=torch.ones(2), f=HistoryBuffer())
    assert to_plain(value) is value
    assert find_refused(value) is None


REFUSED = [
    (dict(meta=dict(palette=[1, 2, 3, print])), 'meta.palette[3]', 'a function'),
    (dict(a=[collections.OrderedDict(b=lambda: 0)]), 'a[0].b', 'a function'),
    (dict(a=datetime.datetime(2026, 1, 1)), 'a', 'datetime.datetime'),
    (dict(a=dict(b={(1, 2): 3})), 'a.b', 'keys are neither strings nor small integers'),
    (dict(a=dict(b={1 << 33: 3})), 'a.b', 'keys are neither strings nor small integers'),
    (dict(a=torch.ones(2).to_sparse()), 'a', 'torch.Tensor'),
    (dict(a=pathlib.Path), 'a', 'type'),
]


@pytest.mark.parametrize(('value', 'place', 'reason'), REFUSED)
def test_the_place_of_what_the_loader_refuses(value, place, reason):
    found = find_refused(to_plain(value))
    assert found[0] == place
    assert reason in found[1]


def test_tensors_that_the_loader_would_refuse(tmp_path, monkeypatch):
    monkeypatch.setattr(plain, '_MOST_EXPANDED', 0)
    monkeypatch.setattr(pickle_rules, 'SPARE_BYTES', 0)
    values = torch.tensor([1 + 2j, 3 - 1j])
    state = dict(a=values.conj(), b=values.conj().imag, c=torch.ones(1).expand(1000, 10))
    torch.save(to_plain(state), tmp_path / 'a.pth')
    torch.testing.assert_close(read_checkpoint(tmp_path / 'a.pth'), state)


def test_functions_of_schedulers_are_dropped():
    assert drop_functions(dict(anneal=[].append, kind=int, step=3, text='a')) == dict(step=3, text='a')


def test_as_many_opcodes_as_the_file_is_large(tmp_path, monkeypatch):
    """90 000 class names with colours have 800 000 opcodes in 3 MB; 9000 and a tenth of the limit take less time."""
    monkeypatch.setattr(pickle_inspector, 'MAX_OPCODES', 50_000)
    names = dict(classes=[f'class {i}' for i in range(9000)], palette=[(i % 256, 1, 2) for i in range(9000)])
    assert find_refused(names) is None
    monkeypatch.setattr(pickle_inspector, 'MOST_OPCODES', 50_000)
    assert 'more than 50000' in find_refused(names)[1]
