"""torch.hub from a checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from stand_ins import write_release

ROOT = Path(__file__).resolve().parents[2]
USE = """
import sys, torch
repo = dict(github='somebody/vheat:main', trust_repo=True)  # torch.hub finds it in its cache
assert torch.hub.list(**repo) == ['vheat_base', 'vheat_small', 'vheat_tiny']
assert 'features_only' in torch.hub.help(model='vheat_tiny', **repo)
model = torch.hub.load('{checkout}', 'vheat_tiny', source='local', pretrained=True)
assert sys.modules['vheat_mm'].__file__.startswith('{checkout}')
weights = torch.load('{weights}')
assert torch.equal(model.get_classifier().weight, weights['model_ema']['classifier.3.weight'])
model = torch.hub.load('{checkout}', 'vheat_tiny', source='local', pretrained=True, ema=False)
assert torch.equal(model.get_classifier().weight, weights['model']['classifier.3.weight'])
maps = torch.hub.load('{checkout}', 'vheat_small', source='local', features_only=True, out_indices=(1,), img_size=64)
assert [x.shape for x in maps(torch.zeros(1, 3, 64, 64))] == [(1, 192, 8, 8)]
"""


def test_models_of_a_checkout(tmp_path):
    """In an interpreter that knows no other vheat_mm: ``-S`` hides an editable install."""
    checkout = tmp_path / 'hub' / 'somebody_vheat_main'
    shutil.copytree(ROOT / 'vheat_mm', checkout / 'vheat_mm', ignore=shutil.ignore_patterns('__pycache__', '.mim'))
    shutil.copy(ROOT / 'hubconf.py', checkout)
    release = write_release(tmp_path / 'release', ['vheat_tiny'], ema=True)
    packages = [path for path in sys.path if path.endswith('site-packages')]
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join(packages),
        'TORCH_HOME': str(tmp_path),
        'VHEAT_WEIGHTS': str(release),
    }
    code = USE.format(checkout=checkout, weights=release / 'vheatcls/vHeat_tiny.pth')
    done = subprocess.run(
        [sys.executable, '-S', '-c', code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
