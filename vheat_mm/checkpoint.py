"""Weights: reading any checkpoint safely, finding the backbone in it, loading it with a report, writing it whole.

Formats understood, all through PyTorch's safe loader or safetensors:

- the release's classification checkpoints: ``model`` and ``model_ema`` dicts, keys without prefix, ``classifier.*``;
- MMEngine's: ``state_dict`` with ``backbone.`` before the backbone's keys and heads beside it;
- a bare state dict, in a torch or a ``.safetensors`` file.

Any other prefix (``module.``, ``module.backbone.``, ``_orig_mod.``) is found by itself.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.logging import print_log
from torch import Tensor

from .archive import CheckpointError, check_safetensors, open_file, printable
from .compat import register_safe_globals
from .content_check import check_content
from .download import download
from .freq_embed import NUM_STAGES

StateDict = dict[str, Tensor]

PARTIAL = '.part'  # ends the names of files being written
ANCHOR = 'patch_embed.conv1.weight'  # present in every vHeat state dict, whatever the task
_ANCHOR_KERNEL = (3, 3, 3)  # its shape but for the channels it makes, half the network's width
MAX_GRID = 1 << 12  # entries a side of an FVE: images of 16384 pixels
_MAX_WIDTH = 1 << 12
# released key -> ours, inside the backbone; and released key -> mmpretrain's, outside of it
_OUT_NORM_OF_CLASSIFIER = ('classifier.0.', 'outnorm3.')
_HEAD_OF_CLASSIFIER = ('classifier.3.', 'head.fc.')


@dataclass
class Weights:
    """Backbone and head weights found in a checkpoint.

    Attributes:
        path: Where they come from.
        entry: The checkpoint's entry they were in, ``'file'`` for a bare state dict.
        prefix: What stood before the backbone's keys.
        backbone: Backbone weights under :class:`~vheat_mm.VHeat`'s keys.
        head: All other weights of the entry, under MMEngine's keys (``head.fc.*`` for a classifier's linear layer) and
            without what wraps the whole model (``module.`` before ``backbone.``).
    """

    path: str
    entry: str
    prefix: str
    backbone: StateDict = field(default_factory=dict)
    head: StateDict = field(default_factory=dict)

    def to_mmengine(self) -> StateDict:
        """The weights as an MMEngine model holds them: ``backbone.`` before the backbone's keys."""
        return {f'backbone.{key}': value for key, value in self.backbone.items()} | self.head


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
            raise CheckpointError(f'{name!r} is damaged or no PyTorch file: {printable(reason)}') from error
        culprit = named.group(1) or named.group(2)
        hint = '' if torch.__version__ >= '2.6' else " (PyTorch >= 2.6 reads the release's yacs configuration)"
        raise CheckpointError(
            f'{name!r} was refused: it holds {culprit!r}, which is neither a tensor nor on the list of harmless '
            f'classes, and loading it could run code{hint}. Ask its author for a file of tensors only.'
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the zip reader or the unpickler
        raise CheckpointError(
            f'{name!r} is truncated, damaged or no PyTorch file ({type(error).__name__}: {printable(error)}); '
            'compare its size with the source and copy it again'
        ) from error


def find_weights(
    checkpoint: dict[str, Any],
    path: str = 'checkpoint',
    prefix: str | None = None,
    ema: bool = False,
) -> Weights:
    """Find the vHeat backbone in a checkpoint of any supported format.

    Args:
        checkpoint: What :func:`read_checkpoint` returns.
        path: Named in errors.
        prefix: What stands before the backbone's keys, where a file holds several backbones.
        ema: Take the exponential moving average. (In MMEngine's files ``state_dict`` holds it already.)

    Raises:
        CheckpointError: No or several vHeat backbones; ``ema`` asked of a file without one; FVEs that are no grid;
            weights that are no plain floating-point numbers.
    """
    entry, state = _select_entry(checkpoint, path, ema)
    prefixes = sorted(key.removesuffix(ANCHOR) for key in state if key.endswith(ANCHOR))
    if prefix is not None:
        prefix = prefix if not prefix or prefix.endswith('.') else f'{prefix}.'
        prefixes = [p for p in prefixes if p == prefix]
    if len(prefixes) > 1:
        raise CheckpointError(
            f'{path!r} holds several vHeat backbones, under {some_of(prefixes)}: choose one with prefix=...'
        )
    if not prefixes:
        wanted = f'{prefix or ""}{ANCHOR}'
        raise CheckpointError(
            f'{path!r} holds no vHeat backbone: none of the {len(state)} keys in its entry {entry!r} '
            f'{"is" if prefix else "ends in"} {wanted!r}; the first are {some_of(list(state), 3)}'
        )
    weights = Weights(path=path, entry=entry, prefix=prefixes[0])
    wrapper = re.sub(r'(?<![^.])(backbone\.)?(_orig_mod\.)?$', '', weights.prefix)
    for key, value in state.items():
        inner = key.removeprefix(weights.prefix)
        if weights.prefix and inner == key:
            weights.head[key.removeprefix(wrapper)] = value
        elif inner.startswith(_HEAD_OF_CLASSIFIER[0]):
            weights.head[inner.replace(*_HEAD_OF_CLASSIFIER, 1)] = value
        else:
            weights.backbone[inner.replace(*_OUT_NORM_OF_CLASSIFIER, 1)] = value
    _check_values(weights)
    return weights


def _check_values(weights: Weights) -> None:
    """Refuse what would be converted in silence or resized without end, and report what is no number."""
    path, width = weights.path, 2 * weights.backbone[ANCHOR].numel() // math.prod(_ANCHOR_KERNEL)
    if width > _MAX_WIDTH:
        raise CheckpointError(f'{path!r} is damaged: {ANCHOR} makes the network {width} channels wide')
    for key, value in weights.backbone.items():
        if not value.is_floating_point():
            raise CheckpointError(
                f'{path!r} is damaged, or no vHeat: {printable(key)} holds {value.dtype}, and weights are '
                'floating-point numbers'
            )
        stage = re.match(r'freq_embed\.(\d)$', key)
        if stage is None:
            continue
        if value.ndim != 3 or not value.numel():
            raise CheckpointError(f'{path!r} is damaged: {key} has shape {tuple(value.shape)} instead of (H, W, C)')
        if max(value.shape[:2]) > MAX_GRID or value.shape[2] != width << int(stage.group(1)):
            raise CheckpointError(
                f'{path!r} is damaged: {key} has shape {tuple(value.shape)}, and a network {width} channels wide has '
                f'(H, W, {width << int(stage.group(1))}) there, with grids of at most {MAX_GRID}'
            )
    broken = [key for key, value in weights.backbone.items() if not _is_finite(value)]
    if broken:
        print_log(f'{path!r} holds NaN or infinity in {some_of(broken)}', logger='current', level=logging.WARNING)


def _is_finite(value: Tensor) -> bool:
    if value.is_meta or value.layout != torch.strided:  # of a caller's own making; files hold none
        return True
    for dim, stride in enumerate(value.stride()):
        if stride == 0:  # one number for all: reading it once will do
            value = value.narrow(dim, 0, min(1, value.shape[dim]))
    if value.numel() == 0 or value.dtype.itemsize == 1:  # PyTorch finds no extremes of 8-bit floats
        return True
    return all(math.isfinite(extreme) for extreme in torch.stack(torch.aminmax(value)).tolist())


def to_mmengine(checkpoint: dict[str, Any], path: str = 'checkpoint') -> StateDict:
    """State dict of any supported checkpoint in MMEngine's spelling; MMEngine's own passes through unchanged."""
    state = checkpoint.get('state_dict')
    if isinstance(state, dict) and any(str(key).endswith(f'backbone.{ANCHOR}') for key in state):
        return state
    return find_weights(checkpoint, path).to_mmengine()


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
            f'could not write {str(target)!r} ({printable(error)}); what was there is untouched. '
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


def freq_embed_grids(backbone: StateDict) -> list[tuple[int, int]]:
    """Grids (H, W) of the FVEs in a backbone's weights, stage by stage."""
    return [
        (value.shape[0], value.shape[1])
        for i in range(NUM_STAGES)
        if (value := backbone.get(f'freq_embed.{i}')) is not None
    ]


def _select_entry(checkpoint: dict[str, Any], path: str, ema: bool) -> tuple[str, StateDict]:
    plain = [name for name in ('model', 'state_dict') if isinstance(checkpoint.get(name), dict)]
    averaged = [name for name in ('model_ema', 'state_dict_ema') if isinstance(checkpoint.get(name), dict)]
    if 'ema_state_dict' in checkpoint and 'state_dict' in plain:
        averaged.append('state_dict')  # MMEngine's EMAHook saves the average there, the raw weights as ema_state_dict
    if ema and not averaged:
        raise CheckpointError(
            f'{path!r} holds no moving average of the weights; its entries are {some_of(list(checkpoint))}. Drop ema.'
        )
    if averaged and not ema and not plain:
        raise CheckpointError(f'{path!r} holds a moving average only ({averaged[0]!r}): ask for it with ema=True')
    names = averaged if ema else plain
    entry, state = (names[0], checkpoint[names[0]]) if names else ('file', checkpoint)
    found = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if wrong := [key for key in found if not isinstance(key, str)]:
        raise CheckpointError(
            f'{path!r} is no checkpoint of a model: its tensors are called {wrong[0]!r}, not by names'
        )
    return entry, found


def _read_safetensors(file: Path) -> StateDict:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise CheckpointError(f'reading {str(file)!r} needs safetensors: pip install safetensors') from error
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own, untyped errors
        raise CheckpointError(f'{str(file)!r} is damaged or no safetensors file: {printable(error)}') from error


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
            raise CheckpointError(f'could not download {url!r} to {str(target)!r}: {printable(error)}') from error
    barrier()
    return target


def some_of(keys: list, limit: int = 8) -> str:
    """The first of some names, and how many more there are, for messages."""
    shown = ', '.join(printable(key) for key in keys[:limit]) or 'none'
    return shown if len(keys) <= limit else f'{shown} and {len(keys) - limit} more'
