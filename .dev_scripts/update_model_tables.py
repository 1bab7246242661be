"""Write README's tables of models from the metafiles; --check only compares (exit status 1 where they differ)."""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import yaml

BEGIN, END = '<!-- tables from the metafiles: .dev_scripts/update_model_tables.py -->', '<!-- end of the tables -->'
TABLES = {  # folder of the metafile: first heading, note below
    'classification': ('ImageNet-1K, 224 pixels', 'In brackets: after `switch_to_deploy()`, which the paper counts.'),
    'detection': ('Mask R-CNN, COCO, FLOPs at 800x1280', ''),
    'segmentation': ('UPerNet, ADE20K, FLOPs at 512x2048', 'With the auxiliary head. "paper": as the paper prints it.'),
}
COLUMNS = {  # heading, which ends in the numbers' origin: a number that all models of a table have, some that few have
    'params, measured': ('Parameters', 'Parameters (deployed)'),
    'params, published': ('Parameters (published)', 'Parameters (published, deployed)', 'Parameters (paper)'),
    'FLOPs, published': ('FLOPs', 'FLOPs (deployed)', 'FLOPs (paper)'),
    'images/s, A100, published': ('Images per Second (A100)',),
    'top-1, published': ('Top 1 Accuracy',),
    **{f'{metric}, published': (metric,) for metric in ('box AP', 'mask AP')},
    'mIoU, single scale, published': ('mIoU',),
}
METADATA = {'Architecture': list, 'Training Data': str, 'Batch Size': int, 'Input Size': list, 'Origin': dict}


def need(condition, where, message):
    """Raise ValueError, with the file, the model and the remedy, where a metafile cannot be trusted."""
    if not condition:
        raise ValueError(f'{where}: {message}')


def need_fields(owner, where, fields, kinds):
    for key, kind in kinds.items():
        need(isinstance(fields, dict) and fields.get(key), where, f'{owner} lacks {key}; add it')
        need(isinstance(fields[key], kind), where, f'{key} must be of type {kind.__name__}, got {fields[key]!r}')


def load(root, path):
    need((root / path).is_file(), path, 'no such file; add it, or take it out of model-index.yml')
    try:
        content = yaml.safe_load((root / path).read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f'{path}: no valid YAML: {" ".join(str(error).split())}') from error
    need(isinstance(content, dict), path, f'expected a mapping at the top, got {type(content).__name__}')
    return content


def read_index(root):
    """Checked models of all metafiles of model-index.yml, by the metafile's folder; raises ValueError."""
    paths, index, owners = load(root, 'model-index.yml').get('Import'), {}, {}
    need(isinstance(paths, list) and paths, 'model-index.yml', '`Import` must list the metafiles')
    for path in map(str, paths):
        folder, content = Path(path).parent.name, load(root, path)
        need(folder in TABLES, path, f'README has no table for the folder {folder!r}; add it to TABLES in {__file__}')
        entries, collections = content.get('Models'), [entry.get('Name') for entry in content.get('Collections') or []]
        need(isinstance(entries, list), path, f'`Models` must be a list of models, got {type(entries).__name__}')
        index[folder] = [read_model(root, path, i, entry, collections, owners) for i, entry in enumerate(entries, 1)]
    return index


