"""Only checkpoints that can be read again are saved."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from vheat_mm.checkpoint.plain import drop_functions, find_refused, to_plain
from vheat_mm.utils.errors import CheckpointError

# Without them, a training cannot be resumed; other entries are of hooks.
_NEEDED = ('meta', 'state_dict', 'optimizer', 'param_schedulers', 'message_hub')
_REMEDY = 'store numbers, strings, lists, dicts with strings as keys, or tensors there'


class _TrialEndError(Exception):
    """Ends a trial of saving before anything is written."""


class ReadableCheckpointHook(Hook):
    """Convert a checkpoint to plain data before it is saved, and refuse what ``read_checkpoint`` would refuse.

    :class:`AtomicCheckpointHook` registers it behind all other hooks, so that it sees their entries, too. Saving is
    tried before the first iteration. What a hook puts into the message hub later is left out with an error in the log.

    Raises:
        CheckpointError: Names the part of the checkpoint that could not be read again.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._trial = False
        self._left_out: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        """Try to save; nothing is written."""
        runner.call_hook('before_collective_save')
        self._trial = True
        try:
            runner.save_checkpoint(
                runner.work_dir,
                '',
                save_optimizer=isinstance(runner, Runner),  # sharded ones have no state before their first step
                save_param_scheduler=runner.param_schedulers is not None,
            )
        except _TrialEndError:
            pass
        finally:
            self._trial = False

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Convert the checkpoint in place, and check it."""
        schedulers = checkpoint.get('param_schedulers')
        if isinstance(schedulers, dict):  # of several optimizers
            checkpoint['param_schedulers'] = {key: [*map(drop_functions, each)] for key, each in schedulers.items()}
        elif schedulers is not None:
            checkpoint['param_schedulers'] = [*map(drop_functions, schedulers)]
        for key in checkpoint:
            checkpoint[key] = to_plain(checkpoint[key])
        found = find_refused(checkpoint)
        if found is not None and not self._trial:
            self._leave_out(runner, checkpoint['message_hub']['runtime_info'], 'message_hub.runtime_info.')
            self._leave_out(runner, checkpoint, '')
            found = find_refused(checkpoint)
        if found is not None:
            place, reason = found
            raise CheckpointError(f'checkpoints of this run could not be read again. {place}: {reason}; {_REMEDY}')
        if self._trial:
            raise _TrialEndError

    def _leave_out(self, runner: Runner, entries: dict[str, Any], place: str) -> None:
        for key in entries.keys() - set(_NEEDED):
            if (found := find_refused(entries[key], place + str(key))) is not None:
                del entries[key]
                if key not in self._left_out:
                    runner.logger.error(f'left out of checkpoints. {found[0]}: {found[1]}; {_REMEDY}')
                self._left_out.add(key)
