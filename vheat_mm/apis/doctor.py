"""What of the stack works on this machine, and how to mend what does not.

    python -m vheat_mm.doctor [--json]

The exit status is 0 where the core works (Python, PyTorch, MMEngine, the VHeat backbone) and 1
elsewhere; the three OpenMMLab libraries are needed per task and never decide it. Everything is
tried, not only looked up: operators run, a checkpoint is read, a backbone computes. Should the
package itself not import, run this file: ``python path/to/vheat_mm/apis/doctor.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import NamedTuple

OK, WARN, MISSING, BROKEN = 'ok', 'warn', 'missing', 'broken'
CORE = ('Python', 'PyTorch', 'MMEngine', 'VHeat')


@dataclass(frozen=True)
class Row:
    """One line of the table; ``remedy`` is empty where nothing needs doing."""

    name: str
    status: str
    found: str
    remedy: str = ''


class Versions(NamedTuple):
    """Supported range, minimum included and maximum excluded, and the version we ran ourselves."""

    minimum: str
    below: str
    tried: str


VERSIONS = {
    'python': Versions('3.10', '', '3.11.7'),
    'torch': Versions('2.1', '', '2.13.0'),
    'mmengine': Versions('0.10.4', '1.0.0', '0.10.7'),
    # mmdet 3.3.0 and mmsegmentation 1.2.2 assert mmcv < 2.2.0 when they are imported.
    'mmcv': Versions('2.0.0', '2.2.0', '2.1.0'),
    'mmdet': Versions('3.1.0', '3.4.0', '3.3.0'),
    'mmseg': Versions('1.1.0', '1.3.0', '1.2.2'),
    'mmpretrain': Versions('1.1.0', '1.3.0', '1.2.0'),
}
BUILD_MMCV = 'compile it for this torch: .dev_scripts/build_mmcv.sh (or `pip install mmcv==2.1.0 \
--no-build-isolation --no-binary mmcv`)'


class ImportFailedError(Exception):
    """An import that did not work; ``status`` is MISSING where the package is not there at all."""

    def __init__(self, name: str, error: BaseException) -> None:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        self.status = MISSING if absent else BROKEN
        super().__init__(summary(error))


def summary(error: BaseException) -> str:
    """The kind and the first line of an error, without colours, shortened to fit a table."""
    lines = re.sub(r'\x1b\[[0-9;]*m', '', str(error)).strip().splitlines() or ['']
    text = f'{type(error).__name__}: {lines[0]}'
    return text if len(text) <= 160 else text[:157] + '...'


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep import-time chatter out of the table (and out of ``--json``)."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter('ignore')
        yield


def load(name: str) -> ModuleType:
    """Import ``name``; any failure at all, SystemExit included, becomes ImportFailedError."""
    try:
        with quiet():
            return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ImportFailedError(name, error) from error


def numbers(version: str) -> tuple[int, ...]:
    """``'2.13.0+cpu'`` -> (2, 13, 0), for comparison with versions of the table."""
    match = re.match(r'\d+(\.\d+)*', version)
    return tuple(int(part) for part in match.group().split('.')) if match else ()


def range_fault(package: str, version: str) -> str:
    """What is wrong with a version, as words; empty where it lies in the supported range."""
    supported = VERSIONS[package]
    if numbers(version) < numbers(supported.minimum):
        return f'older than {supported.minimum}'
    if supported.below and numbers(version) >= numbers(supported.below):
        return f'not below {supported.below}'
    return ''


def check_python() -> Row:
    version = platform.python_version()
    found = f'{version} ({sys.executable})'
    if fault := range_fault('python', version):
        return Row('Python', BROKEN, f'{found}: {fault}', 'use Python 3.10 or newer')
    return Row('Python', OK, found)


def check_torch() -> Row:
    try:
        torch = load('torch')
    except ImportFailedError as error:
        install = f'pip install torch=={VERSIONS["torch"].tried}'
        return Row('PyTorch', error.status, str(error), install)
    version, cuda = torch.__version__, torch.version.cuda
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = f'{version}, ' + (f'CUDA {cuda}, ' if cuda else '') + (', '.join(devices) or 'CPU only')
    if fault := range_fault('torch', version):
        return Row('PyTorch', BROKEN, f'{found}: {fault}', 'pip install --upgrade torch')
    if not devices and shutil.which('nvidia-smi'):
        remedy = (
            'nvidia-smi is here but torch sees no GPU: '
            + ('the driver may be older than this CUDA' if cuda else 'this torch is a CPU build')
            + "; pick a build at pytorch.org's install page"
        )
        return Row('PyTorch', WARN, found, remedy)
    return Row('PyTorch', OK, found)


def check_numpy() -> Row:
    try:
        numpy, torch = load('numpy'), load('torch')
    except ImportFailedError as error:
        return Row('numpy', error.status, str(error), 'pip install numpy')
    try:
        with quiet():
            torch.zeros(1).numpy()
    except RuntimeError:  # "Numpy is not available": torch was compiled against another major
        remedy = 'torch was built for numpy 1: pip install "numpy<2", or install torch >= 2.3'
        return Row('numpy', BROKEN, f'{numpy.__version__}: torch cannot exchange arrays', remedy)
    return Row('numpy', OK, numpy.__version__)


def check_cv2() -> Row:
    """Four wheels own the same cv2 folder; with two of them, the last one installed is in use."""
    heads = ('opencv-python', 'opencv-contrib-python')
    here = [n for head in heads for n in (head, f'{head}-headless') if distribution_version(n)]
    try:
        cv2 = load('cv2')
    except ImportFailedError as error:
        clean = f'pip uninstall -y {" ".join(here)}; ' if here else ''
        return Row('cv2', error.status, str(error), f'{clean}pip install opencv-python-headless')
    found = f'{cv2.__version__} ({" and ".join(here) or "not from pip"})'
    if len(here) > 1:
        remedy = f'both own cv2/: pip uninstall -y {" ".join(here)}; pip install {here[1]}'
        return Row('cv2', WARN, found, remedy)
    return Row('cv2', OK, found)


def distribution_version(name: str) -> str:
    """The installed version of a distribution, empty where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ''


