"""The data sets of a config inside their wrappers, and how their pipelines load files."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, TRANSFORMS

from vheat_mm.datasets.checks.images import Loader
from vheat_mm.datasets.checks.label_maps import MapRule
from vheat_mm.datasets.checks.settings import coco_metrics, head_classes, ignored_values
from vheat_mm.utils.config_place import describe_building
from vheat_mm.utils.errors import ToolError

SPLITS = ('train', 'val', 'test')
# Fields of a data set's config that do not change which samples it has.
_USE = ('pipeline', 'test_mode', 'lazy_init', 'filter_cfg', 'serialize_data', 'max_refetch')


@dataclass
class Part:
    """A data set that reads files (no wrapper).

    Attributes:
        dataset: Built, but its files are not read yet.
        place: In the config, such as ``train_dataloader.dataset.datasets.0``.
        splits: Those that use it.
        transforms: Of its own pipeline and those of its wrappers.
        num_classes: Of the classes or the head; ``None`` where the config does not say.
        ignored: (place in the config, value of label maps that is ignored there) of heads and evaluators.
        metrics: What pycocotools computes on it (``'bbox'``, ``'segm'``), with the annotation file of the evaluator.
        annotations: Number of them in a COCO file, once its samples have been listed.
        folders: Name of a folder of images -> labels of its images, once its samples have been listed.
    """

    dataset: Any
    place: str
    splits: list[str]
    transforms: list[Any]
    num_classes: int | None = None
    ignored: tuple[tuple[str, int | None], ...] = ()
    metrics: set[tuple[str, str]] = field(default_factory=set)
    annotations: int = 0
    folders: dict[str, set[int]] = field(default_factory=dict)
    classes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        named = (getattr(self.dataset, 'metainfo', None) or {}).get('classes')
        self.classes = (named,) if isinstance(named, str) else tuple(() if named is None else named)

    @property
    def trains(self) -> bool:
        """Whether training uses it."""
        return 'train' in self.splits

    @property
    def source(self) -> str:
        """Its annotation file or folder, or its place in the config."""
        prefix = getattr(self.dataset, 'data_prefix', None)
        folders: list[Any] = list(prefix.values()) if isinstance(prefix, dict) else [prefix]
        return str(getattr(self.dataset, 'ann_file', '') or next(filter(None, folders), '') or self.place)

    @property
    def with_mask(self) -> bool:
        """Whether instance masks are loaded, by the pipeline or to compute a score."""
        return any(kind == 'segm' for kind, _ in self.metrics) or any(
            getattr(transform, 'with_mask', False) for transform in self.transforms
        )

    @property
    def with_map(self) -> bool:
        """Whether label maps are loaded, in a way that is known."""
        return any(getattr(transform, 'with_seg', False) for transform in self.transforms)

    def image_loader(self) -> Loader:
        """How its pipeline loads images."""
        for transform in self.transforms:
            if hasattr(transform, 'imdecode_backend') and hasattr(transform, 'color_type'):
                return Loader(transform.color_type, transform.imdecode_backend, transform.backend_args)
        return Loader(transform=next(iter(self.transforms), None))

    def map_rule(self, info: dict) -> MapRule:
        """How its pipeline loads label maps, and how their values become classes."""
        loader = Loader('unchanged', 'pillow')
        for transform in self.transforms:
            if getattr(transform, 'with_seg', False):
                loader = Loader('unchanged', transform.imdecode_backend, transform.backend_args)
        mapped = tuple((info.get('label_map') or {}).items())
        # Only mmseg's data sets have the key; label maps of panoptic data sets hold colours.
        known = 'reduce_zero_label' in info
        own = (('the data set', getattr(self.dataset, 'ignore_index', 255)),)
        reduces = bool(info.get('reduce_zero_label'))
        return MapRule(self.num_classes if known else None, reduces, mapped, loader, own + self.ignored)

    def resizes(self) -> list[tuple[float, float]]:
        """Smallest (long side, short side) in pixels that its pipeline resizes whole images to fit into."""
        return [scale for transform in self.transforms for scale in _resizes(transform)]


def find_parts(cfg: Config, splits: Iterable[str]) -> list[Part]:
    """Build the data sets of a config's data loaders, each once however many splits or wrappers name it.

    Raises:
        ToolError: No such data loader; a data set of no known type or with wrong arguments.
    """
    parts: dict[str, Part] = {}
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            continue
        place = f'{split}_dataloader.dataset'
        if not loader.get('dataset'):
            raise ToolError(f'{place} is missing: a data loader needs a data set')
        for where, leaf, wrapping in _leaves(loader['dataset'], place, []):
            key = repr(sorted((name, repr(value)) for name, value in leaf.items() if name not in _USE))
            if key not in parts:
                parts[key] = Part(_build(leaf, where), where, [], [])
            part = parts[key]
            part.splits += [split] if split not in part.splits else []
            part.transforms += _transforms(leaf.get('pipeline', ()), where)
            for number, pipeline in enumerate(wrapping):
                part.transforms += _transforms(pipeline, f'{place}, wrapper {number}')
    for part in parts.values():
        known = [number for number in (len(part.classes), head_classes(cfg)) if number]
        part.num_classes = min(known, default=None)
        part.ignored = ignored_values(cfg)
        for split in part.splits:
            part.metrics |= coco_metrics(cfg, split)
    if not parts:
        wanted = ', '.join(f'{split}_dataloader' for split in splits)
        raise ToolError(f'the config defines no {wanted}: there is nothing to check')
    return list(parts.values())


def _leaves(cfg: Any, place: str, wrapping: list) -> Iterator[tuple[str, dict, list]]:
    """Data sets inside wrappers, with their places in the config and the pipelines of the wrappers."""
    if not isinstance(cfg, dict):
        raise ToolError(f'{place} is a {type(cfg).__name__}, expected a dict with the type of a data set')
    wrapping = wrapping + ([cfg['pipeline']] if cfg.get('pipeline') else [])
    if 'datasets' in cfg:
        for number, inner in enumerate(cfg['datasets']):
            yield from _leaves(inner, f'{place}.datasets.{number}', wrapping)
    elif 'dataset' in cfg:
        yield from _leaves(cfg['dataset'], f'{place}.dataset', wrapping)
    else:
        yield place, cfg, wrapping[:-1] if cfg.get('pipeline') else wrapping


def _build(cfg: dict, place: str) -> Any:
    cfg = {**cfg, 'pipeline': []} if 'pipeline' in cfg else dict(cfg)
    kind = cfg.get('type')
    try:
        if isinstance(kind, str):
            with DATASETS.switch_scope_and_registry(cfg.get('_scope_')) as registry:
                kind = registry.get(kind)
        if isinstance(kind, type) and issubclass(kind, BaseDataset):
            cfg['lazy_init'] = True  # so that a file that cannot be read is a finding
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            return DATASETS.build(cfg)
    except Exception as error:
        raise ToolError(f'{place}: {describe_building(error)}') from error


def _transforms(pipeline: Any, place: str) -> list[Any]:
    """A pipeline's transforms, including those inside of other transforms."""
    transforms = []
    for number, entry in enumerate(pipeline):
        try:
            transforms.append(TRANSFORMS.build(entry) if isinstance(entry, dict) else entry)
        except Exception as error:
            raise ToolError(f'{place}.pipeline.{number}: {describe_building(error)}') from error
    return [inner for transform in transforms for inner in _unfold(transform)]


def _unfold(transform: Any) -> Iterator[Any]:
    yield transform
    inside = getattr(transform, 'transforms', ())
    for inner in inside if isinstance(inside, list | tuple) else ():
        yield from _unfold(inner)


def _resizes(transform: Any) -> Iterator[tuple[float, float]]:
    inner = getattr(transform, 'resize', None)
    if not getattr(transform, 'keep_ratio', getattr(inner, 'keep_ratio', False)):
        return
    scales = getattr(transform, 'scales', None) or [getattr(transform, 'scale', None)]
    if isinstance(scales[0], list):  # RandomResize between two scales
        scales = scales[0]
    ratio = min(getattr(transform, 'ratio_range', None) or (1.0,))
    for scale in scales:
        if isinstance(scale, list | tuple) and len(scale) == 2 and all(isinstance(x, int | float) for x in scale):
            yield max(scale) * ratio, min(scale) * ratio
