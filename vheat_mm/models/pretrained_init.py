"""Weights of whole models and heads: ``init_cfg=dict(type='Pretrained', ...)`` and ``load_from`` by one road."""

from __future__ import annotations

import re
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import PretrainedInit, update_init_info
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from vheat_mm.checkpoint.io import StateDict, read_checkpoint
from vheat_mm.models.find_weights import ANCHOR, AVERAGE, find_weights, require_names
from vheat_mm.models.weights import adapt_bands, check_fit, is_counter, load_fitting, load_pretrained
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line, is_address, some_of

_ANCHOR_OF_MODEL = f'backbone.{ANCHOR}'


_initialize = PretrainedInit.__call__


def replace_pretrained_init(everywhere: bool) -> None:
    """Make MMEngine's initializer, by name or as a class, load as :func:`load_initial` in this process.

    ``everywhere``: also into heads and models without a vHeat.
    """

    def initialize(self: PretrainedInit, module: nn.Module) -> None:
        if not everywhere and not {ANCHOR, _ANCHOR_OF_MODEL} & module.state_dict().keys():
            _initialize(self, module)
            return
        load_initial(module, str(self.checkpoint), self.prefix)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())

    PretrainedInit.__call__ = initialize


def load_initial(module: nn.Module, path: str, prefix: str | None = None) -> None:
    """Load a module's weights from a file, and log what was left out; MMEngine only warns of keys that do not fit.

    - A vHeat: see :func:`~vheat_mm.models.weights.load_pretrained`.
    - A model whose ``backbone`` is a vHeat: any format that the backbone loads; heads may differ.
    - Any other module: at least half of its tensors are in the file, all in their shape (heads of a whole model may
      have another). So a ResNet loads ImageNet weights, with the classifier left over and new layers missing.

    Args:
        module: Of any library.
        path: Path, address, or a name such as ``torchvision://resnet50``.
        prefix: Only keys with this prefix are loaded, without it.

    Raises:
        CheckpointError: The weights do not fit.
    """
    own = module.state_dict()
    if ANCHOR in own:
        load_pretrained(module, path, prefix=prefix)
        return
    named = '://' in path and not is_address(path)  # torchvision://resnet50
    checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu') if named else read_checkpoint(path)
    if prefix is not None:
        prefix = prefix if prefix.endswith('.') else f'{prefix}.'
        state = _named_entry(checkpoint, path)
        checkpoint = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not checkpoint:
            raise CheckpointError(
                f'{path!r} holds no key that starts with {prefix!r}; the first are {some_of(state, 3)}'
            )
    state = to_mmengine(checkpoint, own, path, finetune=True)
    if _ANCHOR_OF_MODEL in own:
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        print_log(check_fit(tensors, own, path, finetune=True), logger='current')
        load_fitting(module, tensors)
    else:
        _load_other(module, own, state, path)


def to_mmengine(
    checkpoint: dict[str, Any], own: StateDict | None, path: str, ema: bool | None = False, finetune: bool = False
) -> dict[str, Any]:
    """The weights in a checkpoint for a model, under MMEngine's keys.

    Args:
        checkpoint: What :func:`~vheat_mm.checkpoint.read_checkpoint` returns.
        own: State dict of the model, ``None`` for one with a vHeat that is not known yet.
        path: Named in errors.
        ema: See :func:`~vheat_mm.models.find_weights.find_weights`.
        finetune: Fit the first convolution to images of another number of bands; needs ``own``.

    Raises:
        CheckpointError: The model holds a vHeat, and the checkpoint's is none or damaged; keys are not names.
    """
    state = _named_entry(checkpoint, path)
    own = {_ANCHOR_OF_MODEL: torch.empty(0)} if own is None else own
    if _ANCHOR_OF_MODEL not in own:
        return state
    if AVERAGE in checkpoint or not own.keys() & state.keys():  # or keys of another format, or another model
        weights = find_weights(checkpoint, path, ema=ema)
        state = weights.to_mmengine()
        if weights.has_average:
            print_log(f'Weights from {path!r}: {weights.choice}', logger='current')
    elif isinstance(state.get(_ANCHOR_OF_MODEL), Tensor):
        find_weights(dict(state_dict=state), path, prefix='backbone.')  # raises for damaged tensors
    if finetune:
        state, note = adapt_bands(state, own, path, _ANCHOR_OF_MODEL)
        if note:
            print_log(note.strip(), logger='current')
    return state


def _named_entry(checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
    """MMEngine's entry ``state_dict``, else all of the checkpoint, without the prefix of a wrapper."""
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, dict):
        raise CheckpointError(f'{path!r} is not a checkpoint of a model: its state_dict is a {type(state).__name__}')
    require_names(state, path)
    renamed = type(state)((re.sub(r'^module\.', '', key), value) for key, value in state.items())
    if hasattr(state, '_metadata'):  # versions of layers, by which they convert older weights
        renamed._metadata = state._metadata  # type: ignore[attr-defined]
    return renamed


def _load_other(module: nn.Module, own: StateDict, state: dict[str, Any], path: str) -> None:
    """Load a module without a vHeat; its own load hooks may rename and resize, so the result is judged."""
    kind, differ = type(module).__name__, []
    try:
        try:
            result = module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            differ = re.findall(r'size mismatch for (\S+):', str(error))
            heads = [key for key in differ if hasattr(module, 'backbone') and not key.startswith('backbone.')]
            if not differ or heads != differ:
                raise
            result = module.load_state_dict({k: v for k, v in state.items() if k not in differ}, strict=False)
    except Exception as error:  # hooks of other libraries raise many types
        lines = [line.strip() for line in str(error).splitlines()]
        reason = some_of([line for line in lines if 'size mismatch' in line] or [first_line(error)], 3)
        raise CheckpointError(f'{path!r} does not fit {kind}: {reason}') from error
    wanted = [key for key in own if not is_counter(key)]
    missing = [key for key in result.missing_keys if not is_counter(key) and key not in differ]
    if wanted and 2 * (len(missing) + len(differ)) > len(wanted):
        ends = f'.{wanted[0]}'
        shape = own[wanted[0]].shape
        prefixes = [
            key[: 1 - len(ends)] for key in state if key.endswith(ends) and getattr(state[key], 'shape', 0) == shape
        ]
        hint = f'; with prefix={prefixes[0]!r} keys would fit' if prefixes else ''
        raise CheckpointError(
            f'{path!r} does not fit {kind}: missing are {some_of(missing)}, {len(missing)} of {len(wanted)}; '
            f'left over are {some_of(result.unexpected_keys, 3)}{hint}'
        )
    notes = {'missing': missing, 'left over': result.unexpected_keys, 'of another shape, not loaded': differ}
    rest = ''.join(f'; {note} ({len(keys)}): {some_of(keys)}' for note, keys in notes.items() if keys)
    print_log(f'Weights of {kind} from {path!r} loaded{rest}', logger='current')
