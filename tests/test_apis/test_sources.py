"""Which files a run reads, and under which names it writes their results."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest

from vheat_mm.apis.inference.names import number_equal, output_names, safe_name
from vheat_mm.apis.inference.sources import list_items
from vheat_mm.apis.inference.types import Item
from vheat_mm.utils.errors import ToolError


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is logged."""
    lines: list[str] = []
    for module in ('sources', 'names'):
        monkeypatch.setattr(f'vheat_mm.apis.inference.{module}.print_log', lambda text, *_: lines.append(text))
    return lines


@pytest.fixture
def photos(tmp_path) -> Path:
    make(tmp_path / 'photos', 'b.jpg', 'a.JPG', 'clip.mp4', 'notes.md', '._a.JPG', 'sub/a.jpg', 'sub/deep/c.png')
    return tmp_path / 'photos'


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(*sources, **options) -> list[str]:
    items = list_items(list(sources), **options)
    assert [item.index for item in items] == list(range(len(items)))
    listed = [item.name for item in items]
    assert len(set(listed)) == len(listed)
    assert not any('..' in PurePosixPath(name).parts or name.startswith('/') for name in listed)
    return listed


def test_folder(photos, said):
    items = list_items(photos)
    assert [(item.name, item.is_video) for item in items] == [('a.JPG', False), ('b.jpg', False), ('clip.mp4', True)]
    assert [Path(item.path) for item in items] == [photos / item.name for item in items]
    assert said == [f'{photos}: 1 folder in it not read (--recursive)', f'{photos}: skipped hidden (1), .md (1)']
    assert names(photos, recursive=True) == ['a.JPG', 'b.jpg', 'clip.mp4', 'sub/a.jpg', 'sub/deep/c.png']


def test_globs(photos, said, monkeypatch):
    assert names(photos / '**/*.jpg') == ['b.jpg', 'sub/a.jpg']
    assert names(photos / '*') == ['a.JPG', 'b.jpg', 'clip.mp4', 'sub/a.jpg']  # as the shell would replace it
    monkeypatch.chdir(photos)
    assert names('s*/*.jpg', '[b]*') == ['sub/a.jpg', 'b.jpg']
    make(photos, '[1].jpg')
    assert names('[1].jpg') == ['[1].jpg']  # a file of that name comes first


def test_lists(photos, said, monkeypatch):
    paths = photos / 'paths.txt'
    paths.write_bytes(
        f'\ufeff# mine\r\n\r\nsub/a.jpg\r\n  {photos}/b.jpg \r\nhttp://host/x.png\r\nmissing.jpg\r\n'.encode()
    )
    assert names(paths) == ['sub/a.jpg', 'b.jpg', 'x.png', 'missing.jpg']
    monkeypatch.chdir(photos.parent)
    other = photos / 'sub' / 'paths.txt'
    other.write_text('photos/b.jpg\ndeep/c.png\n')  # relative to the working folder, and to the list
    items = list_items([other])
    assert [item.name for item in items] == ['b.jpg', 'sub/deep/c.png']
    assert all(Path(item.path).exists() for item in items)
    for content, words in ((b'Hello\nworld', 'no list of files'), (b'#\n\n', 'lists no paths'), (b'\xff\xfe', 'UTF-8')):
        paths.write_bytes(content)
        with pytest.raises(ToolError, match=words):
            list_items([paths])


def test_same_file_twice(photos, said):
    (photos / 'link.jpg').symlink_to('b.jpg')  # another name is another input
    assert names(photos / 'b.jpg', photos, photos / 'sub/../b.jpg') == ['b.jpg', 'a.JPG', 'clip.mp4', 'link.jpg']
    assert 'given more than once and read once: 2 files, ' in said[-1]


def test_equal_names_get_the_folders_in_front(tmp_path, said):
    for folder in ('x/one', 'y/one', 'two'):
        make(tmp_path / folder, 'a.jpg')
    make(tmp_path / 'two', 'A.jpg', 'b.jpg')
    assert names(tmp_path / 'x/one', tmp_path / 'two') == ['one/a.jpg', 'two/A.jpg', 'two/a.jpg', 'two/b.jpg']
    assert names(tmp_path / 'x/one', tmp_path / 'y/one') == ['x/one/a.jpg', 'y/one/a.jpg']
    assert names(*(tmp_path / name / 'a.jpg' for name in ('x/one', 'two'))) == ['one/a.jpg', 'two/a.jpg']
    assert names('http://h.org/x.jpg?id=1', 'http://h.org/x.jpg?id=2') == ['x.jpg', 'x_2.jpg']


def test_names_of_files_and_folders_do_not_clash():
    assert number_equal(['a.jpg', 'A.JPG', 'a.jpg/b.jpg', 'a.jpg/c.jpg']) == [
        *('a_2.jpg', 'A_3.JPG', 'a.jpg/b.jpg', 'a.jpg/c.jpg')
    ]
    assert number_equal(['a.jpg/b.jpg', 'a.jpg']) == ['a.jpg/b.jpg', 'a_2.jpg']
    assert number_equal(['a.png', 'a_2.png', 'a.png']) == ['a.png', 'a_2.png', 'a_3.png']


