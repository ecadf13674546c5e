import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from schemas.config import RunConfig
from schemas.errors import ModelError, StageError
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import FILLER_ID, IGNORE_LABEL, PROMPTS, TRAIN_METRICS, pack_schema
from tasks.graph import MODELS
from tasks.language_model.ragged import Ragged
from tasks.stage import execute
from tasks.train.guard import recent_policy_kl
from tasks.train.schedule import EpochSampler, pack_costs
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table
from tests.tasks.test_loss import reference_kl

TOP_K, VOCABULARY = 4, 259


def random_packs(packs: int = 3, sequences: int = 4, seed: int = 0) -> pa.Table:
    """Packs of short random sequences with random targets; lengths are odd and one response has one token."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for pack in range(packs):
        row: dict[str, Any] = {
            "pack_id": pack,
            "input_ids": [],
            "labels": [],
            "seq_lengths": [],
            "sample_ids": [],
            "sampled_logprobs": [],
            "teacher_topk_ids": [],
            "teacher_topk_logprobs": [],
        }
        for sequence in range(sequences):
            prompt = int(rng.integers(2, 9))
            response = 1 if sequence == 0 else int(rng.integers(3, 14))
            ids = rng.integers(3, VOCABULARY, prompt + response).tolist()
            teacher = np.log(rng.dirichlet(np.full(VOCABULARY, 0.05), response) + 1e-9)
            top = np.argsort(-teacher, axis=1)[:, :TOP_K]
            row["input_ids"] += ids
            row["labels"] += [IGNORE_LABEL] * prompt + ids[prompt:]
            row["seq_lengths"].append(prompt + response)
            row["sample_ids"].append(f"s{pack}-{sequence}")
            row["sampled_logprobs"] += [math.nan] * prompt + (-rng.exponential(3.0, response)).tolist()
            row["teacher_topk_ids"] += [[FILLER_ID] * TOP_K] * prompt + top.tolist()
            row["teacher_topk_logprobs"] += [[-math.inf] * TOP_K] * prompt + np.take_along_axis(
                teacher, top, 1
            ).tolist()
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=pack_schema(TOP_K, "float32").columns)


def training_run(
    root: Path, teacher: Path, student: Path, *, rounds: int, epochs: int, packs: pa.Table, **train: Any
) -> tuple[RunStore, RunConfig]:
    """A run whose models stage really ran and whose packs are given, the same for every round."""
    config = make_config(
        root,
        teacher={"model": str(teacher)},
        student={"model": str(student)},
        rounds=rounds,
        score={"top_k": TOP_K, "topk_dtype": "float32"},
        warmup={"precision": "fp32"},
        train={
            "epochs_per_round": epochs,
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-4,
            "packs_per_step": 2,
            "precision": "fp32",
            "gradient_checkpointing": False,
            **train,
        },
    ).model_copy(update={"warmup": None})
    store = make_store(root, config)
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table({"a": "train", "b": "held_out"})])
    execute(store, config, MODELS)
    for index in range(rounds):
        finish_stage(store, StageKey("pack", index), pack_schema(TOP_K, "float32"), [packs])
    return store, config


def trained_weights(store: RunStore, round_index: int) -> dict[str, torch.Tensor]:
    return load_file(store.path(StageKey("train", round_index), "checkpoint", "model.safetensors"))


def metrics(store: RunStore, round_index: int) -> pa.Table:
    return store.read_table(StageKey("train", round_index), TRAIN_METRICS)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_two_rounds_of_n_epochs_equal_one_round_of_2n(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    packs = random_packs()
    two, config = training_run(tmp_path / "two", teacher_dir, student_dir, rounds=2, epochs=2, packs=packs)
    for index in range(2):
        execute(two, config, StageKey("train", index))
    one, config = training_run(tmp_path / "one", teacher_dir, student_dir, rounds=1, epochs=4, packs=packs)
    execute(one, config, StageKey("train", 0))

    assert_same(trained_weights(two, 1), trained_weights(one, 0))
    together = pa.concat_tables([metrics(two, 0), metrics(two, 1)])
    columns = [name for name in together.column_names if name not in ("round", "policy_lag")]
    assert together.select(columns).equals(metrics(one, 0).select(columns))
    # Only the second round's sampler is a newer one.
    assert together.column("policy_lag").to_pylist() == [0, 1, 2, 3, 0, 1, 2, 3]
    # It trained: the round moved the weights, and rounds are not restarts.
    assert any(not torch.equal(v, trained_weights(two, 0)[k]) for k, v in trained_weights(two, 1).items())
    assert together.column("step").to_pylist() == list(range(1, 9))


def test_learning_rate_is_one_cosine_over_all_rounds(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=2, epochs=1, packs=random_packs())
    for index in range(2):
        execute(store, config, StageKey("train", index))
    rates = [r for index in range(2) for r in metrics(store, index).column("learning_rate").to_pylist()]
    # The rate of step s was set after s - 1 steps, of 4 in all.
    expected = [1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    assert rates == pytest.approx(expected, rel=1e-9)


def test_stopped_mid_round_it_continues_exactly(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    packs = random_packs()
    whole, config = training_run(tmp_path / "a", teacher_dir, student_dir, rounds=1, epochs=3, packs=packs)
    execute(whole, config, StageKey("train", 0))

    stopped, config = training_run(
        tmp_path / "b", teacher_dir, student_dir, rounds=1, epochs=3, packs=packs, save_every_steps=1
    )

    def stop_at_three(done: int, total: int, unit: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(stopped, config, StageKey("train", 0), stop_at_three)
    assert stopped.manifest(StageKey("train", 0)) is None
    seen: list[int] = []
    execute(stopped, config, StageKey("train", 0), lambda done, total, unit: seen.append(done))
    assert seen == [3, 4, 5, 6]  # steps 1 and 2 were not repeated; the interrupted third was not saved
    assert_same(trained_weights(stopped, 0), trained_weights(whole, 0))
    assert metrics(stopped, 0).equals(metrics(whole, 0))


def reference_loss(student: Path, packs: pa.Table, form: str, weight: float, shift: int = 0) -> tuple[float, float]:
    """Mean CE and KD over all response tokens in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    ce, kd, tokens = 0.0, 0.0, 0
    for row in packs.to_pylist():
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            ids, labels = torch.tensor([row["input_ids"][part]]), torch.tensor(row["labels"][part])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0]
            places = (labels != IGNORE_LABEL).nonzero()[:, 0]
            predicting = logits[places - 1]
            ce -= predicting.log_softmax(-1).gather(1, labels[places, None]).sum().item()
            topk_ids = torch.tensor([row["teacher_topk_ids"][start + int(p)] for p in places])
            topk = torch.tensor([row["teacher_topk_logprobs"][start + int(p)] for p in places], dtype=torch.float64)
            topk_ids, topk = topk_ids.roll(shift, 0), topk.roll(shift, 0)
            kd += reference_kl(predicting, topk_ids, topk, form).sum().item()  # type: ignore[arg-type]
            tokens += len(places)
            start += length
    return ce / tokens, kd / tokens


