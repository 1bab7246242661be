"""COCO files and tables, as other libraries read them, and the lines of several processes that they are joined from."""

import csv
import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_predictions import CLASSES, detection

from vheat_mm.apis.inference.class_table import merge_table, table_entries
from vheat_mm.apis.inference.coco import CocoIds, coco_results, merge_coco, to_coco
from vheat_mm.apis.inference.parts import Key, PartFile, Parts, PartWriter
from vheat_mm.apis.inference.types import Item, Prediction
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.torchvision import ensure_torchvision


def load_coco(path):
    return pytest.importorskip('pycocotools.coco').COCO(str(path))


class TestCoco:
    def write(self, folder: Path, predictions, ids=None, score_thr=0.3):
        """Two processes write, one joins."""
        writers = [
            PartWriter(folder / f'coco.{rank}.jsonl', lambda found: coco_results(found, score_thr)) for rank in range(2)
        ]
        for prediction in predictions:
            writers[prediction.item.index % 2].write(prediction)
        for writer in writers:
            writer.close()
            writer.close()
        items = [prediction.item for prediction in predictions]
        parts = {folder / f'coco.{rank}.jsonl': [item for item in items if item.index % 2 == rank] for rank in range(2)}
        merge_coco(parts, ids or CocoIds(CLASSES), folder / 'predictions.json')
        return folder / 'predictions.json'

    def test_loads_with_pycocotools(self, tmp_path):
        mask_of = pytest.importorskip('pycocotools.mask')
        none = np.zeros(0, np.float32)
        empty = detection('sub/empty.png', 1, boxes=none.reshape(0, 4), scores=none, labels=none, masks=[])
        predictions = [detection('z.jpg', 3), empty, detection('b.jpg', 0), detection('bad.jpg', 2, error='torn')]
        predictions += [detection('clip.mp4', 4, frame=frame) for frame in (1, 0)]
        target = self.write(tmp_path, predictions)
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
        target = self.write(tmp_path, [detection(with_masks=False)], score_thr=float(np.float32(0.2)))
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

        target = self.write(tmp_path, predictions, CocoIds(CLASSES, file), score_thr=0.0)
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
        images += [dict(id=3, file_name='e/d.jpg'), dict(id=6, file_name='f/g.jpg')]
        categories = [dict(id=5, name='nut'), dict(id=90, name='other'), dict(id=2, name='coin')]
        file.write_text(json.dumps(dict(images=images, categories=categories, annotations=[])))
        names = ['a.jpg', 'x/a.jpg', 'out/b.jpg', 'd.jpg', 'c/d.jpg', 'p/g.jpg', 'q/g.jpg']
        found = [detection(name, index) for index, name in enumerate(names)]
        target = self.write(tmp_path, found, CocoIds(CLASSES, file))
        coco = load_coco(target)
        assert {image['file_name']: image['id'] for image in coco.dataset['images']} == {
            'a.jpg': 7,  # exactly
            'x/a.jpg': 10,  # 7 is taken
            'out/b.jpg': 9,  # by its last part
            'd.jpg': 11,  # ambiguous
            'c/d.jpg': 4,
            'p/g.jpg': 12,  # two inputs for one image
            'q/g.jpg': 13,
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
        """A torn line does not count, and lines count of the inputs that a file is said to hold."""
        paths = tmp_path / 'old', tmp_path / 'new'
        old = PartFile(paths[0])
        for name in ('a', 'b', 'gone'):
            old.append(Key(name, None), f'old {name}')
        old.append(Key('c\udcff', 3), ['late c'])
        old.close()
        with paths[0].open('ab') as file:
            file.write(b'{"name":"a"}\t"to')
        new = PartFile(paths[1])
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


class TestTable:
    NAMES = ('a, "b"\nc', 'ü', 'd', 'e', 'f', 'g')

    def merge(self, folder, predictions, classes, task):
        writer = PartWriter(folder / 'part', lambda found: list(table_entries(found, classes, 0.3)))
        for prediction in predictions:
            writer.write(prediction)
        writer.close()
        parts = {folder / 'part': [prediction.item for prediction in predictions]}
        for name in ('t.csv', 't.jsonl'):
            merge_table(parts, task, folder / name)
        content = (folder / 't.csv').read_bytes()
        rows = list(csv.DictReader(io.StringIO(content.decode(), newline='')))
        assert content.count(b'\r\n') == len(rows) + 1  # RFC 4180
        lines = [json.loads(line) for line in (folder / 't.jsonl').read_text().splitlines()]
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
