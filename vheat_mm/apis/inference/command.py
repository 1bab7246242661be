"""``tools/predict.py``: images, folders and videos through a trained model, into files."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from mmengine.logging import MMLogger, print_log

from vheat_mm.apis.config import add_config_arguments
from vheat_mm.apis.errors import run_reporting_errors
from vheat_mm.apis.inference import journal
from vheat_mm.apis.inference.journal import Done, Journal, Stamp
from vheat_mm.apis.inference.parts import result_file
from vheat_mm.apis.inference.predictor import Predictor
from vheat_mm.apis.inference.preparing import test_pipeline
from vheat_mm.apis.inference.results import KINDS, Results
from vheat_mm.apis.inference.run import Progress, StopSignals, WriterThread, predict_all
from vheat_mm.apis.inference.sources import list_items
from vheat_mm.apis.inference.types import Item
from vheat_mm.checkpoint.run_folder import release
from vheat_mm.engine import fileio
from vheat_mm.engine.runner.distributed import limit_threads
from vheat_mm.engine.runner.processes import Processes
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.process import end_with_parent
from vheat_mm.utils.text import count, first_line, some_of

BROKEN = 1  # exit status
# Besides those of the config; of a changed one, earlier results would be others.
_SETTINGS = ('tta', 'amp', 'half', 'slice')
_LISTED = 20  # broken inputs that are printed at the end
ERRORS = 'errors.txt'


def make_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/predict.py``."""
    parser = argparse.ArgumentParser(description='Predict on images, folders and videos; status 1: some were broken.')
    add_config_arguments(parser)
    add = parser.add_argument
    add('checkpoint', help="checkpoint: file, address, published name, or 'released' for that of the config")
    add('sources', nargs='+', metavar='SOURCE', help='image, folder, glob, video, http(s) address, .txt file of paths')
    add('--out', required=True, metavar='DIR', help='folder for the results; new or empty, but for --resume')
    kinds = f'results to write, of {", ".join(KINDS)}; behind the SOURCEs, as it takes all words that follow'
    add('--save', nargs='+', choices=list(KINDS), metavar='KIND', help=kinds)
    add('--recursive', action='store_true', help='also in the folders within folders')
    add('--resume', action='store_true', help='go on with the run in DIR: what is done is not predicted again')
    add('--classes', nargs='+', metavar='NAME', help='classes to keep; all by default')
    add('--score-thr', type=float, metavar='X', help="detections from this score on; the config's by default, else 0.3")
    add('--ann-file', metavar='FILE', help='COCO file whose ids of images and categories predictions.json gets')
    add('--tta', action='store_true', help='test-time augmentation')
    add('--slice', type=int, metavar='PIXELS', help='cut larger images into tiles of this size')
    add('--overlap', type=float, metavar='SHARE', help='of a tile that the next one repeats (0.2)')
    add('--batch-size', type=int, default=1, metavar='N', help='images of equal size, or tiles, at once (1)')
    add('--device', help="such as cpu or cuda:1; by default what is there, with torchrun each process's own")
    add('--amp', action='store_true', help='mixed precision (on the CPU: bfloat16)')
    add('--half', action='store_true', help='weights in float16; GPUs only')
    add('--max-pixels', type=int, metavar='N', help='refuse larger images before they are decoded')
    return parser


def run_prediction(argv: Sequence[str] | None = None) -> int:
    """Predict; returns the exit status.

    It is 0, 1 if inputs were broken, 2 after an error message on stderr, 130 after Ctrl-C, 143 after SIGTERM.
    """
    args = make_parser().parse_args(argv)
    status = 0

    def body() -> None:
        nonlocal status
        if 'TORCHELASTIC_RUN_ID' in os.environ:  # else this process would go on without torchrun
            end_with_parent(signal.SIGTERM, None)
        fileio.install()
        status = _Command(args, sys.argv[1:] if argv is None else argv).run()

    try:
        return run_reporting_errors(body) or status
    finally:
        release()


