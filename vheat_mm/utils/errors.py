"""The errors of this package, and an error as a sentence."""

from __future__ import annotations

import re
import traceback

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, unreadable, unsafe, or not of this model; nothing was loaded or written."""


class ToolError(Exception):
    """Wrong use of a tool, with the remedy in its message."""


class AnnotationError(ValueError):
    """Annotations that do not fit the model, or do not fit the data set's class names."""


class NonFiniteError(RuntimeError):
    """So many steps in a row had a loss or gradient that is not finite that training cannot go on."""


class StopRequested(SystemExit):
    """Training has ended on a signal; ``code`` is :data:`REQUEUE`, ``message`` tells what was saved."""

    def __init__(self, message: str) -> None:
        super().__init__(REQUEUE)
        self.message = message


class BrokenSampleError(RuntimeError):
    """Sample after sample cannot be loaded: it is no single bad file."""


class ViewError(ValueError):
    """A view of an image does not say what merging must know."""


# What the user can mend: told in one message, without a traceback.
_KNOWN = (ToolError, CheckpointError, AnnotationError, BrokenSampleError, NonFiniteError, ViewError, OSError)


def describe(error: BaseException) -> str:
    """An error as a sentence: its text, after its kind where the text alone would be cryptic."""
    # KeyError quotes its only argument when printed.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if text == 'need at least one array to concatenate':  # what MMEngine's data sets say when they hold nothing
        return _describe_empty_dataset(error)
    if 'DataLoader worker' in text:  # the worker's traceback as text: its last line is the error
        text = text.strip().splitlines()[-1]
        text = re.sub(r'^[\w.]*(?:OSError|AnnotationError|BrokenSampleError): ', '', text)
    speaking = (*_KNOWN, ValueError, RuntimeError)
    if isinstance(error, speaking) and text:
        return text
    if not text:  # a bare assertion: its place says more than nothing
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f'{frame.line} (line {frame.lineno} of {frame.filename})'
    return f'{type(error).__name__}: {text}'


def _describe_empty_dataset(error: BaseException) -> str:
    """Where the data set whose loading failed has looked for samples."""
    looked = ''
    for frame, _ in traceback.walk_tb(error.__traceback__):
        dataset = frame.f_locals.get('self')
        if hasattr(dataset, 'data_prefix'):
            names = ('ann_file', 'data_prefix', 'img_suffix')
            places = [f'{name}={getattr(dataset, name)!r}' for name in names if hasattr(dataset, name)]
            looked = f': {type(dataset).__name__} with {", ".join(places)}'
    return f'a data set is empty{looked}; check its paths, the suffix of its images, and filter_cfg'
