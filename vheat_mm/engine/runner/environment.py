"""Record of a run: versions of code and packages, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.runner import Runner
from mmengine.utils.dl_utils import collect_env

from vheat_mm.engine.fileio import AtomicLocalBackend
from vheat_mm.version import __version__


def git_state(folder: Path) -> str | None:
    """Commit of the repository of ``folder`` and its number of changed files; ``None`` outside of a repository."""
    try:
        commit, changed = (
            subprocess.run(
                ['git', '-C', str(folder), *command], capture_output=True, text=True, check=True, timeout=20
            ).stdout.splitlines()
            for command in (['rev-parse', 'HEAD'], ['status', '--porcelain', '--untracked-files=no'])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f'{commit[0]}, {len(changed)} files changed since' if changed else commit[0]


def log_environment(runner: Runner, argv: list[str]) -> None:
    """Log the versions of the code, and write them with the environment to ``environment.json`` in the log folder.

    MMEngine logs the environment and the config, but not the commits of this package and of the user's code.

    Args:
        runner: Built, not yet running.
        argv: The command line.
    """
    if runner.rank != 0:
        return
    state = dict(
        command=argv,
        vheat_mm=__version__,
        commit_of_vheat_mm=git_state(Path(__file__).parent),
        commit_of_working_directory=git_state(Path.cwd()),
        seed=runner.seed,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        processes=runner.world_size,
        environment={key: str(value) for key, value in collect_env().items()},
        python=sys.version,
    )
    runner.logger.info(
        f'vheat_mm {__version__} (commit {state["commit_of_vheat_mm"] or "unknown"}), '
        f'working directory at commit {state["commit_of_working_directory"] or "unknown"}, seed {runner.seed}, '
        f'{"deterministic" if state["deterministic"] else "not deterministic"}, processes: {runner.world_size}'
    )
    AtomicLocalBackend().put_text(json.dumps(state, indent=2), Path(runner.log_dir) / 'environment.json')
