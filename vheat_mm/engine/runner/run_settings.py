"""What was changed between a training and its continuation, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop, Runner

from vheat_mm.utils.errors import CheckpointError

_POSITION = 'training continues at about the same part of the data; the learning rate is not changed'
_NOTES = {
    'batch_size': _POSITION,
    'number of samples': _POSITION,
    'number of processes': _POSITION,
    'sampler': 'samples are drawn in another order from here on',
    'accumulative_counts': 'the number of samples in an optimizer step changes from here on',
    'parameter schedulers': 'the learning rate stays at its value in the checkpoint',
    'save_best': 'the best checkpoint is chosen anew, without those before',
}
_REFUSED = {
    'kind of loop': 'its epochs and iterations would be counted in another way',
    'optimizer': 'its state does not fit the new one',
    'parameter groups': 'the state of the optimizer belongs to other parameters',
    'parameter schedulers': 'their state does not fit the new ones',
}
_NUMBER = (int, float)


def run_settings(runner: Runner) -> dict[str, Any]:
    """The settings that a continued training should share with its beginning, as plain data.

    Call it before the states of optimizer and schedulers are loaded: the settings of schedulers are then those of the
    config.
    """
    loop, loader = runner.train_loop, runner.train_loop.dataloader
    wrapper = runner.optim_wrapper
    wrappers = dict(wrapper.items()) if isinstance(wrapper, OptimWrapperDict) else {'': wrapper}
    schedulers = list(_schedulers(runner.param_schedulers))
    return {
        'kind of loop': 'by iteration' if isinstance(loop, IterBasedTrainLoop) else 'by epoch',
        'length': loop.max_iters if isinstance(loop, IterBasedTrainLoop) else loop.max_epochs,
        'batch_size': getattr(loader.batch_sampler, 'batch_size', None),
        'number of samples': len(loader.dataset) if hasattr(loader.dataset, '__len__') else None,
        'number of processes': get_world_size(),
        'sampler': f'{type(loader.sampler).__name__}(shuffle={getattr(loader.sampler, "shuffle", None)})',
        'accumulative_counts': [getattr(each, '_accumulative_counts', 1) for each in wrappers.values()],
        'save_best': [hook.save_best for hook in runner.hooks if isinstance(hook, CheckpointHook)],
        'EMAHook': any(isinstance(hook, EMAHook) for hook in runner.hooks),
        'optimizer': [type(getattr(each, 'optimizer', each)).__name__ for each in wrappers.values()],
        'parameter groups': [[len(group['params']) for group in each.param_groups] for each in wrappers.values()],
        'hyperparameters': [_numbers(group) for each in wrappers.values() for group in each.param_groups],
        'parameter schedulers': [type(each).__name__ for each in schedulers],
        'settings of schedulers': [_numbers(each.state_dict()) for each in schedulers],
    }


def _schedulers(schedulers: Any) -> Iterator[Any]:
    for each in schedulers.values() if isinstance(schedulers, dict) else [schedulers or []]:
        yield from each


def _numbers(settings: dict[str, Any]) -> dict[str, Any]:
    """Numbers and pairs of numbers; of a scheduled value, what it starts from."""
    found = {}
    for key, value in settings.items():
        value = settings.get(f'initial_{key}', value)
        single = isinstance(value, _NUMBER) or value is None
        if not key.startswith(('_', 'initial_')) and (
            single or (isinstance(value, tuple) and all(isinstance(item, _NUMBER) for item in value))
        ):
            found[key] = value if single else list(value)
    return found


def compare_settings(old: dict[str, Any], new: dict[str, Any], meta: dict[str, Any], path: str) -> list[str]:
    """One line per difference, which says what follows from it.

    Args:
        old: :func:`run_settings` of the run that wrote the checkpoint.
        new: Those of this run.
        meta: The checkpoint's ``meta``, with its epoch and iteration.
        path: The checkpoint, named in the error.

    Raises:
        CheckpointError: The training state does not fit this run.
    """
    lines = []
    for name in [name for name in new if name in old and old[name] != new[name]]:
        change = f'{name} {_text(old[name])} -> {_text(new[name])}'
        if name in _REFUSED and new[name] != []:
            raise CheckpointError(
                f'cannot resume from {path!r}: {change}; {_REFUSED[name]}. Restore the setting, or start a new '
                'training from these weights: without --resume, with --cfg-options load_from=PATH'
            )
        if name in _NOTES:
            lines.append(f'{change}: {_NOTES[name]}')
        elif name == 'EMAHook':
            added = 'the moving average begins with the weights of the checkpoint'
            removed = 'training continues from the moving average; the weights beside it are dropped'
            lines.append(f'{change}: {added if new[name] else removed}')
        elif name == 'length':
            done = meta['iter' if new['kind of loop'] == 'by iteration' else 'epoch']
            over = f'{done} are done, nothing is left to train' if done >= new[name] else 'training ends there'
            lines.append(f'length of training {change.removeprefix("length ")}: {over}')
        elif name in ('hyperparameters', 'settings of schedulers') and len(old[name]) == len(new[name]):
            lines += _overridden(old, new, name)
    return lines


def batches_done(done: int, old: dict[str, Any], new: dict[str, Any]) -> int:
    """The number of batches after which this run is at about the place of the earlier one after ``done`` batches."""

    def samples_a_step(settings: dict[str, Any]) -> int:
        return (settings.get('batch_size') or 1) * settings.get('number of processes', 1)

    if done < 0:
        raise ValueError(f'{done} batches done')
    lengths = new.get('number of samples') or 1, old.get('number of samples') or 1
    return done * samples_a_step(old) * lengths[0] // (samples_a_step(new) * lengths[1])


def _overridden(old: dict[str, Any], new: dict[str, Any], name: str) -> Iterator[str]:
    """Settings of the config that the state in the checkpoint replaces, each once."""
    seen = set()
    for place, (before, now) in enumerate(zip(old[name], new[name], strict=True)):
        owner = new['parameter schedulers'][place] if name == 'settings of schedulers' else 'optimizer'
        for key in before.keys() & now.keys():
            if before[key] != now[key] and (owner, key) not in seen:
                seen.add((owner, key))
                yield (
                    f'{owner}: {key} {before[key]} -> {now[key]}: the value of the config is NOT used, the state in '
                    f'the checkpoint keeps {before[key]}'
                )


def _text(value: Any) -> str:
    if isinstance(value, list):
        shown = ', '.join(_text(item) for item in value)
        return (shown if len(shown) < 200 else shown[:200] + ' ...') or 'none'
    return str(value)
