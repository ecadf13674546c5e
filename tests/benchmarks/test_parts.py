import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.growth import marginal_ratio
from benchmarks.packing import LENGTHS_FILE, LengthSet, bins_and_rows, fewest_bins, load_lengths, save_lengths, trl
from benchmarks.random_models import SHAPES, make_tokenizer, write_model
from benchmarks.runs import finish, make_run, run_apart, write_models, write_prompts
from benchmarks.storage import (
    ENCODINGS,
    TOP_K,
    drawn_targets,
    read_numpy,
    repeated,
    response_tokens,
    target_bytes,
    write,
)
from schemas.stage_key import StageKey
from schemas.tables import score_schema
from tasks.language_model.loading import load_model, load_tokenizer


def test_lengths_come_back_as_they_were_saved(tmp_path: Path) -> None:
    save_lengths(tmp_path / "lengths.json", np.array([5, 3, 5, 9]), 16)
    lengths, capacity = load_lengths(tmp_path / "lengths.json")
    assert (lengths.tolist(), capacity) == ([3, 5, 5, 9], 16)


def test_the_quickstarts_lengths_are_there() -> None:
    lengths, capacity = load_lengths(LENGTHS_FILE)
    assert lengths.size == 88
    assert lengths.max() <= capacity


@pytest.mark.parametrize("batch", [None, 50])
def test_both_packers_keep_every_token(batch: int | None) -> None:
    lengths = np.random.default_rng(0).integers(1, 64, 200)
    data = LengthSet("test", lengths, 64)
    for work in (bins_and_rows(data), trl(data, batch)):
        packed = work()
        assert packed.tokens == lengths.sum()
        assert packed.bins >= fewest_bins(data)


def test_trl_cuts_what_is_too_long() -> None:
    assert trl(LengthSet("test", np.array([10, 4, 20]), 8), None)().tokens == 8 + 4 + 8


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
def test_every_encoding_gives_the_same_targets_back(tmp_path: Path, encoding: object) -> None:
    groups = repeated([drawn_targets(6)], 2)
    score_schema(TOP_K, "float16").validate(pa.concat_tables(groups), "drawn")
    path = tmp_path / "targets.parquet"
    write(path, groups, encoding)  # type: ignore[arg-type]
    assert pq.read_table(path, partitioning=None).equals(pa.concat_tables(groups))
    assert read_numpy(path) == response_tokens(groups)
    assert 0 < target_bytes(path) < path.stat().st_size


def test_fixed_costs_do_not_count_as_growth() -> None:
    assert marginal_ratio([12.0, 18.0, 42.0]) == 1.0
    assert marginal_ratio([11.0, 26.0, 266.0]) == pytest.approx(4.0)


def test_more_prompts_begin_with_the_fewer(tmp_path: Path) -> None:
    few, many = (write_prompts(tmp_path / f"{n}.jsonl", n).read_text().splitlines() for n in (5, 20))
    assert many[:5] == few
    assert len({json.loads(line)["prompt"] for line in many}) == 20


def test_a_random_model_loads_with_a_tokenizer_of_the_given_size(tmp_path: Path) -> None:
    folder = write_model(tmp_path, SHAPES["micro"])
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == SHAPES["micro"].vocab == load_model(folder).config.vocab_size
    assert tokenizer.decode(tokenizer("Añ 1")["input_ids"]) == "Añ 1"
    assert len(make_tokenizer(4_096)) == 4_096
    with pytest.raises(ValueError, match="at least 259"):
        make_tokenizer(258)


def test_a_run_is_brought_to_a_stage_and_repeats_it_apart(tmp_path: Path) -> None:
    models = write_models(tmp_path, "micro", "micro")
    run = make_run(tmp_path / "run", models, 5, generate={"max_new_tokens": 6}, pack={"max_tokens": 512})
    pack = StageKey("pack", 0)
    first = finish(run, pack)
    assert first.counters["sequences"] == 5
    assert finish(run, pack) == first
    again = run_apart(run, pack)
    assert again.outputs_fingerprint == first.outputs_fingerprint
    assert again.started > first.finished
