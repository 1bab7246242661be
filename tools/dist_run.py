"""Start processes of a tool with torchrun, for dist_train.sh and dist_test.sh.

    python tools/dist_run.py GPUS SCRIPT [arguments of SCRIPT]

Machines are described as everywhere in OpenMMLab, by the environment: NNODES (default 1), NODE_RANK (0),
MASTER_ADDR (127.0.0.1), PORT (a free one; 29500 over several machines). Exits with the status of the process that
failed first. torchrun's own report, a traceback, is left out: the process has said already why it ended.
"""

import logging
import os
import signal
import socket
import sys

USER_ERROR = 2  # a tool ended with a message of its own


def torchrun_options(processes: int) -> list[str]:
    """Options of torchrun from the environment. Raises ValueError where they make no sense."""
    values = {}
    for name, default in (('NNODES', '1'), ('NODE_RANK', '0'), ('PORT', '')):
        value = os.environ.get(name) or default
        if value and not value.isdecimal():
            raise ValueError(f'{name}={value!r} is not a number')
        values[name] = value
    nodes, rank = int(values['NNODES']), int(values['NODE_RANK'])
    if nodes < 1 or rank >= nodes:
        raise ValueError(f'NNODES={nodes} and NODE_RANK={rank}: ranks run from 0 to NNODES - 1')
    address = os.environ.get('MASTER_ADDR') or ('127.0.0.1' if nodes == 1 else '')
    if not address:
        raise ValueError(f'NNODES={nodes}: set MASTER_ADDR to the address of the machine with NODE_RANK=0')
    port = values['PORT'] or (str(free_port()) if nodes == 1 else '29500')
    return [
        *('--nnodes', str(nodes), '--node_rank', str(rank), '--nproc_per_node', str(processes)),
        *('--master_addr', address, '--master_port', port),
        # Once a process has ended, the others must end before they complain of it (they wait two seconds).
        *('--monitor_interval', '0.5'),
    ]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def share_cores(processes: int) -> None:
    """Divide this machine's cores among its processes, unless the user did; torchrun gives each one thread."""
    affinity = getattr(os, 'sched_getaffinity', None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // processes)))
    os.environ.setdefault('MKL_NUM_THREADS', os.environ['OMP_NUM_THREADS'])


def run(options: list[str]) -> int:
    """Run torchrun; returns the exit status."""
    try:
        from torch.distributed import run as torchrun
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    except ModuleNotFoundError as error:
        remedy = 'activate the environment, or name its interpreter: PYTHON=.venv/bin/python'
        print(f'error: {sys.executable} has no {error.name}; {remedy}', file=sys.stderr)
        return USER_ERROR
    args = torchrun.parse_args(options)
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == USER_ERROR:
            return USER_ERROR
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = '; the machine may have run out of memory' if name == 'SIGKILL' else ''
            print(f'error: process {rank} was ended by {name}{hint}', file=sys.stderr)
            return 128 - failure.exitcode
        print(f'error: process {rank} failed with status {failure.exitcode}', file=sys.stderr)
        return failure.exitcode
    except SignalException as error:
        print(f'ended by {error.sigval.name}', file=sys.stderr)
        return 128 + error.sigval
    return 0


def main() -> int:
    """Read the command line and the environment; returns the exit status."""
    processes, *command = sys.argv[1:]
    try:
        options = torchrun_options(int(processes))
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return USER_ERROR
    share_cores(int(processes))
    return run([*options, *command])


if __name__ == '__main__':
    sys.exit(main())
