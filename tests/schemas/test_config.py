import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.config import (
    RLConfig,
    RunConfig,
    Section,
    TeacherConfig,
    apply_overrides,
    fields_markdown,
    load_as,
    load_comparison,
    load_config,
    parse_config,
    parse_settings,
)
from schemas.config.document import parse_document
from schemas.config.elsewhere import CALLED_HERE, CALLED_HERE_IN_RL, hint
from schemas.errors import ConfigError
from schemas.provenance import run_identity

CONFIGS = Path(__file__).parents[2] / "configs"

MINIMAL: dict[str, Any] = {
    "name": "test",
    "teacher": {"model": "a"},
    "student": {"model": "b"},
    "prompts": {"sources": [{"type": "jsonl", "path": "p.jsonl"}]},
}


def error_of(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(MINIMAL | changes)
    return str(error.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    if path.stem.startswith("compare-"):
        assert load_comparison(path)[0].name == path.stem
        return
    config = load_as(RLConfig if path.stem.startswith("rl-") else RunConfig, path)
    assert config.name == path.stem
    assert parse_settings(config.model_dump(mode="json")) == config


def test_paper_configs_have_the_papers_values() -> None:
    for name in ("qwen2.5-math", "openpangu-1b"):
        config = load_config(CONFIGS / f"{name}.yaml")
        assert (config.rounds, config.train.epochs_per_round, config.total_epochs) == (2, 5, 10)
        assert (config.train.kd_weight, config.score.top_k) == (0.9, 10)
        assert (config.filter.min_delta_ifd, config.filter.max_delta_ifd) == (0.0, 0.8)
        assert (config.train.learning_rate, config.train.min_learning_rate) == (1e-5, 1e-6)
        assert (config.train.max_grad_norm, config.pack.max_tokens) == (1.0, 32768)
        assert (config.generate.temperature, config.generate.top_p, config.generate.samples_per_prompt) == (1, 1, 1)
        assert config.generate.engine == "vllm"
        assert config.warmup is not None


def test_defaults_are_the_methods() -> None:
    config = parse_config(MINIMAL)
    assert (config.rounds, config.train.epochs_per_round, config.train.kd_weight) == (2, 5, 0.9)
    assert (config.train.kd_form, config.score.ifd_form, config.score.context) == ("tail", "loss_ratio", "header")
    assert (config.filter.min_delta_ifd, config.filter.max_delta_ifd) == (0.0, 0.8)


@pytest.mark.parametrize(
    ("changes", "key", "nearest"),
    [
        ({"trian": {}}, "trian", "train"),
        ({"train": {"kd_wieght": 1}}, "train.kd_wieght", "kd_weight"),
        ({"generate": {"vllm": {"enforce_eagre": True}}}, "generate.vllm.enforce_eagre", "enforce_eager"),
        ({"learning_rte": 1}, "learning_rte", "warmup.learning_rate"),
        ({"filter": {"max_delta_ifd": {"quantil": 0.9}}}, "filter.max_delta_ifd.quantil", "quantile"),
        (
            {"prompts": {"sources": [{"type": "jsonl", "path": "p", "limt": 3}]}},
            "prompts.sources.0.limt",
            "limit",
        ),
        (
            {"prompts": {"sources": [{"type": "reasoning_gym", "tasks": ["a"], "sizes": 3}]}},
            "prompts.sources.0.sizes",
            "size",
        ),
    ],
)
def test_unknown_key_names_itself_and_the_nearest_known_one(changes: dict[str, Any], key: str, nearest: str) -> None:
    message = error_of(**changes)
    assert f"{key}: unknown key" in message
    assert f"did you mean `{nearest}`?" in message


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"learning_rate": 1e-5}, "learning_rate: unknown key; it belongs elsewhere: `warmup.learning_rate`, `train."),
        ({"train": {"top_k": 5}}, "train.top_k: unknown key; it belongs elsewhere: `score.top_k`. Known here: "),
        ({"dataset": "x"}, "dataset: unknown key; it belongs elsewhere: `prompts.sources.0.dataset`. Known"),
        ({"train": {"lora": {"rank": 4}}}, "train.lora.rank: unknown key; see `train.lora.r`. Known here: alpha"),
        ({"train": {"num_train_epochs": 3}}, "unknown key; see `train.epochs_per_round`."),
        ({"prompts": MINIMAL["prompts"] | {"zzz": "x"}}, "prompts.zzz: unknown key. Known here: held_out"),
    ],
)
def test_an_unknown_key_that_has_another_place_or_name_here(changes: dict[str, Any], hint: str) -> None:
    assert hint in error_of(**changes)


