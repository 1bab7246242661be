"""Environment check: which packages work on this machine, and how to repair those that do not.

    vheat-doctor [--json], python -m vheat_mm.doctor [--json]

The exit status is 0 if the core works (Python, PyTorch, MMEngine, the VHeat backbone) and 1 otherwise; each of the
OpenMMLab libraries is needed for its task only and does not change it. Packages are used, not only looked up: operators
run, a checkpoint is read, a backbone computes. Supported versions come from the metadata of the installed packages.

It imports nothing of its package, so that ``python path/to/vheat_mm/apis/doctor.py`` runs where that fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import io
import json
import operator
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
except ModuleNotFoundError:  # it comes with matplotlib, which MMEngine requires
    SpecifierSet = None  # type: ignore[assignment, misc]

OK, WARN, MISSING, BROKEN = 'ok', 'warn', 'missing', 'broken'
CORE = ('Python', 'PyTorch', 'MMEngine', 'VHeat')
# Maintained forks of OpenMMLab's distributions, with the same import names.
FORKS = {name: f'onedl-{name}' for name in ('mmengine', 'mmcv', 'mmsegmentation', 'mmpretrain')}
FORKS['mmdet'] = 'onedl-mmdetection'
EXTRAS = ('', 'det', 'seg', 'cls', 'mim', 'mminstall')  # in which packages say which of these they work with


@dataclass(frozen=True)
class Row:
    """One line of the table; ``remedy`` is empty if there is nothing to repair."""

    name: str
    status: str
    found: str
    remedy: str = ''


class ImportFailedError(Exception):
    """A failed import; ``status`` is MISSING if the package is not installed."""

    def __init__(self, name: str, error: BaseException) -> None:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        self.status = MISSING if absent else BROKEN
        super().__init__(summary(error))


def summary(error: BaseException) -> str:
    """An error's type and the first line of its message, as :func:`vheat_mm.utils.text.summarize_error`."""
    lines = re.sub(r'\x1b\[[0-9;]*m', '', str(error)).strip().splitlines() or ['']
    text = f'{type(error).__name__}: {lines[0]}'
    return text if len(text) <= 160 else text[:157] + '...'


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and prints of imports out of the table and of ``--json``."""
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter('ignore')
        yield


def load(name: str) -> ModuleType:
    """Import a module; any failure, SystemExit included, becomes ImportFailedError."""
    try:
        with quiet():
            return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ImportFailedError(name, error) from error


@functools.cache
def supported(distribution: str) -> SpecifierSet | None:
    """Versions of a distribution that vheat_mm and the installed libraries require; ``None`` if nothing says so."""
    if SpecifierSet is None:
        return None
    found = []
    for owner in ('vheat_mm', *FORKS, *FORKS.values()):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for requirement in map(Requirement, importlib.metadata.requires(owner) or ()):
                valid = not requirement.marker or any(requirement.marker.evaluate({'extra': e}) for e in EXTRAS)
                if valid and requirement.name in (distribution, FORKS.get(distribution)):
                    found.append(requirement.specifier)
    return functools.reduce(operator.and_, found) if found else None


def range_fault(distribution: str, version: str) -> str:
    """``'not in <2.2.0,>=2.0.0'``, empty for a version that is supported or of which nothing is known."""
    versions = supported(distribution)
    return '' if versions is None or versions.contains(version, prereleases=True) else f'not in {versions}'


def install(distribution: str, options: str = '') -> str:
    """The pip command that installs a supported version."""
    versions = supported(distribution) or ''
    if distribution_version('onedl-mmengine'):
        distribution = FORKS.get(distribution, distribution)
        options = options.replace('mmcv', 'onedl-mmcv')
    return f"pip install {options}'{distribution}{versions}'" if versions else f'pip install {options}{distribution}'


def build_mmcv() -> str:
    """How to compile mmcv for the installed torch."""
    command = install('mmcv', '--no-build-isolation --no-binary mmcv ')
    return f'compile it for this torch: .dev_scripts/build_mmcv.sh (or {command})'


def check_package(name: str, modules: tuple[str, ...], distribution: str, remedy: str = '', outside: str = WARN) -> Row:
    """Import modules of one distribution; ``outside`` is the status of an unsupported version."""
    remedy = remedy or install(distribution)
    try:
        loaded = [load(module) for module in modules]
    except ImportFailedError as error:
        return Row(name, error.status, str(error), remedy)
    version, fork = loaded[0].__version__, FORKS.get(distribution, distribution)
    if fault := range_fault(distribution, version):
        return Row(name, outside, f'{version}: {fault}', remedy)
    if not (forked := distribution_version(fork)) or fork == distribution:
        return Row(name, OK, version)
    if distribution_version(distribution) == forked:
        return Row(name, OK, f'{version} ({fork})')
    remedy = f'pip uninstall -y {distribution} {fork}; pip install --no-deps {fork}'
    return Row(name, WARN, f'{version}: {distribution} and {fork} are both installed, over each other', remedy)


def check_metadata() -> Row:
    """This package's own metadata, which says the supported versions."""
    version = distribution_version('vheat_mm')
    if version and SpecifierSet is not None:
        return Row('vheat_mm', OK, version)
    remedy = 'pip install packaging' if version else 'pip install -e . in the source folder'
    return Row('vheat_mm', WARN, f'{version or "not installed"}: supported versions are unknown', remedy)


