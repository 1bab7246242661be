"""tools/predict.py: results against tools/test.py's and other libraries', faults, resuming, signals, two processes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from processes import run_alone
from tool_runs import SIZE, TOOLS, _call, call, call_failing, clean_environment, run, write_config

from vheat_mm.apis.config import open_config
from vheat_mm.apis.inference import parts
from vheat_mm.apis.inference.command import run_prediction
from vheat_mm.apis.inference.journal import FOLDER, read_journals
from vheat_mm.apis.inference.run import StopSignals
from vheat_mm.apis.train_test import run_testing

cv2 = pytest.importorskip('cv2')
MANY = 'model.test_cfg.rcnn.max_per_img=100'
CONFIG, CHECKPOINT = 'detection.py', 'detection.pth'


def untrained(folder: Path, task: str, data: Path) -> Path:
    """The folder with a config of a task, and a checkpoint with random weights."""
    path = write_config(folder, task, data)
    cfg = open_config(path)
    torch.manual_seed(0)
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    model = MODELS.build(cfg.model)
    state = model.state_dict()
    if task == 'detection':
        state['roi_head.mask_head.conv_logits.bias'] += 5  # masks that fill their boxes
    classes = dict(detection=('box', 'disc'), segmentation=('ground', 'box', 'disc'), classification=('box', 'disc'))
    torch.save(dict(state_dict=state, meta=dict(dataset_meta=dict(classes=classes[task]))), folder / f'{task}.pth')
    return folder


@pytest.fixture(scope='module')
def place(tmp_path_factory, data) -> Path:
    """Folder with a detector, and ``in``: six images, two more of equal name in sub-folders, a video, broken files."""
    pytest.importorskip('mmdet')
    folder = untrained(tmp_path_factory.mktemp('predict'), 'detection', data)
    shutil.copytree(data / 'images', folder / 'in')
    for name in ('first', 'second'):
        (folder / 'in' / name).mkdir()
        shutil.copy(data / 'images' / '1.png', folder / 'in' / name / '0.png')
    write_video(folder / 'in' / 'clip.mp4', [cv2.imread(str(data / 'images' / f'{i}.png')) for i in range(4)])
    (folder / 'in' / 'empty.png').touch()
    (folder / 'in' / 'text.jpg').write_text('no image')
    (folder / 'in' / 'second' / 'cut.png').write_bytes((data / 'images' / '2.png').read_bytes()[:3000])
    return folder


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    av = pytest.importorskip('av')
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=10)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, 'yuv420p'
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='bgr24')))
        container.mux(stream.encode(None))


def predict(
    place: Path, *arguments: object, status: int = 0, config: str = CONFIG, checkpoint: str = CHECKPOINT
) -> None:
    assert _call(run_prediction, (config, checkpoint, *arguments), place) == status


def load(path: Path) -> dict:
    return json.loads((path / 'predictions.json').read_bytes())


def near_truth(place: Path, data: Path) -> Path:
    """Annotations that are near some of the predicted boxes, as no untrained model predicts near the true ones."""
    predict(place, data / 'images', '--out', 'near', '--save', 'coco', '--score-thr', 0, '--cfg-options', MANY)
    content = load(place / 'near')
    ids = {'box': 7, 'disc': 3}
    truth = dict(categories=[dict(id=number, name=name) for name, number in ids.items()], annotations=[])
    truth['images'] = [image | dict(id=10 * image['id']) for image in content['images']]
    for entry in content['annotations'][::9]:
        x, y, width, height = entry['bbox']
        width, height = width * 0.9, height * 0.9
        truth['annotations'].append(
            dict(
                id=entry['id'],
                image_id=10 * entry['image_id'],
                category_id=ids['box' if entry['category_id'] == 1 else 'disc'],
                bbox=[x, y, width, height],
                area=width * height,
                segmentation=[[x, y, x + width, y, x + width, y + height, x, y + height]],
                iscrowd=0,
            )
        )
    (place / 'truth.json').write_text(json.dumps(truth))
    return place / 'truth.json'


def test_average_precision_is_that_of_the_test_tool(place, data, capfd):
    """Every box, score and mask is the same, and so are the averages over them; ids are the annotation file's."""
    COCO = pytest.importorskip('pycocotools.coco').COCO
    COCOeval = pytest.importorskip('pycocotools.cocoeval').COCOeval
    truth = near_truth(place, data)
    options = ('--cfg-options', MANY, f'test_dataloader.dataset.ann_file={truth}', f'test_evaluator.ann_file={truth}')
    dump = f'test_evaluator.outfile_prefix={place / "theirs"}'
    call(run_testing, CONFIG, CHECKPOINT, '--work-dir', 'test', *options, dump, cwd=place)
    printed = capfd.readouterr().out
    save = ('--save', 'coco', '--score-thr', 0, '--ann-file', truth)
    predict(place, data / 'images', '--out', 'ap', *save, *options)
    found = load(place / 'ap')['annotations']
    boxes = sorted((e['image_id'], e['category_id'], e['score'], e['bbox']) for e in found)
    theirs = json.loads((place / 'theirs.bbox.json').read_bytes())
    assert boxes == sorted((e['image_id'], e['category_id'], e['score'], e['bbox']) for e in theirs)
    theirs = json.loads((place / 'theirs.segm.json').read_bytes())
    masks = sorted((e['image_id'], e['category_id'], e['score'], str(e['segmentation'])) for e in found)
    assert masks == sorted((e['image_id'], e['category_id'], e['score'], str(e['segmentation'])) for e in theirs)
    for kind in ('bbox', 'segm'):
        scores = COCOeval(COCO(str(truth)), COCO(str(truth)).loadRes(found), kind)
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
        expected = float(re.findall(rf'coco/{kind}_mAP: ([\d.]+)', printed)[-1])
        assert expected > 0.01
        assert round(scores.stats[0], 3) == expected


