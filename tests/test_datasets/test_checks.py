"""The check of data sets, on small ones with one fault per file."""

from __future__ import annotations

import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import corrupt_data as biting
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from vheat_mm.datasets.checks import images, json_stream, masks, pool
from vheat_mm.datasets.checks.check import check_datasets
from vheat_mm.datasets.checks.coco import judge_coco, read_coco
from vheat_mm.datasets.checks.images import ImageJob, Loader, examine_image
from vheat_mm.datasets.checks.kinds import KINDS, Severity
from vheat_mm.datasets.checks.label_maps import MapRule, judge_labels, learned_class
from vheat_mm.datasets.checks.report import KEPT, Finding, Report
from vheat_mm.utils.torchvision import ensure_torchvision

pytest.importorskip('mmcv')
ensure_torchvision()
REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / 'tools' / 'misc'))
from check_dataset import main  # noqa: E402

IMAGES = {
    'missing': {'file-missing'},
    'zero_bytes': {'file-empty'},
    'no_image': {'not-an-image'},
    'truncated_jpeg': {'image-truncated'},
    'truncated_png': {'image-truncated'},
    'half_written_jpeg': {'image-truncated'},
    'damaged_jpeg': {'image-damaged'},
    'damaged_png': {'image-damaged'},
    'stray_bytes': {'image-suspect'},
    'bomb': {'image-too-large'},
    'one_pixel': {'image-tiny'},
    'grayscale': {'image-grayscale'},
    'sixteen_bit': {'image-grayscale', 'image-16-bit'},
    'cmyk': {'image-cmyk'},
    'rotated': {'image-rotated'},
    'wide': {'image-narrow'},
    'palette': {'image-palette'},
    'alpha': {'image-alpha'},
}
ANNOTATIONS = {
    'good': set(),
    'no_annotations_of_image': {'image-without-annotation'},
    'no_annotations': {'nothing-to-learn', 'image-without-annotation'},
    'no_annotations_key': {'nothing-to-learn', 'image-without-annotation'},
    'no_images': {'data-set-empty'},
    'box_outside': {'box-outside'},
    'box_partly_outside': {'box-beyond-edge'},
    'box_zero_size': {'box-degenerate'},
    'box_negative_size': {'box-negative'},
    'box_below_one_pixel': {'box-degenerate'},
    'box_nan': {'box-not-finite'},
    'box_infinite': {'box-not-finite'},
    'box_three_numbers': {'box-malformed'},
    'box_text': {'box-malformed'},
    'box_missing': {'json-field-missing'},
    'area_zero': {'area-not-positive'},
    'area_missing': {'json-field-missing'},
    'polygon_two_points': {'polygon-dropped'},
    'polygon_odd': {'polygon-dropped'},
    'polygon_outside': {'mask-outside'},
    'polygon_partly_outside': {'mask-beyond-edge'},
    'polygon_nan': {'mask-not-finite'},
    'polygon_flat': {'mask-malformed'},
    'mask_missing': {'mask-missing'},
    'mask_empty': {'mask-missing'},
    'rle_wrong_size': {'rle-size'},
    'rle_wrong_sum': {'rle-sum'},
    'rle_without_size': {'rle-without-size'},
    'rle_garbage': {'mask-malformed'},
    'category_unknown': {'category-unknown'},
    'category_missing': {'json-field-missing'},
    'annotation_of_no_image': {'annotation-of-no-image', 'image-without-annotation'},
    'image_id_missing': {'json-field-missing', 'image-without-annotation'},
    'annotation_id_missing': {'json-field-missing'},
    'duplicate_annotation_id': {'duplicate-annotation-id'},
    'duplicate_image_id': {'duplicate-image-id'},
    'duplicate_file': {'image-without-annotation'},  # the rest shows when all data sets are known
    'size_wrong': set(),  # likewise, when images are decoded
    'size_swapped': set(),
    'size_zero': {'size-not-positive'},
    'size_missing': {'json-field-missing'},
    'file_name_missing': {'json-field-missing'},
}
MAPS = {
    'map_missing': {'file-missing'},
    'map_zero_bytes': {'file-empty'},
    'map_no_image': {'not-an-image'},
    'map_truncated': {'image-truncated'},
    'map_value_too_high': {'map-values'},
    'map_other_size': {'map-size'},
    'map_three_channels': {'map-channels'},
    'map_sixteen_bit': {'map-16-bit'},
    'map_unlabelled': {'map-unlabelled'},
}
LABELS = {
    'label_too_high': {'label-out-of-range', 'label-contradiction'},
    'label_negative': {'label-out-of-range', 'label-contradiction'},
    'label_text': {'label-malformed'},
    'label_absent': {'label-malformed'},
    'label_line_empty': {'label-malformed'},
    'label_contradiction': {'label-contradiction'},
}
DETECTION = dict(
    scope='mmdet',
    type='CocoDataset',
    metainfo=dict(classes=biting.CLASSES),
    data_prefix=dict(img='images/'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)],
)
SEGMENTATION = dict(
    scope='mmseg',
    type='BaseSegDataset',
    metainfo=dict(classes=('ground', 'box')),
    data_prefix=dict(img_path='images', seg_map_path='annotations'),
    reduce_zero_label=True,
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')],
)
CLASSIFICATION = dict(
    scope='mmpretrain',
    type='CustomDataset',
    data_prefix='train',
    with_label=True,
    pipeline=[dict(type='LoadImageFromFile')],
)


