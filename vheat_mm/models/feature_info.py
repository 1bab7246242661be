"""Description of a model's feature maps as in timm, for code that builds a neck or a decoder on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class FeatureInfo(list[dict[str, Any]]):
    """One dict per feature map, shallow to deep, with the methods of timm's ``FeatureInfo``.

    Keys of a dict:
        num_chs: Channels.
        reduction: Stride in pixels: an image of H pixels gives a map of H / reduction, rounded up.
        module: Name of the module that computes it, in the model's ``named_modules()``; that module's output is
            (B, H, W, C).
        index: Stage, 0 to 3.
    """

    @classmethod
    def of_stages(cls, dims: Sequence[int], modules: Mapping[int, str]) -> FeatureInfo:
        """From the channels of all stages, and the modules behind the maps of some stages."""
        return cls(dict(num_chs=dims[i], reduction=4 << i, module=name, index=i) for i, name in modules.items())

    def channels(self) -> list[int]:
        """Channels of every map."""
        return [entry['num_chs'] for entry in self]

    def reduction(self) -> list[int]:
        """Stride of every map, in pixels."""
        return [entry['reduction'] for entry in self]

    def module_name(self) -> list[str]:
        """Name of the module behind every map."""
        return [entry['module'] for entry in self]
