"""RL runs on tiny models: what they write, what they never learn from, and that they repeat and resume."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from schemas.config import GRPOConfig, RLConfig, parse_as
from schemas.errors import ArtifactError, ConfigError, ModelError, PromptError, RunNotFoundError, StageError
from schemas.rl_tables import RL_METRICS, RL_ROLLOUTS
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import EVALUATE_METRICS, EVALUATE_RESPONSES
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.checkpoint import checkpoint_step
from tasks.graph import PROMPTS
from tasks.language_model.chat import encode_prompts
from tasks.language_model.loading import load_model, load_tokenizer
from tasks.language_model.weights import read_tensors
from tasks.rl.graph import BASELINE, EVALUATE, RL
from tasks.rl.grpo import check_engine, trainer_arguments
from tasks.rl.held_out import sampling_of
from tasks.rl.reward import VerifiedReward, verifiable
from tasks.rl.start import source_run
from tasks.rl.trainer import VerifiedGRPOTrainer, prompt_order
from tasks.rollout.prompts import encode_messages
from tasks.stage import execute
from tests.faults.object_server import ObjectServer
from tests.tasks.rl_runs import HELD_OUT, TRAIN, checked_prompts, rl_config, rl_tables, rl_values, run_rl, source_store
from tests.tiny_models import make_model, save_model


def likely_letter(student: Path) -> str:
    """Return the printable character that a model is most likely to begin its replies with."""
    tokenizer, model = load_tokenizer(student), load_model(student, device="cpu")
    messages = checked_prompts().column("messages").to_pylist()
    with torch.no_grad():
        last = [model(torch.from_numpy(ids)[None].long()).logits[0, -1] for ids in encode_prompts(tokenizer, messages)]
    mean = torch.stack(last).softmax(-1).mean(0)
    letters = {i: str(tokenizer.decode([i])) for i in range(len(tokenizer))}
    candidates = [i for i, text in letters.items() if len(text) == 1 and text.isascii() and text.isalnum()]
    return letters[max(candidates, key=lambda i: float(mean[i]))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, student_dir: Path) -> RunStore:
    """A distillation run whose prompts all want the reply that the student already gives now and then."""
    prompts = checked_prompts(answer=likely_letter(student_dir), unchecked=2)
    return source_store(tmp_path_factory.mktemp("source"), student_dir, prompts)


SETTINGS: dict[str, Any] = {"max_new_tokens": 1, "num_generations": 8, "learning_rate": 3e-2, "steps": 12}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, source: RunStore) -> tuple[RunStore, RLConfig]:
    config = rl_config(tmp_path_factory.mktemp("rl"), source.folder, **SETTINGS)
    store = RunStore.at(config)
    run_rl(store, config)
    return store, config


def metrics(store: RunStore) -> pa.Table:
    return store.read_part(store.path(RL, "metrics.parquet"), RL_METRICS)


def rollouts(store: RunStore) -> pa.Table:
    files = [path for path in store.table_files(RL) if path.parent.name == "rollouts"]
    return pa.concat_tables([store.read_part(path, RL_ROLLOUTS) for path in files])


def equal_rewards(samples: list[dict[str, Any]]) -> float:
    """Return the share of prompts whose responses all have one reward."""
    rewards: dict[str, set[float]] = {}
    for sample in samples:
        rewards.setdefault(sample["prompt_id"], set()).add(sample["reward"])
    return float(np.mean([len(found) == 1 for found in rewards.values()]))


def accuracy(store: RunStore, key: Any) -> float:
    rows = store.read_part(store.path(key, "metrics.parquet"), EVALUATE_METRICS).to_pylist()
    return next(float(row["value"]) for row in rows if row["metric"] == "accuracy")


def test_the_policy_learns_what_is_rewarded(finished: tuple[RunStore, RLConfig]) -> None:
    store, _ = finished
    reward = metrics(store).column("reward").to_pylist()
    assert reward[0] < 0.3
    assert reward[-1] > 0.9
    # Held-out prompts, which nothing was learned from.
    assert accuracy(store, EVALUATE) == 1.0 >= accuracy(store, BASELINE)


def test_metrics_are_those_of_the_rollouts(finished: tuple[RunStore, RLConfig]) -> None:
    store, config = finished
    steps, samples = metrics(store).to_pylist(), rollouts(store)
    assert [row["step"] for row in steps] == list(range(1, config.grpo.steps + 1))
    assert samples.num_rows == 12 * 3 * 8
    # The rate that each step was taken with, not the next one's.
    assert [row["learning_rate"] for row in steps] == pytest.approx([3e-2 * (1 - done / 12) for done in range(12)])
    for row in steps:
        own = [sample for sample in samples.to_pylist() if sample["step"] == row["step"]]
        assert len(own) == 3 * 8
        assert row["score"] == pytest.approx(np.mean([sample["score"] for sample in own]))
        assert row["reward"] == pytest.approx(np.mean([sample["reward"] for sample in own]), abs=1e-6)
        assert row["reward_std"] == pytest.approx(np.std([sample["reward"] for sample in own], ddof=1), abs=1e-5)
        assert row["equal_rewards"] == pytest.approx(equal_rewards(own))
        assert row["response_tokens"] == 1.0
        assert row["truncation_rate"] == pytest.approx(np.mean([sample["finish_reason"] == "length" for sample in own]))
        assert row["kl"] is None
    assert store.finished(RL).counters["samples"] == samples.num_rows


def test_held_out_and_unchecked_prompts_are_never_learned_from(finished: tuple[RunStore, RLConfig]) -> None:
    store, _ = finished
    met = set(rollouts(store).column("prompt_id").to_pylist())
    # The first two train prompts have nothing to check against.
    assert met == {f"p{i:03d}" for i in range(2, TRAIN)}
    responses = store.read_part(store.path(EVALUATE, "responses.parquet"), EVALUATE_RESPONSES)
    assert set(responses.column("prompt_id").to_pylist()) == {f"p{i:03d}" for i in range(TRAIN, TRAIN + HELD_OUT)}
    counters = store.finished(RL).counters
    assert (counters["prompts_without_check"], counters["prompts"]) == (2, TRAIN - 2)
    assert "2 that cannot be checked" in counters["warnings"][0]


def test_the_exported_model_is_the_trained_one_and_loads(finished: tuple[RunStore, RLConfig]) -> None:
    store, _ = finished
    folder = store.path(RL, "model")
    exported, trained = (read_tensors(path / "model.safetensors") for path in (folder, store.checkpoint(RL)))
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    assert load_model(folder, device="cpu").generation_config.eos_token_id is not None
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "source, round 0" in card
    assert store.first_damage(store.finished(RL)) is None
    assert not list(store.folder.rglob("*.bin")) + list(store.folder.rglob("*.pt"))


def test_a_run_cut_off_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, source: RunStore, finished: tuple[RunStore, RLConfig]
) -> None:
    config = rl_config(tmp_path, source.folder, **SETTINGS)
    store = RunStore.at(config)

    def cut(done: int, total: int, unit: str) -> None:
        if (done, unit) == (7, "steps"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rl(store, config, cut)
    running = store.path(RL, "checkpoints")
    assert [checkpoint_step(folder) for folder in running.iterdir()] == [6]
    seen: list[int] = []
    run_rl(store, config, lambda done, total, unit: seen.append(done) if unit == "steps" else None)
    assert seen[0] == 7
    # Two runs with one seed: every table, and the weights.
    assert rl_tables(store) == rl_tables(finished[0])
    weights = store.path(RL, "model", "model.safetensors").read_bytes()
    assert weights == finished[0].path(RL, "model", "model.safetensors").read_bytes()


def test_a_run_in_an_object_store_that_is_killed_after_a_checkpoint_keeps_its_rollouts(
    tmp_path: Path, source: RunStore, finished: tuple[RunStore, RLConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(done: int, total: int, unit: str) -> None:
        if (done, unit) == (7, "steps"):
            raise KeyboardInterrupt

    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "cache"))
    with ObjectServer() as server, server.reachable():
        config = rl_config(tmp_path, source.folder, **SETTINGS).model_copy(update={"root": server.bucket})
        with pytest.raises(KeyboardInterrupt):
            run_rl(RunStore.at(config), config, killed)
        # Another machine goes on.
        shutil.rmtree(tmp_path / "cache")
        seen: list[int] = []
        store = RunStore.at(config)
        run_rl(store, config, lambda done, total, unit: seen.append(done) if unit == "steps" else None)
        assert seen[0] == 7
        assert rollouts(store).equals(rollouts(finished[0]))
        assert store.finished(RL).counters["samples"] == rollouts(finished[0]).num_rows


def test_a_finished_run_is_not_done_again_and_a_new_setting_redoes_what_reads_it(
    tmp_path: Path, finished: tuple[RunStore, RLConfig]
) -> None:
    store, config = RunStore(shutil.copytree(finished[0].folder, tmp_path / "rl")), finished[1]
    before = {key: store.finished(key).started for key in (PROMPTS, BASELINE, RL, EVALUATE)}
    run_rl(store, config)
    assert {key: store.finished(key).started for key in before} == before
    changed = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_new_tokens": 2})})
    run_rl(store, changed)
    again = [key for key in before if store.finished(key).started != before[key]]
    assert again == [BASELINE, EVALUATE]


def test_the_split_seed_alone_decides_the_held_out_prompts(tmp_path: Path, student_dir: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Say {i}.", "answer": "a"}}\n' for i in range(30)), encoding="utf-8")

    def held_out(seed: int, split_seed: int | None) -> set[str]:
        sources = {"sources": [{"type": "jsonl", "path": str(prompts)}], "held_out": 8, "split_seed": split_seed}
        values = rl_values(tmp_path / f"{seed}-{split_seed}", tmp_path)
        config = parse_as(RLConfig, values | {"run": None, "model": str(student_dir), "seed": seed, "prompts": sources})
        store = RunStore.create(config)
        execute(store, config, PROMPTS)
        rows = store.read_table(PROMPTS, PROMPTS_TABLE).to_pylist()
        return {row["prompt_id"] for row in rows if row["split"] == "held_out"}

    assert held_out(0, 7) == held_out(1, 7) == held_out(7, None)
    assert held_out(0, None) != held_out(1, None)


def test_a_reference_model_an_own_model_and_several_steps_on_one_batch(tmp_path: Path, student_dir: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Say {i}.", "answer": "a"}}\n' for i in range(9)), encoding="utf-8")
    grpo = {"beta": 0.1, "num_iterations": 2, "truncation_penalty": 0.5, "sequences_per_batch": 6, "precision": "bf16"}
    values = rl_values(tmp_path, tmp_path, **grpo) | {
        "run": None,
        "model": str(student_dir),
        "prompts": {"sources": [{"type": "jsonl", "path": str(prompts)}], "held_out": 2},
    }
    store = RunStore.at(config := parse_as(RLConfig, values))
    run_rl(store, config)
    table = metrics(store)
    assert all(value is not None and value >= 0 for value in table.column("kl").to_pylist())
    # Every second step learns from the responses of the one before.
    assert [value is None for value in table.column("reward").to_pylist()] == [False, True, False, True]
    samples = rollouts(store)
    assert set(samples.column("step").to_pylist()) == {1, 3}
    for row in samples.to_pylist():
        assert row["reward"] == row["score"] - 0.5 * (row["finish_reason"] == "length")


def test_means_over_tokens_do_not_depend_on_how_many_responses_are_passed_at_once(tmp_path: Path) -> None:
    model = make_model(seed=2)
    # Many ends, so that responses differ in length; what else comes with a model changes no sample.
    model.generation_config.eos_token_id = list(range(2, 90))
    model.generation_config.min_new_tokens = 20
    folder = save_model(tmp_path / "model", model)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Say {i}.", "answer": "a"}}\n' for i in range(9)), encoding="utf-8")
    found = []
    for batch in (None, 2):
        grpo = {"steps": 1, "beta": 0.1, "max_new_tokens": 20, "mask_truncated_completions": True}
        values = rl_values(tmp_path, tmp_path, **grpo, sequences_per_batch=batch) | {
            "name": f"batches-{batch}",
            "run": None,
            "model": str(folder),
            "prompts": {"sources": [{"type": "jsonl", "path": str(prompts)}], "held_out": 2},
        }
        store = RunStore.at(config := parse_as(RLConfig, values))
        store.record_config(config)
        for key in (PROMPTS, RL):
            execute(store, config, key)
        found.append((metrics(store).to_pylist()[0], rollouts(store).column("response_tokens").to_pylist()))
    (whole, lengths), (parts, same_lengths) = found
    assert lengths == same_lengths
    assert len(set(lengths)) > 3
    assert parts["entropy"] == pytest.approx(whole["entropy"], rel=1e-5)


def test_rewards_are_the_verifiers_scores() -> None:
    prompts = checked_prompts(6, unchecked=1)
    assert verifiable(prompts).tolist() == [False, True, True, True, True, True]
    reward = VerifiedReward(prompts, num_generations=2, end_ids=[2], truncation_penalty=0.25)
    logged: list[tuple[str, float]] = []

    class State:
        global_step = 4

    found = reward(
        completions=["a", "b", "Well:\n#### a", ""],
        completion_ids=[[9, 2], [9], [9, 9], [2]],
        row=[1, 1, 3, 3],
        trainer_state=State(),
        log_metric=lambda name, value: logged.append((name, value)),
        prompts=["1", "1", "3", "3"],
    )
    assert found == [1.0, -0.25, 0.75, 0.0]
    assert logged == [("score", 0.5), ("equal_rewards", 0.0), ("truncation_rate", 0.5)]
    kept = reward.take_rollouts()
    assert kept.column("prompt_id").to_pylist() == ["p001", "p001", "p003", "p003"]
    assert kept.column("sample_index").to_pylist() == [0, 1, 0, 1]
    assert kept.column("response_tokens").to_pylist() == [2, 1, 2, 1]
    assert kept.column("finish_reason").to_pylist() == ["stop", "length", "length", "stop"]
    assert kept.column("score").to_pylist() == [1.0, 0.0, 1.0, 0.0]
    assert set(kept.column("step").to_pylist()) == {5}
    assert reward.take_rollouts().num_rows == 0


def test_every_prompt_is_met_once_before_any_is_met_again() -> None:
    order = prompt_order(7, 30, seed=3)
    assert len(order) == 30
    assert all(sorted(order[start : start + 7].tolist()) == list(range(7)) for start in range(0, 28, 7))
    assert not np.array_equal(order[:7], order[7:14])
    assert np.array_equal(order, prompt_order(7, 30, seed=3))
    assert not np.array_equal(order, prompt_order(7, 30, seed=4))


def test_the_model_answers_as_the_config_says(tmp_path: Path) -> None:
    own = {"engine": "vllm", "batch_size": 5, "temperature": 0.5, "samples_per_prompt": 3}
    values = rl_values(tmp_path, tmp_path) | {"seed": 8}
    for limit, expected in ((None, 6), (9, 9)):
        found = sampling_of(parse_as(RLConfig, values | {"evaluate": {**own, "max_new_tokens": limit}}))
        assert (found.engine.engine, found.engine.batch_size) == ("vllm", 5)
        assert (found.temperature, found.samples_per_prompt, found.max_new_tokens, found.seed) == (0.5, 3, expected, 8)


def test_what_cannot_start_says_so(tmp_path: Path, student_dir: Path, source: RunStore) -> None:
    def error_of(kind: type[Exception], config: RLConfig) -> str:
        with pytest.raises(kind) as error:
            run_rl(RunStore.at(config), config)
        return str(error.value)

    def config_of(**changes: Any) -> RLConfig:
        return parse_as(RLConfig, rl_values(tmp_path, source.folder) | {"name": "x"} | changes)

    assert "no run here" in error_of(RunNotFoundError, config_of(run=str(tmp_path / "nowhere")))
    assert "has not exported the student of round 1" in error_of(ArtifactError, config_of(round=1))
    assert "needs a GPU" in error_of(ConfigError, config_of(grpo={"engine": "vllm"}))
    assert "leaves room for `grpo.max_new_tokens` 512" in error_of(PromptError, config_of(grpo={"max_new_tokens": 512}))
    (tmp_path / "p").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n', encoding="utf-8")
    prompts = {"sources": [{"type": "jsonl", "path": str(tmp_path / "p")}], "held_out": 1}
    own: dict[str, Any] = {"run": None, "model": str(tmp_path / "no" / "model"), "prompts": prompts}
    assert "no such folder" in error_of(ModelError, config_of(**own))
    unchecked = source_store(tmp_path / "unchecked", student_dir, checked_prompts(unchecked=TRAIN))
    assert "none of the 10 train prompts can be checked" in error_of(PromptError, config_of(run=str(unchecked.folder)))


def test_an_export_of_other_settings_is_no_start(tmp_path: Path, student_dir: Path) -> None:
    store = source_store(tmp_path, student_dir, checked_prompts())
    settings = store.config
    export, records = StageKey("export", 0), store.finished(StageKey("export", 0))
    made_with = {"export": settings.export.fingerprinted(), "seed": settings.seed}
    store.finish(export, records.model_copy(update={"config": made_with}))
    config = rl_config(tmp_path, store.folder)
    assert source_run(config).export == export
    changed = settings.model_copy(update={"export": settings.export.model_copy(update={"dtype": "float32"})})
    store.record_config(changed)
    for wanted in (None, 0):
        with pytest.raises(ArtifactError, match=r"has not exported .* yet; finish it first: npd run"):
            source_run(config.model_copy(update={"round": wanted}))


def test_vllm_samples_on_the_first_gpu_alone() -> None:
    check_engine(GRPOConfig(engine="vllm"), torch.device("cuda"))
    check_engine(GRPOConfig(engine="vllm"), torch.device("cuda:0"))
    check_engine(GRPOConfig(), torch.device("cuda:1"))
    with pytest.raises(ConfigError, match="`device: cuda:1` is another: set `device: null`"):
        check_engine(GRPOConfig(engine="vllm"), torch.device("cuda:1"))


def test_vllm_draws_from_the_seed_of_the_run(
    tmp_path: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        """As vLLM in TRL's process: it seeds all of it anew, with what TRL says, which is always 0."""

        def __init__(self, **settings: Any) -> None:
            torch.manual_seed(0)

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    tokenizer, prompts = load_tokenizer(student_dir), checked_prompts()

    def drawn(seed: int) -> float:
        config = parse_as(RLConfig, rl_values(tmp_path, tmp_path, engine="vllm") | {"seed": seed})
        VerifiedGRPOTrainer(
            model=load_model(student_dir, device="cpu"),
            args=trainer_arguments(config, tmp_path, "rl", torch.device("cpu"), 20, []),
            tokenizer=tokenizer,
            reward=VerifiedReward(prompts, config.grpo.num_generations, [], 0.0),
            tokens=encode_messages(tokenizer, prompts.column("messages")),
            order=prompt_order(prompts.num_rows, 12, seed),
            on_steps=lambda done, total: None,
            checkpoint_folder=lambda step: nullcontext(tmp_path),
        )
        return float(torch.rand(()))

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_damaged_export_is_no_start(tmp_path: Path, student_dir: Path) -> None:
    store = source_store(tmp_path, student_dir, checked_prompts())
    weights = next(store.folder.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    config = rl_config(tmp_path, store.folder)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: its bytes are not those"):
        run_rl(RunStore.at(config), config)


def test_a_loss_that_is_not_finite_ends_the_stage(tmp_path: Path, source: RunStore) -> None:
    config = rl_config(tmp_path, source.folder, **(SETTINGS | {"learning_rate": 1e30}))
    store = RunStore.at(config)
    with pytest.raises(StageError, match=r"rl: `(loss|grad_norm)` of optimizer step"):
        run_rl(store, config)
    assert store.manifest(RL) is None
