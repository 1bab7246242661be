"""Weights: reading any checkpoint safely, finding the backbone in it, loading it with a report, writing it whole.

Formats understood, all through PyTorch's safe loader or safetensors:

- the release's classification checkpoints: ``model`` and ``model_ema`` dicts, keys without prefix, ``classifier.*``;
- MMEngine's: ``state_dict`` with ``backbone.`` before the backbone's keys and heads beside it;
- a bare state dict, in a torch or a ``.safetensors`` file.

Any other prefix (``module.``, ``module.backbone.``, ``_orig_mod.``) is found by itself.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from mmengine.dist import barrier, get_dist_info
from torch import Tensor

from vheat_mm.checkpoint.download import download
from vheat_mm.checkpoint.safe_globals import register_safe_globals
from vheat_mm.checkpoint.verify import check_content
from vheat_mm.checkpoint.zip_layout import check_safetensors, open_file
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line

StateDict = dict[str, Tensor]

PARTIAL = '.part'  # ends the names of files being written


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU without running any code from it.

    Args:
        path: Local path or http(s) address (downloaded once, into PyTorch's hub cache).

    Raises:
        CheckpointError: Missing, truncated or damaged file; a class in it that is not on the allow-list.
    """
    name = os.fspath(path)
    with open_file(str(_download(name)) if re.match(r'https?://', name) else name) as stream:
        if stream.name.endswith('.safetensors'):
            check_safetensors(stream, name)
            return _read_safetensors(Path(stream.name))
        check_content(stream, name)
        checkpoint = _load_safely(stream, name)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{name!r} holds a {type(checkpoint).__name__}, not a checkpoint dict')
    return checkpoint


def _load_safely(stream: IO[bytes], name: str) -> Any:
    register_safe_globals()
    try:
        return torch.load(stream, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r'GLOBAL (\S+)|call reduce for unrecognized function (.+)', str(error))
        if named is None:
            reason = str(error).split('WeightsUnpickler error:')[-1].strip()  # PyTorch's advice before it is unsafe
            raise CheckpointError(f'{name!r} is damaged or no PyTorch file: {first_line(reason)}') from error
        culprit = named.group(1) or named.group(2)
        hint = '' if torch.__version__ >= '2.6' else " (PyTorch >= 2.6 reads the release's yacs configuration)"
        raise CheckpointError(
            f'{name!r} was refused: it holds {culprit!r}, which is neither a tensor nor on the list of harmless '
            f'classes, and loading it could run code{hint}. Ask its author for a file of tensors only.'
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the zip reader or the unpickler
        raise CheckpointError(
            f'{name!r} is truncated, damaged or no PyTorch file ({type(error).__name__}: {first_line(error)}); '
            'compare its size with the source and copy it again'
        ) from error


def save_atomically(checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint so that ``path`` holds either the whole of it or what it held before.

    Args:
        checkpoint: For a ``.safetensors`` path a flat dict of tensors, otherwise anything ``torch.save`` takes.
        path: Target; its folder must exist.

    Raises:
        CheckpointError: No such folder, no permission, disk full, a device in the place. The partial file is removed.
    """
    target = Path(path).expanduser()
    if not target.parent.is_dir():
        raise CheckpointError(f'cannot write {str(target)!r}: there is no folder {str(target.parent)!r}')
    if target.exists() and not target.is_file():
        raise CheckpointError(f'cannot write {str(target)!r}: it is a folder or a device; name a file')
    try:
        with atomic_file(target) as file:
            if target.suffix == '.safetensors':
                from safetensors.torch import save

                file.write(save({key: value.contiguous() for key, value in checkpoint.items()}))
            else:
                torch.save(checkpoint, file)
    except ModuleNotFoundError as error:
        raise CheckpointError(f'writing {str(target)!r} needs safetensors: pip install safetensors') from error
    except (OSError, RuntimeError) as error:  # PyTorch's zip writer turns a full disk into a RuntimeError
        raise CheckpointError(
            f'could not write {str(target)!r} ({first_line(error)}); what was there is untouched. '
            'Free some space or choose another folder.'
        ) from error


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """Open a file beside ``target`` that takes its place once the block has ended well, and is removed otherwise.

    A process killed meanwhile leaves the file behind, named ``.<target>.<random>.part``.
    """
    with tempfile.NamedTemporaryFile(
        dir=target.parent, prefix=f'.{target.name}.', suffix=PARTIAL, delete=False
    ) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            Path(file.name).chmod(0o666 & ~umask)  # temporary files are private; the result is an ordinary file
            Path(file.name).replace(target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Have the rename itself survive a power cut, where the system syncs folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_safetensors(file: Path) -> StateDict:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise CheckpointError(f'reading {str(file)!r} needs safetensors: pip install safetensors') from error
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own, untyped errors
        raise CheckpointError(f'{str(file)!r} is damaged or no safetensors file: {first_line(error)}') from error


def _download(url: str) -> Path:
    target = Path(torch.hub.get_dir()) / 'checkpoints' / url.split('?')[0].rsplit('/', 1)[-1]
    # The first process of each machine: the cache is a folder of the machine's own, and torchrun numbers them.
    rank = int(os.environ.get('LOCAL_RANK', get_dist_info()[0]))
    if rank == 0 and not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as file:
                download(url, file)
        except OSError as error:
            raise CheckpointError(f'could not download {url!r} to {str(target)!r}: {first_line(error)}') from error
    barrier()
    return target