@pytest.fixture(scope='module')
def coco(tmp_path_factory) -> dict[str, Path]:
    return biting.make_biting_coco(tmp_path_factory.mktemp('coco'))


@pytest.fixture(scope='module')
def ade(tmp_path_factory) -> dict[str, Path]:
    return biting.make_biting_ade(tmp_path_factory.mktemp('ade'))


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> dict[str, Path]:
    return biting.make_biting_folder(tmp_path_factory.mktemp('folders'))


@pytest.fixture(autouse=True)
def _restored(own_scope):
    yield
    logging.disable(logging.NOTSET)  # the tool silences the libraries


def dataset(base: dict, ann_file: Path | None, root: Path | None = None, **fields) -> dict:
    root = root or ann_file.parent.parent
    named = dict(ann_file=str(ann_file)) if ann_file else {}
    return {**{k: v for k, v in base.items() if k != 'scope'}, 'data_root': str(root), **named, **fields}


def check(scope: str, splits: tuple[str, ...] = ('train',), model: dict | None = None, **datasets) -> Report:
    pytest.importorskip(scope)
    init_default_scope(scope)
    loaders = {f'{split}_dataloader': dict(dataset=value) for split, value in datasets.items()}
    return check_datasets(Config(dict(model=model or {}, **loaders)), splits, workers=2)


def by_stem(report: Report) -> dict[str, set[str]]:
    """Kinds of findings by the name of the file they are in."""
    found: dict[str, set[str]] = {}
    for kind, findings in report.kept.items():
        for finding in findings:
            found.setdefault(Path(finding.path).stem, set()).add(kind)
    return found


# --- images


def test_images_of_a_detector(coco):
    """Everything that is decoded is reported under its own name, and nothing else."""
    report = check('mmdet', train=dataset(DETECTION, coco['images']))
    assert by_stem(report) == IMAGES | {'rotated': {'image-rotated', 'size-differs'}}
    assert 'loaders turn it' in report.kept['size-differs'][0].value
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
    assert by_stem(report) == IMAGES | MAPS | {'one_pixel': {'image-tiny', 'map-line'}}
    assert '200 on 16 pixels, outside 1 .. 2' in report.kept['map-values'][0].value


def test_list_of_good_samples_is_clean(coco, ade, folders):
    for scope, base, files in (
        ('mmdet', DETECTION, coco),
        ('mmseg', SEGMENTATION, ade),
        ('mmpretrain', CLASSIFICATION, folders),
    ):
        report = check(scope, train=dataset(base, files['good']))
        assert not report.counts
        assert not report.failed(strict=True)


def test_bomb_is_not_decoded(tmp_path, monkeypatch):
    path = biting.write_images(tmp_path)['bomb']
    monkeypatch.setattr('mmcv.imfrombytes', lambda *_, **__: pytest.fail('decoded'))
    monkeypatch.setattr('PIL.Image.MAX_IMAGE_PIXELS', None)  # as in a worker
    assert [kind for kind, _ in examine_image(ImageJob(str(path), Loader())).faults] == ['image-too-large']