def test_settings_by_the_names_of_other_projects_lead_to_places_there_are() -> None:
    for kind, names in ((RunConfig, CALLED_HERE), (RLConfig, CALLED_HERE_IN_RL)):
        for name, place in names.items():
            assert hint(name, [], kind) == f"see `{place}`."


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"train": None}, "train: should be a section, that is keys with values below it; without any, leave it out"),
        ({"teacher": "a"}, "teacher: should be a section, that is keys with values below it (got 'a')"),
        ({"prompts": {"sources": ["p.jsonl"]}}, "prompts.sources.0: should be a section, that is keys with values"),
        ({"train": {"report_to": "wandb"}}, "train.report_to: should be a list, in brackets or with a dash"),
        ({"filter": {"min_delta_ifd": "None"}}, "(got 'None'; nothing is written `null` in YAML)"),
        ({"name": "my run"}, "name: should be the name of a folder: letters"),
        ({"prompts": {"sources": [{"type": "csv", "path": "p"}]}}, "did you mean `dataset`?"),
        ({"prompts": {"sources": [{"type": "JSON", "path": "p"}]}}, "did you mean `jsonl`?"),
        ({"train": {"kd_weight": 1.5}}, "train.kd_weight"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate"),
        ({"train": {"learning_rate": 1e-6, "min_learning_rate": 1e-5}}, "`min_learning_rate` 1e-05 is above"),
        ({"filter": {"min_delta_ifd": 0.9, "max_delta_ifd": 0.8}}, "nothing could be kept"),
        ({"filter": {"max_delta_ifd": {"quantile": 1.5}}}, "filter.max_delta_ifd"),
        ({"filter": {"min_delta_ifd": {"quantile": 0.9}, "max_delta_ifd": {"quantile": 0.8}}}, "nothing could be kept"),
        ({"score": {"top_k": 0}}, "score.top_k"),
        ({"generate": {"engine": "vlm"}}, "generate.engine"),
        ({"name": "../elsewhere"}, "name"),
        ({"student": {"init": "prune"}}, "needs `keep_layers`"),
        ({"student": {}}, "needs `model`"),
        ({"student": {"init": "prune", "keep_layers": [3, 1]}}, "ascending"),
        ({"student": {"init": "prune", "keep_layers": 0}}, "must keep at least one layer"),
        ({"student": {"model": "b", "keep_layers": 2}}, "`keep_layers` goes with `init: prune`"),
        (
            {"student": {"model": "b", "chat_template_kwargs": {"messages": "x"}}},
            "student.chat_template_kwargs: `messages` is given to every chat template",
        ),
        ({"student": {"model": "b", "chat_template_kwargs": {"bos_token": "x"}}}, "`bos_token` is given to every"),
        ({"student": {"model": "b", "chat_template_kwargs": {"a b": True}}}, "letters, digits and underscores"),
        ({"student": {"model": "b", "chat_template_kwargs": {"x": 0.5}}}, "`x` should be true, false, a whole"),
        ({"student": {"model": "b", "chat_template_kwargs": [1]}}, "student.chat_template_kwargs: "),
        ({"teacher": {"model": "a", "quantization": "int8", "tensor_parallel": 2}}, "cannot be split; set one"),
        ({"prompts": {"sources": []}}, "prompts.sources"),
        ({"prompts": {"sources": [{"path": "p"}]}}, "prompts.sources.0.type: missing"),
        ({"prompts": {"sources": [{"type": "dataset"}]}}, "prompts.sources.0.dataset: missing"),
        ({"prompts": {"sources": [{"type": "dataset", "dataset": ""}]}}, "prompts.sources.0.dataset: String should"),
        ({"prompts": MINIMAL["prompts"] | {"limit": 10, "held_out": 10}}, "leaves nothing to train on"),
        ({"generate": {"max_new_tokens": 100}, "pack": {"max_tokens": 50}}, "would all be dropped"),
        ({"warmup": {"max_new_tokens": 600}, "pack": {"max_tokens": 550}}, "`warmup.max_new_tokens` 600 does not fit"),
        ({"teacher": {}}, "teacher.model: missing"),
        ({"ray": {}}, "ray.actors: missing"),
        ({"ray": {"actors": 2}, "teacher": {"model": "a", "tensor_parallel": 2}}, "set `teacher.device_map: auto`"),
        (
            {"ray": {"actors": 2}, "generate": {"engine": "vllm", "vllm": {"tensor_parallel_size": 4}}},
            "set `ray.gpus_per_actor: 4`",
        ),
        ({"ray": {"actors": 2}, "devices": {"teacher": "cuda:1"}}, "set `devices.teacher: null`"),
        ({"generate": {"engine": "server"}}, "the servers that serve the student's snapshot"),
        ({"score": {"engine": "server"}}, "the servers that serve the teacher"),
        ({"generate": {"engine": "server", "policy": "teacher"}}, "samples from the teacher's servers"),
        ({"generate": {"server": {"urls": ["gpu-1:8000"]}}}, "is like `http://host:8000`"),
        ({"generate": {"server": {"urls": ["http://gpu-1:8000/v1/"]}}}, "ends before `/v1`"),
        ({"generate": {"server": {"urls": ["http://a", "http://a/"]}}}, "names a server twice"),
        ({"generate": {"server": {"api_key_env": "sk-1234"}}}, "generate.server.api_key_env"),
        ({"teacher": {"model": "a", "max_memory": {"cpu": "2GiB"}}}, "`max_memory` goes with `device_map`"),
        ({"teacher": {"model": "a", "device_map": "auto", "max_memory": {0: "70"}}}, "teacher.max_memory.0"),
        ({"teacher": {"model": "a", "device_map": "auto"}, "devices": {"teacher": "cuda:1"}}, "set one of them"),
        ({"refresh_every": 2, "train": {"guard": {"action": "refresh"}}}, "raise `train.epochs_per_round` instead"),
        ({"overlap": True, "train": {"guard": {"action": "refresh"}}}, "set `overlap: false`"),
        *(
            (
                {"student": {"model": "b", "attn_implementation": "flash_attention_2"}, key: {"precision": "fp32"}},
                f"set `{key}.precision: bf16`",
            )
            for key in ("train", "warmup")
        ),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], part: str) -> None:
    assert part in error_of(**changes)


