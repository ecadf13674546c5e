"""What every config section shares: strictness, docstrings as descriptions, and what a stage's fingerprint reads."""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

PLACEMENT: dict[str, Any] = {"fingerprint": False}
"""``json_schema_extra`` of fields that say where or how visibly work runs, not what comes out of it: changing one
does not re-run a stage."""

SOURCE: dict[str, Any] = {"fingerprint": "content"}
"""``json_schema_extra`` of fields that say where content lies: ``source_fingerprints`` of the stage that reads it
stand for the content, so that moving it does not re-run a stage."""


class Section(BaseModel):
    """A strict config section: unknown keys are errors, and the docstring under a field is its description."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        # A value that is wrong may be a secret in the wrong place.
        hide_input_in_errors=True,
    )

    def fingerprinted(self) -> dict[str, Any]:
        """Return the section as JSON values, without the fields that cannot change what a stage writes."""
        return self._values(sources=False)

    def identified(self) -> dict[str, Any]:
        """Return the section as ``fingerprinted``, and what content it names: of absolute paths only the last part."""
        return self._values(sources=True)

    def _values(self, *, sources: bool) -> dict[str, Any]:
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            kind = _kind(field)
            if kind is False or (kind == "content" and not sources):
                values.pop(name, None)
            elif kind == "content":
                values[name] = _placeless(values[name])
            else:
                values[name] = _section_values(getattr(self, name), values[name], sources)
        return values


def sections_in(annotation: Any) -> list[type[Section]]:
    """Return the sections that a field with this annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated, list, dict):
        return [section for argument in get_args(annotation) for section in sections_in(argument)]
    return []


def _section_values(value: Any, dumped: Any, sources: bool) -> Any:
    """Return a field's value as JSON, sections in it by ``_values``; ``dumped``: what a value without sections is."""
    if isinstance(value, Section):
        return value._values(sources=sources)
    if isinstance(value, list):
        return [_section_values(*pair, sources) for pair in zip(value, dumped, strict=True)]
    return dumped


def _placeless(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _kind(field: FieldInfo) -> Any:
    extra = field.json_schema_extra
    return extra.get("fingerprint") if isinstance(extra, dict) else None
