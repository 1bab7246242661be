"""vHeat: Building Vision Models upon Heat Conduction (arXiv 2405.16555, CVPR 2025), as an OpenMMLab backbone.

Same function and state-dict keys as the reference release (MzeroMiko/vHeat). What differs: maps stay channels-last
from the stem to the output norms, decay maps are kept at inference on CPUs, stages after the last requested output are
not built.

Every module calls its submodules. Where nobody could notice (:func:`vheat_mm.models.plain.may_fuse`), kernels of
:mod:`vheat_mm.ops` read their weights instead.

Shapes: B batch, H x W map, C channels. Inside the network maps are (B, H, W, C); images and outputs are (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule, trunc_normal_init
from mmengine.model.weight_init import trunc_normal_
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vheat_mm import ops
from vheat_mm.models.arch import check_numbers, depth_of, read_arch, read_out_indices, read_pretrained
from vheat_mm.models.feature_info import FeatureInfo
from vheat_mm.models.plain import declare, has_plain_layers, is_conv, may_fuse
from vheat_mm.models.weights import load_pretrained, resize_loaded_freq_embeds
from vheat_mm.ops.autograd import compute_dtype, needs_gradient, without_autocast
from vheat_mm.ops.decay_cache import DecayCache
from vheat_mm.ops.eager import onednn
from vheat_mm.ops.freq_embed import NUM_STAGES, grid_sizes, resize_freq_embed, to_pair
from vheat_mm.ops.reference import channels_first, decay_of
from vheat_mm.utils.config_place import type_name


class HeatConduction2d(nn.Module):
    """The Heat Conduction Operator (HCO), Section 3.3 of the paper.

    Depthwise convolution, split into signal and gate, heat conduction of the signal, norm, gate, projection.

    Args:
        dim: Channels C of input and output.
    """

    k_exp: nn.Parameter  # (H, W, C), once deployed

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.linear = nn.Linear(dim, 2 * dim)
        self.to_k = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        self.out_norm = nn.LayerNorm(dim)
        self.out_linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, decay: Tensor) -> Tensor:
        """Map (B, H, W, C) and what :meth:`decay` returns for its size (H, W, C) -> map (B, H, W, C)."""
        if may_fuse(x, self, HeatConduction2d):
            return ops.linear(self.mix(x, decay), self.out_linear.weight, self.out_linear.bias)
        x = self.dwconv(channels_first(x)).permute(0, 2, 3, 1)
        x, gate = self.linear(x).chunk(2, dim=-1)
        x = self.out_norm(ops.heat_conduction(x, decay)) * F.silu(gate)
        return self.out_linear(x)

    def mix(self, x: Tensor, decay: Tensor) -> Tensor:
        """:meth:`forward` by kernels, up to the projection: all that mixes positions, (B, H, W, C) -> (B, H, W, C)."""
        norm = self.out_norm
        x = _convolve(self.dwconv, x)
        signal, gate = ops.split_linear(x, self.linear.weight, self.linear.bias)
        del x  # its memory serves the next op
        return ops.heat_norm_gate_(signal, gate, decay, norm.weight, norm.bias, norm.eps)

    def decay(self, freq_embed: Tensor) -> Tensor:
        """Decay of every mode and channel for FVEs of the size of the map, (H, W, C) -> (H, W, C).

        Computed in at least float32: ``w k`` spans several orders of magnitude and its exponential leaves float16.
        """
        if self.has_plain_decay(freq_embed):
            k = cast(nn.Linear, self.to_k[0])
            return ops.decay_map(freq_embed, k.weight, k.bias)
        with without_autocast(freq_embed):
            return decay_of(self.to_k(freq_embed))

    def has_plain_decay(self, freq_embed: Tensor) -> bool:
        """Whether kernels may stand for :attr:`to_k`, which then is as it was built."""
        classes = (nn.Linear, nn.ReLU)
        return type(self) is HeatConduction2d and may_fuse(
            freq_embed, self.to_k, nn.Sequential, lambda: has_plain_layers(self.to_k, classes)
        )

    def deploy(self, freq_embed: Tensor) -> None:
        """Replace ``to_k`` by the constant decay ``k_exp`` (H, W, C), as the release's re-parameterisation does."""
        with torch.no_grad():
            self.k_exp = nn.Parameter(self.decay(freq_embed), requires_grad=False)
        del self.to_k


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """A plain ``nn.Conv2d`` of a (B, H, W, C) map by a kernel."""
    return ops.convolve(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class Mlp(nn.Module):
    """Two 1x1 convolutions around an exact GELU, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        if may_fuse(x, self, Mlp, self.is_pointwise):
            return self.fused(x)
        return self.fc2(F.gelu(self.fc1(channels_first(x)))).permute(0, 2, 3, 1)

    def fused(self, x: Tensor) -> Tensor:
        """:meth:`forward` by kernels, of a map or of rows (..., C)."""
        return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    def is_pointwise(self) -> bool:
        """Whether both convolutions treat every position alike, as built."""
        return is_conv(self.fc1, 1, 1) and is_conv(self.fc2, 1, 1)


class DropPath(nn.Module):
    """Stochastic depth: drop whole samples of a batch, and scale up the rest.

    Args:
        drop_prob: Probability of dropping a sample.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_active():
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1.0 - self.drop_prob)
        return x * (mask / (1.0 - self.drop_prob))

    def is_active(self) -> bool:
        return self.training and self.drop_prob > 0.0

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3f}'


