"""Start processes of a tool with torchrun, for dist_train.sh and dist_test.sh.

    python tools/dist_run.py GPUS SCRIPT [arguments of SCRIPT]

Machines are described as everywhere in OpenMMLab, by the environment: NNODES (default 1), NODE_RANK (0),
MASTER_ADDR (127.0.0.1), PORT (a free one; 29500 over several machines). Two more turn on torchrun's elasticity:

    MAX_RESTARTS=3   start all processes again, at most so often, where one of them has died; training resumes by itself
    NNODES=1:4       go on with as many machines as there are, within these bounds; needs --resume, and no NODE_RANK;
                     MAX_RESTARTS is 3 where it is not set

Exits with the status of the process that failed first; with 75 where SIGTERM ended a training that has saved its
state. torchrun's own report, a traceback, is left out: the process has said already why it ended.
"""

import contextlib
import logging
import os
import signal
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

USER_ERROR = 2  # a tool ended with a message of its own
REQUEUE = 75  # training ended on SIGTERM, and has saved its state
SIOCGIFADDR = 0x8915  # of netdevice(7)
SECONDS_TO_SAVE = 600  # after SIGTERM; the scheduler that sent it decides in the end


def torchrun_options(processes: int, command: list[str]) -> list[str]:
    """Options of torchrun from the environment. Raises ValueError where they make no sense."""
    least, most = _bounds(os.environ.get('NNODES') or '1')
    rank, port, restarts = (_number(name) for name in ('NODE_RANK', 'PORT', 'MAX_RESTARTS'))
    if least != most:
        if not _resumes_by_itself(command):
            raise ValueError(
                f'NNODES={least}:{most}: add --resume, without a path, so that machines that join later start where '
                'the others are'
            )
        restarts = 3 if restarts is None else restarts  # the end of a machine is one, to the others
    if (rank or 0) >= most:
        raise ValueError(f'NNODES={most} and NODE_RANK={rank}: ranks run from 0 to NNODES - 1')
    address = os.environ.get('MASTER_ADDR') or ('127.0.0.1' if most == 1 else '')
    if not address:
        raise ValueError(f'NNODES={most}: set MASTER_ADDR to the address of the machine with NODE_RANK=0')
    port = port or (free_port() if most == 1 else 29500)
    here = this_address(address)
    if most > 1 and (interface := interface_of(here)):
        # Gloo looks its own name up instead, which in a container gives the loopback, or nothing.
        os.environ.setdefault('GLOO_SOCKET_IFNAME', interface)
    options = [
        *('--nproc_per_node', str(processes), '--max_restarts', str(restarts or 0)),
        # Once a process has ended, the others must end before they complain of it (they wait two seconds).
        *('--monitor_interval', '0.5'),
    ]
    if restarts or least != most:  # a rendezvous that can be held again
        # Else PyTorch 2.13 keeps one store for all rounds. Processes that start again read in it the addresses of those
        # that have ended, and wait for them; a machine that joins later waits for one that is never published.
        os.environ.setdefault('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
        if rank is not None:
            is_host = [f'is_host={int(rank == 0)}']
        else:  # torchrun finds out by this machine's name; where that has no address, it would fail
            is_host = [] if _has_address(socket.gethostname()) else [f'is_host={int(_has_address(address, here))}']
        configuration = ','.join([*is_host, 'join_timeout=600', 'last_call_timeout=5'])
        rendezvous = ('--rdzv_backend', 'c10d', '--rdzv_endpoint', f'{address}:{port}', '--rdzv_id', f'vheat-{port}')
        # The others are told this address, not this machine's name.
        own = ('--local_addr', here)
        return [*options, '--nnodes', f'{least}:{most}', *own, *rendezvous, '--rdzv_conf', configuration]
    static = ('--node_rank', str(rank or 0), '--master_addr', address, '--master_port', str(port))
    return [*options, '--nnodes', str(most), *static]


def _resumes_by_itself(command: list[str]) -> bool:
    if '--resume' not in command:
        return False
    following = command[command.index('--resume') + 1 :]
    return not following or following[0].startswith('-')


def _bounds(nodes: str) -> tuple[int, int]:
    parts = nodes.split(':')
    if len(parts) > 2 or not all(part.isdecimal() for part in parts) or not 1 <= int(parts[0]) <= int(parts[-1]):
        raise ValueError(f'NNODES={nodes!r} is neither a number of machines nor bounds such as 1:4')
    return int(parts[0]), int(parts[-1])


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value and not value.isdecimal():
        raise ValueError(f'{name}={value!r} is not a number')
    return int(value) if value else None


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def this_address(master: str) -> str:
    """The address that this machine has on its way to ``master``; nothing is sent.

    Raises:
        ValueError: There is no such machine, or no way to it.
    """
    try:
        family, *_, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f'MASTER_ADDR={master!r} cannot be reached from here: {error}') from error


def interface_of(address: str) -> str | None:
    """Name of the network interface with that IPv4 address, on Linux."""
    if not sys.platform.startswith('linux'):
        return None
    import fcntl

    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):  # has no address
            entry = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack('256s', name.encode()))
            if socket.inet_ntoa(entry[20:24]) == address:
                return name
    return None


def _has_address(name: str, address: str | None = None) -> bool:
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(name, None)}
    except OSError:
        return False
    return address is None or address in found


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
    if hasattr(args, 'shutdown_timeout'):  # PyTorch >= 2.11 or so; before, 30 seconds
        args.shutdown_timeout = SECONDS_TO_SAVE
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / 'stopped'
        os.environ.update(VHEAT_STOP_NOTE=str(note), VHEAT_RUN_STARTED=str(time.time()))
        try:
            torchrun.run(args)
        except ChildFailedError as error:
            return status_of(*error.get_first_failure())
        except SignalException as error:
            if note.exists():
                return REQUEUE
            print(f'ended by {error.sigval.name}', file=sys.stderr)
            return 128 + error.sigval
    return 0


def status_of(rank: int, failure: 'ProcessFailure') -> int:
    """Exit status for the process that failed first; says what it has not said itself."""
    if failure.exitcode in (USER_ERROR, REQUEUE):
        return failure.exitcode
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = '; the machine may have run out of memory' if name == 'SIGKILL' else ''
        print(f'error: process {rank} was ended by {name}{hint}', file=sys.stderr)
        return 128 - failure.exitcode
    print(f'error: process {rank} failed with status {failure.exitcode}', file=sys.stderr)
    return failure.exitcode


def main() -> int:
    """Read the command line and the environment; returns the exit status."""
    processes, *command = sys.argv[1:]
    try:
        options = torchrun_options(int(processes), command)
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return USER_ERROR
    share_cores(int(processes))
    return run([*options, *command])


if __name__ == '__main__':
    sys.exit(main())
