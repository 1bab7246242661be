"""The environment check reports broken packages and does not fail itself."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vheat_mm.apis import doctor
from vheat_mm.utils.errors import describe

REPO = Path(doctor.__file__).parents[2]


def run_doctor(*command, cwd, **environment):
    result = subprocess.run(
        [sys.executable, *command, '--json'],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'Traceback' not in result.stderr
    report = json.loads(result.stdout)
    return result.returncode, {row['name']: row for row in report['rows']}, report


def test_this_environment(tmp_path):
    status, rows, report = run_doctor('-m', 'vheat_mm.doctor', cwd=tmp_path, PYTHONPATH=str(REPO))
    assert list(rows) == list(doctor.CHECKS)
    assert (status, report['core_works']) == (0, True)
    assert {rows[name]['status'] for name in doctor.CORE} <= {'ok', 'warn'}
    assert rows['safe torch.load']['status'] == 'ok'
    assert not any(row['remedy'] for row in rows.values() if row['status'] == 'ok')
    assert all(row['remedy'] for row in rows.values() if row['status'] != 'ok')


def test_broken_torch_is_a_row_not_a_traceback(tmp_path):
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch' / '__init__.py').write_text("raise OSError('libtorch.so: cannot open')")
    # The package imports torch at its top, so it is the file that is run here.
    status, rows, _ = run_doctor(doctor.__file__, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert status == 1
    assert rows['PyTorch']['status'] == 'broken'
    assert 'libtorch.so: cannot open' in rows['PyTorch']['found']
    assert rows['VHeat']['status'] == 'broken'


def test_absent_library_is_missing_and_does_not_decide(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmdet', None)
    (row,) = doctor.examine({'mmdet': doctor.CHECKS['mmdet']})
    assert row.status == 'missing'
    assert re.search("pip install '(mmdet|onedl-mmdetection)<", row.remedy)
    assert doctor.core_works([row])


def test_import_that_exits_is_broken(tmp_path, monkeypatch):
    (tmp_path / 'exits_early.py').write_text('import sys; print("noise"); sys.exit(3)')
    monkeypatch.syspath_prepend(tmp_path)
    (row,) = doctor.examine({'x': lambda: doctor.check_optional('exits_early', 'for a test')})
    assert (row.status, row.found) == ('broken', 'for a test: SystemExit: 3')


def test_setuptools_without_what_mmengine_imports(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    row = doctor.CHECKS['pkg_resources']()
    assert (row.status, row.remedy) == ('missing', "pip install 'setuptools<81'")
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module('pkg_resources')
    assert "pip install 'setuptools<81'" in describe(caught.value)


def test_mmcv_compiled_for_another_torch(monkeypatch):
    load = doctor.load

    def fail(name):
        if name == 'mmcv.ops':
            raise doctor.ImportFailedError(name, ImportError('_ext.so: undefined symbol: _ZN3c10'))
        return load(name)

    monkeypatch.setattr(doctor, 'load', fail)
    monkeypatch.setattr(doctor, 'distribution_version', lambda name: '2.1.0')
    row = doctor.check_mmcv_ops()
    assert row.status == 'broken'
    assert row.found.startswith('compiled for another torch')
    assert 'build_mmcv.sh' in row.remedy


def test_two_opencv_wheels(monkeypatch):
    pytest.importorskip('cv2')
    both = {'opencv-python', 'opencv-python-headless'}
    monkeypatch.setattr(doctor, 'distribution_version', lambda n: '1.0' if n in both else '')
    row = doctor.check_cv2()
    assert row.status == 'warn'
    assert 'pip uninstall -y opencv-python opencv-python-headless' in row.remedy


REQUIRED = {
    'vheat_mm': ['torch>=2.1', 'mmengine>=0.10.4', 'mmdet<3.4.0,>=3.1.0; extra == "det"'],
    'mmdet': ['mmcv<2.2.0,>=2.0.0; extra == "mim"', 'mmengine<1.0.0,>=0.7.1; extra == "mim"'],
    # Of the forks: an extra that nothing here needs, another interpreter, and the fork's name for mmcv.
    'onedl-mmpretrain': [
        'torch==2.10.0; extra == "torch"',
        'numpy<1; python_version < "3"',
        'onedl-mmcv!=2.1.5; extra == "mminstall"',
    ],
}


@pytest.fixture
def installed(monkeypatch):
    """Metadata of the packages in ``REQUIRED``, and of no others."""

    def requires(name: str) -> list[str]:
        if name not in REQUIRED:
            raise importlib.metadata.PackageNotFoundError(name)
        return REQUIRED[name]

    doctor.supported.cache_clear()
    monkeypatch.setattr(importlib.metadata, 'requires', requires)
    yield
    doctor.supported.cache_clear()


@pytest.mark.parametrize(
    ('package', 'version', 'fault'),
    [
        ('mmcv', '2.1.0', ''),
        ('mmcv', '2.1.5', 'not in !=2.1.5,<2.2.0,>=2.0.0'),
        ('mmcv', '1.7.2', 'not in !=2.1.5,<2.2.0,>=2.0.0'),
        ('torch', '2.13.0+cpu', ''),
        ('torch', '1.13.1', 'not in >=2.1'),
        ('mmengine', '0.10.10', ''),
        ('mmengine', '0.9.0', 'not in <1.0.0,>=0.10.4,>=0.7.1'),
        ('numpy', '1.0', ''),  # required by none of them
    ],
)
def test_version_ranges_come_from_metadata(installed, package, version, fault):
    assert doctor.range_fault(package, version) == fault


@pytest.mark.parametrize(
    ('versions', 'found', 'remedy'),
    [
        ({'onedl-mmdetection': '3.5.1'}, '3.5.1 (onedl-mmdetection)', ''),
        (
            {'onedl-mmdetection': '3.5.1', 'mmdet': '3.3.0'},
            '3.5.1: mmdet and onedl-mmdetection are both installed, over each other',
            'pip uninstall -y mmdet onedl-mmdetection; pip install --no-deps onedl-mmdetection',
        ),
        ({'mmdet': '3.3.0'}, '3.5.1', ''),
    ],
)
def test_forks_with_the_same_import_name(installed, monkeypatch, versions, found, remedy):
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.delitem(REQUIRED, 'vheat_mm')
    monkeypatch.setattr(importlib.metadata, 'version', version)
    monkeypatch.setitem(sys.modules, 'mmdet', SimpleNamespace(__version__='3.5.1'))
    row = doctor.check_package('mmdet', ('mmdet',), 'mmdet')
    assert (row.found, row.remedy, row.status) == (found, remedy, 'warn' if remedy else 'ok')
    assert doctor.distribution_version('mmdet') == versions.get('mmdet', '3.5.1')


def test_what_is_missing_beside_forks_is_installed_from_forks(installed, monkeypatch):
    monkeypatch.setattr(doctor, 'distribution_version', {'onedl-mmengine': '0.10.12'}.get)
    assert doctor.install('mmdet') == "pip install 'onedl-mmdetection<3.4.0,>=3.1.0'"
    assert 'pip install --no-build-isolation --no-binary onedl-mmcv ' in doctor.build_mmcv()


def test_source_folder_that_is_not_installed(installed, monkeypatch):
    monkeypatch.delitem(REQUIRED, 'vheat_mm')
    monkeypatch.setattr(doctor, 'distribution_version', lambda name: '')
    row = doctor.check_metadata()
    assert (row.status, row.found) == ('warn', 'not installed: supported versions are unknown')
    assert doctor.range_fault('torch', '1.0') == ''
    assert doctor.install('torch') == 'pip install torch'


def test_without_packaging(installed, monkeypatch):
    monkeypatch.setattr(doctor, 'SpecifierSet', None)
    monkeypatch.setattr(doctor, 'distribution_version', lambda name: '0.1.0')
    assert doctor.check_metadata().remedy == 'pip install packaging'
    assert doctor.check_python().status == 'ok'
    assert doctor.range_fault('torch', '1.0') == ''


def test_core_failure_decides_the_exit_status(monkeypatch, capsys):
    def fails():
        raise RuntimeError('first line\nsecond line')

    rows = doctor.examine({'VHeat': fails})
    monkeypatch.setattr(doctor, 'examine', lambda: rows)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert 'broken   VHeat  RuntimeError: first line' in text
    assert 'second line' not in text
