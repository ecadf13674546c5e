import gc
import subprocess
import sys
import weakref

import pytest

from tasks.collector import collector_paused, free_memory


def test_the_collector_is_off_inside_and_on_again_after_whatever_happens() -> None:
    def importing() -> None:
        with collector_paused():
            assert not gc.isenabled()
            raise ImportError

    with pytest.raises(ImportError):
        importing()
    assert gc.isenabled()


def test_one_pause_within_another_does_not_end_it() -> None:
    with collector_paused():
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_nothing_refers_to_any_more_is_gone() -> None:
    class Module:
        pass

    first, second = Module(), Module()
    first.__dict__["child"], second.__dict__["parent"] = second, first
    alive = weakref.ref(first)
    with collector_paused():
        del first, second
        assert alive() is not None
        free_memory()
        assert alive() is None


def test_giving_memory_back_imports_nothing_heavy() -> None:
    code = "import sys, tasks.collector; tasks.collector.free_memory(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
