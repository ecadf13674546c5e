"""Says whether a response is right: by comparison, by `math-verify`, or by the verifier of a procedural task.

Responses are untrusted: what parses or runs anything of them does it in processes of its own, with limits.
"""

from tasks.verification.answers import final_answer
from tasks.verification.scores import verify

__all__ = ["final_answer", "verify"]
