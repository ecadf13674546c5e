"""Prefect's temporary server, for runs without a server of their own."""

import signal


def start_temporary_server() -> None:
    """Start the server that Prefect would start itself at the first call, but so that Ctrl-C does not end it.

    A terminal sends Ctrl-C to every process of the command. A server that dies of it leaves Prefect retrying for
    minutes to report that the run was interrupted. Does nothing where PREFECT_API_URL names a server.
    """
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE

    if PREFECT_API_URL.value() or not PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        return
    # A process inherits the mask of blocked signals; here a Ctrl-C waits until the server is up.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        SubprocessASGIServer().start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
