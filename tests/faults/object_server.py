"""A real S3 server on loopback (moto's), in a process of its own."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class ObjectServer:
    """An S3 server with one bucket, for the length of a `with`.

    Attributes:
        bucket: URL of the bucket.
        environment: What a process needs to reach it.
    """

    def __init__(self) -> None:
        self.bucket = "s3://test-runs"
        self._port = 0
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "ObjectServer":
        self.start()
        request = urllib.request.Request(f"{self.environment['AWS_ENDPOINT_URL']}/test-runs", method="PUT")
        urllib.request.urlopen(request).close()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @contextmanager
    def reachable(self) -> Iterator[None]:
        """Let this process reach it."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield

    def start(self) -> None:
        """Start it, on the port it had."""
        command = [sys.executable, "-c", _SERVER, str(self._port)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=dict(os.environ),
        )
        assert self._process.stdout is not None
        self._port = next(int(line) for line in self._process.stdout if line.strip().isdigit())
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/moto-api/", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise RuntimeError("the S3 server does not answer")

    def stop(self) -> None:
        """End it; what it held is gone."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
