import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
)

from benchmarks.random_models import CHAT_TEMPLATE
from schemas.config import RunConfig
from schemas.errors import ConfigError, ModelError, PromptError, TokenizerMismatchError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tasks.graph import MODELS
from tasks.language_model.chat import encode_prompts, end_ids, preset_template, reply_header
from tasks.language_model.loading import load_model
from tasks.language_model.sources import policy_model, teacher_model
from tasks.models import source_fingerprints
from tasks.models.prune import layers_to_keep
from tasks.stage import execute
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table
from tests.tiny_models import make_model, make_tokenizer, save_model

SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def resolve(
    tmp_path: Path, teacher: Path | str, student: dict[str, Any], **sections: Any
) -> tuple[RunStore, RunConfig]:
    config = make_config(tmp_path, teacher={"model": str(teacher)}, student=student, **sections)
    store = make_store(tmp_path, config)
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table({"what is one": "train", "b": "held_out"})])
    execute(store, config, MODELS)
    return store, config


def test_pretrained_student_is_copied_as_it_is(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = resolve(tmp_path, teacher_dir, {"model": str(student_dir)})
    policy, teacher = policy_model(store, config, 0), teacher_model(store, config)
    written, given = (load_file(Path(folder) / "model.safetensors") for folder in (policy.path, student_dir))
    assert all(torch.equal(written[name], given[name]) for name in given)
    assert teacher.path == str(teacher_dir)
    assert (policy.step, policy.context, policy.shared_vocab) == (0, 512, 259)
    assert not store.path(MODELS, "teacher").exists()


def test_pruned_student_keeps_the_chosen_layers_of_the_teacher(tmp_path: Path, teacher_dir: Path) -> None:
    store, config = resolve(tmp_path, teacher_dir, {"init": "prune", "keep_layers": [0, 3]})
    student = load_model(policy_model(store, config, 0).path)
    teacher = load_model(teacher_dir)
    kept, whole = student.state_dict(), teacher.state_dict()
    for position, layer in enumerate([0, 3]):
        name = "self_attn.q_proj.weight"
        assert torch.equal(kept[f"model.layers.{position}.{name}"], whole[f"model.layers.{layer}.{name}"])
    assert student.config.num_hidden_layers == 2
    ids = torch.tensor([[5, 6, 7]])
    assert torch.isfinite(student(input_ids=ids).logits).all()
    assert student.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)  # type: ignore[operator]


def test_a_pruned_student_keeps_what_its_config_says_of_each_layer(tmp_path: Path) -> None:
    """Layer 3 alone has no rotary embedding; in the student it is the second."""
    torch.manual_seed(5)
    teacher = SmolLM3ForCausalLM(SmolLM3Config(**SHAPE, no_rope_layers=[1, 1, 1, 0, 1, 1])).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    store, config = resolve(tmp_path, tmp_path / "teacher", {"init": "prune", "keep_layers": [0, 3, 5]})
    student = load_model(policy_model(store, config, 0).path, device="cpu")
    assert student.config.no_rope_layers == [1, 0, 1]
    ids = torch.arange(3, 20)[None]
    teacher.model.layers = torch.nn.ModuleList([teacher.model.layers[index] for index in (0, 3, 5)])
    teacher.config.num_hidden_layers = 3
    with torch.no_grad():
        expected, found = (model(input_ids=ids, use_cache=False).logits for model in (teacher, student))
    torch.testing.assert_close(found, expected)


def test_a_student_whose_layers_go_by_their_numbers_is_not_pruned(tmp_path: Path) -> None:
    """Layers 0 and 5 are dense, the others mixtures of experts: what was the last is loaded as such a mixture."""
    torch.manual_seed(5)
    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0, 5],
    }
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts)).save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    with pytest.raises(ModelError, match=r"student\.init: Qwen3MoeForCausalLM without some of its layers"):
        resolve(tmp_path, tmp_path / "teacher", {"init": "prune", "keep_layers": [0, 3, 5]})


@pytest.mark.parametrize(("keep", "layers", "expected"), [(1, 5, [0]), (2, 5, [0, 4]), (5, 5, [0, 1, 2, 3, 4])])
def test_layers_are_spread_evenly(keep: int, layers: int, expected: list[int]) -> None:
    assert layers_to_keep(keep, layers) == expected


@pytest.mark.parametrize("keep", [9, [0, 4]])
def test_more_layers_than_there_are(tmp_path: Path, teacher_dir: Path, keep: int | list[int]) -> None:
    with pytest.raises(ModelError, match=r"student.keep_layers: .*4"):
        resolve(tmp_path, teacher_dir, {"init": "prune", "keep_layers": keep})


