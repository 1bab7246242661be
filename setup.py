"""What pyproject.toml cannot say: configs and tools in the package, and README as a package index can show it."""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildPy(build_py):
    """Put configs, tools and the model index where OpenMMLab's tools look for them: into ``vheat_mm/.mim``.

    A wheel holds them as files. An editable install has relative links to them in the source tree.
    """

    NAMES = ('configs', 'tools', 'model-index.yml')

    def run(self) -> None:
        if not self.editable_mode:  # an earlier build may have left what is gone or renamed now
            shutil.rmtree(Path(self.build_lib) / 'vheat_mm', ignore_errors=True)
        super().run()
        mim = (HERE if self.editable_mode else Path(self.build_lib)) / 'vheat_mm' / '.mim'
        if self.editable_mode:
            self._link(mim)
            self._name_place()
            return
        mim.mkdir()
        for name in self.NAMES:
            if (HERE / name).is_dir():
                shutil.copytree(HERE / name, mim / name, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy2(HERE / name, mim)

    def _link(self, mim: Path) -> None:
        try:
            mim.mkdir(exist_ok=True)
            for name in self.NAMES:
                link = mim / name
                if not (link.is_symlink() and link.exists()):
                    link.unlink(missing_ok=True)
                    link.symlink_to(Path('..', '..', name), target_is_directory=(HERE / name).is_dir())
        except OSError as error:  # a read-only source tree; all but OpenMMLab's tools works without the links
            self.warn(f'{mim} not made, so configs cannot be found by name in this install: {error}')

    def _name_place(self) -> None:
        """Lead OpenMMLab's tools, which join the install's folder and the first line of this file, to the sources."""
        for file in Path(self.get_finalized_command('install').install_lib).glob('*.dist-info/top_level.txt'):
            file.write_text(f'{HERE / "vheat_mm"}\nvheat_mm\n', encoding='utf-8')


def description() -> str:
    """README without links that only the repository resolves: a package index shows the file's name instead."""

    def plain(link: re.Match) -> str:
        code, image, text, target = link.groups()
        if code or target.startswith(('https://', 'http://', '#')):
            return link[0]
        return '' if image else text if target.split('#')[0] in text else f'{text} ({target})'

    readme = (HERE / 'README.md').read_text(encoding='utf-8')
    return re.sub(r'(```.*?```)|(!?)\[([^]]*)\]\(([^)\s]+)\)', plain, readme, flags=re.DOTALL)


setup(
    long_description=description(),
    long_description_content_type='text/markdown',
    cmdclass={'build_py': BuildPy},
)
