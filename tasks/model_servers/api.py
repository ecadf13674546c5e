"""One server's endpoints."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray

from schemas.config import ServersConfig
from schemas.errors import ConfigError, ModelError
from schemas.untrusted_text import readable

Body = dict[str, Any]
"""A request to `/v1/completions`, without the model's name."""

_TOO_MANY, _SLOW = 429, 408

_OTHER_FORM = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading an answer raises that has another form than vLLM's."""


class ServerAwayError(Exception):
    """A server cannot be reached, or says that it cannot answer now; later it may."""


class Choice(NamedTuple):
    """What a server answered to one request.

    Args:
        url: The server.
        fields: The one choice of the answer.
    """

    url: str
    fields: dict[str, Any]


@contextmanager
def reading_answer(url: str) -> Iterator[None]:
    """Raise what is wrong with the form of the answer of the server at ``url`` as ModelError."""
    try:
        yield
    except _OTHER_FORM as error:
        raise ModelError(
            f"{url}: its answer is not one of vLLM's own server ({type(error).__name__}: {readable(str(error))}); is "
            "something else there, or between it and here?"
        ) from error


class ServerApi:
    """One OpenAI-compatible vLLM server.

    Args:
        client: Sends the requests; shared by the servers of a model.
        url: Where the server is, without `/v1`.
        config: Name of the model there, and how long a request may take.
    """

    def __init__(self, client: httpx.AsyncClient, url: str, config: ServersConfig) -> None:
        self.url = url
        self._client, self._model, self._seconds = client, config.model, config.timeout_seconds

    async def find_model(self) -> dict[str, Any]:
        """Return the server's card of the model; from then on requests name it.

        Raises:
            ServerAwayError: the server does not answer.
            ModelError: it does not serve the model, or several where none was named.
        """
        answer = await self._call("GET", "/v1/models")
        with reading_answer(self.url):
            cards = [dict(card) for card in answer.get("data", [])]
            names = [str(card["id"]) for card in cards]
        wanted = names if self._model is None else [name for name in names if name == self._model]
        if len(wanted) != 1:
            raise ModelError(
                f"{self.url}: serves {', '.join(f'`{readable(name)}`' for name in names) or 'nothing'}; name the one "
                "to use in `server.model`"
            )
        self._model = wanted[0]
        found: dict[str, Any] = cards[names.index(wanted[0])]
        return found

    async def tokenize(self, text: str) -> NDArray[np.int32]:
        """Return the tokens of ``text`` with what the tokenizer itself adds, int32."""
        answer = await self._call("POST", "/tokenize", {"model": self._model, "prompt": text})
        with reading_answer(self.url):
            return np.asarray(answer["tokens"], np.int32)

    async def complete(self, body: Body) -> Choice:
        """Return the answer to a completion request of one prompt.

        Raises:
            ServerAwayError: no connection, no answer in time, or HTTP 408, 429 or 5xx.
            ModelError: the server refuses the request, or answers something else; names the server and its reason.
        """
        answer = await self._call("POST", "/v1/completions", {"model": self._model} | body)
        with reading_answer(self.url):
            return Choice(self.url, dict(answer["choices"][0]))

    async def _call(self, method: str, path: str, body: Body | None = None) -> dict[str, Any]:
        try:
            # The client's own limit is of each read: an answer that drips in would never end.
            async with asyncio.timeout(self._seconds):
                answer = await self._client.request(method, self.url + path, json=body)
        except TimeoutError as error:
            raise ServerAwayError(f"no whole answer within {self._seconds:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise ServerAwayError(f"{type(error).__name__} {readable(str(error))}".strip()) from error
        if answer.status_code in (_SLOW, _TOO_MANY) or answer.is_server_error:
            raise ServerAwayError(f"HTTP {answer.status_code}: {_reason(answer)}")
        if not answer.is_success:
            raise ModelError(f"{self.url}{path}: HTTP {answer.status_code}: {_reason(answer)}{_advice(answer)}")
        try:
            found = answer.json()
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ModelError(f"{self.url}{path}: the answer is no JSON object; is this a vLLM server?")
        return found


def open_client(config: ServersConfig) -> httpx.AsyncClient:
    """Return a client for a model's servers, with their API key.

    Raises:
        ConfigError: `api_key_env` names a variable that is not set, or whose value cannot be sent.
    """
    headers = {} if config.api_key_env is None else {"Authorization": f"Bearer {_api_key(config)}"}
    # The number of connections is bounded where requests are begun, so that none waits for one unseen.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(headers=headers, timeout=config.timeout_seconds, limits=limits)


def _api_key(config: ServersConfig) -> str:
    key, name = f"{config.section}.api_key_env", config.api_key_env or ""
    if name not in os.environ:
        raise ConfigError(f"{key}: the environment variable `{name}` is not set")
    # A secret that is mounted as a file often ends with a newline.
    value = os.environ[name].strip()
    if not value or not all("!" <= character <= "~" for character in value):
        # What httpx says of a header that it refuses repeats it, and so would every log.
        raise ConfigError(
            f"{key}: the environment variable `{name}` is empty, or holds characters that no HTTP header can"
        )
    return value


def _reason(answer: httpx.Response) -> str:
    """Return what the server says of an error, in vLLM's form or any."""
    try:
        return readable(str(answer.json()["error"]["message"]))
    except (ValueError, RecursionError, LookupError, TypeError):
        return readable(answer.text[:200])


def _advice(answer: httpx.Response) -> str:
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return "; name the variable that holds the server's key in `server.api_key_env`"
    if "max allowed" in answer.text and "logprobs" in answer.text:
        return "; start the server with a higher `--max-logprobs`, or lower `score.top_k`"
    return ""
