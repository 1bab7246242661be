"""Small models as a training run leaves them: a config file and a checkpoint with class names."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, init_default_scope

from vheat_mm.utils.torchvision import ensure_torchvision

CONFIGS = Path(__file__).parents[2] / 'configs'
CLASSES = dict(classes=('a', 'b'), palette=[[250, 0, 0], [0, 0, 250]])
DETECTOR = (
    'detection/mask-rcnn_vheat-t_fpn_1x_coco.py',
    'neck=dict(in_channels=[8, 16, 32, 64], out_channels=16), rpn_head=dict(in_channels=16, feat_channels=16), '
    'roi_head=dict(bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16), '
    'bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=2), '
    'mask_head=dict(in_channels=16, conv_out_channels=16, num_classes=2)), '
    'test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(max_per_img=20))',
)
SEGMENTOR = (
    'segmentation/vheat-t_upernet_8xb2-160k_ade20k-512x512.py',
    'decode_head=dict(in_channels=[8, 16, 32, 64], channels=8, num_classes=2), '
    'auxiliary_head=dict(in_channels=32, channels=8, num_classes=2)',
)
CLASSIFIER = 'classification/vheat-t_16xb128_in1k.py', 'head=dict(num_classes=2, in_channels=64)'


def write(folder: Path, base: str, model: str, more: str = '') -> tuple[str, str]:
    """Paths of a small config, and of a checkpoint as a training run leaves it, log history included.

    Args:
        folder: Where to write them.
        base: The config that it inherits, below configs/.
        model: Arguments of its model that differ.
        more: Further lines of the config.
    """
    ensure_torchvision()
    config = folder / 'small.py'
    backbone = 'dict(arch=dict(_delete_=True, embed_dims=8, depths=(1, 1, 1, 1)), img_size=64, init_cfg=None)'
    config.write_text(f'_base_ = {str(CONFIGS / base)!r}\nmodel = dict(backbone={backbone}, {model})\n{more}\n')
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    checkpoint = folder / 'epoch_1.pth'
    history = dict(log_scalars={'train/loss': HistoryBuffer([1.0], [1])})
    meta = dict(dataset_meta=CLASSES, epoch=1)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), message_hub=history, meta=meta), checkpoint)
    return str(config), str(checkpoint)
