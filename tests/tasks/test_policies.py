"""Who answers the prompts, and how long a round is: what other methods than near-policy distillation need."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.config import RunConfig, parse_config
from schemas.errors import ConfigError, ModelError, PromptError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import FILTER, GENERATE, PROMPTS, TRAIN_METRICS, score_schema
from tasks.graph import MODELS, loop
from tasks.language_model.chat import encode_prompts
from tasks.language_model.loading import load_tokenizer
from tasks.language_model.sources import resolved_models
from tasks.stage import execute
from tasks.train.on_policy import OnPolicyTrainer
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table
from tests.tasks.training_runs import assert_same, metrics, random_packs, train_rounds, trained_weights, training_run
from tests.tiny_models import make_model, save_model


def whole_run(folder: Path, teacher: Path, student: Path, *, answers: bool = True, **sections: Any) -> RunStore:
    """Run every stage of two short rounds, without a warm-up."""
    rows = [{"prompt": f"Say {n}.", "answer": f"{n}0" if answers else None} for n in range(1, 9)]
    folder.mkdir(exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "teacher": {"model": str(teacher)},
        "student": {"model": str(student)},
        "prompts": {"sources": [{"type": "jsonl", "path": str(folder / "prompts.jsonl")}], "held_out": 2},
        "evaluate": {"generate": False},
        "generate": {"max_new_tokens": 6},
        "pack": {"max_tokens": 64},
        "filter": {"min_delta_ifd": None, "max_delta_ifd": None},
        "train": {"steps_per_round": 2, "precision": "fp32", "gradient_checkpointing": False},
    }
    config = make_config(folder / "runs", **(values | {k: values.get(k, {}) | v for k, v in sections.items()}))
    store = RunStore.create(config)
    for key in loop(config):
        if key.stage != "evaluate":
            execute(store, config, key)
    return store


def test_the_teacher_as_policy_answers_once_for_all_rounds(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    store = whole_run(tmp_path, teacher_dir, student_dir, generate={"policy": "teacher", "max_new_tokens": 6})
    samples = store.read_table(StageKey("generate", 0), GENERATE)
    assert set(samples.column("policy_version").to_pylist()) == {resolved_models(store).teacher_version}
    assert set(samples.column("policy_step").to_pylist()) == {0}
    assert store.manifest(StageKey("generate", 1)) is None
    ledger = store.read_table(StageKey("filter", 0), FILTER)
    assert set(ledger.column("policy_lag").to_pylist()) == {0}
    # The sampled log-probabilities are the teacher's own, as its prefill says.
    scores = store.read_table(StageKey("score", 0), score_schema(10, "float16"), ["teacher_nll", "student_nll"])
    sampled = [-np.mean(row) for row in samples.column("sampled_logprobs").to_pylist()]
    assert scores.column("teacher_nll").to_pylist() == pytest.approx(sampled, abs=2e-3)
    assert max(abs(a - b) for a, b in zip(scores.column("student_nll").to_pylist(), sampled, strict=True)) > 0.1
    steps = store.read_table(StageKey("train", 1), TRAIN_METRICS)
    assert steps.column("policy_kl").null_count == steps.column("policy_lag").null_count == steps.num_rows == 2


def test_answers_as_policy_are_the_answers_and_an_end(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store = whole_run(tmp_path, teacher_dir, student_dir, generate={"policy": "answers"})
    samples = store.read_table(StageKey("generate", 0), GENERATE)
    prompts = store.read_table(StageKey("prompts"), PROMPTS)
    answers = dict(zip(prompts.column("prompt_id").to_pylist(), prompts.column("answer").to_pylist(), strict=True))
    assert samples.column("response").to_pylist() == [answers[name] for name in samples.column("prompt_id").to_pylist()]
    end = load_tokenizer(str(student_dir)).eos_token_id
    assert {row[-1] for row in samples.column("response_ids").to_pylist()} == {end}
    assert set(samples.column("policy_version").to_pylist()) == {"answers"}
    assert np.isnan(np.concatenate(samples.column("sampled_logprobs").to_pylist())).all()
    for index in range(2):
        steps = metrics(store, index)
        assert np.isfinite(steps.column("loss").to_numpy()).all()
        assert steps.column("policy_kl").null_count == steps.num_rows


def test_a_prompt_without_an_answer_is_named(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    with pytest.raises(
        PromptError, match=r"prompts\.jsonl: row \d+: no answer, which `generate.policy: answers` needs"
    ):
        whole_run(tmp_path, teacher_dir, student_dir, answers=False, generate={"policy": "answers"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generate": {"policy": "teacher"}, "train": {"guard": {"action": "stop"}}}, "generate.policy: student"),
        ({"generate": {"policy": "answers", "samples_per_prompt": 2}}, "samples_per_prompt: 1"),
        ({"train": {"on_policy": {}}}, "rounds: 1"),
        ({"rounds": 1, "train": {"on_policy": {}, "steps_per_round": 2, "lora": {}}}, "no `lora`"),
        ({"train": {"on_policy": {"prompts_per_step": 8, "batch_prompts": 3}}}, "does not divide"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **changes)


def on_policy_run(
    folder: Path,
    teacher: Path,
    student: Path,
    splits: dict[str, str],
    *,
    steps: int,
    generate: dict[str, Any],
    **how: Any,
) -> tuple[RunStore, RunConfig]:
    """Return a run of on-policy training up to its models; ``how`` are settings of `train.on_policy`."""
    config = make_config(
        folder,
        teacher={"model": str(teacher)},
        student={"model": str(student)},
        rounds=1,
        generate=generate,
        train={
            "on_policy": how,
            "steps_per_round": steps,
            "precision": "fp32",
            "gradient_checkpointing": False,
        },
    )
    store = make_store(folder, config)
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table(splits)])
    execute(store, config, MODELS)
    return store, config


def test_on_policy_training_asks_the_train_prompts_alone_and_repeats_byte_for_byte(
    tmp_path: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Held-out prompts lie between the six that may be asked; two epochs of two steps ask each of those twice.
    splits = {name: "held_out" if name in "beh" else "train" for name in "abcdefghi"}
    store, config = on_policy_run(
        tmp_path, student_dir, student_dir, splits, steps=4, generate={"max_new_tokens": 2}, prompts_per_step=3
    )
    asked: list[str] = []
    tokenize = OnPolicyTrainer._tokenize_prompts

    def listen(trainer: OnPolicyTrainer, prompts: list[Any]) -> Any:
        # The table's prompts have their ids as content.
        asked.extend(messages[-1]["content"] for messages in prompts)
        return tokenize(trainer, prompts)

    monkeypatch.setattr(OnPolicyTrainer, "_tokenize_prompts", listen)
    once = execute(store, config, StageKey("train", 0))
    assert sorted(asked) == sorted(2 * [name for name, split in splits.items() if split == "train"])
    store.supersede(StageKey("train", 0))
    assert execute(store, config, StageKey("train", 0)).outputs == once.outputs


def test_on_policy_training_samples_no_further_than_the_context(
    tmp_path: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("a", "b b b", "c c", "d")
    asked = [[{"role": "user", "content": name}] for name in names]
    # The longest leaves room for two tokens, no other for all that may be sampled.
    context = max(map(len, encode_prompts(load_tokenizer(str(student_dir)), asked))) + 2
    model = save_model(tmp_path / "model", make_model(seed=2, layers=1, context=context))
    splits = dict.fromkeys(names, "train")
    store, config = on_policy_run(
        tmp_path, model, model, splits, steps=1, generate={"max_new_tokens": 24}, prompts_per_step=4
    )
    sampled: list[int] = []
    generate = OnPolicyTrainer._generate_single_turn

    def listen(trainer: OnPolicyTrainer, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        responses = generate(trainer, prompt_ids, *args, **kwargs)
        sampled.extend(len(prompt) + len(response) for prompt, response in zip(prompt_ids, responses, strict=True))
        return responses

    monkeypatch.setattr(OnPolicyTrainer, "_generate_single_turn", listen)
    manifest = execute(store, config, StageKey("train", 0))
    assert len(sampled) == 4
    assert max(sampled) == context
    assert manifest.counters["tokens"] == sum(sampled)


@pytest.mark.parametrize(("beta", "rows", "tied"), [(0.0, 259, True), (1.0, 259, True), (0.0, 264, False)])
def test_on_policy_training_samples_as_it_is_told_and_learns_the_kl_it_is_told(
    tmp_path: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch, beta: float, rows: int, tied: bool
) -> None:
    """The first step's loss against float64, one response at a time: KL(teacher || student), or the other way round.

    What a teacher's vocabulary has above the student's is padding and counts for nothing.
    """
    teacher_dir = save_model(tmp_path / "teacher", make_model(seed=9, layers=3, vocab_size=rows, tie=tied))
    splits = dict.fromkeys("abcd", "train") | {"e": "held_out"}
    generate = {"max_new_tokens": 7, "temperature": 0.7, "top_p": 0.9}
    how = {"prompts_per_step": 4, "batch_prompts": 2, "beta": beta}
    store, config = on_policy_run(tmp_path, teacher_dir, student_dir, splits, steps=1, generate=generate, **how)
    sampled: list[tuple[list[int], list[int]]] = []
    trainers: list[OnPolicyTrainer] = []
    sample = OnPolicyTrainer._generate_single_turn

    def listen(trainer: OnPolicyTrainer, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        responses = sample(trainer, prompt_ids, *args, **kwargs)
        trainers.append(trainer)
        sampled.extend(zip(prompt_ids, responses, strict=True))
        return responses

    monkeypatch.setattr(OnPolicyTrainer, "_generate_single_turn", listen)
    execute(store, config, StageKey("train", 0))
    (trainer,) = trainers
    told = trainer.generation_config
    assert (told.do_sample, told.temperature, told.top_p, told.top_k) == (True, 0.7, 0.9, 0)
    assert told.max_new_tokens == 7
    assert len(sampled) == 4
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (teacher_dir, student_dir)]
    divergences = []
    for prompt, response in sampled:
        with torch.no_grad():
            teacher, student = (
                model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[
                    0, len(prompt) - 1 : -1, :259
                ]
                for model in models
            )
        p, q = (values.log_softmax(-1) for values in ((teacher, student) if beta == 0 else (student, teacher)))
        divergences += (p.exp() * (p - q)).sum(-1).tolist()
    (row,) = metrics(store, 0).to_pylist()
    assert row["loss"] == row["kd"] == pytest.approx(np.mean(divergences), rel=1e-4)
    assert row["response_tokens"] == len(divergences)


def test_on_policy_training_wants_a_teacher_with_every_row_of_the_student(tmp_path: Path, student_dir: Path) -> None:
    padded = save_model(tmp_path / "padded", make_model(seed=9, vocab_size=264))
    config = make_config(
        tmp_path,
        teacher={"model": str(student_dir)},
        student={"model": str(padded)},
        rounds=1,
        train={"on_policy": {"prompts_per_step": 1}, "steps_per_round": 1},
    )
    store = make_store(tmp_path, config)
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table({"a": "train", "b": "held_out"})])
    execute(store, config, MODELS)
    with pytest.raises(ModelError, match="the student has 264 rows of vocabulary and the teacher only 259"):
        execute(store, config, StageKey("train", 0))


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_round_takes_its_steps_exactly_whatever_its_packs(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, steps: int
) -> None:
    # Three packs, two a step: an epoch is two steps.
    store, config = training_run(
        tmp_path, teacher_dir, student_dir, rounds=2, epochs=1, packs=random_packs(), steps_per_round=steps
    )
    train_rounds(store, config)
    rates = []
    for index in range(2):
        table = metrics(store, index)
        assert table.column("step").to_pylist() == list(range(index * steps + 1, (index + 1) * steps + 1))
        rates += table.column("learning_rate").to_pylist()
    done = np.arange(2 * steps) / (2 * steps)
    assert rates == pytest.approx(1e-4 + 9e-4 * 0.5 * (1 + np.cos(np.pi * done)), rel=1e-9)


def test_a_round_of_steps_resumes_where_it_was(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    class Ended(Exception):
        pass

    def ends(done: int, total: int, unit: str) -> None:
        if unit == "steps" and done == 3:
            raise Ended

    runs = []
    for name in ("whole", "ended"):
        store, config = training_run(
            tmp_path / name,
            teacher_dir,
            student_dir,
            rounds=2,
            epochs=1,
            packs=random_packs(),
            steps_per_round=5,
            save_every_steps=1,
        )
        execute(store, config, StageKey("train", 0))
        execute(store, config, StageKey("export", 0))
        if name == "ended":
            with pytest.raises(Ended):
                execute(store, config, StageKey("train", 1), ends)
        execute(store, config, StageKey("train", 1))
        runs.append(store)
    assert metrics(runs[0], 1).equals(metrics(runs[1], 1))
    assert_same(trained_weights(runs[0], 1), trained_weights(runs[1], 1))


def test_the_split_seed_alone_decides_the_held_out_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "Say {n}."}}\n' for n in range(40)), encoding="utf-8")

    def held_out(seed: int, split_seed: int | None) -> set[str]:
        sources = {"sources": [{"type": "jsonl", "path": str(path)}], "held_out": 10, "split_seed": split_seed}
        config = make_config(tmp_path / f"{seed}-{split_seed}", seed=seed, prompts=sources)
        store = RunStore.create(config)
        execute(store, config, StageKey("prompts"))
        rows = store.read_table(StageKey("prompts"), PROMPTS).to_pylist()
        return {row["prompt_id"] for row in rows if row["split"] == "held_out"}

    assert held_out(0, 7) == held_out(1, 7) == held_out(7, None)
    assert held_out(0, None) != held_out(1, None)


def test_a_default_config_is_near_policy() -> None:
    config = parse_config(
        {
            "name": "a",
            "teacher": {"model": "t"},
            "student": {"model": "s"},
            "prompts": {"sources": [{"type": "jsonl", "path": "p"}]},
        }
    )
    assert config.is_near_policy
    assert config.total_steps is None
    assert config.split_seed == config.seed
