"""Models by name, as plain PyTorch modules: for use without OpenMMLab's configs and registries.

Arguments that timm's ``create_model`` has too mean the same here; the others are those of :class:`~vheat_mm.VHeat`.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
import os
from collections.abc import Sequence

from mmengine.logging import print_log

from vheat_mm.apis.hub import hub_class
from vheat_mm.models.arch import ARCHS
from vheat_mm.models.classifier import VHeatClassifier
from vheat_mm.models.find_weights import Weights
from vheat_mm.models.vheat import VHeat
from vheat_mm.models.weights import VariantError, compare, load_pretrained
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
        pretrained: Path or URL of a checkpoint in any format that :mod:`vheat_mm.checkpoint.io` reads; without it
            weights are random.
        features_only: Build the backbone, whose output is a tuple of maps described by ``feature_info``, instead of
            the classifier.
        out_indices: With ``features_only``: stages whose maps are returned; all four by default.
        num_classes: Outputs of the classifier. By default the checkpoint's, 1000 without one. For any other number the
            linear layer is new, with a warning; with 0 the model returns the averaged map.
        img_size: See :class:`~vheat_mm.VHeat`, as for ``in_channels``, ``drop_path_rate``, ``frozen_stages``,
            ``with_cp``. A checkpoint's embeddings are resized to ``img_size``.
        ema: See :func:`~vheat_mm.models.weights.load_pretrained`, as for ``prefix`` and ``resize``.
        hub: Build a class of :mod:`vheat_mm.hub`, which has ``save_pretrained`` and ``push_to_hub``.

    Raises:
        ValueError: Unknown name; arguments that contradict each other or are out of range.
        CheckpointError: The checkpoint is unreadable or of another variant, or has no classifier where one is needed.
    """
    arch = _arch_of(name)
    if isinstance(pretrained, bool):
        raise ValueError(f'pretrained must be the path or URL of a checkpoint or None, got {pretrained!r}')
    if pretrained is None and (ema or prefix is not None):
        raise ValueError('ema and prefix choose weights in a checkpoint: give its path as pretrained, or drop them')
    if features_only and num_classes is not None:
        raise ValueError(f'features_only=True has no classifier: drop num_classes={num_classes!r}, or features_only')
    if not features_only and out_indices is not None:
        raise ValueError(f'out_indices={out_indices!r} chooses feature maps: add features_only=True, or drop it')
    if features_only:
        model = (hub_class('HubVHeat') if hub else VHeat)(
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
    classifier = (hub_class('HubVHeatClassifier') if hub else VHeatClassifier)(
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
    except VariantError as error:
        name = next((name for name, arch in _MODELS.items() if arch == error.arch), None)
        if name is None:
            raise
        raise CheckpointError(f'{error}; that is create_model({name!r}, ...)') from error


def _load_head(model: VHeatClassifier, weights: Weights, num_classes: int | None) -> None:
    """Load the classifier's linear layer, or warn that it is new; ``num_classes`` is the caller's argument."""
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
    difference = compare(found, model.head['fc'].state_dict())
    if not difference.fits:
        raise CheckpointError(f'the classifier in {weights.path!r} does not fit; {difference}')
    model.head['fc'].load_state_dict(found)
    print_log(f'The classifier of {wanted} classes comes from {weights.path!r} too (head.fc).', logger='current')
