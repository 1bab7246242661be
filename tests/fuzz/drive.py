"""Give files to every loader in a process that watches itself: code run, memory, time, files written, errors.

python tests/fuzz/drive.py FOLDER < names: one line of JSON for each file
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import load_checkpoint

from vheat_mm import VHeat
from vheat_mm.checkpoint.io import pickle_inspector as pickle_check
from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.checkpoint.verify import verify_file
from vheat_mm.engine import fileio as safe_io
from vheat_mm.models.load_weights import load_pretrained
from vheat_mm.models.weights import find_weights
from vheat_mm.utils.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import interpolate4downstream

ARCH = dict(embed_dims=4, depths=(1, 1, 2, 1), post_norm=False, layer_scale=None)
SECONDS = 30  # per file; the process ends itself then
FACTOR, SPARE = 8, 256 << 20  # bytes of memory allowed per byte of the file, and beside that
_RUNS_CODE = ('os.system', 'os.exec', 'os.fork', 'os.posix_spawn', 'os.spawn', 'subprocess.Popen', 'ctypes.dlopen')


class Watch:
    """Notes what Python's audit events say, while it is on."""

    def __init__(self, allowed: Path) -> None:
        self.allowed = str(allowed)
        self.events: list[str] = []
        self.on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event.startswith(_RUNS_CODE):
            self.events.append(f'{event} {arguments!r}'[:200])
        elif event in ('exec', 'compile'):
            where = getattr(arguments[0], 'co_filename', None) or str(arguments[-1])
            if not Path(where).is_file() and not where.startswith('<frozen'):
                self.events.append(f'{event} {where}'[:200])
        elif event == 'open' and isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            self._hear_write(arguments[0])

    def _hear_write(self, path: str) -> None:
        if not path.startswith((self.allowed, '/dev/null', '/proc/self/')):
            self.events.append(f'wrote {path!r}')


class Loaders:
    """All ways in.

    Args:
        out: Empty folder for what is written; empty again after each file.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.model = VHeat(arch=ARCH, img_size=64)
        self.reached = 0  # calls of PyTorch's loader
        safe_io.install()
        load = torch.load

        def counted(*arguments: Any, **options: Any) -> Any:
            self.reached += 1
            return load(*arguments, **options)

        torch.load = counted

    def ways(self) -> dict[str, Callable[[str], Any]]:
        """Every loader by name; each takes a path."""
        return {
            'verify_file': verify_file,
            'read_checkpoint': read_checkpoint,
            'find_weights': lambda path: find_weights(read_checkpoint(path), path),
            'load_pretrained': lambda path: load_pretrained(self.model, path),
            'init_cfg': self._init_cfg,
            'load_from': self._load_from,
            'interpolate to torch': lambda path: self._interpolate(path, 'out.pth'),
            'interpolate to safetensors': lambda path: self._interpolate(path, 'out.safetensors'),
        }

    def _init_cfg(self, path: str) -> None:
        self.model.init_cfg = dict(type='Pretrained', checkpoint=path)
        self.model._is_init = False
        self.model.init_weights()

    def _load_from(self, path: str) -> None:
        """As MMEngine's runner does in the tools' processes; it looks at the content itself."""
        try:
            load_checkpoint(self.model, path, map_location='cpu')
        except (AttributeError, TypeError) as error:  # MMEngine's, of a dict that holds no weights at all
            raise CheckpointError(f'{path!r}: {type(error).__name__}') from error

    def _interpolate(self, path: str, target: str) -> None:
        arguments = ['--pt_pth', path, '--pt_size', '64', '--tg_size', '96', '--tg_pth', str(self.out / target)]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = interpolate4downstream.main(arguments)
        files = [file.name for file in self.out.iterdir()]
        for name in files:
            if (self.out / name).is_file():
                check_written(self.out / name)
            (self.out / name).unlink()
        assert files == ([target] if status == 0 else []), f'status {status}, files {files}'
        if status:
            text = said.getvalue()
            assert text.startswith('error: '), text
            raise CheckpointError(text.removeprefix('error: ').removesuffix('\n'))


def check_written(path: Path) -> None:
    """What the tool wrote is a checkpoint that loads."""
    find_weights(read_checkpoint(path), str(path))


def judge(path: str, error: Exception) -> str | None:
    """What is wrong with an error, if anything."""
    if not isinstance(error, CheckpointError):
        return f'{type(error).__name__}: {error}'[:300]
    text = str(error)
    if not text.isprintable():
        return f'steers the terminal: {text!r}'[:300]
    if len(text) > 1500 + 2 * len(path):
        return f'{len(text)} characters long: {text[:100]}'
    if "can't allocate" in text or 'MemoryError' in text:
        return f'memory ran out: {text}'[:300]
    return None


def measure(
    loaders: Loaders, watch: Watch, path: str, ways: dict[str, Callable[[str], Any]] | None = None
) -> dict[str, Any]:
    """Give one file to all loaders, or to some."""
    before = _memory('VmRSS')
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')  # forget the peak
    started = time.perf_counter()
    outcomes, findings = {}, []
    loaders.reached = 0
    watch.on = True
    for name, load in (ways or loaders.ways()).items():
        try:
            load(path)
            outcomes[name] = 'loaded'
        except Exception as error:
            outcomes[name] = f'refused: {error}'
            if (wrong := judge(path, error)) is not None:
                findings.append(f'{name}: {wrong}')
    watch.on = False
    findings += watch.events
    watch.events.clear()
    size = os.stat(path).st_size if Path(path).is_file() else 0  # noqa: PTH116
    grown = _memory('VmHWM') - before
    if grown > FACTOR * size + SPARE:
        findings.append(f'memory grew by {grown >> 20} MiB over a file of {size} bytes')
    seconds = time.perf_counter() - started
    return dict(outcomes=outcomes, findings=findings, grown=grown, seconds=seconds, reached=loaders.reached)


def _memory(entry: str) -> int:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{entry}:'):
            return int(line.split()[1]) << 10
    return 0


def limit_memory(spare: int = 4 << 30) -> None:
    """Have allocations fail that would take the machine down."""
    limit = _memory('VmSize') + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(folder: str) -> None:
    """Drive the files named on standard input."""
    out = Path(folder, 'out')
    out.mkdir(exist_ok=True)
    pickle_check.MAX_OPCODES = 100_000  # the same rule in less time
    loaders, watch = Loaders(out), Watch(out)
    warm = Path(folder, 'warm.pth')
    torch.save({'model': loaders.model.state_dict()}, warm)
    measure(loaders, watch, str(warm))  # what is imported late is imported now
    limit_memory()
    # ``init_cfg`` runs load_pretrained, which runs find_weights.
    ways = {name: way for name, way in loaders.ways().items() if name not in ('find_weights', 'load_pretrained')}
    for line in sys.stdin:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        found = measure(loaders, watch, json.loads(line), ways)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(found), flush=True)


if __name__ == '__main__':
    main(sys.argv[1])
