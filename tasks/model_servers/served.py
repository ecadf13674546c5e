"""A model on servers, for code that is not asynchronous."""

import asyncio
from collections.abc import Iterable, Iterator
from typing import TypeVar

from schemas.config import ServersConfig
from tasks.model_servers.api import Body, Choice, ServerApi, open_client
from tasks.model_servers.pool import SelfTest, ServerPool

K = TypeVar("K")


class ServedModel:
    """A model that servers run.

    Args:
        config: The servers.
        self_test: What each must pass; a ``Probe``. They are tested here.

    Raises:
        ConfigError: the variable with the API key is not set.
        ModelError: a server serves something else, or none answers.
    """

    def __init__(self, config: ServersConfig, self_test: SelfTest) -> None:
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
