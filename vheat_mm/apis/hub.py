"""Saving to and loading from the Hugging Face Hub, by its own mixin: ``pip install 'vheat_mm[hub]'``.

A folder holds ``config.json`` (the constructor's arguments, and what was done to the model since), weights in
``model.safetensors``, and a model card. The mixin on its own takes a config that lacks or misspells an argument and
weights that do not fit (``strict=False``) without an error; here each of them is one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from vheat_mm.checkpoint.io import read_checkpoint, save_atomically
from vheat_mm.models.arch import ARCHS
from vheat_mm.models.classifier import VHeatClassifier
from vheat_mm.models.vheat import DropPath, Stage, VHeat
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import some_of

try:
    from huggingface_hub import PyTorchModelHubMixin, snapshot_download
    from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"vheat_mm.hub needs huggingface_hub and safetensors (no module {error.name!r}): pip install 'vheat_mm[hub]'",
        name=error.name,
    ) from error

# What the config says beside the constructor's arguments: the class, and the image size of ``switch_to_deploy``.
_ARCHITECTURE, _DEPLOYED = 'architecture', 'deployed'


class _HubModel(
    PyTorchModelHubMixin,
    library_name='vheat_mm',
    license='apache-2.0',
    paper_url='https://arxiv.org/abs/2405.16555',
    tags=['vheat', 'backbone'],
):
    """The mixin with nothing passed over in silence; see :class:`HubVHeat`."""

    architecture: ClassVar[str]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Build what ``save_pretrained`` saved, in evaluation mode.

        Args:
            pretrained_model_name_or_path: Folder, or repository of the Hub such as ``'user/vheat_tiny'``.
            force_download: See ``huggingface_hub.snapshot_download``, as for ``token``, ``cache_dir``,
                ``local_files_only``, ``revision``.
            model_kwargs: Arguments of the constructor in place of the stored ones, and ``map_location`` (device,
                default ``'cpu'``). Embeddings are padded to another ``img_size``.

        Raises:
            CheckpointError: No such folder or repository; files that are missing, damaged, of another class, written
                by something else, or that do not fit each other or ``model_kwargs``.
        """
        folder = Path(pretrained_model_name_or_path).expanduser()
        if not folder.is_dir():
            try:
                folder = Path(
                    snapshot_download(
                        str(pretrained_model_name_or_path),
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        token=token,
                        local_files_only=local_files_only,
                        allow_patterns=[CONFIG_NAME, SAFETENSORS_SINGLE_FILE],
                    )
                )
            except (OSError, ValueError) as error:  # of the net, the cache, and names that are none
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise CheckpointError(
                    f'{str(pretrained_model_name_or_path)!r} is no folder (working directory {Path.cwd()}), and as a '
                    f'repository of the Hugging Face Hub it could not be had: {reason}'
                ) from error
        _check_config(cls, folder / CONFIG_NAME)
        return super().from_pretrained(str(folder), **model_kwargs)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = 'cpu',
        strict: bool = True,
        config: dict[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by the mixin with a folder, its config, and the arguments to build from."""
        if not strict:
            raise ValueError('strict must be True: weights fit, or loading them is an error')
        folder = Path(model_id)
        try:
            model = _build(cls, model_kwargs, (config or {}).get(_DEPLOYED))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f'no model comes of {str(folder / CONFIG_NAME)!r}, {model_kwargs}: {error}'
            ) from error
        _load_strictly(model, folder / SAFETENSORS_SINGLE_FILE)
        return model.eval().to(map_location)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write config, weights and, where there is none yet, a model card.

        Args:
            save_directory: Folder; made where there is none.
            kwargs: The mixin's: ``push_to_hub=True`` with ``repo_id``, ``model_card_kwargs``.

        Raises:
            CheckpointError: The model was changed into something that no arguments build, and nothing was written; or
                the weights could not be written.
        """
        self._hub_mixin_config = _describe(self)
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Called by the mixin, whose own file could be half written and is readable by its owner only."""
        save_atomically(cast(nn.Module, self).state_dict(), save_directory / SAFETENSORS_SINGLE_FILE)


class HubVHeat(_HubModel, VHeat, pipeline_tag='image-feature-extraction'):
    """:class:`~vheat_mm.VHeat` with ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``.

    Every constructor argument but ``init_cfg`` is stored and restored, and so are the floating-point types of the
    weights and ``switch_to_deploy``.
    """

    architecture = 'VHeat'


class HubVHeatClassifier(_HubModel, VHeatClassifier, pipeline_tag='image-classification'):
    """:class:`~vheat_mm.models.classifier.VHeatClassifier` with ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``."""

    architecture = 'VHeatClassifier'


def _backbone(model: nn.Module) -> VHeat:
    return model if isinstance(model, VHeat) else cast(VHeat, model.backbone)


def _build(cls: type, arguments: dict[str, Any], deployed: list[int] | None) -> Any:
    model = cls(**arguments)
    if deployed is not None:
        _backbone(model).switch_to_deploy(deployed)
    return model


def _describe(model: Any) -> dict[str, Any]:
    """The config from which the model can be built again; an error where there is none."""
    backbone = _backbone(model)
    blocks = cast(Stage, backbone.layers[0]).blocks
    left_out = ('init_cfg', _ARCHITECTURE, _DEPLOYED)  # the weights are in the folder; an earlier save added the others
    config = {key: value for key, value in model._hub_mixin_config.items() if key not in left_out}
    # What the model itself knows is not left to the mixin's record of the call, which skips what JSON cannot hold.
    config |= dict(
        arch=next((name for name, arch in ARCHS.items() if arch == backbone.arch), backbone.arch),
        img_size=backbone.img_size,
        frozen_stages=backbone.frozen_stages,
        in_channels=backbone.patch_embed.conv1.in_channels,
        with_cp=cast(Stage, backbone.layers[0]).with_cp,
    )
    config |= dict(out_indices=backbone.out_indices) if model is backbone else dict(num_classes=model.num_classes)
    deployed = None
    if backbone.freq_embed is None:
        deployed = [4 * side for side in blocks[0].op.k_exp.shape[:2]]  # the largest image with these stage maps
    with torch.device('meta' if deployed is None else 'cpu'):  # a deployed model is computed, not just laid out
        rebuilt = _build(type(model), config, deployed)
    own, theirs = _layout(model), _layout(rebuilt)
    if own != theirs:
        changed = [key for key in own | theirs if own.get(key) != theirs.get(key)]
        raise CheckpointError(
            f'this {type(model).__name__} is not what its arguments build, so nothing could load it; what differs: '
            f'{some_of(changed)}. Change models by their arguments, reset_classifier and switch_to_deploy'
        )
    return {_ARCHITECTURE: model.architecture, _DEPLOYED: deployed} | config


def _layout(model: nn.Module) -> dict[str, Any]:
    """What two models have in common that can hold each other's weights and are trained alike."""
    rates = {f'{name}.drop_prob': m.drop_prob for name, m in model.named_modules() if isinstance(m, DropPath)}
    return {key: tuple(value.shape) for key, value in model.state_dict().items()} | rates


def _check_config(cls: type[_HubModel], path: Path) -> None:
    """Refuse a config that the mixin would fill up with defaults."""
    name = str(path)
    if not path.is_file():
        raise CheckpointError(f'there is no {name!r}: save_pretrained of a vHeat writes it beside the weights')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{name!r} is damaged: {error}; save or download it again') from error
    classes = {sub.architecture: sub.__name__ for sub in (HubVHeat, HubVHeatClassifier)}
    written = config.get(_ARCHITECTURE) if isinstance(config, dict) else None
    if written not in classes:
        raise CheckpointError(
            f'{name!r} was not written by save_pretrained of a vHeat: its {_ARCHITECTURE!r} is {written!r}, expected '
            f'{cls.architecture!r}'
        )
    if written != cls.architecture:
        raise CheckpointError(f'{name!r} describes a {written}: load it with {classes[written]}.from_pretrained')
    known = (set(cls._hub_mixin_init_parameters) - {'self', 'init_cfg'}) | {_ARCHITECTURE, _DEPLOYED}
    if known != set(config):
        raise CheckpointError(
            f'{name!r} lacks {some_of(sorted(known - set(config)))} and has unknown '
            f'{some_of(sorted(set(config) - known))}: it was edited, or written by another version of vheat_mm'
        )


def _load_strictly(model: nn.Module, path: Path) -> None:
    """Load weights that must be the whole model and nothing else, in the types they are stored in."""
    # Copies: the file is mapped into memory, and the model may be saved over it.
    state = {key: value.clone() for key, value in read_checkpoint(path).items()}
    own = model.state_dict()
    missing, left_over = [key for key in own if key not in state], [key for key in state if key not in own]
    wrong = [
        f'{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}'
        for key, value in state.items()
        if key in own and value.shape != own[key].shape and not _is_other_grid(key, value, own[key])
    ]
    if missing or left_over or wrong:
        raise CheckpointError(
            f'{str(path)!r} does not fit the {CONFIG_NAME} beside it and the arguments given; missing: '
            f'{some_of(missing)}; left over: {some_of(left_over)}; of another shape: {some_of(wrong)}'
        )
    model.load_state_dict(state, assign=True)


def _is_other_grid(key: str, value: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether these are embeddings that the model's load hook brings to its own grid."""
    return '.freq_embed.' in f'.{key}' and value.ndim == 3 and value.shape[2] == own.shape[2]
