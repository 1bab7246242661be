"""One image file: whether it can be decoded as in training, whether it is complete, and what is unusual about it.

Runs in worker processes (:mod:`.pool`), as decoders may crash on corrupt files. cv2, mmcv and Pillow are imported in
functions: importing the package needs only torch and mmengine.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from mmengine.fileio import get

from vheat_mm.utils.errors import describe
from vheat_mm.utils.files import read_regular
from vheat_mm.utils.text import summarize_error

_MAX_DECODED = 2**29  # bytes of a decoded image
LIMIT = 'OPENCV_IO_MAX_IMAGE_PIXELS'  # environment variable of OpenCV, which has no other way to set its own limit
# Those that OpenCV decodes. Others that Pillow knows, such as TGA, begin like any binary file.
_FORMATS = ('JPEG', 'PNG', 'BMP', 'TIFF', 'WEBP', 'GIF', 'JPEG2000', 'PPM', 'SUN', 'AVIF')
_RADIANCE = re.compile(rb'#\?(?:RADIANCE|RGBE)\n.*?\n\n[-+]Y (\d{1,9}) [-+]X (\d{1,9})\n', re.DOTALL)
_NARROW, _TINY = 50, 16
_EXTRANEOUS = 'extraneous bytes'  # libjpeg's message, for some encoders' files as well as for corrupt ones
_BITS = 258  # TIFF tag: of each channel
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_captured_stderr: IO[bytes] | None = None  # of a worker: libjpeg and libpng report corruption only there
_MODES = {
    'image-grayscale': {'1', 'L', 'LA', 'La', 'I', 'F', 'I;16', 'I;16B', 'I;16L', 'I;16N'},
    'image-16-bit': {'I', 'F', 'I;16', 'I;16B', 'I;16L', 'I;16N'},
    'image-cmyk': {'CMYK'},
    'image-palette': {'P', 'PA'},
    'image-alpha': {'RGBA', 'LA', 'PA', 'RGBa', 'La'},
}


Fault = tuple[str, str]  # kind of finding, text


class Loader(NamedTuple):
    """How a pipeline decodes: flag and backend of ``mmcv.imfrombytes``, and where files are stored.

    ``transform`` is a pipeline's own first transform, where no other is known to load images: it then reads the file.
    """

    flag: str = 'color'
    backend: str = 'cv2'
    backend_args: dict | None = None
    transform: Callable[[dict], Any] | None = None

    def unchanged(self) -> set[str]:
        """Kinds of findings that are none where pixels are taken as they are stored."""
        found = {'image-grayscale'} if self.flag == 'grayscale' else set()
        if self.flag == 'unchanged' or self.backend == 'tifffile':
            found |= {'image-grayscale', 'image-16-bit', 'image-alpha', 'image-rotated'}
        return found | ({'image-rotated'} if 'ignore_orientation' in self.flag else set())


class ImageJob(NamedTuple):
    """An image file to examine."""

    path: str
    loader: Loader


class ImageFacts(NamedTuple):
    """What an image is.

    Attributes:
        faults: Kinds of findings, each with its text.
        size: (width, height) in pixels as decoded; ``None`` where it cannot be.
        bands: Number of them as decoded.
        values: Of a label map: those that occur.
    """

    faults: tuple[Fault, ...] = ()
    size: tuple[int, int] | None = None
    bands: int = 0
    values: tuple[int, ...] = ()


class FaultError(Exception):
    """A file that cannot be used, as kind of finding and text."""


def set_up_worker() -> None:
    """Prepare a worker process: one thread, stderr captured."""
    global _captured_stderr
    import cv2

    cv2.setNumThreads(0)
    _captured_stderr = tempfile.TemporaryFile()  # noqa: SIM115 (open until the process ends)
    os.dup2(_captured_stderr.fileno(), 2)


def examine_image(job: ImageJob) -> ImageFacts:
    """Read and decode an image file."""
    if job.loader.transform is not None:
        return _examine_loaded(job.path, job.loader.transform)
    unchanged = job.loader.unchanged()

    def judge(image: np.ndarray, faults: list[Fault]) -> list[Fault]:
        return [fault for fault in faults if fault[0] not in unchanged] + _judge_shape(*image.shape[:2])

    return examine_file(job.path, job.loader, judge)


def _examine_loaded(path: str, transform: Callable[[dict], Any]) -> ImageFacts:
    """Let a transform of which nothing is known read the file."""
    try:
        read_file(path, None)
        image = (transform(dict(img_path=path)) or {}).get('img')
    except FaultError as error:
        return ImageFacts(faults=((error.args[0], error.args[1]),))
    except KeyError:  # it needs more than a path: only the data set can call it
        return ImageFacts()
    except Exception as error:
        return ImageFacts(faults=(('not-an-image', f'{type(transform).__name__}: {describe(error)}'),))
    if not isinstance(image, np.ndarray) or image.ndim < 2:
        return ImageFacts()
    return _facts(image, _judge_shape(*image.shape[:2]))


def examine_file(path: str, loader: Loader, judge: Callable[[np.ndarray, list[Fault]], list[Fault]]) -> ImageFacts:
    """Read and decode a file; ``judge`` takes the pixels and what is unusual about the file, and returns all faults."""
    try:
        image, faults = decode(read_file(path, loader.backend_args), loader)
    except FaultError as error:
        return ImageFacts(faults=((error.args[0], error.args[1]),))
    return _facts(image, judge(image, faults))


def _facts(image: np.ndarray, faults: list[Fault]) -> ImageFacts:
    return ImageFacts(tuple(faults), (image.shape[1], image.shape[0]), image.shape[2] if image.ndim > 2 else 1)


def _judge_shape(height: int, width: int) -> list[Fault]:
    shape, short, long = f'{width} x {height}', min(width, height), max(width, height)
    tiny = [('image-tiny', shape)] if short < _TINY else []
    return tiny + ([('image-narrow', shape)] if long > _NARROW * short else [])


def read_file(path: str, backend_args: dict | None) -> bytes:
    """A file's content, from wherever MMEngine's file backends find it.

    Raises:
        FaultError: There is none, or it is empty.
    """
    try:
        local = backend_args is None and '://' not in path
        content = read_image(path) if local else get(path, backend_args=backend_args)
    except FileNotFoundError as error:
        link = Path(path).is_symlink()
        raise FaultError('file-missing', f'a link to {Path(path).readlink()}' if link else '') from error
    except OSError as error:
        kind = 'image-too-large' if error.errno == errno.EFBIG else 'file-unreadable'
        raise FaultError(kind, str(error.strerror or error)) from error
    except Exception as error:  # of a storage's client; no file backend for what stands in front of ://; a null byte
        raise FaultError('file-unreadable', summarize_error(error)) from error
    if not content:
        raise FaultError('file-empty', '')
    return content


def decode(content: bytes, loader: Loader) -> tuple[np.ndarray, list[Fault]]:
    """Decode an image as ``mmcv`` does, and find corruption that it ignores.

    Returns:
        The pixels, (height, width) or (height, width, channels), and what is unusual about them.

    Raises:
        FaultError: It is no image, too large to be decoded, truncated or corrupt.
    """
    import mmcv

    header = read_header(content)
    if reason := refuse_size(content, header):
        raise FaultError('image-too-large', reason)
    _clear_stderr()
    image, reason = None, ''
    try:
        image = mmcv.imfrombytes(content, flag=loader.flag, backend=loader.backend)
    except Exception as error:  # each decoder has its own exceptions
        reason = _last_line(str(error)) or type(error).__name__
    messages = _read_stderr()
    if is_truncated(content, header):
        raise FaultError('image-truncated', f'{len(content)} bytes without the end of the image')
    if image is None and header is None:
        raise FaultError('not-an-image', f'begins with {content[:40]!r}')
    if image is None or reports_corruption(messages):
        raise FaultError('image-corrupt', reason or messages or 'the decoder returns no image')
    extraneous = [('image-extraneous-bytes', messages)] if _EXTRANEOUS in messages else []
    return image, extraneous + peculiarities(content, header)


def read_header(content: bytes) -> Any:
    """Pillow's image with its header read and no pixel decoded; ``None`` for another format than OpenCV's."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # refuse_size has its own
    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except Exception:  # the parsers raise all kinds
        return None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def max_pixels(bytes_per_pixel: int = 3) -> int:
    """Pixels that an image may have; ``OPENCV_IO_MAX_IMAGE_PIXELS``, or as many as are 512 MiB when decoded."""
    text = os.environ.get(LIMIT, '')
    return int(text) if text.isdecimal() else _MAX_DECODED // bytes_per_pixel


