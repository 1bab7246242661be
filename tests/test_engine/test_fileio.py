"""What the tools replace in MMEngine's loading of checkpoints."""

import io
import os

import mmengine.runner.checkpoint
import pytest
import torch

from vheat_mm.engine import fileio
from vheat_mm.utils.errors import CheckpointError


class Hostile:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def test_no_fallback_to_unsafe_loading(tmp_path, monkeypatch):
    """onedl-mmengine's loaders of all addresses call one function that falls back; other versions have none."""
    monkeypatch.chdir(tmp_path)
    module = mmengine.runner.checkpoint
    monkeypatch.setattr(module, '_safe_torch_load', torch.load, raising=False)
    fileio.refuse_unsafe_loading()
    for content in (dict(x=Hostile()), dict(x=torch.ones(2))):
        torch.save(content, 'x.pth')
        for source in ('x.pth', tmp_path / 'x.pth', io.BytesIO((tmp_path / 'x.pth').read_bytes())):
            if isinstance(content['x'], Hostile):
                with pytest.raises(CheckpointError, match='mkdir'):
                    module._safe_torch_load(source, map_location='cpu')
            else:
                assert torch.equal(module._safe_torch_load(source)['x'], content['x'])
    assert not (tmp_path / 'ran').exists()
