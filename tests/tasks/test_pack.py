import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.config import RunConfig
from schemas.errors import ArtifactError, StageError
from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import FILLER_ID, FILTER, GENERATE, IGNORE_LABEL, PROMPTS, pack_schema, score_schema
from tasks.pack.rows import pack_rows
from tasks.stage import execute
from tests.run_fixtures import (
    finish_stage,
    make_config,
    make_store,
    prompts_table,
    random_sequences,
    rollout_table,
    score_table,
    split_rows,
)
from tests.tasks.test_pack_binning import naive_best_fit_decreasing

TOP_K = 3
GENERATE_KEY, SCORE_KEY, FILTER_KEY, PACK_KEY = (StageKey(s, 0) for s in ("generate", "score", "filter", "pack"))
WARMUP_KEY = StageKey("pack", WARMUP)


# -- rows ----------------------------------------------------------------------------------------------------------


def naive_pack(rollouts: pa.Table, scores: pa.Table | None, bins: list[list[str]]) -> list[dict[str, Any]]:
    """One token at a time."""
    samples = {row["sample_id"]: row for row in rollouts.to_pylist()}
    targets = {} if scores is None else {row["sample_id"]: row for row in scores.to_pylist()}
    packs = []
    for pack_id, names in enumerate(bins):
        pack: dict[str, Any] = {"pack_id": pack_id, "input_ids": [], "labels": [], "seq_lengths": []}
        pack["sample_ids"] = names
        if scores is not None:
            pack |= {"sampled_logprobs": [], "teacher_topk_ids": [], "teacher_topk_logprobs": []}
        for name in names:
            sample = samples[name]
            pack["seq_lengths"].append(len(sample["prompt_ids"]) + len(sample["response_ids"]))
            for token in sample["prompt_ids"]:
                pack["input_ids"].append(token)
                pack["labels"].append(IGNORE_LABEL)
                if scores is not None:
                    pack["sampled_logprobs"].append(float("nan"))
                    pack["teacher_topk_ids"].append([FILLER_ID] * TOP_K)
                    pack["teacher_topk_logprobs"].append([float("-inf")] * TOP_K)
            for j, token in enumerate(sample["response_ids"]):
                pack["input_ids"].append(token)
                pack["labels"].append(token)
                if scores is not None:
                    pack["sampled_logprobs"].append(sample["sampled_logprobs"][j])
                    pack["teacher_topk_ids"].append(targets[name]["teacher_topk_ids"][j])
                    pack["teacher_topk_logprobs"].append(targets[name]["teacher_topk_logprobs"][j])
        packs.append(pack)
    return packs


def assert_same_packs(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other)
        for name in other:
            if name == "sampled_logprobs":
                np.testing.assert_array_equal(one[name], other[name])
            else:
                assert one[name] == other[name], f"pack {other['pack_id']}: {name}"


def _sequences(rollouts: pa.Table, scores: pa.Table) -> pa.Table:
    table = rollouts.select(["sample_id", "prompt_ids", "response_ids", "sampled_logprobs"])
    for name in ("teacher_topk_ids", "teacher_topk_logprobs"):
        table = table.append_column(name, scores.column(name))
    return table


def _naive_bins(rollouts: pa.Table, offsets: list[int]) -> list[list[str]]:
    names = rollouts.column("sample_id").to_pylist()
    return [names[low:high] for low, high in pairwise(offsets)]


def test_rows_equal_a_token_by_token_reference() -> None:
    rollouts = rollout_table(*random_sequences(np.random.default_rng(1), 23))
    scores = score_table(rollouts, [0.1] * 23, top_k=TOP_K)
    offsets = [0, 1, 9, 20, 23]
    packs = pack_rows(_sequences(rollouts, scores), np.array(offsets), 0)
    assert_same_packs(packs.to_pylist(), naive_pack(rollouts, scores, _naive_bins(rollouts, offsets)))


def test_targets_shifted_by_one_row_are_noticed() -> None:
    """The comparison above tells targets one position off from those in place."""
    rollouts = rollout_table(*random_sequences(np.random.default_rng(1), 4))
    scores = score_table(rollouts, [0.1] * 4, top_k=TOP_K)
    right = naive_pack(rollouts, scores, [rollouts.column("sample_id").to_pylist()])
    shifted = pack_rows(_sequences(rollouts, scores), np.array([0, 4]), 0).to_pylist()
    shifted[0]["teacher_topk_ids"] = shifted[0]["teacher_topk_ids"][1:] + shifted[0]["teacher_topk_ids"][:1]
    with pytest.raises(AssertionError, match="teacher_topk_ids"):
        assert_same_packs(shifted, right)


