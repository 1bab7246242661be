"""Refusing checkpoints that do not fit the model."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from vheat_mm.models.pretrained_init import to_mmengine
from vheat_mm.models.weights import check_fit
from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import CheckpointError


@HOOKS.register_module()
class CheckpointCheckHook(Hook):
    """Compare a checkpoint with the model before it is loaded; MMEngine itself only warns about differences.

    For testing and resuming every tensor of the model must be there, in its shape, and none may be left over. For
    fine-tuning (``load_from`` without ``resume``) this holds for the backbone without its output norms; differences of
    heads are logged. Frequency value embeddings may have another grid: VHeat resizes them.

    Keys of the release's checkpoints (entries ``model`` and ``model_ema``) are converted to MMEngine's.

    Args:
        ema: Take the moving average from a checkpoint of the release. By default a test of published weights, given by
            name, takes it where there is one, and nothing else does.

    Raises:
        CheckpointError: The checkpoint does not fit.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which reads ``state_dict``

    def __init__(self, ema: bool | None = None) -> None:
        self.ema = ema

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Convert keys and check the weights; MMEngine loads ``checkpoint['state_dict']`` afterwards."""
        path = str(runner._load_from)
        own = {key: value for key, value in unwrap(runner.model).state_dict().items() if isinstance(value, Tensor)}
        # ``train()`` builds the optimizer before it loads; ``test()`` and ``val()`` never do.
        finetune = isinstance(runner.optim_wrapper, OptimWrapper) and not runner._resume
        if runner._resume and not {'meta', 'optimizer', 'state_dict'} <= set(checkpoint):
            raise CheckpointError(
                f'cannot resume from {path!r}: it holds weights but no training state; to start a new training '
                'from these weights, drop --resume and pass --cfg-options load_from=PATH'
            )
        ema = False if finetune and self.ema is None else self.ema
        converted = to_mmengine(checkpoint, own, path, ema, finetune)
        if 'state_dict' not in checkpoint:
            checkpoint.clear()
        checkpoint['state_dict'] = converted
        state = {key: value for key, value in converted.items() if isinstance(value, Tensor)}
        runner.logger.info(check_fit(state, own, path, finetune))
