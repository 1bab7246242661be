"""The published classifier as a plain module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vheat_mm.models.feature_info import FeatureInfo
from vheat_mm.models.vheat import VHeat
from vheat_mm.ops.freq_embed import NUM_STAGES


class VHeatClassifier(nn.Module):
    """The published classifier: norm, global average pooling and a linear layer after the last stage.

    State-dict keys are those of MMPreTrain's ``ImageClassifier`` with this backbone (``backbone.``, ``head.fc.``), so
    each loads the other's weights.

    Args:
        num_classes: Outputs of the linear layer; with 0 the model returns the averaged map.
        arch: See :class:`~vheat_mm.VHeat`, as for the others.

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
        """Replace the linear layer by a new one of ``num_classes`` outputs; 0 removes it."""
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
        """Image (B, in_channels, H, W) -> normalised last map (B, 8C, H / 32, W / 32), sides rounded up."""
        return self.backbone(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, in_channels, H, W) -> logits (B, num_classes)."""
        pooled = self.forward_features(x).mean((2, 3))
        return self.head['fc'](pooled) if self.num_classes else pooled

    @property
    def feature_info(self) -> FeatureInfo:
        """Describes the output of :meth:`forward_features`."""
        return FeatureInfo(entry | dict(module=f'backbone.{entry["module"]}') for entry in self.backbone.feature_info)
