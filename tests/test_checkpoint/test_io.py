"""Keys with any prefix, corrupt content, downloads, and targets that must not be replaced."""

import errno
import functools
import http.server
import os
import socket
import stat
import sys
import threading
import time
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
    assert 'model' in read_checkpoint(f'{address}/x.pth?download=1')  # from the cache
    with pytest.raises(CheckpointError, match=r'could not download.*nothing.pth.*404'):
        read_checkpoint(f'{address}/nothing.pth')


def test_each_address_has_its_own_file(site, backbone):
    folder, address = site
    for run in 'ab':
        (folder / run).mkdir()
        torch.save(dict(run=run), folder / run / 'epoch_12.pth')
    for _ in range(2):  # downloaded, and from the cache
        assert [read_checkpoint(f'{address}/{run}/epoch_12.pth') for run in 'ab'] == [dict(run='a'), dict(run='b')]
    assert read_checkpoint(f'{address}/a/epoch_12.pth?version=2') == dict(run='a')
    assert len(list(Path(torch.hub.get_dir()).glob('checkpoints/*.pth'))) == 3


def test_an_address_that_is_none():
    with pytest.raises(CheckpointError, match=r"'http://\[::1/x.pth' is no valid address"):
        read_checkpoint('http://[::1/x.pth')


@pytest.mark.parametrize('name', ['x.pth', 'x.safetensors'])
def test_an_answer_that_is_no_checkpoint_is_not_kept(site, name):
    folder, address = site
    (folder / name).write_text('<html>please log in</html>')
    with pytest.raises(CheckpointError, match=r'not a (PyTorch|safetensors) file'):
        read_checkpoint(f'{address}/{name}')
    save_atomically({'x': torch.ones(2)}, folder / name)
    assert torch.equal(read_checkpoint(f'{address}/{name}')['x'], torch.ones(2))


@pytest.mark.parametrize(
    'start', ['HTTP/1.1 200 OK\r\nX-Slow: ', 'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;']
)
def test_an_answer_that_drips_ends_in_time(tmp_path, monkeypatch, start):
    """Each byte comes within the time limit of the socket, inside of a header or of the length of a chunk."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr('vheat_mm.checkpoint.download._TIMEOUT', 0.3)
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(start.encode())
            while not ended.wait(0.05):
                connection.sendall(b'a')

    with socket.create_server(('127.0.0.1', 0)) as listener:
        thread = threading.Thread(target=drip, args=[listener], daemon=True)
        thread.start()
        before = time.monotonic()
        with pytest.raises(CheckpointError, match=r'sent \d+ bytes in'):
            read_checkpoint(f'http://127.0.0.1:{listener.getsockname()[1]}/x.pth')
        assert time.monotonic() - before < 5
        ended.set()
        thread.join()
    assert [path.suffix for path in tmp_path.rglob('*.pth*')] == ['.lock']


# --- disks that refuse what most allow


@pytest.mark.parametrize('place', ['pathlib.Path.chmod', 'os.chmod', 'os.fchmod', 'os.fsync'])
def test_a_disk_that_refuses(tmp_path, monkeypatch, place):
    """vfat and exfat refuse chmod; some network file systems fsync."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, 'Operation not permitted')

    monkeypatch.setattr(place, refuse)
    save_atomically({'x': torch.ones(2)}, tmp_path / 'x.pth')
    monkeypatch.undo()
    assert 'x' in read_checkpoint(tmp_path / 'x.pth')
    (tmp_path / 'usual').touch()
    assert (tmp_path / 'x.pth').stat().st_mode == (tmp_path / 'usual').stat().st_mode


def test_a_failed_fsync_is_an_error(tmp_path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(errno.EIO, 'Input/output error')

    (tmp_path / 'x.pth').write_bytes(b'before')
    monkeypatch.setattr('os.fsync', fail)
    with pytest.raises(CheckpointError, match=r'Input/output error.*earlier content is unchanged'):
        save_atomically({'x': torch.ones(2)}, tmp_path / 'x.pth')
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'before']


@pytest.mark.parametrize('busy', [1, 9])
def test_a_rename_that_is_refused_is_tried_again(tmp_path, monkeypatch, busy):
    rename, calls = Path.replace, []

    def refuse(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) <= busy:
            raise OSError(errno.EBUSY, 'Device or resource busy')
        return rename(self, target)

    monkeypatch.setattr(Path, 'replace', refuse)
    monkeypatch.setattr('time.sleep', lambda _: None)
    (tmp_path / 'x.pth').write_bytes(b'before')
    if busy == 9:
        with pytest.raises(CheckpointError, match='Device or resource busy'):
            save_atomically({'x': torch.ones(2)}, tmp_path / 'x.pth')
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'before']
    else:
        save_atomically({'x': torch.ones(2)}, tmp_path / 'x.pth')
        assert 'x' in read_checkpoint(tmp_path / 'x.pth')
