import gc

import pytest

from tasks.collector import collector_paused


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
