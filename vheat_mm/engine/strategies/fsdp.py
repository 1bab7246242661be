"""FSDP through MMEngine's ``FlexibleRunner``, mended where MMEngine and PyTorch have parted; see ``docs/fsdp.md``.

Registered by ``custom_imports = dict(imports=['vheat_mm.fsdp'])`` in a config, as the import needs PyTorch's FSDP.
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

    - Optimizer states are loaded with PyTorch's present order of arguments; MMEngine's, of PyTorch 2.0, ends every
      resume with ``TypeError: unhashable type: 'dict'``.
    - The loss scaler's state of ``AmpOptimWrapper`` is saved and resumed, where MMEngine drops it.
    - Each stage of the backbone is a unit, gathered and freed on its own. A single block cannot be one: its stage
      reads the block's ``to_k`` before it calls the block.
    - Without a GPU the model stays on the CPU, where MMEngine names a GPU of the local rank's number.
    - Weights are saved without FSDP's marks, so that safe loading takes them.
    - Checkpoints are whole (``epoch_1.pth``, as DDP writes them). MMEngine's ``'local'`` ones hold classes that safe
      loading refuses.

    Args:
        model_wrapper: Arguments of ``MMFullyShardedDataParallel``, such as ``auto_wrap_policy``. ``use_orig_params``
            is set, without which ``paramwise_cfg`` finds no parameters.
        **kwargs: Those of ``FSDPStrategy``, but for ``state_dict_cfg``.

    Raises:
        ValueError: ``state_dict_cfg`` or ``use_orig_params=False`` was given.
    """

    def __init__(self, *, model_wrapper: dict | None = None, **kwargs: Any) -> None:
        if 'state_dict_cfg' in kwargs:
            raise ValueError('ShardedStrategy writes whole checkpoints: remove strategy.state_dict_cfg')
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
        # Moving to the CPU what is there already copies nothing, and PyTorch frees it: a segmentation fault.
        self.state_dict_config = FullStateDictConfig(rank0_only=True, offload_to_cpu=not on_cpu)
        self.optim_state_dict_config = FullOptimStateDictConfig(rank0_only=True, offload_to_cpu=not on_cpu)

    def model_state_dict(self) -> dict:
        """The whole weights in the first process, without the marks that FSDP leaves on them.

        A tensor with attributes of its own is pickled as code to be run, which ``read_checkpoint`` refuses.
        """
        return {key: value.detach() for key, value in super().model_state_dict().items()}

    def optim_state_dict(self) -> dict:
        """The whole optimizer state in the first process, by names of parameters; the loss scaler's with it."""
        state = FSDP.optim_state_dict(self.model, self.optim_wrapper.optimizer)
        if hasattr(self.optim_wrapper, 'loss_scaler'):
            state['loss_scaler'] = self.optim_wrapper.loss_scaler.state_dict()
        return state

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load this process's part of what :meth:`optim_state_dict` returned."""
        state_dict = dict(state_dict)
        scaler = state_dict.pop('loss_scaler', None)
        optimizer = self.optim_wrapper.optimizer
        own = FSDP.optim_state_dict_to_load(self.model, optimizer, state_dict)
        if scaler is not None:
            own['loss_scaler'] = scaler
        self.optim_wrapper.load_state_dict(own)
