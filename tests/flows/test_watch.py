"""The signals that end a command, wherever they meet it."""

import signal
import subprocess
import sys

import pytest

from tests.flows.conftest import CONFIGS

pytestmark = pytest.mark.server

_SIGTERM_INSIDE_OF_PYDANTIC = """
import os, signal
from pydantic import BaseModel, model_serializer
from flows.watch import run_flow

class Settings(BaseModel):
    @model_serializer
    def as_dict(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

def load():
    from prefect import flow
    return flow(lambda: Settings().model_dump(), name="dump")

run_flow(load, verbose=False)
"""


@pytest.mark.usefixtures("prefect_api")
def test_sigterm_that_a_library_makes_another_error_of_ends_the_command() -> None:
    command = [sys.executable, "-c", _SIGTERM_INSIDE_OF_PYDANTIC]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