def test_a_folder_with_broken_files_and_a_video(place, capfd):
    """Then again with --resume, after a broken file was mended, one changed and one added."""
    inputs, out = place / 'in', place / 'folder'
    options = (inputs, '--recursive', '--out', out, '--score-thr', 0.01)
    predict(place, *options, status=1)
    printed = capfd.readouterr().out
    assert re.search(r'8 images, 1 video with 4 frames, [1-9]\d* detections, 3 broken inputs;', printed)
    errors = (out / 'errors.txt').read_text().splitlines()
    assert [line.split(':')[0] for line in errors] == ['empty.png', 'text.jpg', 'second/cut.png']
    content = load(out)
    names = {f'{i}.png' for i in range(6)} | {'first/0.png', 'second/0.png', *(f'clip.mp4/{i:06d}' for i in range(4))}
    assert {image['file_name'] for image in content['images']} == names
    painted = {str(path.relative_to(out / 'painted')) for path in (out / 'painted').rglob('*') if path.is_file()}
    assert painted == {name for name in names if 'clip' not in name} | {'clip.mp4'}
    first, second = (cv2.imread(str(out / 'painted' / name / '0.png')) for name in ('first', 'second'))
    assert (first == second).all()
    assert first.shape == (SIZE, SIZE, 3)
    before = {path: path.stat().st_mtime_ns for path in (out / 'painted').rglob('*.png')}

    shutil.copy(inputs / '2.png', inputs / 'empty.png')
    shutil.copy(inputs / '3.png', inputs / '4.png')
    shutil.copy(inputs / '5.png', inputs / 'first' / 'new.png')
    (inputs / 'first' / '0.png').write_text('no image any more')
    predict(place, *options, '--resume', status=1)
    printed = capfd.readouterr().out
    assert 'changed since and predicted again: 2 inputs, 4.png, first/0.png' in printed
    assert re.search(r'3 images, \d+ detections, 3 broken inputs, 7 done before;', printed)
    new = (names | {'empty.png', '4.png', 'first/new.png'}) - {'first/0.png'}
    assert {image['file_name'] for image in load(out)['images']} == new
    changed = {path for path in before if not path.exists() or path.stat().st_mtime_ns != before[path]}
    assert changed == {out / 'painted/4.png', out / 'painted/first/0.png'}
    assert not (out / 'painted/first/0.png').exists()
    predict(place, *options[:3], 'anew', *options[4:], status=1)
    assert (out / 'predictions.json').read_bytes() == (place / 'anew' / 'predictions.json').read_bytes()

    predict(place, inputs / '0.png', '--out', 'nothing', '--save', 'coco', '--score-thr', 1)
    printed = capfd.readouterr().out
    assert '1 image, 0 detections, 0 broken inputs;' in printed
    assert 'no detection reaches the score 1: lower --score-thr' in printed

    message = call_failing(capfd, run_prediction, CONFIG, CHECKPOINT, *options[:-1], 0.02, '--resume', cwd=place)
    assert 'score-thr was 0.01 and is 0.02' in message
    torch.save({**torch.load(place / CHECKPOINT), 'other': 1}, place / 'other.pth')
    message = call_failing(capfd, run_prediction, CONFIG, 'other.pth', *options, '--resume', '--tta', cwd=place)
    assert '--tta was not set and is set' in message
    assert 'checkpoint was' in message
    shutil.copy(inputs / '1.png', inputs / 'first' / '0.png')


