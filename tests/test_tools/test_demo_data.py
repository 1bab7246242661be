"""The demo's data: exact masks, two layouts that agree, disjoint splits, all or nothing."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

pytest.importorskip('skimage')
mask_api = pytest.importorskip('pycocotools.mask')

SCRIPT = Path(__file__).parents[2] / 'demo' / 'make_demo_data.py'
spec = importlib.util.spec_from_file_location('make_demo_data', SCRIPT)
demo_data = importlib.util.module_from_spec(spec)
sys.modules['make_demo_data'] = demo_data
spec.loader.exec_module(demo_data)

SMALL = dict(num_train=3, num_val=2, size=128)


def files_of(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('demo') / 'coins'
    assert demo_data.make_demo_data(root, **SMALL)
    return root


@pytest.mark.parametrize('split', ['train', 'val'])
def test_instance_and_semantic_masks_agree(made, split):
    content = json.loads((made / 'coco/annotations' / f'instances_{split}.json').read_text())
    assert len(content['images']) == SMALL[f'num_{split}']
    for image in content['images']:
        stem = Path(image['file_name']).stem
        layout = demo_data.SPLITS[split]
        pixels = (made / 'coco' / split / image['file_name']).read_bytes()
        assert pixels == (made / 'ade/images' / layout / f'{stem}.jpg').read_bytes()
        labels = np.array(Image.open(made / 'ade/annotations' / layout / f'{stem}.png'))
        assert labels.shape == (128, 128)
        assert set(np.unique(labels)) <= {0, 1, 2, 3, 4}

        times_covered = np.zeros(labels.shape, dtype=int)
        own = [a for a in content['annotations'] if a['image_id'] == image['id']]
        assert own
        for annotation in own:
            mask = mask_api.decode(annotation['segmentation'])
            y, x = np.nonzero(mask)
            assert annotation['area'] == mask.sum() > 0
            assert annotation['bbox'] == [
                x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1,
            ]  # fmt: skip
            times_covered += mask
        # What is hidden belongs to the coin on top alone, and every coin pixel to one instance.
        np.testing.assert_array_equal(times_covered, labels == demo_data.COIN_LABEL)


def test_classes_are_folders_of_images_with_one_texture(made):
    for split, num in (('train', 3), ('val', 2)):
        folders = {path.stem: path.parent.name for path in (made / 'textures' / split).rglob('*.jpg')}
        assert folders == {f'{split}_{i:05d}': demo_data.TEXTURES[i % 3] for i in range(1, num + 1)}
    cfg = Config.fromfile(SCRIPT.parents[1] / 'configs' / 'demo' / 'vheat-demo_textures.py')
    assert cfg.classes == demo_data.TEXTURES

    coins, textures = demo_data.segment_coins(), demo_data.textures_of('train')[1:2]
    for seed in range(8):
        labels = demo_data.compose(coins, textures, 256, np.random.default_rng(seed)).labels
        assert set(np.unique(labels)) == {1, demo_data.COIN_LABEL}  # never a border to another texture


def test_splits_share_no_coin_and_no_texture_pixel():
    coins = demo_data.segment_coins()
    train, val = (demo_data.coins_of(split, coins) for split in ('train', 'val'))
    assert (len(train), len(val)) == (18, 6)
    assert not {id(coin) for coin in train} & {id(coin) for coin in val}
    for name, left, right in zip(
        demo_data.TEXTURES,
        demo_data.textures_of('train'),
        demo_data.textures_of('val'),
        strict=True,
    ):
        whole = getattr(demo_data.data, name)().astype(np.float32) / 255
        np.testing.assert_array_equal(np.hstack([left, right]), whole)


def test_later_coins_hide_earlier_ones_but_never_most_of_one():
    coins, textures = demo_data.segment_coins(), demo_data.textures_of('train')
    hidden = 0
    for seed in range(8):
        scene = demo_data.compose(coins, textures, 256, np.random.default_rng(seed))
        for mask in scene.masks:
            # An uncovered coin is nearly convex: it fills its box as an ellipse does.
            y, x = np.nonzero(mask)
            hidden += mask.sum() < 0.6 * (np.ptp(y) + 1) * (np.ptp(x) + 1)
            assert mask.sum() > 0.4 * np.pi / 4 * (37 * 0.7) ** 2 * 0.75
    assert hidden


def test_same_seed_same_files(made, tmp_path):
    demo_data.make_demo_data(tmp_path / 'again', **SMALL)
    assert files_of(tmp_path / 'again') == files_of(made)
    demo_data.make_demo_data(tmp_path / 'other', **SMALL, seed=1)
    name = Path('coco/train/train_00001.jpg')
    assert files_of(tmp_path / 'other')[name] != files_of(made)[name]


def test_existing_folders(tmp_path):
    out = tmp_path / 'coins'
    settings = dict(num_train=1, num_val=1, size=64)
    assert demo_data.make_demo_data(out, **settings)
    assert not demo_data.make_demo_data(out, **settings)  # already there
    assert demo_data.make_demo_data(out, **{**settings, 'num_val': 2})  # ours: replaced
    assert len(list((out / 'coco/val').iterdir())) == 2

    foreign = tmp_path / 'mine'
    foreign.mkdir()
    (foreign / 'thesis.txt').write_text('irreplaceable')
    with pytest.raises(demo_data.DemoDataError, match='not made by this tool'):
        demo_data.make_demo_data(foreign, **settings)
    assert files_of(foreign) == {Path('thesis.txt'): b'irreplaceable'}


def test_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / 'coins'
    demo_data.make_demo_data(out, num_train=1, num_val=1, size=64)
    before = files_of(tmp_path)
    write_split = demo_data.write_split

    def interrupt(root, split, *args):
        if split == 'val':
            raise KeyboardInterrupt
        write_split(root, split, *args)

    monkeypatch.setattr(demo_data, 'write_split', interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_data.make_demo_data(out, num_train=2, num_val=1, size=64)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize('arguments', [['--size', '32'], ['--num-val', '0'], ['--seed', '-1'], ['--out', __file__]])
def test_bad_arguments_end_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    base = ['make_demo_data.py', '--out', str(tmp_path / 'out')]
    monkeypatch.setattr(sys, 'argv', base + arguments)
    assert demo_data.main() == 1
    message = capsys.readouterr().err
    assert message.count('\n') == 1
    assert all(word in message for word in arguments)
    assert not list(tmp_path.iterdir())