@pytest.mark.parametrize('share', [0.4, 0.6, 0.8, 0.99])
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'BMP'])
def test_cut_files_whatever_the_decoder_says(monkeypatch, form, share):
    """OpenCV 4 decodes what there is and leaves the rest grey. The JPEG holds a whole one, its thumbnail."""
    exif = Image.Exif()
    exif[0x927C] = b'thumbnail' + biting.encode(biting.picture()[:16, :16], 'JPEG')
    options = dict(exif=exif) if form == 'JPEG' else {}
    content = biting.encode(biting.picture(0, 240, 320), form, **options)
    assert form != 'JPEG' or content.count(b'\xff\xd9') == 2
    monkeypatch.setattr('mmcv.imfrombytes', lambda *_, **__: np.full((240, 320, 3), 128, np.uint8))
    for whole in (content, content + b'\0' * 50, content + b'made by a camera'):
        images.decode(whole, Loader())
    with pytest.raises(images.FaultError, match='image-truncated'):
        images.decode(content[: int(len(content) * share)], Loader())


def test_what_else_may_stand_in_a_files_place(tmp_path):
    (tmp_path / 'folder.jpg').mkdir()
    (tmp_path / 'link.jpg').symlink_to('nowhere.jpg')
    found = {name: examine_image(ImageJob(str(tmp_path / name), Loader())).faults for name in os.listdir(tmp_path)}  # noqa: PTH208
    assert found['folder.jpg'][0][0] == 'file-unreadable'
    assert found['link.jpg'] == (('file-missing', 'a link to nowhere.jpg'),)


def test_colour_png_with_sixteen_bits(tmp_path):
    """Pillow calls it RGB."""
    cv2 = pytest.importorskip('cv2')
    assert cv2.imwrite(str(tmp_path / 'x.png'), biting.picture().astype(np.uint16) * 257)
    assert [kind for kind, _ in examine_image(ImageJob(str(tmp_path / 'x.png'), Loader())).faults] == ['image-16-bit']


def test_decoder_of_the_pipeline_is_used(tmp_path):
    """Pillow refuses an image that OpenCV takes, and the other way round."""
    path = tmp_path / 'float.png'
    path.write_bytes(biting.encode(biting.picture(), 'PNG'))
    for backend, fine in (('cv2', True), ('turbojpeg', False)):
        assert bool(examine_image(ImageJob(str(path), Loader(backend=backend))).size) is fine


def test_resizing_that_leaves_nothing(tmp_path):
    """20000 x 40 fitted into 1333 x 800 keeps three rows, into 64 x 64 none."""
    files = biting.make_biting_coco(tmp_path)
    for scale, step in (((1333, 800), 'Resize'), ((64, 64), 'Resize'), ((64, 64), 'RandomResize')):
        extra = dict(ratio_range=(0.5, 2.0)) if step == 'RandomResize' else {}
        pipeline = [*DETECTION['pipeline'], dict(type=step, scale=scale, keep_ratio=True, **extra)]
        report = check('mmdet', train=dataset(DETECTION, files['image_wide'], pipeline=pipeline))
        assert ('image-shrinks-to-nothing' in report.counts) is (scale == (64, 64))


# --- annotations


@pytest.mark.parametrize('name', [*biting.ANNOTATION_FAULTS, 'good'])
def test_annotations(coco, name):
    content = read_coco(str(coco[name]))
    findings = list(judge_coco(content, biting.CLASSES, trains=True, with_mask=True))
    assert {finding.kind for finding in findings} == ANNOTATIONS[name]
    Report().add_all(findings)
    if name.startswith(('box', 'area', 'polygon', 'mask', 'rle', 'category')):
        assert (findings[0].image_id, findings[0].annotation_id) == (1, 1)


def test_annotations_that_mmdet_ignores(tmp_path):
    content = biting.coco_content({name: Path(f'{name}.jpg') for name in biting.GOOD})
    content['annotations'][0].update(ignore=1, bbox=[8, 8, -5, -5], segmentation=[])
    (tmp_path / 'x.json').write_text(json.dumps(content))
    assert list(judge_coco(read_coco(str(tmp_path / 'x.json')), biting.CLASSES, True, True)) == []


