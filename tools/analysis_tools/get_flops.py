"""Parameters and FLOPs of a config's model.

    python tools/analysis_tools/get_flops.py CONFIG [--shape H W] [--deploy] [--cfg-options KEY=VALUE ...]

Counted while the model runs once on one image, by MMEngine's analyzer: a multiply-add is one FLOP, as in the published
tables; norms count 5 an element, and sums, activations and indexing nothing (fvcore's rules). Of detectors, 1000
proposals go through the box head and 100 through the mask head; of segmentors, the auxiliary head is left out of the
FLOPs, as it does not run in inference. Transforms, decays and FVE projections of vHeat are listed one by one.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

try:
    import vheat_mm  # noqa: F401
except ModuleNotFoundError as error:  # not installed: take the package that this file lies with
    if error.name != 'vheat_mm':
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vheat_mm import VHeat
from vheat_mm.apis.config import make_parser, read_config
from vheat_mm.apis.errors import run_reporting_errors
from vheat_mm.utils.errors import ToolError

# What the published tables count at, by task: (height, width).
SHAPES = dict(mmdet=(800, 1280), mmseg=(512, 2048), mmpretrain=(224, 224))


@dataclass
class Cost:
    """Parameters, and multiply-adds of one image of (height, width) pixels."""

    shape: tuple[int, int]
    params: int
    flops: int
    by_module: dict[str, int] = field(default_factory=dict)
    by_operator: dict[str, int] = field(default_factory=dict)
    spectral: dict[str, int] = field(default_factory=dict)  # of vHeat: part of its flops, or beside them


def count(model: nn.Module, scope: str, shape: tuple[int, int]) -> Cost:
    """Count what one image of (height, width) pixels costs.

    Raises:
        ToolError: The model cannot take that shape.
    """
    from mmengine.analysis import FlopAnalyzer, parameter_count

    model = model.cpu().eval()
    batch, arguments = make_input(model, scope, shape)
    forward = model.forward
    model.forward = _forward_of(model, arguments)
    analyzer = FlopAnalyzer(model, batch).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # products that MMEngine's analyzer does not know: attention in one operator, and that of nn.MultiheadAttention
    analyzer.set_op_handle('aten::scaled_dot_product_attention', _attention, 'aten::baddbmm', _added_product)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # of nn.MultiheadAttention: one operator, products unseen
    try:
        with warnings.catch_warnings(), torch.no_grad(), _boxes_with_masks(model):
            warnings.simplefilter('ignore')  # the tracer's, of Python values that it keeps as constants
            by_operator = {name: int(value) for name, value in analyzer.by_operator().items() if value}
            by_module = analyzer.by_module()
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ToolError(
            f'{type(model).__name__} cannot take an image of {shape[0]} x {shape[1]} pixels: {error}; '
            'give another --shape HEIGHT WIDTH'
        ) from error
    finally:
        model.forward = forward
        torch.backends.mha.set_fastpath_enabled(fused)
    top = {name: int(by_module[name]) for name, _ in model.named_children() if by_module[name]}
    padded = tuple(batch.shape[-2:])
    spectral = {}
    for module in model.modules():
        if isinstance(module, VHeat):
            spectral = spectral_flops(module, padded)
    return Cost(padded, parameter_count(model)[''], int(analyzer.total()), top, by_operator, spectral)


def make_input(model: nn.Module, scope: str, shape: tuple[int, int], batch: int = 1) -> tuple[torch.Tensor, dict]:
    """Random images of (height, width) pixels as the model takes them, (B, 3, H, W), and what else it needs."""
    if scope == 'mmpretrain':
        return torch.rand(batch, 3, *shape), {}
    meta = dict(ori_shape=shape, img_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
    inputs = [torch.rand(3, *shape) * 255 for _ in range(batch)]
    samples = [_sample(scope, meta) for _ in inputs]
    data = model.data_preprocessor(dict(inputs=inputs, data_samples=samples), False)
    return data['inputs'], dict(data_samples=data['data_samples'])


def spectral_flops(model: VHeat, shape: tuple[int, int]) -> dict[str, int]:
    """Multiply-adds of what is vHeat's own, for one image of (height, width) pixels.

    Of an operator with H W positions and C channels: 2 H W C (H + W) of DCT2 and its inverse, H W C of the decay (one
    product a mode, which the analyzer, like fvcore, leaves out), and H W C^2 of the FVE projection until
    ``switch_to_deploy``.
    """
    transforms = decay = projection = 0
    height, width = (-(-side // 4) for side in shape)
    for stage in model.layers:
        for block in stage:
            if not hasattr(block, 'op'):
                continue
            c = block.op.out_linear.out_features
            transforms += 2 * height * width * c * (height + width)
            decay += height * width * c
            if hasattr(block.op, 'to_k'):
                projection += height * width * c * c
        height, width = -(-height // 2), -(-width // 2)
    return {'DCT2 and inverse': transforms, 'FVE projection (to_k)': projection, 'decay, not in the sum': decay}


def build(cfg: Config, deploy: tuple[int, int] | None = None) -> nn.Module:
    """Build a config's model without loading weights; ``deploy`` it for images of (height, width) pixels."""
    from mmengine.model import revert_sync_batchnorm

    cfg.model.pop('init_cfg', None)
    backbone = cfg.model.get('backbone')
    if backbone is not None:
        backbone.init_cfg = None
    test_cfg = cfg.model.get('test_cfg') or {}
    if 'rpn' in test_cfg and 'nms' in test_cfg.rpn:
        test_cfg.rpn.nms.iou_threshold = 1.0  # as many proposals as there may be, whatever the weights
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if deploy:
        networks = [m for m in model.modules() if isinstance(m, VHeat)]
        if not networks:
            raise ToolError('--deploy: there is no VHeat in this model')
        for network in networks:
            network.switch_to_deploy(deploy)
    return model