def test_every_problem_is_named_at_once() -> None:
    message = error_of(train={"kd_weight": 2, "epoch": 1}, score={"top_k": -1})
    assert all(key in message for key in ("train.kd_weight", "train.epoch", "score.top_k"))


def test_overrides_reach_sections_lists_and_nulls() -> None:
    values = apply_overrides(
        MINIMAL,
        ["train.kd_weight=0.5", "warmup.epochs=3", "prompts.sources.0.limit=7", "filter.max_delta_ifd={quantile: 0.9}"],
    )
    config = parse_config(values)
    assert config.train.kd_weight == 0.5
    assert config.warmup is not None
    assert config.warmup.epochs == 3
    assert config.prompts.sources[0].model_dump()["limit"] == 7
    assert config.filter.max_delta_ifd is not None
    assert MINIMAL.get("train") is None
    replaced = apply_overrides(MINIMAL, ["prompts.sources.0={type: parquet, path: p.parquet}"])
    assert replaced["prompts"]["sources"] == [{"type": "parquet", "path": "p.parquet"}]


def test_a_mapping_as_an_override_changes_the_keys_it_names_alone() -> None:
    values = apply_overrides(MINIMAL, ["train.kd_weight=0.5", "train.guard.max_policy_kl=0.2", "train.loss_chunk=64"])
    changed = apply_overrides(values, ["train={kd_weight: 0.7, guard: {action: stop}}"])
    assert changed["train"] == {
        "kd_weight": 0.7,
        "loss_chunk": 64,
        "guard": {"max_policy_kl": 0.2, "action": "stop"},
    }
    # What had no such key gets it; null takes a section away.
    assert apply_overrides(values, ["warmup={epochs: 3}"])["warmup"] == {"epochs": 3}
    assert apply_overrides(values, ["train=null", "train={kd_weight: 0.7}"])["train"] == {"kd_weight": 0.7}


