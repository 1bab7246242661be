"""Imports inside the package follow its layers, and what users import is there."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vheat_mm

PACKAGE = Path(vheat_mm.__file__).parent
LAYERS = dict(apis=6, engine=5, models=4, checkpoint=3, datasets=3, ops=2, utils=1)
FACES = {'vheat_mm', 'vheat_mm.fsdp', 'vheat_mm.doctor'}
ANYWHERE = 'vheat_mm.version'  # holds a string and imports nothing
OPTIONAL = {  # late by need: triton and timm may be missing
    ('vheat_mm.ops.backends', 'vheat_mm.ops.triton'),
    ('vheat_mm', 'vheat_mm.apis.timm.vheat'),
}


def modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed, by its name."""
    found = {}
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
        name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
        found[name] = ast.parse(path.read_text(encoding='utf-8'), str(path))
    return found


def targets(node: ast.AST, importer: str, is_package: bool) -> list[str]:
    """Names that an import statement, or a call of ``import_module`` with a fixed name, imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ''
        if node.level:
            here = importer.split('.')
            here = here[: len(here) - node.level + is_package]
            base = '.'.join([*here, base]) if base else '.'.join(here)
        return [f'{base}.{alias.name}' for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        'importlib.import_module',
        'import_module',
        '__import__',
    ):
        name = node.args[0] if node.args else node.keywords[0].value
        name = name.values[0] if isinstance(name, ast.JoinedStr) else name  # the fixed beginning of an f-string
        text = str(name.value) if isinstance(name, ast.Constant) else ''
        return [f'vheat_mm.{text}'] if text.startswith('.') or len(node.args) > 1 else [text]
    return []


def own_imports(name: str, tree: ast.Module, known: set[str]) -> Iterator[tuple[str, bool, int]]:
    """``(module of ours, imported when this module is, line)`` of every import of our own in a module."""
    is_package = any(other.startswith(f'{name}.') for other in known)
    at_once = set()
    statements = list(tree.body)
    for node in statements:  # also those in `try` and `with`; not in functions, classes and `if TYPE_CHECKING`
        at_once.add(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not (
            isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)
        ):
            statements += [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child not in at_once]
    for node in ast.walk(tree):
        for target in targets(node, name, is_package):
            if target.split('.')[0] == 'vheat_mm':
                while target not in known and '.' in target:  # the module that holds the imported object
                    target = target.rpartition('.')[0]
                yield target, node in at_once, getattr(node, 'lineno', 0)


def layer(name: str) -> str:
    return name.split('.')[1]


def test_imports_go_down_the_layers_at_the_top_of_a_module():
    """No late import, no import of a higher layer or a face, no circle between modules."""
    trees = modules()
    assert {layer(name) for name in trees if name not in FACES | {ANYWHERE}} == set(LAYERS)
    faults, graph = [], {}
    for name, tree in trees.items():
        for target, at_once, line in sorted(set(own_imports(name, tree, set(trees)))):
            graph.setdefault(name, set()).add(target)
            here = f'{name}:{line} imports {target}'
            if not at_once and (name, target) not in OPTIONAL:
                faults.append(f'{here} late, not at the top of the module')
            if name in FACES or target == ANYWHERE:
                continue
            if target in FACES:
                faults.append(f'{here}, which is for users only')
            elif LAYERS[layer(target)] > LAYERS[layer(name)]:
                faults.append(f'{here}, a higher layer')
            elif {layer(name), layer(target)} == {'checkpoint', 'datasets'}:
                faults.append(f'{here}, the layer beside it')
    assert len(graph) > 50  # imports were found
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        faults.append(f'circle: {" <- ".join(error.args[1])}')
    assert not faults, '\n'.join(faults)


REGISTERED = dict(
    MODELS=['VHeat', 'MMDET_VHEAT', 'MMSEG_VHEAT', 'ClsTTAModel', 'InstanceSegTTAModel'],
    TRANSFORMS=['CropAt'],
    HOOKS=[
        'AnnotationCheckHook', 'AtomicCheckpointHook', 'CheckpointCheckHook', 'CompileBackboneHook',
        'NonFiniteGuardHook', 'ReproducibleHook', 'SkipBrokenSamplesHook', 'StopSignalHook',
    ],
    OPTIM_WRAPPERS=['CPUAmpOptimWrapper'],
    OPTIM_WRAPPER_CONSTRUCTORS=['LayerDecayOptimWrapperConstructor'],
)  # fmt: skip
USE = f"""
import os, sys
import mmengine.registry, mmengine.runner  # which import cv2 themselves
before = set(sys.modules)

for name in ('fast', 'reference', 'triton', 'quick'):  # before the package is imported: it reads the variable once
    if os.fork() == 0:
        os.environ['VHEAT_KERNELS'] = name
        try:
            from vheat_mm.ops import registry
            os._exit(registry.get_backend() != name)
        except ValueError as error:
            os._exit("VHEAT_KERNELS must be one of fast, reference, triton, got 'quick'" not in str(error))
    assert os.wait()[1] == 0, f'VHEAT_KERNELS={{name}}'

import vheat_mm
absent = {{'cv2', 'mmcv', 'mmdet', 'mmpretrain', 'mmseg', 'PIL', 'timm', 'torchvision', 'triton'}}
heavy = absent & (set(sys.modules) - before)
assert not heavy, f'importing vheat_mm imports {{heavy}}'
for registry, names in {REGISTERED}.items():
    for name in names:
        assert name in getattr(mmengine.registry, registry), name
from vheat_mm import VHeat, create_model, list_models
assert isinstance(create_model(list_models()[0], features_only=True), VHeat)
import vheat_mm.fsdp
assert mmengine.registry.STRATEGIES.get('ShardedStrategy') is vheat_mm.fsdp.ShardedStrategy
from vheat_mm.checkpoint import read_checkpoint
from vheat_mm.doctor import main
assert all(map(callable, (read_checkpoint, main)))
"""


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_what_users_import():
    """In a process of its own, where nothing else has imported or registered it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith('VHEAT_')}
    environment['PYTHONPATH'] = str(PACKAGE.parent)
    done = subprocess.run([sys.executable, '-c', USE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