def read_image(path: str | Path) -> bytes:
    """The content of a local image file.

    Raises:
        OSError: As :func:`~vheat_mm.utils.files.read_regular`; the limit is 1 GiB, more if more pixels are allowed.
    """
    try:
        return read_regular(path, 6 * max_pixels())
    except OSError as error:
        if error.errno == errno.EFBIG:
            error.strerror = f'{error.strerror}: cut it into tiles, or raise {LIMIT}'
        raise


def refuse_size(content: bytes, header: Any) -> str:
    """Why an image is too large to be decoded; else an empty text.

    Args:
        content: Of the file, or at least its beginning.
        header: From :func:`read_header`.
    """
    width, height = header.size if header is not None else (0, 0)
    limit = max_pixels()
    if header is None and (match := _RADIANCE.match(content[:4096])):  # Pillow does not know them
        width, height, limit = int(match[2]), int(match[1]), max_pixels(bytes_per_pixel=12)
    if width * height <= limit:
        return ''
    return f'{width} x {height}, more than {limit} pixels: cut it into tiles, or set {LIMIT}={width * height}'


def is_truncated(content: bytes, header: Any) -> bool:
    """Whether the end of an image is missing. Some decoders fill up what is missing without an error."""
    if content[:2] == b'\xff\xd8':
        # In a JPEG's pixels, FF is never followed by D9. Before them it may: thumbnails are JPEG files, too.
        return content.find(b'\xff\xd9', _first_scan(content)) < 0
    if content[:8] == b'\x89PNG\r\n\x1a\n':
        return content.rfind(b'IEND') < 0
    if content[:4] == b'RIFF' and content[8:12] == b'WEBP':
        return len(content) < int.from_bytes(content[4:8], 'little') + 8
    try:
        if header is not None:
            header.load()
    except Exception as error:
        return isinstance(error, OSError) and 'truncated' in str(error)
    return False


