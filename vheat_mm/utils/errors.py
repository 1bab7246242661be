"""Errors of this package, and how an error is told to the user."""

from __future__ import annotations

import re
import traceback

from vheat_mm.utils.process import REQUEUE


class VHeatError(Exception):
    """Base class of this package's errors."""


class CheckpointError(VHeatError, RuntimeError):
    """A checkpoint that is missing, corrupt, unsafe or not of this model; nothing was loaded or written."""


class ToolError(VHeatError):
    """Wrong use of a command-line tool; the message says what to change."""


class ArgumentError(ToolError):
    """A value that a function does not take.

    Args:
        argument: Its name.
        value: What was given.
        reason: What is wrong with it.
    """

    def __init__(self, argument: str, value: object, reason: str) -> None:
        super().__init__(argument, value, reason)

    def __str__(self) -> str:
        return '{}={!r}: {}'.format(*self.args)

    def of_command(self) -> str:
        """The message with the tools' option in place of the argument."""
        argument, value, reason = self.args
        option = '--slice' if argument == 'slice_size' else '--' + argument.replace('_', '-')
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        return f'{" ".join([option, *map(str, values)])}: {reason}'


class AnnotationError(VHeatError, ValueError):
    """Annotations that do not fit the model or the data set's class names."""


class NonFiniteError(VHeatError, RuntimeError):
    """Training stopped after too many steps in a row whose loss or gradient was NaN or infinity."""


class BrokenSampleError(VHeatError, RuntimeError):
    """So many samples cannot be loaded that no others may take their places, or one of a validation or test set."""


class ViewError(VHeatError, ValueError):
    """An augmented view of an image lacks what is needed to merge its predictions."""


class StopRequested(SystemExit):
    """Training ended on a signal.

    Attributes:
        code: :data:`REQUEUE`, the exit status.
        message: What was saved.
    """

    def __init__(self, message: str) -> None:
        super().__init__(REQUEUE)
        self.message = message


# The user can fix these: tools print the message alone.
USER_ERRORS = (VHeatError, OSError)


def describe(error: BaseException) -> str:
    """An error's message, with its type in front where the message alone is not clear."""
    while str(error).startswith('Failed to import ') and isinstance(error.__context__, ImportError):
        error = error.__context__  # MMEngine's own lists all of sys.path
    # str() of a KeyError puts its argument in quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if text == 'need at least one array to concatenate':  # MMEngine, of a data set without samples
        return _describe_empty_dataset(error)
    if 'DataLoader worker' in text:  # holds the worker's traceback, whose last line is the error
        text = text.strip().splitlines()[-1]
        text = re.sub(r'^(?:vheat_mm[\w.]*|OSError): ', '', text)
    if isinstance(error, ModuleNotFoundError):
        removed = error.name == 'pkg_resources'  # MMEngine imports it for bases of other packages
        text += "; pip install 'setuptools<81'" if removed else '; install it, or add its folder to PYTHONPATH'
    if isinstance(error, (*USER_ERRORS, ValueError, RuntimeError)) and text:
        return text
    if not text:  # a bare assertion: say where it is
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f'{frame.line} (line {frame.lineno} of {frame.filename})'
    return f'{type(error).__name__}: {text}'


def _describe_empty_dataset(error: BaseException) -> str:
    """Say where the data set whose loading failed has looked for samples."""
    looked = ''
    for frame, _ in traceback.walk_tb(error.__traceback__):
        dataset = frame.f_locals.get('self')
        if hasattr(dataset, 'data_prefix'):
            names = ('ann_file', 'data_prefix', 'img_suffix')
            places = [f'{name}={getattr(dataset, name)!r}' for name in names if hasattr(dataset, name)]
            looked = f': {type(dataset).__name__} with {", ".join(places)}'
    return f'a data set is empty{looked}; check its paths, the suffix of its images, and filter_cfg'