def test_other_tokenizer_names_the_first_differing_token(tmp_path: Path, teacher_dir: Path) -> None:
    other = save_model(tmp_path / "other", make_model(seed=3), make_tokenizer(swap=True))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    with pytest.raises(TokenizerMismatchError) as error:
        resolve(tmp_path, teacher_dir, {"model": str(other)})
    assert "id 43" in str(error.value)
    assert repr(alphabet[40]) in str(error.value)
    assert repr(alphabet[41]) in str(error.value)


def test_tokens_only_one_model_has_are_a_mismatch(tmp_path: Path, teacher_dir: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    other = save_model(tmp_path / "other", make_model(seed=3, vocab_size=264), tokenizer)
    with pytest.raises(TokenizerMismatchError, match=r"id 259: teacher has None, student has '<extra>'"):
        resolve(tmp_path, teacher_dir, {"model": str(other)})


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "[]", "its .* cannot be loaded"),
        ("config.json", '{"model_type": "llama", "max_position_embeddings": null}', "its .* cannot be loaded"),
        ("tokenizer.json", "{}", "its tokenizer cannot be loaded"),
        ("tokenizer_config.json", "[]", "its tokenizer cannot be loaded"),
        (
            "chat_template.jinja",
            "{{ raise_exception('no users') }}",
            "the chat template fails .* user: no users; leave",
        ),
        ("chat_template.jinja", "{{ ''.__class__.__mro__ }}", "the chat template fails .*unsafe"),
    ],
)
def test_what_is_wrong_with_a_models_files_is_told(
    tmp_path: Path, teacher_dir: Path, file: str, text: str, words: str
) -> None:
    folder = save_model(tmp_path / "wrong", make_model(seed=2, layers=2))
    (folder / file).write_text(text)
    with pytest.raises(ModelError, match=words if file.endswith("jinja") else f"wrong: {words}"):
        resolve(tmp_path, teacher_dir, {"model": str(folder)})


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ({"sampler": "gpu"}, r"devices\.sampler: `gpu` is no torch device"),
        ({"trainer": "cuda:99"}, r"devices\.trainer: `cuda:99` is not here"),
    ],
)
def test_a_device_of_a_later_stage_is_looked_for_first(tmp_path: Path, devices: dict[str, str], message: str) -> None:
    # Neither is there such a teacher, nor a Hub that could be asked.
    with pytest.raises(ModelError, match=message):
        resolve(tmp_path, "teacher", {"model": "student"}, devices=devices)


def test_no_chat_template_and_a_given_one(tmp_path: Path, teacher_dir: Path) -> None:
    bare = save_model(tmp_path / "bare", make_model(seed=3), make_tokenizer(chat_template=None))
    with pytest.raises(ModelError, match=r"no chat template.*student.chat_template"):
        resolve(tmp_path / "a", bare, {"model": str(bare)})
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}{% if add_generation_prompt %}>>{% endif %}")
    store, config = resolve(tmp_path / "b", teacher_dir, {"model": str(bare), "chat_template": str(template)})
    tokenizer = AutoTokenizer.from_pretrained(policy_model(store, config, 0).path)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "hi>>"

    store, config = resolve(tmp_path / "c", teacher_dir, {"model": str(bare)})
    assert AutoTokenizer.from_pretrained(policy_model(store, config, 0).path).chat_template == CHAT_TEMPLATE
    assert "it takes the teacher's" in store.finished(MODELS).counters["warnings"][0]


NO_THOUGHT = "<think>\n\n</think>\n\n"
ASKING = (
    f"{CHAT_TEMPLATE}{{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}}"
    f"{NO_THOUGHT}{{% endif %}}"
)
"""Opens a reply without a thought as the template of Qwen3 does."""

HI = [{"role": "user", "content": "hi"}]


