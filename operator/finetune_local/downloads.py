"""Official release files over HTTPS, kept only when their published SHA-256 fits."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from finetune_local import pins

CONNECT_TIMEOUT = 3.0  # seconds; a laptop without a network must not wait long before it builds
READ_TIMEOUT = 30.0
CHUNK = 1 << 20


class DownloadError(Exception):
    """The file could not be had."""


class UnreachableError(DownloadError):
    """The host does not answer: asking it for the next file is of no use."""


class ChecksumMismatchError(DownloadError):
    """The file is not the one that its project published."""


def fetch(
    download: pins.Download, target: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Put the program at `target` (mode 0755), atomically.

    `progress` is called with (bytes so far, bytes in all or 0).
    Raises UnreachableError, ChecksumMismatchError or DownloadError.
    """
    expected = _published_checksum(download)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        actual = _save(download.url, partial, progress)
        if actual != expected:
            raise ChecksumMismatchError(
                f"{download.url} has SHA-256 {actual}, but its project publishes {expected}"
            )
        if download.member is not None:
            _extract(partial, download.member)
        partial.chmod(0o755)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _published_checksum(download: pins.Download) -> str:
    """Either a bare checksum, or lines of "checksum  file name" as sha256sum writes them."""
    with _open(download.checksum, CONNECT_TIMEOUT) as answer:
        text = answer.read(1 << 20).decode(errors="replace")
    name = urllib.parse.urlparse(download.url).path.rsplit("/", 1)[-1]
    for line in text.splitlines():
        words = line.split()
        ours = len(words) == 1 or (words and words[-1].lstrip("*").rsplit("/", 1)[-1] == name)
        if ours and len(words[0]) == 64:
            return words[0].lower()
    raise DownloadError(f"{download.checksum} holds no SHA-256 for {name}")


def _open(url: str, timeout: float) -> http.client.HTTPResponse:
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(url, timeout=timeout)  # noqa: S310 - pinned addresses
        return answer
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url} answered {error.code}") from error
    except OSError as error:
        raise UnreachableError(f"{urllib.parse.urlparse(url).netloc} cannot be reached: {error}") from error


def _save(url: str, path: Path, progress: Callable[[int, int], None]) -> str:
    digest = hashlib.sha256()
    with _open(url, READ_TIMEOUT) as answer, path.open("wb") as stream:
        total = int(answer.headers.get("Content-Length") or 0)
        done = 0
        try:
            while chunk := answer.read(CHUNK):
                stream.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress(done, total)
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(f"{url} broke off after {done} bytes: {error}") from error
    return digest.hexdigest()


def _extract(archive: Path, member: str) -> None:
    """Replace the archive by one of its files."""
    program = archive.with_suffix(".member")
    try:
        with tarfile.open(archive, "r:gz") as tar:
            source = tar.extractfile(member)
            if source is None:
                raise DownloadError(f"{archive.name} has no file {member}")
            with source, program.open("wb") as stream:
                shutil.copyfileobj(source, stream)
    except (tarfile.TarError, KeyError) as error:
        raise DownloadError(f"{archive.name} has no file {member}: {error}") from error
    program.replace(archive)
