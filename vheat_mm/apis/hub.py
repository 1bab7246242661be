"""vHeat on the Hugging Face Hub, through ``huggingface_hub``'s own mixin: ``pip install 'vheat_mm[hub]'``.

A folder holds ``config.json`` (the constructor's arguments, and later changes of the model), the weights in
``model.safetensors``, and a model card. The mixin alone accepts a config with missing or misspelt arguments and weights
that do not fit (``strict=False``); here each of them is an error.
"""

from __future__ import annotations

import functools
import json
import os
import types
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from vheat_mm.checkpoint.io import read_checkpoint, save_atomically
from vheat_mm.models.arch import ARCHS
from vheat_mm.models.classifier import VHeatClassifier
from vheat_mm.models.vheat import DropPath, Stage, VHeat
from vheat_mm.models.weights import compare
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line, some_of

_CONFIG, _WEIGHTS = 'config.json', 'model.safetensors'  # the mixin's file names
# Entries of the config beside the constructor's arguments: the class, and the image size of ``switch_to_deploy``.
_ARCHITECTURE, _DEPLOYED = 'architecture', 'deployed'
# The classes of :mod:`vheat_mm.hub`: what they add the mixin to, and their task on the Hub.
_BASES: dict[str, tuple[type[nn.Module], str]] = {
    'HubVHeat': (VHeat, 'image-feature-extraction'),
    'HubVHeatClassifier': (VHeatClassifier, 'image-classification'),
}


@functools.cache
def hub_class(name: str) -> Any:
    """Make ``HubVHeat`` or ``HubVHeatClassifier``; not on import, as huggingface_hub is optional.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import PyTorchModelHubMixin
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'vheat_mm.hub needs huggingface_hub and safetensors (no module {error.name!r}): '
            "pip install 'vheat_mm[hub]'",
            name=error.name,
        ) from error
    base, task = _BASES[name]
    arguments = dict(
        library_name='vheat_mm',
        license='apache-2.0',
        paper_url='https://arxiv.org/abs/2405.16555',
        tags=['vheat', 'backbone'],
        pipeline_tag=task,
    )
    members = dict(__module__='vheat_mm.hub', __doc__=_DOC.format(base.__name__), architecture=base.__name__)
    return types.new_class(name, (_HubMethods, PyTorchModelHubMixin, base), arguments, lambda ns: ns.update(members))


_DOC = """:class:`~vheat_mm.models.{}` with ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``.

