"""What a run writes, read by other libraries: COCO files, painted images and videos, label maps, tables."""

import csv
import errno
import io
import json
import os
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from vheat_mm.apis.inference.class_table import TableWriter, merge_table
from vheat_mm.apis.inference.coco import CocoIds, CocoWriter, merge_coco, to_coco
from vheat_mm.apis.inference.label_maps import LabelMapWriter
from vheat_mm.apis.inference.painting import PaintedWriter, _Look, displayable, paint
from vheat_mm.apis.inference.parts import Key, PartFile, Parts
from vheat_mm.apis.inference.types import Item, Prediction
from vheat_mm.apis.inference.video import VideoWriter
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.torchvision import ensure_torchvision

CLASSES = ('coin', 'nut')
PALETTE = [(220, 20, 60), (0, 80, 200)]


def detection(name='a.jpg', index=0, size=(60, 80), frame=None, with_masks=True, **changes):
    """Three boxes, the last below most thresholds; masks are rectangles inside of them."""
    mask_of = pytest.importorskip('pycocotools.mask')
    boxes = np.array([[10.25, 20.1, 30.7, 40.9], [40, 25, 70, 55], [5, 5, 9, 9]], np.float32)
    masks = []
    for x1, y1, x2, y2 in boxes.astype(int):
        dense = np.zeros(size, np.uint8, order='F')
        dense[y1 + 2 : y2 - 1, x1 + 2 : x2 - 1] = 1
        masks.append(mask_of.encode(dense))
    found = dict(
        item=Item(f'/data/{name}', name, index, name, is_video=frame is not None),
        frame=frame,
        image=np.full((*size, 3), 100, np.uint8),
        size=size,
        task='detection',
        boxes=boxes,
        scores=np.array([0.9, 0.6, 0.2], np.float32),
        labels=np.array([1, 0, 1]),
        masks=masks if with_masks else None,
    )
    return Prediction(**{**found, **changes})


def load_coco(path):
    return pytest.importorskip('pycocotools.coco').COCO(str(path))


