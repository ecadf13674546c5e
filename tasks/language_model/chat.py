"""The tokenizer's own chat template: prompts as tokens, what comes before a reply, what ends it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from schemas.config import TemplateValue
from schemas.errors import ModelError
from schemas.untrusted_text import readable
from tasks.language_model.control_tokens import TokenIds, encode_rendered

Message = dict[str, str]

_IN_TEMPLATE = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
"""What code in a template raises, beside the errors of Jinja."""


def require_chat_template(tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Check that there is a template.

    Raises:
        ModelError: there is none; says where to give one.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{key}: its tokenizer has no chat template; give one with `student.chat_template: PATH.jinja`"
        )


def preset_template(template: str, values: Mapping[str, TemplateValue], key: str) -> str:
    """Return a chat template whose variables have values where whoever renders it gives them none.

    >>> preset_template("{{ enable_thinking }}", {"enable_thinking": False}, "k")
    '{%- if enable_thinking is not defined %}{%- set enable_thinking = false %}{%- endif %}{{ enable_thinking }}'

    Args:
        template: As Jinja.
        values: By the names of variables.
        key: The setting they come from, for errors.

    Raises:
        ModelError: the template reads no such variable.
    """
    for name in values:
        if re.search(rf"\b{name}\b", template) is None:
            raise ModelError(f"{key}: the chat template reads no `{name}`, so this would change nothing; remove it")
    presets = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}{{%- endif %}}"
        for name, value in values.items()
    )
    # Jinja drops the first newline after a block.
    return "".join(presets) + ("\n" if template.startswith("\n") else "") + template


def encode_prompts(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]]) -> list[TokenIds]:
    """Return each conversation as token ids (int32), ending where the reply begins.

    Control tokens are those that the template writes; their strings in a message are plain text.

    Raises:
        ModelError: the template fails.
    """

    def render(plain: list[list[Message]]) -> list[str]:
        return _rendered(tokenizer, plain, add_generation_prompt=True)

    return encode_rendered(tokenizer, conversations, render)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]], *, add_generation_prompt: bool
) -> list[str]:
    """Return what the template makes of conversations.

    Raises:
        ModelError: it fails, or refuses one; says what it says.
    """
    try:
        texts: Any = tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, *_IN_TEMPLATE) as error:
        roles = ", ".join(sorted({message["role"] for messages in conversations for message in messages}))
        raise ModelError(
            f"the chat template fails at prompts of the roles {roles}: {readable(str(error))}; leave what it does not "
            "take out of the prompts, or give another with `student.chat_template: PATH.jinja`"
        ) from error
    return list(texts)


def reply_header(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Return what the template puts directly before a reply, as token ids (int32).

    For ChatML: ``<|im_start|>assistant\\n``.

    Raises:
        ModelError: the template puts nothing there, or fails.
    """
    conversation = [{"role": "user", "content": "x"}]
    (opened,), (closed,) = (_rendered(tokenizer, [conversation], add_generation_prompt=add) for add in (True, False))
    header = opened.removeprefix(closed) if opened.startswith(closed) else ""
    if not header:
        raise ModelError(
            "score.context: the chat template puts nothing before a reply, so there is no header to score after; "
            "set `score.context: bos`"
        )
    return np.asarray(tokenizer(header, add_special_tokens=False)["input_ids"], dtype=np.int32)


def end_ids(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> list[int]:
    """Return the token ids that end a reply: the tokenizer's EOS first, then those of the generation config.

    Raises:
        ModelError: neither names one.
    """
    path = Path(folder) / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    candidates = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    ids = list(dict.fromkeys(int(token) for token in candidates if token is not None))
    if not ids:
        raise ModelError(f"{folder}: neither the tokenizer nor generation_config.json names an EOS token")
    return ids
