"""Write README's tables of models from the metafiles; --check only compares (exit status 1 where they differ)."""

import argparse
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = '<!-- tables from the metafiles: .dev_scripts/update_model_tables.py -->', '<!-- end of the tables -->'
TABLES = {  # folder of the metafile: first heading, note below
    'classification': ('ImageNet-1K, 224 pixels', 'In brackets: after `switch_to_deploy()`, which the paper counts.'),
    'detection': (
        'Mask R-CNN, COCO, FLOPs at 800x1280',
        'Published parameters are of an embedding grid of 512 pixels; vHeat-T 3x was released with one of 224.',
    ),
    'segmentation': ('UPerNet, ADE20K, FLOPs at 512x2048', 'With the auxiliary head. "paper": as the paper prints it.'),
}
COLUMNS = {  # heading: a number that all models of a table have, some that few have
    'params, measured': ('Parameters', 'Parameters (deployed)'),
    'params, published': ('Parameters (published)', 'Parameters (published, deployed)', 'Parameters (paper)'),
    'FLOPs, published': ('FLOPs', 'FLOPs (deployed)', 'FLOPs (paper)'),
    'images/s, A100, published': ('Images per Second (A100)',),
    'top-1, published': ('Top 1 Accuracy',),
    **{f'{metric}, published': (metric,) for metric in ('box AP', 'mask AP')},
    'mIoU, single scale, published': ('mIoU',),
}
DOWNLOADS = {'weights': 'Weights', 'log': 'Training Log'}  # text of a link: its field


def read_index(root):
    """Models of all metafiles of model-index.yml, by the metafile's folder. Raises ValueError, with file and model."""
    index, owners, where = {}, {}, 'model-index.yml'
    try:
        for path in yaml.safe_load((root / where).read_bytes())['Import']:
            where, folder = path, Path(path).parent.name
            for number, model in enumerate(yaml.safe_load((root / path).read_bytes())['Models'], 1):
                where = f'{path}: model {model.get("Name", number)!r}'
                name, config = model['Name'], Path(model['Config'])
                if name in owners:
                    raise ValueError(f'this name is taken by {owners[name]}; rename one')
                if config.stem != name or not (root / config).is_file():
                    raise ValueError(f'Config {str(config)!r} must be a file that is called as the model')
                results = [result['Metrics'] for result in model.get('Results', [])]
                numbers = {key: value for part in (model['Metadata'], *results) for key, value in part.items()}
                owners[name] = path
                index.setdefault(folder, []).append(dict(model, where=where, numbers=numbers))
    except (KeyError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        text = f'lacks {error}' if isinstance(error, KeyError) else ' '.join(str(error).split())
        raise ValueError(f'{where}: {text}') from error
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from error
    return index


def render(folder, models):
    """The table of a folder's models with results as Markdown, with the columns that any of them has numbers for."""
    heading, note = TABLES[folder]
    columns = {title: keys for title, keys in COLUMNS.items() if any(keys[0] in model['numbers'] for model in models)}
    rows = [[heading, *columns, 'download'], ['---'] * (len(columns) + 2)]
    for model in models:
        metadata = model['Metadata']
        text = metadata['Architecture'][0]
        text += f' {metadata["Epochs"] // 12}x' if metadata['Training Data'] == 'COCO' else ''
        links = ', '.join(f'[{word}]({model[field]})' for word, field in DOWNLOADS.items() if field in model)
        rows.append([f'[{text}]({model["Config"]})', *(cell(model, *column) for column in columns.items()), links])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows) + (note and f'\n\n{note}')


def cell(model, title, keys):
    """A model's numbers in a column."""
    text = ''
    for key in (key for key in keys if key in model['numbers'] or key == keys[0]):
        number = model['numbers'].get(key)
        if type(number) not in (int, float) or number <= 0:
            raise ValueError(f'{model["where"]}: {key!r} is {number!r}; give a positive number, without unit')
        shown = f'{number / 1e9:.6g} G' if key.startswith('FLOPs') else f'{number:.{0 if number > 100 else 1}f}'
        if key.startswith('Parameters'):
            shown = f'{number / 1e6:.2f} M'.replace('.00', '.00' if 'measured' in title else '')
        text += (f'; paper {shown}' if '(paper)' in key else f' ({shown})') if text else shown
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--check', action='store_true', help='write nothing')
    parser.add_argument('--root', type=Path, default=ROOT, help='repository')
    args = parser.parse_args(argv)
    readme = args.root / 'README.md'
    try:
        groups = {folder: [m for m in models if 'Results' in m] for folder, models in read_index(args.root).items()}
        tables = '\n\n'.join(render(folder, models) for folder, models in groups.items() if models)
        old = readme.read_text('utf-8')
        if not (old.count(BEGIN) == old.count(END) == 1 and old.index(BEGIN) < old.index(END)):
            raise ValueError(f'README.md: expected one line {BEGIN!r} and one line {END!r} after it; put them back')
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
