"""The command line of interpolate4downstream.py: other working directories, wrong names, a full disk."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interpolate4downstream
from vheat_mm.models.weights import load_pretrained
from vheat_mm.ops.freq_embed import resize_freq_embed

SCRIPT = Path(interpolate4downstream.__file__)


@pytest.fixture
def folder(make_vheat, tmp_path, monkeypatch) -> Path:
    """A detector's checkpoint of 64 pixels in the working directory, which is also the home directory."""
    torch.manual_seed(7)
    state = {f'backbone.{key}': torch.randn_like(value) for key, value in make_vheat().state_dict().items()}
    torch.save(dict(state_dict=state | {'neck.conv.weight': torch.randn(3, 3)}), tmp_path / 'in.pth')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    return tmp_path


def call(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    status = interpolate4downstream.main(['--pt_size', '64', '--tg_size', '128', *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_as_a_program_in_another_folder(folder, make_vheat):
    command = [sys.executable, '-W', 'ignore', str(SCRIPT), '--pt_pth', 'in.pth', '--tg_pth', 'out.pth']
    done = subprocess.run([*command, '--pt_size', '64', '--tg_size', '128', '96'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a vHeat from 'in.pth', entry 'state_dict'" in done.stdout
    assert 'freq_embed.3     2 x 2    ->    4 x 3' in done.stdout
    assert f'{(folder / "out.pth").stat().st_size / 1e6:.1f} MB' in done.stdout
    source, content = torch.load('in.pth')['state_dict'], torch.load('out.pth', weights_only=True)
    assert content['state_dict'].keys() == source.keys()  # the neck is kept
    model = make_vheat(img_size=(128, 96))
    load_pretrained(model, 'out.pth')
    expected = resize_freq_embed(source['backbone.freq_embed.1'], (16, 12), 'pad')
    assert torch.equal(model.freq_embed[1], expected)


@pytest.mark.parametrize('name', ['in.pth', './x/../in.pth', '~/in.pth', 'hard.pth', 'soft.pth'])
@pytest.mark.parametrize('dry', [[], ['--dry-run']])
def test_input_is_not_overwritten_under_any_name(folder, capsys, name, dry):
    (folder / 'x').mkdir()
    os.link('in.pth', 'hard.pth')
    Path('soft.pth').symlink_to('in.pth')
    before = Path('in.pth').read_bytes()
    status, out, err = call(capsys, '--pt_pth', 'in.pth', '--tg_pth', name, *dry)
    assert (status, out) == (2, '')
    assert err.startswith(f'error: {name!r} is the input itself')
    assert Path('in.pth').read_bytes() == before


def test_other_files_are_replaced(folder, capsys):
    Path('out.pth').write_text('old')
    assert call(capsys, '--pt_pth', '~/in.pth', '--tg_pth', '~/out.pth')[0] == 0
    assert torch.load('out.pth', weights_only=True)['model']['freq_embed.0'].shape == (32, 32, 4)


def test_reparameterised_weights_are_refused(folder, capsys, make_vheat):
    model = make_vheat()
    model.switch_to_deploy()
    torch.save(dict(model=model.state_dict()), 'deployed.pth')
    status, _, err = call(capsys, '--pt_pth', 'deployed.pth', '--tg_pth', 'out.pth')
    assert status == 2
    assert 're-parameterised for one resolution' in err
    assert not Path('out.pth').exists()


def test_grids_of_no_image_size_are_refused(folder, capsys):
    state = torch.load('in.pth')['state_dict']
    state['backbone.freq_embed.1'] = torch.zeros(7, 8, 8)  # rounded down: no network gives it
    torch.save(dict(state_dict=state), 'odd.pth')
    status, _, err = call(capsys, '--pt_pth', 'odd.pth', '--tg_pth', 'out.pth')
    assert status == 2
    assert '16x16, 7x8, 4x4, 2x2, which no image size gives' in err
    assert '--pt_size' not in err


@pytest.mark.parametrize(
    'wrong', [['--size', '128'], ['--dry'], ['--mode', 'cubic'], ['--tg_size', 'big'], ['--pt_size', '1', '2', '3']]
)
def test_wrong_flags_are_refused(folder, capsys, wrong):
    with pytest.raises(SystemExit, match='2'):
        call(capsys, '--pt_pth', 'in.pth', '--tg_pth', 'out.pth', *wrong)
    assert wrong[0].lstrip('-') in capsys.readouterr().err
    assert not Path('out.pth').exists()


def test_full_disk(folder):
    """The kernel refuses to write beyond a limit, like a full disk: the old file stays, and no partial file."""
    Path('out.pth').write_text('old')
    limit = Path('in.pth').stat().st_size // 2
    command = [sys.executable, '-W', 'ignore', str(SCRIPT), '--pt_pth', 'in.pth', '--pt_size', '64']
    done = subprocess.run(
        [*command, '--tg_pth', 'out.pth', '--tg_size', '128'],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: could not write 'out.pth'")
    assert done.stderr.count('\n') == 1
    assert Path('out.pth').read_text() == 'old'
    assert not list(folder.glob('.out*'))
