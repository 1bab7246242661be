"""For dist_train.sh and dist_test.sh: start the processes of a tool with torchrun.

    python tools/dist_run.py train CONFIG GPUS [options of tools/train.py]
    python tools/dist_run.py test CONFIG CHECKPOINT GPUS [options of tools/test.py]

Environment variables for several machines, as in OpenMMLab: NNODES (default 1), NODE_RANK (0), MASTER_ADDR
(127.0.0.1), PORT (a free one; 29500 for several machines). PYTHON names the interpreter. For torchrun's elasticity:

    MAX_RESTARTS=3   restart all processes, at most so often, if one of them dies; training resumes
    NNODES=1:4       run on the available machines, whose number may change within these bounds; needs --resume and no
                     NODE_RANK; MAX_RESTARTS is then 3 by default

The exit status is that of the process that failed first, or 75 if SIGTERM ended a training that saved its state or had
nothing to save. When this process is killed, the processes of the tool get SIGTERM. torchrun's own traceback is not
shown, because the process has printed its error.
"""

import contextlib
import logging
import os
import re
import runpy
import signal
import socket
import struct
import sys
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

ROOT = Path(__file__).resolve().parents[1]  # the repository, or vheat_mm/.mim of an installed package
PACKAGE = ROOT.parent if ROOT.name == '.mim' else ROOT / 'vheat_mm'
PROCESS = runpy.run_path(str(PACKAGE / 'utils' / 'process.py'))
REQUEUE = PROCESS['REQUEUE']
USER_ERROR = 2  # of vheat_mm.apis.errors, which needs torch
SIOCGIFADDR = 0x8915  # of netdevice(7)
SECONDS_TO_SAVE = 600  # after SIGTERM; a scheduler may send SIGKILL before


