"""The stages of Near-Policy Distillation, one room each, in the order of the loop."""

import os

# Before any library is imported: vLLM, TRL and Prefect would tell their makers of every run.
os.environ.setdefault("DO_NOT_TRACK", "1")
