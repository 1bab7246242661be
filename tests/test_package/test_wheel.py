"""The built package: what it holds, and that commands, tools and OpenMMLab's mim work from it alone."""

import email
import html.parser
import importlib.metadata
import json
import os
import shutil
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import build_package
import markdown
import pytest
from interop import interop_folder, skip_or_fail
from mmengine.config import Config
from package_env import environment
from stand_ins import serve, write_release
from tool_runs import REPO, run, write_config

from vheat_mm.checkpoint.released import BASE

NAME = 'mask-rcnn_vheat-t_fpn_1x_coco'
ONE_ITERATION = (
    'train_cfg.max_epochs=1',
    'train_dataloader.dataset.indices=2',
    'val_dataloader.persistent_workers=False',  # without workers, which our own tools correct
)


def test_sdist_is_the_source_tree_and_the_wheel_is_whole(packages):
    sources = set(build_package.sources())
    with tarfile.open(packages.sdist) as archive:
        found = {str(Path(*Path(entry.name).parts[1:])) for entry in archive if entry.isfile()}
    made = {name for name in found if name.startswith('vheat_mm.egg-info/')} | {'PKG-INFO', 'setup.cfg'}
    assert found - made == sources
    with zipfile.ZipFile(packages.wheel) as archive:
        found = {name for name in archive.namelist() if '.dist-info/' not in name}
    tops = ('configs/', 'tools/', 'model-index.yml')
    assert found == {name for name in sources if name.startswith('vheat_mm/')} | {
        f'vheat_mm/.mim/{name}' for name in sources if name.startswith(tops)
    }
    assert 'vheat_mm/py.typed' in found


def test_a_build_takes_up_nothing_that_an_earlier_one_left(tmp_path):
    for name in ('vheat_mm/gone.py', 'vheat_mm/.mim/configs/gone.py'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    run(sys.executable, 'setup.py', '--quiet', 'build_py', '--build-lib', tmp_path, cwd=REPO)
    assert (tmp_path / 'vheat_mm' / '.mim' / 'configs' / 'detection').is_dir()
    assert list(tmp_path.rglob('gone.py')) == []


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found += [value for name, value in attributes if name in ('href', 'src')]


def test_description_has_no_link_that_an_index_cannot_resolve(packages):
    with zipfile.ZipFile(packages.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith('/METADATA'))
        text = email.message_from_bytes(archive.read(name)).get_payload()
    links = _Links()
    links.feed(markdown.markdown(text, extensions=['tables', 'fenced_code']))
    assert 'https://arxiv.org/abs/2405.16555' in links.found
    assert [link for link in links.found if not link.startswith(('https://', '#'))] == []
    assert 'docs/security.md' in text  # the name of what was linked


def test_console_commands(installed, tmp_path):
    report = json.loads(installed.run('vheat-doctor', '--json', cwd=tmp_path).stdout)
    assert report['core_works']
    code = 'import importlib.util; print(importlib.util.find_spec("vheat_mm").origin)'
    assert Path(installed.run('-c', code, cwd=tmp_path).stdout.strip()) == installed.site / 'vheat_mm' / '__init__.py'
    write_release(tmp_path, ['vheat_tiny'], flat=True)
    command = ('interpolate4downstream', '--pt_pth', 'vheat_tiny', '--tg_pth', 'out.pth', '--tg_size', '256')
    done = installed.run(*command, cwd=tmp_path, VHEAT_WEIGHTS=str(tmp_path))
    assert "written to 'out.pth'" in done.stdout
    assert (tmp_path / 'out.pth').is_file()


def test_mim_finds_models_and_runs_tools(installed, tmp_path):
    assert 'vheat-mm' in installed.run('-m', 'mim', 'list', cwd=tmp_path).stdout
    installed.run('-m', 'mim', 'search', 'vheat_mm', '--json', 'found.json', cwd=tmp_path)
    assert json.loads((tmp_path / 'found.json').read_text())['coco/box_ap'][NAME] == 45.1
    config = installed.mim / 'configs' / 'classification' / 'vheat-t_16xb128_in1k.py'
    done = installed.run('-m', 'mim', 'run', 'vheat_mm', 'get_flops', config, '--shape', '64', '64', cwd=tmp_path)
    assert f'{installed.mim}/tools/analysis_tools/get_flops.py' in done.stdout
    assert '30.85 M' in done.stdout


def test_mim_download(installed, tmp_path):
    release = write_release(tmp_path / 'release', [NAME])
    metafile = installed.mim / 'configs' / 'detection' / 'metafile.yml'
    before = metafile.read_text()
    with serve(release) as server:
        metafile.write_text(before.replace(BASE, f'{server.url}/'))
        try:
            command = ('-m', 'mim', 'download', 'vheat_mm', '--config', NAME, '--dest', 'got')
            installed.run(*command, cwd=tmp_path)
        finally:
            metafile.write_text(before)
    published = release / 'vheatdet' / 'vHeat_tiny_det.pth'
    assert (tmp_path / 'got' / published.name).read_bytes() == published.read_bytes()
    assert Config.fromfile(tmp_path / 'got' / f'{NAME}.py').model.backbone.type == 'VHeat'


def test_mim_trains_by_mmdet(installed, tmp_path, data):
    pytest.importorskip('mmdet')
    # mmdet's tools import torchvision, whose operators may not match the torch of this environment.
    (tmp_path / 'mend.py').write_text('from vheat_mm.utils.torchvision import ensure_torchvision as e\ne()\n')
    write_config(tmp_path, 'detection', data, "custom_imports = dict(imports=['vheat_mm', 'mend'])", installed.mim)
    options = ('--work-dir', 'run', '--cfg-options', *ONE_ITERATION)
    path = os.pathsep.join([str(interop_folder()), str(tmp_path)])
    installed.run('-m', 'mim', 'train', 'mmdet', 'detection.py', *options, cwd=tmp_path, PYTHONPATH=path)
    assert (tmp_path / 'run' / 'epoch_1.pth').is_file()


def test_mim_trains_and_tests_by_the_tools_of_the_wheel(installed, tmp_path, data):
    pytest.importorskip('mmpretrain')
    write_config(tmp_path, 'classification', data, root=installed.mim)
    options = ('--work-dir', 'run', '--cfg-options', 'train_cfg.max_epochs=1')
    done = installed.run('-m', 'mim', 'train', 'vheat_mm', 'classification.py', *options, cwd=tmp_path)
    assert f'{installed.mim}/tools/train.py' in done.stdout
    checkpoint = tmp_path / 'run' / 'epoch_1.pth'
    done = installed.run('-m', 'mim', 'test', 'vheat_mm', 'classification.py', '--checkpoint', checkpoint, cwd=tmp_path)
    assert 'accuracy/top1' in done.stdout
    script = installed.mim / 'tools' / 'dist_test.sh'
    assert os.access(script, os.X_OK)
    program = str(installed.folder / 'bin' / 'python')
    done = run(script, 'classification.py', checkpoint, 1, cwd=tmp_path, PYTHON=program, PYTHONPATH='')
    assert 'accuracy/top1' in done.stdout


def test_editable_install_links_to_the_sources(tmp_path):
    tree = tmp_path / 'tree'
    for name in build_package.sources():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, target)
    made = environment(tmp_path / 'env', '--editable', tree)
    links = {path.name: path.readlink() for path in (tree / 'vheat_mm' / '.mim').iterdir()}
    assert links == {name: Path('..', '..', name) for name in ('configs', 'tools', 'model-index.yml')}
    assert 'vheat-mm' in made.run('-m', 'mim', 'list', cwd=tmp_path).stdout
    code = 'from mmengine.utils import get_installed_path as f; print(f("vheat_mm"))'
    assert made.run('-c', code, cwd=tmp_path).stdout.strip() == str(tree / 'vheat_mm')


