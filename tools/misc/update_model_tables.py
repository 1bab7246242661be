"""Write README's tables of models from the metafiles, or check that they are up to date.

    python tools/misc/update_model_tables.py            write the tables between the markers of README.md
    python tools/misc/update_model_tables.py --check    exit with 1 where README.md would change

Every column says whether its numbers are published or measured, and every number's `Origin` in its metafile must agree.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
BEGIN = '<!-- tables from the metafiles: tools/misc/update_model_tables.py -->'
END = '<!-- end of the tables -->'
ORIGINS = ('measured', 'published')
# Metadata that is no number with an origin, and its types; Architecture begins with the backbone.
KINDS = {'Architecture': list, 'Epochs': int, 'Iterations': int, 'Batch Size': int, 'Input Size': list, 'Origin': dict}
NOT_NUMBERS = {*KINDS, 'Training Data'}


class MetafileError(Exception):
    """A metafile that cannot be trusted; the message names file, model and remedy."""


@dataclass
class Model:
    """One entry of a metafile, checked.

    Attributes:
        numbers: Metadata that has an origin, and the metrics of all results.
        origins: Origin of every number, ``measured`` or ``published``.
        where: File and model, for errors.
    """

    name: str
    config: str
    weights: str | None
    metadata: dict[str, Any]
    numbers: dict[str, float]
    origins: dict[str, str]
    where: str


@dataclass
class Column:
    """A column of numbers with one origin.

    Attributes:
        title: Heading, which the origin is added to.
        keys: Numbers it shows: the one every model must have, then those shown behind it where a model has them.
        form: How a number is written.
        between: What stands before and after a number shown behind the first.
    """

    title: str
    origin: str
    keys: tuple[str, ...]
    form: Callable[[float], str]
    between: tuple[str, str] = (' (', ')')


def millions(count: float) -> str:
    return f'{count / 1e6:.2f}'.removesuffix('.00') + ' M'


def counted_millions(count: float) -> str:
    return f'{count / 1e6:.2f} M'


def billions(count: float) -> str:
    return f'{count / 1e9:.2f}'.rstrip('0').rstrip('.') + ' G'


PARAMETERS = Column('params', 'measured', ('Parameters',), counted_millions)
# folder of the metafile -> heading, columns, what stands below
TABLES: dict[str, tuple[str, list[Column], str]] = {
    'classification': (
        'ImageNet-1K, 224 pixels',
        [
            Column('params', 'measured', ('Parameters', 'Parameters (deployed)'), counted_millions),
            Column('params', 'published', ('Parameters (published)', 'Parameters (published, deployed)'), millions),
            Column('FLOPs', 'published', ('FLOPs', 'FLOPs (deployed)'), billions),
            Column('images/s, A100', 'published', ('Images per Second (A100)',), '{:.0f}'.format),
            Column('top-1', 'published', ('Top 1 Accuracy',), '{:.1f}'.format),
        ],
        'In brackets: after `switch_to_deploy()`, the form that the paper counts.',
    ),
    'detection': (
        'Mask R-CNN, COCO, FLOPs at 800x1280',
        [
            PARAMETERS,
            Column('params', 'published', ('Parameters (published)',), millions),
            Column('FLOPs', 'published', ('FLOPs',), billions),
            Column('box AP', 'published', ('box AP',), '{:.1f}'.format),
            Column('mask AP', 'published', ('mask AP',), '{:.1f}'.format),
        ],
        '',
    ),
    'segmentation': (
        'UPerNet, ADE20K, FLOPs at 512x2048',
        [
            PARAMETERS,
            Column('params', 'published', ('Parameters (published)', 'Parameters (paper)'), millions, ('; paper ', '')),
            Column('FLOPs', 'published', ('FLOPs', 'FLOPs (paper)'), billions, ('; paper ', '')),
            Column('mIoU, single scale', 'published', ('mIoU',), '{:.1f}'.format),
        ],
        'Parameters with the auxiliary head. For two models the paper has other counts than its own code gives.',
    ),
}


def read_models(root: Path, path: str) -> list[Model]:
    """Read a metafile, every entry checked.

    Args:
        root: Of the repository.
        path: Of the metafile, below ``root``.

    Raises:
        MetafileError: At the first thing wrong.
    """
    content = read_yaml(root, path)
    collections = [entry.get('Name') for entry in content.get('Collections') or []]
    entries = content.get('Models')
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise MetafileError(f'{path}: `Models` must be a list of models, got {type(entries).__name__}')
    return [read_model(root, path, index, entry, collections) for index, entry in enumerate(entries)]


def read_yaml(root: Path, path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load((root / path).read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise MetafileError(f'{path}: no such file; add it, or take it out of model-index.yml') from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MetafileError(f'{path}: no valid YAML: {" ".join(str(error).split())}') from error
    if not isinstance(content, dict):
        raise MetafileError(f'{path}: expected a mapping at the top, got {type(content).__name__}')
    return content


def read_model(root: Path, path: str, index: int, entry: dict[str, Any], collections: list[str]) -> Model:
    """Check one entry of ``Models``."""
    name = entry.get('Name')
    where = f'{path}: model {name!r}' if name else f'{path}: model number {index + 1}'
    for key in ('Name', 'In Collection', 'Config', 'Metadata', 'Results'):
        if not entry.get(key):
            raise MetafileError(f'{where}: the field {key!r} is missing; add it')
    if entry['In Collection'] not in collections:
        raise MetafileError(
            f'{where}: there is no collection {entry["In Collection"]!r} in this file; its collections are '
            f'{", ".join(map(str, collections))}'
        )
    metadata = entry['Metadata']
    if not isinstance(metadata, dict):
        raise MetafileError(f'{where}: Metadata must be a mapping, got {metadata!r}')
    fields = ['Architecture', 'Training Data', 'Batch Size', 'Input Size', 'Origin', 'Parameters', 'FLOPs']
    lacking = [key for key in fields if not metadata.get(key)]
    if not metadata.get('Epochs') and not metadata.get('Iterations'):
        lacking.append('Epochs (or Iterations)')
    if lacking:
        raise MetafileError(f'{where}: Metadata lacks {", ".join(lacking)}; add what is missing')
    for key, kind in KINDS.items():
        if key in metadata and not isinstance(metadata[key], kind):
            raise MetafileError(f'{where}: {key} must be of type {kind.__name__}, got {metadata[key]!r}')
    check_config(root, where, name, str(entry['Config']))
    numbers = {key: value for key, value in metadata.items() if key not in NOT_NUMBERS}
    origins = {key: origin_of(where, metadata['Origin'], key) for key in numbers}
    results = entry['Results'] if isinstance(entry['Results'], list) else [entry['Results']]
    for result in results:
        if absent := [key for key in ('Task', 'Dataset', 'Metrics') if not result.get(key)]:
            raise MetafileError(f'{where}: a result lacks {", ".join(absent)}; add what is missing')
        if not isinstance(result['Metrics'], dict):
            raise MetafileError(f'{where}: Metrics must be a mapping of names to numbers, got {result["Metrics"]!r}')
        numbers |= result['Metrics']
        origins |= dict.fromkeys(result['Metrics'], origin_of(where, metadata['Origin'], 'Results'))
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise MetafileError(f'{where}: {key!r} is {value!r}; give a positive number, without unit')
    if unknown := sorted(set(metadata['Origin']) - set(numbers) - {'Results'} - set(KNOWN)):
        raise MetafileError(f'{where}: Origin names {", ".join(unknown)}, which no table shows; correct the spelling')
    return Model(name, str(entry['Config']), entry.get('Weights'), metadata, numbers, origins, where)


# An `Origin` is shared by several models, so it may name numbers that only some of them have.
KNOWN = [key for _, columns, _ in TABLES.values() for column in columns for key in column.keys]


def origin_of(where: str, origins: Any, key: str) -> str:
    """``measured`` or ``published``, the first word of the number's origin."""
    text = origins.get(key) if isinstance(origins, dict) else None
    word = str(text or '').split(',')[0].strip()
    if word not in ORIGINS:
        raise MetafileError(
            f'{where}: the Origin of {key!r} is {text!r}; begin it with {" or ".join(ORIGINS)}, a comma and the source'
        )
    return word


