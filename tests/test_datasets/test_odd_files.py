"""Files that would hang a reader, fill the memory, or end it without naming them."""

from __future__ import annotations

import copy
import errno
import json
import os
import socket
import struct
from pathlib import Path

import corrupt_data
import pytest
from data_checks import DETECTION, check, dataset
from mmengine.fileio import LocalBackend, get, get_local_path, get_text, register_backend

from vheat_mm.datasets.checks.coco import judge_coco, read_coco
from vheat_mm.datasets.checks.images import ImageJob, Loader, examine_image
from vheat_mm.datasets.checks.json_file import MalformedJsonError
from vheat_mm.engine import fileio
from vheat_mm.utils.files import read_regular


def radiance(width: int, height: int) -> bytes:
    """A Radiance HDR image, run-length encoded: 8 bytes for 127 pixels; OpenCV reads it, Pillow does not know it."""
    line = struct.pack('>BBH', 2, 2, width)
    for _ in range(4):
        line += b''.join(bytes([128 + min(127, width - left), 7]) for left in range(0, width, 127))
    return b'#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y %d +X %d\n' % (height, width) + line * min(height, 99)


def bind(path: Path) -> None:
    """Make a socket; their paths must be short."""
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


SPECIAL = {
    'pipe': (os.mkfifo, 'named pipe'),
    'zero': (lambda path: path.symlink_to('/dev/zero'), 'device'),
    'folder': (Path.mkdir, 'folder'),
    'socket': (bind, 'No such device'),
    'loop': (lambda path: path.symlink_to(path), 'symbolic links'),
}


@pytest.fixture
def _backend():
    fileio.install()
    yield
    register_backend('local', LocalBackend, prefixes='', force=True)


@pytest.mark.skipif(not Path('/dev/zero').exists(), reason='no such files')
@pytest.mark.usefixtures('_backend')
@pytest.mark.parametrize('name', SPECIAL)
def test_files_that_never_end(tmp_path, coco, name):
    """As an image and as an annotation file, in the check and in training."""
    make, words = SPECIAL[name]
    path = tmp_path / f'{name}.jpg'
    make(path)
    assert [kind for kind, _ in examine_image(ImageJob(str(path), Loader())).faults] == ['file-unreadable']
    for read in (get, get_text, read_coco):
        with pytest.raises(OSError, match=words):
            read(str(path))
    if name != 'folder':
        with pytest.raises(OSError, match=words), get_local_path(str(path)):
            pass
    if name != 'loop':  # which does not exist
        report = check('mmdet', train=dataset(DETECTION, path, tmp_path))
        assert [finding.path for finding in report.kept['file-unreadable']] == [str(path)]


@pytest.mark.usefixtures('_backend')
def test_ordinary_files_are_read_as_before(tmp_path):
    path = tmp_path / 'x.txt'
    path.write_bytes('ä\r\nb'.encode())
    (tmp_path / 'link').symlink_to(path)
    assert get(str(tmp_path / 'link')) == path.read_bytes()
    assert get_text(str(path)) == LocalBackend().get_text(path) == 'ä\nb'
    with get_local_path(str(tmp_path)) as folder:
        assert folder == str(tmp_path)


@pytest.mark.usefixtures('_backend')
@pytest.mark.parametrize(
    ('content', 'fits'),
    [(radiance(99, 99), True), (radiance(7000, 7000), False), (corrupt_data.png(60_000, 60_000), False)],
)
def test_images_of_too_many_pixels(tmp_path, monkeypatch, content, fits):
    """They are decoded neither by the check nor in training."""
    path = tmp_path / 'x.jpg'
    path.write_bytes(content)
    if not fits:
        monkeypatch.setattr('mmcv.imfrombytes', lambda *_, **__: pytest.fail('decoded'))
    kinds = [kind for kind, _ in examine_image(ImageJob(str(path), Loader())).faults]
    assert kinds == ([] if fits else ['image-too-large'])
    if not fits:  # the message says how to allow it, and so OpenCV allows it, too
        with pytest.raises(
            OSError, match=r'x\.jpg: .* cut it into tiles, or set OPENCV_IO_MAX_IMAGE_PIXELS='
        ) as caught:
            get(str(path))
        monkeypatch.setenv('OPENCV_IO_MAX_IMAGE_PIXELS', str(caught.value).rpartition('=')[2])
    assert get(str(path)) == content
    monkeypatch.setenv('OPENCV_IO_MAX_IMAGE_PIXELS', '9000')
    with pytest.raises(OSError, match='more than 9000 pixels'):
        get(str(path))


def test_large_files_are_not_read(tmp_path):
    with (tmp_path / 'x.jpg').open('wb') as file:
        file.truncate(2**40)  # takes no space
    ((kind, text),) = examine_image(ImageJob(str(tmp_path / 'x.jpg'), Loader())).faults
    assert (kind, str(2**40) in text, 'raise OPENCV_IO_MAX' in text) == ('image-too-large', True, True)
    with pytest.raises(OSError, match='1099511627776 bytes') as caught:
        read_regular(tmp_path / 'x.jpg')
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize('name', ['a\0b.jpg', 's3://bucket/x.jpg', 'x' * 5000, '', '.'])
def test_odd_file_names(coco, name):
    content = json.loads(coco['good'].read_text())
    content['images'][0]['file_name'] = name
    path = coco['good'].with_name('odd_name.json')
    path.write_text(json.dumps(content))
    report = check('mmdet', train=dataset(DETECTION, path))
    (finding,) = report.kept['file-unreadable']
    assert finding.image_id == 1
    assert str(finding).isprintable()
    assert len(str(finding)) < 800