def test_install_without_links_where_the_tree_cannot_be_changed(tmp_path):
    tree = tmp_path / 'tree'
    for name in build_package.sources():
        if name.startswith('vheat_mm/') or '/' not in name:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, tree / name)
    (tree / 'vheat_mm' / '.mim').touch()  # as root, a read-only folder can be written
    made = environment(tmp_path / 'env', '--editable', tree)
    assert list(made.site.glob('vheat_mm-*.dist-info'))


def test_empty_environment(packages, tmp_path):
    """pip finds what the wheel needs; the rest of the stack is missing there, and nothing but it."""
    venv.create(tmp_path / 'env', with_pip=True)
    program = tmp_path / 'env' / 'bin'
    # The version of torch that is here, since the newest is some gigabytes with CUDA.
    (tmp_path / 'constraints.txt').write_text(f'torch=={importlib.metadata.version("torch")}\n')
    options = ('--quiet', '--no-compile', '--disable-pip-version-check', '--constraint', 'constraints.txt')
    command = (program / 'python', '-m', 'pip', 'install', *options, packages.wheel)
    done = run(*command, cwd=tmp_path, check=False, PYTHONPATH='')
    if done.returncode and 'onnect' in done.stderr:
        skip_or_fail(f'pip reaches no package index: {done.stderr[-300:]}')
    assert done.returncode == 0, done.stderr
    code = (
        'import sys, torch, vheat_mm\n'
        'model = vheat_mm.create_model("vheat_tiny", num_classes=3).eval()\n'
        'print(*model(torch.zeros(1, 3, 64, 64)).shape, vheat_mm.__file__)\n'
        'assert not {"mmcv", "mmdet", "timm"} & set(sys.modules)'
    )
    printed = run(program / 'python', '-c', code, cwd=tmp_path, PYTHONPATH='').stdout.split()
    assert printed[:2] == ['1', '3']
    assert Path(printed[2]).is_relative_to(tmp_path)
    report = json.loads(run(program / 'vheat-doctor', '--json', cwd=tmp_path, PYTHONPATH='').stdout)
    assert report['core_works']
    assert {row['name'] for row in report['rows'] if row['status'] == 'missing'} >= {'mmcv', 'mmdet'}
    assert '--tg_size' in run(program / 'interpolate4downstream', '--help', cwd=tmp_path, PYTHONPATH='').stdout
    shutil.rmtree(tmp_path / 'env')  # a gigabyte, which pytest would keep for three runs