def test_rows_of_a_sliced_table_are_the_rows_of_the_slice() -> None:
    rollouts = rollout_table(*random_sequences(np.random.default_rng(4), 12))
    scores = score_table(rollouts, [0.1] * 12, top_k=TOP_K)
    part, part_scores = rollouts.slice(5, 6), scores.slice(5, 6)
    packs = pack_rows(_sequences(part, part_scores), np.array([0, 2, 6]), 0)
    assert_same_packs(packs.to_pylist(), naive_pack(part, part_scores, _naive_bins(part, [0, 2, 6])))


def test_too_few_targets_name_the_sample() -> None:
    rollouts = rollout_table([[1], [2, 3]], [[4, 5], [6, 7]])
    # As many targets in all, but one of them beside the wrong sample.
    scores = score_table(rollout_table([[1], [2]], [[4], [6, 7, 8]]), [0.1, 0.1], top_k=TOP_K)
    with pytest.raises(ArtifactError, match=r"`r0-00000`.*`teacher_topk_ids` has 1 entries for 2 response tokens"):
        pack_rows(_sequences(rollouts, scores), np.array([0, 2]), 0)


# -- the stage -----------------------------------------------------------------------------------------------------


def _config(root: Path, dtype: str = "float16", **pack: Any) -> RunConfig:
    pack = {"max_tokens": 64, "shard_bins": 3} | pack
    return make_config(
        root, score={"top_k": TOP_K, "topk_dtype": dtype}, pack=pack, generate={"max_new_tokens": pack["max_tokens"]}
    )


def _write_round(root: Path, config: RunConfig, *, count: int = 90) -> tuple[RunStore, pa.Table, pa.Table]:
    """Write generate and score in shards of their own, then run the real filter."""
    rng = np.random.default_rng(11)
    prompts, responses = random_sequences(rng, count)
    store = make_store(root, config)
    rollouts = rollout_table(prompts, responses)
    delta_ifd: list[float | None] = [None, *rng.uniform(-0.4, 1.2, count - 1).tolist()]
    dtype = config.score.topk_dtype
    scores = score_table(rollouts, delta_ifd, top_k=TOP_K, dtype=dtype)
    finish_stage(store, GENERATE_KEY, GENERATE, split_rows(rollouts, 13))
    finish_stage(store, SCORE_KEY, score_schema(TOP_K, dtype), split_rows(scores, 31))
    execute(store, config, FILTER_KEY)
    return store, rollouts, scores


def _digests(manifest: Manifest) -> list[tuple[str, str]]:
    return [(record.path, record.sha256) for record in manifest.outputs]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_packs_hold_every_kept_sample_once_with_its_own_targets(tmp_path: Path, dtype: str) -> None:
    config = _config(tmp_path, dtype)
    store, rollouts, scores = _write_round(tmp_path, config)
    manifest = execute(store, config, PACK_KEY)
    packs = store.read_table(PACK_KEY, pack_schema(TOP_K, dtype))
    ledger = store.read_table(FILTER_KEY, FILTER).to_pylist()
    kept = [row["sample_id"] for row in ledger if row["keep"]]
    assert 0 < len(kept) < len(ledger)

    lengths = {r["sample_id"]: len(r["prompt_ids"]) + len(r["response_ids"]) for r in rollouts.to_pylist()}
    bins = [[kept[i] for i in b] for b in naive_best_fit_decreasing([lengths[name] for name in kept], 64)]
    assert_same_packs(packs.to_pylist(), naive_pack(rollouts, scores, bins))
    assert sorted(name for row in packs.column("sample_ids").to_pylist() for name in row) == sorted(kept)
    assert [record.rows for record in manifest.outputs[:-1]] == [3] * (len(manifest.outputs) - 1)
    assert len(manifest.outputs) > 2
    tokens = sum(lengths[name] for name in kept)
    responses = {r["sample_id"]: len(r["response_ids"]) for r in rollouts.to_pylist()}
    counters = manifest.counters
    assert {name: counters[name] for name in ("sequences", "bins", "tokens", "response_tokens", "fill")} == {
        "sequences": len(kept),
        "bins": len(bins),
        "tokens": tokens,
        "response_tokens": sum(responses[name] for name in kept),
        "fill": pytest.approx(tokens / (len(bins) * 64), abs=1e-6),
    }
    assert [path.name for path in store.path(PACK_KEY).iterdir() if path.name.startswith(".")] == []


