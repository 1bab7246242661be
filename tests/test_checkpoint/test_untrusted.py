"""Untrusted checkpoints run no code, take memory in proportion to their size, and are refused with one message."""

from __future__ import annotations

import http.server
import io
import json
import random
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import hostile_files, mutations
from fuzz.hostile_files import FILES, HARMLESS, SAVED
from fuzz.hostile_pickles import FRAGMENTS

import interpolate4downstream
from vheat_mm import VHeat
from vheat_mm.checkpoint import download, zip_layout
from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.checkpoint.safe_globals import register_safe_globals
from vheat_mm.checkpoint.verify import verify_file
from vheat_mm.models.find_weights import find_weights
from vheat_mm.utils.errors import CheckpointError

FUZZ = Path(__file__).parents[1] / 'fuzz'


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> tuple[Path, list[str], list[str], dict[str, dict]]:
    """All files, and the outcome of loading each in another process."""
    folder = tmp_path_factory.mktemp('corpus')
    (folder / 'files').mkdir()
    arch = dict(embed_dims=4, depths=(1, 1, 2, 1), post_norm=False, layer_scale=None)
    state = VHeat(arch=arch, img_size=64).state_dict()
    refused, harmless = hostile_files.write_corpus(folder / 'files', state)
    return folder, refused, harmless, drive(folder, refused + harmless)


def drive(folder: Path, names: list[str]) -> dict[str, dict]:
    """The outcome for each file; a file that ends the process is reported, and a new process takes the others."""
    results: dict[str, dict] = {}
    while len(results) < len(names):
        left = names[len(results) :]
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', str(FUZZ / 'drive.py'), str(folder)],
            input=''.join(json.dumps(str(folder / 'files' / name)) + '\n' for name in left),
            capture_output=True,
            text=True,
            cwd=folder,
        )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
        if done.returncode and len(lines) < len(left):
            lines.append(dict(outcomes={}, findings=[f'ended the process: {done.returncode} {done.stderr[-2000:]}']))
        results |= dict(zip(left, lines, strict=False))
    return results


def test_corpus_is_complete(corpus):
    _, refused, harmless, _ = corpus
    assert len(refused) == len(FRAGMENTS) + len(SAVED) + len(FILES)
    assert len(harmless) == len(HARMLESS) + 1


def test_no_code_runs_and_memory_is_bounded(corpus):
    folder, _, _, results = corpus
    assert {name: found['findings'] for name, found in results.items() if found['findings']} == {}
    assert not list(folder.rglob('ran'))
    assert not list((folder / 'out').iterdir())


def test_hostile_files_are_refused(corpus):
    _, refused, _, results = corpus
    for name in refused:
        outcomes = results[name]['outcomes']
        for way in ('init_cfg', 'interpolate to torch', 'interpolate to safetensors'):
            assert outcomes[way].startswith('refused: '), (name, way)
            assert repr(name)[1:-1] in outcomes[way], (name, way)
        if not name.startswith('saved '):  # these are valid files, but not valid weights
            assert outcomes['read_checkpoint'].startswith('refused: '), name
            assert outcomes['load_from'].startswith('refused: '), name
            assert results[name]['reached'] == 0, name  # PyTorch's reader never saw it


def test_harmless_files_load(corpus):
    _, _, harmless, results = corpus
    for name in harmless:
        assert results[name]['outcomes']['read_checkpoint'] == 'loaded', name


# --- corrupt files


def small() -> dict:
    """Every kind of record, in as few bytes as possible."""
    return {'model': {'a': torch.arange(5.0), 'b': torch.zeros(0), 'c': torch.ones(3, dtype=torch.uint8)}}


