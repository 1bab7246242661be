"""``--cfg-options``, and places in a config."""

from __future__ import annotations

import argparse
import sys

import pytest
import torch
from mmengine.config import Config
from torch import nn

from vheat_mm.apis.cfg_options import CfgOptionsAction, check_keys
from vheat_mm.utils.config_place import explain, locate
from vheat_mm.utils.errors import ToolError


def parse(text: str) -> object:
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptionsAction)
    return parser.parse_args(['--cfg-options', f'a={text}']).cfg_options['a']


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ("dict(type='Foo',x=1,y=[1,(2,3)])", dict(type='Foo', x=1, y=[1, (2, 3)])),
        ("{'x': -1.5, 'y': dict()}", dict(x=-1.5, y={})),
        ('[dict(type=Foo),dict(on=true)]', [dict(type='Foo'), dict(on=True)]),
        ('[(1,2),(a,b)]', [(1, 2), ('a', 'b')]),  # as MMEngine reads them
        ('epoch_{}.pth', 'epoch_{}.pth'),
        ("O'Brien", "O'Brien"),
        ('None', None),
    ],
)
def test_values(text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ('text', 'word'),
    [
        ('dict(x=1', 'brackets'),
        ('[1,2', 'brackets'),
        ("'abc", 'quote'),
        ('dict(x)', "dict(type='Foo',x=1)"),
        ('{1: 2}', "dict(type='Foo',x=1)"),
        ('f(1,2)', "dict(type='Foo',x=1)"),
        ("dict(x=__import__('os'))", "dict(type='Foo',x=1)"),
    ],
)
def test_values_that_cannot_be_read(capsys, monkeypatch, text, word):
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    with pytest.raises(SystemExit, match='2'):
        parse(text)
    last = capsys.readouterr().err.splitlines()[-1]
    assert text in last
    assert word in last


CONFIG = Config(
    dict(
        model=dict(type='A', backbone=dict(type='B', depth=1), heads=[dict(type='C', x=1), dict(type='C', x=2)]),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        steps=[1],
    )
)


@pytest.mark.parametrize(
    ('key', 'words'),
    [
        ('optim_wraper.optimizer.lr', ["'optim_wraper'", "did you mean 'optim_wrapper'"]),
        ('lod_from', ["did you mean 'load_from'"]),
        ('model.heads.2.x', ['model.heads is a list of 2']),
        ('model.heads.x', ['model.heads is a list of 2', 'model.heads.0']),
        ('model.backbone.depth.x', ['model.backbone.depth is 1']),
    ],
)
def test_keys_that_lead_nowhere(key, words):
    with pytest.raises(ToolError) as caught:
        check_keys(CONFIG, {key: 1})
    for word in (f'--cfg-options {key}: ', *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ('key', 'text'),
    [
        ('model.backbone.dept', "'dept' is a new entry, did you mean 'depth'?"),
        ('steps.0', 'steps is a variable of the config file'),
        ('model.backbone.with_cp', ''),
        ('load_from', ''),
        ('model.heads.1.x', ''),
        ('randomness.seed', ''),
    ],
)
def test_new_keys_are_mentioned_where_they_resemble_others(capsys, key, text):
    check_keys(CONFIG, {key: 1})
    errors = capsys.readouterr().err
    assert text in errors
    assert bool(errors) == bool(text)


@pytest.mark.parametrize(
    ('part', 'place'),
    [
        (dict(type='C', x=2), 'model.heads.1'),
        (dict(type='B', depth=1, train_cfg=None, img_size=3), 'model.backbone'),  # the libraries add entries
        (dict(lr=0.1, type='SGD', params=[1, 2]), 'optim_wrapper.optimizer'),
        (dict(type='D', x=2), ''),
        ({}, ''),
    ],
)
def test_locate(part, place):
    assert locate(CONFIG, part) == place


def build(part: object, _seed: int = 0) -> None:
    raise AssertionError('wrong')


class HalfBuilt(nn.Module):
    def __init__(self) -> None:
        raise AssertionError('wrong')


def build_all(model: object, optim_wrapper: object) -> None:
    raise AssertionError('wrong')


@pytest.mark.parametrize(
    ('fail', 'place'),
    [
        (lambda cfg: build(dict(cfg.optim_wrapper)), 'optim_wrapper'),
        (lambda cfg: build([dict(part) for part in cfg.model.heads]), 'model.heads'),
        (lambda cfg: build(dict(type='SGD')), ''),
        (lambda cfg: build_all(cfg.model, cfg.optim_wrapper), ''),
        (lambda _: HalfBuilt(), ''),
        (lambda cfg: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(4, 1))(torch.ones(1, 2)), 'model.2'),
    ],
)
def test_place_of_an_error(fail, place):
    """The argument of the function that fails, if it is one part of the config; or the layer of a model."""
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        fail(CONFIG)
    found, message = explain(caught.value)
    assert found == place
    assert ('mat1 and mat2 shapes' in message and 'Linear(in_features=4' in message) == place.startswith('model.2')