class Block(nn.Module):
    """Heat conduction and MLP, each a residual branch with its norm before or after it.

    Args:
        dim: Channels C.
        mlp_ratio: Hidden over outer width of the MLP.
        drop_path: Probability of dropping a branch.
        post_norm: Norm after the operation instead of before it.
        layer_scale: Initial value of the learned scale of the branches, or ``None`` for no scale.
    """

    def __init__(
        self, dim: int, mlp_ratio: float, drop_path: float, post_norm: bool, layer_scale: float | None
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(dim)
        self.op = HeatConduction2d(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor, decay: Tensor) -> Tensor:
        """Map (B, H, W, C) and the decay of this block (H, W, C) -> map (B, H, W, C)."""
        if self.fuses(x):
            return self._fused(x, decay)
        if self.post_norm:
            x = self._add(x, self.norm1(self.op(x, decay)), self.gamma1)
            return self._add(x, self.norm2(self.mlp(x)), self.gamma2)
        x = self._add(x, self.op(self.norm1(x), decay), self.gamma1)
        return self._add(x, self.mlp(self.norm2(x)), self.gamma2)

    def _add(self, x: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
        return x + self.drop_path(branch if gamma is None else gamma * branch)

    def fuses(self, x: Tensor) -> bool:
        """Whether kernels may stand for all submodules; otherwise those that can are fused on their own."""
        return may_fuse(x, self, Block, lambda: self.mlp.is_pointwise())

    def _fused(self, x: Tensor, decay: Tensor) -> Tensor:
        """:meth:`forward` by kernels."""
        mixed = self.op.mix(x if self.post_norm else self.norm1(x), decay)
        if self.drop_path.is_active():  # it must see whole samples
            return self._fused_rows(x, mixed)
        return ops.apply_to_rows(self._fused_rows, x, mixed)

    def _fused_rows(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The pointwise rest of the block: 2 x (..., C) -> (..., C)."""
        projection, norm1, norm2 = self.op.out_linear, self.norm1, self.norm2
        branch = ops.linear(mixed, projection.weight, projection.bias)
        if not self.post_norm:
            branch = self.drop_path(branch)
            x, normed = ops.add_norm(x, branch, self.gamma1, norm2.weight, norm2.bias, norm2.eps)
            return self._add(x, self.mlp.fused(normed), self.gamma2)
        if self.drop_path.is_active():
            x = self._add(x, norm1(branch), self.gamma1)
            return self._add(x, norm2(self.mlp.fused(x)), self.gamma2)
        x = ops.norm_add(x, branch, self.gamma1, norm1.weight, norm1.bias, norm1.eps)
        return ops.norm_add(x, self.mlp.fused(x), self.gamma2, norm2.weight, norm2.bias, norm2.eps)


class Stage(nn.ModuleList):
    """Blocks of one resolution that share FVEs, and the downsampling behind them where another stage follows.

    Blocks and downsampling are the items 0 .. depth of the list, as in the released state dict.
    """

    def __init__(self, blocks: Sequence[Block], downsample: Downsample | None, with_cp: bool) -> None:
        super().__init__([*blocks, *([] if downsample is None else [downsample])])
        self.depth = len(blocks)
        self.with_cp = with_cp

    def forward(self, x: Tensor, freq_embed: Tensor | None, cache: DecayCache) -> tuple[Tensor, Tensor]:
        """Run the stage.

        Args:
            x: Map (B, H, W, C).
            freq_embed: FVEs on their own grid (H0, W0, C); ``None`` once deployed.
            cache: Decay maps of resolutions seen before.

        Returns:
            The output of the blocks (B, H, W, C), and what the next stage takes.
        """
        size = (x.shape[1], x.shape[2])
        decays: list[Tensor] | None = None
        embed: Tensor | None = None
        if freq_embed is None:
            decays = self._deployed_decays(size)
        elif self._may_share_decays(freq_embed):
            decays = self.decays(freq_embed, size, compute_dtype(x), cache)
        else:
            embed = ops.fit_freq_embed(freq_embed, size)
        fused = [decays is not None and type(block) is Block and block.fuses(x) for block in self.blocks]
        if decays is not None and freq_embed is not None:  # kept by the cache, and hooks may write to what they see
            decays = [decay if fuses else decay.clone() for decay, fuses in zip(decays, fused, strict=True)]

        def run_blocks(x: Tensor) -> Tensor:
            for index, block in enumerate(self.blocks):
                decay = None if decays is None else decays[index]
                if self.with_cp and torch.is_grad_enabled():
                    x = checkpoint(self._run, block, x, embed, decay, use_reentrant=False)
                else:
                    x = self._run(block, x, embed, decay)
            return x

        x = ops.apply_to_images(run_blocks, x) if all(fused) else run_blocks(x)
        return x, self[self.depth](x) if len(self) > self.depth else x

    @property
    def blocks(self) -> list[Block]:
        """The stage without its downsampling."""
        return cast(list[Block], list(self)[: self.depth])

    def decays(self, freq_embed: Tensor, size: tuple[int, int], dtype: torch.dtype, cache: DecayCache) -> list[Tensor]:
        """Decay maps (H, W, C) of all blocks for a map of ``size``, in ``dtype``, from the cache where it has them."""
        layers = [cast(nn.Linear, block.op.to_k[0]) for block in self.blocks]
        weights, biases = [k.weight for k in layers], [k.bias for k in layers]
        return ops.decay_maps(freq_embed, weights, biases, size, dtype, cache.handle)

    @staticmethod
    def _run(block: Block, x: Tensor, embed: Tensor | None, decay: Tensor | None) -> Tensor:
        # Under checkpointing the decay belongs inside: it is as large as the activations of one image.
        return block(x, block.op.decay(cast(Tensor, embed)) if decay is None else decay)

    def _may_share_decays(self, freq_embed: Tensor) -> bool:
        """Whether the decays of all blocks may come from one op, without gradients and calls of ``to_k``."""
        if not all(type(b.op) is HeatConduction2d and b.op.has_plain_decay(freq_embed) for b in self.blocks):
            return False
        return not needs_gradient(freq_embed, *(p for block in self.blocks for p in block.op.to_k.parameters()))

    def _deployed_decays(self, size: tuple[int, int]) -> list[Tensor]:
        decays: list[Tensor] = [block.op.k_exp for block in self.blocks]
        fixed = tuple(decays[0].shape[:2])
        if fixed != size:
            raise ValueError(
                f'this VHeat was deployed for a stage map of {fixed[0]}x{fixed[1]} but the input gives '
                f'{size[0]}x{size[1]}: resize the input, or deploy a fresh model with switch_to_deploy(size)'
            )
        return decays


class Stem(nn.Module):
    """Image (B, H, W, in_channels) -> map (B, H/4, W/4, C), sides rounded up."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        # The release permutes around each norm inside a sequential, hence the keys ``norm1.1`` and ``norm2.1``.
        self.conv1 = nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(nn.Identity(), nn.LayerNorm(dim // 2, eps=1e-6))
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(nn.Identity(), nn.LayerNorm(dim, eps=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        if may_fuse(x, self, Stem, self._is_as_built):
            arguments: list = []
            for conv, norm in ((self.conv1, self.norm1[1]), (self.conv2, self.norm2[1])):
                arguments += [(conv.weight, conv.bias), (norm.weight, norm.bias), norm.eps]
            return ops.embed_patches(x, *arguments)
        x = F.gelu(self.norm1(self.conv1(channels_first(x)).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(channels_first(x)).permute(0, 2, 3, 1))

    def _is_as_built(self) -> bool:
        classes = (nn.Identity, nn.LayerNorm)
        convs, norms = (self.conv1, self.conv2), (self.norm1, self.norm2)
        return all(is_conv(conv, 3, 2) for conv in convs) and all(has_plain_layers(norm, classes) for norm in norms)


class Downsample(nn.Sequential):
    """Map (B, H, W, C) -> (B, H/2, W/2, 2C), sides rounded up."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False), nn.LayerNorm(2 * dim))

    def forward(self, x: Tensor) -> Tensor:
        conv, *others = self
        fuses = may_fuse(x, self, Downsample)
        x = _convolve(conv, x) if fuses else conv(channels_first(x)).permute(0, 2, 3, 1)
        for layer in others:
            x = layer(x)
        return x


declare(HeatConduction2d, dwconv=nn.Conv2d, linear=nn.Linear, out_norm=nn.LayerNorm, out_linear=nn.Linear)
declare(Mlp, fc1=nn.Conv2d, fc2=nn.Conv2d)
declare(DropPath)
declare(Block, norm1=nn.LayerNorm, op=HeatConduction2d, norm2=nn.LayerNorm, mlp=Mlp, drop_path=DropPath)
declare(Stem, conv1=nn.Conv2d, norm1=nn.Sequential, conv2=nn.Conv2d, norm2=nn.Sequential)
declare(Downsample, **{'0': nn.Conv2d})


class FreqEmbeds(nn.ParameterList):
    """Frequency value embeddings (FVEs) of all stages; called, so that tools that load weights for a call find them."""

    __call__ = nn.Module.__call__  # a ParameterList refuses to be called

    def forward(self, stage: int) -> Tensor:
        """FVEs (H, W, C) of a stage on their own grid."""
        return self[stage]


@MODELS.register_module()
class VHeat(BaseModule):
    """vHeat backbone with multi-scale output for dense prediction, or the last map for classification.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict with ``embed_dims`` (C of the first stage; the others
            have 2C, 4C, 8C), ``depths`` (blocks of the four stages) and, optionally, ``post_norm`` (default
            ``False``) and ``layer_scale`` (initial value or ``None``, the default).
        img_size: Image size, int or (height, width) in pixels, whose stage maps give the grid of the frequency value
            embeddings. Images of any size can be passed; the embeddings are resized to their maps.
        in_channels: Channels of the image.
        mlp_ratio: Hidden over outer width of the MLPs.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0 at the first.
        out_indices: Stages (0 to 3, negative from the end) whose output is returned, in ascending order. Stages
            after the last of them are not built.
        frozen_stages: -1 freezes nothing, 0 the stem, n the stem and the first n stages with their output norms.
        with_cp: Recompute every block's activations in backward to save memory.
        pretrained: Path or name of a checkpoint, as in ``init_cfg=dict(type='Pretrained', checkpoint=pretrained)``
            (mmseg's models pass theirs), or ``True`` for the published classifier of ``arch``.
        init_cfg: MMEngine's. ``dict(type='Pretrained', checkpoint=...)`` goes through
            :func:`vheat_mm.models.weights.load_pretrained` and takes its arguments (``prefix``, ``ema``, ``resize``).

    Shapes:
        Image (B, in_channels, H, W) -> tuple of maps (B, C 2^i, H / 2^(i+2), W / 2^(i+2)), sides rounded up,
        contiguous.
    """

    def __init__(
        self,
        arch: str | Mapping = 'tiny',
        img_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        pretrained: str | bool | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=read_pretrained(pretrained, init_cfg, arch))
        self.init_cfg: dict | list[dict] | None
        self.arch = read_arch(arch)
        self.img_size = to_pair(img_size, 'img_size')
        self.out_indices = read_out_indices(out_indices)
        check_numbers(in_channels, mlp_ratio, drop_path_rate, frozen_stages)
        self.frozen_stages = frozen_stages
        self.depths: tuple[int, ...] = self.arch['depths']
        self.num_features = [self.arch['embed_dims'] << i for i in range(NUM_STAGES)]
        num_stages = self.out_indices[-1] + 1

        self.patch_embed = Stem(in_channels, self.arch['embed_dims'])
        self.freq_embed: FreqEmbeds | None = FreqEmbeds(
            nn.Parameter(torch.zeros(*size, dim))
            for size, dim in zip(grid_sizes(self.img_size), self.num_features[:num_stages], strict=False)
        )
        last = sum(self.depths) - 1
        rates = [drop_path_rate * i / last for i in range(last + 1)]
        self.layers = nn.ModuleList()
        for i, dim in enumerate(self.num_features[:num_stages]):
            blocks = [
                Block(dim, mlp_ratio, rates.pop(0), self.arch['post_norm'], self.arch['layer_scale'])
                for _ in range(self.depths[i])
            ]
            self.layers.append(Stage(blocks, Downsample(dim) if i + 1 < num_stages else None, with_cp))
        for i in self.out_indices:
            self.add_module(f'outnorm{i}', nn.LayerNorm(self.num_features[i]))

        self.decay_cache = DecayCache()
        onednn.probe()
        self._initialize()
        self._register_load_state_dict_pre_hook(resize_loaded_freq_embeds, with_module=True)
        for frozen in [*self._frozen_modules(), *self.freq_embed[: max(frozen_stages, 0)]]:
            frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, in_channels, H, W), H and W at least 1 -> tuple of maps, one per output index.

        Raises:
            ValueError: No batch of images as a tensor.
        """
        if not isinstance(x, Tensor) or x.ndim != 4:
            given = f'shape {tuple(x.shape)}' if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f'VHeat takes a batch of images as a tensor (B, C, H, W), got {given}')
        maps = self.forward_stages(x, self.out_indices)
        return tuple(self.to_output(features, i) for i, features in zip(self.out_indices, maps, strict=True))

    def forward_stages(self, x: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Image (B, in_channels, H, W) -> outputs of ``stages``, ascending, before their norms, (B, H, W, C) each.

        Nothing after the last of them is run.
        """
        x = x.permute(0, 2, 3, 1)
        if not torch.compiler.is_compiling():
            x = x.contiguous()  # from here on every permutation between (B, C, H, W) and (B, H, W, C) is a view
        x = self.patch_embed(x)
        outputs = []
        for i, stage in enumerate(self.layers):
            embed = None if self.freq_embed is None else self.freq_embed(i)
            features, x = stage(x, embed, self.decay_cache)
            if i in stages:
                outputs.append(features)
            if len(outputs) == len(stages):
                break
        return outputs

    def to_output(self, features: Tensor, stage: int, norm: bool = True) -> Tensor:
        """What a stage computes (B, H, W, C) -> as the network returns it (B, C, H, W), behind its output norm."""
        if norm:
            features = self.get_submodule(f'outnorm{stage}')(features)
        # Outputs are plain (B, C, H, W) memory: mmcv's RoIAlign (2.1.0) reads a channels-last map as if it were one,
        # without an error, and the heads behind it never learn.
        return features.permute(0, 3, 1, 2).contiguous()

    @property
    def feature_info(self) -> FeatureInfo:
        """The outputs, one dict each: channels ``num_chs``, stride ``reduction``, ``module``, stage ``index``."""
        return FeatureInfo.of_stages(self.num_features, {i: f'outnorm{i}' for i in self.out_indices})

    def init_weights(self) -> None:
        """Apply ``init_cfg``; a ``Pretrained`` entry is loaded last, checked key by key and reported."""
        if self.is_init:
            return
        entries = [self.init_cfg] if isinstance(self.init_cfg, Mapping) else list(self.init_cfg or [])
        names = ('Pretrained', 'PretrainedInit')  # the second is the class, in configs in pure Python
        pretrained = [entry for entry in entries if type_name(entry) in names]
        others = [entry for entry in entries if type_name(entry) not in names]
        if others or not pretrained:
            configured, self.init_cfg = self.init_cfg, others
            super().init_weights()
            self.init_cfg = configured
        for entry in pretrained:
            load_pretrained(self, **{key: value for key, value in entry.items() if key != 'type'})
        self._is_init = True

    def switch_to_deploy(self, size: int | Sequence[int] | None = None) -> None:
        """Fold the decay maps for one image size into constants, as the release's re-parameterisation does.

        ``to_k`` and the frequency value embeddings are dropped; each operator gets ``k_exp`` (H, W, C). Afterwards the
        model takes images of this size only and loads the release's re-parameterised state dict.

        Args:
            size: Image size, int or (height, width) in pixels; ``img_size`` by default.
        """
        if self.freq_embed is None:
            raise RuntimeError('this VHeat is deployed already; build a fresh one to deploy for another size')
        size = self.img_size if size is None else to_pair(size, 'size')
        for stage, embed, grid in zip(self.layers, self.freq_embed, grid_sizes(size), strict=False):
            embed = resize_freq_embed(embed, grid, mode='bicubic')
            for block in cast(Stage, stage).blocks:
                block.op.deploy(embed)  # not switch_to_deploy: timm calls every method of that name
        self.freq_embed = None
        self.decay_cache.clear()
        print_log(f'VHeat deployed for images of {size[0]}x{size[1]} pixels', logger='current')

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay, in mmpretrain's sense.

        Args:
            param_name: Name in the model's ``named_parameters()``.
            prefix: The backbone's prefix in it, such as ``'backbone.'``.

        Returns:
            Depth (0 for the stem, then one per block, the last for output norms and everything outside the
            backbone) and the number of depths.
        """
        depths = self.depths[: len(self.layers)]  # stages behind the last output are not built
        num_depths = sum(depths) + 2
        inside = param_name.startswith(prefix)
        return depth_of(param_name[len(prefix) :], depths) if inside else num_depths - 1, num_depths

    def train(self, mode: bool = True) -> VHeat:
        """Set training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _initialize(self) -> None:
        """Linear layers and FVEs truncated normal (0.02); norms 1 and 0; convolutions PyTorch's default."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_init(module, std=0.02)
        for embed in self.freq_embed or ():
            trunc_normal_(embed, std=0.02)

    def _frozen_modules(self) -> list[nn.Module]:
        norms = [self.get_submodule(f'outnorm{i}') for i in self.out_indices if i < self.frozen_stages]
        return [self.patch_embed, *self.layers[: self.frozen_stages], *norms] if self.frozen_stages >= 0 else []