def _forward_of(model: nn.Module, arguments: dict[str, Any]) -> Callable[[torch.Tensor], Any]:
    """The part of a model that is counted: its forward pass up to the heads' outputs."""
    head = getattr(model, 'decode_head', None)
    if 'batch_data_samples' in inspect.signature(getattr(head, 'forward', lambda: 0)).parameters:
        # mmseg's own forward knows no heads like Mask2Former's, which ask for samples
        return lambda images: head(model.extract_feat(images), arguments['data_samples'])
    return partial(model.forward, **arguments)


@contextmanager
def _boxes_with_masks(model: nn.Module) -> Iterator[None]:
    """Let 100 boxes into mask heads: mmdet's forward pass of cascades sends every proposal through all three."""
    heads = getattr(getattr(model, 'roi_head', None), 'mask_head', None)
    heads = list(heads) if isinstance(heads, nn.ModuleList) else [heads] if heads else []
    for head in heads:
        head.forward = partial(_first_boxes, head.forward)
    try:
        yield
    finally:
        for head in heads:
            del head.forward


def _first_boxes(forward: Callable, boxes: torch.Tensor) -> torch.Tensor:
    masks = forward(boxes[:100])
    return torch.cat([masks, masks.new_zeros(max(0, len(boxes) - 100), *masks.shape[1:])])


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of softmax(Q K^T) V: Q (..., L, E), K (..., S, E), V (..., S, F)."""
    query, key, value = (shape_of(x) for x in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _added_product(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of a sum and a batched product (B, N, K) x (B, K, M)."""
    first, second = (shape_of(x) for x in inputs[1:3])
    return math.prod(first) * second[-1]


def shape_of(value: Any) -> list[int]:
    """Shape of a tensor in a traced graph."""
    return value.type().sizes()


def _sample(scope: str, meta: dict[str, Any]) -> Any:
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    return Sample(metainfo=meta)


def report(cost: Cost) -> str:
    """The counts as text."""
    rows = [('parameters', f'{cost.params / 1e6:.2f} M'), ('FLOPs', f'{cost.flops / 1e9:.2f} G multiply-adds')]
    rows.append(('image', f'{cost.shape[0]} x {cost.shape[1]} pixels, batch 1'))
    for title, parts in (('module', cost.by_module), ('operator', cost.by_operator), ('vHeat', cost.spectral)):
        rows += [(f'  {title} {name}', f'{value / 1e9:.3f} G') for name, value in parts.items()]
    width = max(len(name) for name, _ in rows)
    return '\n'.join(f'{name:<{width}}  {value}' for name, value in rows)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        '--shape', type=int, nargs='+', metavar='PIXELS',
        help='height and width, or one number for both (default: 800 1280 of detectors, 512 2048 of segmentors, '
        '224 224 of classifiers, as in the published tables)',
    )  # fmt: skip
    parser.add_argument('--deploy', action='store_true', help='after switch_to_deploy: decays are constants')
    args = parser.parse_args(argv)
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(f'--shape {" ".join(map(str, args.shape))}: expected HEIGHT WIDTH in pixels')
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(argv)

    def body() -> None:
        logging.disable(logging.WARNING)
        cfg = read_config(args)
        shape = tuple(args.shape * 2)[:2] if args.shape else SHAPES[cfg.default_scope]
        print(report(count(build(cfg, shape if args.deploy else None), cfg.default_scope, shape)))

    return run_reporting_errors(body)


if __name__ == '__main__':
    raise SystemExit(main())
