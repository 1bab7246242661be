"""The published classifier as a plain module, with the interface of timm's models; timm itself is not needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from mmengine.logging import print_log
from torch import Tensor, nn

from vheat_mm.models.feature_info import FeatureInfo
from vheat_mm.models.find_weights import ANCHOR, find_weights
from vheat_mm.models.vheat import Stage, VHeat
from vheat_mm.models.weights import Variant, check_variant, compare, load_pretrained
from vheat_mm.ops.freq_embed import NUM_STAGES, grid_sizes, resize_freq_embed, to_pair
from vheat_mm.utils.errors import CheckpointError

_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    'avg': lambda x: x.mean((2, 3)),
    'max': lambda x: x.amax((2, 3)),
    'avgmax': lambda x: 0.5 * (x.mean((2, 3)) + x.amax((2, 3))),
    '': lambda x: x,
}


class VHeatClassifier(nn.Module):
    """The published classifier: norm, global average pooling and a linear layer after the last stage.

    State-dict keys are those of MMPreTrain's ``ImageClassifier`` with this backbone (``backbone.``, ``head.fc.``), so
    each loads the other's weights; the release's keys load too.

    Args:
        num_classes: Outputs of the linear layer; with 0 the model returns the pooled map.
        drop_rate: Dropout before the linear layer.
        global_pool: ``'avg'`` as published, ``'max'``, ``'avgmax'`` (their mean), or ``''`` to return the map, which
            needs ``num_classes=0``.
        arch: See :class:`~vheat_mm.VHeat`, as for the others.

    Shapes:
        Image (B, in_channels, H, W) -> logits (B, num_classes), or with ``num_classes=0`` (B, 8C), or with
        ``global_pool=''`` (B, 8C, H / 32, W / 32), sides rounded up.
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
        drop_rate: float = 0.0,
        global_pool: str = 'avg',
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
        self.in_chans = in_channels
        self.num_features = self.head_hidden_size = self.backbone.num_features[-1]
        self.num_classes, self.global_pool = 0, global_pool
        self.head = nn.ModuleDict(dict(drop=nn.Dropout(drop_rate), fc=nn.Identity()))
        self.reset_classifier(num_classes)
        self._register_load_state_dict_pre_hook(_rename_released_keys, with_module=True)

    # ---- the classifier ----

    def get_classifier(self) -> nn.Module:
        """The linear layer, an identity with ``num_classes=0``."""
        return self.head['fc']

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer by a new one of ``num_classes`` outputs, 0 for none, and change the pooling."""
        global_pool = self.global_pool if global_pool is None else global_pool
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f'num_classes must be a non-negative int, got {num_classes!r}')
        if global_pool not in _POOLS:
            raise ValueError(f'global_pool must be one of {", ".join(map(repr, _POOLS))}, got {global_pool!r}')
        self.num_classes, self.global_pool = num_classes, global_pool
        layer: nn.Module = nn.Identity()
        if num_classes:
            like = self.backbone.get_parameter(ANCHOR)
            layer = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.head['fc'] = layer.train(self.training)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Bring the frequency value embeddings to the grid of another image size, as loading weights does."""
        net = self.backbone
        if net.freq_embed is None:
            raise RuntimeError('this VHeat is deployed for one size: build a fresh one for another')
        net.img_size = to_pair(img_size, 'img_size')
        for i, (embed, grid) in enumerate(zip(net.freq_embed, grid_sizes(net.img_size), strict=False)):
            net.freq_embed[i] = nn.Parameter(resize_freq_embed(embed.detach(), grid), embed.requires_grad)
        net.decay_cache.clear()

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) -> normalised last map (B, 8C, H / 32, W / 32), sides rounded up."""
        return self.backbone(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What :meth:`forward_features` returns -> logits (B, num_classes), or their input (B, 8C)."""
        if self.num_classes and not self.global_pool and not pre_logits:
            classes = f'got num_classes={self.num_classes}, not 0'
            raise ValueError(f"global_pool='' leaves a map, of which there are no classes: {classes}")
        x = self.head['drop'](_POOLS[self.global_pool](x))
        return x if pre_logits else self.head['fc'](x)

    # ---- maps of the stages ----

    @property
    def feature_info(self) -> FeatureInfo:
        """Describes the maps of :meth:`forward_intermediates`, one of each stage."""
        net = self.backbone
        last_blocks = {i: f'backbone.layers.{i}.{net.depths[i] - 1}' for i in range(len(net.layers))}
        return FeatureInfo.of_stages(net.num_features, last_blocks)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Image (B, in_channels, H, W) -> maps of stages, in ascending order, beside that of :meth:`forward_features`.

        These are the stages' outputs before any output norm, as of timm's other models; an MMDetection neck gets them
        behind the norms of :class:`~vheat_mm.VHeat`.

        Args:
            indices: Stages, negative ones from the end, or the number of last ones; all by default.
            norm: Apply the output norm to the last stage's map.
            stop_early: Run no stage after the last of ``indices``; the map beside the list is then that stage's.
            output_fmt: ``'NCHW'``.
            intermediates_only: Return the list alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, end = self._stages_of(indices), len(self.backbone.layers) - 1
        last = taken[-1] if stop_early or intermediates_only else end
        maps = dict(zip(stages := sorted({*taken, last}), self.backbone.forward_stages(x, stages), strict=True))
        outputs = [self.backbone.to_output(maps[i], i, norm=norm and i == end) for i in taken]
        if intermediates_only:
            return outputs
        return self.backbone.to_output(maps[last], last, norm=last == end), outputs

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of ``indices``, and what depends on them.

        Args:
            indices: See :meth:`forward_intermediates`.
            prune_norm: Remove the output norm as well.
            prune_head: Remove classifier and pooling as well.

        Returns:
            The stages, ascending and not negative.
        """
        taken, net = self._stages_of(indices), self.backbone
        last, end = taken[-1], len(net.layers) - 1
        if last < end:
            net.layers = net.layers[: last + 1]
            stage = cast(Stage, net.layers[last])
            del stage[stage.depth]  # the downsampling
            if net.freq_embed is not None:
                net.freq_embed = net.freq_embed[: last + 1]
            self.num_features = self.head_hidden_size = net.num_features[last]
        if prune_norm or last < end:
            delattr(net, f'outnorm{end}')
            net.add_module(f'outnorm{last}', nn.Identity())
            net.out_indices = (last,)
        if prune_head or last < end:
            self.reset_classifier(0, '')
        return taken

    def _stages_of(self, indices: int | Sequence[int] | None) -> list[int]:
        end = len(self.backbone.layers)
        given = range(end) if indices is None else range(end - indices, end) if isinstance(indices, int) else indices
        taken = sorted({i + end if i < 0 and not isinstance(indices, int) else i for i in given})
        if not taken or taken[0] < 0 or taken[-1] >= end:
            raise ValueError(f'indices must be stages in {-end} .. {end - 1}, or how many of the last, got {indices!r}')
        return taken

    # ---- training ----

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block's activations in backward to save memory, as ``with_cp`` does."""
        for stage in self.backbone.layers:
            cast(Stage, stage).with_cp = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that put parameters in the order of their depth, for timm's layer-wise learning-rate decay.

        The depths are those of :meth:`~vheat_mm.VHeat.get_layer_depth`; with ``coarse`` a stage is one.
        """
        stem = r'^backbone\.patch_embed'
        if coarse:
            return dict(stem=stem, blocks=r'^backbone\.(?:layers|freq_embed)\.(\d+)')
        # A downsampling is as deep as the block before it, and what a stage shares as its first block.
        ends = [(rf'^backbone\.layers\.({i})\.{depth}\.', (depth - 1,)) for i, depth in enumerate(self.backbone.depths)]
        blocks = [(r'^backbone\.freq_embed\.(\d+)', (0,)), (r'^backbone\.layers\.(\d+)\.(\d+)', None)]
        return dict(stem=stem, blocks=[*ends, *blocks])

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beside the one-dimensional: none, as in the published recipe."""
        return set()

    # ---- weights ----

    def load_pretrained(
        self,
        checkpoint: str | os.PathLike,
        prefix: str | None = None,
        ema: bool | None = None,
        resize: str = 'pad',
        adopt_classes: bool = False,
    ) -> None:
        """Load a checkpoint's backbone, and its classifier where it has this model's number of classes.

        Args:
            checkpoint: See :func:`~vheat_mm.models.weights.load_pretrained`, as for ``prefix`` and ``resize``.
            ema: Take the moving average; by default that of published weights, given by name.
            adopt_classes: Take the number of classes from the checkpoint.

        Raises:
            CheckpointError: See :func:`~vheat_mm.models.weights.load_pretrained`; or ``adopt_classes`` and the
                checkpoint has no classifier.
        """
        weights = load_pretrained(self.backbone, checkpoint, prefix=prefix, ema=ema, resize=resize)
        found = {key: weights.head[f'head.fc.{key}'] for key in ('weight', 'bias') if f'head.fc.{key}' in weights.head}
        classes = found['weight'].shape[0] if 'weight' in found else None
        if adopt_classes:
            if classes is None:
                raise CheckpointError(
                    f'{weights.path!r} holds no classifier: pass num_classes=N for a new one to train, num_classes=0 '
                    'for averaged features, or features_only=True for the maps'
                )
            if classes != self.num_classes:
                self.reset_classifier(classes)
        if not self.num_classes:
            return
        if self.num_classes != classes:
            theirs = 'none' if classes is None else f'one of {classes} classes'
            text = f'The classifier of {self.num_classes} classes is new and needs training: {weights.path!r} holds '
            print_log(f'{text}{theirs}.', logger='current', level=logging.WARNING)
            return
        difference = compare(found, self.head['fc'].state_dict())
        if not difference.fits:
            raise CheckpointError(f'the classifier in {weights.path!r} does not fit; {difference}')
        self.head['fc'].load_state_dict(found)
        text = f'The classifier of {classes} classes comes from {weights.path!r} too (head.fc).'
        print_log(text, logger='current')


def _rename_released_keys(model: VHeatClassifier, state_dict: dict, prefix: str, *_: object) -> None:
    """Load hook: the release's keys, or a backbone's alone, become those of :class:`VHeatClassifier`.

    Another published variant is an error of one line, where PyTorch's would name every tensor.
    """
    if f'{prefix}{ANCHOR}' in state_dict:
        state = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        found = find_weights(state)
        if Variant.of(found.backbone).arch:
            check_variant(found.backbone, model.backbone.state_dict(), 'the checkpoint')
        state_dict.update({f'{prefix}{key}': value for key, value in found.to_mmengine().items()})