def check_config(root: Path, where: str, name: str, config: str) -> None:
    """Refuse a config that does not exist, or that is not the one the model is named after."""
    package, separator, path = config.rpartition('::')
    folder = root
    if separator:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise MetafileError(
                f'{where}: Config {config!r} cannot be checked: pip install {package} (make setup does)'
            )
        folder = Path(spec.origin).parent / '.mim' / 'configs'
    if not (folder / path).is_file():
        raise MetafileError(f'{where}: Config {config!r} does not exist; correct the path or add the config')
    if Path(path).stem != name:
        raise MetafileError(f'{where}: Config {config!r} is called otherwise; name the model {Path(path).stem!r}')


def read_index(root: Path) -> dict[str, list[Model]]:
    """Models of all metafiles of model-index.yml, by the metafile's folder."""
    paths = read_yaml(root, 'model-index.yml').get('Import')
    if not isinstance(paths, list) or not paths:
        raise MetafileError('model-index.yml: `Import` must list the metafiles')
    models: dict[str, list[Model]] = {}
    seen: dict[str, str] = {}
    for path in map(str, paths):
        folder = Path(path).parent.name
        if folder not in TABLES:
            raise MetafileError(
                f'{path}: README has no table for the folder {folder!r}; add it to TABLES in {__file__}'
            )
        models[folder] = read_models(root, path)
        for model in models[folder]:
            if model.name in seen:
                raise MetafileError(f'{model.where}: this name is taken by a model of {seen[model.name]}; rename one')
            seen[model.name] = path
    return models


