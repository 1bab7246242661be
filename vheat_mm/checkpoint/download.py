"""Bounded download: untrusted servers can neither send without end nor stall. An interrupted one goes on."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.files import read_regular
from vheat_mm.utils.text import first_line, is_address

MAX_BYTES = 8 << 30
_TIMEOUT = 60.0  # seconds in which the minimum must arrive, again and again; they include redirects and the header
_MIN_SPEED = 10_000  # bytes per second
_CHUNK = 1 << 20
_LONGEST_NOTE = 1 << 16  # bytes


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only; urllib itself would follow them to ftp."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not is_address(newurl):
            raise CheckpointError(f'{req.full_url!r} redirects to {first_line(newurl)!r}, which is not http(s)')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, part: Path, limit: int | None = None, quiet: bool = False) -> None:
    """Download an http(s) URL into a file, or go on with what an interrupted call has left in it.

    Where the server tells the version of its file, by ``ETag`` or ``Last-Modified``, that is noted in ``<part>.json``
    and an interrupted download keeps what it has. Everything else that fails leaves nothing behind.

    Args:
        url: Its address.
        part: The file.
        limit: Bytes that it may have; ``MAX_BYTES`` by default.
        quiet: Show no progress bar.

    Raises:
        CheckpointError: The download failed, was incomplete, too slow or larger than ``limit``, or was redirected
            to another protocol; or the server sent a web page, or a compressed file.
        OSError: The file cannot be written, or the disk has no room for it.
    """
    transfer = _Transfer(url, part, limit or MAX_BYTES)
    try:
        _watch(transfer, quiet)
    except BaseException as error:
        transfer.cancelled = True
        kept = part.stat().st_size if transfer.note.exists() and part.exists() else 0
        if not kept:
            forget(part)
        if kept and isinstance(error, CheckpointError):
            raise CheckpointError(f'{error}; {_size(kept)} of it are kept, and the next try goes on there') from error
        raise
    transfer.note.unlink(missing_ok=True)


def forget(part: Path) -> None:
    """Remove what a download has left."""
    for path in (part, _note_of(part)):
        path.unlink(missing_ok=True)


def _watch(transfer: _Transfer, quiet: bool) -> None:
    """Run a transfer, show how far it is, and end it when too little arrives."""
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task('', total=None)
        transfer.start()
        checked, before = time.monotonic(), 0
        while transfer.is_alive():
            transfer.join(min(0.2, _TIMEOUT))
            bar.update(task, completed=transfer.done, total=transfer.total)
            if time.monotonic() - checked >= _TIMEOUT and transfer.is_alive():
                received = transfer.received - before
                if received < _TIMEOUT * _MIN_SPEED:
                    raise CheckpointError(f'{transfer.url!r} sent {received} bytes in {_TIMEOUT:.0f} seconds')
                checked, before = time.monotonic(), transfer.received
    error = transfer.error
    of_disk = isinstance(error, OSError) and not isinstance(error, urllib.error.URLError) and error.filename
    if error is not None and (of_disk or isinstance(error, CheckpointError)):
        raise error
    if error is not None:
        raise CheckpointError(f'could not download {transfer.url!r}: {first_line(error)}') from error


class _Transfer(threading.Thread):
    """The transfer in a thread: no time limit of sockets covers name look-up, TLS, headers and chunk lines together.

    Attributes:
        received: Bytes so far, without those of an earlier download.
        done: Bytes of the file so far.
        total: Bytes of the file; ``None`` if the server does not tell.
        cancelled: Set to end the thread at its next chunk.
        error: What it failed with.
    """

    def __init__(self, url: str, part: Path, limit: int) -> None:
        super().__init__(daemon=True)  # one that waits for a server does not keep the process alive
        self.url, self.part, self.note, self.limit = url, part, _note_of(part), limit
        self.received = self.done = 0
        self.total: int | None = None
        self.cancelled = False
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with self._open() as response:
                if not self.cancelled:  # another process may be writing the file by now
                    self._copy(response)
        except Exception as error:  # raised again by download()
            self.error = error

    def _open(self) -> http.client.HTTPResponse:
        """Ask for the file, or for the rest of it if it is still the same; sets ``done`` to where the answer begins."""
        version = self._version_of_part()
        self.done = self.part.stat().st_size if version else 0
        headers = {'Range': f'bytes={self.done}-', 'If-Range': version} if version and self.done else {}
        opener = urllib.request.build_opener(_HttpOnly)
        try:
            response = opener.open(urllib.request.Request(self.url, headers=headers), timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not headers:
                raise
            response = cast(http.client.HTTPResponse, error)
        place = response.headers.get('Content-Range') or ''
        if response.status == http.HTTPStatus.OK:  # a file that has changed, or a server without ranges
            self.done = 0
        elif headers and (_version(response) != version or not place.startswith(f'bytes {self.done}-')):
            response.close()
            forget(self.part)
            return self._open()
        return response

    def _version_of_part(self) -> str:
        """The version of the file of which a part is there; empty if there is none."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            note = json.loads(read_regular(self.note, _LONGEST_NOTE))
            if note['url'] == self.url and self.part.is_file():
                return str(note['version'])
        return ''

    def _copy(self, response: http.client.HTTPResponse) -> None:
        if response.headers.get_content_type() == 'text/html':
            raise CheckpointError(
                f'{self.url!r} answered with a web page instead of a file: a sign-in, a proxy or a wrong address'
            )
        coding = first_line(response.headers.get('Content-Encoding') or 'identity')
        if coding.lower() != 'identity':  # which the request asks for
            raise CheckpointError(f'{self.url!r} is sent compressed, against the request: Content-Encoding {coding!r}')
        announced = response.length  # bytes; None if the server does not tell
        self.total = None if announced is None else self.done + announced
        self._check_size()
        free = shutil.disk_usage(self.part.parent).free
        if (announced or 0) > free:
            raise OSError(errno.ENOSPC, f'{_size(announced or 0)} to come and {_size(free)} free', str(self.part))
        if not self.done:
            forget(self.part)
        with self.part.open('ab') as file:
            if not self.done and (version := _version(response)):
                self.note.write_text(json.dumps(dict(url=self.url, version=version)), encoding='utf-8')
            while chunk := response.read1(_CHUNK):
                if self.cancelled:
                    return
                self.received += len(chunk)
                self.done += len(chunk)
                self._check_size()
                try:
                    file.write(chunk)
                    file.flush()
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(self.part)) from error
        if announced is not None and self.received != announced:
            raise CheckpointError(f'{self.url!r} sent {self.received} of {announced} bytes')

    def _check_size(self) -> None:
        if max(self.total or 0, self.done) > self.limit:
            forget(self.part)
            raise CheckpointError(f'{self.url!r} sends more than {self.limit} bytes')


def _note_of(part: Path) -> Path:
    return part.with_name(f'{part.name}.json')


def _version(response: http.client.HTTPResponse) -> str:
    """What tells one version of the server's file from another; empty if the server does not tell."""
    tag, date = (response.headers.get(name) or '' for name in ('ETag', 'Last-Modified'))
    version = tag if tag.startswith('"') else date  # a weak tag, W/"...", is not for ranges
    return version if len(version) < 200 and version.isprintable() else ''


def _size(count: int) -> str:
    return f'{count / 1e6:.1f} MB'