def check_torchvision() -> Row:
    if not distribution_version('torchvision'):
        remedy = 'mmdet and mmpretrain import it: pip install --no-deps torchvision'
        return Row('torchvision', MISSING, 'not installed', remedy)
    try:
        torchvision = load('torchvision')
        return Row('torchvision', OK, f'{torchvision.__version__}, operators match torch')
    except ImportFailedError as error:
        trouble = str(error)
    try:
        shimmed = load('vheat_mm.utils.torchvision').ensure_torchvision()
    except Exception as error:
        remedy = 'install the torchvision that belongs to this torch'
        return Row('torchvision', BROKEN, f'{trouble}; {summary(error)}', remedy)
    found = f'{shimmed.__version__}, compiled for another torch build; works by our shim'
    remedy = (
        'nothing for tools/ of this repository; other programs: call '
        'vheat_mm.utils.torchvision.ensure_torchvision() first, or install the matching torchvision'
    )
    return Row('torchvision', WARN, found, remedy)


def check_mmengine() -> Row:
    install = f'pip install mmengine=={VERSIONS["mmengine"].tried}'
    try:
        version = load('mmengine').__version__
        load('mmengine.runner')
    except ImportFailedError as error:
        return Row('MMEngine', error.status, str(error), install)
    if fault := range_fault('mmengine', version):
        return Row('MMEngine', BROKEN, f'{version}: {fault}', install)
    return Row('MMEngine', OK, version)


