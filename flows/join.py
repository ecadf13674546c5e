"""A further machine's part in training: whenever the run's first machine trains, its processes join."""

import socket
import subprocess
import time
from collections.abc import Callable

from schemas.config import LaunchConfig, RunConfig
from schemas.errors import ConfigError
from tasks.train.launch import end_launcher, launch_command, rank_environment

_POLL_SECONDS = 1.0


def join_training(config: RunConfig, machine: int, say: Callable[[str], None]) -> None:
    """Start this machine's processes each time the first machine begins to train, until this process is ended.

    Args:
        config: The run's.
        machine: Which of its machines this one is, from 1.
        say: Told when training begins and how it ended.

    Raises:
        ConfigError: the config has no such machine.
    """
    launch = config.train.launch
    if not 0 < machine < launch.machines:
        raise ConfigError(
            f"machine {machine}: `train.launch.machines` is {launch.machines}; the first, 0, is where `npd run` runs, "
            "the others join as 1 and so on"
        )
    while True:
        wait_for_first_machine(launch)
        say(f"machine {machine} of {launch.machines} trains")
        launcher = subprocess.Popen(launch_command(launch, machine), env=rank_environment(config.devices.trainer))
        try:
            code = launcher.wait()
        finally:
            end_launcher(launcher)
        say("done" if code == 0 else f"ended with code {code}: the first machine's log says why")


def wait_for_first_machine(launch: LaunchConfig) -> None:
    """Return once the first machine waits for the others to join."""
    assert launch.main_address is not None, "the config says so"
    while True:
        try:
            with socket.create_connection((launch.main_address, launch.main_port), _POLL_SECONDS):
                return
        except OSError:
            time.sleep(_POLL_SECONDS)
