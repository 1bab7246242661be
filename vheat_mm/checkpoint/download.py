"""Bounded download: untrusted servers can neither send without end nor stall."""

from __future__ import annotations

import http.client
import time
import urllib.request
from typing import IO

from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line

MAX_BYTES = 8 << 30
_TIMEOUT = 60.0  # seconds without data
_MIN_SPEED = 10_000  # bytes per second on average, once ``_TIMEOUT`` seconds have passed
_CHUNK = 1 << 20


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only; urllib itself would follow them to ftp."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.lower().startswith(('http://', 'https://')):
            raise CheckpointError(f'{req.full_url!r} redirects to {first_line(newurl)!r}, which is not http(s)')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, file: IO[bytes]) -> None:
    """Download an http(s) URL into a file.

    Raises:
        CheckpointError: The download failed, was incomplete, too slow or larger than ``MAX_BYTES``, or was redirected
            to another protocol.
    """
    try:
        with urllib.request.build_opener(_HttpOnly).open(url, timeout=_TIMEOUT) as response:
            _copy(response, file, url)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CheckpointError(f'could not download {url!r}: {first_line(error)}') from error


def _copy(response: http.client.HTTPResponse, file: IO[bytes], url: str) -> None:
    announced = response.length  # bytes; None if the server does not tell
    started, received = time.monotonic(), 0
    remedy = 'Download it with another program and give its path.'
    while (announced or 0) <= MAX_BYTES and (chunk := response.read1(_CHUNK)):
        received += len(chunk)
        file.write(chunk)
        elapsed = time.monotonic() - started
        if elapsed > _TIMEOUT and received < elapsed * _MIN_SPEED:
            raise CheckpointError(f'{url!r} sent {received} bytes in {elapsed:.0f} seconds. {remedy}')
        if received > MAX_BYTES:
            break
    if max(received, announced or 0) > MAX_BYTES:
        raise CheckpointError(f'{url!r} sends more than {MAX_BYTES} bytes. {remedy}')
    if announced is not None and received != announced:
        raise CheckpointError(f'{url!r} sent {received} of {announced} bytes: try again')
