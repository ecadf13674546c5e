import subprocess
import sys

PROGRAM = """
from tasks.quick_exit import QuickExit
leaving = QuickExit()
import atexit, ctypes
class Library:
    def __del__(self):
        print("taken apart", flush=True)
library = Library()
atexit.register(lambda: print("at exit"))
ctypes.CDLL(None).puts(b"from C")
print("said")
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_what_is_to_be_done_at_exit_is_done_and_nothing_is_taken_apart() -> None:
    done = run(PROGRAM + "leaving.code = 3")
    assert (done.returncode, done.stderr) == (3, "")
    assert sorted(done.stdout.splitlines()) == ["at exit", "from C", "said"]


def test_an_error_that_nobody_caught_is_shown_and_is_exit_code_1() -> None:
    failed = run(PROGRAM + "raise SystemError('why')")
    assert failed.returncode == 1
    assert "SystemError: why" in failed.stderr
    assert "at exit" in failed.stdout