def test_sizes_and_files_named_twice(coco):
    for name, kind, text in (
        ('size_wrong', 'size-differs', '128 x 96 stated, 64 x 48 decoded'),
        ('size_swapped', 'size-differs', '48 x 64 stated, 64 x 48 decoded'),
        ('duplicate_file', 'duplicate-file', 'images 1, 50'),
    ):
        report = check('mmdet', train=dataset(DETECTION, coco[name]))
        assert [finding.value for finding in report.kept[kind]] == [text]


def test_masks_matter_only_where_they_are_loaded(coco):
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
    report = check('mmdet', train=dataset(DETECTION, coco['mask_missing'], pipeline=pipeline))
    assert not report.counts


def test_images_without_objects_matter_in_training_only(coco):
    data = dataset(DETECTION, coco['no_annotations'])
    assert set(check('mmdet', train=data).counts) == ANNOTATIONS['no_annotations']
    assert not check('mmdet', splits=('test',), test=data).counts


@pytest.mark.parametrize(
    ('classes', 'kind'), [(('disc', 'box'), 'classes-order'), (('box', 'Disc'), 'classes-absent'), (('box',), None)]
)
def test_class_names(coco, classes, kind):
    findings = judge_coco(read_coco(str(coco['good'])), classes, trains=True, with_mask=True)
    assert [finding.kind for finding in findings] == ([kind] if kind else [])


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('json_cut', r'line \d+, at the end of the file'),
        ('json_comma', r'line 41, column 4: '),
        ('json_list', 'line 1, column 1: expected an object'),
        ('json_zero_bytes', 'line 1, at the end of the file'),
    ],
)
def test_malformed_json(coco, name, text):
    report = check('mmdet', train=dataset(DETECTION, coco[name]))
    assert list(report.counts) == ['json-malformed']
    assert re.match(text, report.kept['json-malformed'][0].value)


STOPS_IN_SET_UP = [name for name, kinds in ANNOTATIONS.items() if any('builds' in KINDS[kind].harm for kind in kinds)]
LEARNED_AS_BACKGROUND = [
    n for n, kinds in ANNOTATIONS.items() if any('learned as background' in KINDS[k].harm for k in kinds)
]


@pytest.mark.parametrize('name', STOPS_IN_SET_UP + list(biting.TEXT_FAULTS))
def test_mmdet_stops_where_the_table_says_so(coco, name, capsys):
    cocos = pytest.importorskip('mmdet.datasets.coco')
    init_default_scope('mmdet')
    fields = {key: value for key, value in DETECTION.items() if key not in ('scope', 'type', 'pipeline')}
    with pytest.raises((KeyError, ValueError, TypeError, AssertionError)):
        cocos.CocoDataset(ann_file=str(coco[name]), filter_cfg=dict(filter_empty_gt=True), **fields)


@pytest.mark.parametrize('name', LEARNED_AS_BACKGROUND)
def test_mmdet_drops_boxes_where_the_table_says_so(coco, name, capsys):
    cocos = pytest.importorskip('mmdet.datasets.coco')
    init_default_scope('mmdet')
    fields = {key: value for key, value in DETECTION.items() if key not in ('scope', 'type', 'pipeline')}
    data = cocos.CocoDataset(ann_file=str(coco[name]), filter_cfg=None, **fields)
    assert data.get_data_info(0)['instances'] == []


def test_boxes_of_other_formats(tmp_path, coco):
    """Data sets that read themselves, here MMEngine's own format: left, top, right, bottom."""
    instances = [
        dict(bbox=[8, 8, 40, 32], bbox_label=0, ignore_flag=0),
        dict(bbox=[8, 8, float('nan'), 32], bbox_label=0, ignore_flag=0),
        dict(bbox=[40, 8, 8, 32], bbox_label=0, ignore_flag=0),
        dict(bbox=[8, 8, 8, 32], bbox_label=2, ignore_flag=0),
    ]
    path = str(coco['good'].parent.parent / 'images' / 'good_0.jpg')
    entries = [dict(img_path=path, height=48, width=64, instances=part) for part in (instances, [])]
    (tmp_path / 'x.json').write_text(json.dumps(dict(metainfo=dict(classes=biting.CLASSES), data_list=entries)))
    data = dict(type='BaseDetDataset', ann_file=str(tmp_path / 'x.json'), pipeline=[])
    kinds = {'box-not-finite', 'box-negative', 'box-degenerate', 'label-out-of-range', 'image-without-annotation'}
    assert set(check('mmdet', train=data).counts) == kinds | {'duplicate-file'}


