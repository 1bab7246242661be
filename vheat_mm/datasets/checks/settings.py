"""What a config's model and evaluators say about labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from vheat_mm.utils.config_place import type_name

_MAP_HEADS = ('decode_head', 'auxiliary_head')


def head_classes(cfg: Config) -> int | None:
    """The smallest ``num_classes`` of the heads for label maps and for whole images."""
    numbers = [head.get('num_classes') for name in ('head', *_MAP_HEADS) for _, head in _entries(cfg.model, name)]
    return min((number for number in numbers if isinstance(number, int) and number > 0), default=None)


def ignored_values(cfg: Config) -> tuple[tuple[str, int | None], ...]:
    """Who ignores which value of label maps: (place in the config, ``ignore_index``) of heads and evaluators."""
    found = [
        (f'model.{place}', head.get('ignore_index', 255))
        for name in _MAP_HEADS
        for place, head in _entries(cfg.model, name)
    ]
    for field in ('val_evaluator', 'test_evaluator'):
        for place, metric in _entries(cfg, field):
            if type_name(metric).endswith('IoUMetric'):
                found.append((place, metric.get('ignore_index', 255)))
    return tuple(found)


def unignored_padding(cfg: Config) -> str:
    """What says that pixels which fill up label maps are learned by a head; an empty text where none are."""
    value = _preprocessor(cfg).get('seg_pad_val', 255)
    heads = [(name, index) for name, index in ignored_values(cfg) if name.startswith('model.') and index != value]
    return ', '.join(f'{name} has ignore_index={index}, seg_pad_val is {value}' for name, index in heads)


def number_of_bands(cfg: Config) -> int:
    """Bands that the model takes, by the ``mean`` of its data preprocessor; 0 where it has none."""
    return len(_preprocessor(cfg).get('mean') or ())


def _preprocessor(cfg: Config) -> dict:
    return cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}


def coco_metrics(cfg: Config, split: str) -> set[tuple[str, str]]:
    """What pycocotools computes on a split (``'bbox'``, ``'segm'``, ...), and the annotation file of the evaluator."""
    found: set[tuple[str, str]] = set()
    for _, metric in _entries(cfg, f'{split}_evaluator'):
        if type_name(metric) == 'CocoMetric' and metric.get('ann_file') and not metric.get('format_only'):
            kinds = metric.get('metric', 'bbox')
            found |= {(kind, metric['ann_file']) for kind in ([kinds] if isinstance(kinds, str) else kinds)}
    return found


def _entries(parent: Any, name: str) -> Iterator[tuple[str, dict]]:
    """The dicts of an entry that is a dict or a list of them, with their places."""
    entry = parent.get(name)
    entries = entry if isinstance(entry, list | tuple) else [entry]
    for number, value in enumerate(entries):
        if isinstance(value, dict):
            yield (f'{name}[{number}]' if isinstance(entry, list | tuple) else name), value
