"""The checkpoints of the reference release by name, and the place that they come from.

``VHEAT_WEIGHTS``, a folder or an address, takes the place of :data:`BASE`: a mirror, or a machine without internet. A
folder holds the files as the release's addresses do (``vheatcls/vHeat_tiny.pth``) or side by side.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.files import expand_user
from vheat_mm.utils.text import some_of

BASE = 'https://github.com/MzeroMiko/vHeat/releases/download/'
VARIABLE = 'VHEAT_WEIGHTS'


@dataclass(frozen=True)
class Released:
    """A published checkpoint.

    Attributes:
        config: Stem of the config that it was trained with, which is a name of it.
        path: Of the file, below :data:`BASE`.
        alias: The name of a classifier.
    """

    config: str
    path: str
    alias: str = ''

    @property
    def name(self) -> str:
        """What users call it."""
        return self.alias or self.config

    @property
    def url(self) -> str:
        """Address of the file in the release, whatever ``VHEAT_WEIGHTS`` says."""
        return BASE + self.path

    @property
    def log_url(self) -> str:
        """Address of the training's log in the release."""
        return re.sub('pth$', 'txt' if self.path.startswith('vheatcls') else 'log', self.url)


RELEASES = (
    Released('vheat-t_16xb128_in1k', 'vheatcls/vHeat_tiny.pth', 'vheat_tiny'),
    Released('vheat-s_16xb128_in1k', 'vheatcls/vHeat_small.pth', 'vheat_small'),
    Released('vheat-b_16xb128_in1k', 'vheatcls/vHeat_base.pth', 'vheat_base'),
    Released('mask-rcnn_vheat-t_fpn_1x_coco', 'vheatdet/vHeat_tiny_det.pth'),
    Released('mask-rcnn_vheat-s_fpn_1x_coco', 'vheatdet/vHeat_small_det.pth'),
    Released('mask-rcnn_vheat-b_fpn_1x_coco', 'vheatdet/vHeat_base_det.pth'),
    Released('mask-rcnn_vheat-t_fpn_ms-crop-3x_coco', 'vheatdet/vHeat_tiny_det_ms3x.pth'),
    Released('mask-rcnn_vheat-s_fpn_ms-crop-3x_coco', 'vheatdet/vHeat_small_det_ms3x.pth'),
    Released('vheat-t_upernet_8xb2-160k_ade20k-512x512', 'vheatseg/vHeat_tiny_seg.pth'),
    Released('vheat-b_upernet_8xb2-160k_ade20k-512x512', 'vheatseg/vHeat_base_seg.pth'),
)
NAMES = tuple(release.name for release in RELEASES)


def find_released(name: object) -> Released | None:
    """The checkpoint of that name or release address, ``None`` for anything else."""
    return next((r for r in RELEASES if name in (r.name, r.config, r.url)), None)


def locate(release: Released) -> str:
    """Path or address of a published checkpoint.

    Raises:
        CheckpointError: ``VHEAT_WEIGHTS`` is neither a folder nor a plain address, or a folder without the file.
    """
    base = os.environ.get(VARIABLE) or BASE
    if re.match('https?:', base, re.IGNORECASE):
        try:
            parts = urlsplit(base)
            plain = parts.hostname and not (parts.query or parts.fragment or '@' in parts.netloc)
        except ValueError:
            plain = False
        if not plain:  # not shown: there may be a password in it
            raise CheckpointError(
                f'{VARIABLE} is no address of a folder: expected http(s)://HOST/PATH without user, password, ? and #'
            )
        return f'{parts.geturl().rstrip("/")}/{release.path}'
    folder = expand_user(base)
    if not folder.is_dir():
        raise CheckpointError(f'{VARIABLE}={base!r} is neither a folder nor an http(s) address: correct or unset it')
    places = folder / release.path, folder / Path(release.path).name
    if found := next((place for place in places if place.is_file()), None):
        return str(found)
    there = sorted(str(path.relative_to(folder)) for pattern in ('*.pth', '*/*.pth') for path in folder.glob(pattern))
    raise CheckpointError(
        f'{VARIABLE}={base!r} lacks {release.path!r} of {release.name!r}, also as {places[1].name!r}; in it are '
        f'{some_of(there)}. Its address in the release is {release.url}'
    )


def check_name(path: str) -> None:
    """Refuse a word, or what is like a name, that is neither a file nor a name of a published checkpoint.

    Raises:
        CheckpointError: With the names.
    """
    if '/' in path or os.path.lexists(path):
        return
    known = {_bare(word): r.name for r in RELEASES for word in (Path(r.path).stem, r.config, r.name)}
    close = difflib.get_close_matches(_bare(path), known, 1)
    if close or re.fullmatch(r'[\w-]+', path):
        hint = f', did you mean {known[close[0]]!r}?' if close else '.'
        raise CheckpointError(
            f'no checkpoint at {path!r} (working directory {str(Path.cwd())!r}), and no released weights have that '
            f'name{hint} The names are {", ".join(NAMES)}'
        )


def _bare(name: str) -> str:
    """A name without what is easily mistaken in it."""
    return re.sub(r'[-_\s]|\.pth', '', name.lower())
