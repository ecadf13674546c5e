"""The manual of the config, written from the models themselves."""

import inspect
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from schemas.config.base import Section, sections_in
from schemas.config.comparison import ComparisonConfig
from schemas.config.rl import RLConfig
from schemas.config.run import RunConfig


def fields_markdown() -> str:
    """Return one Markdown table per config section: field, default, meaning; each section once."""
    seen: set[type[Section]] = set()
    of_run, of_rl, of_comparison = (dict(_walk("", kind, seen)) for kind in (RunConfig, RLConfig, ComparisonConfig))
    rl, compare = "\n### Config of `npd rl`\n\n", "\n### Config of `npd compare`\n\n"
    return _tables(of_run) + rl + _tables(of_rl) + compare + _tables(of_comparison)


def _tables(sections: dict[str, type[Section]]) -> str:
    parts = []
    for path, section in sections.items():
        summary = (inspect.getdoc(section) or "").split("\n\n")[0].replace("\n", " ")
        parts += [f"#### `{path or 'top level'}`", "", summary, "", "| field | default | meaning |", "|---|---|---|"]
        parts += [
            f"| `{name}` | {_default(field)} | {_meaning(field)} |" for name, field in section.model_fields.items()
        ]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _walk(path: str, section: type[Section], seen: set[type[Section]]) -> Iterator[tuple[str, type[Section]]]:
    if section in seen:
        return
    seen.add(section)
    yield path, section
    for name, field in section.model_fields.items():
        below = sections_in(field.annotation)
        for child in below:
            suffix = f"[type: {_tag(child)}]" if _tag(child) else ""
            yield from _walk(f"{path}.{name}{suffix}".lstrip("."), child, seen)


def _tag(section: type[Section]) -> str | None:
    field = section.model_fields.get("type")
    return None if field is None else str(get_args(field.annotation)[0])


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Section):
        return "see below"
    if value is None:
        return "`null`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _meaning(field: FieldInfo) -> str:
    return (field.description or "").replace("\n", " ").replace("|", "\\|")
