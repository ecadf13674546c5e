"""A program of its own: scores responses with code that would run what they say, in a process that can be lost.

The verifiers of reasoning-gym call ``eval`` on answers, and on what a prompts table says of its prompts, and sympy's
parsers do too. So this process takes only literals, arithmetic and plain formulas (``_guarded``), refuses to write, to
connect and to start programs once it works (``_refuse``), and has limits of processor time and memory. It is started by
path, with a fixed PYTHONHASHSEED and without the environment's secrets, by ``tasks.verification.processes``; it imports
nothing of this project.

Argument: `math` or `reasoning_gym`. Input and output: JSON lines. First comes ``{"ready": true}``; then for every
request one ``{"score"}``, a number in [0, 1], or null where the prompt has nothing to check against.
"""

import ast
import functools
import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CPU_SECONDS = 2
"""Processor time of one response, after which it is wrong. Not wall-clock: a verdict must not follow the machine's
load."""

KILL_SECONDS = 1
"""Processor time beyond CPU_SECONDS after which the system ends the process: code in C does not hear the alarm."""

MEMORY_BYTES = 4 << 30
"""Address space of the process."""

_FORMULA = re.compile(r"[\w\s+\-*/^%().,=<>!|]*")
_NAME = re.compile(r"[^\W\d]\w*")
_KNOWN_NAME = re.compile(
    r"[^\W\d]|a?(sin|cos|tan)h?|cot|sec|csc|log|ln|exp|sqrt|pi|[Aa]bs|Rational|Integer|Float|Symbol|oo|and|or|not"
)
_EVALUATING = (
    "algorithmic.string_insertion",
    "algorithmic.spiral_matrix",
    "algorithmic.binary_matrix",
    "algorithmic.number_sorting",
    "games.n_queens",
)
_CALCULATING = "arithmetic.bitwise_arithmetic"
_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Constant)
_PARSING = ("games.puzzle24", "games.countdown")

_FORBIDDEN = re.compile(
    r"(subprocess|socket|shutil|ctypes|pty|webbrowser|urllib|http|ftplib|smtplib)\.|"
    r"os\.(system|exec|fork|posix_spawn|spawn|startfile|kill|remove|rename|rmdir|mkdir|link|symlink|truncate|chmod|chown|"
    r"putenv|chdir)"
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class TimeLimit(Exception):
    """The response took more than its processor time."""


def main(kind: str) -> None:
    """Answer the requests on stdin until it ends."""
    lines, sys.stdout = sys.stdout, sys.stderr
    score = {"math": _load_math, "reasoning_gym": _load_reasoning_gym}[kind]()
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, _out_of_time)
    sys.addaudithook(_refuse)
    _answer(lines, {"ready": True})
    for line in sys.stdin:
        try:
            with _limited():
                value = score(json.loads(line, object_hook=_untagged))
        except Exception:
            # Whatever a verifier cannot digest is no right answer.
            value = 0.0
        _answer(lines, {"score": None if value is None else min(1.0, max(0.0, float(value)))})


def _untagged(value: dict[str, Any]) -> Any:
    """Undo ``tagged`` of ``tasks/prompts/procedural.py``: tuples, and dicts whose keys are no texts."""
    if value.keys() == {"__tuple__"}:
        return tuple(value["__tuple__"])
    if value.keys() == {"__pairs__"}:
        return dict(value["__pairs__"])
    return value


def _answer(lines: Any, answer: dict[str, Any]) -> None:
    lines.write(json.dumps(answer) + "\n")
    lines.flush()


@contextmanager
def _limited() -> Iterator[None]:
    used, (_, hard) = int(time.process_time()), resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (used + 1 + CPU_SECONDS + KILL_SECONDS, hard))
    # Again and again, since a verifier may swallow what the alarm raises.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _out_of_time(number: int, frame: Any) -> None:
    raise TimeLimit


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if _FORBIDDEN.match(event) or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING):
        raise PermissionError(f"a verifier may not do this: {event}")


def _arithmetic(text: str) -> Any:
    """Evaluate numbers and operations on them, nothing else."""
    tree = ast.parse(text, mode="eval")
    if not all(isinstance(node, _ARITHMETIC) for node in ast.walk(tree)):
        raise ValueError("not arithmetic")
    return eval(compile(tree, "arithmetic", "eval"))


def _guarded(parse: Callable[..., Any]) -> Callable[..., Any]:
    """Return sympy's parser for plain formulas only: names of one letter and of functions, no attributes, no texts."""

    @functools.wraps(parse)
    def parse_formula(text: str, *arguments: Any, **options: Any) -> Any:
        if not _FORMULA.fullmatch(text) or "__" in text or re.search(r"\.\s*[^\W\d]", text):
            raise ValueError("not a plain formula")
        if not all(_KNOWN_NAME.fullmatch(name) for name in _NAME.findall(text)):
            raise ValueError("not a plain formula: an unknown name")
        return parse(text, *arguments, **options)

    return parse_formula


def _load_math() -> Callable[[dict[str, Any]], float | None]:
    """Return the scorer of ``{"reference", "reference_is_text", "response", "marked"}``."""
    import logging

    import math_verify
    import math_verify.parser
    import sympy.parsing.sympy_parser

    logging.disable(logging.CRITICAL)
    math_verify.parser.parse_expr = _guarded(sympy.parsing.sympy_parser.parse_expr)

    def expressions(text: str, whole: bool) -> list[Any]:
        marked = whole and "\\boxed" not in text and "$" not in text
        parsed: list[Any] = math_verify.parse(f"\\boxed{{{text}}}" if marked else text, parsing_timeout=None)
        return parsed

    references = functools.lru_cache(maxsize=4096)(expressions)

    def score(request: dict[str, Any]) -> float | None:
        reference = references(request["reference"], not request["reference_is_text"])
        if not reference:
            return None
        response = expressions(request["response"], request["marked"])
        return float(math_verify.verify(reference, response, timeout_seconds=None))

    # The first use builds tables, which no response should pay for.
    score({"reference": "1/2", "reference_is_text": False, "response": "so $x = \\frac{1}{2}$", "marked": False})
    return score


def _load_reasoning_gym() -> Callable[[dict[str, Any]], float]:
    """Return the scorer of ``{"task", "options", "entry", "answer"}``."""
    import reasoning_gym
    import sympy
    import sympy.parsing.sympy_parser

    for name in _EVALUATING:
        importlib.import_module(f"reasoning_gym.{name}").__dict__["eval"] = ast.literal_eval
    importlib.import_module(f"reasoning_gym.{_CALCULATING}").__dict__["eval"] = _arithmetic
    guarded = _guarded(sympy.parsing.sympy_parser.parse_expr)
    sympy.parse_expr = guarded
    for name in _PARSING:
        importlib.import_module(f"reasoning_gym.{name}").__dict__["parse_expr"] = guarded

    @functools.lru_cache(maxsize=256)
    def verifier(task: str, options: str) -> Callable[[str, dict[str, Any]], float]:
        score: Callable[[str, dict[str, Any]], float]
        score = reasoning_gym.create_dataset(task, **json.loads(options)).score_answer
        return score

    def score(request: dict[str, Any]) -> float:
        return verifier(request["task"], json.dumps(request["options"]))(request["answer"], request["entry"])

    return score


if __name__ == "__main__":
    main(sys.argv[1])