@pytest.mark.parametrize(
    "override", ["train.kd_weight", "=3", "name.x=1", "train.=2", "prompts.sources.5.path=a", "a=["]
)
def test_overrides_that_cannot_be_applied(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides(MINIMAL, [override])


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    for text in ("a: [", "- 1\n- 2\n", "\x00"):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"bad.yaml"):
            load_config(path)
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"bad.yaml"):
        load_config(tmp_path / "bad.yaml")


def test_paths_start_at_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"teacher": {"model": "teacher"}}))
    config = load_config(path)
    assert config.teacher.model == str(tmp_path / "teacher")
    assert config.student.model == "b"
    assert config.prompts.sources[0].model_dump()["path"] == str(tmp_path / "p.jsonl")


def test_the_memory_limits_that_the_manual_gives_can_be_written_in_yaml() -> None:
    (example,) = re.findall(r"`(\{.*?\})`", TeacherConfig.model_fields["max_memory"].description or "", re.DOTALL)
    teacher = {"model": "a", "device_map": "auto", "max_memory": parse_document(example, "max_memory")}
    limits = parse_config(MINIMAL | {"teacher": teacher}).teacher.max_memory
    assert limits == {0: "70GiB", 1: "70GiB", "cpu": "200GiB"}


def test_placement_does_not_touch_fingerprints() -> None:
    plain = parse_config(MINIMAL)
    launch = {"processes": 8, "strategy": "fsdp2"}
    spread = {"model": "a", "device_map": "auto", "max_memory": {0: "70GiB", "cpu": "1.5GiB"}, "offload_folder": "o"}
    places = {"name": "other", "root": "/elsewhere", "devices": {"sampler": "cpu"}, "ray": {"actors": 2}}
    moved = parse_config(MINIMAL | places | {"teacher": spread, "train": {"launch": launch}})
    elsewhere = {"server": {"urls": ["http://gpu-1:8000"], "max_in_flight": 8}}
    served = parse_config(MINIMAL | {"generate": elsewhere, "score": elsewhere})
    changed: list[dict[str, Any]] = [{"score": {"top_k": 3}}, {"teacher": {"model": "a", "quantization": "int8"}}]
    # What a stage that ran out of memory is told to lower: it goes on from its finished files.
    smaller = {
        "generate": {"batch_size": 2, "vllm": {"gpu_memory_utilization": 0.5, "max_num_seqs": 4}},
        "score": {"batch_tokens": 512, "logits_chunk": 64},
        "train": {"loss_chunk": 64, "gradient_checkpointing": False},
        "evaluate": {"batch_tokens": 512},
    }
    lower = parse_config(MINIMAL | smaller)
    assert plain.fingerprinted() == moved.fingerprinted() == served.fingerprinted() == lower.fingerprinted()
    assert all(plain.fingerprinted() != parse_config(MINIMAL | change).fingerprinted() for change in changed)
    assert parse_settings(json.loads(moved.model_dump_json())) == moved


