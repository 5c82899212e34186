"""Downloads weights files: retries with backoff, resumes, and verifies. Nothing else in the package downloads them."""

import logging
import os
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from tqdm import tqdm

from separation.checkpoints.description import WeightFile
from separation.checkpoints.files import (
    as_recorded,
    converted_path,
    fault,
    is_stamped,
    local_path,
    locked,
    record,
    restore_command,
    stamp,
    verify,
    writing,
)
from separation.checkpoints.keys import LARGEST
from separation.documents import CONTROL, first_line, quoted
from separation.errors import CheckpointError, DownloadError
from separation.progress import Progress
from separation.system.network_errors import why_no_connection
from separation.system.output import not_through_links
from separation.system.places import size_bytes, weights_folder

TIMEOUT_SECONDS = 30.0  # if no byte arrives
RETRY_SECONDS = (0.5, 1.0, 2.0)  # the backoff; any progress resets it
BLOCK_BYTES = 1 << 18
REDIRECTS = {("http", "http"), ("http", "https"), ("https", "https")}  # allowed schemes: (from, to)

logger: logging.Logger = logging.getLogger("separation")


class _BrokenConnectionError(Exception):
    """A failure of the server or the network that a retry may overcome."""


def fetch(file: WeightFile, *, quiet: bool = False, progress: Progress = Progress()) -> Path:
    """The path of a verified weights file, which is downloaded if it is not here.

    A progress bar goes to stderr unless `quiet`, and `progress` is called with the share that is here, if the server
    states the size; it may raise to cancel. A broken download is resumed, also by a later process. While one
    process downloads a file, others wait for it. A converted file takes the original's place, without a checksum of its
    own.

    If the url fails, or sends other bytes, the mirrors are tried in order, with a warning. If the publisher states no
    sha256, or only its first digits, the first download's is recorded, with a warning.

    Raises CheckpointError for a file with the wrong content, DownloadError if the download fails, OutputError if the
    file cannot be written.
    """
    if converted := converted_path(file):
        return converted
    file = as_recorded(file)
    path = local_path(file)
    if path.exists():
        if not is_stamped(path, file):
            verify(path, file)
            stamp(path, file)
        return path
    if file.url is None:
        raise CheckpointError(f"{path} is missing and has no url: restore it, or put it into {weights_folder()}")
    with locked(path):
        if not path.exists():  # another process may have downloaded it meanwhile
            _download_from_any(file, [file.url, *file.mirrors], path, quiet=quiet, progress=progress)
    return path


def _download_from_any(file: WeightFile, urls: Sequence[str], path: Path, *, quiet: bool, progress: Progress) -> None:
    """Download from the first of the addresses that has the right bytes. Raises the error of the last."""
    for url, mirror in zip(urls, [*urls[1:], None], strict=True):
        try:
            _download(file, url, path, quiet=quiet, progress=progress)
            return
        except DownloadError as e:
            if mirror is None:
                raise DownloadError(
                    f"{path.name} is not in {path.parent} and {e}: put it into that folder, or {restore_command(file)} "
                    "when the network works"
                ) from e
            logger.warning(f"{path.name} {e}; trying the mirror {mirror}")
        except CheckpointError as e:
            if mirror is None:
                raise
            logger.warning(f"{e}; trying the mirror {mirror}")


def _download(file: WeightFile, url: str, path: Path, *, quiet: bool, progress: Progress) -> None:
    part = path.with_name(path.name + ".part")
    with writing(part):
        # Without a sha256, nothing would tell that the two halves of a resumed download are of different versions.
        if part.is_symlink() or not file.sha256:
            part.unlink(missing_ok=True)
    failures, most_bytes = 0, size_bytes(part)
    while True:
        try:
            _transfer(file, url, part, quiet=quiet, progress=progress)
            break
        except _BrokenConnectionError as e:
            failures = 0 if size_bytes(part) > most_bytes else failures + 1
            most_bytes = max(most_bytes, size_bytes(part))
            if failures > len(RETRY_SECONDS):
                raise _not_downloaded(url, str(e)) from e
            time.sleep(RETRY_SECONDS[max(0, failures - 1)])
    if problem := fault(part, file) or _web_page(part, file):
        part.unlink()
        raise CheckpointError(
            f"{url} sent a file that {problem}, and it was removed: {restore_command(file)} to try again"
        )
    if len(file.sha256 or "") < 64:
        file = record(file, part)
    with writing(path):
        os.replace(part, path)
    stamp(path, file)


