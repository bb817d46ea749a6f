"""Runs moto's S3 server in a process of its own, with buckets and credentials."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

_SERVE = """
import signal, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(sys.argv[1], 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
signal.pause()
"""


class S3Server:
    """A server that stores all objects in memory."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        popen: Callable[..., subprocess.Popen[str]] = subprocess.Popen,
    ) -> None:
        """
        Args:
            host: the address to listen on.
            popen: starts the process.
        """
        self.process = popen(
            [sys.executable, "-c", _SERVE, host],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://{host}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a client of this server, without the machine's own AWS settings."""
        return {
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "s3cret",
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, service: str = "s3") -> Any:
        import boto3  # slow to import, and most test processes need no client

        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="tests",
            aws_secret_access_key="s3cret",
        )

    def bucket(self) -> str:
        """Create a bucket; its name."""
        name = f"b{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str, prefix: str = "") -> set[str]:
        pages = (
            self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        )
        return {each["Key"] for page in pages for each in page.get("Contents", [])}

    def enforce_credentials(self) -> None:
        """Require a user's credentials and permissions for all later requests."""
        httpx.post(f"{self.url}/moto-api/reset-auth", content=b"0", timeout=60).raise_for_status()

    def freeze(self) -> None:
        """Stop the process: the kernel accepts connections, and no request gets an answer."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def server() -> Iterator[S3Server]:
    """A server for the duration of the block."""
    made = S3Server()
    try:
        yield made
    finally:
        made.close()
