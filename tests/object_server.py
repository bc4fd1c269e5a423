"""A server on this machine with the API of S3, for tests of object storage."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HOST = "127.0.0.1"
KEYS = {
    "AWS_ACCESS_KEY_ID": "of-tests",
    "AWS_SECRET_ACCESS_KEY": "secret-of-tests",
    "AWS_REGION": "us-east-1",
}


@dataclass
class Objects:
    """A running server. client: boto3's, for what a test puts there and looks at."""

    address: str
    client: Any

    def bucket(self, name: str) -> str:
        """A new bucket, or an empty one; its address."""
        self.client.create_bucket(Bucket=name)
        for key in self.names(name):
            self.client.delete_object(Bucket=name, Key=key)
        return f"s3://{name}"

    def upload(self, folder: Path, bucket: str, prefix: str) -> str:
        """Put the files of a folder below a prefix; the address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder).as_posix()}"
                self.client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
        return f"s3://{bucket}/{prefix}"

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """The keys in a bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def content(self, bucket: str, key: str) -> bytes:
        """The bytes of an object."""
        return bytes(self.client.get_object(Bucket=bucket, Key=key)["Body"].read())


@contextmanager
def serve() -> Iterator[Objects]:
    """A server with the API of S3 that obstore finds by the environment of this process."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    address = f"http://{HOST}:{server.get_host_and_port()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(key, value)
        try:
            yield Objects(address, boto3.client("s3"))
        finally:
            server.stop()