def _web_page(path: Path, file: WeightFile) -> str | None:
    """The fault of a file without a sha256 that is a web page, as servers send for an error or a login."""
    with path.open("rb") as stream:
        start = stream.read(100).lstrip().lower()
    is_page = file.sha256 is None and start.startswith((b"<!doctype html", b"<html"))
    return "is a web page, not a weights file" if is_page else None


def _not_downloaded(url: str, reason: str) -> DownloadError:
    return DownloadError(f"could not be downloaded from {url} ({reason})")


def _transfer(file: WeightFile, url: str, part: Path, *, quiet: bool, progress: Progress) -> None:
    """Append the missing bytes to `part`, in one request."""
    offset = size_bytes(part)
    response = _open(url, offset)
    if response is None:
        return
    with response:
        if response.status != 206:  # the server does not support ranges and sends the whole file
            offset = 0
        elif not response.headers.get("Content-Range", f"bytes {offset}-").startswith(f"bytes {offset}-"):
            part.unlink(missing_ok=True)
            raise _BrokenConnectionError("the server sends another range than the one requested")
        total = file.bytes if response.length is None else offset + response.length
        bar = tqdm(
            desc=part.stem, total=total, initial=offset, unit="B", unit_scale=True, unit_divisor=1024, disable=quiet
        )
        received, most = offset, file.bytes or LARGEST["bytes"]
        with writing(part), open(part, "ab" if offset else "wb", opener=not_through_links) as stream, bar:
            while received <= most and (block := _receive(response)):
                stream.write(block)
                bar.update(len(block))
                received += len(block)
                progress(min(received / total, 1.0) if total else 0.0)
    if received > most:
        part.unlink()
        raise _not_downloaded(url, f"the server sends more than {most:,} bytes")
    if total is not None and received < total:
        raise _BrokenConnectionError(f"the connection broke after {received:,} of {total:,} bytes")


def _open(url: str, offset: int) -> HTTPResponse | None:
    """The response from byte `offset` on; None if the server has no more bytes than these."""
    request = Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    host = request.host  # becomes the proxy's, if there is one
    try:
        response: HTTPResponse = _opener().open(request, timeout=TIMEOUT_SECONDS)
        return response
    except HTTPError as e:
        e.close()
        if e.code == 416:  # range not satisfiable: `part` is complete, and the checksum tells whether it is right
            return None
        who = "the proxy" if e.code == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED else "the server"
        reason = f"{who} answers {e.code} {CONTROL.sub(' ', ' '.join(str(e.reason).split()))}"
        if e.code < 500 and e.code != 429:
            raise _not_downloaded(url, reason) from e
        raise _BrokenConnectionError(reason) from e
    except InvalidURL as e:
        raise _not_downloaded(url, f"not a valid URL: {first_line(e)}") from e
    except (OSError, HTTPException) as e:
        if isinstance(e, URLError) and isinstance(e.reason, str):  # the URL has no host, or another scheme
            raise _not_downloaded(url, e.reason) from e
        raise _BrokenConnectionError(why_no_connection(e, with_proxy=request.host != host)) from e
    except ValueError as e:  # the URL, or one that the server redirects to
        raise _not_downloaded(url, f"not a valid URL: {first_line(e)}") from e


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to http and https, but never from https to http."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if (urlsplit(req.full_url).scheme, urlsplit(newurl).scheme) not in REDIRECTS:
            raise HTTPError(req.full_url, code, f"and redirects to {quoted(newurl)}, which is refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError:  # the server redirects to an invalid URL
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opener() -> OpenerDirector:
    """An opener for http and https only; urllib's default would follow a redirect to ftp."""
    opener = OpenerDirector()
    for handler in (ProxyHandler, HTTPHandler, HTTPSHandler, HTTPDefaultErrorHandler, _Redirects, HTTPErrorProcessor):
        opener.add_handler(handler())
    opener.add_handler(UnknownHandler())
    return opener


def _receive(response: HTTPResponse) -> bytes:
    try:
        return response.read(BLOCK_BYTES)
    except (OSError, HTTPException) as e:
        raise _BrokenConnectionError(why_no_connection(e)) from e
