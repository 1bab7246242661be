"""Models by name, as plain PyTorch modules: for use outside OpenMMLab, without config or registry.

The arguments mean what they mean in timm where both have them, and are called as in :class:`~vheat_mm.VHeat`. Released
checkpoints are read by the loader of the rest of the package (:mod:`vheat_mm.models.load_weights`): whole or not at all.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
import os
from collections.abc import Sequence

import torch
from mmengine.logging import print_log

from vheat_mm.models.arch import ARCHS
from vheat_mm.models.classifier import VHeatClassifier
from vheat_mm.models.load_weights import load_pretrained
from vheat_mm.models.vheat import VHeat
from vheat_mm.models.weights import Weights
from vheat_mm.ops.freq_embed import NUM_STAGES
from vheat_mm.utils.errors import CheckpointError

_MODELS = {f'vheat_{arch}': arch for arch in ARCHS}


def list_models(pattern: str | None = None) -> list[str]:
    """Names that :func:`create_model` takes, small to large.

    Args:
        pattern: Shell pattern such as ``'*tiny*'``; all names by default.
    """
    return list(_MODELS) if pattern is None else fnmatch.filter(_MODELS, pattern)


def create_model(
    name: str,
    pretrained: str | os.PathLike | None = None,
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    img_size: int | Sequence[int] = 224,
    in_channels: int = 3,
    drop_path_rate: float = 0.0,
    frozen_stages: int = -1,
    with_cp: bool = False,
    ema: bool = False,
    prefix: str | None = None,
    resize: str = 'pad',
    hub: bool = False,
) -> VHeat | VHeatClassifier:
    """Build a published model, in training mode as any new module.

    Args:
        name: One of :func:`list_models`.
        pretrained: Path or address of a checkpoint in any format that :mod:`vheat_mm.checkpoint.io` reads; random weights
            without it.
        features_only: Build the backbone, whose output is a tuple of maps described by ``feature_info``, instead of
            the classifier.
        out_indices: With ``features_only``: stages whose maps are returned; all four by default.
        num_classes: Of the classifier. By default the checkpoint's, 1000 without one. A number that is not the
            checkpoint's gets a new linear layer, with a warning; 0 gives the averaged map.
        img_size: See :class:`~vheat_mm.VHeat`, as for ``in_channels``, ``drop_path_rate``, ``frozen_stages``,
            ``with_cp``. A checkpoint's embeddings are brought to ``img_size``.
        ema: See :func:`~vheat_mm.models.load_weights.load_pretrained`, as for ``prefix`` and ``resize``.
        hub: Give the model ``save_pretrained`` and ``push_to_hub``: the classes of :mod:`vheat_mm.hub`.

    Raises:
        ValueError: Unknown name; arguments that contradict each other or are out of range.
        CheckpointError: The checkpoint is unreadable or of another variant, or has no classifier where one is needed.
    """
    arch = _arch_of(name)
    if isinstance(pretrained, bool):
        raise ValueError(f'pretrained must be the path or address of a checkpoint or None, got {pretrained!r}')
    if pretrained is None and (ema or prefix is not None):
        raise ValueError('ema and prefix choose weights in a checkpoint: give its path as pretrained, or drop them')
    if features_only and num_classes is not None:
        raise ValueError(f'features_only=True has no classifier: drop num_classes={num_classes!r}, or features_only')
    if not features_only and out_indices is not None:
        raise ValueError(f'out_indices={out_indices!r} chooses feature maps: add features_only=True, or drop it')
    build_backbone, build_classifier = VHeat, VHeatClassifier
    if hub:
        from vheat_mm.apis.hub import HubVHeat, HubVHeatClassifier

        build_backbone, build_classifier = HubVHeat, HubVHeatClassifier
    if features_only:
        model = build_backbone(
            arch=arch,
            img_size=img_size,
            in_channels=in_channels,
            drop_path_rate=drop_path_rate,
            out_indices=tuple(range(NUM_STAGES)) if out_indices is None else out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
        )
        if pretrained is not None:
            _load_backbone(model, pretrained, prefix, ema, resize)
        return model
    classifier = build_classifier(
        arch=arch,
        num_classes=1000 if num_classes is None else num_classes,
        img_size=img_size,
        in_channels=in_channels,
        drop_path_rate=drop_path_rate,
        frozen_stages=frozen_stages,
        with_cp=with_cp,
    )
    if pretrained is not None:
        weights = _load_backbone(classifier.backbone, pretrained, prefix, ema, resize)
        _load_head(classifier, weights, num_classes)
    return classifier


def _arch_of(name: str) -> str:
    if name in _MODELS:
        return _MODELS[name]
    close = difflib.get_close_matches(str(name).lower().replace('-', '_'), _MODELS, n=2, cutoff=0.55)
    hint = f'did you mean {" or ".join(map(repr, close))}? ' if close else ''
    raise ValueError(f'unknown model {name!r}: {hint}list_models() names {", ".join(_MODELS)}')


def _load_backbone(model: VHeat, path: str | os.PathLike, prefix: str | None, ema: bool, resize: str) -> Weights:
    try:
        return load_pretrained(model, path, prefix=prefix, ema=ema, resize=resize)
    except CheckpointError as error:
        for name, arch in _MODELS.items():
            if f'set arch={arch!r}' in str(error):  # the remedy in configs; here the name stands for it
                raise CheckpointError(f'{error}; that is create_model({name!r}, ...)') from error
        raise


def _load_head(model: VHeatClassifier, weights: Weights, num_classes: int | None) -> None:
    """Load the classifier's linear layer, or say that it is new; ``num_classes`` is what was asked for."""
    found = {key: weights.head[f'head.fc.{key}'] for key in ('weight', 'bias') if f'head.fc.{key}' in weights.head}
    classes = found['weight'].shape[0] if 'weight' in found else None
    if num_classes is None and classes is None:
        raise CheckpointError(
            f'{weights.path!r} holds no classifier: pass num_classes=N for a new one to train, num_classes=0 for '
            'averaged features, or features_only=True for the maps'
        )
    wanted = classes if num_classes is None else num_classes
    if wanted != model.num_classes:
        model.reset_classifier(wanted or 0)
    if not wanted:
        return
    if wanted != classes:
        theirs = 'none' if classes is None else f'one of {classes} classes'
        text = f'The classifier of {wanted} classes is new and needs training: {weights.path!r} holds {theirs}.'
        print_log(text, logger='current', level=logging.WARNING)
        return
    own = model.head['fc'].state_dict()
    if {key: value.shape for key, value in found.items()} != {key: value.shape for key, value in own.items()}:
        shapes = ', '.join(f'{key} {tuple(value.shape)}' for key, value in found.items())
        expected = ', '.join(f'{key} {tuple(value.shape)}' for key, value in own.items())
        raise CheckpointError(f'the classifier in {weights.path!r} has {shapes} instead of {expected}')
    with torch.no_grad():
        model.head['fc'].load_state_dict(found)
    print_log(f'The classifier of {wanted} classes comes from {weights.path!r} too (head.fc).', logger='current')
