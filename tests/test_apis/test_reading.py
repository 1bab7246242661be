"""Images and video frames as a run reads them: each broken file is one line, and nothing else is printed."""

from __future__ import annotations

import http.server
import os
import re
import signal
import struct
import threading
import tracemalloc
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
from corrupt_data import HEIGHT, IMAGE_FAULTS, SIZES, WIDTH, encode, picture, png, write_images
from PIL import Image

from vheat_mm.apis.inference import reading
from vheat_mm.apis.inference.reading import decoding, read
from vheat_mm.apis.inference.types import Item, Sample
from vheat_mm.datasets.checks.images import Loader

ERRORS = {  # kind of finding of the checks of data sets -> what is said here
    'file-missing': 'no such file or directory',
    'file-empty': 'the file is empty',
    'not-an-image': 'no image that can be read: 540 bytes, which begin with',
    'image-truncated': 'the image is truncated',
    'image-corrupt': 'the image is corrupt: ',
    'image-too-large': '60000 x 60000 pixels, more than 178956970: cut it into tiles, or set --max-pixels 3600000000 '
    '(OPENCV_IO_MAX_IMAGE_PIXELS where there is no such option)',
}


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is logged, as in a new process."""
    lines: list[str] = []
    for module in ('reading', 'frames'):
        monkeypatch.setattr(f'vheat_mm.apis.inference.{module}.print_log', lambda text, *_: lines.append(text))
    monkeypatch.setattr(reading, '_said', set())
    return lines


def item(path: str | Path, is_video: bool = False) -> Item:
    return Item(str(path), Path(str(path)).name, 0, str(path), is_video)


def load(path: Path, **options) -> np.ndarray | str:
    """An image as a config's default loading decodes it, or the error."""
    [sample] = read(item(path), **options)
    assert sample.last
    assert sample.image is None  # left to the pipeline
    if sample.error is not None:
        return sample.error
    try:
        with decoding():
            image = mmcv.imfrombytes(Path(sample.item.path).read_bytes())
            assert image is not None
            return image
    except ValueError as error:
        return str(error)


def test_faults(tmp_path, said, capfd):
    paths = write_images(tmp_path)
    for name, (_, _, kinds) in IMAGE_FAULTS.items():
        result = load(paths[name])
        expected = next((text for kind, text in ERRORS.items() if kind in kinds), None)
        if expected is not None:
            assert isinstance(result, str), name
            assert result.startswith(expected), name
            assert len(result.splitlines()) == 1
        else:
            size = (HEIGHT, WIDTH)[::-1] if name == 'rotated' else SIZES.get(name, (WIDTH, HEIGHT))[::-1]
            assert isinstance(result, np.ndarray), (name, result)
            assert result.shape == (*size, 3), name
    captured = capfd.readouterr()
    assert captured.out == captured.err == ''  # libjpeg and libpng print what is corrupt
    assert sorted(line.split(' ')[0] for line in said) == ['alpha.png', 'sixteen_bit.png']


def test_other_files(tmp_path, said):
    files = {
        'text.jpg': b'hello world',
        'photo.jpg': b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(400),
        'photo.nef': b'II*\0' + bytes(400),
        'clip.jpg': b'\0\0\0\x20ftypisom\0\0\2\0isomiso2' + bytes(400),
        'cut.tif': encode(picture(), 'TIFF')[:4000],
        'cut.gif': encode(picture(), 'GIF')[:800],
        'cut.bmp': encode(picture(), 'BMP')[:3000],
        'cut.jp2': encode(picture(), 'JPEG2000')[:900],
    }
    words = ('begin with', 'HEIC', 'raw', 'video', 'truncated', 'truncated', 'truncated', 'cannot read it')
    for (name, content), word in zip(files.items(), words, strict=True):
        (tmp_path / name).write_bytes(content)
        assert word in load(tmp_path / name)
    (tmp_path / 'folder.jpg').mkdir()
    os.mkfifo(tmp_path / 'pipe.jpg')
    (tmp_path / 'device.jpg').symlink_to('/dev/zero')
    for name in ('folder.jpg', 'pipe.jpg', 'device.jpg'):
        assert load(tmp_path / name).endswith('expected a regular file')
        assert 'expected a regular file' in next(read(item(tmp_path / name, True))).error
    with (tmp_path / 'long.jpg').open('wb') as file:
        file.truncate(2 << 30)
    assert 'more than 1073741820; --max-pixels or OPENCV_IO_MAX_IMAGE_PIXELS raises the limit' in load(
        tmp_path / 'long.jpg'
    )
    assert said == []


