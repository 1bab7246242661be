"""Published checkpoints by name, from folders and servers that stand in for the release."""

import hashlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from processes import _context
from stand_ins import serve, write_release

import interpolate4downstream
import vheat_mm
from vheat_mm.checkpoint.download import _version
from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.checkpoint.released import NAMES, RELEASES, find_released
from vheat_mm.utils.errors import CheckpointError

TINY = 'vheatcls/vHeat_tiny.pth'
SMALL = 'vheatcls/vHeat_small.pth'


@pytest.fixture(scope='module')
def release(tmp_path_factory) -> Path:
    """The release's classifiers of two sizes."""
    return write_release(tmp_path_factory.mktemp('release'), ('vheat_tiny', 'vheat_small'))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache, of this process and of those it starts; returns the folder of the files."""
    (tmp_path / 'torch').mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


@pytest.fixture
def server(release, hub, monkeypatch):
    with serve(release) as server:
        monkeypatch.setenv('VHEAT_WEIGHTS', server.url)
        yield server


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What is logged."""
    found: list[str] = []
    monkeypatch.setattr('vheat_mm.checkpoint.cache.print_log', lambda text, *_, **__: found.append(text))
    return found


def visible(folder: Path) -> list[str]:
    """Names of the files but locks, which stay."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != '.lock') if folder.exists() else []


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def failure(path: str = 'vheat_tiny') -> str:
    """The message of the one error, which is one line."""
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert str(error.value).isprintable()
    return str(error.value)


# --- names


def test_the_table():
    assert len(RELEASES) == len({release.url for release in RELEASES}) == 10
    configs = {path.stem for path in (Path(__file__).parents[2] / 'configs').glob('*/*.py')}
    assert {release.config for release in RELEASES} <= configs
    assert NAMES[:3] == tuple(vheat_mm.list_models())
    for entry in RELEASES:
        assert {find_released(name) for name in (entry.name, entry.config, entry.url)} == {entry}
        assert re.fullmatch(
            r'https://github.com/MzeroMiko/vHeat/releases/download/vheat\w{3}/\w+\.(txt|log)', entry.log_url
        )


@pytest.mark.parametrize('flat', [False, True])
def test_a_folder_takes_the_place_of_the_release(release, hub, tmp_path, monkeypatch, lines, flat):
    folder = tmp_path / 'mirror'
    if flat:
        folder.mkdir()
        shutil.copy(release / TINY, folder)
    monkeypatch.setenv('VHEAT_WEIGHTS', str(folder if flat else release))
    expected = torch.load(release / TINY, weights_only=True)['model']
    for name in ('vheat_tiny', 'vheat-t_16xb128_in1k', find_released('vheat_tiny').url):
        found = read_checkpoint(name)['model']
        assert found.keys() == expected.keys()
        assert torch.equal(found['freq_embed.1'], expected['freq_embed.1'])
    file = folder / 'vHeat_tiny.pth' if flat else release / TINY
    assert lines == [f'Released weights vheat_tiny: {str(file)!r}, SHA-256 {sha256(file)}'] * 3
    assert not hub.exists()


def test_a_name_wins_over_a_file(release, hub, tmp_path, monkeypatch, lines):
    monkeypatch.setenv('VHEAT_WEIGHTS', str(release))
    monkeypatch.chdir(tmp_path)
    torch.save(dict(mine=1), tmp_path / 'vheat_tiny')
    assert 'model' in read_checkpoint('vheat_tiny')
    assert "'vheat_tiny' is taken as the name of released weights" in lines[0]
    assert "'./vheat_tiny'" in lines[0]
    assert read_checkpoint('./vheat_tiny') == dict(mine=1)
    shutil.copy('vheat_tiny', 'other')
    assert read_checkpoint('other') == dict(mine=1)


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('vheat-tinny', "did you mean 'vheat_tiny'?"),
        (' vheat_tiny', "no checkpoint at ' vheat_tiny'"),
        ('vheat tiny.pth', "did you mean 'vheat_tiny'?"),
        ('vHeat_tiny_det.pth', "did you mean 'mask-rcnn_vheat-t_fpn_1x_coco'?"),
        ('epoch_12.pth', "no checkpoint at 'epoch_12.pth' (working directory"),
        ('', "an address or a name of released weights, got ''"),
        (True, 'an address or a name of released weights, got True'),
        ('mask-rcnn_vheat-t_fpn_1x_cocoo', "did you mean 'mask-rcnn_vheat-t_fpn_1x_coco'?"),
        (
            'nothing',
            'have that name. The names are vheat_tiny, vheat_small, vheat_base, mask-rcnn_vheat-t_fpn_1x_coco, ',
        ),
    ],
)
def test_unknown_names(name, words):
    assert words in failure(name)


@pytest.mark.parametrize(
    ('place', 'words'),
    [
        ('{tmp}', r"VHEAT_WEIGHTS='.*' lacks 'vheatcls/vHeat_tiny.pth' of 'vheat_tiny', also as 'vHeat_tiny.pth'; in "
         r'it are vheatcls/vHeat_small.pth. Its address in the release is https://github.com/'),
        ('{tmp}/nowhere', r"VHEAT_WEIGHTS='.*nowhere' is neither a folder nor an http\(s\) address"),
        ('ftp://127.0.0.1/x', r"VHEAT_WEIGHTS='ftp://127.0.0.1/x' is neither a folder nor an http\(s\) address"),
    ],
)  # fmt: skip
def test_a_mirror_without_the_file(release, tmp_path, monkeypatch, place, words):
    (tmp_path / 'vheatcls').mkdir()
    shutil.copy(release / SMALL, tmp_path / 'vheatcls')
    monkeypatch.setenv('VHEAT_WEIGHTS', place.format(tmp=tmp_path))
    assert re.search(words, failure())


@pytest.mark.parametrize(
    'place', ['http://', 'http:///x', 'HTTPS://h/x?token=SECRET', 'http://me:SECRET@h/', 'http://[']
)
def test_an_address_that_is_no_plain_one(monkeypatch, place):
    monkeypatch.setenv('VHEAT_WEIGHTS', place)
    message = failure()
    assert message.startswith('VHEAT_WEIGHTS is no address of a folder: expected http(s)://HOST/PATH without user')
    assert 'SECRET' not in message


@pytest.mark.parametrize('name', ['x.pth', 'model.safetensors.index.json'])
def test_a_password_is_not_shown(name):
    assert failure(f'HTTP://me:SE@CRET@host:1/{name}').startswith("an address of 'host:1' has a user name or password")


# --- downloads


def test_download_is_recorded_and_kept(server, hub, lines, monkeypatch):
    expected = sha256(server.folder / TINY)
    assert 'model' in read_checkpoint('vheat_tiny')
    assert visible(hub) == ['vHeat_tiny.pth', 'vHeat_tiny.pth.sha256']
    assert (hub / 'vHeat_tiny.pth.sha256').read_text() == f'{expected}  vHeat_tiny.pth\n'
    assert (hub / 'vHeat_tiny.pth').read_bytes() == (server.folder / TINY).read_bytes()
    assert sum(expected in line and str(hub / 'vHeat_tiny.pth') in line for line in lines) == 2
    assert f'Downloading {server.url}/{TINY}' in lines[0].replace("'", '')
    server.fault = 'missing'
    assert 'model' in read_checkpoint('vheat_tiny')
    assert server.requests == [(TINY, None)]
    monkeypatch.setenv('VHEAT_WEIGHTS', server.url.upper())
    server.fault = ''
    (hub / 'vHeat_tiny.pth').unlink()
    assert 'model' in read_checkpoint('vheat_tiny')


def test_the_cached_file_is_not_written_as_target(server, hub, capsys):
    target = hub / 'vHeat_tiny.pth'
    assert interpolate4downstream.main(['--pt_pth', 'vheat_tiny', '--tg_pth', str(target)]) == 2
    assert 'is the input itself' in capsys.readouterr().err
    assert target.read_bytes() == (server.folder / TINY).read_bytes()


def test_another_file_than_before_is_refused(server, hub, release, tmp_path):
    read_checkpoint('vheat_tiny')
    before = sha256(hub / 'vHeat_tiny.pth')
    (tmp_path / 'vheatcls').mkdir()
    shutil.copy(release / SMALL, tmp_path / TINY)
    server.folder = tmp_path
    (hub / 'vHeat_tiny.pth').unlink()
    message = failure()
    record = hub / 'vHeat_tiny.pth.sha256'
    assert all(word in message for word in (before, sha256(tmp_path / TINY), 'remove the record', repr(str(record))))
    assert visible(hub) == [record.name]
    shutil.copy(release / SMALL, hub / 'vHeat_tiny.pth')  # also one that was put there
    message = failure()
    assert before in message
    assert 'damaged or was replaced: remove it to download it again' in message
    record.unlink()
    assert 'model' in read_checkpoint('vheat_tiny')


@pytest.mark.parametrize('name', ['vheat_tiny', '{url}/x.pth'])
def test_a_damaged_file_is_named_where_a_name_stands_for_it(server, hub, name):
    (server.folder / 'x.pth').write_bytes((server.folder / TINY).read_bytes())
    name = name.format(url=server.url)
    read_checkpoint(name)
    (file,) = hub.glob('*.pth')
    file.write_bytes(file.read_bytes()[:-1000])
    file.with_name(f'{file.name}.sha256').unlink()
    assert f'The file is {str(file)!r}: remove it to download it again' in failure(name)


def read_in_child(environment: dict[str, str], *names: str) -> None:
    os.environ.update(environment)  # the server of processes has that of its own start
    Path(environment['TORCH_HOME'], f'{os.getpid()}.started').touch()
    for name in names:
        read_checkpoint(name)


def start(*names: str):
    process = _context.Process(target=read_in_child, args=(dict(os.environ), *names))
    process.start()
    return process


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_part(hub: Path) -> Path:
    part = hub / '.vHeat_tiny.pth.part'
    wait_until(lambda: part.exists() and part.stat().st_size >= 100_000)
    return part


@pytest.mark.parametrize('then', ['goes on', 'no range', 'changed', 'another mirror'])
def test_a_killed_download_goes_on(server, hub, release, tmp_path, monkeypatch, then):
    server.fault = 'slow'
    child = start('vheat_tiny')
    part = wait_for_part(hub)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    kept = part.stat().st_size
    assert visible(hub) == [part.name, f'{part.name}.json']
    server.fault = 'no range' if then == 'no range' else ''
    if then == 'changed':
        (tmp_path / 'vheatcls').mkdir()
        shutil.copy(release / SMALL, tmp_path / TINY)
        server.folder = tmp_path
    if then == 'another mirror':
        monkeypatch.setenv('VHEAT_WEIGHTS', server.url.replace('127.0.0.1', 'localhost'))
    read_checkpoint('vheat_tiny')
    assert (hub / 'vHeat_tiny.pth').read_bytes() == (server.folder / TINY).read_bytes()
    assert visible(hub) == ['vHeat_tiny.pth', 'vHeat_tiny.pth.sha256']
    asked = None if then == 'another mirror' else f'bytes={kept}-'
    assert server.requests == [(TINY, None), (TINY, asked)]
    assert server.statuses == [200, 206 if then == 'goes on' else 200]


def test_a_server_that_sends_the_rest_of_another_file(server, hub, release):
    """It heeds Range but not If-Range; its answer tells another version."""
    hub.mkdir(parents=True)
    (hub / '.vHeat_tiny.pth.part').write_bytes(b'old')
    (hub / '.vHeat_tiny.pth.part.json').write_text(f'{{"url": "{server.url}/{TINY}", "version": "\\"old\\""}}')
    server.fault = 'no if-range'
    read_checkpoint('vheat_tiny')
    assert server.statuses == [206, 200]
    assert (hub / 'vHeat_tiny.pth').read_bytes() == (release / TINY).read_bytes()


@pytest.mark.parametrize(('fault', 'status'), [('', 416), ('wrong range', 206)])
def test_a_part_that_cannot_be_continued(server, hub, release, fault, status):
    server.fault = 'cut'
    failure()
    if status == 416:  # longer than the file
        with (hub / '.vHeat_tiny.pth.part').open('ab') as part:
            part.write(bytes(10_000_000))
    server.fault = fault
    read_checkpoint('vheat_tiny')
    assert server.statuses == [200, status, 200]
    assert (hub / 'vHeat_tiny.pth').read_bytes() == (release / TINY).read_bytes()


@pytest.mark.parametrize('note', ['', '[]', '{"url": 1}', 'not json', '{' * 100_000])
def test_a_damaged_note_is_not_used(server, hub, release, note):
    hub.mkdir(parents=True)
    (hub / '.vHeat_tiny.pth.part').write_bytes(b'old')
    (hub / '.vHeat_tiny.pth.part.json').write_text(note)
    read_checkpoint('vheat_tiny')
    assert server.requests == [(TINY, None)]
    assert (hub / 'vHeat_tiny.pth').read_bytes() == (release / TINY).read_bytes()


@pytest.mark.parametrize(
    ('headers', 'version'),
    [
        ({'ETag': '"a"', 'Last-Modified': 'Mon'}, '"a"'),
        ({'ETag': 'W/"a"', 'Last-Modified': 'Mon'}, 'Mon'),
        ({'ETag': 'W/"a"'}, ''),
        ({'ETag': f'"{"a" * 200}"'}, ''),
        ({'ETag': '"\x1b"'}, ''),
    ],
)
def test_what_tells_versions_apart(headers, version):
    assert _version(SimpleNamespace(headers=headers)) == version


@pytest.mark.parametrize('killed', [False, True])
def test_eight_processes_download_once(server, hub, killed):
    """Independent ones; also if the one that downloads is killed, whose lock must not outlive it."""
    server.fault = 'slow'
    first = start('vheat_tiny')
    wait_for_part(hub)
    others = [start('vheat_tiny', 'vheat_tiny') for _ in range(7)]
    wait_until(lambda: len(list(hub.parents[1].glob('*.started'))) == 8)
    time.sleep(0.3)  # they wait for the lock
    if killed:
        os.kill(first.pid, signal.SIGKILL)
    server.fault = ''
    for process in (first, *others):
        process.join(60)
    assert [process.exitcode for process in (first, *others)] == [-signal.SIGKILL if killed else 0] + [0] * 7
    assert visible(hub) == ['vHeat_tiny.pth', 'vHeat_tiny.pth.sha256']
    assert server.statuses == [200, 206][: 1 + killed]
    assert killed or server.full[TINY] == 1


# --- bad input


@pytest.mark.parametrize(
    ('fault', 'words', 'left'),
    [
        ('missing', r"could not download 'http://.*/vheatcls/vHeat_tiny.pth': HTTP Error 404: Not Found\. Without", []),
        ('html', r"vHeat_tiny.pth' answered with a web page instead of a file: a sign-in, a proxy or a wrong", []),
        ('cut', r'sent 358945 of 717890 bytes; 0.4 MB of it are kept, and the next try goes on there\. Without', None),
        ('gzip', r"vHeat_tiny.pth' is sent compressed, against the request: Content-Encoding 'gzip'\. Without", []),
        ('no validators, cut', r'sent 358945 of 717890 bytes\. Without', []),
    ],
)
def test_faults_of_a_server(server, hub, fault, words, left):
    server.fault = fault
    message = failure()
    size = (server.folder / TINY).stat().st_size
    words = words.replace('358945', str(size // 2)).replace('717890', str(size))
    assert re.search(words, message)
    place = hub / 'vHeat_tiny.pth'
    assert f'Without a network, put the file at {str(place)!r}, or set VHEAT_WEIGHTS to a folder or an' in message
    assert visible(hub) == (['.vHeat_tiny.pth.part', '.vHeat_tiny.pth.part.json'] if left is None else left)


def test_a_file_without_end_is_not_kept(server, hub, monkeypatch):
    monkeypatch.setattr('vheat_mm.checkpoint.download.MAX_BYTES', 100_000)
    server.fault = 'no length'
    assert 'sends more than 100000 bytes. Without' in failure()
    assert visible(hub) == []


def test_without_a_network(hub, monkeypatch):
    with serve(hub) as server:
        address = server.url
    monkeypatch.setenv('VHEAT_WEIGHTS', address)
    message = failure()
    assert f'could not download {address}/{TINY}'.replace(address, f"'{address}") in message
    assert 'Connection refused' in message
    assert f'put the file at {str(hub / "vHeat_tiny.pth")!r}' in message
    assert visible(hub) == []


def test_no_room_on_the_disk(server, hub, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    message = failure()
    assert re.search(r'0\.7 MB to come and 0\.0 MB free.*Set TORCH_HOME to a folder', message)
    assert visible(hub) == []


def test_a_cache_that_cannot_be_written(server, hub, monkeypatch, tmp_path):
    read_checkpoint('vheat_tiny')

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, 'Read-only file system')

    for place in ('pathlib.Path.mkdir', 'os.open'):
        monkeypatch.setattr(place, refuse)
    assert 'model' in read_checkpoint('vheat_tiny')
    message = failure('vheat_small')
    monkeypatch.setattr('vheat_mm.checkpoint.cache.FileLock.acquire', Mock(side_effect=NotImplementedError))
    monkeypatch.setattr('pathlib.Path.mkdir', Mock())
    without_locks = failure('vheat_small')
    monkeypatch.undo()
    assert 'NotImplementedError. Set TORCH_HOME to a folder' in without_locks
    assert re.search('Read-only file system. Set TORCH_HOME to a folder for downloads that is writable', message)
    assert visible(hub) == ['vHeat_tiny.pth', 'vHeat_tiny.pth.sha256']