Every constructor argument but ``init_cfg`` is stored and restored, and so are the floating-point types of the weights
and ``switch_to_deploy``.
"""


class _HubMethods:
    """Methods in front of the mixin's, with an error where the mixin would continue with something else."""

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
        """Build the model that ``save_pretrained`` saved, in evaluation mode.

        Args:
            pretrained_model_name_or_path: Folder, or repository of the Hub such as ``'user/vheat_tiny'``.
            force_download: See ``huggingface_hub.snapshot_download``, as for ``token``, ``cache_dir``,
                ``local_files_only``, ``revision``.
            model_kwargs: Arguments of the constructor that replace the stored ones, and ``map_location`` (device,
                default ``'cpu'``). Embeddings are padded to another ``img_size``.

        Raises:
            CheckpointError: No such folder or repository; files that are missing, corrupt, of another class, written
                by another program, or that do not fit each other or ``model_kwargs``.
        """
        from huggingface_hub import snapshot_download

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
                        allow_patterns=[_CONFIG, _WEIGHTS],
                    )
                )
            except (OSError, ValueError) as error:  # of the network, the cache, and malformed names
                raise CheckpointError(
                    f'{str(pretrained_model_name_or_path)!r} is not a folder (working directory {Path.cwd()}), and '
                    f'its download from the Hugging Face Hub failed: {first_line(error)}'
                ) from error
        _check_config(cls, folder / _CONFIG)
        return super().from_pretrained(str(folder), **model_kwargs)  # type: ignore[misc]

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
        """Called by the mixin with a folder, its config, and the constructor's arguments."""
        if not strict:
            raise ValueError('strict must be True: weights that do not fit are an error')
        folder = Path(model_id)
        try:
            model = _build(cls, model_kwargs, (config or {}).get(_DEPLOYED))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f'cannot build the model of {str(folder / _CONFIG)!r}, {model_kwargs}: {error}'
            ) from error
        _load_strictly(model, folder / _WEIGHTS)
        return model.eval().to(map_location)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write config, weights and, unless there is one already, a model card.

        Args:
            save_directory: Folder; created if it does not exist.
            kwargs: The mixin's: ``push_to_hub=True`` with ``repo_id``, ``model_card_kwargs``.

        Raises:
            CheckpointError: The model was changed so that its arguments do not build it, and nothing was written; or
                the weights could not be written.
        """
        self._hub_mixin_config = _config_of(self)
        return super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    def _save_pretrained(self, save_directory: Path) -> None:
        """Called by the mixin, whose own way of writing is not atomic and makes a file that only its owner can read."""
        save_atomically(cast(nn.Module, self).state_dict(), save_directory / _WEIGHTS)


def _backbone(model: nn.Module) -> VHeat:
    return model if isinstance(model, VHeat) else cast(VHeat, model.backbone)


def _build(cls: type, arguments: dict[str, Any], deployed: list[int] | None) -> Any:
    model = cls(**arguments)
    if deployed is not None:
        _backbone(model).switch_to_deploy(deployed)
    return model


def _config_of(model: Any) -> dict[str, Any]:
    """The config that builds the model again; an error where its arguments do not."""
    backbone = _backbone(model)
    blocks = cast(Stage, backbone.layers[0]).blocks
    left_out = ('init_cfg', _ARCHITECTURE, _DEPLOYED)  # the folder has the weights; an earlier save added the others
    config = {key: value for key, value in model._hub_mixin_config.items() if key not in left_out}
    # These are read from the model, as the mixin's record of the call leaves out what JSON cannot hold.
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
    with torch.device('meta' if deployed is None else 'cpu'):  # switch_to_deploy needs real values
        rebuilt = _build(type(model), config, deployed)
    own, theirs = _layout(model), _layout(rebuilt)
    if own != theirs:
        changed = [key for key in own | theirs if own.get(key) != theirs.get(key)]
        raise CheckpointError(
            f'this {type(model).__name__} was changed and could not be loaded again: its arguments build another one; '
            f'different: {some_of(changed)}. Change models by their arguments, reset_classifier and switch_to_deploy'
        )
    return {_ARCHITECTURE: model.architecture, _DEPLOYED: deployed} | config


def _layout(model: nn.Module) -> dict[str, Any]:
    """Shapes of all weights, and the drop path rates: equal for models that are built alike."""
    rates = {f'{name}.drop_prob': m.drop_prob for name, m in model.named_modules() if isinstance(m, DropPath)}
    return {key: tuple(value.shape) for key, value in model.state_dict().items()} | rates


def _check_config(cls: type[_HubMethods], path: Path) -> None:
    """Refuse a config that the mixin would complete with defaults."""
    name = str(path)
    if not path.is_file():
        raise CheckpointError(f'there is no {name!r}: save_pretrained of a vHeat writes it beside the weights')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{name!r} is corrupt: {error}; save or download it again') from error
    classes = {base.__name__: name for name, (base, _) in _BASES.items()}
    written = config.get(_ARCHITECTURE) if isinstance(config, dict) else None
    if written not in classes:
        raise CheckpointError(
            f'{name!r} was not written by save_pretrained of a vHeat: its {_ARCHITECTURE!r} is {written!r}, expected '
            f'{cls.architecture!r}'
        )
    if written != cls.architecture:
        raise CheckpointError(f'{name!r} describes a {written}: load it with {classes[written]}.from_pretrained')
    arguments = set(cast(Any, cls)._hub_mixin_init_parameters) - {'self', 'init_cfg'}
    known = arguments | {_ARCHITECTURE, _DEPLOYED}
    if known != set(config):
        raise CheckpointError(
            f'{name!r} lacks {some_of(sorted(known - set(config)))} and has unknown '
            f'{some_of(sorted(set(config) - known))}: it was edited, or written by another version of vheat_mm'
        )


def _load_strictly(model: nn.Module, path: Path) -> None:
    """Load all weights of the model and no others, keeping the floating-point types of the file."""
    # Copies: the file is mapped into memory, and the model may be saved over it.
    state = {key: value.clone() for key, value in read_checkpoint(path).items()}
    found = compare(state, model.state_dict())
    if not found.fits:
        raise CheckpointError(f'{str(path)!r} does not fit the {_CONFIG} beside it and the arguments given; {found}')
    model.load_state_dict(state, assign=True)