# --- label maps and labels


def test_learned_class_is_that_of_mmseg():
    loading = pytest.importorskip('mmseg.datasets.transforms.loading')
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for reduce_zero, mapping in ((False, {}), (True, {}), (False, {0: 255, 1: 0}), (True, {0: 3, 5: 255, 255: 7})):
        loader = loading.LoadAnnotations()
        path = biting.encode(values, 'PNG')
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


@pytest.mark.parametrize('name', LABELS)
def test_labels(folders, name):
    data = dataset(CLASSIFICATION, folders[name])
    report = check('mmpretrain', model=dict(head=dict(num_classes=2)), train=data)
    assert set(report.counts) == LABELS[name]
    lined = [finding for kind in report.kept if kind != 'label-contradiction' for finding in report.kept[kind]]
    assert all('line 9' in finding.value for finding in lined)


# --- data sets


def test_each_file_once_however_many_name_it(coco):
    data = dataset(DETECTION, coco['good'])
    other = dataset(DETECTION, coco['image_missing'])
    mixed = dict(
        type='MultiImageMixDataset',
        dataset=dict(type='RepeatDataset', times=3, dataset=dict(type='ConcatDataset', datasets=[data, other])),
        pipeline=[dict(type='Resize', scale=(64, 64), keep_ratio=True)],
    )
    balanced = dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=data)
    report = check('mmdet', ('train', 'val', 'test'), train=mixed, val=balanced, test=data)
    assert report.checked[0].startswith('train/val/test: 4 samples (CocoDataset, train_dataloader.dataset.dataset.')
    assert report.checked[1].startswith('train: 5 samples (CocoDataset')
    assert report.checked[2].startswith('5 files decoded')
    assert report.counts == {'file-missing': 1, 'image-in-two-splits': 4}
    assert report.kept['image-in-two-splits'][0].value == 'test, train, val'


def test_data_sets_that_cannot_be_read(tmp_path, coco):
    absent = dataset(DETECTION, tmp_path / 'a' / 'absent.json')
    assert list(check('mmdet', train=absent).counts) == ['file-missing']
    empty = dataset(SEGMENTATION, None, tmp_path)
    (tmp_path / 'images').mkdir()
    assert list(check('mmseg', train=empty).counts) == ['data-set-empty']
    no_list = dict(type='BaseDetDataset', ann_file=str(coco['good']), pipeline=[])
    assert list(check('mmdet', train=no_list).counts) == ['data-set-unreadable']


# --- processes


def _half(job: int) -> float:
    if job == 33:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 44:
        time.sleep(60)
    return job / 2


@pytest.mark.parametrize('workers', [1, 2])
def test_one_dead_process_loses_one_job(workers):
    started = time.monotonic()
    results = dict(pool.run_jobs(_half, range(100), workers, patience=1))
    assert results == {job: job / 2 for job in range(100)} | {33: pool.Died(), 44: pool.Died()}
    assert time.monotonic() - started < 20


def _work_in_vain(folder: Path) -> None:
    list(pool.run_jobs(_sign_and_wait, [folder] * 40, 2))


def _sign_and_wait(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='asks /proc who runs')
def test_no_process_outlives_a_killed_check(tmp_path):
    check = multiprocessing.get_context('fork').Process(target=_work_in_vain, args=(tmp_path,))
    check.start()
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    check.kill()
    check.join()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    until(lambda: not any(map(runs, pids)))


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie that waits for being noticed."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def until(condition) -> None:
    for _ in range(100):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail('not within ten seconds')


def _fail(job: int) -> None:
    raise ZeroDivisionError(job)


def test_errors_of_our_own_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        list(pool.run_jobs(_fail, range(3), 1))


