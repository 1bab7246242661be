"""Bounded download: untrusted servers can neither send without end nor stall."""

from __future__ import annotations

import http.client
import threading
import urllib.request
from typing import IO

from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line

MAX_BYTES = 8 << 30
_TIMEOUT = 60.0  # seconds in which the minimum must arrive, again and again; they include redirects and the header
_MIN_SPEED = 10_000  # bytes per second
_CHUNK = 1 << 20
_REMEDY = 'Download it with another program and give its path.'


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
    transfer = _Transfer(url, file)
    transfer.start()
    transfer.join(_TIMEOUT)
    before = 0
    while transfer.is_alive():
        received = transfer.received - before
        if received < _TIMEOUT * _MIN_SPEED:
            transfer.cancelled = True
            raise CheckpointError(f'{url!r} sent {received} bytes in {_TIMEOUT:.0f} seconds. {_REMEDY}')
        before += received
        transfer.join(_TIMEOUT)
    if isinstance(transfer.error, CheckpointError):
        raise transfer.error
    if transfer.error is not None:
        raise CheckpointError(f'could not download {url!r}: {first_line(transfer.error)}') from transfer.error


class _Transfer(threading.Thread):
    """The transfer in a thread: no time limit of sockets covers name look-up, TLS, headers and chunk lines together.

    Attributes:
        received: Bytes so far.
        cancelled: Set to end the thread at its next chunk.
        error: What it failed with.
    """

    def __init__(self, url: str, file: IO[bytes]) -> None:
        super().__init__(daemon=True)  # one that waits for a server does not keep the process alive
        self.url, self.file = url, file
        self.received, self.cancelled = 0, False
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with urllib.request.build_opener(_HttpOnly).open(self.url, timeout=_TIMEOUT) as response:
                self._copy(response)
        except Exception as error:  # raised again by download()
            self.error = error

    def _copy(self, response: http.client.HTTPResponse) -> None:
        announced = response.length  # bytes; None if the server does not tell
        while max(announced or 0, self.received) <= MAX_BYTES and (chunk := response.read1(_CHUNK)):
            if self.cancelled:
                return
            self.received += len(chunk)
            self.file.write(chunk)
        if max(announced or 0, self.received) > MAX_BYTES:
            raise CheckpointError(f'{self.url!r} sends more than {MAX_BYTES} bytes. {_REMEDY}')
        if announced is not None and self.received != announced:
            raise CheckpointError(f'{self.url!r} sent {self.received} of {announced} bytes: try again')