@pytest.mark.parametrize("form", ["truncated", "tail", "renormalized"])
def test_first_step_has_the_loss_of_each_sequence_alone(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, form: str
) -> None:
    """Packed training equals unpacked float64: no leak between sequences, targets on the right tokens."""
    packs = random_packs(packs=2)
    store, config = training_run(
        tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=packs, kd_form=form, kd_weight=0.7
    )
    execute(store, config, StageKey("train", 0))
    ce, kd = reference_loss(student_dir, packs, form, 0.7)
    first = metrics(store, 0).to_pylist()[0]
    assert first["ce"] == pytest.approx(ce, abs=1e-5)
    assert first["kd"] == pytest.approx(kd, abs=1e-5)
    assert first["loss"] == pytest.approx(0.3 * ce + 0.7 * kd, abs=1e-5)
    _, shifted = reference_loss(student_dir, packs, form, 0.7, shift=1)
    assert abs(shifted - kd) > 1e-2


def test_loss_is_a_mean_over_the_tokens_of_the_step(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    """Two packs of very different size in one step weigh as their tokens do, as if they were one pack."""
    packs = pa.concat_tables([random_packs(1, sequences=1, seed=1), random_packs(1, sequences=9, seed=2)])
    packs = packs.set_column(0, packs.schema.field("pack_id"), pa.array([0, 1]))
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=packs)
    execute(store, config, StageKey("train", 0))
    ce, kd = reference_loss(student_dir, packs, "tail", 0.9)
    assert metrics(store, 0).to_pylist()[0]["loss"] == pytest.approx(0.1 * ce + 0.9 * kd, abs=1e-5)


