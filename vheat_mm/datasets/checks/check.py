"""The whole check: list the samples of a config's data sets, decode each file once, gather what is wrong."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from mmengine.config import Config

from vheat_mm.datasets.checks.datasets import Part, find_parts
from vheat_mm.datasets.checks.images import ImageFacts, ImageJob, examine_image, set_up_worker
from vheat_mm.datasets.checks.label_maps import MapJob, MapRule, examine_map
from vheat_mm.datasets.checks.pool import Died, run_jobs
from vheat_mm.datasets.checks.progress import Progress
from vheat_mm.datasets.checks.report import Finding, Report
from vheat_mm.datasets.checks.samples import list_samples


class _Use(NamedTuple):
    """A data set's mention of an image."""

    part: int
    image_id: Any
    size: tuple[float, float] | None
    label: Any


class _Files:
    """Every file that the data sets name, with who names it."""

    def __init__(self) -> None:
        self.images: dict[str, list[_Use]] = {}
        self.maps: dict[tuple[str, MapRule], str] = {}  # and the image that the map is of
        self.sizes: dict[str, tuple[int, int] | None] = {}  # of images with a label map, once decoded
        self.shown: dict[str, str] = {}  # path as the config has it, where it is another than the key


def check_datasets(cfg: Config, splits: Sequence[str], workers: int, limit: int | None = None) -> Report:
    """Check the data sets of a config.

    Args:
        cfg: Of the task whose default scope is set.
        splits: Of ``train``, ``val``, ``test``; those without a data loader are passed over.
        workers: Processes that decode.
        limit: Samples of each data set whose files are opened; all by default. Annotation files are read whole.

    Raises:
        ToolError: The config's data sets cannot be built.
    """
    started = time.monotonic()
    report, files = Report(), _Files()
    parts = find_parts(cfg, splits)
    for number, part in enumerate(parts):
        count = 0
        for sample in islice(list_samples(part, report.add), limit):
            _enter(files, number, sample)
            count += 1
        report.checked.append(f'{"/".join(part.splits)}: {count} samples ({type(part.dataset).__name__}, {part.place})')
    decoded = time.monotonic()
    with Progress(len(files.images) + len(files.maps)) as progress:
        report.add_all(_check_images(files, parts, workers, progress))
        report.add_all(_check_maps(files, workers, progress))
    report.add_all(_check_uses(files, parts))
    now, count = time.monotonic(), len(files.images) + len(files.maps)
    rate = count / max(now - decoded, 1e-9)
    report.checked.append(
        f'{count} files decoded in {now - decoded:.1f} s by {workers} processes, {rate:.0f} a second; '
        f'{now - started:.1f} s in all'
    )
    return report


def _enter(files: _Files, number: int, sample: Any) -> None:
    key = _key(files, sample.image)
    files.images.setdefault(key, []).append(_Use(number, sample.image_id, sample.size, sample.label))
    if sample.label_map is not None:
        path, rule = sample.label_map
        files.maps.setdefault((_key(files, path), rule), key)
        files.sizes[key] = None


def _key(files: _Files, path: str) -> str:
    if '://' in path:
        return path
    key = os.path.normpath(path if os.path.isabs(path) else os.path.join(os.getcwd(), path))  # noqa: PTH109,PTH117,PTH118
    if key != path:
        files.shown[key] = path
    return key


def _check_images(files: _Files, parts: list[Part], workers: int, progress: Progress) -> Iterator[Finding]:
    loaders = [part.image_loader() for part in parts]
    resizes = [part.resizes() for part in parts]
    jobs = (ImageJob(path, loaders[uses[0].part]) for path, uses in files.images.items())
    for job, facts in run_jobs(examine_image, jobs, workers, set_up_worker):
        progress.advance()
        path = files.shown.get(job.path, job.path)
        if isinstance(facts, Died):
            yield Finding('decoder-died', path)
            continue
        uses = files.images[job.path]
        image_id = uses[0].image_id
        yield from (Finding(kind, path, text, image_id) for kind, text in facts.faults)
        if facts.size is None:
            continue
        if job.path in files.sizes:
            files.sizes[job.path] = facts.size
        for use in dict.fromkeys(uses):
            if use.size is not None and tuple(use.size) != facts.size:
                yield Finding('size-differs', path, _compare(use.size, facts), use.image_id)
        for long, short in {frame for use in uses for frame in resizes[use.part]}:
            factor = min(long / max(facts.size), short / min(facts.size))
            if int(min(facts.size) * factor + 0.5) < 1:
                text = f'{facts.size[0]} x {facts.size[1]}, to be fitted into {long:g} x {short:g}'
                yield Finding('image-shrinks-to-nothing', path, text, image_id)
                break


def _compare(stated: tuple[float, float], facts: ImageFacts) -> str:
    assert facts.size is not None
    text = f'{stated[0]:g} x {stated[1]:g} stated, {facts.size[0]} x {facts.size[1]} decoded'
    turned = tuple(stated) == facts.size[::-1] and 'image-rotated' in dict(facts.faults)
    return text + (': loaders turn it as its EXIF data say' if turned else '')


def _check_maps(files: _Files, workers: int, progress: Progress) -> Iterator[Finding]:
    jobs = (MapJob(path, rule) for path, rule in files.maps)
    for job, facts in run_jobs(examine_map, jobs, workers, set_up_worker):
        progress.advance()
        path = files.shown.get(job.path, job.path)
        if isinstance(facts, Died):
            yield Finding('decoder-died', path)
            continue
        yield from (Finding(kind, path, f'{text} (label map)'.strip()) for kind, text in facts.faults)
        image = files.maps[job.path, job.rule]
        size = files.sizes[image]
        if size is not None and facts.size is not None and size != facts.size:
            text = f'{facts.size[0]} x {facts.size[1]}, its image {size[0]} x {size[1]}'
            yield Finding('map-size', path, f'{text} ({files.shown.get(image, image)})')


def _check_uses(files: _Files, parts: list[Part]) -> Iterable[Finding]:
    """Files that are named more than once."""
    for key, uses in files.images.items():
        if len(uses) == 1 and len(parts[uses[0].part].splits) == 1:
            continue
        path = files.shown.get(key, key)
        splits = {split for use in uses for split in parts[use.part].splits}
        if 'train' in splits and len(splits) > 1:
            yield Finding('image-in-two-splits', path, ', '.join(sorted(splits)), uses[0].image_id)
        for part, count in Counter(use.part for use in uses).items():
            own = [use for use in uses if use.part == part]
            labels = {use.label for use in own if use.label is not None}
            if len(labels) > 1:
                yield Finding('label-contradiction', path, f'labels {", ".join(map(str, sorted(labels)))}')
            elif count > 1:
                ids = [str(use.image_id) for use in own if use.image_id is not None]
                text = f'images {", ".join(ids[:8])}' if ids else f'{count} times'
                yield Finding('duplicate-file', path, text)
