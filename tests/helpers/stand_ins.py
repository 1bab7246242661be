"""Stand-ins for the published checkpoints and for the server that they come from.

The checkpoints have the release's file names, formats, keys and shapes. Their weights are windows into a few random
numbers, so a file has less than a megabyte, no two rows of a tensor are alike, and loading takes the usual memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from vheat_mm.checkpoint.released import NAMES, find_released

DATA = Path(__file__).parents[1] / 'data'
_TASKS = dict(vheatdet='detection', vheatseg='segmentation')


def fill(shapes: dict[str, Iterable[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of these shapes: norms near 1, everything else small, all distinct and cheap to store."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        shape = tuple(shape)
        if key.endswith('num_batches_tracked'):
            state[key] = torch.tensor(1)
            continue
        numbers = 0.02 * torch.randn(sum(side - 1 for side in shape) + 1, generator=generator)
        scales = (len(shape) == 1 and key.endswith('weight')) or key.endswith('running_var')
        state[key] = (numbers + float(scales)).as_strided(shape, [1] * len(shape))
    return state


def released_state(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under the release's keys: a classifier's, or a whole detector's or segmentor's (mmdet, mmseg needed)."""
    release = find_released(name)
    if release.name.startswith('vheat_'):
        content = json.loads((DATA / f'state_dict_{release.name.removeprefix("vheat_")}.json').read_text())
        return fill(content['classifier_224'], seed)
    from config_models import load
    from mmengine.registry import MODELS

    from vheat_mm.utils.torchvision import ensure_torchvision

    ensure_torchvision()
    cfg = load(f'{_TASKS[release.path.split("/")[0]]}/{release.config}.py')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    return fill({key: value.shape for key, value in model.state_dict().items()}, seed)


def released_checkpoint(name: str, seed: int = 0, ema: bool = False) -> dict:
    """A checkpoint in the release's format; ``ema`` adds the other weights that a classifier's may hold."""
    state = released_state(name, seed)
    if not find_released(name).name.startswith('vheat_'):
        return dict(meta=dict(epoch=12, iter=87960), state_dict=state, message_hub={})
    average = dict(model_ema=released_state(name, seed + 1)) if ema else {}
    return dict(model=state, epoch=299, max_accuracy=82.2, **average)


def write_release(folder: Path, names: Iterable[str] = NAMES, flat: bool = False, **options: object) -> Path:
    """Write stand-ins of these published checkpoints, for ``VHEAT_WEIGHTS=folder``; returns the folder.

    Args:
        folder: Created if it does not exist.
        names: Names of the published checkpoints.
        flat: All in one folder instead of the release's three.
        options: Of :func:`released_checkpoint`.
    """
    for name in names:
        path = find_released(name).path
        target = folder / (Path(path).name if flat else path)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(released_checkpoint(name, **options), target)
    return folder


class StandInServer(http.server.ThreadingHTTPServer):
    """Serves a folder on the loopback as a file server on the internet would, with ``Range`` and ``ETag``, and badly.

    Attributes:
        folder: What is served.
        requests: Path and ``Range`` header of each request.
        statuses: Of the answers.
        full: How often each path was sent from its first byte to its last.
        fault: What it does badly, also in answers under way; several may be in the text: ``'missing'`` (404);
            ``'html'`` (a page with status 200); ``'cut'`` (half of what is asked for, then the end of the connection);
            ``'slow'`` (4 kB each 0.1 s); ``'no range'``; ``'no if-range'``; ``'wrong range'`` (one byte too early);
            ``'no validators'``; ``'no length'``; ``'gzip'``.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.folder, self.fault = folder, ''
        self.requests: list[tuple[str, str | None]] = []
        self.statuses: list[int] = []
        self.full: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'


class _Handler(http.server.BaseHTTPRequestHandler):
    server: StandInServer

    def do_GET(self) -> None:
        server, path = self.server, self.path.split('?')[0].lstrip('/')
        wanted = self.headers.get('Range')
        server.requests.append((path, wanted))
        fault, file = server.fault, server.folder / path
        if 'html' in fault:
            self._answer(200, b'<!DOCTYPE html><title>Please sign in</title>', {'Content-Type': 'text/html'})
        elif 'missing' in fault or not file.is_file():
            self.send_error(404)
        else:
            content = file.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            headers = {'Content-Type': 'application/octet-stream'}
            if 'no validators' not in fault:
                headers['ETag'] = tag
            if 'gzip' in fault:
                headers['Content-Encoding'] = 'gzip'
            start = 0
            same = 'no if-range' in fault or self.headers.get('If-Range', tag) == tag
            if wanted and 'no range' not in fault and same:
                start = int(wanted.removeprefix('bytes=').split('-')[0]) - ('wrong range' in fault)
                if start >= len(content):
                    self._answer(416, b'', {'Content-Range': f'bytes */{len(content)}'})
                    return
                headers['Content-Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
            if self._answer(206 if start else 200, content[start:], headers) and not start:
                server.full[path] += 1

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> bool:
        """Send it; returns whether all of it was sent."""
        self.server.statuses.append(status)
        self.send_response(status)
        length = {} if 'no length' in self.server.fault else {'Content-Length': str(len(body))}
        for name, value in (headers | length).items():
            self.send_header(name, value)
        self.end_headers()
        end = len(body) // 2 if 'cut' in self.server.fault else len(body)
        place = 0
        with contextlib.suppress(OSError):
            while place < end:
                slow = 'slow' in self.server.fault
                size = 4096 if slow else 1 << 20
                self.wfile.write(body[place : min(place + size, end)])
                place += size
                time.sleep(0.1 * slow)
            return end == len(body)
        return False

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[StandInServer]:
    """A running :class:`StandInServer`."""
    with StandInServer(folder) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()
