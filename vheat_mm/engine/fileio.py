"""Safe reading and atomic writing of files in MMEngine.

Importing this module makes all loaders of MMEngine drop text that it would execute, and weights that do not fit a vHeat
an error; :func:`install`, for the processes of the tools, replaces the loaders.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import mimetypes
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import mmengine.runner.checkpoint
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader

from vheat_mm.checkpoint.io import read_checkpoint, read_stream
from vheat_mm.checkpoint.released import BASE, find_released
from vheat_mm.datasets.checks.images import read_header, read_image, refuse_size
from vheat_mm.engine.by_name import dataset_meta
from vheat_mm.models.find_weights import ANCHOR
from vheat_mm.models.pretrained_init import replace_pretrained_init, to_mmengine
from vheat_mm.models.weights import SOURCE
from vheat_mm.utils.files import atomic_file, open_regular, read_regular

_said: set[str] = set()
_CODE = {'meta': ('config', 'cfg'), 'runtime_info': ('cfg',)}  # executed by Runner.resume and BaseInferencer


def drop_code(checkpoint: Any, source: str) -> None:
    """Remove the texts of configs from a checkpoint, in place, and log it once per file.

    MMEngine reads them with ``Config.fromstring``, which executes them as Python; and a config builds its model from
    names of any class or function.

    Args:
        checkpoint: What a loader returned.
        source: Named in the log.
    """
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    hub = parts.get('message_hub')
    parts = {'meta': parts.get('meta'), 'runtime_info': hub.get('runtime_info') if isinstance(hub, dict) else None}
    dropped = []
    for name, keys in _CODE.items():
        part = parts[name]
        for key in keys if isinstance(part, dict) else ():
            if part.pop(key, None) is not None:
                dropped.append(f'{name}.{key}')
    if dropped and source not in _said:
        _said.add(source)
        print_log(
            f'{source}: its config ({", ".join(dropped)}) is not used, because MMEngine would execute it; '
            'inferencers need the config file beside the weights: model=CONFIG, weights=CHECKPOINT',
            'current',
            logging.INFO,
        )


def _prepared(load: Callable) -> Callable:
    @functools.wraps(load)
    def loader(filename: str, *args: Any, **options: Any) -> Any:
        checkpoint = load(filename, *args, **options)
        drop_code(checkpoint, filename)
        weights = checkpoint.get('model') if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint else None
        # Of a classifier in the release's format MMEngine would load nothing, with a warning.
        return _as_mmengine(checkpoint, filename) if isinstance(weights, dict) and ANCHOR in weights else checkpoint

    return loader


def _as_mmengine(checkpoint: dict[str, Any], source: str) -> dict[str, Any]:
    """With MMEngine's entry. What for is not known here: as for a model to use, see :func:`find_weights`."""
    found = to_mmengine(checkpoint, None, source, ema=None)
    state: Any = OrderedDict(found)
    state._metadata = {**getattr(found, '_metadata', {}), 'backbone': {'version': 1, SOURCE: source}}
    return {**checkpoint, 'state_dict': state}


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """MMEngine's checkpoint loader, replaced by :func:`vheat_mm.checkpoint.read_checkpoint`.

    Args:
        filename: Path or address.
        map_location: Ignored: tensors stay on the CPU until they are copied into the model.
    """
    checkpoint = read_checkpoint(filename)
    drop_code(checkpoint, filename)
    return checkpoint


def load_from_release(filename: str, map_location: Any = None) -> dict[str, Any]:
    """MMEngine's checkpoint loader for published weights, by name or address of the release: under MMEngine's keys.

    Args:
        filename: See :data:`vheat_mm.checkpoint.released.RELEASES`.
        map_location: Ignored, as by :func:`load_from_local`.

    Raises:
        CheckpointError: No published weights have that name.
    """
    checkpoint = _as_mmengine(load_from_local(filename), filename)
    meta, release = checkpoint.setdefault('meta', {}), find_released(filename)
    # Without class names mmseg's inferencer would show those of Cityscapes.
    if release and 'dataset_meta' not in meta and (classes := dataset_meta(release)):
        meta['dataset_meta'] = classes
    return checkpoint


for _prefix, _loader in list(CheckpointLoader._schemes.items()):
    CheckpointLoader.register_scheme(_prefix, _prepared(_loader), force=True)
# MMEngine takes the first pattern that matches, in reverse order: the release's address comes before 'https://'.
# A word with vheat in it is a name; the known ones are listed for a wrong one.
_RELEASED = (r'(?i)[\w-]*vheat[\w-]*$', re.escape(BASE))
CheckpointLoader.register_scheme(_RELEASED, load_from_release)
replace_pretrained_init(everywhere=False)


def _load_without_fallback(
    file: str | IO[bytes], map_location: Any = None, weights_only: bool | None = None
) -> dict[str, Any]:
    """In place of onedl-mmengine's function, which loads a file that the safe loader refuses with the unsafe one."""
    return read_checkpoint(file) if isinstance(file, str | os.PathLike) else read_stream(file, 'the checkpoint')


def install() -> None:
    """Make MMEngine use :func:`load_from_local`, :class:`AtomicLocalBackend` and strict weights in this process."""
    replace_pretrained_init(everywhere=True)
    register_backend('local', AtomicLocalBackend, prefixes='', force=True)
    # Published weights too: CheckpointCheckHook chooses among their entries, and compares them.
    prefixes = ('', 'http://', 'https://', *_RELEASED)
    CheckpointLoader.register_scheme(prefixes=prefixes, loader=load_from_local, force=True)
    refuse_unsafe_loading()


def refuse_unsafe_loading() -> None:
    """Make onedl-mmengine's loaders refuse what PyTorch's safe loader refuses; other versions do so by themselves."""
    if hasattr(mmengine.runner.checkpoint, '_safe_torch_load'):
        mmengine.runner.checkpoint._safe_torch_load = _load_without_fallback


class AtomicLocalBackend(LocalBackend):
    """MMEngine's local backend, which writes a temporary file and renames it, and reads regular files only.

    A full disk, or a kill while writing, leaves the earlier file as it was. Named pipes and devices would block, and
    images of too many pixels take gigabytes: they are refused, as by ``tools/misc/check_dataset.py``.
    """

    def get(self, filepath: str | Path) -> bytes:
        """Read a file. Raises OSError if it is no regular one, or an image with too many pixels."""
        is_image = (mimetypes.guess_type(str(filepath))[0] or '').startswith('image/')
        content = read_image(filepath) if is_image else read_regular(filepath)
        if reason := refuse_size(content, read_header(content)):
            raise OSError(f'{filepath}: {reason}')
        return content

    def get_text(self, filepath: str | Path, encoding: str = 'utf-8') -> str:
        """Read a text file. Raises OSError if it is no regular one."""
        with io.TextIOWrapper(open_regular(filepath), encoding=encoding) as file:
            return file.read()

    @contextlib.contextmanager
    def get_local_path(self, filepath: str | Path) -> Iterator[str | Path]:
        """The path itself. Raises OSError if it is neither a regular file nor a folder."""
        if not Path(filepath).is_dir():
            open_regular(filepath).close()
        yield filepath

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` and create missing folders. Raises OSError with the path on failure."""
        target = Path(filepath)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_file(target) as file:
                file.write(obj)
        except OSError as error:
            raise OSError(error.errno, f'{error.strerror} while writing', str(target)) from error

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text, as :meth:`put`."""
        self.put(obj.encode(encoding), filepath)
