"""Image files and label maps, on data sets with one fault per file."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import corrupt_data
import numpy as np
import pytest
from data_checks import CLASSIFICATION, DETECTION, SEGMENTATION, check, dataset
from PIL import Image

from vheat_mm.datasets.checks import images
from vheat_mm.datasets.checks.datasets import Part
from vheat_mm.datasets.checks.images import ImageJob, Loader, examine_image
from vheat_mm.datasets.checks.label_maps import MapRule, judge_labels, learned_class
from vheat_mm.datasets.checks.report import Report

IMAGES = {name: kinds for name, (_, _, kinds) in corrupt_data.IMAGE_FAULTS.items()}
MAPS = {name: kinds for name, (_, kinds) in corrupt_data.MAP_FAULTS.items() if kinds}


def by_stem(report: Report) -> dict[str, set[str]]:
    """Kinds of findings by the name of the file they are in."""
    found: dict[str, set[str]] = {}
    for kind, findings in report.kept.items():
        for finding in findings:
            found.setdefault(Path(finding.path).stem, set()).add(kind)
    return found


def test_images_of_a_detector(coco):
    """Every corrupt file is reported with its kind, and nothing else."""
    report = check('mmdet', train=dataset(DETECTION, coco['images']))
    assert by_stem(report) == IMAGES | {'rotated': {'image-rotated', 'size-differs'}}
    assert 'loaders rotate it' in report.kept['size-differs'][0].value
    found = {finding.image_id for findings in report.kept.values() for finding in findings}
    assert found == set(range(5, 5 + len(IMAGES)))


def test_images_of_a_classifier(folders):
    """One run over the folders, one over the list; the first knows the class without samples, too."""
    listed = check('mmpretrain', train=dataset(CLASSIFICATION, folders['all']))
    assert by_stem(listed) == IMAGES
    root = folders['all'].parent.parent
    found = check('mmpretrain', train=dataset(CLASSIFICATION, None, root))
    assert found.kept['class-without-samples'][0].value == 'empty (label 2)'
    absent = {name: kinds for name, kinds in IMAGES.items() if name != 'missing'}
    assert {name: kinds for name, kinds in by_stem(found).items() if name in IMAGES} == absent


def test_images_and_label_maps_of_a_segmentor(ade):
    report = check('mmseg', train=dataset(SEGMENTATION, ade['all']))
    assert by_stem(report) == IMAGES | MAPS | {'one_pixel': {'image-tiny', 'map-one-pixel-wide'}}
    assert '200 on 16 pixels, outside 1 .. 2' in report.kept['map-values'][0].value


def test_label_maps_in_a_named_storage(ade):
    local = dict(backend_args=dict(backend='local'))
    pipeline = [dict(type='LoadImageFromFile', **local), dict(type='LoadAnnotations', **local)]
    assert not check('mmseg', train=dataset(SEGMENTATION, ade['good'], pipeline=pipeline)).counts


def test_good_samples_have_no_findings(coco, ade, folders):
    for scope, base, files in (
        ('mmdet', DETECTION, coco),
        ('mmseg', SEGMENTATION, ade),
        ('mmpretrain', CLASSIFICATION, folders),
    ):
        assert not check(scope, train=dataset(base, files['good'])).failed(strict=True)


@pytest.mark.parametrize(('side', 'decoded'), [(60_000, False), (11_000, True)])
def test_bomb_is_not_decoded(tmp_path, monkeypatch, side, decoded):
    """A satellite image of 121 megapixels is."""
    (tmp_path / 'x.png').write_bytes(corrupt_data.png(side, side))
    calls = []
    monkeypatch.setattr('mmcv.imfrombytes', lambda *_, **__: calls.append(1))
    ((kind, _),) = examine_image(ImageJob(str(tmp_path / 'x.png'), Loader())).faults
    assert (kind == 'image-too-large', bool(calls)) == (not decoded, decoded)


@pytest.mark.parametrize('share', [0.4, 0.6, 0.8, 0.99])
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'BMP'])
def test_truncated_files_whatever_the_decoder_says(monkeypatch, form, share):
    """OpenCV 4 decodes what there is and leaves the rest grey. The JPEG holds a whole one, its thumbnail."""
    exif = Image.Exif()
    exif[0x927C] = b'thumbnail' + corrupt_data.encode(corrupt_data.picture()[:16, :16], 'JPEG')
    options = dict(exif=exif) if form == 'JPEG' else {}
    content = corrupt_data.encode(corrupt_data.picture(0, 240, 320), form, **options)
    assert form != 'JPEG' or content.count(b'\xff\xd9') == 2
    monkeypatch.setattr('mmcv.imfrombytes', lambda *_, **__: np.full((240, 320, 3), 128, np.uint8))
    for whole in (content, content + b'\0' * 50, content + b'made by a camera'):
        images.decode(whole, Loader())
    with pytest.raises(images.FaultError, match='image-truncated'):
        images.decode(content[: int(len(content) * share)], Loader())


def test_folders_and_broken_links(tmp_path):
    (tmp_path / 'folder.jpg').mkdir()
    (tmp_path / 'link.jpg').symlink_to('nowhere.jpg')
    found = {name: examine_image(ImageJob(str(tmp_path / name), Loader())).faults for name in os.listdir(tmp_path)}  # noqa: PTH208
    assert found['folder.jpg'][0][0] == 'file-unreadable'
    assert found['link.jpg'] == (('file-missing', 'a link to nowhere.jpg'),)


def test_colour_png_with_sixteen_bits(tmp_path):
    """Pillow calls it RGB."""
    cv2 = pytest.importorskip('cv2')
    assert cv2.imwrite(str(tmp_path / 'x.png'), corrupt_data.picture().astype(np.uint16) * 257)
    assert [kind for kind, _ in examine_image(ImageJob(str(tmp_path / 'x.png'), Loader())).faults] == ['image-16-bit']


def test_decoder_of_the_pipeline_is_used(tmp_path):
    """Pillow refuses an image that OpenCV takes, and the other way round."""
    path = tmp_path / 'float.png'
    path.write_bytes(corrupt_data.encode(corrupt_data.picture(), 'PNG'))
    for backend, fine in (('cv2', True), ('turbojpeg', False)):
        assert bool(examine_image(ImageJob(str(path), Loader(backend=backend))).size) is fine


@pytest.mark.parametrize(
    ('loader', 'kinds'),
    [
        (Loader(), {'image-grayscale', 'image-16-bit'}),
        (Loader('grayscale'), {'image-16-bit'}),
        (Loader('unchanged'), set()),
        (Loader('color', 'tifffile'), set()),
    ],
)
def test_bands_as_the_pipeline_takes_them(tmp_path, loader, kinds):
    """One band of 16 bits is unusual only where it is turned into three of eight."""
    pytest.importorskip('tifffile')
    Image.fromarray(corrupt_data.picture()[..., 0].astype(np.uint16) * 257).save(tmp_path / 'x.tif')
    facts = examine_image(ImageJob(str(tmp_path / 'x.tif'), loader))
    assert ({kind for kind, _ in facts.faults}, facts.size) == (kinds, (64, 48))


class LoadNpy:
    """A loader that is not one of the libraries'."""

    def __call__(self, results):
        results['img'] = np.load(results['img_path'])
        return results


