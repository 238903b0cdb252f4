"""Where programs come from, with a real HTTP server as the release site."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_local import binaries, downloads, errors, pins

CONTENT = b"#!/bin/sh\necho kwok\n"
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A release site: its address and its folder."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()


@pytest.fixture(autouse=True)
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Go on PATH that is new enough and can build nothing."""
    program = tmp_path / "bin" / "go"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$1" = env ] && echo go1.99 || { echo no compiler today; exit 1; }\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def sources(tmp_path: Path, site: str | None = None, assets: Path | None = None) -> binaries.Sources:
    release = pins.Download(url=f"{site}/kwok", checksum=f"{site}/kwok.sha256") if site else None
    return binaries.Sources(cache=tmp_path / "cache", assets=assets, releases=lambda program: release)


def obtain(wanted: binaries.Sources, lines: list[str] | None = None) -> Path:
    announce = lines.append if lines is not None else lambda line: None
    return binaries.obtain(["kwok"], sources=wanted, announce=announce).programs["kwok"]


@pytest.mark.parametrize("text", [CHECKSUM, f"{CHECKSUM}  kwok\n", f"{'0' * 64}  other\n{CHECKSUM} *kwok\n"])
def test_a_release_with_the_published_checksum_is_kept(
    tmp_path: Path, site: tuple[str, Path], text: str
) -> None:
    address, folder = site
    (folder / "kwok").write_bytes(CONTENT)
    (folder / "kwok.sha256").write_text(text)
    program = obtain(sources(tmp_path, address))
    assert program.read_bytes() == CONTENT
    assert program.stat().st_mode & 0o111
    (folder / "kwok").unlink()
    assert obtain(sources(tmp_path, address)) == program  # from the cache now


def test_a_release_with_another_checksum_is_refused(tmp_path: Path, site: tuple[str, Path]) -> None:
    address, folder = site
    (folder / "kwok").write_bytes(CONTENT + b"evil")
    (folder / "kwok.sha256").write_text(CHECKSUM)
    lines: list[str] = []
    with pytest.raises(errors.LocalClusterError, match="no compiler today") as caught:
        obtain(sources(tmp_path, address), lines)
    assert "FINETUNE_ASSETS" in caught.value.remedy
    assert any("publishes" in line for line in lines)
    assert [path.name for path in (tmp_path / "cache").rglob("*kwok*") if path.is_file()] == []


def test_what_a_killed_command_left_half_done_is_removed(tmp_path: Path, site: tuple[str, Path]) -> None:
    address, folder = site
    (folder / "kwok").write_bytes(CONTENT)
    (folder / "kwok.sha256").write_text(CHECKSUM)
    program = obtain(sources(tmp_path, address))
    program.rename(program.with_name(".kwok.4194304.part"))
    assert obtain(sources(tmp_path, address)) == program
    assert not list(program.parent.glob("*.part"))


def test_a_site_without_checksum_is_not_trusted(tmp_path: Path, site: tuple[str, Path]) -> None:
    address, folder = site
    (folder / "kwok").write_bytes(CONTENT)
    release = pins.Download(url=f"{address}/kwok", checksum=f"{address}/kwok.sha256")
    with pytest.raises(downloads.DownloadError, match="answered 404"):
        downloads.fetch(release, tmp_path / "kwok")
    assert not (tmp_path / "kwok").exists()


def test_a_program_is_taken_out_of_an_archive(tmp_path: Path, site: tuple[str, Path]) -> None:
    address, folder = site
    with tarfile.open(folder / "etcd.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("etcd-v1/etcd")
        member.size = len(CONTENT)
        archive.addfile(member, io.BytesIO(CONTENT))
    digest = hashlib.sha256((folder / "etcd.tar.gz").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  etcd.tar.gz\n")
    release = pins.Download(
        url=f"{address}/etcd.tar.gz", checksum=f"{address}/SHA256SUMS", member="etcd-v1/etcd"
    )
    downloads.fetch(release, tmp_path / "etcd")
    assert (tmp_path / "etcd").read_bytes() == CONTENT
    assert (tmp_path / "etcd").stat().st_mode & 0o111


def test_an_unreachable_site_is_recognized(tmp_path: Path) -> None:
    release = pins.Download(url="http://127.0.0.1:9/kwok", checksum="http://127.0.0.1:9/kwok.sha256")
    with pytest.raises(downloads.UnreachableError, match=r"127\.0\.0\.1:9 cannot be reached"):
        downloads.fetch(release, tmp_path / "kwok")


def test_the_assets_folder_comes_first(tmp_path: Path, site: tuple[str, Path]) -> None:
    address, folder = site
    (folder / "kwok").write_bytes(CONTENT)
    (folder / "kwok.sha256").write_text(CHECKSUM)
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "kwok").write_text("mine")
    with pytest.raises(errors.LocalClusterError, match="not executable"):
        obtain(sources(tmp_path, address, assets))
    (assets / "kwok").chmod(0o755)
    assert obtain(sources(tmp_path, address, assets)) == assets / "kwok"


def test_a_wrong_assets_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.LocalClusterError, match=r"FINETUNE_ASSETS names .*nowhere"):
        obtain(sources(tmp_path, assets=tmp_path / "nowhere"))


def test_a_changed_pin_gets_another_folder(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    (tools / "kwok").mkdir(parents=True)
    (tools / "kwok" / "go.mod").write_text("module a")
    (tools / "kwok" / "go.sum").write_text("")
    where = binaries.Sources(cache=tmp_path / "cache", tools=tools)
    before = binaries.tool_folder(pins.KWOK, where)
    assert binaries.tool_folder(pins.KWOK, where) == before
    (tools / "kwok" / "go.mod").write_text("module b")
    assert binaries.tool_folder(pins.KWOK, where) != before


@pytest.mark.parametrize("tool", pins.TOOLS, ids=lambda tool: tool.name)
def test_the_package_brings_what_every_program_is_built_from(tool: pins.Tool) -> None:
    folder = binaries.Sources.from_environment().tools / tool.name
    assert f"{tool.module} {tool.version}" in (folder / "go.mod").read_text()
    assert (folder / "go.sum").stat().st_size > 0


def test_folders_from_the_environment_hold_wherever_a_part_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_ASSETS", "programs")
    monkeypatch.setenv("FINETUNE_CACHE", "cache")
    found = binaries.Sources.from_environment()
    assert (found.assets, found.cache) == (tmp_path / "programs", tmp_path / "cache")