def test_where_content_lies_does_not_touch_fingerprints() -> None:
    """The stages that read it hash the content itself."""

    def at(place: str, **row: Any) -> dict[str, Any]:
        sources = [{"type": "jsonl", "path": f"{place}/p.jsonl", **row}, {"type": "dataset", "dataset": f"{place}/d"}]
        models = {"teacher": {"model": f"{place}/t"}, "student": {"model": f"{place}/s", "chat_template": f"{place}/c"}}
        benchmarks = {"evaluate": {"lm_eval": {"tasks": ["a"], "include_path": f"{place}/tasks"}}}
        return parse_config(MINIMAL | models | benchmarks | {"prompts": {"sources": sources}}).fingerprinted()

    assert at("/here") == at("/there")
    assert at("/here") != at("/here", answer="gold")


def test_a_run_is_known_by_the_names_of_its_content_and_not_by_its_place() -> None:
    def made(teacher: str, path: str, **more: Any) -> RunConfig:
        sources = {"sources": [{"type": "jsonl", "path": path}]}
        return parse_config(MINIMAL | {"teacher": {"model": teacher}, "prompts": sources} | more)

    here, there = made("/here/t", "/here/p.jsonl"), made("/there/t", "/there/p.jsonl", root="/elsewhere")
    assert run_identity(here) == run_identity(there)
    others = [made("/here/u", "/here/p.jsonl"), made("org/t", "/here/p.jsonl"), made("/here/t", "/here/q.jsonl")]
    assert len({run_identity(config) for config in [here, *others]}) == 4


@pytest.mark.parametrize(
    ("launch", "others", "problem"),
    [
        ({"machines": 2}, {}, "needs `main_address`"),
        (
            {"machines": 2, "main_address": "a"},
            {"root": "s3://bucket/runs"},
            "a `root` that all machines see as a folder",
        ),
        ({"processes": 2}, {"rounds": 1}, "`on_policy` trains in one process"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(launch: dict[str, Any], others: dict[str, Any], problem: str) -> None:
    train = {"steps_per_round": 3, "on_policy": {}} if "rounds" in others else {}
    assert problem in error_of(train=train | {"launch": launch}, **others)


def test_relative_paths_start_at_the_config_or_else_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "configs", tmp_path / "work"
    for place, names in ((there, ["both"]), (here, ["both", "models/t", "tasks"])):
        for name in names:
            (place / name).mkdir(parents=True)
    for name in ("p.jsonl", "chat.jinja"):
        (here / name).touch()
    (there / "c.yaml").write_text(
        yaml.safe_dump(MINIMAL | {"student": {"model": "both", "chat_template": "chat.jinja"}})
    )
    monkeypatch.chdir(here)
    lm_eval = "evaluate.lm_eval={tasks: [own], include_path: tasks}"
    config = load_config(there / "c.yaml", ["teacher.model=models/t", lm_eval])
    assert config.teacher.model == str(here / "models/t")
    assert config.student.model == str(there / "both")
    assert config.student.chat_template == str(here / "chat.jinja")
    assert config.prompts.sources[0].model_dump()["path"] == str(here / "p.jsonl")
    assert config.evaluate.lm_eval is not None
    assert config.evaluate.lm_eval.include_path == str(here / "tasks")
    # What is nowhere: a name of the Hub, and a file that is missed where it was looked for first.
    config = load_config(there / "c.yaml", ["teacher.model=org/t", "prompts.sources.0.path=q.jsonl"])
    assert config.teacher.model == "org/t"
    assert config.prompts.sources[0].model_dump()["path"] == str(there / "q.jsonl")


def sections(section: type[Section]) -> set[type[Section]]:
    found = {section}
    for child in Section.__subclasses__():
        found |= {child, *child.__subclasses__()}
    return found


def test_every_field_is_documented() -> None:
    for section in sections(RunConfig):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no docstring"
    assert "| `kd_weight` | `0.9` |" in fields_markdown()
