"""A model on servers, for code that is not asynchronous."""

import asyncio
import resource
from collections.abc import Iterable, Iterator
from typing import TypeVar

from schemas.config import ServersConfig
from schemas.errors import ConfigError
from tasks.model_servers.api import Body, Choice, ServerApi, open_client
from tasks.model_servers.pool import SelfTest, ServerPool

K = TypeVar("K")

_OTHER_FILES = 512
"""What a stage may have open beside its requests' connections."""


class ServedModel:
    """A model that servers run.

    Args:
        config: The servers.
        self_test: What each must pass; a ``Probe``. They are tested here.

    Raises:
        ConfigError: the variable with the API key is not set, or this process may not open a connection for each
            request that the servers hold together.
        ModelError: a server serves something else, or none answers.
    """

    def __init__(self, config: ServersConfig, self_test: SelfTest) -> None:
        _allow_connections(config)
        self._client = open_client(config)
        self._runner = asyncio.Runner()
        apis = [ServerApi(self._client, url, config) for url in config.urls]
        self._pool = ServerPool(apis, config, self_test)
        try:
            self._runner.run(self._pool.open())
        except BaseException:
            self.close()
            raise

    def answers(self, requests: Iterable[tuple[K, Body]]) -> Iterator[tuple[K, Choice]]:
        """Send requests, as many at a time as the servers hold; return each one's key with its answer.

        Args:
            requests: Taken only as there is room for them, so they may be made as it goes.

        Yields:
            In the order of the answers. Between two of them nothing is sent.

        Raises:
            ModelError: a server refuses a request.
            StageError: no server is left.
        """
        waiting = iter(requests)
        open_requests: dict[asyncio.Task[Choice], K] = {}

        async def step() -> set[asyncio.Task[Choice]]:
            while len(open_requests) < self._pool.capacity:
                request = next(waiting, None)
                if request is None:
                    break
                key, body = request
                open_requests[asyncio.create_task(self._pool.complete(body))] = key
            if not open_requests:
                return set()
            done, _ = await asyncio.wait(open_requests, return_when=asyncio.FIRST_COMPLETED)
            return done

        try:
            while done := self._runner.run(step()):
                for task in done:
                    yield open_requests.pop(task), task.result()
        finally:
            for task in open_requests:
                if not task.cancel() and not task.cancelled():
                    # One error ends the stage; asyncio would report each that nobody looks at.
                    task.exception()

    def counters(self) -> dict[str, float | str]:
        """Return how many servers take requests now, and how many requests were sent again."""
        return {"servers": self._pool.ready, "retries": self._pool.retries}

    def close(self) -> None:
        """End all connections; what is in flight is given up."""
        self._runner.run(self._pool.close())
        self._runner.run(self._client.aclose())
        self._runner.close()


def _allow_connections(config: ServersConfig) -> None:
    """Let this process open as many files as it may have connections: 1024 are usual, which four servers fill.

    Where no file can be opened, every server looks as if it did not answer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(config.urls) * config.max_in_flight + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError):
        raise ConfigError(
            f"{config.section}.max_in_flight: {len(config.urls)} servers with {config.max_in_flight} requests each "
            f"need {needed} open files, and this process may have {hard}: lower it, or raise that limit (`ulimit -n`)"
        ) from None