class _Command:
    """One run of the tool in this process."""

    def __init__(self, args: argparse.Namespace, argv: Sequence[str]) -> None:
        self.args, self.argv, self.out = args, argv, Path(args.out)
        self.processes = Processes()
        self.is_first = self.processes.rank == 0
        if not self.is_first:
            MMLogger.get_current_instance().setLevel(logging.ERROR)

    def run(self) -> int:
        """Predict; returns the exit status."""
        processes = self.processes
        items = [Item(*fields) for fields in processes.share('items', self._list)]
        predictor = self._load()
        args = self.args
        results = Results(args.save, self.out, predictor, items, args.ann_file, args.classes)
        plan = processes.share('plan', lambda: self._plan(items, predictor, results))
        todo = [items[place] for place in plan['left']]
        stamps = {item.name: Stamp(*stamp) for item, stamp in zip(todo, plan['stamps'], strict=True)}
        mine = [item for item in todo if item.index % processes.count == processes.rank]
        part = journal.part_name(plan['run'], processes.rank)
        progress = Progress(len(mine), shown=self.is_first)
        with StopSignals(self.out) as stop:
            thread = WriterThread(results.writers(part), Journal(self.out, part), stamps)
            fault: Exception | None = None
            try:
                predict_all(predictor.predict_items(mine), thread, progress, stop, processes.get_on)
            except Exception as error:  # what is done is joined before the end
                fault = error
            numbers, missing = processes.gather('end', stop.number, lambda: stop.number is not None)
            number = max(filter(None, numbers), default=None)
            status = processes.share('status', lambda: self._end(items, plan, results, progress, number, missing))
            processes.leave()
        if fault is not None:
            raise fault
        return status

    def _list(self) -> list[list[Any]]:
        """All inputs, once the output folder is ours."""
        items = list_items(self.args.sources, recursive=self.args.recursive, exclude=self.out)
        for note in journal.open_folder(self.out, self.args.resume):
            print_log(note, 'current')
        return [list(dataclasses.astuple(item)) for item in items]

    def _load(self) -> Predictor:
        args, device = self.args, self.args.device
        if self.processes.count > 1:
            if torch.cuda.is_available() and device in (None, 'cuda'):
                device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
            limit_threads()
        cv2.setNumThreads(1)  # those of the network need the cores
        return Predictor(
            args.config,
            args.checkpoint,
            device=device,
            batch_size=args.batch_size,
            tta=args.tta,
            amp=args.amp,
            half=args.half,
            classes=args.classes,
            score_thr=args.score_thr,
            slice_size=args.slice,
            overlap=args.overlap,
            cfg_options=args.cfg_options,
            keep_image='painted' in (args.save or ['painted']),
            max_pixels=args.max_pixels,
        )

    def _plan(self, items: list[Item], predictor: Predictor, results: Results) -> dict[str, Any]:
        """What is to be done, given what earlier runs have done."""
        cfg = predictor.cfg
        settings: dict[str, Any] = {f'--{name}': getattr(self.args, name) for name in _SETTINGS}
        settings['--overlap'], settings['--score-thr'] = predictor.overlap, predictor.score_thr
        settings['--classes'] = self.args.classes and shlex.join(self.args.classes)
        settings['--save'] = ' '.join(sorted(results.kinds))
        settings['checkpoint'] = journal.digest(
            cfg.load_from if self.args.checkpoint == 'released' else self.args.checkpoint
        )
        settings['model'], settings['pipeline'] = cfg.model.to_dict(), test_pipeline(cfg)
        journal.check_settings(self.out, settings)
        done = journal.read_journals(self.out)
        stamps = [journal.stamp(item.path) for item in items]
        left, changed = journal.still_to_do(items, stamps, done)
        results.remove([items[place] for place in left if items[place].name in done])
        if changed:
            text = f'changed since and predicted again: {count(len(changed), "input")}, {some_of(changed, 3)}'
            print_log(text, 'current')
        if gone := set(done) - {item.name for item in items}:
            print_log(f'no longer listed: {count(len(gone), "input")} of earlier runs, left out', 'current')
        return dict(left=left, stamps=[stamps[place] for place in left], run=journal.next_run(self.out))

    def _end(
        self,
        items: list[Item],
        plan: dict[str, Any],
        results: Results,
        progress: Progress,
        number: int | None,
        missing: list[int],
    ) -> int:
        """Join the results of all processes and say what has been done; returns the exit status."""
        todo = {items[place].name for place in plan['left']}
        done = {
            name: entry
            for name, entry in journal.read_journals(self.out).items()
            if name not in todo or entry.run == plan['run']
        }
        results.merge(done)
        broken = [(item, entry.error) for item in items if (entry := done.get(item.name)) and entry.error is not None]
        self._write_errors(broken)
        left = sum(item.name not in done for item in items)
        self._say(items, todo, done, progress, results.score_thr)
        if missing:
            raise ToolError(
                f'process {some_of(missing)} of {self.processes.count} has made no progress, {left} inputs are left: '
                'see what it has printed, and go on with --resume'
            )
        if number is not None:
            argv = self.argv if self.args.resume else [*self.argv, '--resume']
            print_log(
                f'stopped by {signal.Signals(number).name} with {left} inputs left; go on by the same command with '
                f'--resume:\n  python tools/predict.py {shlex.join(argv)}',
                'current',
            )
            return 128 + number
        return BROKEN if broken else 0

    def _write_errors(self, broken: list[tuple[Item, str]]) -> None:
        target = self.out / ERRORS
        if not broken:
            target.unlink(missing_ok=True)
            return
        names = (item.source if item.source.endswith(item.name) else item.name for item, _ in broken)
        lines = [f'{" ".join(name.splitlines())}: {error}' for name, (_, error) in zip(names, broken, strict=True)]
        with result_file(target) as file:
            file.write(''.join(f'{line}\n' for line in lines).encode(errors='surrogateescape'))
        for line in lines[:_LISTED]:
            print_log(f'broken: {first_line(line, 600)}', 'current', logging.WARNING)
        if len(lines) > _LISTED:
            print_log(f'and {len(lines) - _LISTED} more, all in {target}', 'current', logging.WARNING)

    def _say(
        self, items: list[Item], todo: set[str], done: dict[str, Done], progress: Progress, score_thr: float | None
    ) -> None:
        """The closing line."""
        ours = [(item, done[item.name]) for item in items if item.name in todo and item.name in done]
        images = sum(entry.images for item, entry in ours if not item.is_video)
        videos = [entry.images for item, entry in ours if item.is_video and entry.images]
        frames = sum(videos)
        seconds = progress.seconds
        parts = [count(images, 'image')] if images or not videos else []
        if videos:
            parts.append(f'{count(len(videos), "video")} with {count(frames, "frame")}')
        boxes = sum(entry.boxes for _, entry in ours)
        if score_thr is not None:
            parts.append(count(boxes, 'detection'))
        parts.append(count(sum(entry.error is not None for _, entry in ours), 'broken input'))
        if skipped := len(items) - len(todo):
            parts.append(f'{skipped} done before')
        rate = (images + frames) / max(seconds, 1e-9)
        print_log(f'{", ".join(parts)}; {seconds:.1f} s, {rate:.2f} images/s; results in {self.out}', 'current')
        if score_thr is not None and images + frames and not boxes:
            text = f'no detection reaches the score {score_thr:g}: lower --score-thr, or take a model of such images'
            print_log(text, 'current', logging.WARNING)