def test_a_sequence_as_long_as_a_bin_is_packed_whole(tmp_path: Path) -> None:
    config = _config(tmp_path, max_tokens=16)
    store = make_store(tmp_path, config)
    rollouts = rollout_table([[1] * 6, [2] * 6], [list(range(10)), list(range(11))])
    finish_stage(store, GENERATE_KEY, GENERATE, [rollouts])
    scores = score_table(rollouts, [0.1, 0.1], top_k=TOP_K)
    finish_stage(store, SCORE_KEY, score_schema(TOP_K, "float16"), [scores])
    execute(store, config, FILTER_KEY)
    assert execute(store, config, PACK_KEY).counters["fill"] == 1.0
    reasons = store.read_table(FILTER_KEY, FILTER).column("reason").to_pylist()
    assert reasons == ["kept", "too_long_for_pack"]
    packs = store.read_table(PACK_KEY, pack_schema(TOP_K)).to_pylist()
    assert_same_packs(packs, naive_pack(rollouts, scores, [["r0-00000"]]))


def test_row_groups_are_small_enough_to_stream(tmp_path: Path) -> None:
    config = _config(tmp_path, shard_bins=100)
    store, _, _ = _write_round(tmp_path, config)
    execute(store, config, PACK_KEY)
    metadata = pq.read_metadata(store.part(PACK_KEY, 0))
    assert metadata.num_rows > 8
    assert all(metadata.row_group(i).num_rows <= 4 for i in range(metadata.num_row_groups))


def test_same_input_gives_the_same_bytes_whatever_the_input_shards(tmp_path: Path) -> None:
    digests = []
    for name, rows in (("a", 13), ("b", 50)):
        config = _config(tmp_path / name)
        store, rollouts, scores = _write_round(tmp_path / name, config)
        finish_stage(store, GENERATE_KEY, GENERATE, split_rows(rollouts, rows))
        finish_stage(store, SCORE_KEY, score_schema(TOP_K, "float16"), split_rows(scores, rows))
        digests.append(_digests(execute(store, config, PACK_KEY)))
    assert digests[0] == digests[1]


