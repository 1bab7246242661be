"""Package metadata. It never imports torch, so it also builds where torch is not installed yet."""

import os
import re
import shutil
from pathlib import Path

from setuptools import Command, find_packages, setup
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


class Build(build):
    sub_commands = [*build.sub_commands, ('build_mim', None)]  # noqa: RUF012


def read_version() -> str:
    """Return the literal in ``vheat_mm/version.py`` without importing the package."""
    text = (HERE / 'vheat_mm' / 'version.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__ = '([^']+)'$", text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError("vheat_mm/version.py holds no line `__version__ = '...'`")
    return match.group(1)


def read_readme() -> str:
    readme = HERE / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.is_file() else ''


# mmcv is in no extra on purpose: its compiled ops must match the torch that is already there, and
# pip's isolated build would build an mmcv without them, without a warning. `python -m vheat_mm.doctor`
# shows what is missing and how to install it.
EXTRAS = {
    'det': ['mmdet>=3.1.0,<3.4.0'],
    # mmseg imports ftfy and regex but does not list them as requirements.
    'seg': ['mmsegmentation>=1.1.0,<1.3.0', 'ftfy', 'regex'],
    'cls': ['mmpretrain>=1.1.0,<1.3.0'],
    'hub': ['safetensors>=0.4', 'huggingface_hub>=1.0'],
    'demo': ['scikit-image>=0.22', 'scipy>=1.10', 'pycocotools>=2.0.7', 'matplotlib>=3.7'],
    'dev': ['pytest>=8', 'pytest-benchmark>=4', 'scipy>=1.10', 'ruff>=0.9', 'mypy>=1.10', 'pre-commit>=3.5'],
    # torch's CUDA builds bring it; on the CPU its interpreter runs the kernels' tests
    'triton': ['triton>=3.7'],
}
EXTRAS['all'] = sorted({name for group in ('det', 'seg', 'cls', 'hub') for name in EXTRAS[group]})

setup(
    name='vheat_mm',
    version=read_version(),
    description='vHeat (visual heat conduction) backbones for MMDetection, MMSegmentation and MMPretrain',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=find_packages(include=['vheat_mm', 'vheat_mm.*']),
    scripts=['interpolate4downstream.py'],
    python_requires='>=3.10',
    install_requires=['torch>=2.1', 'mmengine>=0.10.4,<1.0.0'],
    extras_require=EXTRAS,
    keywords=['vHeat', 'OpenMMLab', 'object detection', 'semantic segmentation', 'backbone'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    cmdclass={'build': Build, 'build_mim': BuildMim},
    zip_safe=False,
)
