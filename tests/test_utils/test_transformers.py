"""transformers that is too new for mmpretrain, which imports it wherever it is installed."""

import subprocess
import sys
from types import ModuleType

import pytest
from interop import interop_env

from vheat_mm.utils import transformers

IMPORTS = """
import sys
import vheat_mm
assert 'mmpretrain' not in sys.modules
from vheat_mm.utils.torchvision import ensure_torchvision
ensure_torchvision()
import mmdet.models, mmpretrain.models
from mmpretrain.registry import MODELS
assert {'RTMDet', 'ResNet'} <= set(mmdet.registry.MODELS.module_dict) | set(MODELS.module_dict)
try:
    MODELS.build(dict(type='BlipCaption'))
except ImportError as error:
    print(error)
from vheat_mm.apis.doctor import check_transformers
print(check_transformers())
"""


def test_detectors_import_beside_transformers_5():
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', IMPORTS], env=interop_env(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert said.count('they are switched off') == 1
    assert 'requires extra multi-modal dependencies' in said
    assert "Row(name='transformers', status='warn'" in said
    assert 'import vheat_mm before mmdet' in said


@pytest.mark.parametrize(
    ('mmpretrain', 'place', 'limit'),
    [('1.2.0', 'transformers.modeling_utils', '4.55'), ('1.3.6', 'transformers.pytorch_utils', '5')],
)
def test_multimodal_models_stay_on_with_a_transformers_that_fits(monkeypatch, mmpretrain, place, limit):
    library, names, version = ModuleType('transformers'), ModuleType(place), ModuleType('mmpretrain.version')
    library.__version__, version.__version__ = '4.30.0', mmpretrain
    for module in (library, names, version):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in transformers._NEEDED:
        assert transformers.multimodal_fault()[1] == f'transformers<{limit}'
        setattr(names, name, None)
    assert transformers.multimodal_fault() is None


def test_transformers_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    assert 'does not import' in transformers.multimodal_fault()[0]