def test_packs_of_many_shards_are_those_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go to their shards over several splits where there are more shards than files that may be open."""
    packs = []
    for name, fan_out in (("a", 64), ("b", 2)):
        monkeypatch.setattr("tasks.pack.regroup.FAN_OUT", fan_out)
        monkeypatch.setattr("tasks.pack.regroup._SPLIT_BYTES", 1 if fan_out == 2 else 1 << 20)
        config = _config(tmp_path / name, shard_bins=1)
        store, _, _ = _write_round(tmp_path / name, config)
        assert execute(store, config, PACK_KEY).counters["shards"] > 8
        packs.append(_digests(store.finished(PACK_KEY)))
    assert packs[0] == packs[1]


def test_a_half_written_stage_continues_from_its_finished_shards(tmp_path: Path) -> None:
    config = _config(tmp_path)
    store, _, _ = _write_round(tmp_path, config)
    first = execute(store, config, PACK_KEY)
    kept_shard, lost_shard = store.part(PACK_KEY, 0), store.part(PACK_KEY, 1)
    # What a kill leaves behind: the fingerprint, some shards, a temporary folder, and no manifest.
    store.path(PACK_KEY, "manifest.json").unlink()
    store.path(PACK_KEY, ".partial.json").write_text(f'"{first.fingerprint}"')
    lost_shard.unlink()
    leftover = store.path(PACK_KEY, ".tmp-killed")
    (leftover / "0").mkdir(parents=True)
    (leftover / "0" / "000000.arrow").write_bytes(b"half")
    kept_inode = kept_shard.stat().st_ino
    second = execute(store, config, PACK_KEY)
    assert _digests(second) == _digests(first)
    assert kept_shard.stat().st_ino == kept_inode
    assert not leftover.exists()
    assert second.counters["bins"] == first.counters["bins"]


def test_failure_leaves_no_temporary_files(tmp_path: Path) -> None:
    config = _config(tmp_path)
    store, _, scores = _write_round(tmp_path, config)
    shorter = rollout_table([[1]] * 90, [[1, 2]] * 90, names=scores.column("sample_id").to_pylist())
    wrong = score_table(shorter, [0.1] * 90, top_k=TOP_K)
    finish_stage(store, SCORE_KEY, score_schema(TOP_K, "float16"), [wrong])
    with pytest.raises(ArtifactError, match="entries for"):
        execute(store, config, PACK_KEY)
    assert [path.name for path in store.path(PACK_KEY).iterdir()] == [".partial.json"]


@pytest.mark.parametrize("stage", ["generate", "score"])
def test_a_ledger_of_another_round_is_refused(tmp_path: Path, stage: str) -> None:
    config = _config(tmp_path)
    store, rollouts, scores = _write_round(tmp_path, config)
    table, schema = (rollouts, GENERATE) if stage == "generate" else (scores, score_schema(TOP_K, "float16"))
    renamed = table.set_column(0, "sample_id", pa.array([f"other-{i}" for i in range(90)]))
    finish_stage(store, StageKey(stage, 0), schema, [renamed])
    with pytest.raises(
        ArtifactError, match=rf"{stage}: row 0 holds `other-0`, where round 0 · filter holds `r0-00000`"
    ):
        execute(store, config, PACK_KEY)


def test_a_kept_sample_longer_than_a_bin_is_refused(tmp_path: Path) -> None:
    store, _, _ = _write_round(tmp_path, _config(tmp_path))
    with pytest.raises(ArtifactError, match=r"more than `pack.max_tokens` 16"):
        execute(store, _config(tmp_path, max_tokens=16), PACK_KEY)


def test_progress_reaches_its_total(tmp_path: Path) -> None:
    config = _config(tmp_path)
    store, _, _ = _write_round(tmp_path, config)
    seen: list[tuple[int, int, str]] = []
    execute(store, config, PACK_KEY, lambda done, total, unit: seen.append((done, total, unit)))
    assert [done for done, _, _ in seen] == list(range(1, seen[-1][1] + 1))
    assert len({total for _, total, _ in seen}) == 1


# -- the warm-up ---------------------------------------------------------------------------------------------------


def _write_references(root: Path, config: RunConfig, splits: dict[str, str]) -> tuple[RunStore, pa.Table]:
    prompts, responses = random_sequences(np.random.default_rng(5), len(splits))
    store = make_store(root, config)
    asked = sorted(splits, key=lambda name: splits[name] != "held_out")
    references = rollout_table(
        prompts,
        responses,
        round_index=WARMUP,
        names=[f"ref-{name}-000" for name in asked],
        prompt_names=asked,
    )
    finish_stage(store, StageKey("prompts"), PROMPTS, split_rows(prompts_table(splits), 11))
    finish_stage(store, StageKey("reference"), GENERATE, split_rows(references, 7))
    return store, references


def _warmup_config(root: Path, **pack: Any) -> RunConfig:
    return _config(root, **pack).model_copy(update={"warmup": make_config(root, warmup={}).warmup})


def test_warmup_packs_train_references_and_no_held_out_prompt(tmp_path: Path) -> None:
    config = _warmup_config(tmp_path, max_tokens=24)
    splits = {f"p{i}": "held_out" if i % 3 == 0 else "train" for i in range(40)}
    store, references = _write_references(tmp_path, config, splits)
    manifest = execute(store, config, WARMUP_KEY)
    packs = store.read_table(WARMUP_KEY, pack_schema(None))
    assert packs.column_names == ["pack_id", "input_ids", "labels", "seq_lengths", "sample_ids"]

    train = [row for row in references.to_pylist() if splits[row["prompt_id"]] == "train"]
    lengths = {row["sample_id"]: len(row["prompt_ids"]) + len(row["response_ids"]) for row in train}
    fitting = [name for name, length in lengths.items() if length <= 24]
    assert 0 < len(fitting) < len(train)
    bins = [[fitting[i] for i in b] for b in naive_best_fit_decreasing([lengths[name] for name in fitting], 24)]
    assert_same_packs(packs.to_pylist(), naive_pack(references, None, bins))
    assert manifest.counters["too_long"] == len(train) - len(fitting)
    assert manifest.counters["sequences"] == len(fitting)


def test_warmup_with_every_reference_too_long_stops(tmp_path: Path) -> None:
    config = _warmup_config(tmp_path, max_tokens=16)
    store = make_store(tmp_path, config)
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table({"a": "train", "b": "held_out"})])
    references = rollout_table([[1], [1] * 9], [[2], [2] * 8], prompt_names=["b", "a"])
    finish_stage(store, StageKey("reference"), GENERATE, [references])
    with pytest.raises(StageError, match=r"of 1 for train prompts, 1 are longer than `pack.max_tokens` 16"):
        execute(store, config, WARMUP_KEY)
    assert not list(store.path(WARMUP_KEY).glob("*.parquet"))


def test_warmup_reference_without_a_response_is_left_out(tmp_path: Path) -> None:
    config = _warmup_config(tmp_path)
    store = make_store(tmp_path, config)
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table({"a": "train", "b": "train"})])
    finish_stage(
        store, StageKey("reference"), GENERATE, [rollout_table([[1], [1]], [[], [2]], prompt_names=["a", "b"])]
    )
    assert execute(store, config, WARMUP_KEY).counters["empty_response"] == 1
    assert store.read_table(WARMUP_KEY, pack_schema(None)).column("input_ids").to_pylist() == [[1, 2]]


def test_warmup_reference_to_an_unknown_prompt_is_refused(tmp_path: Path) -> None:
    config = _warmup_config(tmp_path)
    store, _ = _write_references(tmp_path, config, {"a": "train", "b": "train"})
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table({"a": "train"})])
    with pytest.raises(ArtifactError, match="prompts: lacks `b`"):
        execute(store, config, WARMUP_KEY)


def test_importing_the_stages_loads_no_torch() -> None:
    code = "import sys, tasks.pack, tasks.filter; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
