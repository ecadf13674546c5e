"""Looking at a run from outside: does everything in it hold together, where does a sample come from, what differs.

What a stage computed (schedules, orders of packs, means, reasons, versions) is computed here by other code on purpose:
a fault of the stage's own would hide itself. Only ids, seeds and the graph of the stages are taken from there.
"""