def _first_scan(content: bytes) -> int:
    """Offset at which the pixels of a JPEG file begin, or its length where it has none."""
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xDA:
            return place
        alone = marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD7  # fill bytes, markers without content
        place += (1 if marker == 0xFF else 2) if alone else 2 + int.from_bytes(content[place + 2 : place + 4], 'big')
    return len(content)


def peculiarities(content: bytes, header: Any) -> list[Fault]:
    """What is unusual about how an image is stored; ``header`` as from :func:`read_header`."""
    if header is None:
        return []
    found = {kind: f'mode {header.mode}' for kind, modes in _MODES.items() if header.mode in modes}
    if content[:8] == b'\x89PNG\r\n\x1a\n' and content[24] == 16:  # Pillow does not tell for colour images
        found.setdefault('image-16-bit', 'PNG with 16 bits a channel')
    if 16 in getattr(header, 'tag_v2', {}).get(_BITS, ()):
        found.setdefault('image-16-bit', 'TIFF with 16 bits a channel')
    if 'transparency' in header.info:
        found.setdefault('image-alpha', f'mode {header.mode} with a transparent colour')
    with contextlib.suppress(Exception):  # EXIF data may be malformed in any way
        orientation = header.getexif().get(_ORIENTATION, 1)
        if orientation in range(2, 9):
            found['image-rotated'] = f'EXIF orientation {orientation}, stored as {header.width} x {header.height}'
    return list(found.items())


def reports_corruption(messages: str) -> bool:
    """Whether a decoder's messages say that an image is corrupt."""
    words = ('corrupt', 'premature', 'libpng error', 'crc error', 'incomplete')
    return _EXTRANEOUS not in messages and any(word in messages.lower() for word in words)


def _clear_stderr() -> None:
    if _captured_stderr is not None:
        _captured_stderr.seek(0)
        _captured_stderr.truncate()


def _read_stderr() -> str:
    """The captured line that reports corruption, or else the last one."""
    if _captured_stderr is None:
        return ''
    _captured_stderr.seek(0)
    text = _captured_stderr.read(10_000).decode('utf-8', 'replace')
    return next(filter(reports_corruption, text.splitlines()), _last_line(text))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [''])[-1].strip()