def start(place: Path, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, TOOLS / 'predict.py', CONFIG, CHECKPOINT, *arguments]
    environment = clean_environment(OMP_NUM_THREADS='1')
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=place,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(out: Path, inputs: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not (out / FOLDER).is_dir() or len(read_journals(out)) < inputs:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_stopped_and_killed_runs_go_on(place, data, tmp_path, capfd):
    """Ctrl-C, SIGTERM and SIGKILL, one after the other; the end is that of a run in one go."""
    inputs, out = tmp_path / 'in', tmp_path / 'out'
    inputs.mkdir()
    for number in range(150):
        shutil.copy(data / 'images' / f'{number % 6}.png', inputs / f'{number:03d}.png')
    options = (inputs, '--out', out, '--score-thr', 0.01)
    seen = 0
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        process = start(place, *options, *(['--resume'] if seen else []))
        wait_for(out, seen + 3, process)
        process.send_signal(number)
        printed = ''.join(process.communicate(timeout=60))
        assert process.returncode == status, printed
        done = read_journals(out)
        assert seen < len(done) < 150
        if number != signal.SIGKILL:
            assert f'stopped by {number.name} with {150 - len(done)} inputs left' in printed
            assert f'{CONFIG} {CHECKPOINT} {inputs} --out {out} --score-thr 0.01 --resume' in printed
            assert {image['file_name'] for image in load(out)['images']} == set(done)
            assert {path.name for path in (out / 'painted').iterdir()} == set(done)
        seen = len(done)
    predict(place, *options, '--resume')
    assert f'{seen} done before' in capfd.readouterr().out
    predict(place, inputs, '--out', tmp_path / 'one', '--score-thr', 0.01)
    for path in (out / 'predictions.json', *(out / 'painted').iterdir()):
        assert path.read_bytes() == (tmp_path / 'one' / path.relative_to(out)).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == [FOLDER, 'painted', 'predictions.json']


def _press_twice(folder: Path) -> None:
    with StopSignals(folder) as stop:
        (folder / '.a.jpg.0123.part').touch()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)  # no second Ctrl-C
        (folder / 'still').touch()
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(0)


def test_a_second_ctrl_c_leaves_nothing_half_written(tmp_path):
    assert run_alone(_press_twice, tmp_path) == 130
    assert [path.name for path in tmp_path.iterdir()] == ['still']