def test_bf16_and_checkpointing_change_the_loss_by_rounding_only(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    """Tolerance: bf16 has 8 bits, 2^-8 relative a rounding; a two-layer model rounds a handful of times in a row."""
    packs = random_packs(packs=2)
    losses = {}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"precision": "bf16"},
    }
    for name, settings in variants.items():
        store, config = training_run(
            tmp_path / name, teacher_dir, student_dir, rounds=1, epochs=1, packs=packs, **settings
        )
        execute(store, config, StageKey("train", 0))
        losses[name] = metrics(store, 0).to_pylist()[0]["loss"]
    assert losses["checkpointing"] == pytest.approx(losses["plain"], abs=1e-6)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=8 * 2**-8)
    assert losses["bf16"] != losses["plain"]


def test_lora_trains_adapters_over_rounds_and_exports_merged(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    packs = random_packs()
    runs = {}
    for rounds, epochs in ((2, 1), (1, 2)):
        store, config = training_run(
            tmp_path / str(rounds), teacher_dir, student_dir, rounds=rounds, epochs=epochs, packs=packs, lora={"r": 3}
        )
        for index in range(rounds):
            execute(store, config, StageKey("train", index))
            execute(store, config, StageKey("export", index))
        runs[rounds] = store
    adapters = [
        load_file(store.path(StageKey("train", last), "checkpoint", "adapter_model.safetensors"))
        for store, last in ((runs[2], 1), (runs[1], 0))
    ]
    assert_same(*adapters)
    assert any(value.abs().max() > 0 for name, value in adapters[0].items() if "lora_B" in name)
    exported = load_file(runs[1].path(StageKey("export", 0), "model", "model.safetensors"))
    start = load_file(student_dir / "model.safetensors")
    assert exported.keys() == start.keys()
    changed = {name for name in start if not torch.equal(exported[name].float(), start[name].bfloat16().float())}
    assert any("q_proj" in name for name in changed)
    assert not any("embed_tokens" in name for name in changed)


def test_non_finite_weights_stop_before_the_first_step(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=random_packs())
    weights = store.path(MODELS, "student", "model.safetensors")
    tensors = load_file(weights)
    tensors["model.norm.weight"].fill_(math.inf)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="logits are not finite"):
        execute(store, config, StageKey("train", 0))
    assert store.manifest(StageKey("train", 0)) is None


def test_training_that_diverges_names_the_step(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = training_run(
        tmp_path, teacher_dir, student_dir, rounds=1, epochs=2, packs=random_packs(), learning_rate=1e30
    )
    with pytest.raises(StageError, match=r"optimizer step 2 is not finite.*learning_rate"):
        execute(store, config, StageKey("train", 0))
    assert store.manifest(StageKey("train", 0)) is None


def test_policy_kl_is_zero_for_the_sampler_itself(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    """With the sampler's own log-probabilities in the packs, the first step measures no distance to it."""
    packs = random_packs(packs=2)
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float64)
    rows = packs.to_pylist()
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            ids = torch.tensor([row["input_ids"][start : start + length]])
            with torch.no_grad():
                scores = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            for position in range(1, length):
                if row["labels"][start + position] != IGNORE_LABEL:
                    value = scores[position - 1, row["labels"][start + position]].item()
                    row["sampled_logprobs"][start + position] = value
            start += length
    packs = pa.Table.from_pylist(rows, schema=packs.schema)
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=3, packs=packs)
    execute(store, config, StageKey("train", 0))
    kl = metrics(store, 0).column("policy_kl").to_pylist()
    assert kl[0] == pytest.approx(0, abs=1e-8)
    assert kl[-1] > 1e-5


