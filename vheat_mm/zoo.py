"""Models by name, as plain PyTorch modules: for use outside OpenMMLab, without config or registry.

The arguments mean what they mean in timm where both have them, and are called as in :class:`~vheat_mm.VHeat`. Released
checkpoints are read by the loader of the rest of the package (:mod:`vheat_mm.pretrained`): whole or not at all.
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
import os
from collections.abc import Mapping, Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .arch import ARCHS
from .checkpoint import CheckpointError, Weights
from .feature_info import FeatureInfo
from .freq_embed import NUM_STAGES
from .pretrained import load_pretrained
from .vheat import VHeat

_MODELS = {f'vheat_{arch}': arch for arch in ARCHS}


class VHeatClassifier(nn.Module):
    """The published classifier: the last stage's map, normed, averaged over positions, through a linear layer.

    State-dict keys are those of MMPreTrain's ``ImageClassifier`` with this backbone (``backbone.``, ``head.fc.``), so
    weights go both ways as they are.

    Args:
        num_classes: Outputs of the linear layer; 0 for the averaged map itself.
        arch: See :class:`~vheat_mm.VHeat`, as for all others.

    Shapes:
        Image (B, in_channels, H, W) -> logits (B, num_classes), or with ``num_classes=0`` (B, 8C).
    """

    def __init__(
        self,
        arch: str | Mapping = 'tiny',
        num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = VHeat(
            arch=arch,
            img_size=img_size,
            in_channels=in_channels,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            out_indices=(NUM_STAGES - 1,),
            frozen_stages=frozen_stages,
            with_cp=with_cp,
        )
        self.num_features = self.backbone.num_features[-1]
        self.num_classes = 0
        self.head = nn.ModuleDict()
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new linear layer of ``num_classes`` outputs in place of the old; 0 for none."""
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f'num_classes must be a non-negative int, got {num_classes!r}')
        self.num_classes = num_classes
        self.head = nn.ModuleDict()
        if num_classes:
            like = self.backbone.get_parameter(f'outnorm{NUM_STAGES - 1}.weight')
            layer = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
            self.head['fc'] = layer

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) -> normed last map (B, 8C, H / 32, W / 32)."""
        return self.backbone(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) -> logits (B, num_classes)."""
        pooled = self.forward_features(x).mean((2, 3))
        return self.head['fc'](pooled) if self.num_classes else pooled

    @property
    def feature_info(self) -> FeatureInfo:
        """What :meth:`forward_features` gives."""
        return FeatureInfo(entry | dict(module=f'backbone.{entry["module"]}') for entry in self.backbone.feature_info)


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
        pretrained: Path or address of a checkpoint in any format that :mod:`vheat_mm.checkpoint` reads; random weights
            without it.
        features_only: Build the backbone, whose output is a tuple of maps described by ``feature_info``, instead of
            the classifier.
        out_indices: With ``features_only``: stages whose maps are returned; all four by default.
        num_classes: Of the classifier. By default the checkpoint's, 1000 without one. A number that is not the
            checkpoint's gets a new linear layer, with a warning; 0 gives the averaged map.
        img_size: See :class:`~vheat_mm.VHeat`, as for ``in_channels``, ``drop_path_rate``, ``frozen_stages``,
            ``with_cp``. A checkpoint's embeddings are brought to ``img_size``.
        ema: See :func:`~vheat_mm.pretrained.load_pretrained`, as for ``prefix`` and ``resize``.
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
        from .hub import HubVHeat, HubVHeatClassifier

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
