"""tools/visualization/heat.py: one picture a call, or one line that says why not."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from config_models import build, load
from PIL import Image

from vheat_mm.apis.heat.command import KINDS, make_parser, run_heat
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()
pytest.importorskip('mmpretrain')
pytest.importorskip('matplotlib')
REPO = Path(__file__).parents[2]
CONFIG = REPO / 'configs' / 'demo' / 'vheat-demo_textures.py'
pytestmark = pytest.mark.usefixtures('own_scope')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('heat') / 'epoch_1.pth'
    torch.save(dict(state_dict=build(load('demo/vheat-demo_textures.py')).state_dict()), path)
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'photo.jpg'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)).save(path)
    return path


def test_every_kind_has_one_line_of_help():
    text = make_parser().format_help()
    for kind, module in KINDS.items():
        assert kind in text.split()
        assert module.__doc__.splitlines()[0].endswith('.')


def test_a_missing_library_is_named_before_any_work(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.delitem(sys.modules, 'matplotlib.figure', raising=False)
    assert run_heat(['diffusivity', 'nowhere.py']) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "error: heat.py diffusivity needs matplotlib: pip install 'vheat_mm[demo]'"
    )


def test_cam_draws_every_target_at_every_layer(checkpoint, photo, tmp_path, capfd):
    out = tmp_path / 'new' / 'cam.png'
    arguments = ['--target', 'brick', 'gravel', '--layer', 'backbone', 'backbone.layers.1.0', '--out', str(out)]
    assert run_heat(['cam', str(CONFIG), str(checkpoint), str(photo), str(photo), *arguments]) == 0
    assert Image.open(out).width == 1280
    assert [path.name for path in out.parent.iterdir()] == ['cam.png']
    said = capfd.readouterr()
    assert (said.out + said.err).count('photo.jpg: brick') == 2
    assert said.out.splitlines()[-1] == f'written: {out}'


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['cam', '{config}', '{checkpoint}', '{photo}', '--target', 'sand'], "no class 'sand'; the model has brick"),
        (['cam', '{config}', 'nowhere.pth', '{photo}', '--out', 'a.gif'], '--out a.gif: give the name of a file'),
        (['cam', '{config}', '{checkpoint}', '{photo}', '--out', '{photo}/a.png'], 'nothing can be written in'),
        (['cam', '{config}', '{checkpoint}', '{notes}'], 'notes.jpg'),
        (['predictions', '{config}', '{checkpoint}', '--number', '0'], '--number 0: give 1 to 100'),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(checkpoint, photo, tmp_path, monkeypatch, capfd, arguments, words):
    monkeypatch.chdir(tmp_path)
    notes = tmp_path / 'notes.jpg'
    notes.write_text('no image')
    before = sorted(tmp_path.iterdir())
    given = dict(config=CONFIG, checkpoint=checkpoint, photo=photo, notes=notes)
    assert run_heat([argument.format(**given) for argument in arguments]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith('error: ')
    assert re.search(words, last)
    assert sorted(tmp_path.iterdir()) == before
