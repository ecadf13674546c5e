"""Servers that run a model in place of this machine."""

from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from schemas.config.base import PLACEMENT, Section


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    # Reading the port raises where it is none.
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError("a server's URL is like `http://host:8000`")
    url = url.rstrip("/")
    if url.endswith("/v1"):
        raise ValueError("a server's URL ends before `/v1`: `/tokenize` lies beside it")
    return url


class ServersConfig(Section):
    """vLLM servers (OpenAI-compatible) that all serve one and the same model. Every request may go to any of them."""

    section: ClassVar[str] = "generate.server"

    urls: list[Annotated[str, AfterValidator(_base_url)]] = Field(default=[], json_schema_extra=PLACEMENT)
    """Where they are, without `/v1`: `http://gpu-1:8000`. A server that does not answer is left out while others do."""

    model: str | None = Field(default=None, min_length=1, json_schema_extra=PLACEMENT)
    """Name under which they serve it (`--served-model-name`); null: the only one they serve."""

    api_key_env: str | None = Field(
        default=None, pattern=r"^[A-Z][A-Z0-9_]*$", max_length=64, json_schema_extra=PLACEMENT
    )
    """Name of the environment variable, in capitals, that holds their API key (`--api-key`), never the key itself;
    null: they want none."""

    max_in_flight: int = Field(default=256, ge=1, json_schema_extra=PLACEMENT)
    """Requests that one server holds at a time. More waits here, so that no queue grows there. vLLM decodes
    `--max-num-seqs` of them together."""

    timeout_seconds: float = Field(default=600.0, gt=0, json_schema_extra=PLACEMENT)
    """How long one request may take before it counts as failed, its wait in the server's queue included."""

    retry_seconds: float = Field(default=120.0, ge=0, json_schema_extra=PLACEMENT)
    """How long a server that fails (no connection, HTTP 408, 429 or 5xx) is tried again, at growing intervals, before
    it is left out for the rest of the stage; the stage fails when none is left. Other errors are not tried again. A
    server that comes back is tested again before it gets work."""

    wait_seconds: float = Field(default=0.0, ge=0, json_schema_extra=PLACEMENT)
    """How long a stage waits at its start for servers that do not answer yet or still serve other weights. Every round
    has a new snapshot of the student: give a script of yours time to serve it."""

    @model_validator(mode="after")
    def _each_server_is_named_once(self) -> "ServersConfig":
        if len(set(self.urls)) != len(self.urls):
            raise ValueError("`urls` names a server twice, which would get twice `max_in_flight`")
        return self

    @property
    def compares_weights(self) -> bool:
        """Whether a server's log-probabilities are compared with those of the local model before it is used."""
        return True


class TeacherServersConfig(ServersConfig):
    """vLLM servers of the teacher."""

    section: ClassVar[str] = "score.server"

    check: Literal["weights", "tokenizer"] = Field(default="weights", json_schema_extra=PLACEMENT)
    """What a server must share with `teacher.model` to be used. `weights`: its tokens of a few texts and their
    log-probabilities; the teacher is loaded here once a stage for these texts, on `devices.teacher`, and freed.
    `tokenizer`: only its tokens, for a teacher too large to be loaded here; that the weights are the right ones is
    then your word."""

    @property
    def compares_weights(self) -> bool:
        """See ServersConfig."""
        return self.check == "weights"