GOOD = json.dumps(corrupt_data.coco_content({name: Path(f'{name}.jpg') for name in corrupt_data.GOOD}))


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('\ufeff' + GOOD, 'line 1, column 1: a byte order mark'),
        ('{"info":\n' + '[' * 100_000 + ']' * 100_000 + ',' + GOOD[1:], 'line 2, column 200: nested more than'),
        ('{"info":\n' + '7' * 5000 + ',' + GOOD[1:], 'line 2, column 1: a number of 5000 digits'),
        (GOOD + '\n\0', 'line 2, column 1: Extra data'),
        ('{}\n\udc80', 'line 2: not UTF-8 .invalid start byte 0x80'),
        ('[]', 'line 1, column 1: expected an object'),
        ('version https://git-lfs.github.com/spec/v1', "found 'version https://git-lfs"),
        ('{"images": null}', "'images' is a NoneType, expected a list"),
    ],
)
def test_json_that_names_the_place(tmp_path, text, words):
    (tmp_path / 'x.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(MalformedJsonError, match=words):
        read_coco(str(tmp_path / 'x.json'))


def find(path: Path, text: str, evaluated: bool = False) -> dict[str, str]:
    """Kind of finding -> the first one's text."""
    path.write_text(text)
    findings = list(judge_coco(read_coco(str(path)), corrupt_data.CLASSES, True, True, evaluated))
    return {finding.kind: str(finding) for finding in reversed(findings)}


def change(part: str, all_entries: bool = False, **fields: object) -> str:
    content = copy.deepcopy(json.loads(GOOD))
    for entry in content[part] if all_entries else content[part][:1]:
        entry.update({name: value(entry[name]) if callable(value) else value for name, value in fields.items()})
    return json.dumps(content)


def test_keys_that_occur_twice(tmp_path):
    found = find(tmp_path / 'x.json', GOOD[:-1] + ', "annotations": []}')
    assert found['json-key-twice'].endswith("x.json: 'annotations'")
    found = find(tmp_path / 'x.json', GOOD.replace('"bbox": [', '"bbox": [1, 1, 5, 5], "bbox": [', 1))
    assert found == {'json-key-twice': f"{tmp_path}/x.json, image 1, annotation 1: 'bbox'"}


@pytest.mark.parametrize(
    ('text', 'kind', 'words'),
    [
        (change('images', id=float('nan')), 'json-entry-malformed', 'images[0]: id is nan'),
        (change('images', id=True), 'json-entry-malformed', 'images[0]: id is True'),
        (change('annotations', id=None), 'json-entry-malformed', 'annotations[0]: id is None'),
        (change('annotations', category_id=[1]), 'json-entry-malformed', 'category_id is [1]'),
        (change('categories', name=['box']), 'json-entry-malformed', "categories[0]: name is ['box']"),
        (change('images', width=10**400), 'json-entry-malformed', 'images[0]: file_name'),
        (change('images', width='64'), 'json-entry-malformed', "size '64' x 48"),
        (change('annotations', bbox=[10**400, 1, 2, 3]), 'box-malformed', 'annotation 1: bbox [1000'),
        (GOOD.replace('"bbox": [8', '"bbox": [1e400', 1), 'box-not-finite', 'annotation 1: bbox [inf'),
        (change('images', all_entries=True, id=str), 'id-type', "annotation 1: image_id 1, id '1'"),
        (change('annotations', category_id=str), 'id-type', "annotation 1: category_id '2', id 2"),
        (change('annotations', area='5'), 'box-malformed', "area '5'"),
        (change('annotations', segmentation=[[10**400, 1, 2, 3, 4, 5]]), 'mask-not-finite', 'coordinate 1000'),
        (
            change('annotations', segmentation=dict(size=[10**400, 2], counts=[1])),
            'mask-malformed',
            'an RLE of size [1000',
        ),
        (
            change('annotations', segmentation=dict(size=[48, 64], counts=[10**400])),
            'mask-malformed',
            'counts that are no run lengths',
        ),
        (
            change('annotations', segmentation=dict(size=[48, 64], counts='o' * 10**6)),
            'mask-malformed',
            "the character 'o'",
        ),
    ],
)
def test_values_of_the_wrong_type(tmp_path, text, kind, words):
    found = find(tmp_path / 'x.json', text)
    assert words in found[kind]
    assert len(found[kind]) < 800
    harmless = {'annotation-without-image', 'image-without-annotation', 'classes-missing', 'no-usable-annotation'}
    assert set(found) <= {kind, 'category-unknown'} | harmless


def test_text_as_id_is_fine_where_nothing_counts(tmp_path):
    """mmdet only joins by id; pycocotools, which computes scores, puts ids of annotations into arrays."""
    text = change('annotations', all_entries=True, id=lambda number: f'n{number}')
    assert find(tmp_path / 'x.json', text) == {}
    assert "4 ids of annotations are text: 'n1'" in find(tmp_path / 'x.json', text, evaluated=True)['id-type']
