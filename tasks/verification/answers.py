"""Finds the answer in a response, and says what an answer of a prompt can be checked with."""

import json
import re
from typing import Any, Literal

Verifier = Literal["math", "exact"]
"""How answers of rows are checked; procedural tasks bring their own verifiers."""

LONGEST_TEXT = 200
"""Characters of the longest plain text that the `math` verifier compares as it stands; a longer one is prose."""

_OPEN, _CLOSE = "<answer>", "</answer>"
_WORD = re.compile(r"[^\W\d_]{2,}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_MATHS = re.compile(r"(sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|mod|frac|abs|max|min|gcd|lcm|deg)", re.IGNORECASE)


def marked_answer(response: str) -> str | None:
    """Return the text after the last `####`, else what the last `<answer>...</answer>` encloses; None without either.

    >>> marked_answer("6 x 7 = 42\\n#### 42"), marked_answer("<answer> blue </answer>."), marked_answer("42")
    ('42', 'blue', None)
    """
    _, mark, after = response.rpartition("####")
    if mark:
        return after.strip()
    end = response.rfind(_CLOSE)
    start = response.rfind(_OPEN, 0, end) if end >= 0 else -1
    return response[start + len(_OPEN) : end].strip() if start >= 0 else None


def final_answer(response: str, reference: str = "") -> str:
    """Return what a response gives as its answer: its marked answer, else its last lines that are not empty.

    As many lines are taken as ``reference`` has, one at least.

    >>> final_answer("Let me think.\\n\\nIt is 42 \\n"), final_answer("Here:\\n1 2\\n3 4", "5 6\\n7 8")
    ('It is 42', '1 2\\n3 4')
    """
    marked = marked_answer(response)
    if marked is not None:
        return marked
    lines = [line for line in response.splitlines() if line.strip()]
    wanted = max(1, sum(1 for line in reference.splitlines() if line.strip()))
    return "\n".join(lines[-wanted:]).strip()


def is_text(answer: str) -> bool:
    """Say whether an answer has words, so that reading it as a product of letters would be wrong.

    >>> [is_text(answer) for answer in ("42", "x^2 + 1", r"\\\\frac{1}{2}", "2 sin x", "Paris", "42 apples")]
    [False, False, False, False, True, True]
    """
    return any(not _MATHS.fullmatch(word) for word in _WORD.findall(_COMMAND.sub(" ", answer)))


def verification_of_row(answer: str | None, verifier: Verifier | None) -> str | None:
    """Return the `verification` of a prompt with ``answer``; None if there is nothing to check against.

    >>> verification_of_row("42", "exact"), verification_of_row(" ", "exact")
    ('{"type": "exact"}', None)
    """
    if answer is None or verifier is None or not final_answer(answer, answer):
        return None
    return json.dumps({"type": verifier})


def verification_of_task(task: str, options: dict[str, Any], entry: dict[str, Any]) -> str:
    """Return the `verification` of a procedural prompt.

    Args:
        task: Its name in reasoning-gym.
        options: What the task was made with; some verifiers follow them.
        entry: `question`, `answer` and `metadata`, as the task made them.
    """
    return json.dumps({"type": "reasoning_gym", "task": task, "options": options, "entry": entry})