def test_unsafe_names():
    assert safe_name('../../etc/pass\nwd') == 'etc/pass_wd'
    assert safe_name('/a:b/c?.jpg') == 'a_b/c_.jpg'
    assert safe_name(os.fsdecode(b'\xff.jpg')) == '_.jpg'
    assert safe_name('a./b ') == 'a_/b_'
    assert safe_name('..') == '_'
    long = safe_name('é' * 120 + '.jpg')
    assert len(long.encode()) <= 200
    assert long.endswith('.jpg')
    assert long != safe_name('é' * 121 + '.jpg')


def test_inputs_keep_their_names_and_results_get_safe_ones(tmp_path, said):
    listed = [
        'Case.jpg',
        'a.jpg',
        'case.jpg',
        'line\nfeed.jpg',
        'long' * 50 + '.tif',
        os.fsdecode(b'\xff.jpg'),
        'star*.jpg',
    ]
    make(tmp_path, *listed)
    assert sorted(names(tmp_path)) == sorted(listed)
    found = {item.name: output_names([item], 'painted')[item.index] for item in list_items(tmp_path)}
    assert (found['Case.jpg'], found['a.jpg'], found['star*.jpg']) == ('Case.jpg', 'a.jpg', 'star_.jpg')
    said.clear()
    for kind in ('painted', 'label_maps'):
        of_all = list(output_names(list_items(tmp_path), kind).values())
        assert len({name.casefold() for name in of_all}) == len(listed)
        assert all(name.isprintable() and len(name) < 210 for name in of_all)
    assert len(said) == 2
    assert said[0].startswith('under other names in painted: 5 files, such as case_2.jpg of case.jpg, as')


def test_names_of_results(said):
    listed = ('a.jpg', 'a.png', 'b.tif', 'b.tif.png', 'd/a.JPEG', 'clip.avi', 'clip.mp4', 'none')
    items = [Item('', name, 10 + i, '', name.startswith('clip')) for i, name in enumerate(listed)]
    assert list(output_names(items, 'painted').values()) == [
        *('a.jpg', 'a.png', 'b.tif.png', 'b.tif_2.png', 'd/a.JPEG', 'clip.avi.mp4', 'clip.mp4', 'none.png')
    ]
    assert output_names(items, 'label_maps') == {
        10: 'a.jpg.png',
        11: 'a.png.png',
        12: 'b.png',
        13: 'b.tif.png',
        14: 'd/a.png',
        15: 'clip.avi',
        16: 'clip.mp4',
        17: 'none.png',
    }


def test_output_folder(photos, said):
    out = photos / 'out'
    make(out, 'painted/a.jpg')
    assert 'out/painted/a.jpg' in names(photos, recursive=True)
    assert names(photos, recursive=True, exclude=out) == ['a.JPG', 'b.jpg', 'clip.mp4', 'sub/a.jpg', 'sub/deep/c.png']
    assert any('is the output folder and not read' in line for line in said)
    assert 'painted/a.jpg' not in ' '.join(names(photos / '**/*.*', exclude=out))
    for source in (out, out / 'painted', out / 'painted/a.jpg'):
        with pytest.raises(ToolError, match='output folder'):
            list_items(source, exclude=out)


def test_links_in_a_circle(photos, said):
    (photos / 'sub/up').symlink_to(photos)
    assert names(photos, recursive=True) == ['a.JPG', 'b.jpg', 'clip.mp4', 'sub/a.jpg', 'sub/deep/c.png']
    assert 'links to folders that are read already (1)' in said[-1]


def test_unreadable_folder(photos, said, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('sub'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    assert names(photos, recursive=True) == ['a.JPG', 'b.jpg', 'clip.mp4']
    assert said[0] == f"cannot read the folder '{photos / 'sub'}': Permission denied"
    with pytest.raises(ToolError, match='cannot read the folder'):
        list_items(photos / 'sub')


@pytest.mark.parametrize(
    ('source', 'words'),
    [
        ('photos/sub/nothing*.jpg', r"the glob 'photos/sub/nothing\*\.jpg' matches no image or video"),
        ('photos/*.md', r'matches no image or video, only \.md \(1\)'),
        ('photoz', "there is no 'photoz', did you mean 'photos'"),
        ('photos/my', 'need quotes in the shell'),
        ('photos\\a.jpg', 'separated by /'),
        ('s3://bucket/a.jpg', 'only http:// and https://'),
        ('http:///a.jpg', 'it has no host'),
        ('empty', r"no image or video in the folder 'empty'; it holds \.heic \(1\); 1 folder in it .*--recursive"),
        ('', 'no path'),
        ('a\0b', 'no path'),
    ],
)
def test_sources_that_do_not_exist(photos, monkeypatch, source, words):
    monkeypatch.chdir(photos.parent)
    make(photos.parent, 'empty/x.heic', 'empty/deeper/a.jpg')
    with pytest.raises(ToolError, match=words):
        list_items(['photos', source])


def test_without_pyav(photos, said, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert names(photos / 'b.jpg') == ['b.jpg']
    with pytest.raises(ToolError, match=r"pip install 'vheat_mm\[predict\]'"):
        list_items(photos)
