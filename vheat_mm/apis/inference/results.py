"""The kinds of results that a run can write: their tasks, their writers, and their joining at the end."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from vheat_mm.apis.inference.class_table import merge_table, table_entries
from vheat_mm.apis.inference.coco import CocoIds, coco_results, merge_coco
from vheat_mm.apis.inference.journal import FOLDER, Done, parts_of
from vheat_mm.apis.inference.label_maps import LabelMapWriter
from vheat_mm.apis.inference.names import output_names
from vheat_mm.apis.inference.painting import PaintedWriter
from vheat_mm.apis.inference.parts import PartWriter
from vheat_mm.apis.inference.predictor import Predictor
from vheat_mm.apis.inference.run import Writer
from vheat_mm.apis.inference.types import Item
from vheat_mm.utils.errors import ToolError

KINDS = {  # --save -> tasks that have it
    'painted': ('detection', 'segmentation', 'classification'),
    'coco': ('detection',),
    'label-maps': ('segmentation',),
    'csv': ('classification', 'detection'),
    'jsonl': ('classification', 'detection'),
}
DEFAULTS = {  # without --save
    'detection': ('painted', 'coco'),
    'segmentation': ('painted', 'label-maps'),
    'classification': ('painted', 'csv'),
}
_FILES = dict(coco='predictions.json', csv='classes.csv', jsonl='classes.jsonl')


class Results:
    """What is written of a run's predictions, below its output folder.

    Args:
        kinds: Of :data:`KINDS`; those of :data:`DEFAULTS` where it is ``None``.
        out: Output folder.
        predictor: Its task, classes, colours and threshold.
        items: All inputs of the run.
        ann_file: See :class:`~vheat_mm.apis.inference.coco.CocoIds`.
        chosen: Names of the classes that are predicted; all by default.

    Attributes:
        score_thr: Of a detector: the lowest score of what is written.

    Raises:
        ToolError: A kind or ``ann_file`` does not fit the task; supervision is missing; see also ``CocoIds``.
    """

    def __init__(
        self,
        kinds: Sequence[str] | None,
        out: Path,
        predictor: Predictor,
        items: Sequence[Item],
        ann_file: str | None = None,
        chosen: Sequence[str] | None = None,
    ) -> None:
        self.kinds = tuple(dict.fromkeys(kinds or DEFAULTS[predictor.task]))
        for kind in self.kinds:
            if predictor.task not in KINDS[kind]:
                fitting = ' '.join(name for name, tasks in KINDS.items() if predictor.task in tasks)
                raise ToolError(f'--save {kind}: this is a model for {predictor.task}, which has {fitting}')
        if ann_file is not None and 'coco' not in self.kinds:
            raise ToolError(f'--ann-file {ann_file}: its ids are for --save coco, which this run does not write')
        if 'painted' in self.kinds and importlib.util.find_spec('supervision') is None:
            others = ' '.join(kind for kind in DEFAULTS[predictor.task] if kind != 'painted')
            raise ToolError(
                "tools/predict.py needs supervision to paint: pip install 'vheat_mm[predict]', or leave painting out: "
                f'--save {others}'
            )
        self.score_thr = predictor.score_thr if predictor.task == 'detection' else None
        self._out, self._predictor, self._items = out, predictor, items
        mirrored = [kind for kind in ('painted', 'label-maps') if kind in self.kinds]
        self._mirrors = {kind: self._mirror(kind.replace('-', '_')) for kind in mirrored}
        self._ids = CocoIds(predictor.classes, ann_file, chosen) if 'coco' in self.kinds else None

    def writers(self, part: str) -> list[Writer]:
        """A writer for each kind.

        Args:
            part: Name of this process's own files of this run.
        """
        predictor, classes = self._predictor, self._predictor.classes
        make: dict[str, Callable[[], Writer]] = {
            'painted': lambda: PaintedWriter(*self._mirrors['painted'], classes, predictor.palette),
            'label-maps': lambda: LabelMapWriter(*self._mirrors['label-maps'], predictor.palette),
            'coco': lambda: PartWriter(self._part(part, 'coco'), coco_results),
            'table': lambda: PartWriter(self._part(part, 'table'), lambda found: list(table_entries(found, classes))),
        }
        kinds = dict.fromkeys('table' if kind in ('csv', 'jsonl') else kind for kind in self.kinds)
        return [make[kind]() for kind in kinds]

    def remove(self, items: Iterable[Item]) -> None:
        """Remove what earlier runs have written of inputs that are predicted again: they may be broken now."""
        for folder, name_of in self._mirrors.values():
            for target in (folder / name_of(item) for item in items):
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)

    def merge(self, done: Mapping[str, Done]) -> None:
        """Join the files of all processes and runs, those of inputs that are done."""
        for kind in self.kinds:
            if kind not in _FILES:
                continue
            target = self._out / _FILES[kind]
            if self._ids is not None and kind == 'coco':
                merge_coco(parts_of(self._out, done, self._items, '.coco'), self._ids, target)
            else:
                merge_table(parts_of(self._out, done, self._items, '.table'), self._predictor.task, target)

    def _mirror(self, folder: str) -> tuple[Path, Callable[[Item], str]]:
        names = output_names(self._items, folder)
        return self._out / folder, lambda item: names[item.index]

    def _part(self, part: str, kind: str) -> Path:
        return self._out / FOLDER / f'{part}.{kind}'