def test_loader_of_the_user_reads_its_files(tmp_path):
    np.save(tmp_path / 'five.npy', np.zeros((48, 64, 5), np.uint16))
    (tmp_path / 'text.npy').write_text('no array')
    loader = Part(SimpleNamespace(), '', [], [LoadNpy()]).image_loader()
    found = {
        name: examine_image(ImageJob(str(tmp_path / name), loader)) for name in ('five.npy', 'text.npy', 'none.npy')
    }
    assert found['five.npy'] == ((), (64, 48), 5, ())
    assert found['text.npy'].faults[0][0] == 'not-an-image'
    assert 'LoadNpy: ' in found['text.npy'].faults[0][1]
    assert found['none.npy'].faults[0][0] == 'file-missing'
    loader = loader._replace(transform=lambda results: results['img_id'])  # needs more than a path
    assert examine_image(ImageJob(str(tmp_path / 'five.npy'), loader)) == ((), None, 0, ())


def test_image_resized_to_zero(coco):
    """20000 x 40 fitted into 1333 x 800 keeps three rows, into 64 x 64 none."""
    for scale, step in (((1333, 800), 'Resize'), ((64, 64), 'Resize'), ((64, 64), 'RandomResize')):
        extra = dict(ratio_range=(0.5, 2.0)) if step == 'RandomResize' else {}
        pipeline = [*DETECTION['pipeline'], dict(type=step, scale=scale, keep_ratio=True, **extra)]
        report = check('mmdet', train=dataset(DETECTION, coco['image_wide'], pipeline=pipeline))
        assert ('image-resized-to-zero' in report.counts) is (scale == (64, 64))


def test_learned_class_is_that_of_mmseg():
    loading = pytest.importorskip('mmseg.datasets.transforms.loading')
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for reduce_zero, mapping in ((False, {}), (True, {}), (False, {0: 255, 1: 0}), (True, {0: 3, 5: 255, 255: 7})):
        loader = loading.LoadAnnotations()
        path = corrupt_data.encode(values, 'PNG')
        info = dict(seg_map_path='x', reduce_zero_label=reduce_zero, label_map=mapping, seg_fields=[])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading.fileio, 'get', lambda *_, content=path, **__: content)
            theirs = loader.transform(info)['gt_seg_map'].ravel()
        rule = MapRule(150, reduce_zero, tuple(mapping.items()), Loader())
        assert [learned_class(value, rule) for value in range(256)] == theirs.tolist()


def test_ade20k_values():
    """0 is unlabelled, 1 .. 150 are classes: 151 is one too many, as is 0 where nothing is shifted and ignored."""
    rule = MapRule(150, True, (), Loader())
    full = np.arange(151, dtype=np.uint8).reshape(1, -1).repeat(2, axis=0)
    assert judge_labels(full, rule) == []
    assert [kind for kind, _ in judge_labels(full + np.uint8(1), rule)] == ['map-values']
    assert [kind for kind, _ in judge_labels(full, rule._replace(reduce_zero_label=False))] == ['map-values']
