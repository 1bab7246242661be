"""What pyproject.toml cannot say: configs and tools in the package, and README as a package index can show it."""

import os
import re
import shutil
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

HERE = Path(__file__).resolve().parent
MIM = 'vheat_mm/.mim'


class BuildMim(Command):
    """Put configs, tools and the model index where OpenMMLab's tools look for them: into ``vheat_mm/.mim``.

    A wheel holds them as files. An editable install has relative links to them in the source tree.
    """

    description = 'configs, tools and model index below vheat_mm/.mim'
    user_options = ()
    editable_mode = False
    NAMES = ('configs', 'tools', 'model-index.yml')
    SUFFIXES = ('.py', '.sh', '.yml')

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options('build_py', ('build_lib', 'build_lib'))

    def get_source_files(self) -> list[str]:
        """All files, relative to the source tree; an sdist holds them."""
        found = [HERE / name for name in self.NAMES]
        found += [path for top in found for path in sorted(top.rglob('*'))]
        return [str(path.relative_to(HERE)) for path in found if path.is_file() and path.suffix in self.SUFFIXES]

    def get_output_mapping(self) -> dict[str, str]:
        return {os.path.join(self.build_lib, MIM, source): source for source in self.get_source_files()}  # noqa: PTH118

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping())

    def run(self) -> None:
        if self.editable_mode:
            self._link()
            self._name_place()
            return
        shutil.rmtree(Path(self.build_lib, MIM), ignore_errors=True)  # an earlier build may hold what is renamed now
        for target, source in self.get_output_mapping().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def _link(self) -> None:
        try:
            folder = HERE / MIM
            folder.mkdir(exist_ok=True)
            for name in self.NAMES:
                link = folder / name
                if not (link.is_symlink() and link.exists()):
                    link.unlink(missing_ok=True)
                    link.symlink_to(Path('..', '..', name), target_is_directory=(HERE / name).is_dir())
        except OSError as error:  # a read-only source tree; all but OpenMMLab's tools works without the links
            self.warn(f'{MIM} not made, so configs cannot be found by name in this install: {error}')

    def _name_place(self) -> None:
        """Lead OpenMMLab's tools, which join the install's folder and the first line of this file, to the sources."""
        for file in Path(self.get_finalized_command('install').install_lib).glob('*.dist-info/top_level.txt'):
            file.write_text(f'{HERE / "vheat_mm"}\nvheat_mm\n', encoding='utf-8')


class Build(build):
    sub_commands = [*build.sub_commands, ('build_mim', None)]  # noqa: RUF012


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
    cmdclass={'build': Build, 'build_mim': BuildMim},
)
