"""The guide's configs for images of other than three bands train and predict, from weights of three bands."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from config_models import narrow
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image

from vheat_mm import VHeat
from vheat_mm.utils.torchvision import ensure_torchvision

GUIDE = (Path(__file__).parents[2] / 'docs/custom_dataset.md').read_text(encoding='utf-8')
COCO = dict(type='CocoDataset', ann_file='coco.json', metainfo=dict(classes=('box',)), data_prefix=dict(img='images'))
DATA = {  # of a config in the guide: number of bands, data set
    'bands_detection': (5, COCO),
    'bands_segmentation': (
        5,
        dict(
            type='BaseSegDataset',
            img_suffix='.tif',
            metainfo=dict(classes=('ground', 'box')),
            data_prefix=dict(img_path='images', seg_map_path='maps'),
            reduce_zero_label=True,
        ),
    ),
    'bands_classification': (5, dict(type='CustomDataset', data_prefix='folders', extensions=('.tif',))),
    'one_band': (1, COCO),
}
ensure_torchvision()

pytestmark = pytest.mark.usefixtures('own_scope')


def write_images(folder: Path, bands: int) -> None:
    """Two images of a box, for all three tasks."""
    tifffile = pytest.importorskip('tifffile')
    images, annotations = [], []
    corners = [8, 8, 40, 8, 40, 30, 8, 30]
    for index in range(2):
        shape = (64, 64, bands) if bands > 1 else (64, 64)
        image = np.random.default_rng(index).integers(0, 60, shape)
        image[8:30, 8:40] += 100
        for name in (f'images/{index}.tif', f'folders/{"ab"[index]}/{index}.tif'):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            kind = np.uint16 if bands > 1 else np.uint8
            tifffile.imwrite(folder / name, image.astype(kind), photometric='minisblack', planarconfig='contig')
        labels = np.ones((64, 64), np.uint8)
        labels[8:30, 8:40] = 2
        (folder / 'maps').mkdir(exist_ok=True)
        Image.fromarray(labels).save(folder / f'maps/{index}.png')
        images.append(dict(id=index, file_name=f'{index}.tif', width=64, height=64))
        box = dict(bbox=[8, 8, 32, 22], area=704, segmentation=[corners], iscrowd=0)
        annotations.append(dict(id=index, image_id=index, category_id=1, **box))
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name='box')])
    (folder / 'coco.json').write_text(json.dumps(content))


@pytest.mark.parametrize('name', list(DATA))
def test_guide(tmp_path, name):
    library = dict(bands_segmentation='mmseg', bands_classification='mmpretrain').get(name, 'mmdet')
    pytest.importorskip(library)
    bands, data = DATA[name]
    write_images(tmp_path, bands)
    config = tmp_path / f'{name}.py'
    config.write_text(re.search(rf'```python\n# {name}\.py\n(.*?)```', GUIDE, re.DOTALL).group(1))
    cfg = Config.fromfile(config)
    assert cfg.model.backbone.init_cfg.checkpoint == 'vheat_tiny'
    init_default_scope(library)
    model = narrow(cfg.model)
    torch.manual_seed(0)
    published = VHeat(arch=model.backbone.arch, img_size=64)
    torch.save(dict(model=published.state_dict()), tmp_path / 'weights.pth')
    model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    built = MODELS.build(model)
    built.init_weights()
    stem = built.backbone.patch_embed.conv1.weight
    filters = published.patch_embed.conv1.weight
    expected = filters.sum(1, keepdim=True) if bands == 1 else filters[:, [0, 1, 2, 0, 1]] * (3 / 5)
    torch.testing.assert_close(stem, expected)
    batches = []
    for part in ('train', 'test'):
        pipeline = cfg[f'{part}_dataloader'].dataset.pipeline
        for transform in pipeline:  # small images
            transform.update({key: (64, 64) for key in ('scale', 'crop_size') if isinstance(transform.get(key), tuple)})
        dataset = dict(data, data_root=str(tmp_path), pipeline=pipeline)
        batches.append(pseudo_collate([DATASETS.build(dataset)[index] for index in range(2)]))
    before = stem.detach().clone()
    losses = built.train_step(batches[0], OptimWrapper(torch.optim.SGD(built.parameters(), lr=0.1)))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not torch.equal(before, stem)
    built.eval()
    assert len(built.test_step(batches[1])) == 2
