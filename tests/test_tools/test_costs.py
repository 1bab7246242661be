"""Counting parameters and FLOPs, the tables made of them, and the learning curves' data."""

import json
import sys
from pathlib import Path

import pytest
from config_models import narrow
from mmengine.config import Config
from mmengine.registry import init_default_scope

from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()
pytest.importorskip('mmpretrain')
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def tools(own_scope, one_thread, monkeypatch):
    """The tools import each other as they do when run."""
    monkeypatch.syspath_prepend(str(REPO / 'tools' / 'analysis_tools'))
    monkeypatch.syspath_prepend(str(REPO / '.dev_scripts'))
    init_default_scope('mmpretrain')


def classifier(size: str = 't', **backbone) -> Config:
    cfg = Config.fromfile(REPO / 'configs' / 'classification' / f'vheat-{size}_16xb128_in1k.py')
    cfg.model.backbone.update(backbone)
    return cfg


# From ../shared/docs/vheat.md: what fvcore counts on the reference release, in millions and in 10^9 multiply-adds.
@pytest.mark.parametrize(
    ('size', 'deploy', 'params', 'flops'),
    [('t', False, 30.85, 4.94), ('t', True, 29.56, 4.59), ('s', False, 52.22, 9.17), ('b', True, 87.50, 14.92)],
)
def test_counts_are_the_published_ones(size, deploy, params, flops):
    import get_flops

    model = get_flops.build(classifier(size), (224, 224) if deploy else None)
    cost = get_flops.count(model, 'mmpretrain', (224, 224))
    assert round(cost.params / 1e6, 2) == params
    assert round(cost.flops / 1e9, 2) == pytest.approx(flops, abs=0.011)


TINY = dict(arch=dict(embed_dims=8, depths=(1, 2, 1, 1), post_norm=False, layer_scale=None), img_size=64)


def test_spectral_part_is_exact():
    """Batched products are the transforms and nothing else; deploying saves the projection and nothing else."""
    import get_flops

    def cost(deploy):
        cfg = classifier(**TINY)
        cfg.model.head.in_channels = 64
        return get_flops.count(get_flops.build(cfg, deploy), 'mmpretrain', (100, 141))

    counted, deployed = cost(None), cost((100, 141))
    transforms, projection, _ = counted.spectral.values()
    assert counted.by_operator['bmm'] == transforms > 0
    assert counted.flops - deployed.flops == projection > 0
    assert deployed.spectral['FVE projection (to_k)'] == 0
    assert sum(counted.by_operator.values()) == counted.flops


@pytest.mark.parametrize(
    ('name', 'stages'), [('mask-rcnn_vheat-t_fpn_1x_coco', 1), ('cascade-mask-rcnn_vheat-t_fpn_1x_coco', 3)]
)
def test_detectors_are_counted_with_1000_proposals_and_100_boxes(name, stages):
    import get_flops

    init_default_scope('mmdet')
    cfg = Config.fromfile(REPO / 'configs' / 'detection' / f'{name}.py')
    narrow(cfg.model)
    cost = get_flops.count(get_flops.build(cfg), 'mmdet', (160, 160))
    maps, hidden = 32, 64  # 256 and 1024 channels in the config
    boxes = 1000 * (maps * 49 * hidden + hidden * hidden)  # two layers, and below 81 classes and 80 or 1 boxes
    boxes += 1000 * hidden * (81 + (4 if stages == 3 else 320))
    masks = 100 * 196 * (4 * maps * maps * 9 + maps * maps * 4) + 100 * 784 * maps * 80
    assert cost.by_module['roi_head'] == pytest.approx(stages * (boxes + masks), rel=1e-3)


def test_segmentor_whose_head_asks_for_samples():
    import get_flops

    init_default_scope('mmseg')
    cfg = Config.fromfile(REPO / 'configs' / 'segmentation' / 'vheat-t_mask2former_8xb2-160k_ade20k-512x512.py')
    narrow(cfg.model)
    cost = get_flops.count(get_flops.build(cfg), 'mmseg', (64, 96))
    assert set(cost.by_module) == {'backbone', 'decode_head'}
    assert cost.by_operator['baddbmm'] > 0


def test_attention_is_counted():
    """Both ways in which PyTorch computes it; MMEngine's analyzer alone knows neither."""
    import get_flops
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.masked = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, image):
            x = image.flatten(2).mT.repeat(1, 1, 3)[..., :8]
            y = nn.functional.scaled_dot_product_attention(x, x, x)
            n = y.shape[1]
            mask = torch.zeros(n, n, dtype=torch.bool)
            return self.masked(y, y, y, attn_mask=mask, need_weights=True)[0]

    cost = get_flops.count(Attention(), 'mmpretrain', (4, 5))
    n, c = 20, 8
    assert cost.by_operator['scaled_dot_product_attention'] == 2 * n * n * c
    assert cost.flops == 2 * n * n * c + 2 * n * n * c + 4 * n * c * c  # twice attention, four projections


