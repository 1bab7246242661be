"""From a listed input to its images: what is no usable image is refused before it is decoded."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from vheat_mm.apis.inference.frames import read_frames
from vheat_mm.apis.inference.names import safe_name
from vheat_mm.apis.inference.sources import PHOTOGRAPHS
from vheat_mm.apis.inference.types import Item, Sample
from vheat_mm.checkpoint.download import download
from vheat_mm.datasets.checks import images
from vheat_mm.datasets.checks.images import LIMIT, Loader, is_truncated, peculiarities, read_header, reports_corruption
from vheat_mm.utils.errors import describe
from vheat_mm.utils.files import read_regular
from vheat_mm.utils.text import first_line, is_address

_TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
_VIDEO_BYTES = 8 << 30  # of a download
_NOTES = {
    'image-16-bit': '16 bits a channel are reduced to 8 (divided by 256)',
    'image-alpha': 'transparency is ignored: pixels have the colour that is stored',
    'image-animated': 'of several images in one file, such as an animation, the first is taken',
}
_said: set[str] = set()


def read(item: Item, max_pixels: int | None = None, loader: Loader | None = None) -> Iterator[Sample]:
    """Yield the images of an input, or why there are none as the last sample; of a video, its frames.

    The pixels of an image file are left to the config's loading transform, inside :func:`decoding`: so predictions are
    those of ``tools/test.py``. An http(s) address is downloaded into a temporary file, which lasts until the next
    sample is asked for.

    Args:
        item: The input.
        max_pixels: Of an image or frame; by default as many as are 512 MiB when decoded.
        loader: How the config decodes images; by default to 8 bits in BGR order.
    """
    limit = max_pixels or images.max_pixels()
    try:
        with contextlib.ExitStack() as stack:
            if is_address(item.path):
                item = replace(item, path=str(stack.enter_context(_downloaded(item, limit))))
            if item.is_video and loader is not None and loader.backend == 'tifffile':
                raise ValueError("a video, and the config decodes TIFF files only (imdecode_backend='tifffile')")
            if item.is_video:
                yield from read_frames(item, limit)
            else:
                with decoding():
                    notes = _check_image(item, limit, loader or Loader())
                for note in notes:
                    _say_once(note, item)
                yield Sample(item)
    except Exception as error:  # decoders raise all kinds
        yield Sample(item, error=one_line(error))


def one_line(error: Exception) -> str:
    """An error's message in one line, without the path."""
    if isinstance(error, OSError) and error.strerror:
        hint = f'; --max-pixels or {LIMIT} raises the limit' if error.errno == errno.EFBIG else ''
        return first_line(error.strerror[:1].lower() + error.strerror[1:] + hint, 300)
    return first_line(' '.join(describe(error).split()), 300)


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Take what decoders print on stderr, and raise where that says that an image is corrupt.

    Only for a process with one thread, as stderr is that of the whole process.

    Raises:
        ValueError: A decoder failed, or filled up what it could not decode.
    """
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        except AssertionError as error:  # mmcv's, without a reason
            raise ValueError('the decoder cannot read it, though it begins as an image') from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            lines = file.read(10_000).decode('utf-8', 'replace').splitlines()
            corrupt = next(filter(reports_corruption, lines), None)
            if corrupt is not None:
                raise ValueError(f'the image is corrupt: {first_line(corrupt)}')


def _check_image(item: Item, limit: int, loader: Loader) -> list[str]:
    """Raise OSError or ValueError with what is wrong with an image file; returns what to say of it."""
    content = read_regular(item.path, max(6 * limit, 1 << 26))
    if not content:
        raise ValueError('the file is empty')
    if reason := _other_kind(item, content):
        raise ValueError(reason)
    if loader.backend == 'tifffile' and content[:4] not in _TIFF:
        raise ValueError("no TIFF file, and the config decodes no others (imdecode_backend='tifffile')")
    header = read_header(content)
    width, height = header.size if header is not None else _size_of_other(content, item.path, loader)
    if width * height > limit:
        raise ValueError(
            f'{width} x {height} pixels, more than {limit}: cut it into tiles, or set --max-pixels {width * height} '
            f'({LIMIT} where there is no such option)'
        )
    if is_truncated(content, header):
        raise ValueError(f'the image is truncated: {len(content)} bytes without its end')
    kinds = {kind for kind, _ in peculiarities(content, header)} - loader.unchanged()
    if getattr(header, 'mode', '') in ('I', 'F'):  # of 32 bits, which OpenCV may refuse
        kinds.discard('image-16-bit')
    if getattr(header, 'is_animated', False):
        kinds.add('image-animated')
    return [note for kind, note in _NOTES.items() if kind in kinds]


def _say_once(note: str, item: Item) -> None:
    if note not in _said:
        _said.add(note)
        print_log(f'{first_line(item.name)} (said once): {note}', 'current')


def _other_kind(item: Item, content: bytes) -> str:
    """What a file is instead of an image that OpenCV decodes, and what to do; an empty text if it may be one."""
    brands = content[8:40] if content[4:8] == b'ftyp' else b''
    if any(brand in brands for brand in (b'heic', b'heix', b'hevc', b'mif1', b'msf1')) and b'avif' not in brands:
        return 'a HEIC photograph: convert it to JPEG or PNG first'
    if Path(item.name).suffix.lower() in PHOTOGRAPHS:
        return 'a raw photograph: develop it to JPEG, PNG or TIFF first'
    if (brands and b'avif' not in brands) or content[:4] == b'\x1aE\xdf\xa3' or content[8:12] == b'AVI ':
        return 'a video: give it the suffix of one, such as .mp4'
    return ''


def _size_of_other(content: bytes, path: str, loader: Loader) -> tuple[int, int]:
    """(width, height) of an image that Pillow does not know; 0 where only the decoder can tell.

    Raises:
        ValueError: It is no image, or has other bands than the config's loading transform decodes.
    """
    if content[:4] in _TIFF:
        try:
            import tifffile
        except ImportError:
            return 0, 0
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
        if loader.backend != 'tifffile' and page.samplesperpixel > 4:
            raise ValueError(
                f'a TIFF of {page.samplesperpixel} bands, and the config decodes 3: a model of more bands needs '
                "imdecode_backend='tifffile' in its LoadImageFromFile"
            )
        return page.imagewidth, page.imagelength
    if content[:2] == b'#?':  # Radiance, for which OpenCV has a limit of its own
        return 0, 0
    raise ValueError(f'no image that can be read: {len(content)} bytes, which begin with {content[:24]!r}')


@contextlib.contextmanager
def _downloaded(item: Item, limit: int) -> Iterator[Path]:
    """A temporary file with the content of an address."""
    with tempfile.TemporaryDirectory(prefix='vheat_mm-', ignore_cleanup_errors=True) as folder:
        path = Path(folder) / f'download{Path(safe_name(item.name)).suffix[:10]}'
        with _without_timer():
            download(item.path, path, _VIDEO_BYTES if item.is_video else 6 * limit, quiet=True)
        yield path


@contextlib.contextmanager
def _without_timer() -> Iterator[None]:
    """Without the time limit for an input that a worker process has: a download has its own."""
    has_timer = hasattr(signal, 'setitimer')
    seconds = signal.setitimer(signal.ITIMER_REAL, 0)[0] if has_timer else 0
    try:
        yield
    finally:
        if seconds:
            signal.setitimer(signal.ITIMER_REAL, seconds)
