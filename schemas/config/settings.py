"""What every kind of run says first: its name, its place and its seed."""

from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from schemas.config.base import PLACEMENT, Section
from schemas.config.secrets import secret_keys
from schemas.untrusted_text import one_line

FOLDER_NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?$"
"""What a name that becomes a folder's may be."""


class RunSettings(Section):
    """The config of any kind of run."""

    name: str = Field(pattern=FOLDER_NAME, max_length=100, json_schema_extra=PLACEMENT)
    """Folder of the run under `root`. Running the same name again resumes it."""

    root: str = Field(default="runs", min_length=1, json_schema_extra=PLACEMENT)
    """Where runs live: a folder, or any URL that fsspec knows (`s3://bucket/runs`). Credentials come from the
    environment, never from here."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of everything drawn: splits, samples, batch order. The same seed gives the same tables, byte for byte; on a
    GPU only until something is trained there, since attention adds up its gradients in no fixed order."""

    @model_validator(mode="before")
    @classmethod
    def _holds_no_secrets(cls, values: Any) -> Any:
        if keys := secret_keys(values):
            raise ValueError(
                f"`{keys[0]}` holds what looks like a password, a token or a signed URL, which would be written into "
                "every record of the run; leave it out and set it in the environment (HF_TOKEN, AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, WANDB_API_KEY)"
            )
        return values

    @field_validator("root")
    @classmethod
    def _root_is_a_place(cls, root: str) -> str:
        if one_line(root) != root:
            raise ValueError("holds a character that cannot be seen")
        if "://" in root:
            parts = urlsplit(root)
            if parts.query or parts.fragment:
                raise ValueError("a URL with options in it; set them in the environment")
            if {".", ".."} & set(parts.path.split("/")):
                raise ValueError("`.` and `..` mean nothing in a URL")
        return root