class TestCoco:
    def write(self, folder: Path, predictions, ids=None, score_thr=0.3):
        """Two processes write, one joins."""
        writers = [CocoWriter(folder / f'coco.{rank}.jsonl', score_thr) for rank in range(2)]
        for prediction in predictions:
            writers[prediction.item.index % 2].write(prediction)
        for writer in writers:
            writer.close()
            writer.close()
        items = [prediction.item for prediction in predictions]
        parts = {folder / f'coco.{rank}.jsonl': [item for item in items if item.index % 2 == rank] for rank in range(2)}
        target = folder / 'predictions.json'
        return target, merge_coco(parts, ids or CocoIds(CLASSES), target)

    def test_loads_with_pycocotools(self, tmp_path):
        mask_of = pytest.importorskip('pycocotools.mask')
        none = np.zeros(0, np.float32)
        empty = detection('sub/empty.png', 1, boxes=none.reshape(0, 4), scores=none, labels=none, masks=[])
        predictions = [detection('z.jpg', 3), empty, detection('b.jpg', 0), detection('bad.jpg', 2, error='torn')]
        predictions += [detection('clip.mp4', 4, frame=frame) for frame in (1, 0)]
        target, counts = self.write(tmp_path, predictions)
        assert counts == (5, 8)
        coco = load_coco(target)
        assert [(image['id'], image['file_name']) for image in coco.dataset['images']] == [
            (1, 'b.jpg'),
            (2, 'sub/empty.png'),
            (3, 'z.jpg'),
            (4, 'clip.mp4/000000'),
            (5, 'clip.mp4/000001'),
        ]
        assert coco.imgs[5]['frame'] == 1
        assert [(category['id'], category['name']) for category in coco.dataset['categories']] == [
            (1, 'coin'),
            (2, 'nut'),
        ]
        assert [annotation['id'] for annotation in coco.dataset['annotations']] == list(range(1, 9))
        first, prediction = coco.loadAnns(coco.getAnnIds(1))[0], predictions[2]
        assert (first['category_id'], first['score'], first['iscrowd']) == (2, float(np.float32(0.9)), 0)
        # As mmdet's CocoMetric: subtracted in double precision.
        x1, y1, x2, y2 = (float(value) for value in prediction.boxes[0])
        assert first['bbox'] == [x1, y1, x2 - x1, y2 - y1]
        dense = mask_of.decode(prediction.masks[0])
        np.testing.assert_array_equal(coco.annToMask(first), dense)
        assert first['area'] == dense.sum()
        results = coco.loadRes(json.loads(target.read_text())['annotations'])
        assert len(results.anns) == 8
        in_memory = to_coco(predictions, CLASSES, 0.3)
        assert in_memory == json.loads(target.read_text())

    def test_boxes_of_a_diverged_network(self):
        prediction = detection(with_masks=False)
        prediction.boxes[0, 2], prediction.scores[1] = np.inf, np.nan
        content = json.dumps(to_coco([prediction], CLASSES), allow_nan=False)
        assert [entry['score'] for entry in json.loads(content)['annotations']] == [pytest.approx(0.2)]

    def test_boxes_alone(self, tmp_path):
        target, _ = self.write(tmp_path, [detection(with_masks=False)], score_thr=float(np.float32(0.2)))
        annotations = load_coco(target).dataset['annotations']
        assert [annotation['area'] for annotation in annotations][1:] == [900.0, 16.0]
        assert 'segmentation' not in annotations[0]

    def test_average_precision_is_that_of_mmdet(self, tmp_path):
        ensure_torchvision()
        metrics = pytest.importorskip('mmdet.evaluation.metrics')
        cocoeval = pytest.importorskip('pycocotools.cocoeval')
        rng = np.random.default_rng(0)
        truth = dict(images=[], annotations=[], categories=[dict(id=8, name='coin'), dict(id=3, name='nut')])
        metric, predictions = None, []
        for index in range(4):
            truth['images'].append(dict(id=20 + index, file_name=f'{index}.jpg', width=80, height=60))
            prediction = detection(f'{index}.jpg', index)
            for label, box, mask in zip(prediction.labels, prediction.boxes, prediction.masks, strict=True):
                x1, y1, x2, y2 = box.tolist()
                segmentation = dict(mask, counts=mask['counts'].decode())
                entry = dict(bbox=[x1, y1, x2 - x1, y2 - y1], area=400.0, iscrowd=0, segmentation=segmentation)
                entry.update(id=len(truth['annotations']) + 1, image_id=20 + index, category_id=(8, 3)[label])
                truth['annotations'].append(entry)
            prediction.boxes = prediction.boxes + rng.uniform(-3, 3, (3, 4)).astype(np.float32)
            prediction.scores = rng.uniform(0, 1, 3).astype(np.float32)
            prediction.masks = [prediction.masks[0], prediction.masks[2], prediction.masks[2]]
            predictions.append(prediction)
        file = tmp_path / 'truth.json'
        file.write_text(json.dumps(truth))
        metric = metrics.CocoMetric(ann_file=str(file), metric=['bbox', 'segm'])
        metric.dataset_meta = dict(classes=CLASSES)
        for index, prediction in enumerate(predictions):
            found = dict(bboxes=prediction.boxes, scores=prediction.scores, labels=prediction.labels)
            found = {name: torch.from_numpy(value) for name, value in found.items()}
            found['masks'] = [dict(mask) for mask in prediction.masks]
            metric.process({}, [dict(img_id=20 + index, ori_shape=(60, 80), pred_instances=found)])
        expected = metric.evaluate(size=4)

        target, _ = self.write(tmp_path, predictions, CocoIds(CLASSES, file), score_thr=0.0)
        annotations = json.loads(target.read_text())['annotations']
        for kind in ('bbox', 'segm'):
            # Of masks CocoMetric leaves out boxes: pycocotools would take areas from them.
            rows = [{name: entry[name] for name in entry if kind == 'bbox' or name != 'bbox'} for entry in annotations]
            coco = load_coco(file)
            evaluation = cocoeval.COCOeval(coco, coco.loadRes(rows), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            names = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
            assert 0.05 < evaluation.stats[0] < 0.95
            # CocoMetric rounds to three places.
            assert [expected[f'coco/{kind}_{name}'] for name in names] == np.round(evaluation.stats[:6], 3).tolist()

    def test_ids_of_a_file(self, tmp_path, caplog):
        file = tmp_path / 'val.json'
        images = [dict(id=7, file_name='a.jpg'), dict(id=9, file_name='in/b.jpg'), dict(id=4, file_name='c/d.jpg')]
        images += [dict(id=3, file_name='e/d.jpg')]
        categories = [dict(id=5, name='nut'), dict(id=90, name='other'), dict(id=2, name='coin')]
        file.write_text(json.dumps(dict(images=images, categories=categories, annotations=[])))
        names = ['a.jpg', 'x/a.jpg', 'out/b.jpg', 'd.jpg', 'c/d.jpg']
        target, _ = self.write(
            tmp_path, [detection(name, index) for index, name in enumerate(names)], CocoIds(CLASSES, file)
        )
        coco = load_coco(target)
        assert {image['file_name']: image['id'] for image in coco.dataset['images']} == {
            'a.jpg': 7,  # exactly
            'x/a.jpg': 10,  # 7 is taken
            'out/b.jpg': 9,  # by its last part
            'd.jpg': 11,  # ambiguous
            'c/d.jpg': 4,
        }
        assert {annotation['category_id'] for annotation in coco.dataset['annotations']} == {2, 5}
        with pytest.raises(ToolError, match=r"val.json has no category 'date'; it has 'nut', 'other', 'coin'"):
            CocoIds(['nut', 'date'], file)
        assert CocoIds(['nut', 'date'], file, chosen=['nut']).categories == [dict(id=5, name='nut')]
        file.write_text('[1]')
        with pytest.raises(ToolError, match=r'val.json lists no images and categories'):
            CocoIds(CLASSES, file)


class TestParts:
    def test_what_a_killed_process_leaves(self, tmp_path):
        """A torn line is cut off, and lines count of the inputs that a file is said to hold."""
        paths = tmp_path / 'old', tmp_path / 'new'
        old = PartFile(paths[0])
        for name in ('a', 'b', 'gone'):
            old.append(Key(name, None), f'old {name}')
        old.close()
        with paths[0].open('ab') as file:
            file.write(b'{"name":"c"}\t"to')
        old, new = PartFile(paths[0]), PartFile(paths[1])
        old.append(Key('c\udcff', 3), ['late c'])
        new.append(Key('b', None), 'new b')
        a, b, c = (Item(name, name, index, name) for index, name in ((2, 'a'), (1, 'b'), (0, 'c\udcff')))
        assert list(Parts({paths[0]: [a, c], paths[1]: [b], tmp_path / 'none': [a]})) == [
            (('c\udcff', 3), ['late c']),
            (('b', None), 'new b'),
            (('a', None), 'old a'),
        ]

    def test_a_full_disk_leaves_whole_lines(self, tmp_path, monkeypatch):
        part = PartFile(tmp_path / 'part.jsonl')
        part.append(Key('a', None), 1)
        before = part.path.read_bytes()
        write = os.write
        states = iter([lambda fd, data: write(fd, data[:5]), None])

        def fill_up(descriptor, data):
            if (step := next(states)) is None:
                raise OSError(errno.ENOSPC, 'No space left on device')
            return step(descriptor, data)

        with monkeypatch.context() as patched:
            patched.setattr(os, 'write', fill_up)
            with pytest.raises(ToolError, match=r'part.jsonl cannot be written: no space left in .* MiB of the disk'):
                part.append(Key('b', None), 'x' * 100)
        assert part.path.read_bytes() == before
        part.append(Key('b', None), 2)
        assert len(Parts({part.path: [Item('b', 'b', 0, 'b')]})) == 1


class TestPaint:
    @pytest.fixture(autouse=True)
    def _needs_supervision(self):
        pytest.importorskip('supervision')

    def test_detections_change_their_places_alone(self):
        """Lines of boxes, masks, and labels above the boxes; the box below the threshold leaves no trace."""
        mask_of = pytest.importorskip('pycocotools.mask')
        prediction = detection(size=(300, 400))
        prediction.boxes = prediction.boxes * 5
        before = prediction.image.copy()
        painted = paint(prediction, CLASSES, PALETTE, score_thr=0.3, opacity=0.25)
        np.testing.assert_array_equal(prediction.image, before)
        changed = np.abs(painted.astype(int) - before).max(axis=2) > 1
        allowed = np.zeros(changed.shape, bool)
        for (x1, y1, x2, y2), mask, label in zip(
            prediction.boxes.astype(int), prediction.masks, prediction.labels[:2], strict=False
        ):
            inside = mask_of.decode(mask).astype(bool)
            colour = np.array(PALETTE[label])[::-1]
            np.testing.assert_allclose(painted[inside], np.tile(0.75 * 100 + 0.25 * colour, (inside.sum(), 1)), atol=1)
            around = np.zeros_like(allowed)
            around[y1 - 1 : y2 + 2, x1 - 1 : x2 + 2] = True
            around[y1 + 2 : y2 - 1, x1 + 2 : x2 - 1] = False
            assert (painted[y1, (x1 + x2) // 2] == colour).all()
            label_place = np.zeros_like(allowed)
            label_place[y1 - 20 : y1 + 2, x1 : x1 + 80] = True
            assert changed[label_place].mean() > 0.2
            allowed |= inside | around | label_place
        assert not (changed & ~allowed).any()

    def test_boxes_beyond_the_image(self):
        prediction = detection(with_masks=False)
        prediction.boxes = np.array([[-1e12, 10, 1e12, 50], [0, -5, 1, 1], [70, 50, 60, 40]], np.float32)
        painted = paint(prediction, ['two\nlines', ''], PALETTE)
        for row in (10, 50):
            assert (painted[row] == np.array(PALETTE[1])[::-1]).all()

    def test_labels_stay_inside(self):
        prediction = detection(size=(300, 400), with_masks=False)
        prediction.boxes = np.array([[50, 0, 200, 100]] * 3, np.float32)
        painted = paint(prediction, CLASSES, PALETTE, 0.7)
        assert (painted[2:12, 53:90] == np.array(PALETTE[1])[::-1]).all(axis=2).mean() > 0.3  # the label's ground

    def test_small_images_have_no_labels(self):
        pytest.importorskip('pycocotools')
        prediction = detection()
        painted = paint(prediction, ['a very long name'] * 2, PALETTE, 0.3)
        assert (painted[:18] == 100).all()

    def test_label_map_is_blended_by_class(self):
        label_map = np.array([[0, 1], [255, 0]], np.uint8).repeat(100, 0).repeat(100, 1)
        image = np.full((200, 200, 3), 60, np.uint8)
        painted = paint(
            Prediction(Item('a', 'a', 0, 'a'), image=image, size=(200, 200), task='segmentation', label_map=label_map),
            CLASSES,
            PALETTE,
            opacity=0.5,
        )
        for place, label in (((150, 150), 0), ((40, 150), 1)):
            np.testing.assert_allclose(painted[place], 30 + np.array(PALETTE[label])[::-1] / 2, atol=1)
        assert (painted[150, 50] == 60).all()  # not labelled

    def test_classes_are_listed(self):
        """The longest bar has the best class's colour and the length of its score."""
        image = np.full((40, 400, 3), 255, np.uint8)
        scores = np.array([0.25, 0.75], np.float32)
        prediction = Prediction(
            Item('a', 'a', 0, 'a'), image=image, size=(40, 400), task='classification', scores=scores
        )
        painted = paint(prediction, CLASSES, PALETTE)
        assert painted.shape == (160, 1600, 3)  # enlarged until the text is readable
        lengths = [(painted == np.array(colour)[::-1]).all(axis=2).sum(axis=1).max() for colour in PALETTE]
        assert lengths[1] == pytest.approx(3 * lengths[0], abs=3)
        assert (painted[80:] == 255).all()

    @pytest.mark.parametrize('shape', [(40, 50), (40, 50, 1), (40, 50, 8)])
    def test_other_bands(self, shape):
        image = np.linspace(0, 40_000, int(np.prod(shape))).reshape(shape).astype(np.uint16)
        shown = displayable(image)
        assert shown.shape == (40, 50, 3)
        assert shown.dtype == np.uint8
        assert (shown.min(), shown.max()) == (0, 255)
        assert np.corrcoef(shown[..., 0].ravel(), image.reshape(40, 50, -1)[..., 0].ravel())[0, 1] > 0.99

    def test_names_that_no_font_has(self, monkeypatch):
        """Latin-1 is drawn; characters that no font has give the class's number, not frames."""
        font_manager = pytest.importorskip('matplotlib.font_manager')
        fonts = font_manager.fontManager.ttflist
        monkeypatch.setattr(font_manager.fontManager, 'ttflist', [font for font in fonts if 'Last' in font.name])
        look = _Look(('Nüßchen é', '\U000f0000'), PALETTE, 12)
        assert [look.name(label) for label in range(3)] == ['Nüßchen é', 'class 1', 'class 2']
        assert Path(look.font_path()).name == 'DejaVuSans.ttf'


class TestPaintedWriter:
    @pytest.fixture
    def writer(self, tmp_path):
        pytest.importorskip('supervision')
        return PaintedWriter(tmp_path, lambda item: item.name, CLASSES, PALETTE, score_thr=0.3)

    def frames(self, count, size=(97, 131), **changes):
        for frame in range(count):
            image = np.tile(np.array([10, 40, 230] if frame % 2 else [200, 90, 30], np.uint8), (*size, 1))
            last = frame == count - 1
            yield detection('in/clip.mp4', frame=frame, fps=29.97, last=last, size=size, image=image, **changes)

    def test_images(self, writer, tmp_path):
        image_of = pytest.importorskip('PIL.Image')
        for name in ('a/ü.jpg', 'a/b.PNG'):
            writer.write(detection(name))
        writer.write(detection('c.jpg', error='torn', image=None))
        writer.close()
        with image_of.open(tmp_path / 'a/ü.jpg') as jpeg, image_of.open(tmp_path / 'a/b.PNG') as png:
            assert (jpeg.format, png.format, jpeg.size, png.size) == ('JPEG', 'PNG', (80, 60), (80, 60))
            assert max(jpeg.quantization[0]) < 15  # of quality 95
            expected = paint(detection(), CLASSES, PALETTE, 0.3)
            np.testing.assert_array_equal(np.asarray(png)[..., ::-1], expected)
        assert sorted(path.name for path in tmp_path.rglob('*')) == ['a', 'b.PNG', 'ü.jpg']

    def test_videos(self, writer, tmp_path):
        """Odd sides, a rate that is no whole number, colours that decode as they were, playable from the beginning."""
        av = pytest.importorskip('av')
        target = tmp_path / 'in/clip.mp4'
        for prediction in self.frames(5):
            assert not target.exists()
            writer.write(prediction)
        assert target.is_file()
        with av.open(str(target)) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            assert (context.name, context.pix_fmt, context.width, context.height) == ('h264', 'yuv420p', 132, 98)
            assert float(stream.average_rate) == pytest.approx(29.97, abs=1e-3)
            frames = [frame.to_ndarray(format='bgr24') for frame in container.decode(stream)]
        assert len(frames) == 5
        for decoded, prediction in zip(frames, self.frames(5), strict=True):
            expected = paint(prediction, CLASSES, PALETTE, 0.3)
            assert np.abs(decoded[:97, :131].astype(int) - expected).mean() < 6
            np.testing.assert_allclose(decoded[80:96, 100:130], expected[80:96, 100:130], atol=4)
            np.testing.assert_array_equal(decoded[:, 131].mean(), decoded[:, 130].mean())
        content = target.read_bytes()
        assert content.index(b'moov') < content.index(b'mdat')

    def test_videos_that_end_early(self, writer, tmp_path):
        """After an error the frames that there are stay; of a stopped run nothing does."""
        av = pytest.importorskip('av')
        for prediction in self.frames(3, size=(96, 130)):
            prediction.last = False
            prediction.fps = float('nan')
            writer.write(prediction)
        writer.write(detection('in/clip.mp4', frame=3, error='torn', image=None))
        with av.open(str(tmp_path / 'in/clip.mp4')) as container:
            assert container.streams.video[0].average_rate == 25
            assert len(list(container.decode(video=0))) == 3
        (tmp_path / 'in/clip.mp4').unlink()
        writer.write(next(self.frames(3)))
        writer.close()
        writer.close()
        writer.write(detection('none.mp4', frame=0, error='no frames', image=None))
        assert [path.name for path in tmp_path.rglob('*')] == ['in']

        for prediction in list(self.frames(2))[:1]:
            writer.write(prediction)
        writer.write(detection('b.mp4', 1, frame=0))  # a video that never came to its end is complete then
        assert sorted(path.name for path in tmp_path.rglob('*.*')) == ['b.mp4', 'clip.mp4']

    def test_frames_of_other_sizes(self, tmp_path):
        av = pytest.importorskip('av')
        video = VideoWriter(tmp_path / 'a.mp4', 25)
        for size in ((40, 60), (80, 60)):
            video.write(np.zeros((*size, 3), np.uint8))
        video.close()
        with av.open(str(tmp_path / 'a.mp4')) as container:
            assert [(frame.height, frame.width) for frame in container.decode(video=0)] == [(40, 60)] * 2
        video = VideoWriter(tmp_path / 'b.mp4', 25)
        video.write(np.zeros((40, 60, 3), np.uint8))
        with pytest.raises(ValueError, match='dtype'):
            video.write(np.zeros((40, 60, 3), np.float64))
        assert [path.name for path in tmp_path.iterdir()] == ['a.mp4']

    def test_full_disk(self, writer, tmp_path, monkeypatch):
        """The system says so when data are written to the disk, at the latest."""

        def fill_up(descriptor):
            raise OSError(errno.ENOSPC, 'No space left on device')

        monkeypatch.setattr(os, 'fsync', fill_up)
        for predictions in ([detection()], self.frames(2)):
            with pytest.raises(ToolError, match=r'cannot be written: no space left'):
                deque(map(writer.write, predictions))
        assert not [path for path in tmp_path.rglob('*') if path.is_file()]


class TestLabelMaps:
    @pytest.mark.parametrize(('kind', 'ids'), [(np.uint8, [0, 1, 149, 255]), (np.uint16, [0, 255, 256, 65535])])
    def test_pixels_are_ids(self, tmp_path, kind, ids):
        image_of = pytest.importorskip('PIL.Image')
        label_map = np.array(ids, kind).repeat(6).reshape(4, 6)
        writer = LabelMapWriter(tmp_path, lambda item: item.name + '.png' * (not item.is_video), PALETTE)
        for frame in (None, 12):
            item = Item('a', 'in/a', 0, 'a', is_video=frame is not None)
            writer.write(Prediction(item, frame, size=(4, 6), task='segmentation', label_map=label_map))
        writer.write(Prediction(item, error='torn'))
        writer.close()
        found = sorted(path for path in tmp_path.rglob('*') if path.is_file())
        assert found == [tmp_path / 'in/a/000012.png', tmp_path / 'in/a.png']
        for path in found:
            with image_of.open(path) as image:
                np.testing.assert_array_equal(np.asarray(image), label_map)
                if kind == np.uint8:
                    colours = np.asarray(image.convert('RGB'))
                    np.testing.assert_array_equal(colours[:2, 0], PALETTE)
                    assert (colours[3] == 255).all()

    def test_mmseg_reads_them(self, tmp_path):
        loading = pytest.importorskip('mmseg.datasets.transforms.loading')
        label_map = np.arange(256, dtype=np.uint8).reshape(16, 16)
        writer = LabelMapWriter(tmp_path, lambda item: 'a.png', PALETTE)
        writer.write(Prediction(Item('a', 'a', 0, 'a'), size=(16, 16), task='segmentation', label_map=label_map))
        loaded = loading.LoadAnnotations()(
            dict(seg_map_path=str(tmp_path / 'a.png'), seg_fields=[], reduce_zero_label=False)
        )
        np.testing.assert_array_equal(loaded['gt_seg_map'], label_map)


class TestTable:
    NAMES = ('a, "b"\nc', 'ü', 'd', 'e', 'f', 'g')

    def merge(self, folder, predictions, classes, task):
        writer = TableWriter(folder / 'part', classes, 0.3)
        for prediction in predictions:
            writer.write(prediction)
        writer.close()
        parts = {folder / 'part': [prediction.item for prediction in predictions]}
        counts = [merge_table(parts, task, folder / name) for name in ('t.csv', 't.jsonl')]
        content = (folder / 't.csv').read_bytes()
        assert content.count(b'\r\n') == counts[0] + 1  # RFC 4180
        rows = list(csv.DictReader(io.StringIO(content.decode(), newline='')))
        lines = [json.loads(line) for line in (folder / 't.jsonl').read_text().splitlines()]
        assert counts == [len(rows), len(lines)]
        return rows, lines

    def test_classes(self, tmp_path):
        scores = np.array([0.5, 0.1, 0.2, 0, 0.12, 0], np.float32)
        predictions = [
            Prediction(Item(name, name, index, name), frame, size=(4, 6), task='classification', scores=scores)
            for index, name, frame in ((1, 'x/é.jpg', None), (0, 'clip.mp4', 1), (0, 'clip.mp4', 0))
        ]
        predictions.append(Prediction(Item('torn', 'torn', 2, 'torn'), error='torn'))
        rows, lines = self.merge(tmp_path, predictions, self.NAMES, 'classification')
        assert [(row['name'], row['frame']) for row in rows] == [('clip.mp4', '0'), ('clip.mp4', '1'), ('x/é.jpg', '')]
        best = [0, 2, 4, 1]
        for place, label in enumerate(best, 1):
            assert rows[2][f'class-{place}'] == self.NAMES[label]
            assert float(rows[2][f'score-{place}']) == pytest.approx(scores[label], abs=1e-6)
        assert rows[2]['class-5'] == ''  # those of probability 0 were not asked for
        assert lines[1]['frame'] == 1
        assert [(entry['class'], entry['label']) for entry in lines[2]['classes']] == [
            (self.NAMES[label], label) for label in best
        ]

    def test_boxes(self, tmp_path):
        none = np.zeros(0, np.float32)
        empty = detection('none.jpg', 1, boxes=none.reshape(0, 4), scores=none, labels=none, masks=None)
        rows, lines = self.merge(tmp_path, [detection(), empty], self.NAMES, 'detection')
        assert [row['class'] for row in rows] == ['ü', 'a, "b"\nc']
        assert [rows[0][column] for column in ('x1', 'y1', 'x2', 'y2', 'label', 'score')] == [
            *('10.25', '20.1', '30.7', '40.9', '1', '0.9')
        ]
        assert [(line['name'], len(line['boxes'])) for line in lines] == [('a.jpg', 2), ('none.jpg', 0)]