@pytest.mark.parametrize('form', ['JPEG', 'BMP', 'GIF', 'TIFF', 'WEBP'])
def test_size_is_checked_before_decoding(tmp_path, form):
    """Also those formats in which a small file can claim any size; the limit can be lowered and raised."""
    path = tmp_path / f'image.{form.lower()}'
    path.write_bytes(encode(picture(), form))
    assert load(path, max_pixels=WIDTH * HEIGHT).shape == (HEIGHT, WIDTH, 3)
    assert load(path, max_pixels=WIDTH * HEIGHT - 1).startswith(f'{WIDTH} x {HEIGHT} pixels, more than 3071')
    path.write_bytes(png(20_000, 10_000))
    assert 'set --max-pixels 200000000' in load(path)
    assert 'corrupt' in load(path, max_pixels=200_000_000)


def test_kinds_of_pixels(tmp_path, said):
    """What OpenCV makes of them, which is said where it loses something."""
    values = (np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) * 21).astype(np.uint16)
    cv2.imwrite(str(tmp_path / 'grey16.png'), values)
    cv2.imwrite(str(tmp_path / 'colour16.tif'), np.dstack([values] * 3))
    for name in ('grey16.png', 'colour16.tif'):
        difference = load(tmp_path / name).astype(int) - np.dstack([values // 256] * 3)
        assert abs(difference).max() <= ('tif' in name)  # OpenCV rounds those of colour TIFF
    assert said == ['grey16.png (said once): 16 bits a channel are reduced to 8 (divided by 256)']
    frames = [Image.fromarray(picture(index)) for index in range(3)]
    for form in ('gif', 'webp', 'png', 'tiff'):
        options = dict(lossless=True) if form == 'webp' else {}
        frames[0].save(tmp_path / f'many.{form}', save_all=True, append_images=frames[1:], **options)
        image = load(tmp_path / f'many.{form}')
        assert image.shape == (HEIGHT, WIDTH, 3)
        assert abs(image[..., ::-1].astype(int) - picture(0)).mean() < 20
    assert said[1:] == ['many.gif (said once): of several images in one file, such as an animation, the first is taken']


def test_tiff_of_more_bands(tmp_path, said):
    tifffile = pytest.importorskip('tifffile')
    path = tmp_path / 'bands.tif'
    bands = np.zeros((HEIGHT, WIDTH, 5), np.uint16)
    tifffile.imwrite(path, bands, photometric='minisblack', planarconfig='contig')
    assert load(path).startswith('a TIFF of 5 bands, and the config decodes 3')
    loader = Loader('unchanged', 'tifffile')
    [sample] = read(item(path), loader=loader)
    assert sample.error is None
    [sample] = read(item(path), 1000, loader)
    assert sample.error.startswith(f'{WIDTH} x {HEIGHT} pixels, more than 1000')
    assert said == []  # nothing is lost
    (tmp_path / 'a.png').write_bytes(encode(picture(), 'PNG'))
    for name in ('a.png', 'a.mp4'):
        [sample] = read(item(tmp_path / name, name == 'a.mp4'), loader=loader)
        assert "(imdecode_backend='tifffile')" in sample.error


# --- videos


def write_video(path: Path, count: int = 30, size: tuple[int, int] = (48, 80), codec: str = 'h264', **options) -> None:
    """A video whose left quarter is red and top is green, 25 frames a second, brighter from frame to frame."""
    av = pytest.importorskip('av')
    with av.open(str(path), 'w', options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = 'yuv420p'
        for index in range(count):
            image = np.random.default_rng(index).integers(0, 50, (*size, 3), dtype=np.uint8) + np.uint8(index)
            image[:, : size[1] // 4, 2] = 255
            image[: size[0] // 4, :, 1] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, 'bgr24')))
        container.mux(stream.encode())


def frames_of(path: Path, **options) -> tuple[list[Sample], str | None]:
    *frames, end = read(item(path, True), **options)
    assert [frame.last for frame in frames] == [False] * len(frames)
    assert end.last
    if end.error is None:
        frames.append(end)
    assert [frame.frame for frame in frames] == list(range(len(frames)))
    return frames, end.error


@pytest.mark.parametrize('name', ['a.mp4', 'a.mov', 'a.mkv', 'a.avi', 'a.webm'])
def test_video(tmp_path, name, said):
    """Frames as OpenCV decodes them."""
    write_video(tmp_path / name, codec=dict(avi='mpeg4', webm='libvpx').get(name[2:], 'h264'))
    frames, error = frames_of(tmp_path / name)
    assert error is None
    assert len(frames) == 30
    assert {frame.fps for frame in frames} == {25.0}
    capture = cv2.VideoCapture(str(tmp_path / name))
    for frame in frames:
        _, expected = capture.read()
        assert frame.image.dtype == np.uint8
        assert abs(frame.image.astype(int) - expected).mean() < 3
    assert not capture.read()[0]
    assert said == []


@pytest.mark.parametrize('matrix', [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)])
def test_rotated_video(tmp_path, matrix):
    """As a telephone held upright writes them; OpenCV turns them, too."""
    path = tmp_path / 'a.mp4'
    write_video(path, 2)
    content = bytearray(path.read_bytes())
    place = content.find(b'tkhd') + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    [first, _], _ = frames_of(path)
    _, expected = cv2.VideoCapture(str(path)).read()
    assert first.image.shape == expected.shape
    assert abs(first.image.astype(int) - expected).mean() < 3


@pytest.mark.parametrize(
    ('name', 'options', 'words'),
    [
        ('a.mp4', dict(movflags='faststart'), r'Invalid data found when processing input after \d+ frames'),
        ('a.mkv', {}, r'it ends after 0\.\d of 1\.2 seconds: cut off or damaged'),
    ],
)
def test_cut_video_keeps_what_is_there(tmp_path, name, options, words, said):
    path = tmp_path / name
    write_video(path, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames, error = frames_of(path)
    assert 8 < len(frames) < 25
    assert re.search(words, error)


def test_damaged_frames_are_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr('vheat_mm.apis.inference.frames.print_log', lambda text, *_: said.append(text))
    path = tmp_path / 'a.mp4'
    write_video(path)
    with pytest.importorskip('av').open(str(path)) as container:
        packet = list(container.demux(video=0))[15]
        middle = packet.pos + 40
    content = bytearray(path.read_bytes())
    content[middle : middle + 200] = np.random.default_rng(0).bytes(200)
    path.write_bytes(content)
    frames, error = frames_of(path)
    assert (len(frames), error) == (30, None)
    assert re.search(r'[1-9]\d* of 30 frames are damaged', said[0])


def test_videos_without_frames(tmp_path, said):
    av = pytest.importorskip('av')
    write_video(tmp_path / 'cut.mp4')
    (tmp_path / 'cut.mp4').write_bytes((tmp_path / 'cut.mp4').read_bytes()[:2000])
    (tmp_path / 'text.mp4').write_text('hello')
    (tmp_path / 'empty.mp4').touch()
    write_video(tmp_path / 'none.mkv', 0)
    with av.open(str(tmp_path / 'sound.mp4'), 'w') as container:
        stream = container.add_stream('aac', rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    texts = {name: frames_of(tmp_path / name) for name in ('cut.mp4', 'text.mp4', 'empty.mp4', 'none.mkv', 'sound.mp4')}
    assert all(frames == [] and len(error.splitlines()) == 1 for frames, error in texts.values())
    assert texts['text.mp4'][1].startswith('no video: ')
    assert texts['sound.mp4'][1] == 'a file without a video stream'


def test_size_of_frames_is_limited(tmp_path):
    write_video(tmp_path / 'a.mp4', 2)
    frames, error = frames_of(tmp_path / 'a.mp4', max_pixels=3839)
    assert frames == []
    assert error == 'frames of 80 x 48, more than 3839 pixels: set --max-pixels 3840'
    assert len(frames_of(tmp_path / 'a.mp4', max_pixels=3840)[0]) == 2


def test_memory_does_not_grow_with_frames(tmp_path):
    write_video(tmp_path / 'a.mp4', 40, (240, 320))
    tracemalloc.start()
    for sample in read(item(tmp_path / 'a.mp4', True)):
        del sample
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 240 * 320 * 3


# --- addresses


@pytest.fixture
def server(tmp_path):
    """A server of the files in a folder."""
    folder = tmp_path / 'served'
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f'http://127.0.0.1:{running.server_port}'
        running.shutdown()


def test_addresses(server, monkeypatch, capfd):
    """Downloaded for as long as they are needed; a time limit of the process does not end a download."""
    folder, url = server
    (folder / 'a.png').write_bytes(encode(picture(), 'PNG'))
    (folder / 'large.png').write_bytes(bytes(1 << 16))
    (folder / 'page.jpg').mkdir()  # its listing is a web page
    write_video(folder / 'clip.mp4', 3)
    places = []
    monkeypatch.setattr(signal, 'setitimer', lambda _, seconds: places.append(seconds) or (5.0, 0.0))
    for sample in read(item(f'{url}/a.png?size=3')):
        assert sample.error is None
        np.testing.assert_array_equal(cv2.imread(sample.item.path)[..., ::-1], picture())
    assert not Path(sample.item.path).parent.exists()
    assert places == [0, 5.0]
    frames = list(read(Item(f'{url}/clip.mp4', 'clip.mp4', 0, '', True)))
    assert [frame.image.shape for frame in frames] == [(48, 80, 3)] * 3
    for name, words, options in [
        ('missing.jpg', 'HTTP Error 404', {}),
        ('page.jpg/', 'web page instead of a file', {}),
        ('large.png', 'sends more than 6000 bytes', dict(max_pixels=1000)),
    ]:
        [sample] = read(item(f'{url}/{name}'), **options)
        assert words in sample.error
    [sample] = read(item('http://127.0.0.1:9/a.jpg'))
    assert 'refused' in sample.error
    assert capfd.readouterr().err == ''
