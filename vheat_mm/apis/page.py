"""What the page of tools/web_demo.py shows: predictions, painted images, tables, pictures of heat."""

from __future__ import annotations

import html
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vheat_mm.apis.heat.cam import cam_figure, explain
from vheat_mm.apis.heat.diffusivity import diffusivities, diffusivity_figure
from vheat_mm.apis.heat.images import prepare_images
from vheat_mm.apis.heat.networks import vheat_of
from vheat_mm.apis.heat.spread import PATCHES, crop_to_patches, responses, spread_figure
from vheat_mm.apis.inference import Item, Prediction, Predictor, Sample
from vheat_mm.apis.inference.class_table import table_entries
from vheat_mm.apis.inference.coco import to_coco
from vheat_mm.apis.inference.model import LoadedModel
from vheat_mm.apis.inference.painting import displayable, paint
from vheat_mm.models.vheat import VHeat
from vheat_mm.utils.errors import ToolError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWEST = 0.05  # score threshold
ROWS = 200  # of a table


class Model:
    """A model of the page.

    Args:
        config: See :class:`~vheat_mm.apis.inference.Predictor`, as for the others.
        checkpoint: Its weights.
        device: Where it runs.
        max_pixels: Limit on an image.

    Attributes:
        predictor: Returns detections from the page's lowest threshold on.
        score_thr: The threshold with which the config shows them.
        checkpoint: Name of its file.
        network: Seconds that the network took for the last image.
    """

    def __init__(self, config: str, checkpoint: str, device: str | None, max_pixels: int) -> None:
        self.predictor = found = Predictor(config, checkpoint, device=device, max_pixels=max_pixels)
        self.score_thr, found.score_thr = found.score_thr, LOWEST
        self.loaded = LoadedModel(found.model, found.cfg, found.task, found.classes, found.palette, self.score_thr)
        self.checkpoint = Path(checkpoint).name
        self.network = self._started = 0.0
        self.predictor.model.register_forward_pre_hook(self._start)
        self.predictor.model.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.network = time.perf_counter() - self._started


class HeatKind(NamedTuple):
    """A picture of heat.

    Attributes:
        text: What it shows.
        draw: Draws it of a model, an image in BGR order and a class.
        of_class: Whether it differs between classes.
    """

    text: str
    draw: Callable[[Model, np.ndarray, str | None], Figure]
    of_class: bool = False


def _draw_cam(model: Model, image: np.ndarray, target: str | None) -> Figure:
    loaded = model.loaded
    (data,) = prepare_images(loaded, [Sample(Item('', 'the image', 0, 'the image'), image)])
    found = explain(loaded.model, data, loaded.task, loaded.classes, target, score_thr=loaded.score_thr)
    return cam_figure([[found]])


def _vheat(model: Model) -> tuple[VHeat, str]:
    label = f'{Path(str(model.loaded.cfg.filename)).stem}, {model.checkpoint}'
    return vheat_of(model.loaded.model.get_submodule('backbone'), label)


def _draw_spread(model: Model, image: np.ndarray, _: str | None) -> Figure:
    vheat, label = _vheat(model)
    photograph = crop_to_patches(np.ascontiguousarray(displayable(image)[..., ::-1]))
    found = responses(vheat, PATCHES, (photograph.shape[0], photograph.shape[1]))
    return spread_figure(photograph, PATCHES, found, label)


def _draw_diffusivity(model: Model, _image: np.ndarray, _: str | None) -> Figure:
    vheat, label = _vheat(model)
    return diffusivity_figure(diffusivities(vheat, vheat.img_size), label)


HEAT = {
    'Grad-CAM': HeatKind(
        'Where the image speaks for a class: the gradient of its score at the backbone.', _draw_cam, True
    ),
    'Spread': HeatKind('Heat from two patches: through time, and as each stage lets it flow.', _draw_spread),
    'Diffusivity': HeatKind('What the blocks have learnt, which is the same for all images.', _draw_diffusivity),
}


@dataclass
class Shown:
    """What a visitor sees: a prediction that was made once and can be painted again.

    Attributes:
        model: Name of the model on the page.
        prediction: With its image.
        seconds: What each step took.
    """

    model: str
    prediction: Prediction
    seconds: dict[str, float] = field(default_factory=dict)


