import os

import pytest

from tasks.cores import available_cores


def test_where_the_system_names_no_cores_of_a_process_all_of_the_machine_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cores() == os.cpu_count()