def same(one: dict, other: dict) -> bool:
    if one.keys() != other.keys() or list(one) != ['model'] or one['model'].keys() != other['model'].keys():
        return False
    pairs = [(one['model'][key], other['model'][key]) for key in one['model']]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_each_flipped_bit_is_found_or_has_no_effect(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save(small(), path)
    raw = path.read_bytes()
    found = 0
    for position in range(len(raw)):
        changed = bytearray(raw)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        try:
            assert same(read_checkpoint(path), small()), position
        except CheckpointError:
            found += 1
    assert found > 0.4 * len(raw)  # the rest is padding, times and versions


def test_a_record_marked_as_folder_is_refused(tmp_path):
    """PyTorch's reader returns uninitialised memory for it."""
    path = tmp_path / 'x.pth'
    torch.save(small(), path)
    raw = path.read_bytes()
    at = raw.rfind(b'x/data/0') - 8  # the attributes in the directory
    path.write_bytes(raw[:at] + b'\x10' + raw[at + 1 :])
    with pytest.raises(CheckpointError, match=r"'x/data/0' is marked as a folder"):
        read_checkpoint(path)


@pytest.mark.parametrize('legacy', [False, True])
def test_truncated_at_any_length_is_refused(tmp_path, legacy):
    path = tmp_path / 'x.pth'
    torch.save(small(), path, _use_new_zipfile_serialization=not legacy)
    raw = path.read_bytes()
    assert same(read_checkpoint(path), small())
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        for read in (verify_file, read_checkpoint):
            with pytest.raises(CheckpointError, match=r'truncated|corrupt|empty'):
                read(path)


def test_corrupt_record_is_named_and_read_in_blocks(tmp_path, monkeypatch):
    path = tmp_path / 'x.pth'
    torch.save({'a': torch.zeros(100_000), 'b': torch.ones(100_000)}, path)
    raw = bytearray(path.read_bytes())
    at = raw.find(torch.ones(2).numpy().tobytes()) + 300_000
    raw[at] ^= 4
    path.write_bytes(raw)
    assert torch.load(path, weights_only=True)['b'].unique().numel() == 2  # PyTorch loads it
    monkeypatch.setattr(zip_layout, '_CHUNK', 1 << 12)
    with pytest.raises(CheckpointError, match=r"x.pth' is truncated or corrupt: the checksum of record 'x/data/1'"):
        verify_file(path)


def test_files_without_checksums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(small(), tmp_path / 'x.pth')
    finally:
        torch.serialization.set_crc32_options(before)
    with zipfile.ZipFile(tmp_path / 'x.pth') as file:
        assert {info.CRC for info in file.infolist()} == {0}
    assert same(read_checkpoint(tmp_path / 'x.pth'), small())


def test_random_mutations(tmp_path, make_vheat):
    """The first mutations of tests/fuzz/fuzz_checkpoints.py, which runs for any time."""
    seeds = mutations.write_seeds(make_vheat().state_dict())
    fragments = [fragment for fragment in FRAGMENTS.values() if len(fragment) < 5000]
    rng = random.Random(0)
    read = 0
    for _ in range(250):
        suffix, content = mutations.mutate(rng, seeds, fragments)
        path = tmp_path / f'x{suffix}'
        path.write_bytes(content)
        try:
            find_weights(read_checkpoint(path), str(path))
            read += 1
        except CheckpointError as error:
            assert str(error).isprintable()  # noqa: PT017
    assert 5 < read < 200
    assert not (tmp_path / 'ran').exists()


# --- names and URLs


@pytest.mark.parametrize('name', ['~nobody-of-this-name/x.pth', 'x' * 5000 + '.pth', 'a\0b.pth', ''])
def test_invalid_names(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        read_checkpoint(name)


class HostileServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(302 if 'leads' in self.path else 200)
        if 'leads' in self.path:
            self.send_header('Location', self.path.split('?')[1])
        if 'cut' in self.path or 'lies' in self.path:
            self.send_header('Content-Length', '5000' if 'cut' in self.path else str(1 << 60))
        self.end_headers()
        block = bytes(1000)
        try:
            while 'slow' in self.path:
                self.wfile.write(block)
                time.sleep(0.005)
            while 'endless' in self.path:
                self.wfile.write(block)
            self.wfile.write(block)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(download, 'MAX_BYTES', 1 << 20)
    web = http.server.ThreadingHTTPServer(('127.0.0.1', 0), HostileServer)
    threading.Thread(target=web.serve_forever, args=[0.02], daemon=True).start()
    yield f'http://127.0.0.1:{web.server_port}'
    web.shutdown()
    web.server_close()


@pytest.mark.parametrize(
    ('path', 'words'),
    [
        ('leads.pth?file:///etc/passwd', r'(redirects to|Redirection to url).*file:///etc/passwd'),
        ('leads.pth?ftp://127.0.0.1/x', 'is not http'),
        ('endless.pth', 'sends more than 1048576 bytes'),
        ('lies.pth', 'sends more than 1048576 bytes'),
        ('cut.pth', 'sent 1000 of 5000 bytes|IncompleteRead'),
    ],
)
def test_hostile_servers(server, tmp_path, path, words):
    with pytest.raises(CheckpointError, match=words) as error:
        read_checkpoint(f'{server}/{path}')
    assert str(error.value).isprintable()
    left = list((tmp_path / 'hub' / 'checkpoints').iterdir())  # no file, complete or partial
    assert [file.suffix for file in left] == ['.lock']


def test_slow_servers(server, monkeypatch):
    monkeypatch.setattr(download, '_TIMEOUT', 0.05)
    monkeypatch.setattr(download, '_MIN_SPEED', 1 << 50)
    with pytest.raises(CheckpointError, match=r'sent \d+ bytes in|could not download'):
        read_checkpoint(f'{server}/slow.pth')


# --- loading without read_checkpoint, as MMEngine's own scripts do


def test_allowed_numpy_types_cannot_be_changed(tmp_path):
    """They are allowed for every torch.load of the process, and flags of a dtype could turn numbers into pointers."""
    register_safe_globals()
    fragment = FRAGMENTS['numpy type with flags']
    hostile_files.write_zip(tmp_path / 'x.pth', hostile_files.with_fragment({}, fragment))
    array = torch.load(tmp_path / 'x.pth', weights_only=True)['extra']
    assert not array.dtype.hasobject
    assert np.dtype('f8').flags == 0
    for kind in ('O', 'V8', 'S5', [('a', 'O')]):
        buffer = io.BytesIO()
        torch.save({'x': np.zeros(2, dtype=kind)}, buffer)
        buffer.seek(0)
        with pytest.raises(Exception, match=r'not plain numbers|Unsupported'):
            torch.load(buffer, weights_only=True)


def test_nan_and_infinity_are_reported(make_vheat, monkeypatch):
    lines = []
    monkeypatch.setattr('vheat_mm.models.find_weights.print_log', lambda text, **_: lines.append(text))
    state = make_vheat().state_dict()
    find_weights(state, 'x.pth')
    assert lines == []
    state['patch_embed.conv1.bias'] = torch.tensor([1.0, float('nan')])
    state['outnorm0.bias'] = torch.tensor(float('-inf')).expand(4)
    find_weights(state, 'x.pth')
    assert lines == ["'x.pth' holds NaN or infinity in patch_embed.conv1.bias, outnorm0.bias"]


def test_messages_are_printable(tmp_path):
    torch.save({'model': {'\x1b]0;owned\x07' + 'x' * 10_000: torch.ones(1)}}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError) as error:
        find_weights(read_checkpoint(tmp_path / 'x.pth'), 'x.pth')
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


# --- what must load


class Note:
    """Something that a user keeps in a checkpoint."""


def test_classes_that_the_user_allows_are_read(tmp_path):
    torch.save({'model': {}, 'note': Note()}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'Note.*list of allowed'):
        read_checkpoint(tmp_path / 'x.pth')
    with torch.serialization.safe_globals([Note]):
        assert isinstance(read_checkpoint(tmp_path / 'x.pth')['note'], Note)


@pytest.mark.parametrize('legacy', [False, True])
def test_training_states_are_read(tmp_path, legacy):
    weight = torch.randn(4, 5)
    marked = torch.nn.Parameter(weight)
    marked.no_weight_decay = True
    content = {
        'tensors': [weight, weight[1:3], weight.t(), weight.half(), weight.bfloat16(), torch.zeros(0), weight[0, 0]],
        'parameters': [torch.nn.Parameter(weight), marked],
        'state_dict': torch.nn.BatchNorm2d(3).state_dict(),
        'optimizer': {'state': {0: {'step': torch.tensor(3.0)}, 1: {}}, 'param_groups': [{'betas': (0.9, 0.99)}]},
        'milestones': Counter([3, 3, 5]),
        'random': [torch.get_rng_state(), np.random.get_state(), random.getstate()],  # noqa: NPY002
        'numbers': [2**70, -5, 1.5, True, None, 1 + 2j, np.float64(3.5), np.int64(3), np.arange(6).reshape(2, 3)],
        'others': [{1, 2}, {'x'}, b'abc', bytearray(b'xy'), torch.Size([1, 2]), torch.device('cuda:1'), torch.float16],
    }
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=not legacy)
    verify_file(tmp_path / 'x.pth')
    found = read_checkpoint(tmp_path / 'x.pth')
    assert all(torch.equal(a, b) for a, b in zip(found['tensors'], content['tensors'], strict=True))
    assert found['parameters'][1].no_weight_decay
    assert found['state_dict']._metadata == content['state_dict']._metadata
    assert found['milestones'] == content['milestones']
    assert found['random'][2] == content['random'][2]
    assert repr(found['numbers']) == repr(content['numbers'])
    assert found['others'] == content['others']


def test_truncated_safetensors_is_refused(tmp_path):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(mutations.write_seeds({'a': torch.ones(3)})['safetensors'])
    verify_file(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r'not fully covered'):
        verify_file(path)


def test_target_too_large_for_memory(tmp_path, make_vheat, capsys):
    torch.save(make_vheat().state_dict(), tmp_path / 'x.pth')
    arguments = ['--pt_pth', str(tmp_path / 'x.pth'), '--pt_size', '64', '--tg_pth', str(tmp_path / 'y.pth')]
    assert interpolate4downstream.main([*arguments, '--tg_size', '1000000']) == 2
    assert 'more than 16384 pixels a side' in capsys.readouterr().err
    assert not (tmp_path / 'y.pth').exists()
