"""A run of predictions: what is noted as done, the writer's thread, and several processes; results are made up."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_two

from vheat_mm.apis.inference import journal, run
from vheat_mm.apis.inference.journal import Journal, Stamp
from vheat_mm.apis.inference.types import Item, Prediction
from vheat_mm.checkpoint.run_folder import release
from vheat_mm.engine.runner import processes
from vheat_mm.engine.runner.processes import Processes
from vheat_mm.utils.errors import ToolError


def items_of(*names: str) -> list[Item]:
    return [Item(path=name, name=name, index=i, source=name) for i, name in enumerate(names)]


def predictions_of(*items: Item):
    for item in items:
        frames = [0, 1, 2] if item.is_video else [None]
        for frame in frames:
            yield Prediction(item, frame, last=frame == frames[-1] or frame is None, boxes=np.zeros((2, 4), np.float32))


class Recorder:
    """A writer that notes what it is given."""

    def __init__(self, fails_at: str | None = None, wait: threading.Event | None = None):
        self.written, self.closed, self.fails_at, self.wait = [], 0, fails_at, wait

    def write(self, prediction):
        if self.wait is not None:
            assert self.wait.wait(10)
        if prediction.item.name == self.fails_at:
            raise OSError(errno.ENOSPC, 'No space left on device', prediction.item.name)
        self.written.append((prediction.item.name, prediction.frame))

    def close(self):
        self.closed += 1


def run_all(folder: Path, predictions, recorder: Recorder, part: str = '000001-000000', stop=None) -> run.Progress:
    names = ('a', 'b', 'c', 'clip', 'd')
    thread = run.WriterThread([recorder], Journal(folder, part), dict.fromkeys(names, Stamp(1, 2)))
    progress = run.Progress(len(names), shown=False)
    run.predict_all(predictions, thread, progress, stop or run.StopSignals(folder))
    return progress


def test_an_input_is_noted_once_all_of_it_is_written(tmp_path):
    clip = Item('clip', 'clip', 1, 'clip', is_video=True)
    broken = Prediction(items_of('b')[0], error='no image')
    recorder = Recorder()
    progress = run_all(tmp_path, iter([*predictions_of(*items_of('a'), clip), broken]), recorder)
    assert recorder.written == [('a', None), ('clip', 0), ('clip', 1), ('clip', 2), ('b', None)]
    assert recorder.closed == 1
    done = journal.read_journals(tmp_path)
    assert {name: (entry.error, entry.images, entry.boxes) for name, entry in done.items()} == {
        'a': (None, 1, 2),
        'clip': (None, 3, 6),
        'b': ('no image', 0, 0),
    }
    assert (progress.images, progress.inputs, progress.broken) == (4, 3, 1)


def test_a_writer_that_fails_ends_the_run(tmp_path):
    """Also while the queue is full; what was written before is noted, and nothing after."""
    closed = []

    def predictions():
        try:
            for _ in range(100):
                yield from predictions_of(*items_of('a', 'b', 'c'))
        finally:
            closed.append(True)

    recorder = Recorder(fails_at='b')
    with pytest.raises(OSError, match='No space left'):
        run_all(tmp_path, predictions(), recorder)
    assert closed
    assert recorder.written == [('a', None)]
    assert recorder.closed == 1
    assert list(journal.read_journals(tmp_path)) == ['a']


def test_a_result_that_cannot_be_written_is_an_error_of_its_input(tmp_path):
    """Such as a JPEG of more than 65500 columns: the other writers and inputs go on."""

    class Failing(Recorder):
        def write(self, prediction):
            if prediction.item.name == 'b':
                raise ValueError('encoder\nfailed')

    recorder = Recorder()
    thread = run.WriterThread(
        [Failing(), recorder], Journal(tmp_path, '000001-000000'), dict.fromkeys('abc', Stamp(1, 2))
    )
    for prediction in predictions_of(*items_of('a', 'b', 'c')):
        thread.put(prediction)
    thread.finish()
    assert [name for name, _ in recorder.written] == ['a', 'b', 'c']
    errors = {name: entry.error for name, entry in journal.read_journals(tmp_path).items()}
    assert errors == {'a': None, 'b': 'a result cannot be written: encoder', 'c': None}


def test_a_signal_ends_the_run_with_what_is_predicted(tmp_path):
    """The prediction during which it comes is written; an error of the prediction after it is none."""
    stop = run.StopSignals(tmp_path)

    def predictions():
        yield from predictions_of(*items_of('a'))
        stop.number = 2
        yield from predictions_of(*items_of('b'))
        raise AssertionError('not asked for')

    recorder = Recorder()
    run_all(tmp_path, predictions(), recorder, stop=stop)
    assert recorder.written == [('a', None), ('b', None)]

    def dying():
        raise RuntimeError('the loader has died')
        yield

    run_all(tmp_path, dying(), Recorder(), stop=stop)
    with pytest.raises(RuntimeError, match='has died'):
        run_all(tmp_path, dying(), Recorder())


def test_few_predictions_wait_to_be_written(tmp_path):
    """However slow the disk is: memory does not grow."""
    go, made = threading.Event(), []

    def predictions():
        for _ in range(20):
            made.append(True)
            yield from predictions_of(*items_of('a'))

    thread = threading.Thread(target=run_all, args=(tmp_path, predictions(), Recorder(wait=go)))
    thread.start()
    end = time.monotonic() + 5
    while len(made) < 6 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == run._AHEAD + 2  # one is being written, and one waits to be put into the queue
    go.set()
    thread.join()
    assert len(made) == 20


def test_the_newest_line_about_an_input_counts(tmp_path):
    """Of a killed process the last line may be incomplete."""
    first = Journal(tmp_path, journal.part_name(1, 0))
    a, b, c = items_of('a', 'b', 'c')
    first.write(a, Stamp(1, 10), None, 1)
    first.write(b, Stamp(1, 10), 'broken', 0)
    first.close()
    assert journal.next_run(tmp_path) == 2
    second = Journal(tmp_path, journal.part_name(2, 1))
    second.write(b, Stamp(1, 10), None, 1)
    second.close()
    path = tmp_path / journal.FOLDER / '000002-000001.journal'
    path.write_bytes(path.read_bytes() + b'{"name":"c"}\t[1,10,nu')
    done = journal.read_journals(tmp_path)
    assert {name: (entry.error, entry.part) for name, entry in done.items()} == {
        'a': (None, '000001-000000'),
        'b': (None, '000002-000001'),
    }
    parts = journal.parts_of(tmp_path, done, [a, b, c], '.coco')
    assert {path.name: items for path, items in parts.items()} == {'000001-000000.coco': [a], '000002-000001.coco': [b]}

    stamps = [Stamp(1, 10), Stamp(1, 11), Stamp(1, 10)]
    assert journal.still_to_do([a, b, c], stamps, done) == ([1, 2], ['b'])
    broken = {'a': done['a']._replace(error='broken')}
    assert journal.still_to_do([a], stamps, broken) == ([0], [])


def test_other_settings_are_refused(tmp_path):
    settings = dict(model=dict(heads=[dict(score_thr=0.05)], size=(1, 2)), tta=False)
    journal.open_folder(tmp_path / 'out', resume=False)
    journal.check_settings(tmp_path / 'out', settings)
    journal.check_settings(tmp_path / 'out', json.loads(json.dumps(settings)))
    settings['model']['heads'][0]['score_thr'] = 0.1
    settings['amp'] = True
    with pytest.raises(ToolError) as caught:
        journal.check_settings(tmp_path / 'out', settings)
    assert 'model.heads.0.score_thr was 0.05 and is 0.1, amp was not set and is set' in str(caught.value)
    (tmp_path / 'out' / journal.FOLDER / 'settings.json').write_text('[')
    with pytest.raises(ToolError, match='damaged'):
        journal.check_settings(tmp_path / 'out', settings)
    release()


@pytest.mark.parametrize('resume', [False, True])
def test_output_folders(tmp_path, resume):
    file, full, empty = tmp_path / 'file', tmp_path / 'full', tmp_path / 'empty'
    file.touch()
    full.mkdir()
    empty.mkdir()
    (full / 'thesis.tex').touch()
    with pytest.raises(ToolError, match='this is a file'):
        journal.open_folder(file, resume)
    with pytest.raises(ToolError, match=r'--out .*file/out cannot be written: Not a directory; choose another folder'):
        journal.open_folder(file / 'out', resume)
    with pytest.raises(ToolError, match=r'thesis\.tex'):
        journal.open_folder(full, resume)
    assert [path.name for path in full.iterdir()] == ['thesis.tex']
    notes = journal.open_folder(empty, resume)
    assert any('a new one begins' in note for note in notes) == resume
    release()
    journal.open_folder(empty, resume)  # of a run that was ended before it began
    journal.check_settings(empty, {})
    release()
    (empty / 'painted').mkdir()
    (empty / 'painted' / '.a.jpg.1234.part').touch()
    (empty / 'painted' / 'b.part').touch()
    if resume:
        assert journal.open_folder(empty, resume) == ['removed of a killed run: 1 temporary file']
        assert [path.name for path in (empty / 'painted').iterdir()] == ['b.part']
        release()
    else:
        with pytest.raises(ToolError, match=r'is not empty .*--resume'):
            journal.open_folder(empty, resume)


def _talk(rank: int, port: int, folder: Path, stuck: bool) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    found = Processes()
    result = [found.rank, found.count, found.share('list', lambda: [rank, 'a'])]

    def fail():
        raise ToolError('an empty folder')

    try:
        found.share('other', fail)
    except ToolError as error:
        result.append(str(error))
    processes.PATIENCE = 0.5
    if stuck and rank:
        time.sleep(3)
    for _ in range(4 * rank):  # slower than the time limit, but not stuck
        time.sleep(0.3)
        found.get_on()
    result.append(found.gather('end', rank))
    torch.save(result, folder / f'rank{rank}.pth')
    found.leave()


@pytest.mark.parametrize('stuck', [False, True])
def test_processes(tmp_path, stuck):
    first, second = run_two(_talk, tmp_path, stuck)
    assert first == [0, 2, [0, 'a'], 'an empty folder', ([0], [1]) if stuck else ([0, 1], [])]
    assert second == [1, 2, [0, 'a'], 'process 0: an empty folder', ([], [])]
