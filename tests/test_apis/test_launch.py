"""Several processes and machines, and runs that are ended and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tool_runs import REPO, TOOLS, assert_message, assert_same_weights, call, clean_environment, run, write_config
from torch.distributed.elastic.utils.distributed import get_free_port

from vheat_mm.apis.train_test import run_training


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [
        ('dist_train.sh', ['a.py']),
        ('dist_train.sh', ['a.py', 'two']),
        ('dist_test.sh', ['a.py', 'a.pth']),
        ('slurm_train.sh', ['gpu', 'job']),
        ('slurm_test.sh', ['gpu', 'job', 'a.py']),
    ],
)
def test_scripts_print_their_usage(tmp_path, script, arguments):
    done = run(TOOLS / script, *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('usage: ')


@pytest.mark.parametrize(
    ('environment', 'word'),
    [
        (dict(NNODES='2'), 'MASTER_ADDR'),
        (dict(NNODES='4:2', MASTER_ADDR='a'), 'NNODES'),
        (dict(NNODES='1:2', MASTER_ADDR='a'), '--resume'),
        (dict(NODE_RANK='1'), 'NODE_RANK'),
        (dict(PORT='http'), 'PORT'),
        (dict(MAX_RESTARTS='often'), 'MAX_RESTARTS'),
        (dict(NNODES='2', MASTER_ADDR='nowhere.invalid'), "MASTER_ADDR='nowhere.invalid'"),
    ],
)
def test_wrong_environment_variables(tmp_path, environment, word):
    done = run(TOOLS / 'dist_train.sh', 'a.py', 1, cwd=tmp_path, check=False, **environment)
    assert_message(done, word)


FAKE_SRUN = """#!/usr/bin/env bash
# A stand-in for Slurm: writes its options to a file, then starts --ntasks processes.
printf '%s\n' "$@" > srun_arguments
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
export SLURM_NTASKS=$tasks SLURM_NODELIST=localhost MASTER_ADDR=127.0.0.1
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit $?; done
"""


def test_slurm_scripts(segmentor, tmp_path):
    (tmp_path / 'srun').write_text(FAKE_SRUN)
    (tmp_path / 'srun').chmod(0o755)
    slurm = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', SRUN_ARGS='--gres=none --quiet')
    once = ['train_cfg.max_iters=1', 'train_cfg.val_interval=1']
    script = (TOOLS / 'slurm_train.sh', 'part', 'job', segmentor / 'segmentation.py', '--work-dir', 'train')
    done = run(*script, '--cfg-options', *once, cwd=tmp_path, GPUS='2', **slurm)
    assert '2 processes joined by gloo' in done.stdout
    assert (tmp_path / 'train' / 'iter_1.pth').is_file()
    options = (tmp_path / 'srun_arguments').read_text().split('\n')
    for option in ('--partition=part', '--job-name=job', '--ntasks=2', '--ntasks-per-node=2', '--quiet'):
        assert option in options
    script = (TOOLS / 'slurm_test.sh', 'part', 'job', segmentor / 'segmentation.py', tmp_path / 'train' / 'iter_1.pth')
    done = run(*script, '--work-dir', 'test', cwd=tmp_path, GPUS='1', **slurm)
    assert 'mIoU' in done.stdout


def test_exit_after_gloo_runs_exit_functions(tmp_path):
    code = """
