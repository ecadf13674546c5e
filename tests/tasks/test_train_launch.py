"""Training in two processes: gloo on a CPU, started by the real `accelerate launch`."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from flows.join import join_training
from flows.process import run_in_process
from schemas.config import LaunchConfig, RunConfig
from schemas.errors import ConfigError, NPDError, StageError, StorageError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.checkpoint import restore_random
from tasks.process import Job
from tasks.stage import StageJob, execute, no_progress
from tasks.train.launch import Ranks, launch_command
from tests.run_fixtures import make_config, make_store
from tests.tasks.training_runs import metrics, random_packs, trained_weights, training_run

TRAIN = StageKey("train", 0)
# Float sums in another order: a step adds 1e-7 of a loss of about 2, and Adam divides by small gradients.
CLOSE = 1e-4


def a_run(root: Path, teacher: Path, student: Path, **train: Any) -> tuple[RunStore, RunConfig]:
    """Five packs, three a step: two ranks get two packs and one, or in an epoch's last step one each."""
    guard = {"max_policy_kl": None, "every_steps": 1}
    settings: dict[str, Any] = {"packs_per_step": 3, "save_every_steps": 1, "guard": guard} | train
    return training_run(root, teacher, student, rounds=1, epochs=3, packs=random_packs(5), **settings)


def with_train(config: RunConfig, **train: Any) -> RunConfig:
    return RunConfig.model_validate(config.model_dump() | {"train": config.train.model_dump() | train})


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path) -> RunStore:
    store, config = a_run(tmp_path_factory.mktemp("one"), teacher_dir, student_dir)
    execute(store, config, TRAIN)
    return store


def assert_same_run(store: RunStore, other: RunStore) -> None:
    """Every number of every step, and the weights at the end, within the tolerance of float sums."""
    ours, theirs = metrics(store, 0), metrics(other, 0)
    assert ours.num_rows == 6
    for name in ("step", "epoch", "response_tokens", "learning_rate"):
        assert ours.column(name).equals(theirs.column(name)), name
    for name in ("loss", "ce", "kd", "grad_norm", "policy_kl"):
        expected = pytest.approx(theirs.column(name).to_pylist(), rel=CLOSE)
        assert ours.column(name).to_pylist() == expected, name
    weights, expected_weights = trained_weights(store, 0), trained_weights(other, 0)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=CLOSE)


def ranks_running() -> dict[str, psutil.Process]:
    """Processes that train below this one, by rank."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if "tasks.train.rank" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found[process.environ().get("RANK", "launcher")] = process
        except psutil.Error:  # gone meanwhile
            continue
    return found


@pytest.mark.e2e
def test_two_machines_learn_as_one_process_does(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, in_one_process: RunStore
) -> None:
    """DDP; the second machine is this one again, with no more than the run's folder to go by."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launch = {"machines": 2, "main_address": "127.0.0.1", "main_port": port}
    store, config = a_run(tmp_path, teacher_dir, student_dir, launch=launch)
    told: list[tuple[int, int, str]] = []
    with (tmp_path / "joined.log").open("w+") as log:
        command = [sys.executable, "-m", "flows.cli", "join", str(store.folder), "--machine", "1"]
        other = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            execute(store, config, TRAIN, lambda *progress: told.append(progress))
        finally:
            other.terminate()
            assert other.wait(60) == 128 + signal.SIGTERM
        log.seek(0)
        assert "machine 1 of 2 trains" in log.read()
    assert_same_run(store, in_one_process)
    assert told[-1] == (6, 6, "steps")
    assert ranks_running() == {}


@pytest.mark.e2e
def test_a_round_goes_on_with_any_number_of_processes(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, in_one_process: RunStore
) -> None:
    """One process stops in the first epoch, two (FSDP2) go on until the guard stops them in the third, one finishes.

    That the guard stops both of the two at one step shows in their not waiting for each other.
    """
    store, config = a_run(tmp_path, teacher_dir, student_dir)
    first, *_, fourth, fifth, _ = metrics(in_one_process, 0).column("policy_kl").to_pylist()
    assert first < fourth < fifth
    budgets = {1: first / 2, 5: (fourth + fifth) / 2}
    for steps, launch in ((1, {}), (5, {"processes": 2, "strategy": "fsdp2"})):
        guard = {"max_policy_kl": budgets[steps], "every_steps": 1, "action": "stop"}
        stopped = with_train(config, guard=guard, launch=launch, gradient_checkpointing=bool(launch))
        with pytest.raises(StageError, match=f"at optimizer step {steps} the student is"):
            execute(store, stopped, TRAIN)
        assert [path.name for path in store.path(TRAIN, "checkpoints").iterdir()] == [f"checkpoint-{steps}"]
    draws = []
    for rank in (0, 1, 2, 1, 2):
        restore_random(store.path(TRAIN, "checkpoints", "checkpoint-5"), torch.device("cpu"), rank)
        draws.append(torch.rand(1).item())
    # Two processes kept theirs; a third would get some that are its own.
    assert len(set(draws)) == 3
    assert draws[1:3] == draws[3:]
    execute(store, config, TRAIN)
    assert_same_run(store, in_one_process)
    execute(store, config, StageKey("export", 0))