def check_python() -> Row:
    version = platform.python_version()
    found = f'{version} ({sys.executable})'
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        required = importlib.metadata.metadata('vheat_mm')['Requires-Python'] or ''
        if SpecifierSet is not None and not SpecifierSet(required).contains(version, prereleases=True):
            return Row('Python', BROKEN, f'{found}: not in {required}', f'use Python {required}')
    return Row('Python', OK, found)


def check_torch() -> Row:
    try:
        torch = load('torch')
    except ImportFailedError as error:
        return Row('PyTorch', error.status, str(error), install('torch'))
    version, cuda = torch.__version__, torch.version.cuda
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = f'{version}, ' + (f'CUDA {cuda}, ' if cuda else '') + (', '.join(devices) or 'CPU only')
    if fault := range_fault('torch', version):
        return Row('PyTorch', BROKEN, f'{found}: {fault}', install('torch', '--upgrade '))
    if not devices and shutil.which('nvidia-smi'):
        why = 'the driver may be older than this CUDA' if cuda else 'this torch is a CPU build'
        remedy = f"nvidia-smi is here but torch sees no GPU: {why}; pick a build at pytorch.org's install page"
        return Row('PyTorch', WARN, found, remedy)
    return Row('PyTorch', OK, found)


def check_numpy() -> Row:
    try:
        numpy, torch = load('numpy'), load('torch')
        with quiet():
            torch.zeros(1).numpy()
    except ImportFailedError as error:
        return Row('numpy', error.status, str(error), 'pip install numpy')
    except RuntimeError:  # "Numpy is not available": torch was compiled against another major
        remedy = 'torch was built for numpy 1: pip install "numpy<2", or install torch >= 2.3'
        return Row('numpy', BROKEN, f'{numpy.__version__}: torch cannot exchange arrays', remedy)
    return Row('numpy', OK, numpy.__version__)


def check_cv2() -> Row:
    """Four distributions install the same cv2 folder; of two, the one installed last is in use."""
    heads = ('opencv-python', 'opencv-contrib-python')
    here = [n for head in heads for n in (head, f'{head}-headless') if distribution_version(n)]
    try:
        cv2 = load('cv2')
    except ImportFailedError as error:
        clean = f'pip uninstall -y {" ".join(here)}; ' if here else ''
        return Row('cv2', error.status, str(error), f'{clean}pip install opencv-python-headless')
    found = f'{cv2.__version__} ({" and ".join(here) or "not from pip"})'
    if len(here) > 1:
        remedy = f'both install cv2/: pip uninstall -y {" ".join(here)}; pip install {here[1]}'
        return Row('cv2', WARN, found, remedy)
    return Row('cv2', OK, found)


def distribution_version(name: str) -> str:
    """The installed version of a distribution or of its fork, empty if neither is installed."""
    for each in dict.fromkeys((name, FORKS.get(name, name))):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(each)
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
    found = f'{shimmed.__version__}, compiled for another torch build; works with ensure_torchvision()'
    remedy = 'tools/ need nothing; other programs: vheat_mm.utils.torchvision.ensure_torchvision(), or another build'
    return Row('torchvision', WARN, found, remedy)


def check_mmcv_ops() -> Row:
    """Run two of the compiled operators on the CPU and, if there is one, on the GPU."""
    if not distribution_version('mmcv'):
        lite = distribution_version('mmcv-lite')
        found = f'mmcv-lite {lite} has no operators' if lite else 'mmcv is not installed'
        return Row('mmcv.ops', MISSING, found, 'pip uninstall -y mmcv-lite; ' * bool(lite) + build_mmcv())
    try:
        ops, torch = load('mmcv.ops'), load('torch')
    except ImportFailedError as error:
        why = 'compiled for another torch' if 'undefined symbol' in str(error) else 'do not load'
        return Row('mmcv.ops', BROKEN, f'{why}: {error}', f'pip uninstall -y mmcv; {build_mmcv()}')
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
            return Row('mmcv.ops', BROKEN, f'nms or roi_align is wrong on {device}', build_mmcv())
    return Row('mmcv.ops', OK, f'nms and roi_align run on {" and ".join(devices)}')


def check_library(name: str, distribution: str, task: str) -> Row:
    """mmdet, mmseg or mmpretrain, which check versions of other packages when they are imported."""
    remedy = f'for {task}: {install(distribution)}'
    with contextlib.suppress(Exception), quiet():  # a failure is reported by the row of torchvision
        load('vheat_mm.utils.torchvision').ensure_torchvision()
    row = check_package(name, (name, f'{name}.models'), distribution, remedy)
    if row.status == BROKEN and re.search(r"No module named '(ftfy|regex)'", row.found):
        return replace(row, remedy='pip install ftfy regex')
    if row.status == BROKEN and 'mmcv' in row.found:
        return replace(row, remedy=f'see the rows above; {remedy}')
    return replace(row, found='not installed') if row.status == MISSING else row


