"""Imports without optional libraries, and configs written for the reference release."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS

import vheat_mm

LIBRARIES = ['mmcv', 'mmdet', 'mmseg', 'mmpretrain']


OPTIONAL = ['huggingface_hub', 'safetensors']


@pytest.mark.parametrize(
    'absent', [[*LIBRARIES, *OPTIONAL, 'torchvision', 'scipy'], []], ids=['absent', 'not imported']
)
def test_import_needs_torch_and_mmengine_only(absent):
    code = f"""
        import sys
        for name in {absent}:
            sys.modules[name] = None
        import torch
        from mmengine.config import Config
        from mmengine.registry import MODELS
        cfg = Config(dict(custom_imports=dict(imports=['vheat_mm'], allow_failed_imports=False)))
        import vheat_mm
        model = MODELS.build(dict(type='VHeat', arch=dict(embed_dims=4, depths=(1, 1, 1, 1)), img_size=32))
        assert len(model(torch.zeros(1, 3, 32, 32))) == 4
        loaded = [name for name in sys.modules if name.split('.')[0] in {LIBRARIES + OPTIONAL} and sys.modules[name]]
        assert not loaded, loaded
    """
    subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)],
        check=True,
        cwd=Path(vheat_mm.__file__).parents[1],
    )


RELEASED = {
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py': 'MMDET_VHEAT',
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py': 'MMSEG_VHEAT',
}


def released_config(base: str, tmp_path: Path, **backbone: object) -> Config:
    """A config like the release's: merged into the Swin base's backbone, without ``_delete_``."""
    pytest.importorskip(base.split('::')[0])
    path = tmp_path / 'released.py'
    path.write_text(
        f'_base_ = {base!r}\n'
        "custom_imports = dict(imports=['vheat_mm'], allow_failed_imports=False)\n"
        f'model = dict(backbone=dict(type={RELEASED[base]!r}, **{backbone!r}))\n'
    )
    return Config.fromfile(path)


@pytest.mark.parametrize('base', RELEASED)
def test_released_config_builds(base, tmp_path):
    tiny = dict(drop_path=0.1, post_norm=False, depths=(1, 1, 1, 1), dims=8, out_indices=(0, 1, 2, 3))
    cfg = released_config(base, tmp_path, img_size=64, pretrained='weights.pth', **tiny)
    with pytest.warns(UserWarning, match='not used by vHeat.*attn_drop_rate.*drop_path.*init_cfg'):
        model = MODELS.build(cfg.model.backbone)
    assert isinstance(model, vheat_mm.VHeat)
    assert model.init_cfg == dict(type='Pretrained', checkpoint='weights.pth')
    assert not model.layers[0][0].post_norm
    assert model.freq_embed[0].shape == (16, 16, 8)
    # the base config's drop_path_rate is used and ``drop_path`` is not, as in the release
    assert model.layers[3][0].drop_path.drop_prob == pytest.approx(cfg.model.backbone.drop_path_rate)

    large = dict(post_norm=True, layer_scale=1e-5, drop_path_rate=0.5, depths=(1, 1, 2, 1), dims=[16, 32, 64, 128])
    cfg = released_config(base, tmp_path, img_size=64, use_checkpoint=True, **large)
    with pytest.warns(UserWarning, match='not used'):
        model = MODELS.build(cfg.model.backbone)
    assert model.init_cfg is None  # the base's Swin weights were dropped
    assert model.layers[2][1].gamma1[0].item() == pytest.approx(1e-5)
    assert model.layers[0].with_cp


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match='ssm_ratio'):
        MODELS.build(dict(type='MMDET_VHEAT', ssm_ratio=2.0))
    with pytest.raises(ValueError, match='dims'):
        MODELS.build(dict(type='MMDET_VHEAT', dims=[8, 16, 24, 32]))
    with pytest.raises(ValueError, match='both'):
        MODELS.build(dict(type='MMSEG_VHEAT', pretrained='a.pth', init_cfg=dict(type='Pretrained', checkpoint='b.pth')))
