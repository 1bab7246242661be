"""Resizing a checkpoint's frequency value embeddings (FVEs) for another image size, for interpolate4downstream.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vheat_mm.checkpoint.io import StateDict, files_of, find_checkpoint, read_checkpoint, save_atomically
from vheat_mm.models.find_weights import MAX_GRID, Weights, find_weights
from vheat_mm.models.weights import Variant
from vheat_mm.ops.freq_embed import NUM_STAGES, grid_sizes, resize_freq_embed
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line


@dataclass
class Resized:
    """A checkpoint with resized FVEs.

    Attributes:
        weights: Backbone and head, resized.
        grids: Grid (H, W) of each stage before and after.
        files: All that were read.
    """

    weights: Weights
    grids: list[tuple[tuple[int, int], tuple[int, int]]]
    files: list[Path]

    def table(self) -> str:
        """The old and new grids, as text."""
        name = Variant.of(self.weights.backbone).name
        lines = [f'{name} from {self.weights.path!r}, entry {self.weights.entry!r}']
        for i, (old, new) in enumerate(self.grids):
            lines.append(f'  freq_embed.{i}  {old[0]:4d} x {old[1]:<4d} -> {new[0]:4d} x {new[1]:<4d}')
        carried = len(self.weights.backbone) + len(self.weights.head) - len(self.grids)
        lines.append(f'  {carried} other tensors unchanged, {len(self.weights.head)} of them of heads')
        return '\n'.join(lines)

    def released_keys(self) -> StateDict:
        """The weights under the release's keys, with the classifier where there is one."""
        head = {key: value for key, value in self.weights.head.items() if key.startswith('head.fc.')}
        if not head:
            return dict(self.weights.backbone)
        renamed = {key.replace('outnorm3.', 'classifier.0.', 1): value for key, value in self.weights.backbone.items()}
        return renamed | {key.replace('head.fc.', 'classifier.3.', 1): value for key, value in head.items()}


def resize_checkpoint(
    path: str,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
    mode: str = 'pad',
    ema: bool = False,
    prefix: str | None = None,
) -> Resized:
    """Read a checkpoint and resize its FVEs from one image size to another.

    Args:
        path: Any checkpoint that :func:`~vheat_mm.checkpoint.read_checkpoint` reads.
        source_size: Image size (height, width) of the file's grid, in pixels; checked against the file.
        target_size: Image size (height, width) wanted.
        mode: See :mod:`vheat_mm.ops.freq_embed`.
        ema: Take the moving average.
        prefix: See :func:`~vheat_mm.models.find_weights.find_weights`.

    Raises:
        CheckpointError: The file is unreadable, not a vHeat, re-parameterised, or of another grid than ``source_size``
            gives; the target does not fit in memory.
    """
    if max(target_size) > 4 * MAX_GRID:
        raise CheckpointError(f'--tg_size {target_size[0]} {target_size[1]} is more than {4 * MAX_GRID} pixels a side')
    place = find_checkpoint(path)
    weights = find_weights(read_checkpoint(place), path, prefix, ema)
    keys = [f'freq_embed.{stage}' for stage in range(NUM_STAGES) if f'freq_embed.{stage}' in weights.backbone]
    old = [(weights.backbone[key].shape[0], weights.backbone[key].shape[1]) for key in keys]
    if not old:
        raise CheckpointError(
            f'{path!r} holds no frequency value embeddings: it is re-parameterised for one resolution and cannot be '
            'resized; take the checkpoint it was made from'
        )
    if old != grid_sizes(source_size)[: len(old)]:
        grids = ', '.join(f'{h}x{w}' for h, w in old)
        height, width = 4 * old[0][0], 4 * old[0][1]
        if old != grid_sizes((height, width))[: len(old)]:
            raise CheckpointError(
                f'the grids in {path!r} are {grids}, which no image size gives (each stage halves the one before, '
                "rounded up): load the file itself, init_cfg=dict(type='Pretrained', ...) resizes any grid"
            )
        raise CheckpointError(
            f'the grids in {path!r} are {grids}, as of images of {height}x{width} pixels, not of '
            f'--pt_size {source_size[0]}x{source_size[1]}: pass --pt_size {height} {width}'
        )
    new = grid_sizes(target_size)[: len(old)]
    for key, grid in zip(keys, new, strict=True):
        try:
            weights.backbone[key] = resize_freq_embed(weights.backbone[key], grid, mode)
        except RuntimeError as error:  # PyTorch's allocator
            raise CheckpointError(
                f'{key} of {path!r} cannot be made {grid[0]}x{grid[1]}: {first_line(error)}; choose a smaller --tg_size'
            ) from error
    return Resized(weights, list(zip(old, new, strict=True)), files_of(place))


def check_target(resized: Resized, target: str) -> None:
    """Refuse to write over the input, also through another name or a link.

    Raises:
        CheckpointError: The target is the input.
    """
    wanted = Path(target).expanduser()
    if wanted.exists() and any(file.samefile(wanted) for file in resized.files):
        raise CheckpointError(f'{target!r} is the input itself: choose another --tg_pth, the input is never written')


def write_resized(resized: Resized, target: str) -> None:
    """Write the tensors atomically.

    A torch file holds them under two sets of keys that share their storage: ``model`` with the release's keys and
    ``state_dict`` with MMEngine's. A ``.safetensors`` file holds the first only.

    Raises:
        CheckpointError: The target is the input; it cannot be written.
    """
    check_target(resized, target)
    if Path(target).suffix == '.safetensors':
        save_atomically(resized.released_keys(), target)
    else:
        save_atomically({'model': resized.released_keys(), 'state_dict': resized.weights.to_mmengine()}, target)
