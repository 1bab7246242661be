"""FSDP through MMEngine's ``FlexibleRunner``, with fixes for current PyTorch versions; see ``docs/fsdp.md``.

Configs register it by ``custom_imports = dict(imports=['vheat_mm.fsdp'])``; the import needs PyTorch's FSDP.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine._strategy.fsdp import FSDP, FSDPStrategy
from mmengine.device import get_device
from mmengine.registry import STRATEGIES
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from vheat_mm.models.vheat import Stage


@STRATEGIES.register_module()
class ShardedStrategy(FSDPStrategy):
    """MMEngine's ``FSDPStrategy`` (mmengine <= 0.10.7) with six differences.

    - Optimizer states are loaded with the argument order of current PyTorch. MMEngine uses that of PyTorch 2.0, so
      every resume ends with ``TypeError: unhashable type: 'dict'``.
    - The loss scaler's state of ``AmpOptimWrapper`` is saved and resumed, where MMEngine drops it.
    - Each stage of the backbone is an FSDP unit. A block cannot be one: its stage reads the block's ``to_k`` before
      it calls the block.
    - Without a GPU the model stays on the CPU, where MMEngine chooses a GPU by the local rank.
    - Weights are saved without the attributes that FSDP sets on tensors, so that safe loading accepts them.
    - Checkpoints hold full weights (``epoch_1.pth``, as DDP writes them). MMEngine's ``'local'`` ones hold classes
      that safe loading refuses.

    Args:
        model_wrapper: Arguments of ``MMFullyShardedDataParallel``, such as ``auto_wrap_policy``. ``use_orig_params``
            is set, without which ``paramwise_cfg`` finds no parameters.
        **kwargs: Those of ``FSDPStrategy``, except ``state_dict_cfg``.

    Raises:
        ValueError: ``state_dict_cfg`` or ``use_orig_params=False`` was given.
    """

    def __init__(self, *, model_wrapper: dict | None = None, **kwargs: Any) -> None:
        if 'state_dict_cfg' in kwargs:
            raise ValueError('ShardedStrategy always saves full weights: remove strategy.state_dict_cfg')
        wrapper = dict(
            type='MMFullyShardedDataParallel', use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({Stage})
        ) | (model_wrapper or {})
        if not wrapper['use_orig_params']:
            raise ValueError('ShardedStrategy: strategy.model_wrapper.use_orig_params must be True')
        on_cpu = get_device() == 'cpu'
        if on_cpu:
            wrapper['device_id'] = torch.device('cpu')
        super().__init__(model_wrapper=wrapper, state_dict_cfg='full', **kwargs)
        self.state_dict_type = StateDictType.FULL_STATE_DICT
        # On the CPU, offloading copies nothing, and PyTorch then frees the weights themselves: a segmentation fault.
        self.state_dict_config = FullStateDictConfig(rank0_only=True, offload_to_cpu=not on_cpu)
        self.optim_state_dict_config = FullOptimStateDictConfig(rank0_only=True, offload_to_cpu=not on_cpu)

    def model_state_dict(self) -> dict:
        """The full weights on rank 0, without the attributes that FSDP sets on tensors.

        A tensor with extra attributes is pickled with a function call that ``read_checkpoint`` refuses.
        """
        return {key: value.detach() for key, value in super().model_state_dict().items()}

    def optim_state_dict(self) -> dict:
        """The full optimizer state on rank 0, by parameter name, with the loss scaler's."""
        state = FSDP.optim_state_dict(self.model, self.optim_wrapper.optimizer)
        if hasattr(self.optim_wrapper, 'loss_scaler'):
            state['loss_scaler'] = self.optim_wrapper.loss_scaler.state_dict()
        return state

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load this rank's part of what :meth:`optim_state_dict` returned."""
        state_dict = dict(state_dict)
        scaler = state_dict.pop('loss_scaler', None)
        optimizer = self.optim_wrapper.optimizer
        own = FSDP.optim_state_dict_to_load(self.model, optimizer, state_dict)
        if scaler is not None:
            own['loss_scaler'] = scaler
        self.optim_wrapper.load_state_dict(own)