def test_two_processes_write_what_one_writes(place, capfd):
    """They go on with what one process has begun, and share the one broken file's status."""
    common = ('--recursive', '--score-thr', 0.01)
    (place / 'in' / 'text.jpg').write_text('no image')
    predict(place, place / 'in' / 'first', place / 'in', '--out', 'one', *common, status=1)
    shutil.copytree(place / 'in' / 'first', place / 'in2' / 'first')
    predict(place, 'in2/first', '--out', 'two', *common)
    launch = (sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', TOOLS / 'predict.py')
    arguments = (CONFIG, CHECKPOINT, place / 'in' / 'first', place / 'in', '--out', 'two', *common, '--resume')
    done = run(*launch, *arguments, cwd=place, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert (place / 'one' / 'predictions.json').read_bytes() == (place / 'two' / 'predictions.json').read_bytes()
    assert (place / 'one' / 'errors.txt').read_bytes() == (place / 'two' / 'errors.txt').read_bytes()
    journals = [path.name for path in (place / 'two' / FOLDER).glob('000002-*.journal')]
    assert sorted(journals) == ['000002-000000.journal', '000002-000001.journal']


def test_chosen_classes_with_an_annotation_file_that_lacks_the_others(place, data, capfd):
    truth = json.loads((data / 'coco.json').read_text())
    truth['categories'] = [dict(id=40, name='disc')]
    (place / 'discs.json').write_text(json.dumps(truth))
    options = (data / 'images', '--out', 'discs', '--save', 'coco', '--score-thr', 0, '--ann-file', 'discs.json')
    assert "'box'" in call_failing(capfd, run_prediction, CONFIG, CHECKPOINT, *options, cwd=place)
    predict(place, *options, '--classes', 'disc')
    assert {entry['category_id'] for entry in load(place / 'discs')['annotations']} == {40}


def test_a_full_disk(place, data, capfd, monkeypatch):
    """What is complete is in the file, and nothing of an input that has changed since."""
    written = []
    shutil.copytree(data / 'images', place / 'full_in')

    def write(descriptor, content):
        written.append(content)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content)

    real = os.write
    options = (place / 'full_in', '--out', 'full', '--save', 'coco', '--score-thr', 0.01)

    def fill_up(*more: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(parts.os, 'write', write)
            return call_failing(capfd, run_prediction, CONFIG, CHECKPOINT, *options, *more, cwd=place)

    message = fill_up()
    assert 'no space left' in message
    assert '--resume' in message
    assert len(load(place / 'full')['images']) == 2
    predict(place, *options, '--resume')
    assert '2 done before' in capfd.readouterr().out
    assert len(load(place / 'full')['images']) == 6
    os.utime(place / 'full_in' / '3.png')
    fill_up('--resume')
    assert [image['file_name'][0] for image in load(place / 'full')['images']] == list('01245')


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('in', '--out', 'in'), 'output folder'),
        (('in', '--out', 'full_folder'), 'is not empty (thesis.tex): choose another folder'),
        (('in', '--out', 'full_folder', '--resume'), 'no run of tools/predict.py'),
        (('in', '--out', 'a', '--save', 'coco', 'label-maps'), '--save label-maps: this is a model for detection'),
        (('in', '--out', 'a', '--save', 'painted', '--ann-file', 'x.json'), '--ann-file x.json'),
        (('in', '--out', 'a', '--half'), 'needs a GPU'),
        (('in', '--out', 'a', '--classes', 'bux'), "no 'bux'"),
        (('nothing', '--out', 'a'), "'nothing'"),
    ],
)
def test_refusals(place, capfd, arguments, words):
    (place / 'full_folder').mkdir(exist_ok=True)
    (place / 'full_folder' / 'thesis.tex').touch()
    assert words in call_failing(capfd, run_prediction, CONFIG, CHECKPOINT, *arguments, cwd=place)


def test_a_checkpoint_of_another_config(place, data, tmp_path, capfd):
    pytest.importorskip('mmseg')
    untrained(tmp_path, 'segmentation', data)
    arguments = (CONFIG, tmp_path / 'segmentation.pth', 'in', '--out', 'other')
    assert 'segmentation.pth' in call_failing(capfd, run_prediction, *arguments, cwd=place)


def test_an_output_folder_inside_the_source(place, data, tmp_path, capfd):
    """Its painted images are no inputs, the first time and with --resume."""
    shutil.copytree(data / 'images', tmp_path / 'in')
    options = (tmp_path / 'in', '--recursive', '--out', tmp_path / 'in' / 'out')
    predict(place, *options)
    predict(place, *options, '--resume')
    assert '6 done before' in capfd.readouterr().out


def test_label_maps_and_classes(data, tmp_path):
    """The other tasks' defaults, against what the models' own test step gives."""
    pytest.importorskip('mmseg')
    pytest.importorskip('mmpretrain')
    for task in ('segmentation', 'classification'):
        untrained(tmp_path, task, data)
        predict(tmp_path, data / 'images', '--out', task, config=f'{task}.py', checkpoint=f'{task}.pth')
        assert len(list((tmp_path / task / 'painted').iterdir())) == 6
    call(run_testing, 'segmentation.py', 'segmentation.pth', '--out', 'theirs', cwd=tmp_path)
    for name in os.listdir(tmp_path / 'theirs'):  # noqa: PTH208
        from PIL import Image

        ours, theirs = (np.asarray(Image.open(tmp_path / f / name)) for f in ('segmentation/label_maps', 'theirs'))
        assert (ours == theirs).all()
    lines = (tmp_path / 'classification' / 'classes.csv').read_text().splitlines()
    assert [line.split(',')[0] for line in lines[1:]] == [f'{i}.png' for i in range(6)]
