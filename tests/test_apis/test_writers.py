"""What a run writes, read by other libraries: COCO files, painted images and videos, label maps, tables."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from vheat_mm.apis.inference.coco import CocoIds, CocoWriter, merge_coco, to_coco
from vheat_mm.apis.inference.painting import _Look, displayable, paint
from vheat_mm.apis.inference.parts import Key, PartFile, Parts
from vheat_mm.apis.inference.types import Item, Prediction
from vheat_mm.utils.errors import ToolError

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
        parts = sorted(folder.glob('coco.*.jsonl'))
        target = folder / 'predictions.json'
        return target, merge_coco(parts, items, ids or CocoIds(CLASSES), target)

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

    def test_boxes_alone(self, tmp_path):
        target, _ = self.write(tmp_path, [detection(with_masks=False)], score_thr=0.0)
        annotations = load_coco(target).dataset['annotations']
        assert [annotation['area'] for annotation in annotations][1:] == [900.0, 16.0]
        assert 'segmentation' not in annotations[0]

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
        file.write_text('[1]')
        with pytest.raises(ToolError, match=r'val.json lists no images and categories'):
            CocoIds(CLASSES, file)


class TestParts:
    def test_what_a_killed_process_leaves(self, tmp_path):
        """A torn line is cut off, and of an image that is predicted again the last line counts."""
        path = tmp_path / 'part.jsonl'
        part = PartFile(path)
        for name in ('a', 'b', 'gone'):
            part.append(Key(name, None), f'old {name}')
        part.close()
        with path.open('ab') as file:
            file.write(b'{"name":"c"}\t"to')
        part = PartFile(path)
        part.append(Key('b', None), 'new b')
        part.append(Key('c\udcff', 3), ['new c'])
        items = [Item(name, name, index, name) for index, name in enumerate(['c\udcff', 'b', 'a'])]
        assert list(Parts([path, tmp_path / 'none'], items)) == [
            (('c\udcff', 3), ['new c']),
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
        assert len(Parts([part.path], [Item(name, name, 0, name) for name in 'b'])) == 1


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
        image = np.full((20, 400, 3), 255, np.uint8)
        scores = np.array([0.25, 0.75], np.float32)
        prediction = Prediction(
            Item('a', 'a', 0, 'a'), image=image, size=(20, 400), task='classification', scores=scores
        )
        painted = paint(prediction, CLASSES, PALETTE)
        assert painted.shape == (160, 3200, 3)  # enlarged until the text is readable
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
        monkeypatch.setattr(font_manager.fontManager, 'ttflist', [])
        look = _Look(('Nüßchen é', '\U000f0000'), PALETTE, 12)
        assert [look.name(label) for label in range(3)] == ['Nüßchen é', 'class 1', 'class 2']
        assert Path(look.font_path()).name == 'DejaVuSans.ttf'
