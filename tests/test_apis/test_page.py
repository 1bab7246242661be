"""The page's table, without a browser."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from fake_predictions import PALETTE, detection

from vheat_mm.apis.inference.types import Item, Prediction

page = pytest.importorskip('vheat_mm.apis.page')


def rows(prediction, tmp_path, score_thr=0.0):
    predictor = SimpleNamespace(classes=('coin', '<b>nut</b>'), palette=PALETTE)
    shown = page.Shown('it', prediction)
    table = page.Page({'it': SimpleNamespace(predictor=predictor)}, tmp_path).table(shown, score_thr)
    return [re.findall(r'>([^<>]+)</td>', row) for row in table.split('<tr>')[2:]]


def test_detections_from_the_threshold_on(tmp_path):
    first = ['&lt;b&gt;nut&lt;/b&gt;', '0.900', '10', '20', '31', '41']
    second = ['coin', '0.600', '40', '25', '70', '55']
    assert rows(detection(), tmp_path, 0.7) == [first]
    assert rows(detection(), tmp_path, 0.5) == [first, second]
    assert len(rows(detection(), tmp_path)) == 3


def test_classes_of_a_label_map_by_their_share(tmp_path):
    label_map = np.array([[0, 1, 1, 255]], np.uint8)
    found = rows(Prediction(Item('', '', 0, ''), label_map=label_map), tmp_path)
    assert [row[1:] for row in found] == [['50.0%', '2'], ['25.0%', '1']]