def check_mmcv() -> Row:
    try:
        version = load('mmcv').__version__
    except ImportFailedError as error:
        return Row('mmcv', error.status, str(error), BUILD_MMCV)
    if fault := range_fault('mmcv', version):
        return Row('mmcv', WARN, f'{version}: {fault}', BUILD_MMCV)
    return Row('mmcv', OK, version)


def check_mmcv_ops() -> Row:
    """Load the compiled operators and run two of them on every kind of device there is."""
    if not distribution_version('mmcv'):
        lite = distribution_version('mmcv-lite')
        found = f'mmcv-lite {lite} has no operators' if lite else 'mmcv is not installed'
        remedy = 'pip uninstall -y mmcv-lite; ' * bool(lite) + BUILD_MMCV
        return Row('mmcv.ops', MISSING, found, remedy)
    try:
        ops, torch = load('mmcv.ops'), load('torch')
    except ImportFailedError as error:
        why = 'compiled for another torch' if 'undefined symbol' in str(error) else 'do not load'
        return Row('mmcv.ops', BROKEN, f'{why}: {error}', f'pip uninstall -y mmcv; {BUILD_MMCV}')
    devices = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
    for device in devices:
        boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0]], device=device)
        rois = torch.tensor([[0.0, 0.0, 0.0, 8.0, 8.0]], device=device)
        try:
            kept = ops.nms(boxes, boxes.new_tensor([0.9, 0.8]), 0.5)[1].tolist()
            pooled = ops.roi_align(boxes.new_ones(1, 1, 8, 8), rois, 2)
            right = kept == [0] and bool((pooled == 1).all())
        except RuntimeError as error:
            remedy = 'compiled without CUDA: build it again with nvcc, and FORCE_CUDA=1'
            return Row('mmcv.ops', BROKEN, f'on {device}: {summary(error)}', remedy)
        if not right:
            return Row('mmcv.ops', BROKEN, f'nms or roi_align is wrong on {device}', BUILD_MMCV)
    return Row('mmcv.ops', OK, f'nms and roi_align run on {" and ".join(devices)}')


def check_library(name: str, distribution: str, task: str) -> Row:
    """mmdet, mmseg or mmpretrain: does it import (they assert versions), is it one we support."""
    install = f'for {task}: pip install {distribution}=={VERSIONS[name].tried}'
    with contextlib.suppress(Exception), quiet():  # the row of torchvision reports its troubles
        load('vheat_mm.utils.torchvision').ensure_torchvision()
    try:
        version = load(name).__version__
        load(f'{name}.models')
    except ImportFailedError as error:
        if error.status == MISSING:
            return Row(name, MISSING, 'not installed', install)
        remedy = 'see the rows above; ' * ('mmcv' in str(error)) + install
        if re.search(r"No module named '(ftfy|regex)'", str(error)):
            remedy = 'pip install ftfy regex'
        return Row(name, BROKEN, str(error), remedy)
    if fault := range_fault(name, version):
        return Row(name, WARN, f'{version}: {fault}', install)
    return Row(name, OK, version)


def check_optional(name: str, use: str) -> Row:
    """A package some feature wants."""
    try:
        load(name)
    except ImportFailedError as error:
        return Row(name, error.status, f'{use}: {error}', f'pip install {name}')
    return Row(name, OK, distribution_version(name))


def check_yacs() -> Row:
    version = distribution_version('yacs')
    return Row('yacs', OK, version or 'absent, and not needed: released checkpoints load without it')


def check_safe_load() -> Row:
    """Write a training checkpoint as MMEngine does and read it back with code execution off."""
    torch, numpy = load('torch'), load('numpy')
    load('vheat_mm')
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer(numpy.array([1.0, 2.0]), numpy.array([1, 1]))
    stream = io.BytesIO()
    torch.save(dict(state_dict={}, message_hub=dict(log_scalars={'train/loss': history})), stream)
    stream.seek(0)
    try:
        torch.load(stream, weights_only=True, map_location='cpu')
    except Exception as error:
        remedy = 'call vheat_mm.checkpoint.safe_globals.register_safe_globals(), which needs torch >= 2.5'
        return Row('safe torch.load', WARN, summary(error), remedy)
    return Row('safe torch.load', OK, 'reads MMEngine checkpoints with weights_only=True')