def test_jobs_are_drawn_as_they_are_needed():
    """Memory does not grow with the number of jobs."""
    drawn = []
    jobs = (drawn.append(i) or i for i in range(10**9))
    results = pool.run_jobs(abs, jobs, 1)
    for _ in range(10):
        next(results)
    results.close()
    assert len(drawn) < 1000


def test_death_of_the_decoder_is_a_finding(coco, monkeypatch):
    """The function is looked up in forked workers, so they see the patch."""
    monkeypatch.setattr('mmcv.imfrombytes', lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    report = check('mmdet', train=dataset(DETECTION, coco['good']))
    assert report.counts == {'decoder-died': 4}


# --- reading JSON and RLE


TEXT = json.dumps(
    dict(
        info=dict(a=[1, 2.5e-3, None]),
        images=[dict(id=1, file_name='ä"\\ \n'), dict(id=20)],
        empty=[],
        numbers=[1234567, -8.25, True],
        last=-1234567,
    ),
    indent=2,
    ensure_ascii=True,
)


@pytest.mark.parametrize('chunk', [1, 2, 3, 7, 64, 10_000])
def test_streamed_json_is_the_same(tmp_path, chunk):
    (tmp_path / 'x.json').write_text(TEXT, encoding='utf-8')
    found: dict = {}
    for key, index, value in json_stream.iterate(tmp_path / 'x.json', chunk):
        if index is None:
            found[key] = value
        else:
            assert index == len(found.setdefault(key, []))
            found[key].append(value)
    assert found == json.loads(TEXT)


@pytest.mark.parametrize('chunk', [5, 10_000])
def test_streamed_json_fails_at_the_line_where_json_does(tmp_path, chunk):
    broken = [TEXT[:end] for end in range(0, len(TEXT) - 1, 3)] + [TEXT.replace(',', ' ', 4), TEXT + 'x']
    for number, text in enumerate(broken):
        path = tmp_path / f'{number}.json'
        path.write_text(text, encoding='utf-8')
        with pytest.raises(json.JSONDecodeError) as theirs:
            json.loads(text)
        with pytest.raises(json_stream.MalformedJsonError) as ours:
            list(json_stream.iterate(path, chunk))
        line = int(re.match(r'line (\d+)', str(ours.value))[1])
        assert abs(line - theirs.value.lineno) <= 1, text


def test_run_lengths_are_those_of_pycocotools():
    coder = pytest.importorskip('pycocotools.mask')
    rng = np.random.default_rng(0)
    for scale, first in itertools.product((1, 7, 40), (0, 1)):
        mask = np.kron(rng.integers(0, 2, (60 // scale + 1, 90 // scale + 1)), np.ones((scale, scale)))[:60, :90]
        mask = mask if mask[0, 0] == first else 1 - mask
        flat = mask.astype(np.uint8).flatten(order='F')
        changes = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *changes, flat.size]).tolist()
        expected = runs if flat[0] == 0 else [0, *runs]
        rle = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert masks.run_lengths(rle['counts'].decode()) == expected


def test_thousands_of_annotations(tmp_path, monkeypatch):
    """Batches of the tables meet without a seam: the faults are found where they were put."""
    monkeypatch.setattr('vheat_mm.datasets.checks.coco._BATCH', 7)
    content = biting.coco_content({f'n{i}': tmp_path / f'n{i}.jpg' for i in range(50)})
    for i in (6, 7, 48):
        content['annotations'][i]['bbox'] = [8, 8, -1, 5]
        content['annotations'][i + 1]['segmentation'] = [[1, 1, 5, 5, 500, 9]]
    (tmp_path / 'x.json').write_text(json.dumps(content))
    findings = list(judge_coco(read_coco(str(tmp_path / 'x.json')), biting.CLASSES, True, True))
    assert sorted((f.kind, f.annotation_id) for f in findings) == [
        ('box-negative', 7),
        ('box-negative', 8),
        ('box-negative', 49),
        ('mask-beyond-edge', 9),
        ('mask-beyond-edge', 50),
    ]


# --- the report and the command


def test_report_keeps_what_can_be_read():
    report = Report()
    report.add_all(Finding('box-outside', 'a.json', f'box {i}', 1, i) for i in range(KEPT + 5))
    assert report.counts['box-outside'] == KEPT + 5
    assert len(report.kept['box-outside']) == KEPT
    text = report.render(show=2)
    assert 'a.json, image 1, annotation 1: box 1' in text
    assert f'and {KEPT + 3} more' in text
    with pytest.raises(KeyError):
        report.add(Finding('box-otside', 'a.json'))


def test_every_kind_is_documented_and_in_use():
    page = (REPO / 'docs' / 'data_checks.md').read_text(encoding='utf-8')
    code = ''.join(path.read_text() for path in (REPO / 'vheat_mm' / 'preflight').glob('*.py') if path.stem != 'kinds')
    for kind, about in KINDS.items():
        assert f'`{kind}`' in page
        assert f"'{kind}'" in code
        line = next(line for line in page.splitlines() if f'`{kind}`' in line and line.startswith('|'))
        assert f'| {about.severity.value} |' in line


def write_config(path: Path, data: dict, scope: str = 'mmdet') -> str:
    path.write_text(f'default_scope = {scope!r}\nmodel = dict()\ntrain_dataloader = dict(dataset={data!r})\n')
    return str(path)


def test_exit_status(tmp_path, coco, capsys):
    pytest.importorskip('mmdet')
    clean = write_config(tmp_path / 'clean.py', dataset(DETECTION, coco['good']))
    assert main([clean]) == 0
    assert '0 errors, 0 warnings' in capsys.readouterr().out
    assert main([clean, '--cfg-options', f'train_dataloader.dataset.ann_file={coco["image_missing"]}']) == 1
    assert 'images/missing.jpg, image 5' in capsys.readouterr().out
    gray = write_config(tmp_path / 'gray.py', dataset(DETECTION, coco['image_grayscale']))
    assert main([gray]) == 0
    assert main([gray, '--strict']) == 1
    assert main([gray, '--strict', '--limit', '4']) == 0


def test_wrong_use(tmp_path, coco, capsys):
    pytest.importorskip('mmdet')
    clean = write_config(tmp_path / 'clean.py', dataset(DETECTION, coco['good']))
    unknown = write_config(tmp_path / 'unknown.py', dataset(DETECTION, coco['good'], type='CocoDatset'))
    for argv, words in (
        ([str(tmp_path / 'none.py')], 'there is no config'),
        ([clean, '--split', 'val'], 'defines no val_dataloader'),
        ([clean, '--out', str(tmp_path / 'no' / 'x.json')], '--out'),
        ([unknown], 'train_dataloader.dataset: '),
    ):
        assert main(argv) == 2
        errors = capsys.readouterr().err
        assert errors.startswith('error: ')
        assert words in errors
    with pytest.raises(SystemExit, match='2'):
        main([clean, '--workers', '0'])


def test_findings_in_a_file(tmp_path, coco, capsys):
    pytest.importorskip('mmdet')
    config = write_config(tmp_path / 'c.py', dataset(DETECTION, coco['box_nan']))
    assert main([config, '--out', str(tmp_path / 'x.json')]) == 1
    report = json.loads((tmp_path / 'x.json').read_text())
    assert (report['errors'], report['warnings']) == (1, 0)
    (kind,) = report['kinds']
    assert (kind['kind'], kind['severity'], kind['count']) == ('box-not-finite', Severity.ERROR.value, 1)
    assert kind['findings'][0]['annotation_id'] == 1
    assert 'Traceback' not in capsys.readouterr().err


def test_progress_is_silent_on_short_runs(tmp_path, coco, capfd):
    """stderr is no terminal here; what decoders write there is caught, too."""
    pytest.importorskip('mmdet')
    config = write_config(tmp_path / 'c.py', dataset(DETECTION, coco['images']))
    assert main([config]) == 1
    assert capfd.readouterr().err == ''


def test_progress_speaks_now_and_then(monkeypatch, capsys):
    from vheat_mm.datasets.checks import progress

    times = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(progress.time, 'monotonic', lambda: next(times))
    monkeypatch.setattr('sys.stderr', io.StringIO())
    with progress.Progress(100) as bar:
        for _ in range(4):
            bar.advance()
    assert sys.stderr.getvalue().splitlines() == [
        'checked 2 of 100 files, 0 a second',
        'checked 4 of 100 files, 0 a second',
    ]