def check_transformers() -> Row:
    """transformers, which mmpretrain imports for its multi-modal models wherever it is installed."""
    version, name = distribution_version('transformers'), 'transformers'
    needed = version and distribution_version('mmpretrain')
    if not needed or (fault := load('vheat_mm.utils.transformers').multimodal_fault()) is None:
        return Row(name, OK, version or 'not installed, not needed')
    remedy = f"tools/ need nothing; other programs: import vheat_mm before mmdet, or pip install '{fault[1]}'"
    return Row(name, WARN, fault[0], remedy)


def check_optional(name: str, use: str, distribution: str = '') -> Row:
    """An optional package, or one that another package forgets to require."""
    try:
        load(name)
    except ImportFailedError as error:
        return Row(name, error.status, f'{use}: {error}', install(distribution or name))
    return Row(name, OK, distribution_version(distribution or name))


def check_safe_load() -> Row:
    """Save a training checkpoint as MMEngine does, and read it with PyTorch's safe loader."""
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
    """Build the backbone from the registry, and run it forward and backward on one image."""
    torch = load('torch')
    load('vheat_mm')
    from mmengine.registry import MODELS

    arch = dict(embed_dims=16, depths=(1, 1, 1, 1), post_norm=False, layer_scale=None)
    backbone = MODELS.build(dict(type='VHeat', arch=arch, img_size=64))
    maps = backbone(torch.rand(1, 3, 64, 64))
    sum(m.square().mean() for m in maps).backward()
    if (shapes := [tuple(m.shape[1:]) for m in maps]) != [(16 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]:
        return Row('VHeat', BROKEN, f'feature maps {shapes}', 'reinstall vheat_mm')
    return Row('VHeat', OK, 'builds from the registry, computes forward and backward')


CHECKS: dict[str, Callable[[], Row]] = {
    'Python': check_python,
    'vheat_mm': check_metadata,
    'platform': lambda: Row('platform', OK, f'{platform.platform(terse=True)}, {os.cpu_count()} cores'),
    'PyTorch': check_torch,
    'numpy': check_numpy,
    'MMEngine': lambda: check_package('MMEngine', ('mmengine', 'mmengine.runner'), 'mmengine', outside=BROKEN),
    'VHeat': check_vheat,
    'safe torch.load': check_safe_load,
    'pkg_resources': lambda: check_optional('pkg_resources', "MMEngine's bases in configs need it", 'setuptools'),
    'cv2': check_cv2,
    'torchvision': check_torchvision,
    'mmcv': lambda: check_package('mmcv', ('mmcv',), 'mmcv', build_mmcv()),
    'mmcv.ops': check_mmcv_ops,
    'mmdet': lambda: check_library('mmdet', 'mmdet', 'detection'),
    'mmseg': lambda: check_library('mmseg', 'mmsegmentation', 'segmentation'),
    'mmpretrain': lambda: check_library('mmpretrain', 'mmpretrain', 'classification'),
    'transformers': check_transformers,
    'ftfy': lambda: check_optional('ftfy', 'mmseg imports it'),
    'regex': lambda: check_optional('regex', 'mmseg imports it'),
    'safetensors': lambda: check_optional('safetensors', 'for .safetensors files'),
}


def examine(checks: dict[str, Callable[[], Row]] = CHECKS) -> list[Row]:
    """Run the checks; an unexpected error of a check becomes a broken row."""
    rows = []
    for name, check in checks.items():
        try:
            with quiet():
                rows.append(check())
        except Exception as error:
            rows.append(Row(name, BROKEN, summary(error), 'repair the broken rows above first'))
    return rows


def core_works(rows: list[Row]) -> bool:
    return all(row.status in (OK, WARN) for row in rows if row.name in CORE)


def table(rows: list[Row]) -> str:
    """The rows as aligned text, each remedy on a line below its row."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f'{row.status:<8} {row.name:<{width}}  {row.found}'.rstrip())
        if row.remedy:
            lines.append(f'{"":<8} {"":<{width}}  -> {row.remedy}')
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser('vheat-doctor', description=str(__doc__).splitlines()[0])
    parser.add_argument('--json', action='store_true', help='machine-readable output')
    args = parser.parse_args(argv)
    rows = examine()
    works = core_works(rows)
    if args.json:
        print(json.dumps(dict(core_works=works, rows=[asdict(row) for row in rows]), indent=2))
    else:
        bad = ', '.join(row.name for row in rows if row.status in (MISSING, BROKEN))
        verdict = 'the core works' if works else 'the core does NOT work'
        print(f'{table(rows)}\n\n{verdict}; ' + (f'not available: {bad}' if bad else 'so does the rest'))
    return 0 if works else 1


if __name__ == '__main__':
    if not __package__:  # run as a file: import from the source folder, not from this one
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.exit(main())