def test_a_shape_that_the_model_refuses():
    import get_flops

    cfg = classifier(**TINY)
    cfg.model.head.in_channels = 64
    model = get_flops.build(cfg, (64, 64))
    with pytest.raises(ToolError, match=r'96 x 96 pixels.*deployed for.*--shape'):
        get_flops.count(model, 'mmpretrain', (96, 96))


def test_command_line(capsys, tmp_path):
    import get_flops

    config = tmp_path / 'tiny.py'
    config.write_text(
        f"_base_ = '{REPO}/configs/classification/vheat-t_16xb128_in1k.py'\n"
        f'backbone = dict(_delete_=True, type="VHeat", out_indices=(3,), **{TINY})\n'
        'model = dict(backbone=backbone, head=dict(in_channels=64))'
    )
    assert get_flops.main([str(config), '--shape', '64']) == 0
    out = capsys.readouterr().out
    assert '64 x 64 pixels' in out
    assert 'multiply-adds' in out
    with pytest.raises(SystemExit):
        get_flops.main([str(config), '--shape', '0'])
    assert get_flops.main(['no_such_config.py']) == 2


def test_tables_and_page(tmp_path):
    import compare_backbones as tool

    for task in tool.TASKS:
        vheat, swin = tool.published(task, 's')
        assert vheat['Metadata']['Architecture'][0] == 'vHeat-S'
        assert swin['Metadata']['Architecture'][0] == 'Swin-S'
        for row in (vheat, swin):
            assert tool.load(row['Config']).model.backbone
    rows = [['vHeat-T', '1 M', '', '2 G', '', '', '', '', ''], ['Swin-T', '3 M', '', '4 G', '', '', '', '', '']]
    assert tool.table(rows).splitlines()[0] == '| model | params | FLOPs |'
    page = tmp_path / 'page.md'
    page.write_text('a\n<!-- detection -->\nold\n<!-- end -->\nb\n<!-- machine -->\n<!-- end -->\n')
    tool.fill(page, dict(detection='new'), 'a machine')
    expected = 'a\n<!-- detection -->\nnew\n<!-- end -->\nb\n<!-- machine -->\na machine\n<!-- end -->\n'
    assert page.read_text() == expected
    with pytest.raises(ToolError, match='<!-- segmentation -->'):
        tool.fill(page, dict(detection='newer', segmentation='x'), 'm')
    assert page.read_text() == expected  # nothing half-written


def test_learning_curves(tmp_path, monkeypatch, capsys):
    """Data split, both models on it, curves and record; training itself is replaced by its log."""
    import learning_curves as tool

    source = tmp_path / 'nuts'
    (source / 'images').mkdir(parents=True)
    for i in range(7):
        (source / 'images' / f'{i}.jpg').write_bytes(b'x')
    coco = dict(
        images=[dict(id=i, file_name=f'{i}.jpg') for i in range(7)],
        annotations=[dict(id=i, image_id=i % 7) for i in range(20)],
        categories=[dict(id=1, name='nut')],
    )
    (source / 'trainval.json').write_text(json.dumps(coco))

    def train(model, dataset, args):
        work_dir = args.out / dataset / model
        log = work_dir / 'now' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        records = [dict(lr=0.1, loss=3.0 / (i + 1), epoch=1, iter=i, step=i) for i in range(3)]
        records += [{'coco/bbox_mAP': 0.1 * i, 'coco/segm_mAP': 0.2 * i, 'step': i} for i in (1, 2)]
        log.write_text('\n'.join(map(json.dumps, records)))
        return work_dir, ['python', 'tools/train.py', model]

    monkeypatch.setattr(tool, 'train', train)
    assert tool.main(['nuts', '--data', str(source), '--out', str(tmp_path / 'out')]) == 0
    split = {
        name: json.loads((tmp_path / f'out/data/nuts/coco/annotations/instances_{name}.json').read_text())
        for name in ('train', 'val')
    }
    assert [image['id'] for image in split['val']['images']] == [0, 3, 6]
    assert {a['image_id'] for a in split['train']['annotations']} == {1, 2, 4, 5}
    assert (tmp_path / 'out/data/nuts/coco/train/1.jpg').is_file()
    record = json.loads((tmp_path / 'out/nuts/curves.json').read_text())
    assert record['runs']['swin']['metrics']['coco/segm_mAP'] == {'1': 0.2, '2': 0.4}
    assert (tmp_path / 'out/nuts/curves.png').stat().st_size > 10_000
    assert tool.main(['nuts', '--data', str(tmp_path / 'nothing')]) == 1
    assert 'is no COCO folder' in capsys.readouterr().err
    sys.modules.pop('learning_curves')
