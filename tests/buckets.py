"""A real S3 server on this machine (moto)."""

from __future__ import annotations

import contextlib
import urllib.request
from collections.abc import Iterator

import fsspec

from finetune_local.ports import pick


@contextlib.contextmanager
def serve_bucket(name: str) -> Iterator[dict[str, str]]:
    """Serves an empty bucket; yields the environment variables with which clients reach it."""
    import s3fs
    from moto.server import ThreadedMotoServer

    s3fs.S3FileSystem.clear_instance_cache()  # a client of an earlier bucket would go on with its connections
    (port,) = pick(1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-seen",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        reset = urllib.request.Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset, timeout=10).close()  # all servers of a process share what they store
        open_bucket(environment).mkdir(name)
        yield environment
    finally:
        server.stop()


def open_bucket(environment: dict[str, str]) -> fsspec.AbstractFileSystem:
    return fsspec.filesystem(
        "s3",
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        skip_instance_cache=True,
    )
