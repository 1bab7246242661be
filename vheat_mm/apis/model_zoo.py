"""Models by name, as plain PyTorch modules: for use without OpenMMLab's configs and registries.

Arguments that timm's ``create_model`` has too mean the same here; the others are those of :class:`~vheat_mm.VHeat`.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from vheat_mm.models.arch import ARCHS
from vheat_mm.models.classifier import VHeatClassifier
from vheat_mm.models.vheat import VHeat
from vheat_mm.models.weights import load_pretrained
from vheat_mm.ops.freq_embed import NUM_STAGES

_MODELS = {f'vheat_{arch}': arch for arch in ARCHS}


def list_models(pattern: str | None = None) -> list[str]:
    """Names that :func:`create_model` takes, small to large.

    Args:
        pattern: Shell pattern such as ``'*tiny*'``; all names by default.
    """
    return list(_MODELS) if pattern is None else fnmatch.filter(_MODELS, pattern)


def create_model(
    name: str,
    pretrained: str | os.PathLike | bool | None = None,
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    img_size: int | Sequence[int] = 224,
    in_channels: int = 3,
    drop_path_rate: float = 0.0,
    frozen_stages: int = -1,
    with_cp: bool = False,
    ema: bool | None = None,
    prefix: str | None = None,
    resize: str = 'pad',
) -> VHeat | VHeatClassifier:
    """Build a published model, in training mode as any new module.

    Args:
        name: One of :func:`list_models`.
        pretrained: ``True`` for the published weights; or path, URL or name of a checkpoint in any format that
            :mod:`vheat_mm.checkpoint.io` reads; without it weights are random.
        features_only: Build the backbone, whose output is a tuple of maps described by ``feature_info``, instead of
            the classifier.
        out_indices: With ``features_only``: stages whose maps are returned; all four by default.
        num_classes: Outputs of the classifier. By default the checkpoint's, 1000 without one. For any other number the
            linear layer is new, with a warning; with 0 the model returns the averaged map.
        img_size: See :class:`~vheat_mm.VHeat`, as for ``in_channels``, ``drop_path_rate``, ``frozen_stages``,
            ``with_cp``. A checkpoint's embeddings are resized to ``img_size``.
        ema: Take the moving average of the weights. By default that of the published ones, where their file has it:
            the published accuracy is the average's. From a path or URL the default is the weights themselves.
        prefix: See :func:`~vheat_mm.models.weights.load_pretrained`, as for ``resize``.

    Raises:
        ValueError: Unknown name; arguments that contradict each other or are out of range.
        CheckpointError: The checkpoint is unreadable or of another variant, or has no classifier where one is needed.
    """
    arch = _arch_of(name)
    if isinstance(pretrained, bool):
        pretrained = name if pretrained else None
    if pretrained is None and (ema or prefix is not None):
        raise ValueError('ema and prefix choose weights in a checkpoint: give its path as pretrained, or drop them')
    if features_only and num_classes is not None:
        raise ValueError(f'features_only=True has no classifier: drop num_classes={num_classes!r}, or features_only')
    if not features_only and out_indices is not None:
        raise ValueError(f'out_indices={out_indices!r} chooses feature maps: add features_only=True, or drop it')
    arguments: dict[str, Any] = dict(
        arch=arch,
        img_size=img_size,
        in_channels=in_channels,
        drop_path_rate=drop_path_rate,
        frozen_stages=frozen_stages,
        with_cp=with_cp,
    )
    model: VHeat | VHeatClassifier
    if features_only:
        model = VHeat(out_indices=tuple(range(NUM_STAGES)) if out_indices is None else out_indices, **arguments)
        load: Callable = functools.partial(load_pretrained, model)
    else:
        model = VHeatClassifier(num_classes=1000 if num_classes is None else num_classes, **arguments)
        load = functools.partial(model.load_pretrained, adopt_classes=num_classes is None)
    if pretrained is not None:
        load(pretrained, prefix=prefix, ema=ema, resize=resize)
    return model


def _arch_of(name: str) -> str:
    if name in _MODELS:
        return _MODELS[name]
    if config := re.search(r'vheat-([tsb])_', str(name)):
        model = next(model for model in _MODELS if model.startswith(f'vheat_{config[1]}'))
        raise ValueError(
            f'{name!r} is the name of a config, not of a model: its backbone is create_model({model!r}), and all of it '
            "is built by the config's library, for example mmengine.hub.get_model('vheat_mm::detection/...py')"
        )
    close = difflib.get_close_matches(str(name).lower().replace('-', '_'), _MODELS, n=2, cutoff=0.55)
    hint = f'did you mean {" or ".join(map(repr, close))}? ' if close else ''
    raise ValueError(f'unknown model {name!r}: {hint}list_models() names {", ".join(_MODELS)}')
