"""The package as users install it: sdist and wheel, and an environment with the wheel."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from interop import interop_folder
from tool_runs import REPO, run

sys.path.append(str(REPO / '.dev_scripts'))
import build_package


class Packages(NamedTuple):
    """Paths of both packages."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope='session')
def packages(tmp_path_factory) -> Packages:
    """Both packages, built from the source tree as it is."""
    return Packages(*build_package.build(tmp_path_factory.mktemp('packages')))


@dataclass(frozen=True)
class Environment:
    """A virtual environment that has the development environment's packages, but its own vheat_mm.

    Attributes:
        folder: Of the environment.
    """

    folder: Path

    @property
    def site(self) -> Path:
        return next(self.folder.glob('lib/python*/site-packages'))

    @property
    def mim(self) -> Path:
        """The wheel's configs, tools and model index."""
        return self.site / 'vheat_mm' / '.mim'

    def run(self, *command: object, cwd: Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
        """Run ``python`` (with options that start with '-') or a program of the environment, as :func:`tool_runs.run`.

        openmim and the other packages of requirements/interop.txt can be imported; the source tree cannot.
        """
        name, *arguments = command
        program = [self.folder / 'bin' / 'python', name] if str(name).startswith('-') else [self.folder / 'bin' / name]
        variables = dict(PYTHONPATH=str(interop_folder()), PYTHON=str(self.folder / 'bin' / 'python')) | variables
        return run(*program, *arguments, cwd=cwd, check=check, OMP_NUM_THREADS='1', **variables)


def environment(folder: Path, *install: object) -> Environment:
    """Make an :class:`Environment` in ``folder`` and install into it with these arguments of pip."""
    run(sys.executable, '-m', 'venv', '--without-pip', folder, cwd=folder.parent)
    made = Environment(folder)
    (made.site / 'development.pth').write_text(sysconfig.get_path('purelib') + '\n')
    options = ('--quiet', '--no-deps', '--no-build-isolation', '--no-warn-script-location')
    made.run('-m', 'pip', 'install', *options, *install, cwd=folder.parent)
    return made


@pytest.fixture(scope='session')
def installed(tmp_path_factory, packages) -> Environment:
    """An environment in which vheat_mm comes from the wheel."""
    return environment(tmp_path_factory.mktemp('installed') / 'env', packages.wheel)
