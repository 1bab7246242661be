"""Checkpoints in several files: read like one, and nothing outside of the index's folder is."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.runner import load_checkpoint
from safetensors.torch import save_file
from torch import nn

import interpolate4downstream
from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.engine import fileio
from vheat_mm.utils.errors import CheckpointError

INDEX = 'model.safetensors.index.json'


def write_shards(folder: Path, state: dict, count: int = 3, suffix: str = '.safetensors') -> dict[str, str]:
    """Write ``state`` as transformers' save_pretrained does; returns the map of the index."""
    folder.mkdir(exist_ok=True)
    stem, places = {'.safetensors': 'model', '.bin': 'pytorch_model'}[suffix], {}
    for shard in range(count):
        name = f'{stem}-{shard + 1:05d}-of-{count:05d}{suffix}'
        part = {key: state[key] for key in list(state)[shard::count]}
        torch.save(part, folder / name) if suffix == '.bin' else save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    write_index(folder, places, f'{stem}{suffix}.index.json')
    return places


def write_index(folder: Path, places: object, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=places)))


@pytest.fixture
def state(make_vheat) -> dict[str, torch.Tensor]:
    return {key: torch.randn_like(value) for key, value in make_vheat().state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize('suffix', ['.safetensors', '.bin'])
@pytest.mark.parametrize('count', [1, 3])
def test_read_like_one_file(tmp_path, state, suffix, count):
    write_shards(tmp_path, state, count, suffix)
    (index,) = tmp_path.glob('*.index.json')
    assert same(read_checkpoint(index), state)
    assert same(read_checkpoint(tmp_path), state)
    only = next(tmp_path.glob(f'*-00001-of-*{suffix}'))
    if count == 1:
        assert same(read_checkpoint(only), state)
        return
    with pytest.raises(CheckpointError, match=f"is one of 3 shards of a checkpoint: give '.*{re.escape(index.name)}'"):
        read_checkpoint(only)
    index.unlink()
    with pytest.raises(CheckpointError, match=f"copy the others and '{re.escape(index.name)}' beside it"):
        read_checkpoint(only)


def test_folder_of_a_single_file(tmp_path, state, monkeypatch):
    (tmp_path / 'config.json').write_text('{}')
    torch.save(dict(state_dict=state), tmp_path / 'pytorch_model.bin')
    assert read_checkpoint(tmp_path).keys() == {'state_dict'}
    save_file(state, tmp_path / 'model.safetensors')
    said: list[str] = []
    monkeypatch.setattr('vheat_mm.checkpoint.sharded.print_log', lambda text, logger: said.append(text))
    assert same(read_checkpoint(tmp_path), state)
    assert said[0].endswith('holds model.safetensors and pytorch_model.bin: model.safetensors is read')


def test_everywhere_that_a_path_goes(tmp_path, make_vheat, state):
    write_shards(tmp_path / 'sharded', state)
    model = make_vheat(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'sharded')))
    model.init_weights()
    assert same(dict(model.state_dict()), state)

    sizes = ('--pt_size', '64', '--tg_size', '128')
    tool = ('--pt_pth', str(tmp_path / 'sharded' / INDEX), '--tg_pth', str(tmp_path / 'out.pth'), *sizes)
    assert interpolate4downstream.main([*tool]) == 0
    assert read_checkpoint(tmp_path / 'out.pth')['model']['freq_embed.0'].shape[:2] == (32, 32)

    for file in sorted((tmp_path / 'sharded').iterdir()):  # none that is read is written
        before = file.read_bytes()
        assert interpolate4downstream.main([*tool, '--tg_pth', str(file)]) == 2
        assert file.read_bytes() == before

    # load_from, --resume and tools/test.py read through MMEngine's loader, which the tools replace.
    fileio.install()
    whole = nn.ModuleDict({'backbone': make_vheat()})
    write_shards(tmp_path / 'whole', {f'backbone.{key}': value for key, value in state.items()})
    load_checkpoint(whole, str(tmp_path / 'whole'), strict=True)
    assert same(dict(whole['backbone'].state_dict()), state)


def test_cache_of_the_hub(tmp_path, state):
    """huggingface_hub keeps files as blobs, and the names of a commit as links to them."""
    write_shards(tmp_path / 'blobs', state)
    commit = tmp_path / 'snapshots' / '0123abc'
    commit.mkdir(parents=True)
    for number, file in enumerate(list((tmp_path / 'blobs').iterdir())):
        file.rename(tmp_path / 'blobs' / str(number))
        (commit / file.name).symlink_to(Path('..', '..', 'blobs', str(number)))
    assert same(read_checkpoint(commit), state)
    assert same(read_checkpoint(commit / INDEX), state)


def swap(shard: str) -> Callable:
    """An index that names ``shard`` for all tensors."""
    return lambda folder, places: write_index(folder, dict.fromkeys(places, shard))


