"""tools/visualization/heat.py: one picture a call, or one line that says why not."""

import json
import re
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


def test_cam_draws_every_target_at_every_layer(checkpoint, photo, tmp_path, capfd):
    out = tmp_path / 'new' / 'cam.png'
    arguments = ['--target', 'brick', 'gravel', '--layer', 'backbone', 'backbone.layers.1.0', '--out', str(out)]
    assert run_heat(['cam', str(CONFIG), str(checkpoint), str(photo), str(photo), *arguments]) == 0
    assert Image.open(out).width == 1280
    assert [path.name for path in out.parent.iterdir()] == ['cam.png']
    said = capfd.readouterr()
    assert (said.out + said.err).count('photo.jpg: brick') == 2


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['cam', '{config}', '{checkpoint}', '{photo}', '--target', 'sand'], "no class 'sand'; the model has brick"),
        (['cam', '{config}', '{checkpoint}', '{photo}', '--out', 'a.gif'], '--out a.gif: give the name of a file'),
        (['cam', '{config}', '{checkpoint}', '{notes}'], 'notes.jpg'),
        (['predictions', '{config}'], 'give CONFIG CHECKPOINT, or a predictions.json'),
        (['predictions', '{config}', '{checkpoint}', '--ann-file', 'a.json'], 'belong to a predictions.json'),
        (['predictions', '{notes}', '--ann-file', '{notes}', '--image-dir', '.'], 'notes.jpg.* is no JSON'),
        (['predictions', '{config}', '{checkpoint}', '--number', '0'], '--number 0: give 1 or more'),
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


def test_predictions_from_files(photo, tmp_path):
    content = dict(
        images=[dict(id=1, file_name='photo.jpg', width=128, height=96)],
        categories=[dict(id=7, name='thing')],
        annotations=[dict(id=1, image_id=1, category_id=7, bbox=[8, 8, 40, 40], area=1600, iscrowd=0)],
    )
    (tmp_path / 'ann.json').write_text(json.dumps(content))
    content['annotations'][0] |= dict(score=0.8)
    (tmp_path / 'found.json').write_text(json.dumps(content['annotations']))  # COCO's format of results
    files = ['--ann-file', str(tmp_path / 'ann.json'), '--image-dir', str(tmp_path)]
    pytest.importorskip('supervision')
    pytest.importorskip('pycocotools')
    assert run_heat(['predictions', str(tmp_path / 'found.json'), *files, '--out', str(tmp_path / 'worst.png')]) == 0
    assert Image.open(tmp_path / 'worst.png').width == 1280
