"""Time the network of this checkout against that of another commit, in turns within one process.

python .dev_scripts/compare_commits.py 7461f61                  forward passes, CPU time of one thread
python .dev_scripts/compare_commits.py 7461f61 --train --deploy

The other commit's package is imported under another name. CPU time of one thread holds still on a busy machine.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
SHAPES = ((8, 3, 224, 224), (1, 3, 512, 512), (1, 3, 800, 1216))


def import_network(commit: str, folder: Path) -> type:
    """``VHeat`` of a commit, from a package called ``vheat_other``."""
    archive = subprocess.run(['git', 'archive', commit, 'vheat_mm'], cwd=REPO, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter='data')
    (folder / 'vheat_mm').rename(folder / 'vheat_other')
    for path in (folder / 'vheat_other').rglob('*.py'):
        text = path.read_text().replace('vheat_mm', 'vheat_other')
        path.write_text(text.replace('@MODELS.register_module()', '@MODELS.register_module(force=True)'))
    for face in ('', 'models'):  # importing these would register hooks and models twice
        face_file = folder / 'vheat_other' / face / '__init__.py'
        if face_file.exists():
            face_file.write_text('')
    sys.path.insert(0, str(folder))
    flat = (folder / 'vheat_other' / 'vheat.py').exists()
    return importlib.import_module('vheat_other.vheat' if flat else 'vheat_other.models.vheat').VHeat


def run(model: torch.nn.Module, image: torch.Tensor, amp: bool) -> None:
    with torch.set_grad_enabled(model.training), torch.autocast('cpu', torch.bfloat16, enabled=amp):
        outputs = model(image)
    if model.training:
        sum(out.float().square().mean() for out in outputs).backward()


def compare(networks: dict[str, type], shape: tuple[int, ...], amp: bool, train: bool, deploy: bool, dtype) -> str:
    state, runs = networks['this']('tiny', shape[2:]).state_dict(), {}
    for name, network in networks.items():
        model = network('tiny', shape[2:]).train(train)
        model.load_state_dict(state)
        if deploy:
            model.switch_to_deploy(shape[2:])
        runs[name] = partial(run, model.to(dtype), torch.randn(shape).to(dtype), amp)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(9):
        for name, call in runs.items():
            start = time.thread_time()
            call()
            taken[name].append(1000 * (time.thread_time() - start))
    this, other = taken['this'][2:], taken['other'][2:]
    ratio = statistics.median(a / b for a, b in zip(this, other, strict=True))
    return f'{statistics.median(other):8.1f} ms -> {statistics.median(this):8.1f} ms, ratio {ratio:.3f}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('commit')
    parser.add_argument('--train', action='store_true', help='a training step instead of a forward pass')
    parser.add_argument('--deploy', action='store_true', help='after switch_to_deploy')
    args = parser.parse_args()
    if not re.fullmatch(r'[\w./~^-]+', args.commit):
        parser.error(f'{args.commit!r} names no commit')
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(REPO))
        networks = dict(this=importlib.import_module('vheat_mm').VHeat, other=import_network(args.commit, Path(folder)))
        kinds = [('float32', False, torch.float32), ('bfloat16 autocast', True, torch.float32)]
        kinds += [] if args.train else [('bfloat16 model', False, torch.bfloat16)]
        for shape in SHAPES[:2] if args.train else SHAPES:
            for title, amp, dtype in kinds:
                print(
                    f'{shape!s:20}{title:18}', compare(networks, shape, amp, args.train, args.deploy, dtype), flush=True
                )


if __name__ == '__main__':
    main()
