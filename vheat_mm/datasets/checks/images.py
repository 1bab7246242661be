"""One image file: can it be decoded as training decodes it, whole, and what is unusual about it.

Runs in worker processes (:mod:`.pool`): a decoder may crash on what it is given.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

# Pillow's limit for a decompression bomb. Decoded to three channels, half a gigabyte for each loader's worker.
MAX_PIXELS = 178_956_970
MAX_BYTES = 2**30
_NARROW, _TINY = 50, 16
_STRAY = 'extraneous bytes'  # libjpeg's words: a sloppy encoder's, or what is left of a damaged stretch
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_MODES = {
    'image-grayscale': {'1', 'L', 'LA', 'La', 'I', 'F', 'I;16', 'I;16B', 'I;16L', 'I;16N'},
    'image-16-bit': {'I', 'F', 'I;16', 'I;16B', 'I;16L', 'I;16N'},
    'image-cmyk': {'CMYK'},
    'image-palette': {'P', 'PA'},
    'image-alpha': {'RGBA', 'LA', 'PA', 'RGBa', 'La'},
}


class Loader(NamedTuple):
    """How a pipeline decodes: flag and backend of ``mmcv.imfrombytes``, and where files are stored."""

    flag: str = 'color'
    backend: str = 'cv2'
    backend_args: dict | None = None


class ImageJob(NamedTuple):
    """An image file to examine."""

    path: str
    loader: Loader


class ImageFacts(NamedTuple):
    """What an image is.

    Attributes:
        faults: Kinds of findings, each with what to say about it.
        size: (width, height) in pixels as decoded; ``None`` where it cannot be.
    """

    faults: tuple[tuple[str, str], ...] = ()
    size: tuple[int, int] | None = None


class FaultError(Exception):
    """A file that cannot be used, as kind of finding and text."""


class _Voice:
    """What decoders write to the process's stderr: libjpeg and libpng tell of damage in no other way."""

    file: IO[bytes] | None = None


def set_up_worker() -> None:
    """Prepare a worker process: one thread, stderr caught, no limit of Pillow's (ours comes first)."""
    import cv2
    from PIL import Image

    cv2.setNumThreads(0)
    Image.MAX_IMAGE_PIXELS = None
    _Voice.file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process lives)
    os.dup2(_Voice.file.fileno(), 2)


def examine_image(job: ImageJob) -> ImageFacts:
    """Read and decode an image file."""
    try:
        content = read_file(job.path, job.loader.backend_args)
        image, faults = decode(content, job.loader)
    except FaultError as error:
        return ImageFacts(faults=((error.args[0], error.args[1]),))
    height, width = image.shape[:2]
    shape = f'{width} x {height}'
    if min(width, height) < _TINY:
        faults.append(('image-tiny', shape))
    if max(width, height) > _NARROW * min(width, height):
        faults.append(('image-narrow', shape))
    return ImageFacts(tuple(faults), (width, height))


def read_file(path: str, backend_args: dict | None) -> bytes:
    """A file's content, from wherever MMEngine's file backends find it.

    Raises:
        FaultError: There is none, or it is empty.
    """
    from mmengine.fileio import get

    try:
        if backend_args is None and Path(path).exists() and Path(path).stat().st_size > MAX_BYTES:
            raise FaultError('image-too-large', f'a file of {Path(path).stat().st_size} bytes')
        content = get(path, backend_args=backend_args)
    except FileNotFoundError as error:
        link = Path(path).is_symlink()
        raise FaultError('file-missing', f'a link to {Path(path).readlink()}' if link else '') from error
    except OSError as error:
        raise FaultError('file-unreadable', str(error.strerror or error)) from error
    if not content:
        raise FaultError('file-empty', '')
    return content


