"""Build the sdist and, from it, the wheel, and check both: .dev_scripts/build_package.py [FOLDER]

Without FOLDER they are only checked. It needs no network and leaves nothing in the source tree.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def sources() -> list[str]:
    """The project's files, relative to ``REPO``: what git does not ignore, or what the sdist lists."""
    git = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
    if (REPO / '.git').exists():
        names = subprocess.run(git, cwd=REPO, check=True, capture_output=True, text=True).stdout.splitlines()
    else:
        names = (REPO / 'vheat_mm.egg-info' / 'SOURCES.txt').read_text(encoding='utf-8').splitlines()
    return [name for name in names if (REPO / name).is_file() and '.egg-info/' not in name]


def build(folder: Path) -> tuple[Path, Path]:
    """Build into ``folder``; returns the paths of sdist and wheel. Raises CalledProcessError, with the output."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as copy:  # setuptools would take up files that earlier builds left in the tree
        for name in sources():
            target = Path(copy, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, target)
        code = f'from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})'
        _quiet(sys.executable, '-c', code, cwd=copy)
    (sdist,) = folder.glob('vheat_mm-*.tar.gz')
    options = ('--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir', str(folder))
    _quiet(sys.executable, '-m', 'pip', 'wheel', *options, str(sdist), cwd=folder)
    (wheel,) = folder.glob('vheat_mm-*.whl')
    return sdist, wheel


def _quiet(*command: str, cwd: Path | str) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep='\n', file=sys.stderr)
        done.check_returncode()


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        packages = [str(path) for path in build(Path(scratch))]
        subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', *packages], check=True)
        program = Path(sysconfig.get_path('scripts'), 'check-wheel-contents')
        subprocess.run([str(program), packages[1]], cwd=REPO, check=True)  # configured in pyproject.toml
        for folder in arguments:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for package in packages:
                print(shutil.copy2(package, folder))


if __name__ == '__main__':
    main(sys.argv[1:])
