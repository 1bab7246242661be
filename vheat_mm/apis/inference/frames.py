"""The frames of a video file, one at a time."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.logging import print_log

from vheat_mm.apis.inference.types import Item, Sample
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.files import open_regular
from vheat_mm.utils.text import first_line

_END = 0.9  # of the announced time, after which a video may end: containers are not exact


def read_frames(item: Item, limit: int) -> Iterator[Sample]:
    """Yield the frames of a video as (height, width, 3) uint8 in BGR order, upright; after a fault, those before it.

    Args:
        item: The video; ``path`` is a local file.
        limit: Pixels that a frame may have.

    Raises:
        OSError: It cannot be opened, or is no regular file.
        ToolError: PyAV is not installed.
        ValueError: No video, too large, without frames, or damaged: after the frames that can be read.
    """
    try:
        import av
    except ImportError as error:
        raise ToolError("reading videos needs PyAV: pip install 'vheat_mm[predict]'") from error
    open_regular(item.path).close()  # opening a pipe would wait
    count, damaged, fault, container = 0, 0, '', None
    held: Sample | None = None  # until it is known whether it is the last
    first = last = 0.0
    try:
        container = av.open(item.path, metadata_errors='replace')
        if not container.streams.video:
            raise ValueError('a file without a video stream')
        stream = container.streams.video[0]
        _check_size(stream.codec_context, limit)
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate else None
        for frame in itertools.chain.from_iterable(packet.decode() for packet in container.demux(stream)):
            _check_size(frame, limit)
            if held is not None:
                yield held
            held = Sample(item, _upright(frame), frame=count, last=False, fps=fps)
            last = frame.time if frame.time is not None else last
            first = first if count else last
            count += 1
            damaged += frame.is_corrupt
        fault = _ends_early(container, stream, last - first + 1 / (fps or 1)) if count else 'a video without frames'
    except av.FFmpegError as error:
        fault = f'{error.strerror} after {count} frames' if count else f'no video: {error.strerror}'
    except ValueError as error:
        fault = str(error)
    finally:
        if container is not None:
            container.close()
    if damaged:
        print_log(f'{first_line(item.name)}: {damaged} of {count} frames are damaged', 'current', logging.WARNING)
    if held is not None:
        held.last = not fault
        yield held
    if fault:
        raise ValueError(fault)


def _check_size(frame: Any, limit: int) -> None:
    if frame.width * frame.height > limit:
        size = f'{frame.width} x {frame.height}'
        raise ValueError(f'frames of {size}, more than {limit} pixels: set --max-pixels {frame.width * frame.height}')


def _upright(frame: Any) -> np.ndarray:
    """A frame's pixels, turned as its metadata says; players do so, decoders do not."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format='bgr24'), round(frame.rotation / 90) % 4))


def _ends_early(container: Any, stream: Any, seconds: float) -> str:
    """Why a video that was read without an error is not whole; else an empty text. FFmpeg does not tell."""
    announced = None
    if stream.duration is not None and stream.time_base is not None:
        announced = float(stream.duration * stream.time_base)
    elif container.duration is not None and len(container.streams) == 1:  # sound may be longer than the pictures
        announced = container.duration / 1e6
    if announced is None or seconds > _END * announced or announced - seconds < 0.5:
        return ''
    return f'it ends after {seconds:.1f} of {announced:.1f} seconds: cut off or damaged'
