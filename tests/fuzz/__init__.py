"""Readers of what comes from outside, on damaged and hostile inputs.

Every input must give a result or one of the project's own errors: never another exception, a crash, a hang, gigabytes
of memory, or files left behind. Inputs are the same in every run; ``NPD_FUZZ=20`` tries twenty times as many, others
each time.
"""