def test_variables_of_the_chat_template_hold_for_prompts_and_for_whoever_loads_the_student(
    tmp_path: Path, teacher_dir: Path
) -> None:
    asking = make_tokenizer(chat_template=ASKING)
    thinking = save_model(tmp_path / "thinking", make_model(seed=3), asking)
    student = {"model": str(thinking), "chat_template_kwargs": {"enable_thinking": False}}
    store, config = resolve(tmp_path, teacher_dir, student)
    tokenizer = AutoTokenizer.from_pretrained(policy_model(store, config, 0).path)
    header = f"<|im_start|>assistant\n{NO_THOUGHT}"
    (prompt,) = encode_prompts(tokenizer, [HI])
    assert tokenizer.decode(prompt) == f"<|im_start|>user\nhi<|im_end|>\n{header}"
    assert tokenizer.decode(reply_header(tokenizer)) == header
    thinks = tokenizer.apply_chat_template(HI, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert thinks == asking.apply_chat_template(HI, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ x }}",
        "\n{% if true %}{{ x }}{% endif %}",
        "{% for message in messages %}{{ x }}{% endfor %}",
        "{% macro say() %}{{ x }}{% endmacro %}{{ say() }}",
        "{%- if x is not defined %}{%- set x = 'other' %}{%- endif %}{{ x }}",
        "{% macro say() %}{% if x is not defined %}{% set x = 'other' %}{% endif %}{{ x }}{% endmacro %}{{ say() }}",
    ],
)
@pytest.mark.parametrize("value", [True, 3, "26 Jul 2024", "a 'b' \"c\" \\ %} }} \n é 🙂", ""])
def test_a_variable_has_its_value_wherever_a_template_reads_it(template: str, value: bool | int | str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    expected = tokenizer.apply_chat_template(HI, tokenize=False, x=value)
    tokenizer.chat_template = preset_template(template, {"x": value}, "k")
    assert tokenizer.apply_chat_template(HI, tokenize=False) == expected


def test_a_variable_that_the_chat_template_does_not_read_is_named(tmp_path: Path, teacher_dir: Path) -> None:
    student = {"model": str(teacher_dir), "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(ModelError, match=r"student\.chat_template_kwargs: .* reads no `enable_thinking`"):
        resolve(tmp_path, teacher_dir, student)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_template_that_asks_for_the_date_is_told_of(tmp_path: Path, teacher_dir: Path, fixed: bool) -> None:
    template = tmp_path / "dated.jinja"
    dated = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    template.write_text(dated + "{{ date_string }}" + CHAT_TEMPLATE, encoding="utf-8")
    student: dict[str, Any] = {"model": str(teacher_dir), "chat_template": str(template)}
    if fixed:
        student["chat_template_kwargs"] = {"date_string": "26 Jul 2024"}
    store, _ = resolve(tmp_path, teacher_dir, student)
    warnings = store.finished(MODELS).counters.get("warnings", [])
    assert ["today's date" in warning for warning in warnings] == ([] if fixed else [True])


def test_student_takes_the_teachers_end_of_reply(tmp_path: Path, teacher_dir: Path) -> None:
    """A base model ends texts with another token than the instruct model that teaches it."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    base = save_model(tmp_path / "base", make_model(seed=3), tokenizer)
    store, config = resolve(tmp_path, teacher_dir, {"model": str(base)})
    folder = policy_model(store, config, 0).path
    written = AutoTokenizer.from_pretrained(folder)
    assert written.eos_token == "<|im_end|>"
    assert end_ids(written, folder)[0] == 2
    assert json.loads((Path(folder) / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_prompt_longer_than_the_context_is_found_before_weights_load(tmp_path: Path, teacher_dir: Path) -> None:
    short = save_model(tmp_path / "short", make_model(seed=3, context=24))
    (short / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(PromptError, match=r"test: row 0: the prompt has 30 tokens.* context of 24 tokens"):
        resolve(tmp_path, teacher_dir, {"model": str(short)})
    assert not store_exists(tmp_path)


def store_exists(tmp_path: Path) -> bool:
    return (tmp_path / "test" / "models" / "manifest.json").exists()


def test_damaged_weights_are_a_model_error(tmp_path: Path, teacher_dir: Path) -> None:
    damaged = save_model(tmp_path / "damaged", make_model(seed=3))
    (damaged / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match="damaged"):
        resolve(tmp_path, teacher_dir, {"model": str(damaged)})
    assert not store_exists(tmp_path)


def test_a_model_that_continues_no_text_is_found_before_weights_load(tmp_path: Path, teacher_dir: Path) -> None:
    other = save_model(tmp_path / "other", make_model(seed=3))
    T5Config(d_model=8, vocab_size=259).save_pretrained(other)
    (other / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(
        ModelError, match=r"student\.model: `transformers` .* no decoder-only language model of type `t5`"
    ):
        resolve(tmp_path, teacher_dir, {"model": str(other)})
    assert not store_exists(tmp_path)


@pytest.mark.parametrize("text", [None, b"\xff\xfe{"])
def test_a_chat_template_that_cannot_be_read_is_named_before_anything_runs(
    tmp_path: Path, teacher_dir: Path, text: bytes | None
) -> None:
    template = tmp_path / "chat.jinja"
    if text is not None:
        template.write_bytes(text)
    config = make_config(
        tmp_path,
        teacher={"model": str(teacher_dir)},
        student={"model": str(teacher_dir), "chat_template": str(template)},
    )
    with pytest.raises(ModelError, match=r"student\.chat_template: .*chat\.jinja: cannot be read"):
        source_fingerprints(config)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_porj"], r"target_modules: a LlamaForCausalLM has no `v_porj`; its linear layers are .*v_proj"),
        ("nothing.*", "target_modules: "),
        ("all-linear", None),
        (["q_proj", "self_attn.v_proj"], None),
    ],
)
def test_adapters_that_no_module_takes_are_told_of_before_any_training(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, targets: str | list[str], message: str | None
) -> None:
    student, train = {"model": str(student_dir)}, {"lora": {"target_modules": targets}}
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        resolve(tmp_path, teacher_dir, student, train=train)
