"""Grad-CAM: where in an image the evidence for a class lies, by the gradient of its score at a layer.

Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017; for
segmentation Vinogradova et al., Towards Interpretable Semantic Segmentation via Gradient-weighted Class Activation
Mapping, AAAI 2020. The score is

- of a classifier the logit of the class;
- of a segmentor the logit of the class, averaged over the pixels it is predicted for;
- of a detector the log-odds of the score of one detection, or their sum over all detections of a class. For a head
  with sigmoids that is the logit of the class, for one with a softmax the logit against all other classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vheat_mm.apis.config import add_config_arguments
from vheat_mm.apis.heat.figures import HEAT, WIDTH, new_figure, save_figure
from vheat_mm.apis.heat.images import list_images, prepare_images
from vheat_mm.apis.inference.model import load_model
from vheat_mm.apis.inference.painting import displayable
from vheat_mm.apis.inference.types import Sample
from vheat_mm.models.vheat import VHeat
from vheat_mm.utils.errors import ArgumentError, ToolError
from vheat_mm.utils.text import first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 50  # rows of a figure
LAYOUTS = {'NCHW': (0, 1, 2, 3), 'NHWC': (0, 3, 1, 2)}  # 4-D layouts -> how to permute to NCHW


@dataclass(frozen=True)
class Cam:
    """What :func:`explain` returns.

    Attributes:
        image: (H, W, 3) uint8 RGB, as the network sees it: after resizing and cropping, before padding.
        heat: (H, W) float32, 0 to 1; all zero where nothing in the layer speaks for the class.
        target: What is explained, with its score: 'coin 0.98'.
        layer: Name of the layer.
        grid: (height, width) of the layer's map.
    """

    image: np.ndarray
    heat: np.ndarray
    target: str
    layer: str
    grid: tuple[int, int]


def grad_cam(maps: Tensor, gradients: Tensor) -> Tensor:
    """Equations 1 and 2: maps (B, C, H, W) and gradients of the score with respect to them -> (B, H, W), not negative.

    A channel weighs the mean of its gradient.
    """
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * maps).sum(1).relu()


def explain(
    model: Any,
    data: Mapping[str, Any],
    task: str,
    classes: Sequence[str],
    target: str | int | None = None,
    layer: str | None = None,
    layout: str | None = None,
    score_thr: float = 0.3,
) -> Cam:
    """Grad-CAM of one image.

    Args:
        model: A detector, segmentor or classifier of MMDetection, MMSegmentation or MMPreTrain.
        data: One image as the test pipeline gives it, collated: ``inputs`` and ``data_samples``.
        task: 'detection', 'segmentation' or 'classification'.
        classes: Names of the model's classes.
        target: Name or index of a class; by default that of the highest score (segmentation: of the most pixels). For
            a detector, ``'#3'`` means its third detection, in the order of their scores.
        layer: Name of a module within the model; by default the backbone. Of several maps that one is taken which the
            score depends on the most, by the sum of absolute values of gradient times map.
        layout: ``'NCHW'``, ``'NHWC'`` or ``'NLC'`` (tokens) of the layer's output, where its shape does not say it.
        score_thr: Detections below are not looked at.

    Raises:
        ToolError: Unknown class, layer or layout; nothing of that class is predicted.
    """
    name = layer or 'backbone'
    modules = dict(model.named_modules())
    if name not in modules:
        near = sorted(other for other in modules if other and other.rpartition('.')[0] == name.rpartition('.')[0])
        raise ToolError(f'there is no layer {name!r} in the model; beside it are {", ".join(near[:20])}')
    index = _class_index(target, classes)
    if isinstance(index, str) and task != 'detection':
        raise ToolError(f'{target!r} means a detection: give a class')
    with _evaluating(model), _tap(modules[name]) as outputs, torch.enable_grad():
        batch = model.data_preprocessor(dict(data), False)
        inputs, samples = batch['inputs'], batch.get('data_samples')
        score, text = _SCORES[task](model, inputs, samples, classes, index, score_thr)
        if len(outputs) != 1:
            raise ToolError(f'layer {name!r} runs {len(outputs)} times for one image, not once: choose another')
        slopes = torch.autograd.grad(score, outputs[0], allow_unused=True) if score.requires_grad else []
    pairs = [(x.detach(), slope) for x, slope in zip(outputs[0], slopes, strict=False) if slope is not None]
    if not pairs:
        raise ToolError(f'the score of {text} does not depend on layer {name!r} by a gradient: choose another')
    size = (inputs.shape[-2], inputs.shape[-1])
    used = max(pairs, key=lambda pair: float((pair[0] * pair[1]).abs().sum()))
    maps, gradients = (to_nchw(x, size, layout) for x in used)
    is_vheat = any(isinstance(modules[part], VHeat) for part in accumulate(name.split('.'), '{}.{}'.format))
    heat = enlarge(grad_cam(maps, gradients)[None].float(), size, is_vheat)[0, 0]
    image = displayable(data['inputs'][0].permute(1, 2, 0).cpu().numpy())
    heat = heat[: image.shape[0], : image.shape[1]]  # the padding is on the right and at the bottom
    return Cam(
        image=image[..., ::-1],
        heat=(heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)).cpu().numpy(),
        target=text,
        layer=name,
        grid=(maps.shape[2], maps.shape[3]),
    )


def enlarge(heat: Tensor, size: tuple[int, int], is_vheat: bool) -> Tensor:
    """A map (1, 1, h, w) at the (height, width) of the image.

    Position i of vHeat's maps is centred at pixel stride * i, as its convolutions are padded; that of networks which
    cut an image into patches at stride * i + (stride - 1) / 2.
    """
    grid = heat.shape[-2:]
    for stride in (2, 4, 8, 16, 32) if is_vheat else ():
        if all(-(-length // stride) == count for length, count in zip(size, grid, strict=True)):
            inner = [stride * (count - 1) + 1 for count in grid]
            heat = F.interpolate(heat, inner, mode='bilinear', align_corners=True)
            return F.pad(heat, (0, size[1] - inner[1], 0, size[0] - inner[0]), mode='replicate')
    return F.interpolate(heat, size, mode='bilinear')


def to_nchw(x: Tensor, size: tuple[int, int], layout: str | None = None) -> Tensor:
    """A layer's output as a map: (1, C, h, w), (1, h, w, C), or tokens (1, h w, C) -> (1, C, h, w).

    Which it is, follows from the (height, width) of the image: a map is smaller by one stride in both directions. A
    class token before the others is dropped.

    Raises:
        ToolError: The shape fits no layout, or two and ``layout`` names none.
    """
    strides = range(1, max(size) + 1)
    grids = {(-(-size[0] // s), -(-size[1] // s)) for s in strides} | {(size[0] // s, size[1] // s) for s in strides}
    shape, found = tuple(x.shape), []
    if x.ndim == 4 and len(x) == 1:
        found = [
            name
            for name in LAYOUTS
            if layout == name or (not layout and (shape[name.index('H')], shape[name.index('W')]) in grids)
        ]
    elif x.ndim == 3 and len(x) == 1 and layout in (None, 'NLC'):
        tokens = {h * w: (h, w) for h, w in sorted(grids, reverse=True)}
        if grid := tokens.get(shape[1]) or tokens.get(shape[1] - 1):
            return x[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
    if len(found) == 1:
        return x.permute(LAYOUTS[found[0]])
    what = f'{"may have two layouts" if found else "is no map"} of an image of {size[0]}x{size[1]}'
    choices = ', '.join([*LAYOUTS, 'NLC'])
    raise ToolError(f'a layer output of shape {shape} {what}: name its layout ({choices}) or another layer')


def _class_index(target: str | int | None, classes: Sequence[str]) -> int | str | None:
    """Index of a class given by name or number; None and a detection's '#3' stay."""
    if target is None or (isinstance(target, str) and target[:1] == '#' and target[1:].isdecimal()):
        return target
    if target in classes:
        return list(classes).index(str(target))
    if str(target).isdecimal() and int(target) < len(classes):
        return int(target)
    raise ToolError(f'there is no class {target!r}; the model has {", ".join(classes)} (or 0 to {len(classes) - 1})')


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _tap(layer: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collect the maps that a layer returns, a list for each call, as the variables to differentiate by.

    The graph begins there: whether the weights before it are frozen makes no difference, nor are their gradients taken.
    """
    calls: list[list[Tensor]] = []

    def cut(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        given = list(output) if isinstance(output, (tuple, list)) else [output]
        if not given or not all(isinstance(x, Tensor) and x.is_floating_point() for x in given):
            raise ToolError(f'the layer returns {type(output).__name__}, not maps: choose another')
        maps = {id(x): x.data.requires_grad_() for x in given}  # a map that is returned twice stays one
        calls.append(list(maps.values()))
        passed = {key: x.clone() for key, x in maps.items()}  # which a ReLU may write to
        return passed[id(output)] if given[0] is output else type(output)([passed[id(x)] for x in given])

    handle = layer.register_forward_hook(cut)
    try:
        yield calls
    finally:
        handle.remove()


class _Undetached(TorchFunctionMode):
    """Within it ``Tensor.detach`` does nothing: MMDetection's dense heads detach the logits that they predict from."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return args[0] if func is Tensor.detach else func(*args, **(kwargs or {}))


def _classifier_score(model, inputs, samples, classes, target, score_thr) -> tuple[Tensor, str]:
    logits = model(inputs, samples, mode='tensor')[0]
    index = int(logits.argmax()) if target is None else target
    return logits[index], f'{classes[index]} {logits.softmax(0)[index]:.2f}'


def _segmentor_score(model, inputs, samples, classes, target, score_thr) -> tuple[Tensor, str]:
    logits = model.encode_decode(inputs, [sample.metainfo for sample in samples])[0]
    if len(logits) == 1:  # two classes with one logit, whose probability MMSegmentation compares with a threshold
        logits = logits - torch.logit(torch.tensor(float(model.decode_head.threshold)))
        logits = torch.cat([-logits, logits])
    pixels = logits.argmax(0)
    counts = pixels.flatten().bincount(minlength=len(classes))
    index = int(counts.argmax()) if target is None else target
    if not counts[index]:
        found = ', '.join(classes[i] for i in counts.nonzero().flatten().tolist())
        raise ToolError(f'no pixel of the image is predicted as {classes[index]!r}, only as {found}')
    return logits[index][pixels == index].mean(), f'{classes[index]}, {counts[index] / counts.sum():.0%} of the image'


def _detector_score(model, inputs, samples, classes, target, score_thr) -> tuple[Tensor, str]:
    with _Undetached():
        found = model.predict(inputs, samples, rescale=False)[0].pred_instances
    scores, order = found.scores.sort(descending=True)
    labels = found.labels[order]
    number = int(target[1:]) if isinstance(target, str) else 1
    kept = int((scores >= score_thr).sum())
    if not kept:
        best = (
            f'no detection reaches it, the highest score is {scores[0]:.2f}' if len(scores) else 'nothing is detected'
        )
        raise ArgumentError('score_thr', score_thr, best)
    if number < 1 or number > kept:
        raise ToolError(f'there is no detection {number}: {kept} reach the score {score_thr:g}')
    index = int(labels[number - 1]) if target is None or isinstance(target, str) else target
    chosen = (labels == index) & (scores >= score_thr)
    if not chosen.any():
        names = ', '.join(sorted({classes[i] for i in labels[:kept].tolist()}))
        raise ToolError(f'no {classes[index]!r} is detected, only {names}')
    if isinstance(target, str):
        chosen = torch.arange(len(scores), device=scores.device) == number - 1
    many = '' if int(chosen.sum()) == 1 else f'{int(chosen.sum())} x '
    what = f'{target} {classes[index]}' if isinstance(target, str) else f'{many}{classes[index]}'
    return torch.logit(scores[chosen], eps=1e-6).sum(), f'{what} {scores[chosen].mean().item():.2f}'


_SCORES = {'classification': _classifier_score, 'segmentation': _segmentor_score, 'detection': _detector_score}


# ---- the figure and its command ----


def cam_figure(rows: Sequence[Sequence[Cam]]) -> Figure:
    """A row for each image: the image, then what was explained in it, above it class and layer."""
    columns = 1 + max(map(len, rows))
    side = WIDTH / columns
    heights = [side * row[0].image.shape[0] / row[0].image.shape[1] + 0.5 for row in rows]
    figure = new_figure(sum(heights) + 0.5)
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.axis('off')
    for row, places in zip(rows, axes, strict=True):
        places[0].imshow(row[0].image)
        places[0].set_title('image', fontsize=11)
        for cam, axis in zip(row, places[1:], strict=False):
            axis.imshow(cam.image)
            drawn = axis.imshow(cam.heat, cmap=HEAT, vmin=0, vmax=1, alpha=0.55)
            axis.set_title(f'{cam.target}\n{cam.layer}, {cam.grid[0]} x {cam.grid[1]}', fontsize=11)
    bar = figure.colorbar(drawn, ax=axes, location='bottom', shrink=0.4, aspect=50, pad=0.01)
    bar.set_label('Grad-CAM, share of its largest value')
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the kind ``cam``."""
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help="checkpoint: file, address, published name, or 'released'")
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image, folder, glob or .txt file of paths')
    parser.add_argument(
        '--target',
        nargs='+',
        default=[None],
        metavar='CLASS',
        help="classes to explain, by name or number, or '#3' for a detector's third detection; by default the class of "
        'the highest score, of a segmentor that of the most pixels',
    )
    parser.add_argument(
        '--layer',
        nargs='+',
        default=[None],
        metavar='NAME',
        help='modules whose output is looked at, such as backbone.layers.2.1 (default: backbone)',
    )
    parser.add_argument('--layout', choices=[*LAYOUTS, 'NLC'], help='of the output, where its shape does not say it')
    parser.add_argument('--score-thr', type=float, metavar='X', help="detections from this score on (the config's)")
    parser.add_argument('--device', help='such as cpu or cuda:1')


def run(args: argparse.Namespace) -> None:
    """Draw the kind ``cam``."""
    items = list_images(args.images)
    if len(items) > LARGEST:
        raise ToolError(f'{len(items)} images: a picture shows {LARGEST} at the most, each in a row')
    loaded = load_model(args.config, args.checkpoint, args.device, args.cfg_options)
    threshold = loaded.score_thr if args.score_thr is None else args.score_thr
    rows: list[list[Cam]] = []
    for item, data in zip(items, prepare_images(loaded, map(Sample, items)), strict=True):
        rows.append(row := [])
        for target in args.target:
            for layer in args.layer:
                arguments = (loaded.task, loaded.classes, target, layer, args.layout, threshold)
                row.append(cam := explain(loaded.model, data, *arguments))
                nothing = '' if cam.heat.any() else ': nothing in this layer speaks for it, take another --layer'
                print(f'{first_line(item.name)}: {cam.target} at {cam.layer}{nothing}')
    save_figure(cam_figure(rows), args.out)
