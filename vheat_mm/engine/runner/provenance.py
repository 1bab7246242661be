"""What a run was made with, in its log and beside it: code, packages, command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import Runner
from mmengine.utils.dl_utils import collect_env

import vheat_mm
from vheat_mm.engine.fileio import AtomicLocalBackend


def git_state(folder: Path) -> str | None:
    """Commit of the repository that ``folder`` is in, with the number of files that differ; ``None`` outside of one."""
    try:
        run = [
            subprocess.run(['git', '-C', str(folder), *command], capture_output=True, text=True, check=True, timeout=20)
            for command in (['rev-parse', 'HEAD'], ['status', '--porcelain', '--untracked-files=no'])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    commit, changed = run[0].stdout.strip(), len(run[1].stdout.splitlines())
    return f'{commit}, {changed} files changed since' if changed else commit


def log_provenance(runner: Runner, argv: list[str]) -> None:
    """Log the state of the code, and write all of it to ``environment.json`` in the folder of this start's logs.

    MMEngine logs the environment and the config; neither says which commit of this package, nor of the user's code.

    Args:
        runner: Built, not yet running.
        argv: The command line.
    """
    if runner.rank != 0:
        return
    package = Path(vheat_mm.__file__).parent
    state: dict[str, Any] = dict(
        command=argv,
        vheat_mm=vheat_mm.__version__,
        commit_of_vheat_mm=git_state(package),
        commit_of_working_directory=git_state(Path.cwd()),
        seed=runner.seed,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        processes=runner.world_size,
    )
    runner.logger.info(
        f'vheat_mm {state["vheat_mm"]} (commit {state["commit_of_vheat_mm"]}), '
        f'working directory at commit {state["commit_of_working_directory"]}, seed {state["seed"]}, '
        f'{"deterministic" if state["deterministic"] else "not deterministic"}, {state["processes"]} processes'
    )
    state.update(environment={key: str(value) for key, value in collect_env().items()}, python=sys.version)
    AtomicLocalBackend().put_text(json.dumps(state, indent=2), Path(runner.log_dir) / 'environment.json')
