"""Whether the training state in a checkpoint has the form of the runner's own."""

from __future__ import annotations

from numbers import Number
from typing import Any

from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor

_OF_PARAMETERS = {'exp_avg', 'exp_avg_sq', 'momentum_buffer', 'max_exp_avg_sq'}  # tensors in a parameter's shape


def check_state(runner: Runner, checkpoint: dict[str, Any]) -> str | None:
    """What is wrong with the states of schedulers and optimizer; ``None`` if they can be loaded.

    The libraries copy them into their objects as they are: a wrong type is an error at some later iteration, and a key
    with the name of a method replaces the method.
    """
    own: Any = runner.param_schedulers
    saved: Any = checkpoint.get('param_schedulers')
    if own and saved:
        if type(saved) is not (dict if isinstance(own, dict) else list):
            return f'param_schedulers is a {type(saved).__name__}'
        if isinstance(own, list):
            own, saved = {None: own}, {None: saved}
        for schedulers, each in [(own[key], saved[key]) for key in own.keys() & saved.keys()]:
            for number, (scheduler, state) in enumerate(zip(schedulers, each, strict=False)):
                place = f'param_schedulers[{number}]'
                if wrong := _wrong_key(scheduler.state_dict(), state, place):
                    return wrong
                if replaced := [key for key in state if hasattr(type(scheduler), str(key))]:
                    return f'{place}.{replaced[0]} would replace a method'
    wrapper, saved = runner.optim_wrapper, checkpoint.get('optimizer')
    if saved is None or isinstance(wrapper, OptimWrapperDict) or not hasattr(wrapper, 'optimizer'):
        return None
    groups = wrapper.param_groups
    if not isinstance(saved, dict) or not isinstance(saved.get('param_groups', []), list):
        return f'optimizer is a {type(saved).__name__}'
    for number, (group, state) in enumerate(zip(groups, saved.get('param_groups', []), strict=False)):
        if wrong := _wrong_key(group, state, f'optimizer.param_groups[{number}]'):
            return wrong
    for index, parameter in enumerate(parameter for group in groups for parameter in group['params']):
        state = saved.get('state', {}).get(index, {})
        for key in _OF_PARAMETERS & state.keys():
            if isinstance(state[key], Tensor) and state[key].shape != parameter.shape:
                shapes = f'{tuple(state[key].shape)}, expected {tuple(parameter.shape)}'
                return f'optimizer.state[{index}].{key} has the shape {shapes}'
    return None


def _wrong_key(own: dict[str, Any], saved: Any, place: str) -> str | None:
    """The first number of ``own`` that is none in ``saved``."""
    if not isinstance(saved, dict):
        return f'{place} is a {type(saved).__name__}'
    for key, value in own.items():
        if isinstance(value, Number) and not isinstance(saved.get(key, 0), Number | Tensor | None):
            return f'{place}.{key} is {str(saved[key])[:100]!r}, expected a number'
    return None
