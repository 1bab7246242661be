"""Keys with any prefix, corrupt content, downloads, and targets that must not be replaced."""

import functools
import http.server
import os
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
from mmengine.runner import load_checkpoint
from torch import nn

from vheat_mm.checkpoint.io import read_checkpoint, save_atomically
from vheat_mm.models.find_weights import find_weights
from vheat_mm.models.weights import load_pretrained
from vheat_mm.ops.freq_embed import resize_freq_embed
from vheat_mm.utils.errors import CheckpointError


@pytest.fixture
def backbone(make_vheat) -> dict[str, torch.Tensor]:
    return {key: torch.randn_like(value) for key, value in make_vheat().state_dict().items()}


@pytest.mark.parametrize(
    ('wrapper', 'inner'),
    [
        ('', 'backbone.'),
        ('module.', 'backbone.'),
        ('_orig_mod.', 'backbone.'),
        ('module._orig_mod.', 'backbone.'),
        ('', 'backbone._orig_mod.'),
        ('student.', 'backbone.'),
    ],
)
def test_prefixes_are_removed_from_backbone_and_head(backbone, wrapper, inner):
    head = {'head.fc.weight': torch.ones(5, 32), 'head.fc.bias': torch.ones(5)}
    state = {f'{wrapper}{inner}{key}': value for key, value in backbone.items()}
    state |= {f'{wrapper}{key}': value for key, value in head.items()}
    found = find_weights(dict(state_dict=state))
    assert found.prefix == wrapper + inner
    assert found.head.keys() == head.keys()
    assert found.to_mmengine().keys() == {f'backbone.{key}' for key in backbone} | head.keys()


def test_prefix_ends_at_a_dot(backbone):
    state = {f'mybackbone.{key}': value for key, value in backbone.items()} | {'myhead.weight': torch.ones(2)}
    assert list(find_weights(state).head) == ['myhead.weight']


def test_average_without_weights(backbone):
    with pytest.raises(CheckpointError, match=r'no moving average.*ema_state_dict'):
        find_weights(dict(ema_state_dict=backbone), ema=True)


@pytest.mark.parametrize('shape', [(), (256,), (16, 16), (1, 16, 16, 4)])
def test_embeddings_of_wrong_shape(make_vheat, backbone, tmp_path, shape):
    torch.save(backbone | {'freq_embed.0': torch.zeros(shape)}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'freq_embed.0 has shape \(.*\) instead of \(H, W, C\)'):
        load_pretrained(make_vheat(), tmp_path / 'x.pth')


def test_missing_stem_is_named(make_vheat, backbone, tmp_path):
    del backbone['patch_embed.conv2.weight']
    torch.save(backbone, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'missing: patch_embed.conv2.weight;'):
        load_pretrained(make_vheat(), tmp_path / 'x.pth')


@pytest.mark.parametrize('size', [32, 128])
def test_mmengine_loads_other_grids(make_vheat, backbone, tmp_path, size):
    """``load_from`` and ``init_detector`` use MMEngine's own loader; the grid is padded and cropped there too."""
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in backbone.items()}), tmp_path / 'x.pth')
    detector = nn.ModuleDict({'backbone': make_vheat(img_size=size)})
    load_checkpoint(detector, str(tmp_path / 'x.pth'), strict=True)
    for i, embed in enumerate(detector['backbone'].freq_embed):
        expected = resize_freq_embed(backbone[f'freq_embed.{i}'], embed.shape[:2], 'pad')
        assert torch.equal(embed, expected)


def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / 'device')
    (tmp_path / 'folder').mkdir()
    for name in ('device', 'folder'):
        with pytest.raises(CheckpointError, match=f'{name}.*name a file'):
            save_atomically({'x': torch.ones(2)}, tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / 'device').stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['device', 'folder']


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    (tmp_path / 'there.safetensors').write_bytes(b'anything')
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        read_checkpoint(tmp_path / 'there.safetensors')
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        save_atomically({'x': torch.ones(2)}, tmp_path / 'new.safetensors')
    assert [path.name for path in tmp_path.iterdir()] == ['there.safetensors']


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A local web server: its folder and its URL; and an empty hub cache."""
    (tmp_path / 'site').mkdir()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Quiet, directory=str(tmp_path / 'site'))
    )
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield tmp_path / 'site', f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_url(site, make_vheat, backbone):
    folder, address = site
    torch.save(dict(model=backbone), folder / 'x.pth')
    model = make_vheat(init_cfg=dict(type='Pretrained', checkpoint=f'{address}/x.pth?download=1'))
    model.init_weights()
    assert torch.equal(model.freq_embed[0], backbone['freq_embed.0'])
    (folder / 'x.pth').unlink()
    assert 'model' in read_checkpoint(f'{address}/x.pth')  # from the cache
    with pytest.raises(CheckpointError, match=r'could not download.*nothing.pth.*404'):
        read_checkpoint(f'{address}/nothing.pth')


@pytest.mark.parametrize(('local_rank', 'downloads'), [('0', True), ('1', False)])
def test_first_process_of_each_machine_downloads(site, backbone, monkeypatch, local_rank, downloads):
    folder, address = site
    torch.save(dict(model=backbone), folder / 'x.pth')
    monkeypatch.setattr('vheat_mm.checkpoint.io.get_dist_info', lambda: (8 + int(local_rank), 16))
    monkeypatch.setattr('vheat_mm.checkpoint.io.barrier', lambda: None)
    monkeypatch.setenv('LOCAL_RANK', local_rank)
    if downloads:
        assert 'model' in read_checkpoint(f'{address}/x.pth')
    else:
        with pytest.raises(CheckpointError, match='no checkpoint at'):
            read_checkpoint(f'{address}/x.pth')
    assert (Path(torch.hub.get_dir()) / 'checkpoints' / 'x.pth').exists() == downloads