def test_warmup_learns_labels_alone(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    packs = random_packs()
    store, _ = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=packs)
    warm = make_config(
        tmp_path,
        teacher={"model": str(teacher_dir)},
        student={"model": str(student_dir)},
        warmup={"epochs": 6, "learning_rate": 3e-3, "min_learning_rate": 1e-4, "precision": "fp32"},
    )
    labels_only = packs.select(pack_schema(None).columns.names)
    finish_stage(store, StageKey("pack", WARMUP), pack_schema(None), [labels_only])
    execute(store, warm, StageKey("train", WARMUP))
    table = metrics(store, WARMUP)
    assert table.column("kd").null_count == table.num_rows
    assert table.column("policy_kl").null_count == table.num_rows
    ce = table.column("ce").to_pylist()
    assert ce[-1] < ce[0] - 0.1
    assert table.column("loss").to_pylist() == pytest.approx(ce, abs=1e-5)


def test_metrics_hold_no_times(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    packs = random_packs(packs=2)
    files = []
    for name in ("a", "b"):
        store, config = training_run(tmp_path / name, teacher_dir, student_dir, rounds=1, epochs=1, packs=packs)
        execute(store, config, StageKey("train", 0))
        files.append(store.path(StageKey("train", 0), "metrics.parquet"))
        assert store.finished(StageKey("train", 0)).counters["tokens_per_second"] > 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert pq.read_table(files[0]).num_rows == 1


def guarded_run(root: Path, teacher: Path, student: Path, rounds: int = 1, **guard: Any) -> tuple[RunStore, RunConfig]:
    """Packs whose sampler is nowhere near the student, two optimizer steps an epoch, three epochs a round."""
    settings = {"max_policy_kl": 0.1, "window_steps": 2, **guard}
    return training_run(
        root, teacher, student, rounds=rounds, epochs=3, packs=random_packs(), guard=settings, save_every_steps=100
    )


def test_guard_warns_once_and_changes_nothing(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    stores = {}
    guards: dict[str, dict[str, Any]] = {"warned": {}, "off": {"max_policy_kl": None}, "short": {"window_steps": 7}}
    for name, guard in guards.items():
        stores[name], config = guarded_run(tmp_path / name, teacher_dir, student_dir, **guard)
        execute(stores[name], config, StageKey("train", 0))
        warnings = stores[name].finished(StageKey("train", 0)).counters.get("warnings", [])
        assert len(warnings) == (1 if name == "warned" else 0)
    warning = stores["warned"].finished(StageKey("train", 0)).counters["warnings"][0]
    assert "optimizer step 2 " in warning
    assert "train.guard.max_policy_kl" in warning
    assert_same(trained_weights(stores["warned"], 0), trained_weights(stores["off"], 0))


def test_guard_refreshes_early_and_the_last_round_trains_what_is_left(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = guarded_run(tmp_path / "a", teacher_dir, student_dir, rounds=2, action="refresh")
    for index in range(2):
        execute(store, config, StageKey("train", index))
    first, last = (store.finished(StageKey("train", index)).counters for index in range(2))
    assert (first["policy_step"], first["epochs_done"]) == (2, 1.0)
    # Six epochs in all, two steps each; over budget again, but there is no sampler left to refresh.
    assert (last["policy_step"], last["epochs"], last["epochs_done"]) == (12, 5.0, 6.0)
    assert last["warnings"]
    steps = pa.concat_tables([metrics(store, 0), metrics(store, 1)])
    assert steps.column("step").to_pylist() == list(range(1, 13))
    assert steps.column("learning_rate").to_pylist()[-1] > config.train.min_learning_rate

    # Killed after the round's last checkpoint, before its manifest: it does not train on.
    again, config = guarded_run(tmp_path / "b", teacher_dir, student_dir, rounds=2, action="refresh")
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "write_table", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(again, config, StageKey("train", 0))
    seen: list[int] = []
    execute(again, config, StageKey("train", 0), lambda done, total, unit: seen.append(done))
    assert seen == []
    assert_same(trained_weights(again, 0), trained_weights(store, 0))
    assert metrics(again, 0).equals(metrics(store, 0))


def test_guard_stops_and_a_higher_budget_goes_on_from_there(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    store, config = guarded_run(tmp_path / "a", teacher_dir, student_dir, action="stop")
    for _ in range(2):
        with pytest.raises(StageError, match=r"optimizer step 2 .*`train.guard.max_policy_kl` is 0.1"):
            execute(store, config, StageKey("train", 0))
    assert store.manifest(StageKey("train", 0)) is None
    raised = config.train.guard.model_copy(update={"max_policy_kl": 1e9})
    higher = config.model_copy(update={"train": config.train.model_copy(update={"guard": raised})})
    seen: list[int] = []
    execute(store, higher, StageKey("train", 0), lambda done, total, unit: seen.append(done))
    assert seen == [3, 4, 5, 6]
    free, config = guarded_run(tmp_path / "b", teacher_dir, student_dir, max_policy_kl=None)
    execute(free, config, StageKey("train", 0))
    assert_same(trained_weights(store, 0), trained_weights(free, 0))


def test_recent_policy_kl_weighs_tokens_and_forgets_earlier_rounds() -> None:
    history = [
        {"step": 1, "policy_kl": 9.0, "response_tokens": 100},
        {"step": 2, "policy_kl": 0.1, "response_tokens": 30},
        {"step": 3, "policy_kl": 0.4, "response_tokens": 10},
        {"step": 3, "train_runtime": 1.0},
    ]
    assert recent_policy_kl(history, 1, 2) == pytest.approx((0.1 * 30 + 0.4 * 10) / 40)
    assert recent_policy_kl(history, 1, 3) is None
    assert recent_policy_kl(history, 0, 1) == pytest.approx(0.4)


@pytest.mark.parametrize(("packs", "packs_per_step"), [(1, 1), (17, 1), (64, 8), (67, 8), (5, 8), (8, 8)])
def test_every_pack_once_an_epoch_and_steps_of_like_cost(packs: int, packs_per_step: int) -> None:
    random = np.random.default_rng(packs)
    costs = random.lognormal(3, 1, packs)
    sampler = EpochSampler(costs, packs_per_step, 3, 0)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(packs))
        assert orders[-1] == list(sampler)
    if packs > packs_per_step:
        assert orders[0] != orders[1]
    if packs_per_step > 1 and packs >= 64:
        whole = costs[orders[0][: packs - packs % packs_per_step]].reshape(-1, packs_per_step)
        spread = (whole.max(1) / whole.mean(1)).mean()
        shuffled = random.permutation(costs)[: whole.size].reshape(-1, packs_per_step)
        # What the step waits for beyond its mean, against packs in any order.
        assert spread - 1 < ((shuffled.max(1) / shuffled.mean(1)).mean() - 1) / 2
    # A run's epoch has one order, whichever round it falls into.
    later = EpochSampler(costs, packs_per_step, 3, 2)
    assert list(later) == orders[2]


def test_a_packs_cost_is_its_tokens_and_the_squares_of_its_sequences() -> None:
    lengths = Ragged.from_rows([np.array([100]), np.array([50, 50]), np.array([7, 1, 3])])
    expected = [100 + 100**2 / 240, 100 + 2 * 50**2 / 240, 11 + (49 + 1 + 9) / 240]
    assert pack_costs(lengths, width=20).tolist() == pytest.approx(expected)
