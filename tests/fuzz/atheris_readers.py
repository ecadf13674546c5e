"""Coverage-guided fuzzing of the readers that are Python, by hand: pytest does not run it.

`pip install atheris`, then `python -m tests.fuzz.atheris_readers READER -max_total_time=60`, where READER is
`config`, `run.json`, `manifest` or `jsonl`. It stops at the first exception that is none of the project's own, and
prints the bytes.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["yaml", "schemas", "tasks.prompts"]):
    from schemas.errors import NPDError
    from tests.fuzz.test_fuzz_config import read_file
    from tests.fuzz.test_fuzz_manifests import read_manifest, read_run
    from tests.fuzz.test_fuzz_prompts import read_jsonl

READERS = {"config": read_file, "run.json": read_run, "manifest": read_manifest, "jsonl": read_jsonl}


def main() -> None:
    read = READERS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as name:

        def try_one(data: bytes) -> None:
            try:
                read(data, Path(name))
            except NPDError:
                return

        atheris.Setup(sys.argv, try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
