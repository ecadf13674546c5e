"""A real HTTP server on loopback that answers as a test says, and can go away and come back."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, dict[str, Any]], tuple[int, Any] | None]
"""From path and body to status and JSON, or bytes as they come; None: the connection breaks."""

MODEL = {"id": "tiny", "root": "tiny-folder", "max_model_len": 128}


class LoopbackServer:
    """A server in threads of this process. Connections end with each request, so that a stopped server is gone."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.completions: list[dict[str, Any]] = []
        self.authorization: list[str | None] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        self._server = _Server(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections; may be called twice."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def handle(self, path: str, body: dict[str, Any], authorization: str | None) -> tuple[int, Any] | None:
        self.authorization.append(authorization)
        if path != "/v1/completions":
            return self.answer(path, body)
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            self.completions.append(body)
        try:
            return self.answer(path, body)
        finally:
            with self._lock:
                self._in_flight -= 1


class _Server(ThreadingHTTPServer):
    # Else connections that come at once are reset.
    request_queue_size = 128


def _handler(server: LoopbackServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: dict[str, Any]) -> None:
            answer = server.handle(self.path, body, self.headers["Authorization"])
            if answer is None:
                return
            status, content = answer
            self.send_response(status)
            self.end_headers()
            # The other end may have had enough of bytes that drip in.
            with suppress(ConnectionError):
                for part in content if isinstance(content, Iterator) else [json.dumps(content).encode()]:
                    self.wfile.write(part)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def echo(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Answer every prompt with itself, after a moment in which others arrive."""
    if path == "/v1/models":
        return 200, {"data": [MODEL]}
    time.sleep(0.01)
    return 200, {"choices": [{"token_ids": body["prompt"]}]}


def error(status: int, message: str) -> tuple[int, Any]:
    """Return an error in vLLM's form."""
    return status, {"error": {"message": message}}
