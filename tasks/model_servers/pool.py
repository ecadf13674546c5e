"""A model's servers as one: each request goes to the least loaded, and again where the world failed."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from schemas.config import ServersConfig
from schemas.errors import ModelError, StageError
from tasks.model_servers.api import Body, Choice, ServerApi, ServerAwayError

_logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
"""Seconds between two tries of a server that is away: doubled each time, up to the longest."""

SelfTest = Callable[[ServerApi], Awaitable[None]]
"""Raises ModelError where a server is not what it should be, ServerAwayError where it does not answer."""


@dataclass(eq=False)
class _Server:
    """One server.

    Args:
        api: Its endpoints.
        state: `new` before its first test; then `ready` for requests; `away`, but tried again; `left out` for good.
        reason: Why it is not ready.
        in_flight: Requests that it holds.
    """

    api: ServerApi
    state: Literal["new", "ready", "away", "left out"] = "new"
    reason: str = ""
    in_flight: int = 0


@dataclass
class ServerPool:
    """Servers that serve one model. Use it within one event loop.

    Args:
        apis: The servers.
        config: How many requests each holds, and how long it is waited for.
        self_test: What a server must pass before it gets a request, at the start and whenever it was away.
        retries: How often a request was sent again.
    """

    apis: Sequence[ServerApi]
    config: ServersConfig
    self_test: SelfTest
    retries: int = field(init=False, default=0)
    _servers: list[_Server] = field(init=False)
    _changed: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _revivals: set[asyncio.Task[None]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._servers = [_Server(api) for api in self.apis]

    @property
    def capacity(self) -> int:
        """Requests that the servers hold together, those that are away included; at least one."""
        return max(1, sum(s.state != "left out" for s in self._servers) * self.config.max_in_flight)

    @property
    def ready(self) -> int:
        """Servers that take requests now."""
        return sum(server.state == "ready" for server in self._servers)

    async def open(self) -> None:
        """Test every server; wait up to `wait_seconds` until all pass.

        Raises:
            ModelError: a server serves something else, or none answers; names each and what to do.
        """
        loop = asyncio.get_running_loop()
        deadline, missing, wrong = loop.time() + self.config.wait_seconds, list(self._servers), list[_Server]()
        told = ""
        for pause in _pauses():
            verdicts = await asyncio.gather(*map(self._test, missing))
            wrong = [server for server, verdict in zip(missing, verdicts, strict=True) if verdict == "wrong"]
            missing = [server for server, verdict in zip(missing, verdicts, strict=True) if verdict != "ready"]
            if not missing or loop.time() >= deadline:
                break
            if _reasons(missing) != told:
                told = _reasons(missing)
                _logger.warning("waiting, %.0f s at most: %s", deadline - loop.time(), told)
            await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))
        if wrong:
            raise ModelError(_reasons(wrong))
        if len(missing) == len(self._servers):
            raise ModelError(
                f"{self.config.section}: no server answers: {_reasons(missing)}. Start them, or let the stage wait for "
                f"them: `{self.config.section}.wait_seconds`"
            )
        for server in missing:
            self._send_away(server, server.reason)

    async def complete(self, body: Body) -> Choice:
        """Return the answer of whichever server is least loaded; wait for one that has room.

        Raises:
            ModelError: a server refuses the request.
            StageError: no server is left, or this request alone fails for `retry_seconds`.
        """
        loop = asyncio.get_running_loop()
        first_failure: float | None = None
        while True:
            server = await self._take()
            try:
                return await server.api.complete(body)
            except ServerAwayError as error:
                self._send_away(server, f"{server.api.url}: {error}")
                self.retries += 1
                first_failure = loop.time() if first_failure is None else first_failure
                if loop.time() - first_failure > self.config.retry_seconds:
                    raise StageError(
                        f"{server.api.url}: {error}, and so again for {self.config.retry_seconds:g} seconds, while it "
                        "passes its test. See the server's log; the finished shards stay"
                    ) from error
            finally:
                server.in_flight -= 1
                self._tell()

    async def close(self) -> None:
        """Stop trying servers that are away."""
        for task in self._revivals:
            task.cancel()
        await asyncio.gather(*self._revivals, return_exceptions=True)

    async def _take(self) -> _Server:
        while True:
            free = [s for s in self._servers if s.state == "ready" and s.in_flight < self.config.max_in_flight]
            if free:
                server = min(free, key=lambda s: s.in_flight)
                server.in_flight += 1
                return server
            if all(server.state == "left out" for server in self._servers):
                raise StageError(
                    f"{self.config.section}: no server is left: {_reasons(self._servers)}. Start them again and "
                    "continue the run; the finished shards stay"
                )
            await self._changed.wait()

    def _tell(self) -> None:
        """Wake what waits for a server."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _send_away(self, server: _Server, reason: str) -> None:
        if server.state in ("away", "left out"):
            return
        server.state, server.reason = "away", reason
        _logger.warning("%s; tried again for %g s", reason, self.config.retry_seconds)
        task = asyncio.create_task(self._revive(server))
        self._revivals.add(task)
        task.add_done_callback(self._revivals.discard)

    async def _revive(self, server: _Server) -> None:
        """Try a server until it passes its test again, or leave it out."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.retry_seconds
        try:
            for pause in _pauses():
                await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))
                verdict = await self._test(server)
                if verdict == "ready" or verdict == "wrong" or loop.time() >= deadline:
                    return
        finally:
            if server.state != "ready":
                server.state = "left out"
                _logger.warning("left out: %s", server.reason)
            self._tell()

    async def _test(self, server: _Server) -> Literal["ready", "away", "wrong"]:
        """Test a server; note that it is ready, or why it is not."""
        try:
            await self.self_test(server.api)
        except ServerAwayError as error:
            server.reason = f"{server.api.url}: {error}"
            return "away"
        except ModelError as error:
            server.reason = str(error)
            return "wrong"
        server.state, server.reason = "ready", ""
        return "ready"


def _pauses() -> Iterator[float]:
    pause = _FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)


def _reasons(servers: Sequence[_Server]) -> str:
    return "; ".join(server.reason or server.api.url for server in servers)
