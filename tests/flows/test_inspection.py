"""What `npd inspect` reads of a stage."""

from io import StringIO
from pathlib import Path

from rich.console import Console

from flows.inspection import print_stage
from schemas.stage_key import StageKey
from schemas.tables import GENERATE
from tests.run_fixtures import finish_stage, make_config, make_store, rollout_table, split_rows


def test_the_first_shard_of_a_table_speaks_for_all(tmp_path: Path) -> None:
    """The others are not opened: there may be thousands, each to be downloaded."""
    store, key = make_store(tmp_path, make_config(tmp_path)), StageKey("generate", 0)
    finish_stage(store, key, GENERATE, split_rows(rollout_table([[1]] * 6, [[2]] * 6), 2))
    for number in (1, 2):
        store.part(key, number).write_bytes(b"damaged")
    page = StringIO()
    print_stage(Console(file=page, width=200), store, key, 3)
    assert [page.getvalue().count(f"row {number}") for number in range(3)] == [1, 1, 0]
    assert page.getvalue().count("output ") == 3
