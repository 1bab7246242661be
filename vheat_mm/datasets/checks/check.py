"""The whole check: list the samples of a config's data sets, decode each file once, collect what is wrong."""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from mmengine.config import Config
from rich.console import Console
from rich.progress import track

from vheat_mm.datasets.checks.classes import judge_classes
from vheat_mm.datasets.checks.datasets import Part, find_parts
from vheat_mm.datasets.checks.images import Fault, ImageFacts, ImageJob, examine_image, set_up_worker
from vheat_mm.datasets.checks.kinds import KINDS
from vheat_mm.datasets.checks.label_maps import MapJob, examine_map, judge_first, judge_together
from vheat_mm.datasets.checks.pool import WorkerCrash, run_jobs
from vheat_mm.datasets.checks.report import Finding, Report
from vheat_mm.datasets.checks.samples import Sample, list_samples
from vheat_mm.datasets.checks.settings import number_of_bands, unignored_padding
from vheat_mm.utils.text import some_of

FEW = 0.01  # share of a data set's entries that may be faulty at the start of a training
AnyJob = TypeVar('AnyJob', ImageJob, MapJob)
Item = TypeVar('Item')


class _Use(NamedTuple):
    """An image's entry in a data set."""

    part: int
    image_id: Any
    size: tuple[float, float] | None
    label: Any


class _Files:
    """Every file that the data sets name, by absolute path or address, with the data sets that name it."""

    def __init__(self) -> None:
        self.images: dict[str, list[_Use]] = {}
        self.maps: dict[tuple[str, str], tuple[MapJob, str]] = {}  # by path and rule: the job, the path of the image
        self.sizes: dict[str, tuple[int, int] | None] = {}  # of images with a label map, once decoded
        self._in_config: dict[str, str] = {}  # path as the data set has it, where it is another than the key

    def add(self, part: int, sample: Sample) -> None:
        image = self._key(sample.image)
        self.images.setdefault(image, []).append(_Use(part, sample.image_id, sample.size, sample.label))
        if sample.label_map is not None:
            path, rule = sample.label_map
            key = self._key(path)
            self.maps.setdefault((key, repr(rule)), (MapJob(key, rule), image))  # a rule may hold a dict
            self.sizes[image] = None

    def shown(self, key: str) -> str:
        return self._in_config.get(key, key)

    def _key(self, path: str) -> str:
        key = path if '://' in path else os.path.abspath(path)  # noqa: PTH100 (Path.resolve follows links)
        if key != path:
            self._in_config[key] = path
        return key


def check_datasets(cfg: Config, splits: Sequence[str], workers: int, limit: int | None = None) -> Report:
    """Check the data sets of a config.

    Args:
        cfg: Of the task whose default scope is set.
        splits: Of ``train``, ``val``, ``test``; those without a data loader are skipped.
        workers: Processes that decode.
        limit: Samples of each data set whose files are opened; all by default. Annotation files are read completely.

    Raises:
        ToolError: The config's data sets cannot be built.
    """
    started = time.monotonic()
    report, files = Report(), _Files()
    parts = find_parts(cfg, splits)
    limited = _list_files(cfg, parts, report, files, limit)
    listed = time.monotonic()
    report.add_all(_check_images(files, parts, workers, number_of_bands(cfg)))
    report.add_all(_check_maps(files, parts, limited, workers))
    report.add_all(_check_uses(files, parts))
    now, count = time.monotonic(), len(files.images) + len(files.maps)
    report.checked.append(
        f'{count} files decoded in {now - listed:.1f} s by {workers} processes, '
        f'{count / max(now - listed, 1e-9):.0f} a second; {now - started:.1f} s in all'
    )
    return report


def check_labels(cfg: Config, splits: Sequence[str]) -> Report:
    """Check what needs no image: annotation files, class names, and as many label maps as show two classes.

    The start of a training runs it: seconds, where all files of a data set take minutes.

    Raises:
        ToolError: The config's data sets cannot be built.
    """
    report, files = Report(), _Files()
    parts = find_parts(cfg, splits)
    _list_files(cfg, parts, report, files, None, maps_only=True)
    jobs: dict[int, list[MapJob]] = {}
    for job, image in files.maps.values():
        for number in {use.part for use in files.images[image]}:
            jobs.setdefault(number, []).append(job)
    for number, maps in jobs.items():
        spread = iter(random.Random(0).sample(maps, len(maps)))  # neighbours, as in videos, hold the same classes
        faults = judge_first(spread, parts[number].trains)
        for finding in _findings_on_maps(faults, files, maps[0], parts[number]):
            report.add(finding)
            report.many.add(finding.kind)  # no usable map was found
    return report


def _list_files(
    cfg: Config, parts: list[Part], report: Report, files: _Files, limit: int | None, maps_only: bool = False
) -> set[int]:
    """List the samples of data sets; returns the numbers of those of which only the first ``limit`` are."""
    limited = set()
    for number, part in enumerate(parts):
        count, before = 0, report.counts.copy()
        for sample in islice(list_samples(part, report.add), limit):
            if sample.label_map or not maps_only:
                files.add(number, sample)
            count += 1
        if count == limit:
            limited.add(number)
        for kind, found in (report.counts - before).items():
            entries = part.annotations if report.kept[kind][-1].annotation_id is not None else count
            is_fatal = part.splits != ['train'] and KINDS[kind].effect.startswith('stops')  # no sample is replaced
            if found > FEW * entries or is_fatal:
                report.many.add(kind)
        report.checked.append(f'{"/".join(part.splits)}: {count} samples ({type(part.dataset).__name__}, {part.place})')
    report.add_all(judge_classes(parts))
    if text := unignored_padding(cfg):
        report.add(Finding('padding-learned', 'model.data_preprocessor', text))
    return limited