def decode(content: bytes, loader: Loader) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Decode an image as ``mmcv`` does, watching for damage that it passes over.

    Returns:
        The pixels, (height, width) or (height, width, channels), and what is unusual about them.

    Raises:
        FaultError: It is no image, too large to be decoded, cut off or damaged.
    """
    import mmcv

    header = read_header(content)
    if header is not None and header.width * header.height > MAX_PIXELS:
        size = f'{header.width} x {header.height}'
        raise FaultError('image-too-large', f'{size} in a file of {len(content)} bytes; not decoded')
    _clear_voice()
    image, reason = None, ''
    try:
        image = mmcv.imfrombytes(content, flag=loader.flag, backend=loader.backend)
    except Exception as error:  # each decoder has its own kinds
        reason = _last_line(str(error)) or type(error).__name__
    voice = _read_voice()
    reason = reason or voice
    if is_cut(content, header):
        raise FaultError('image-truncated', f'{len(content)} bytes, no end of the image in them')
    if image is None and header is None:
        raise FaultError('not-an-image', f'begins with {content[:12]!r}')
    if image is None or _speaks_of_damage(voice):
        raise FaultError('image-damaged', reason or 'the decoder gives no picture')
    suspect = [('image-suspect', voice)] if _STRAY in voice else []
    return image, suspect + _peculiarities(content, header)


def read_header(content: bytes) -> Any:
    """Pillow's image with its header read and no pixel decoded; ``None`` where Pillow knows no such format."""
    from PIL import Image

    with contextlib.suppress(Exception):  # parsers of thirty formats, each with its own errors
        return Image.open(io.BytesIO(content))
    return None


def is_cut(content: bytes, header: Any) -> bool:
    """Whether an image ends before its end. Decoders fill up what is missing, some without a word."""
    form = getattr(header, 'format', None)
    if content[:2] == b'\xff\xd8':
        # In a JPEG's pixels, FF is never followed by D9. Before them it may: thumbnails are JPEG files, too.
        return content.find(b'\xff\xd9', _first_scan(content)) < 0
    if content[:8] == b'\x89PNG\r\n\x1a\n':
        return content.rfind(b'IEND') < 0
    if content[:4] == b'RIFF' and content[8:12] == b'WEBP':
        return len(content) < int.from_bytes(content[4:8], 'little') + 8
    if form is None:
        return False
    try:
        header.load()
    except OSError as error:
        return 'truncated' in str(error)
    except Exception:  # damaged in another way
        return False
    return False


def _first_scan(content: bytes) -> int:
    """Where the pixels of a JPEG file begin; its end where they do not."""
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xDA:
            return place
        alone = marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7  # fill bytes, markers without content
        place += (1 if marker == 0xFF else 2) if alone else 2 + int.from_bytes(content[place + 2 : place + 4], 'big')
    return len(content)


def _peculiarities(content: bytes, header: Any) -> list[tuple[str, str]]:
    if header is None:
        return []
    found = {kind: f'mode {header.mode}' for kind, modes in _MODES.items() if header.mode in modes}
    if content[:8] == b'\x89PNG\r\n\x1a\n' and content[24] == 16:  # Pillow hides it in colour images
        found.setdefault('image-16-bit', 'PNG with 16 bits a channel')
    if 'transparency' in header.info:
        found.setdefault('image-alpha', f'mode {header.mode} with a transparent colour')
    with contextlib.suppress(Exception):  # EXIF data are written by anyone
        orientation = header.getexif().get(_ORIENTATION, 1)
        if orientation in range(2, 9):
            found['image-rotated'] = f'EXIF orientation {orientation}, stored as {header.width} x {header.height}'
    return list(found.items())


def _speaks_of_damage(text: str) -> bool:
    words = ('corrupt', 'premature', 'libpng error', 'crc error', 'incomplete')
    return _STRAY not in text and any(word in text.lower() for word in words)


def _clear_voice() -> None:
    if _Voice.file is not None:
        _Voice.file.seek(0)
        _Voice.file.truncate()


def _read_voice() -> str:
    if _Voice.file is None:
        return ''
    _Voice.file.seek(0)
    text = _Voice.file.read(10_000).decode('utf-8', 'replace')
    return next(filter(_speaks_of_damage, text.splitlines()), _last_line(text))


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ''
