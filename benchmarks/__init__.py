"""Benchmarks, one command each: `python -m benchmarks.NAME --help`. BENCHMARKS.md holds the last honest results.

A benchmark is a module with `measure(arguments)`, which returns the rows of its result and notes on them, and
`parser()`; its last lines hand both to `benchmarks.report.main`. What it needs:

- `benchmarks.measure`: run sides alternately (`alternate`, or `alternate_in_children` where peak memory on a CPU
  matters), then ratios pair by pair (`ratios`), each result a `Measurement` beside its `Bar`.
- `benchmarks.random_models`: models of a given shape with random weights and a real tokenizer.
- `benchmarks.random_packs`: packs of given lengths with random tokens and targets.
- `benchmarks.runs`: a run in a folder of its own, its stages finished for real.
"""