def check_vheat() -> Row:
    """Build the backbone as a config would and compute one image, forward and backward."""
    torch = load('torch')
    load('vheat_mm')
    from mmengine.registry import MODELS

    arch = dict(embed_dims=16, depths=(1, 1, 1, 1), post_norm=False, layer_scale=None)
    backbone = MODELS.build(dict(type='VHeat', arch=arch, img_size=64))
    maps = backbone(torch.rand(1, 3, 64, 64))
    sum(m.square().mean() for m in maps).backward()
    shapes = [tuple(m.shape[1:]) for m in maps]
    if shapes != [(16 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]:
        return Row('VHeat', BROKEN, f'feature maps {shapes}', 'reinstall vheat_mm')
    return Row('VHeat', OK, 'builds from the registry, computes forward and backward')


CHECKS: dict[str, Callable[[], Row]] = {
    'Python': check_python,
    'platform': lambda: Row('platform', OK, f'{platform.platform(terse=True)}, {os.cpu_count()} cores'),
    'PyTorch': check_torch,
    'numpy': check_numpy,
    'MMEngine': check_mmengine,
    'VHeat': check_vheat,
    'safe torch.load': check_safe_load,
    'cv2': check_cv2,
    'torchvision': check_torchvision,
    'mmcv': check_mmcv,
    'mmcv.ops': check_mmcv_ops,
    'mmdet': lambda: check_library('mmdet', 'mmdet', 'detection'),
    'mmseg': lambda: check_library('mmseg', 'mmsegmentation', 'segmentation'),
    'mmpretrain': lambda: check_library('mmpretrain', 'mmpretrain', 'classification'),
    'ftfy': lambda: check_optional('ftfy', 'mmseg imports it'),
    'regex': lambda: check_optional('regex', 'mmseg imports it'),
    'safetensors': lambda: check_optional('safetensors', 'for .safetensors files'),
    'yacs': check_yacs,
}


def examine(checks: dict[str, Callable[[], Row]] = CHECKS) -> list[Row]:
    """Run the checks; one that fails in an unforeseen way is a broken row, never a traceback."""
    rows = []
    for name, check in checks.items():
        try:
            with quiet():
                rows.append(check())
        except Exception as error:
            rows.append(Row(name, BROKEN, summary(error), 'mend the broken rows above first'))
    return rows


def core_works(rows: list[Row]) -> bool:
    return all(row.status in (OK, WARN) for row in rows if row.name in CORE)


def table(rows: list[Row]) -> str:
    """The rows as aligned text, each remedy on a line of its own below its row."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f'{row.status:<8} {row.name:<{width}}  {row.found}'.rstrip())
        if row.remedy:
            lines.append(f'{"":<8} {"":<{width}}  -> {row.remedy}')
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m vheat_mm.doctor',
        description='What of the stack works on this machine, and how to mend what does not.',
    )
    parser.add_argument('--json', action='store_true', help='machine-readable output')
    args = parser.parse_args(argv)
    rows = examine()
    works = core_works(rows)
    if args.json:
        print(json.dumps(dict(core_works=works, rows=[asdict(row) for row in rows]), indent=2))
        return 0 if works else 1
    print(table(rows))
    bad = [row.name for row in rows if row.status in (MISSING, BROKEN)]
    verdict = 'the core works' if works else 'the core does NOT work'
    print(f'\n{verdict}; ' + (f'not available: {", ".join(bad)}' if bad else 'so does the rest'))
    return 0 if works else 1


if __name__ == '__main__':
    if not __package__:  # run as a file: this folder's module names must not shadow others
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    sys.exit(main())
