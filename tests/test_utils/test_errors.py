"""Error classes, and how an error is told to the user."""

import pytest

from vheat_mm.utils import errors


@pytest.mark.parametrize(
    ('name', 'base'),
    [
        ('CheckpointError', RuntimeError),
        ('ToolError', Exception),
        ('AnnotationError', ValueError),
        ('NonFiniteError', RuntimeError),
        ('BrokenSampleError', RuntimeError),
        ('ViewError', ValueError),
    ],
)
def test_one_base_class_beside_the_built_in_ones(name, base):
    assert issubclass(getattr(errors, name), base)
    assert issubclass(getattr(errors, name), errors.VHeatError)


@pytest.mark.parametrize(
    ('error', 'text'),
    [
        (errors.ToolError('drop --seed'), 'drop --seed'),
        (KeyError('backbone'), 'KeyError: backbone'),
        (
            RuntimeError(
                'Caught AnnotationError in DataLoader worker process 0.\n'
                'Traceback ...\nvheat_mm.utils.errors.AnnotationError: class 7'
            ),
            'class 7',
        ),
    ],
)
def test_describe(error, text):
    assert errors.describe(error) == text
