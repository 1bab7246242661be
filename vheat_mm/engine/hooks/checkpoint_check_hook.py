"""Weights go into the model entirely, or the run ends."""

from __future__ import annotations

import re
from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from vheat_mm.models.load_weights import describe_weights
from vheat_mm.models.weights import find_weights
from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import some_of

StateDict = dict[str, Tensor]

_FREQ_EMBED = re.compile(r'(?:.*\.)?freq_embed\.\d$')
_OUT_NORM = re.compile(r'backbone\.outnorm\d\.')
_STAGE = re.compile(r'backbone\.(?:layers|freq_embed)\.(\d)(?:\.|$)')
_DOWNSAMPLE = re.compile(r'backbone\.layers\.(\d)\.\d+\.[01]\.(?:weight|bias)$')


@HOOKS.register_module()
class CheckpointCheckHook(Hook):
    """Check a checkpoint against the model before it is loaded; MMEngine itself only warns.

    Testing and resuming take complete checkpoints: each of the model's tensors must be there, in its shape, and
    nothing be left over. Fine-tuning (``load_from`` without ``resume``) asks that of the backbone, but for its output
    norms; heads may differ and are listed. Frequency value embeddings may be of another grid: VHeat resizes them.

    The release's own checkpoints (``model`` and ``model_ema``, keys without prefix) are translated on the way.

    Args:
        ema: Take the moving average from a checkpoint of the release.

    Raises:
        CheckpointError: The checkpoint does not fit.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which reads ``state_dict``

    def __init__(self, ema: bool = False) -> None:
        self.ema = ema

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Translate and check what was read; MMEngine loads ``checkpoint['state_dict']`` afterwards."""
        path = str(runner._load_from)
        own = unwrap(runner.model).state_dict()
        # ``train()`` builds the optimizer before it loads; ``test()`` and ``val()`` never do.
        finetune = isinstance(runner.optim_wrapper, OptimWrapper) and not runner._resume
        if runner._resume and not {'meta', 'optimizer', 'state_dict'} <= set(checkpoint):
            raise CheckpointError(
                f'cannot resume from {path!r}: it holds weights but no training state; to start a new training '
                'from these weights, drop --resume and pass --cfg-options load_from=PATH'
            )
        state = self._to_mmengine(checkpoint, own, path)
        runner.logger.info(check_fit(state, own, path, finetune))

    def _to_mmengine(self, checkpoint: dict[str, Any], own: StateDict, path: str) -> StateDict:
        """Bring ``checkpoint`` into MMEngine's form, in place, and return its weights."""
        state = checkpoint.get('state_dict', checkpoint)
        state = {re.sub(r'^module\.', '', key): value for key, value in state.items()}
        if not own.keys() & state.keys():  # another spelling, or another model
            state = find_weights(checkpoint, path, ema=self.ema).to_mmengine()
            checkpoint.clear()
        checkpoint['state_dict'] = state
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def check_fit(state: StateDict, own: StateDict, path: str, finetune: bool) -> str:
    """Compare a checkpoint's weights with a model's.

    Args:
        state: The checkpoint's weights.
        own: The model's state dict.
        path: Named in messages.
        finetune: Whether heads and output norms may differ.

    Returns:
        A summary for the log.

    Raises:
        CheckpointError: Weights would be left out.
    """
    missing = [key for key in own if key not in state and not key.endswith('num_batches_tracked')]
    left_over = [key for key in state if key not in own and not _is_unused(key, own)]
    shared = [key for key in own if key in state and own[key].shape != state[key].shape]
    resized = [key for key in shared if _is_other_grid(key, own[key], state[key])]
    reshaped = [key for key in shared if key not in resized]

    def fatal(keys: list[str]) -> list[str]:
        if not finetune:
            return keys
        return [key for key in keys if key.startswith('backbone.') and not _OUT_NORM.match(key)]

    loaded = sum(key in state for key in own) - len(reshaped)
    shapes = {key: f'{key} {_dims(state[key])} instead of {_dims(own[key])}' for key in shared}
    if fatal(missing) or fatal(left_over) or fatal(reshaped) or not loaded:
        raise CheckpointError(
            f'{path!r} does not fit the model{_variants(state, own)}. '
            f'Missing: {some_of(fatal(missing))}. Left over: {some_of(fatal(left_over))}. '
            f'Of another shape: {some_of([shapes[key] for key in fatal(reshaped)])}. '
            'Take the config that the checkpoint was trained with, or a checkpoint of this config.'
        )
    lines = [f'Weights from {path}: {loaded} of {len(own)} tensors']
    notes = {
        'resized': [shapes[key] for key in resized],
        'of another shape, not loaded': [shapes[key] for key in reshaped],
        'missing, left as initialised': missing,
        'not of this model, dropped': left_over,
    }
    lines += [f'  {note}: {some_of(keys)}' for note, keys in notes.items() if keys]
    return '\n'.join(lines)


def _is_other_grid(key: str, own: Tensor, value: Tensor) -> bool:
    embeddings = _FREQ_EMBED.match(key) is not None and own.ndim == value.ndim == 3
    return embeddings and own.shape[2] == value.shape[2]


def _is_unused(key: str, own: StateDict) -> bool:
    """Whether a left-over tensor does no harm: counters, and stages that ``out_indices`` leaves unbuilt."""
    if key.endswith('num_batches_tracked'):
        return True
    built = {int(found.group(1)) for name in own if (found := _STAGE.match(name))}
    if not built:
        return False
    if found := _DOWNSAMPLE.match(key):
        return int(found.group(1)) >= max(built)
    found = _STAGE.match(key)
    return found is not None and int(found.group(1)) > max(built)


def _variants(state: StateDict, own: StateDict) -> str:
    """``': it holds vHeat-small, the model has vHeat-tiny'`` where both have a vHeat, and other ones."""
    names = []
    for weights in (state, own):
        prefix = 'backbone.'
        backbone = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if 'patch_embed.conv2.weight' not in backbone:
            return ''
        found = describe_weights(backbone)
        kind = f'vHeat-{found["arch"]}' if 'arch' in found else 'a vHeat'
        names.append(f'{kind} of width {found["embed_dims"]} and depths {found["depths"]}')
    return f': it holds {names[0]}, the model has {names[1]}' if names[0] != names[1] else ''


def _dims(tensor: Tensor) -> str:
    return 'x'.join(map(str, tensor.shape)) or 'scalar'
