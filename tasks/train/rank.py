"""The command of each process that trains, `accelerate launch ... -m tasks.train.rank`; see `rank_process`."""

from tasks.quick_exit import QuickExit

if __name__ == "__main__":
    # First: what libraries want done at exit, they say when they are imported.
    leaving = QuickExit()

    from tasks.train.rank_process import main

    leaving.code = main()
