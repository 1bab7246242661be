"""A painted video, in the form that browsers and players show: H.264 with a quarter of the colour's resolution, in MP4.

PyAV writes it, which supervision brings. Supervision's own VideoSink takes OpenCV's encoders where OpenCV is installed,
and its wheels have none for H.264.
"""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log

from vheat_mm.apis.inference.parts import report_full_disk, result_file
from vheat_mm.utils.errors import ToolError

_USUAL_FPS = 25
_LONGEST = 1000  # frames a second; more is a container's unit of time
_BT709 = 1  # FFmpeg's number of the colour space, the same for its matrix, primaries and transfer
# Without looking ahead over whole frames, it takes little memory and writes equal frames as equal bytes.
_ENCODER = dict(preset='veryfast', crf='20', **{'rc-lookahead': '0'})


class VideoWriter:
    """Frames written to a video that appears under its name when it is complete.

    Args:
        target: The file.
        fps: Frames a second of the source; 25 if they are unknown.

    Raises:
        ToolError: The disk is full.
    """

    def __init__(self, target: Path, fps: float | None) -> None:
        import av

        self.target = target
        known = fps is not None and 0 < fps <= _LONGEST  # not NaN
        self._rate = Fraction(fps).limit_denominator(100_000) if known and fps is not None else Fraction(_USUAL_FPS)
        self._size: tuple[int, int] | None = None  # (height, width)
        self._resizes = False
        self._stream: Any = None
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(result_file(target))
            container = av.open(file.name, 'w', format='mp4', options=dict(movflags='faststart'))
            self._container = stack.enter_context(container)
            self._open = stack.pop_all()

    def write(self, frame: np.ndarray) -> None:
        """Append a frame, (H, W, 3) uint8 in BGR order; one of another size than the first is resized to it.

        Raises:
            ToolError: The disk is full; nothing of the video is left.
        """
        import av
        import cv2

        with self._abandoning():
            if self._size is None:
                self._size = frame.shape[:2]
                self._begin()
            if frame.shape[:2] != self._size:
                if not self._resizes:
                    print_log(
                        f'{self.target.name}: frames change their size, they get that of the first', 'current', 30
                    )
                self._resizes = True
                frame = cv2.resize(frame, self._size[::-1], interpolation=cv2.INTER_AREA)
            odd = [(0, length % 2) for length in self._size]
            frame = np.pad(frame, (*odd, (0, 0)), mode='edge') if (0, 1) in odd else np.ascontiguousarray(frame)
            picture = av.VideoFrame.from_ndarray(frame, format='bgr24')
            picture = picture.reformat(format='yuv420p', dst_colorspace='ITU709')
            self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        """Complete the file with the frames there are.

        Raises:
            ToolError: The disk is full; nothing of the video is left.
        """
        if self._stream is None:  # not one frame
            self.abandon()
            return
        with self._abandoning():
            self._container.mux(self._stream.encode(None))
            self._open.close()

    def abandon(self) -> None:
        """Remove what has been written."""
        self._stream = None
        with contextlib.suppress(_AbandonedError, OSError, ToolError), self._open:
            raise _AbandonedError

    def _begin(self) -> None:
        assert self._size is not None
        height, width = self._size
        if height % 2 or width % 2:
            print_log(
                f'{self.target.name}: H.264 needs even sides, the edge of {width}x{height} is repeated', 'current'
            )
        self._stream = self._container.add_stream('h264', rate=self._rate, options=_ENCODER)
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = 'yuv420p'
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709

    @contextlib.contextmanager
    def _abandoning(self) -> Any:
        """Leave no file behind after an error."""
        with report_full_disk(self.target):
            try:
                yield
            except BaseException:
                self.abandon()
                raise


class _AbandonedError(Exception):
    """Ends the writing of a file that is to be removed."""
