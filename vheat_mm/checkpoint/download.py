"""Downloading from an address that may send anything, for ever, or nothing at all."""

from __future__ import annotations

import http.client
import time
import urllib.request
from typing import IO

from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line

MAX_BYTES = 8 << 30
_TIMEOUT = 60.0  # seconds without a byte
_SLOWEST = 10_000  # bytes per second on average, after the first ``_TIMEOUT``
_CHUNK = 1 << 20


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows no redirect that leaves the web; urllib itself would go on to ftp."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.lower().startswith(('http://', 'https://')):
            raise CheckpointError(f'{req.full_url!r} leads to {first_line(newurl)!r}, which is not on the web')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, file: IO[bytes]) -> None:
    """Write what an http(s) address sends into a file.

    Raises:
        CheckpointError: Nothing there, cut short, too slow, more than ``MAX_BYTES``, or a redirect away from the web.
    """
    try:
        with urllib.request.build_opener(_WebOnly).open(url, timeout=_TIMEOUT) as response:
            _copy(response, file, url)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CheckpointError(f'could not download {url!r}: {first_line(error)}') from error


def _copy(response: http.client.HTTPResponse, file: IO[bytes], url: str) -> None:
    announced = response.length  # bytes, None where the server does not say
    started, received = time.monotonic(), 0
    remedy = 'Fetch it by other means and give its path.'
    while (announced or 0) <= MAX_BYTES and (chunk := response.read1(_CHUNK)):
        received += len(chunk)
        file.write(chunk)
        elapsed = time.monotonic() - started
        if elapsed > _TIMEOUT and received < elapsed * _SLOWEST:
            raise CheckpointError(f'{url!r} sent {received} bytes in {elapsed:.0f} seconds. {remedy}')
        if received > MAX_BYTES:
            break
    if max(received, announced or 0) > MAX_BYTES:
        raise CheckpointError(f'{url!r} sends more than {MAX_BYTES} bytes. {remedy}')
    if announced is not None and received != announced:
        raise CheckpointError(f'{url!r} sent {received} of {announced} bytes: try again')