def _findings_on_maps(
    faults: Iterable[tuple[str | None, Fault]], files: _Files, first: MapJob, part: Part
) -> Iterator[Finding]:
    folder = os.path.dirname(files.shown(first.path))  # noqa: PTH120 (may be an address)
    for path, (kind, text) in faults:
        if path is None:
            yield Finding(kind, folder, f'{text} ({part.place})')
        else:
            yield Finding(kind, files.shown(path), f'{text} (label map)'.strip())


def _examine(
    function: Callable[[AnyJob], ImageFacts], jobs: Iterable[AnyJob], count: int, what: str, workers: int
) -> Iterator[tuple[AnyJob, ImageFacts]]:
    for job, facts in show_progress(run_jobs(function, jobs, workers, set_up_worker), count, what):
        yield job, ImageFacts((('decoder-crash', ''),)) if isinstance(facts, WorkerCrash) else facts


def show_progress(items: Iterable[Item], total: int, what: str, interval: float = 30.0) -> Iterator[Item]:
    """Pass items on, with a bar on stderr where it is a terminal, and a line every ``interval`` seconds elsewhere."""
    if total and sys.stderr.isatty():
        yield from track(items, f'checking {what}', total, console=Console(stderr=True), transient=True)
        return
    started = reported = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if (now := time.monotonic()) - reported > interval:
            reported = now
            rate = done / (now - started)
            print(f'checked {done} of {total} {what}, {rate:.0f} a second', file=sys.stderr, flush=True)


def _check_images(files: _Files, parts: list[Part], workers: int, bands: int) -> Iterator[Finding]:
    loaders = [part.image_loader() for part in parts]
    resizes = [part.resizes() for part in parts]
    jobs = (ImageJob(path, loaders[uses[0].part]) for path, uses in files.images.items())
    for job, facts in _examine(examine_image, jobs, len(files.images), 'images', workers):
        path, uses = files.shown(job.path), files.images[job.path]
        image_id = uses[0].image_id
        yield from (Finding(kind, path, text, image_id) for kind, text in facts.faults)
        if facts.size is None:
            continue
        width, height = facts.size
        if job.path in files.sizes:
            files.sizes[job.path] = facts.size
        for use in dict.fromkeys(uses):
            if use.size is not None and tuple(use.size) != facts.size:
                text = f'{use.size[0]:g} x {use.size[1]:g} stated, {width} x {height} decoded'
                if tuple(use.size) == (height, width) and 'image-rotated' in dict(facts.faults):
                    text += ': loaders rotate it as its EXIF data say'
                yield Finding('size-differs', path, text, use.image_id)
        if facts.bands and bands and facts.bands != bands and 1 not in (facts.bands, bands):
            text = f'{facts.bands} bands, model.data_preprocessor.mean has {bands} numbers'
            yield Finding('bands-differ', path, text, image_id)
        for long, short in {frame for use in uses for frame in resizes[use.part]}:
            factor = min(long / max(facts.size), short / min(facts.size))
            if int(min(facts.size) * factor + 0.5) < 1:
                text = f'{width} x {height}, to be resized into {long:g} x {short:g}'
                yield Finding('image-resized-to-zero', path, text, image_id)
                break


def _check_maps(files: _Files, parts: list[Part], limited: set[int], workers: int) -> Iterator[Finding]:
    read: dict[int, list[tuple[MapJob, tuple[int, ...]]]] = {}  # of each data set, the maps and their values
    jobs = (job for job, _ in files.maps.values())
    for job, facts in _examine(examine_map, jobs, len(files.maps), 'label maps', workers):
        path = files.shown(job.path)
        yield from (Finding(kind, path, f'{text} (label map)'.strip()) for kind, text in facts.faults)
        _, image = files.maps[job.path, repr(job.rule)]
        size = files.sizes[image]
        if size is not None and facts.size is not None and size != facts.size:
            text = f'{facts.size[0]} x {facts.size[1]}, its image {size[0]} x {size[1]}'
            yield Finding('map-size', path, f'{text} ({files.shown(image)})')
        if facts.values:
            for number in {use.part for use in files.images[image]}:
                read.setdefault(number, []).append((job, facts.values))
    for number, maps in read.items():
        values, rule = {value for _, found in maps for value in found}, maps[0][0].rule
        faults = [
            (None, fault)
            for fault in judge_together(values, len(maps), rule, parts[number].trains, number not in limited)
        ]
        yield from _findings_on_maps(faults, files, maps[0][0], parts[number])


def _check_uses(files: _Files, parts: list[Part]) -> Iterator[Finding]:
    """Files that are named more than once."""
    for key, uses in files.images.items():
        if len(uses) == 1 and len(parts[uses[0].part].splits) == 1:
            continue
        path = files.shown(key)
        splits = {split for use in uses for split in parts[use.part].splits}
        if 'train' in splits and len(splits) > 1:
            yield Finding('image-in-two-splits', path, ', '.join(sorted(splits)), uses[0].image_id)
        for part, count in Counter(use.part for use in uses).items():
            own = [use for use in uses if use.part == part]
            labels = {use.label for use in own if use.label is not None}
            if len(labels) > 1:
                yield Finding('label-contradiction', path, f'labels {some_of(sorted(labels))}')
            elif count > 1:
                ids = [use.image_id for use in own if use.image_id is not None]
                yield Finding('duplicate-file', path, f'images {some_of(ids)}' if ids else f'{count} times')
