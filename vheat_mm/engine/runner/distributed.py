"""Several processes, with GPUs or without."""

from __future__ import annotations

import atexit
import datetime
import os
import subprocess
import sys
from typing import NoReturn

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device

from vheat_mm.utils.config_place import type_name
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.process import process_count

_gloo_used = False

SYNC_BN = {'SyncBN', 'MMSyncBN', 'SyncBatchNorm'}
# Launcher -> its variables for RANK, WORLD_SIZE, LOCAL_RANK, and what starts the processes.
LAUNCHERS = dict(
    pytorch=(('RANK', 'WORLD_SIZE', 'LOCAL_RANK'), 'tools/dist_*.sh'),
    slurm=(('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'), 'tools/slurm_*.sh'),
    mpi=(('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'), 'mpirun'),
)


def set_up_processes(cfg: Config, launcher: str) -> list[str]:
    """Prepare for several processes, or one, without a GPU, which MMEngine's runner does not support.

    MMEngine binds each process to a GPU. Without one, the gloo process group is initialized here before the runner is
    built, and the model is wrapped without ``device_ids``.

    Args:
        cfg: The config; ``sync_bn``, ``model``, ``model_wrapper_cfg`` may be changed in place.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.

    Returns:
        Lines for the log.

    Raises:
        ToolError: The launcher's environment variables are missing; more processes than GPUs.
    """
    global _gloo_used
    notes: list[str] = []
    if launcher != 'none':
        _read_environment(launcher)
    if get_device() != 'cpu':
        local_rank, gpus = int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
        if launcher != 'none' and torch.cuda.is_available() and local_rank >= gpus:
            raise ToolError(f'local rank {local_rank} has no GPU: {gpus} visible; start at most {gpus} processes here')
        return notes
    replaced = replace_sync_bn(cfg.model)
    if cfg.get('sync_bn') is not None:
        cfg.sync_bn = None
        replaced += 1
    if replaced:
        notes.append(f'no GPU: SyncBN -> BN at {replaced} places of the config (statistics are per process)')
    if launcher == 'none':
        return notes
    threads = limit_threads()
    timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
    _gloo_used = True
    dist.init_process_group('gloo', timeout=None if timeout is None else datetime.timedelta(seconds=timeout))
    wrapper = dict(
        type='MMDistributedDataParallel',
        find_unused_parameters=cfg.get('find_unused_parameters', False),
        broadcast_buffers=False,
    )
    # Without device_ids in the config, the runner would set this process's GPU.
    cfg.model_wrapper_cfg = {**wrapper, **(cfg.get('model_wrapper_cfg') or {}), 'device_ids': None}
    notes.append(f'no GPU: {process_count()} processes joined by gloo, {threads} threads each')
    return notes


def tear_down_processes() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def exit_process(status: int) -> NoReturn:
    """Exit with ``status``; after using gloo, without the interpreter's shutdown.

    In about one of ten processes that used gloo, PyTorch 2.13.0 aborts during that shutdown ("terminate called
    without an active exception"), and a finished run counts as failed.
    """
    if _gloo_used:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def replace_sync_bn(node: object) -> int:
    """Replace each SyncBN in a (nested) model config with BN, in place; returns the number of replacements."""
    if isinstance(node, (list, tuple)):
        return sum(map(replace_sync_bn, node))
    if not isinstance(node, dict):
        return 0
    count = sum(map(replace_sync_bn, node.values()))
    if type_name(node) in SYNC_BN:
        node['type'] = 'BN'
        count += 1
    return count


def _read_environment(launcher: str) -> None:
    """Set PyTorch's environment variables from the launcher's; MMEngine does so for GPUs only."""
    names, starter = LAUNCHERS[launcher]
    if missing := [name for name in names if name not in os.environ]:
        raise ToolError(
            f'--launcher {launcher}: the environment lacks {", ".join(missing)}; start through {starter}, '
            'or drop --launcher to run one process'
        )
    os.environ.update(zip(('RANK', 'WORLD_SIZE', 'LOCAL_RANK'), [os.environ[name] for name in names], strict=True))
    os.environ.setdefault('MASTER_PORT', '29500')
    if launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_slurm_node()
    os.environ.setdefault('MASTER_ADDR', '127.0.0.1')


def _first_slurm_node() -> str:
    nodes = os.environ.get('SLURM_NODELIST', '')
    try:
        shown = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True, check=True)
        return shown.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ToolError(f'scontrol cannot tell the first node of {nodes!r}: set MASTER_ADDR') from error


def limit_threads() -> int:
    """Divide the cores among the processes unless OMP_NUM_THREADS is set; returns the threads of this process."""
    if 'OMP_NUM_THREADS' not in os.environ:
        local = int(os.environ.get('LOCAL_WORLD_SIZE', os.environ.get('SLURM_NTASKS_PER_NODE', process_count())))
        cores = int(os.environ.get('SLURM_CPUS_PER_TASK', 0)) or available_cores() // local
        os.environ['OMP_NUM_THREADS'] = str(max(1, cores))
        torch.set_num_threads(max(1, cores))
    os.environ.setdefault('MKL_NUM_THREADS', os.environ['OMP_NUM_THREADS'])
    return torch.get_num_threads()


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
