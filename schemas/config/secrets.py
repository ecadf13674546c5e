"""Secrets that a config must not hold: it is written into run.json, manifests and cards, and shown to whoever looks."""

import re
from typing import Any

_SECRET = re.compile(
    r"""
      ://[^/?\#\s]*@                                                        # a user, and maybe a password, in a URL
    | [?&](?:x-amz-\w+|x-goog-\w+|sig|signature|\w*token|api_?key|key|password|secret)=   # a signed or keyed URL
    | \bhf_[a-z0-9]{20,}                                                    # Hugging Face
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                                         # AWS
    | \b(?:gh[opsur]_[a-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,})     # GitHub, GitLab
    | \bsk-[\w-]{20,}                                                       # OpenAI and others
    | \bAIza[\w-]{35}                                                       # Google
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
    """,
    re.VERBOSE | re.IGNORECASE,
)


def holds_secret(text: str) -> bool:
    """Say whether text looks as if it held a password, token or signature.

    >>> holds_secret("https://me:pass@host/x"), holds_secret("https://host/x@main"), holds_secret("Qwen/Qwen2.5-7B")
    (True, False, False)
    """
    return _SECRET.search(text) is not None


def secret_keys(value: Any, key: str = "") -> list[str]:
    """Return the keys of a config's values that hold a secret; where a key itself does, the key above it."""
    if isinstance(value, str):
        return [key] if holds_secret(value) else []
    found: list[str] = []
    if isinstance(value, dict):
        for name, child in value.items():
            if holds_secret(str(name)):
                found.append(key or "config")
            else:
                found += secret_keys(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            found += secret_keys(child, f"{key}.{index}")
    return found