import atexit
from vheat_mm.engine.runner import distributed
atexit.register(print, 'registered')
distributed._gloo_used = True
distributed.exit_process(3)
"""
    done = run(sys.executable, '-c', code, cwd=tmp_path, check=False, PYTHONPATH=str(REPO))
    assert done.returncode == 3
    assert done.stdout == 'registered\n'


def test_cores_are_divided_among_processes(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import dist_run

    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(9)), raising=False)
    monkeypatch.setattr(os, 'environ', {})
    dist_run.share_cores(2)
    assert os.environ == dict(OMP_NUM_THREADS='4', MKL_NUM_THREADS='4')
    monkeypatch.setattr(os, 'environ', dict(OMP_NUM_THREADS='3'))
    dist_run.share_cores(2)
    assert os.environ['OMP_NUM_THREADS'] == '3'


# --- runs that are ended and resumed


def start(cwd: Path, script: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """Start a tool and return at once; its output goes to ``<cwd>/output``."""
    command = [str(part) for part in (TOOLS / script, *arguments)]
    with (cwd / 'output').open('a') as output:
        return subprocess.Popen(command, cwd=cwd, env=clean_environment(**environment), stdout=output, stderr=output)


def wait_for(path: Path, text: str, process: subprocess.Popen, count: int = 1, seconds: int = 120) -> None:
    """Wait until a file holds ``text``."""
    end = time.monotonic() + seconds
    while (found := path.read_text() if path.exists() else '').count(text) < count:
        assert process.poll() is None, found[-3000:]
        assert time.monotonic() < end, found[-3000:]
        time.sleep(0.05)


SLOW = """
import time
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
@HOOKS.register_module()
class Slow(Hook):  # leaves time to end the run between two iterations
    def after_train_iter(self, *_, **__):
        time.sleep(0.7)
"""


@pytest.fixture
def slow(tmp_path, detector) -> Path:
    """A folder with the detector's config and a hook that slows it down."""
    (tmp_path / 'slow.py').write_text(SLOW)
    text = (detector / 'detection.py').read_text()
    imports = "custom_imports = dict(imports=['vheat_mm', 'slow'], allow_failed_imports=False)"
    (tmp_path / 'detection.py').write_text(f"{text}\n{imports}\ncustom_hooks = [dict(type='mmengine.Slow')]\n")
    return tmp_path


def seed_of(detector: Path) -> str:
    """The seed that the fixture's run has drawn."""
    return f'--seed={torch.load(detector / "run" / "epoch_1.pth", weights_only=True)["meta"]["seed"]}'


def test_sigterm_then_resumed_by_two_launchers(slow, detector):
    """The launcher gets SIGTERM, as from a cluster; two processes with workers stop after the same iteration.

    Then two launchers with one process each continue. The weights are those of an uninterrupted run.
    """
    options = ('--work-dir', 'run', seed_of(detector))
    run = start(slow, 'dist_train.sh', 'detection.py', 2, *options, PYTHONPATH=str(slow))
    wait_for(slow / 'output', 'Epoch(train) [1][1/2]', run)
    for _ in range(3):  # as an impatient scheduler: the state is saved none the less
        run.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert run.wait(timeout=200) == 75
    output = (slow / 'output').read_text()
    assert output.count('ended by SIGTERM after iteration') == 2  # in the log, and at the end
    assert 'Traceback' not in output
    iteration = torch.load(slow / 'run' / 'interrupted.pth', weights_only=True)['meta']['iter']
    assert 1 <= iteration <= 3
    options += ('--resume', '--cfg-options', 'model.backbone.with_cp=True')  # with_cp changes no result
    # With NNODES=1:2 the first might start alone.
    address = dict(NNODES='2', MAX_RESTARTS='1', MASTER_ADDR='127.0.0.1', PORT=str(get_free_port()))
    address['OMP_NUM_THREADS'] = '1'  # as each of the two processes above; threads change the order of sums
    nodes = [
        start(slow, 'dist_train.sh', 'detection.py', 1, *options, PYTHONPATH=str(slow), **address) for _ in range(2)
    ]
    assert [node.wait(timeout=200) for node in nodes] == [0, 0], (slow / 'output').read_text()[-3000:]
    output = (slow / 'output').read_text().removeprefix(output)
    assert '2 processes joined by gloo' in output
    assert f'iteration {iteration}' in output.split('resuming from')[1]
    assert_same_weights(slow / 'run' / 'epoch_2.pth', detector / 'run' / 'epoch_2.pth')
    assert not (slow / 'run' / 'interrupted.pth').exists()