@pytest.mark.e2e
def test_adapters_learn_in_two_processes_as_in_one(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    found = []
    for processes in (1, 2):
        folder, launch = tmp_path / str(processes), {"processes": processes}
        store, config = a_run(folder, teacher_dir, student_dir, lora={"r": 3}, launch=launch, learning_rate=1e-2)
        execute(store, config, TRAIN)
        adapter = load_file(store.path(TRAIN, "checkpoint", "adapter_model.safetensors"))
        found.append((metrics(store, 0).column("loss").to_pylist(), adapter))
    (losses, adapter), (other_losses, other_adapter) = found
    assert other_losses == pytest.approx(losses, rel=CLOSE)
    assert other_adapter.keys() == adapter.keys()
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    for name, value in adapter.items():
        # Adam divides gradients that are next to nothing by as little, so a step can go either way by its rate.
        assert (other_adapter[name] - value).norm() <= 1e-2 * value.norm(), name


@pytest.mark.e2e
def test_a_loss_that_is_not_finite_ends_every_process_with_one_error(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    store, config = a_run(tmp_path, teacher_dir, student_dir, launch={"processes": 2}, learning_rate=1e30)
    with pytest.raises(StageError, match=r"optimizer step 2 is not finite.*learning_rate"):
        execute(store, config, TRAIN)
    assert store.manifest(TRAIN) is None
    assert ranks_running() == {}


@pytest.mark.e2e
@pytest.mark.parametrize("end", ["rank killed", "stage ended"])
def test_no_process_outlives_another(tmp_path: Path, teacher_dir: Path, student_dir: Path, end: str) -> None:
    store, config = a_run(tmp_path, teacher_dir, student_dir, launch={"processes": 2}, steps_per_round=100_000)
    seen: dict[str, psutil.Process] = {}

    def strike(done: int, total: int, unit: str) -> None:
        if seen:
            return
        seen.update(ranks_running())
        if end == "stage ended":
            raise KeyboardInterrupt
        seen["1"].send_signal(signal.SIGKILL)

    if end == "stage ended":
        with pytest.raises(KeyboardInterrupt):
            run_in_process(store, config, TRAIN, strike)
    else:
        with pytest.raises(StageError, match=r"process 1 of 2 .* died before .*train\.log"):
            execute(store, config, TRAIN, strike)
    assert {"0", "1"} <= seen.keys()
    _, alive = psutil.wait_procs(list(seen.values()), timeout=30)
    assert not alive
    assert store.manifest(TRAIN) is None


# -- what a stage makes of its processes' last words -------------------------------------------------------------------


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[tuple[Ranks, Path]]:
    address = tmp_path / "link"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        with Ranks(server, Job("place", {}, [("train", 0)], "log"), no_progress) as found:
            yield found, address


def connect(ranks: Ranks, address: Path, rank: int) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(address))
    say(connection, event="rank", rank=rank)
    ranks.hear(1.0)
    ranks.hear(1.0)
    assert Job.from_line(connection.recv(4096)).keys == [("train", 0)]
    return connection


def say(connection: socket.socket, **event: Any) -> None:
    connection.sendall(json.dumps(event).encode() + b"\n")


def the_failure(ranks: Ranks, tmp_path: Path) -> Exception:
    config = make_config(tmp_path, train={"launch": {"processes": 2}})
    return ranks.failure(1, StageJob(make_store(tmp_path, config), config, TRAIN), Path("train.log"))


def test_the_first_to_die_is_named_not_those_that_notice(ranks: tuple[Ranks, Path], tmp_path: Path) -> None:
    zero, one = (connect(*ranks, rank) for rank in range(2))
    say(zero, event="error", type="StageError", message="connection closed by peer", typed=False)
    one.close()
    ranks[0].hear(1.0)
    zero.close()
    ranks[0].hear(1.0)
    error = the_failure(ranks[0], tmp_path)
    assert type(error) is StageError
    assert "process 1 of 2" in str(error)
    assert "fsdp2" in str(error)


def test_a_death_that_is_heard_of_a_little_later_is_still_the_cause(ranks: tuple[Ranks, Path], tmp_path: Path) -> None:
    zero, one = (connect(*ranks, rank) for rank in range(2))
    say(zero, event="error", type="StageError", message="connection closed by peer", typed=False)
    threading.Timer(0.02, one.close).start()
    ranks[0].hear(1.0)
    assert "process 1 of 2" in str(the_failure(ranks[0], tmp_path))


def test_an_error_on_purpose_keeps_its_class(ranks: tuple[Ranks, Path], tmp_path: Path) -> None:
    zero, one = (connect(*ranks, rank) for rank in range(2))
    say(one, event="error", type="StageError", message="RuntimeError: a peer is gone", typed=False)
    ranks[0].hear(1.0)
    say(zero, event="error", type="StorageError", message="disk full", typed=True)
    ranks[0].hear(1.0)
    error = the_failure(ranks[0], tmp_path)
    assert type(error) is StorageError
    assert str(error) == "disk full"
    assert isinstance(error, NPDError)


def test_a_launcher_that_starts_nothing_is_told_from_one_whose_processes_fail(
    ranks: tuple[Ranks, Path], tmp_path: Path
) -> None:
    assert "`accelerate launch` exited with code 1" in str(the_failure(ranks[0], tmp_path))


@pytest.mark.parametrize("machine", [0, 2])
def test_a_machine_that_the_config_does_not_have_cannot_join(tmp_path: Path, machine: int) -> None:
    config = make_config(tmp_path, train={"launch": {"machines": 2, "main_address": "127.0.0.1"}})
    with pytest.raises(ConfigError, match=rf"machine {machine}: `train\.launch\.machines` is 2"):
        join_training(config, machine, print)


def test_what_the_config_says_of_machines_reaches_the_launcher() -> None:
    launch = LaunchConfig(
        processes=4, machines=2, main_address="node0", main_port=1234, options=["--gpu_ids", "0,1,2,3"]
    )
    command = " ".join(launch_command(launch, machine=1))
    for part in (
        "--num_processes 8 --num_machines 2 --machine_rank 1",
        "--main_process_ip node0 --main_process_port 1234",
        "--gpu_ids 0,1,2,3 -m tasks.train.rank",
    ):
        assert part in command