def read_model(root, path, number, entry, collections, owners):
    need_fields('the model', f'{path}: model number {number}', entry, {'Name': str})
    name, collection, metadata = map(entry.get, ('Name', 'In Collection', 'Metadata'))
    where = f'{path}: model {name!r}'
    need_fields('the model', where, entry, {'In Collection': str, 'Config': str, 'Metadata': dict, 'Results': object})
    need(owners.setdefault(name, where) is where, where, f'this name is taken by {owners[name]}; rename one')
    need(collection in collections, where, f'this file has no collection {collection!r}, only {collections}')
    length = next((key for key in ('Epochs', 'Iterations') if key in metadata), 'Epochs (or Iterations)')
    need_fields('Metadata', where, metadata, METADATA | {'Parameters': object, 'FLOPs': object, length: int})
    package, separator, file = entry['Config'].rpartition('::')
    spec, config = importlib.util.find_spec(package) if separator else None, f'Config {entry["Config"]!r}'
    need(spec or not separator, where, f'{config} cannot be checked: pip install {package} (make setup does)')
    folder = Path(spec.origin).parent / '.mim' / 'configs' if spec else root
    need((folder / file).is_file(), where, f'{config} does not exist; correct the path or add the config')
    need(Path(file).stem == name, where, f'{config} is called otherwise; name the model {Path(file).stem!r}')
    numbers = {key: value for key, value in metadata.items() if key not in {*METADATA, 'Epochs', 'Iterations'}}
    sources = {key: key for key in numbers}  # number: its key in Origin
    for result in entry['Results'] if isinstance(entry['Results'], list) else [entry['Results']]:
        need_fields('a result', where, result, {'Task': str, 'Dataset': str, 'Metrics': dict})
        numbers, sources = numbers | result['Metrics'], sources | dict.fromkeys(result['Metrics'], 'Results')
    origins = {key: str(metadata['Origin'].get(source)).split(',')[0] for key, source in sources.items()}
    for key, value in numbers.items():
        wrong = f'the Origin of {sources[key]!r} is {metadata["Origin"].get(sources[key])!r}'
        need(origins[key] in ('measured', 'published'), where, f'{wrong}; begin it with measured or published, a comma')
        is_positive = type(value) in (int, float) and value > 0
        need(is_positive, where, f'{key!r} is {value!r}; give a positive number, without unit')
    # Models share an Origin, so it may name numbers that this one lacks.
    unknown = set(metadata['Origin']) - {*numbers, *sum(COLUMNS.values(), ()), 'Results'}
    need(not unknown, where, f'Origin names {", ".join(sorted(unknown))}, which no table shows; correct the spelling')
    checked = dict(config=entry['Config'], weights=entry.get('Weights'), metadata=metadata, numbers=numbers)
    return SimpleNamespace(name=name, where=where, origins=origins, **checked)


def render(folder, models):
    """The table of a folder's models as Markdown, with the columns that any of them has numbers for."""
    heading, note = TABLES[folder]
    columns = {title: keys for title, keys in COLUMNS.items() if any(keys[0] in model.numbers for model in models)}
    rows = [[heading, *columns], ['---'] * (len(columns) + 1)]
    for model in models:
        text, (package, separator, _) = model.metadata['Architecture'][0], model.config.rpartition('::')
        text += f' {model.metadata["Epochs"] // 12}x' if model.metadata['Training Data'] == 'COCO' else ''
        text = f'{text} ({package})' if separator else f'[{text}]({model.config})'
        text += f', [weights]({model.weights})' if model.weights else ''
        rows.append([text, *(cell(model, *column) for column in columns.items())])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows) + (note and f'\n\n{note}')


def cell(model, title, keys):
    """A model's numbers in a column; an error where their origin is not the column's."""
    need(keys[0] in model.numbers, model.where, f'{keys[0]!r} is missing; add it, with its Origin')
    origin, text = title.rpartition(', ')[2], ''
    for key in (key for key in keys if key in model.numbers):
        found, number = model.origins[key], model.numbers[key]
        need(found == origin, model.where, f'the Origin of {key!r} is {found}, but README shows it as {origin}')
        shown = f'{number / 1e9:.6g} G' if key.startswith('FLOPs') else f'{number:.{0 if number > 100 else 1}f}'
        if key.startswith('Parameters'):
            shown = f'{number / 1e6:.2f} M'.replace('.00', '' if origin == 'published' else '.00')
        text += (f'; paper {shown}' if '(paper)' in key else f' ({shown})') if text else shown
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--check', action='store_true', help='write nothing')
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parents[1], help='repository')
    args = parser.parse_args(argv)
    try:
        readme, index = args.root / 'README.md', read_index(args.root)
        tables, old = '\n\n'.join(render(*group) for group in index.items()), readme.read_text('utf-8')
        whole = old.count(BEGIN) == old.count(END) == 1 and old.index(BEGIN) < old.index(END)
        need(whole, 'README.md', f'expected one line {BEGIN!r} and one line {END!r} after it; put them back')
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    new = f'{old.partition(BEGIN)[0]}{BEGIN}\n\n{tables}\n\n{END}{old.partition(END)[2]}'
    if not args.check:
        readme.write_text(new, 'utf-8')
    elif new != old:
        print('README.md: stale tables of models; run python .dev_scripts/update_model_tables.py', file=sys.stderr)
        return 1
    print('README.md: the tables of models are up to date')
    return 0


if __name__ == '__main__':
    sys.exit(main())