def render(models: dict[str, list[Model]]) -> str:
    """All tables as Markdown."""
    return '\n\n'.join(render_table(*TABLES[folder], models[folder]) for folder in TABLES if folder in models)


def render_table(heading: str, columns: list[Column], note: str, models: list[Model]) -> str:
    head = [heading, *(f'{column.title}, {column.origin}' for column in columns)]
    rows = [head, ['---'] * len(head)]
    rows += [[label(model), *(cell(model, column) for column in columns)] for model in models]
    table = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
    return f'{table}\n\n{note}' if note else table


def label(model: Model) -> str:
    """Backbone and schedule, with a link to the config where it is one of ours, to the weights where there are some."""
    text = model.metadata['Architecture'][0]
    if model.metadata['Training Data'] == 'COCO':
        text += f' {model.metadata["Epochs"] // 12}x'
    package, separator, _ = model.config.rpartition('::')
    text = f'{text} ({package})' if separator else f'[{text}]({model.config})'
    return f'{text}, [weights]({model.weights})' if model.weights else text


def cell(model: Model, column: Column) -> str:
    """A model's numbers in a column; an error where their origin is not the column's."""
    first, *others = column.keys
    if first not in model.numbers:
        raise MetafileError(f'{model.where}: {first!r} is missing; add it, with its Origin')
    text = ''
    for key in (first, *(key for key in others if key in model.numbers)):
        if model.origins[key] != column.origin:
            raise MetafileError(
                f'{model.where}: the Origin of {key!r} is {model.origins[key]}, but README shows it as '
                f'{column.origin}; put it under another key, or correct its Origin'
            )
        shown = column.form(model.numbers[key])
        text += shown if key == first else shown.join(column.between)
    return text


def replace_tables(readme: str, tables: str) -> str:
    """The README with new tables between the markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise MetafileError(f'README.md: expected one line {BEGIN!r} and one line {END!r} after it; put them back')
    before, _, rest = readme.partition(BEGIN)
    return f'{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}'


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument(
        '--check', action='store_true', help='write nothing; exit with 1 where README.md is out of date'
    )
    parser.add_argument('--root', type=Path, default=ROOT, help='repository (default: the one of this file)')
    args = parser.parse_args(argv)
    readme = args.root / 'README.md'
    try:
        tables = render(read_index(args.root))
        old = readme.read_text(encoding='utf-8')
        new = replace_tables(old, tables)
    except (MetafileError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    if new == old:
        print('README.md: the tables of models are up to date')
        return 0
    if args.check:
        print(
            "README.md: the tables under '## Models' are not what the metafiles say; "
            'run python tools/misc/update_model_tables.py',
            file=sys.stderr,
        )
        return 1
    readme.write_text(new, encoding='utf-8')
    print('README.md: tables of models written')
    return 0


if __name__ == '__main__':
    sys.exit(main())