def test_processes_restart_and_resume_after_a_kill(slow, detector):
    """torchrun restarts both processes, without --resume; the folder holds a checkpoint of an earlier run."""
    (slow / 'run').mkdir()
    old = slow / 'run' / 'epoch_7.pth'
    old.write_bytes((detector / 'run' / 'epoch_1.pth').read_bytes())
    os.utime(old, (0, 0))
    command = ('detection.py', 2, '--work-dir', 'run', seed_of(detector))
    run = start(slow, 'dist_train.sh', *command, MAX_RESTARTS='2', PYTHONPATH=str(slow))
    wait_for(slow / 'output', 'Epoch(train) [2][1/2]', run)
    children = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(run.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    assert run.wait(timeout=200) == 0, (slow / 'output').read_text()[-3000:]
    output = (slow / 'output').read_text()
    assert output.count('epoch_1.pth, epoch 1, iteration 2') == 1
    assert_same_weights(slow / 'run' / 'epoch_2.pth', detector / 'run' / 'epoch_2.pth')


@pytest.fixture
def two_machines() -> Iterator[tuple[str, list[list[str]]]]:
    """MASTER_ADDR, and prefixes that run a command on one of two machines.

    A machine is a network namespace whose host name has no address, as in a container. Without permission to create
    them, both commands run on this machine.
    """
    names = [f'vheat-{os.getpid()}-{i}' for i in range(2)]
    commands = [f'ip netns add {name}' for name in names]
    commands.append(f'ip link add v0 netns {names[0]} type veth peer name v1 netns {names[1]}')
    for i, name in enumerate(names):
        commands += [f'ip -n {name} {it}' for it in (f'addr add 10.9.0.{i + 1}/24 dev v{i}', f'link set v{i} up')]
        commands.append(f'ip -n {name} link set lo up')
    try:
        for command in commands:
            subprocess.run(command.split(), capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        yield '127.0.0.1', [[], []]
    else:
        named = 'hostname {}; exec "$@"'
        prefixes = [['ip', 'netns', 'exec', n, 'unshare', '--uts', 'sh', '-c', named.format(n), 'sh'] for n in names]
        yield '10.9.0.1', prefixes
    finally:
        for name in names if shutil.which('ip') else ():
            subprocess.run(['ip', 'netns', 'delete', name], capture_output=True, check=False)


@pytest.mark.parametrize('environment', [dict(), dict(MAX_RESTARTS='1')], ids=['static', 'elastic'])
def test_two_machines(two_machines, segmentor, tmp_path, environment):
    """With an elastic rendezvous, no NODE_RANK is needed: the machine with MASTER_ADDR is the host."""
    address, prefixes = two_machines
    env = clean_environment(NNODES='2', MASTER_ADDR=address, PORT=str(get_free_port()), **environment)
    command = [TOOLS / 'dist_test.sh', 'segmentation.py', 'run/iter_4.pth', '1', '--work-dir', tmp_path]
    nodes = []
    for rank, prefix in enumerate(prefixes):
        own = {} if environment else dict(NODE_RANK=str(rank))
        arguments = [str(part) for part in (*prefix, *command)]
        nodes.append(subprocess.Popen(arguments, cwd=segmentor, env=env | own, stdout=subprocess.PIPE, text=True))
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert any('2 processes joined by gloo' in output for output in outputs)


def test_deterministic_runs_are_bit_equal(tmp_path, data, capfd):
    """A command and a run in this process with the same seed give the same weights, another seed gives others."""
    pytest.importorskip('mmdet')
    write_config(tmp_path, 'detection', data, 'train_cfg = dict(max_epochs=1, val_interval=9)')
    options = ('detection.py', '--deterministic', '--seed')
    output = run(TOOLS / 'train.py', *options, 3, '--work-dir', 'a', cwd=tmp_path).stdout
    try:
        for name, seed in (('b', 3), ('c', 4)):
            call(run_training, *options, seed, '--work-dir', name, cwd=tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    output += capfd.readouterr().out
    assert [output.count(f'seed {seed}, deterministic') for seed in (3, 4)] == [2, 1]
    a, b, c = (torch.load(tmp_path / name / 'epoch_1.pth', weights_only=True)['state_dict'] for name in 'abc')
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a['backbone.patch_embed.conv1.weight'], c['backbone.patch_embed.conv1.weight'])
    state = json.loads(next((tmp_path / 'a').glob('*/environment.json')).read_text())
    assert (state['seed'], state['deterministic'], state['processes']) == (3, True, 1)
    assert 'commit_of_vheat_mm' in state
    assert 'PyTorch' in state['environment']