def torchrun_options(processes: int, command: list[str]) -> list[str]:
    """Options of torchrun from the environment. Raises ValueError for wrong values."""
    least, most = _bounds(os.environ.get('NNODES') or '1')
    rank, port, restarts = (_number(name) for name in ('NODE_RANK', 'PORT', 'MAX_RESTARTS'))
    if least != most:
        if not _resumes_automatically(command):
            raise ValueError(
                f'NNODES={least}:{most}: add --resume, without a path, so that machines that join later continue from '
                'the same checkpoint'
            )
        restarts = 3 if restarts is None else restarts  # the other machines restart when one leaves
    if (rank or 0) >= most:
        raise ValueError(f'NNODES={most} and NODE_RANK={rank}: ranks run from 0 to NNODES - 1')
    address = os.environ.get('MASTER_ADDR') or ('127.0.0.1' if most == 1 else '')
    if not address:
        raise ValueError(f'NNODES={most}: set MASTER_ADDR to the address of the machine with NODE_RANK=0')
    port = port or (free_port() if most == 1 else 29500)
    here = this_address(address)
    if most > 1 and (interface := interface_of(here)):
        # By default, gloo uses the address of the host name, which in a container is the loopback or unknown.
        os.environ.setdefault('GLOO_SOCKET_IFNAME', interface)
    options = [
        *('--nproc_per_node', str(processes), '--max_restarts', str(restarts or 0)),
        # If a process fails, torchrun must end the others before they report the lost connection (after two seconds).
        *('--monitor_interval', '0.5'),
    ]
    if restarts or least != most:  # a rendezvous that can be repeated
        # Otherwise PyTorch 2.13 shares one store among all rounds: restarted processes read the addresses of the ended
        # ones in it and wait for them, and a machine that joins later waits forever.
        os.environ.setdefault('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
        if rank is not None:
            is_host = [f'is_host={int(rank == 0)}']
        else:  # torchrun compares host names, which fails if this machine's name has no address
            is_host = [] if _has_address(socket.gethostname()) else [f'is_host={int(_has_address(address, here))}']
        configuration = ','.join([*is_host, 'join_timeout=600', 'last_call_timeout=5'])
        rendezvous = ('--rdzv_backend', 'c10d', '--rdzv_endpoint', f'{address}:{port}', '--rdzv_id', f'vheat-{port}')
        # Other machines connect to this address instead of the host name.
        own = ('--local_addr', here)
        return [*options, '--nnodes', f'{least}:{most}', *own, *rendezvous, '--rdzv_conf', configuration]
    static = ('--node_rank', str(rank or 0), '--master_addr', address, '--master_port', str(port))
    return [*options, '--nnodes', str(most), *static]


def _resumes_automatically(command: list[str]) -> bool:
    if '--resume' not in command:
        return False
    following = command[command.index('--resume') + 1 :]
    return not following or following[0].startswith('-')


def _bounds(nodes: str) -> tuple[int, int]:
    parts = nodes.split(':')
    if len(parts) > 2 or not all(part.isdecimal() for part in parts) or not 1 <= int(parts[0]) <= int(parts[-1]):
        raise ValueError(f'NNODES={nodes!r} must be a number of machines or bounds such as 1:4')
    return int(parts[0]), int(parts[-1])


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value and not value.isdecimal():
        raise ValueError(f'{name}={value!r} is not a number')
    return int(value) if value else None


def free_port() -> int:
    """An unused port of this machine."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def this_address(master: str) -> str:
    """The address from which this machine reaches ``master``; nothing is sent.

    Raises:
        ValueError: The machine is unknown or cannot be reached.
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
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
            contextlib.suppress(OSError),
        ):  # no address
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
    """Divide the cores among the processes unless OMP_NUM_THREADS is set; torchrun would give each one thread."""
    affinity = getattr(os, 'sched_getaffinity', None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores // processes)))
    os.environ.setdefault('MKL_NUM_THREADS', os.environ['OMP_NUM_THREADS'])


def run(options: list[str], training: bool) -> int:
    """Run torchrun; returns the exit status."""
    try:
        from torch.distributed import run as torchrun
        from torch.distributed.elastic.multiprocessing import api
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    except ModuleNotFoundError as error:
        remedy = 'activate the environment, or set PYTHON to its interpreter: PYTHON=.venv/bin/python'
        print(f'error: {sys.executable} has no {error.name}; {remedy}', file=sys.stderr)
        return USER_ERROR
    args = torchrun.parse_args(options)
    if hasattr(args, 'shutdown_timeout'):  # PyTorch >= 2.11 or so; 30 seconds in earlier versions
        args.shutdown_timeout = SECONDS_TO_SAVE
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    handle_signal = api._terminate_process_handler

    def handle_once(number: int, frame: object) -> None:
        if number == signal.SIGTERM:  # a second one would end torchrun's wait for the processes, which save their state
            signal.signal(number, signal.SIG_IGN)
        handle_signal(number, frame)

    api._terminate_process_handler = handle_once
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / 'stopped'
        launch = uuid.uuid4().hex  # by which restarted processes know their run
        os.environ.update(VHEAT_STOP_NOTE=str(note), VHEAT_LAUNCH_ID=launch, VHEAT_LAUNCHER=str(os.getpid()))
        if training:
            note.touch()
        try:
            torchrun.run(args)
        except ChildFailedError as error:
            status = status_of(*error.get_first_failure())
        except api.SignalException as error:
            status = 128 + error.sigval
            if note.exists() and error.sigval == signal.SIGTERM:
                status = REQUEUE
            else:
                print(f'ended by {error.sigval.name}', file=sys.stderr)
        else:
            return 0
        if status == REQUEUE and note.exists() and not note.read_text(encoding='utf-8'):
            print(f'ended by SIGTERM {PROCESS["NOTHING_TO_SAVE"]}', file=sys.stderr)
        return status


def status_of(rank: int, failure: 'ProcessFailure') -> int:
    """Exit status for the process that failed first; prints an error if the process could not."""
    if failure.exitcode >= 0:
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    hint = '; the machine may have run out of memory' if name == 'SIGKILL' else ''
    print(f'error: process {rank} was ended by {name}{hint}', file=sys.stderr)
    return 128 - failure.exitcode


def main() -> int:
    """Read the command line and the environment; returns the exit status."""
    tool, *arguments = sys.argv[1:]
    PROCESS['prepare_start'](training=tool == 'train')
    names = ['CONFIG', 'GPUS'] if tool == 'train' else ['CONFIG', 'CHECKPOINT', 'GPUS']
    place = len(names) - 1
    if len(arguments) <= place or not re.fullmatch('[1-9][0-9]*', arguments[place]):
        usage = f'tools/dist_{tool}.sh {" ".join(names)} [options of tools/{tool}.py]'
        print(f'usage: [NNODES= NODE_RANK= MASTER_ADDR= PORT=] {usage}', file=sys.stderr)
        return USER_ERROR
    processes = int(arguments.pop(place))
    command = [str(Path(__file__).resolve().with_name(f'{tool}.py')), '--launcher', 'pytorch', *arguments]
    try:
        options = torchrun_options(processes, command)
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return USER_ERROR
    share_cores(processes)
    return run([*options, *command], training=tool == 'train')


if __name__ == '__main__':
    sys.exit(main())
