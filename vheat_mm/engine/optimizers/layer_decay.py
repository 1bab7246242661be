"""Layer-wise learning-rate decay under mmdet, mmseg and mmpretrain."""

from __future__ import annotations

from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor, with learning rates that decrease from the heads to the stem.

    mmdet's and mmseg's constructors of this kind support a fixed list of backbones, and mmpretrain's supports
    classifiers only. This one calls ``model.backbone.get_layer_depth``, which :class:`~vheat_mm.VHeat` and many of
    mmpretrain's backbones have.

    ``paramwise_cfg`` takes the options of the default constructor, ``lr_mult`` included, and

    - ``layer_decay_rate`` (float in (0, 1], required): at depth d of D, from 0 (stem) to D - 1 (output norms, neck,
      heads), the learning rate is multiplied by ``layer_decay_rate ** (D - 1 - d)``.

    Raises:
        ValueError: ``layer_decay_rate`` is missing or out of range.
        TypeError: The model has no backbone with ``get_layer_depth``.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(
                f'optim_wrapper.paramwise_cfg.layer_decay_rate must lie in (0, 1], got {rate!r}: '
                f'{type(self).__name__} needs it, for example layer_decay_rate=0.9'
            )
        if self.base_lr is None:
            raise ValueError(f'optim_wrapper.optimizer.lr is not set: {type(self).__name__} scales it')

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module: int | float | None = None
    ) -> None:
        """Append a group per parameter of ``module``; called for the model and, by recursion, for its children."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:
            return
        backbone: Any = getattr(module, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(
                f'{type(module).__name__}.backbone is {type(backbone).__name__}, which has no get_layer_depth: '
                f'remove constructor={type(self).__name__!r} from optim_wrapper, or use a backbone that has it'
            )
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        rate = self.paramwise_cfg['layer_decay_rate']
        for group in params:
            depth, num_depths = backbone.get_layer_depth(names[id(group['params'][0])], 'backbone.')
            group['lr'] = group.get('lr', self.base_lr) * rate ** (num_depths - 1 - depth)
        rates = [group['lr'] for group in params]
        print_log(f'layer-wise decay {rate}: learning rates {min(rates):.3g} .. {max(rates):.3g}', logger='current')