def add_to_first_shard(folder: Path, places: dict, key: str) -> None:
    name = places['patch_embed.conv1.weight']
    part = read_checkpoint_of_shard(folder / name)
    save_file(part | {key: torch.ones(2)}, folder / name)


def read_checkpoint_of_shard(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: value.clone() for key, value in load_file(file).items()}


def outside(shard: str) -> Callable:
    """An index that names a whole file beside its folder."""

    def write(folder: Path, places: dict) -> None:
        (folder.parent / 'out.safetensors').write_bytes((folder / next(iter(places.values()))).read_bytes())
        swap(shard.format(parent=folder.parent))(folder, places)

    return write


def link_out(folder: Path, places: dict) -> None:
    name = next(iter(places.values()))
    (folder / name).rename(folder.parent / 'elsewhere.safetensors')
    (folder / name).symlink_to(folder.parent / 'elsewhere.safetensors')


def circle(folder: Path, places: dict) -> None:
    name = next(iter(places.values()))
    (folder / name).unlink()
    (folder / name).symlink_to(name)


BAD = {
    'missing shard': (lambda f, p: (f / 'model-00002-of-00003.safetensors').unlink(), "'model-00002-of-.*no file"),
    'truncated shard': (
        lambda f, p: os.truncate(f / 'model-00002-of-00003.safetensors', 900),
        '00002-of.*corrupt',
    ),
    'parent': (outside('../out.safetensors'), "'../out.safetensors', which is '/.*/out.safetensors' outside"),
    'absolute': (outside('{parent}/out.safetensors'), 'outside of its folder'),
    'device': (swap('/dev/zero'), "'/dev/zero'.*no file beside it"),
    'windows': (swap('C:\\x.safetensors'), 'no file beside it'),
    'dots': (swap('..'), 'no file beside it'),
    'nothing': (swap(''), 'no file beside it'),
    'zero byte': (swap('a\0b'), 'x00b.*no file beside it'),
    'long': (swap('a' * 5000), 'no file beside it'),
    'itself': (swap(INDEX), 'corrupt'),
    'folder': (lambda f, p: ((f / 'sub').mkdir(), swap('sub')(f, p)), "'sub', no file"),
    'pipe': (lambda f, p: (os.mkfifo(f / 'pipe'), swap('pipe')(f, p)), "'pipe', no file"),
    'link': (link_out, "which is '.*elsewhere.safetensors' outside of its folder"),
    'circle': (circle, 'no file beside it'),
    'lacking': (
        lambda f, p: write_index(f, p | {'more': p['layers.0.0.norm1.bias']}),
        'missing in it are more;',
    ),
    'unnamed': (lambda f, p: add_to_first_shard(f, p, 'more'), 'of another shard or of none are more[.]'),
    'in two': (
        lambda f, p: add_to_first_shard(f, p, next(key for key in p if p[key] != p['patch_embed.conv1.weight'])),
        'missing in it are none; of another shard or of none are',
    ),
    'no shards': (lambda f, p: write_index(f, {}), 'does not give a file for each tensor'),
    'numbers': (lambda f, p: write_index(f, dict.fromkeys(p, 3)), 'does not give a file for each tensor'),
    'list': (lambda f, p: write_index(f, list(p)), 'does not give a file for each tensor'),
    'no map': (lambda f, p: (f / INDEX).write_text('[]'), 'does not give a file for each tensor'),
    'cut': (lambda f, p: os.truncate(f / INDEX, 60), 'is no index of shards: .*Copy it again'),
    'empty': (lambda f, p: os.truncate(f / INDEX, 0), 'is no index of shards'),
    'deep': (lambda f, p: (f / INDEX).write_text('[' * 200_000), 'is no index of shards'),
    'bytes': (lambda f, p: (f / INDEX).write_bytes(b'\xff\xfe\x00\xd8'), 'is no index of shards'),
    'large': (lambda f, p: os.truncate(f / INDEX, 1 << 30), 'a file of 1073741824 bytes, more than 4194304'),
    'index is a pipe': (lambda f, p: ((f / INDEX).unlink(), os.mkfifo(f / INDEX)), 'a named pipe, expected a regular'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_files_are_one_clear_line(tmp_path, state, case):
    break_it, words = BAD[case]
    break_it(tmp_path / 'x', write_shards(tmp_path / 'x', state))
    with pytest.raises(CheckpointError, match=words) as error:
        read_checkpoint(tmp_path / 'x' / INDEX)
    assert '\n' not in str(error.value)
    assert str(tmp_path / 'x') in str(error.value)


@pytest.mark.parametrize('name', [f'{INDEX}?download=true', 'model-00001-of-00002.safetensors'])
def test_addresses_are_refused_before_anything_is_downloaded(monkeypatch, name):
    monkeypatch.setattr('vheat_mm.checkpoint.cache._download', None)
    with pytest.raises(CheckpointError, match=r'several files, which are not downloaded: .*--local-dir FOLDER'):
        read_checkpoint(f'http://127.0.0.1:1/repo/{name}')