class Page:
    """The page's contents without its looks.

    Args:
        models: Each with its name on the page.
        folder: Of what visitors upload and download; removed by the caller.
    """

    def __init__(self, models: dict[str, Model], folder: Path) -> None:
        self.models, self._folder = models, folder

    def predict(self, name: str, path: str) -> Shown:
        """Run the network on an image file that a visitor has uploaded.

        Raises:
            ToolError: It cannot be read, or lies elsewhere.
        """
        # Gradio lets any path or address pass that a visitor's program sends without the mark of an upload.
        if not Path(path).resolve().is_relative_to(self._folder.resolve()):
            raise ToolError(f'{Path(path).name} has not been uploaded')
        model = self.models[name]
        start = time.perf_counter()
        item = Item(path, Path(path).name, 0, Path(path).name)
        (prediction,) = model.predictor.predict_items([item])
        if prediction.error is not None:
            raise ToolError(f'{item.name}: {prediction.error}')
        rest = time.perf_counter() - start - model.network
        return Shown(name, prediction, dict(reading=rest, network=model.network))

    def paint(self, shown: Shown, score_thr: float, opacity: float) -> np.ndarray:
        """(H, W, 3) uint8 in BGR order."""
        predictor = self.models[shown.model].predictor
        start = time.perf_counter()
        painted = paint(shown.prediction, predictor.classes, predictor.palette, score_thr, opacity)
        shown.seconds['painting'] = time.perf_counter() - start
        return painted

    def heat(self, shown: Shown, kind: str, target: str | None) -> str:
        """Draw a picture of heat and return its file.

        Raises:
            ToolError: It does not fit the model or the image.
        """
        assert shown.prediction.image is not None
        model = self.models[shown.model]
        figure = HEAT[kind].draw(model, shown.prediction.image, target)
        path = Path(tempfile.mkdtemp(dir=self._folder)) / f'{Path(shown.prediction.item.name).stem}_{kind}.png'
        figure.savefig(path)
        return str(path)

    def save(self, shown: Shown, painted: np.ndarray, score_thr: float) -> tuple[str, str | None]:
        """Write the painted image and, of a detector, the COCO file."""
        import cv2

        folder = Path(tempfile.mkdtemp(dir=self._folder))
        stem = Path(shown.prediction.item.name).stem
        image = folder / f'{stem}_painted.png'
        image.write_bytes(cv2.imencode('.png', painted, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())
        if shown.prediction.boxes is None:
            return str(image), None
        coco = folder / f'{stem}_coco.json'
        coco.write_text(json.dumps(to_coco([shown.prediction], self.models[shown.model].predictor.classes, score_thr)))
        return str(image), str(coco)

    def table(self, shown: Shown, score_thr: float) -> str:
        """HTML of what was found, highest score first."""
        prediction, model = shown.prediction, self.models[shown.model].predictor
        if prediction.label_map is not None:
            heads = ['class', 'share', 'pixels']
            counts = np.bincount(prediction.label_map.reshape(-1), minlength=len(model.classes))[: len(model.classes)]
            order = [label for label in np.argsort(-counts, kind='stable').tolist() if counts[label]]
            rows = [(label, [f'{counts[label] / prediction.label_map.size:.1%}', counts[label]]) for label in order]
            caption = f'{len(rows)} of {len(model.classes)} classes'
        else:
            corners = [] if prediction.boxes is None else ['x1', 'y1', 'x2', 'y2']
            heads = ['class', 'score', *corners]
            rows = [
                (entry['label'], [f'{entry["score"]:.3f}', *(f'{entry[name]:.0f}' for name in corners)])
                for entry in table_entries(prediction, model.classes, score_thr)
            ]
            caption = f'the {len(rows)} most probable of {len(model.classes)} classes'
            if corners:
                caption = f'{len(rows)} detections with a score of {score_thr:.2f} or more; corners in pixels'
        if len(rows) > ROWS:
            caption += f'; the first {ROWS} are listed, the COCO file has all'
        body = ''.join(
            '<tr><td>{}{}</td>{}</tr>'.format(
                f'<span class="swatch" style="background: rgb{tuple(map(int, model.palette[label]))}"></span>',
                html.escape(str(model.classes[label])),
                ''.join(f'<td>{cell}</td>' for cell in cells),
            )
            for label, cells in rows[:ROWS]
        )
        head = ''.join(f'<th scope="col">{name}</th>' for name in heads)
        return f'<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
