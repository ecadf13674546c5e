"""Looking at a run from outside: does everything in it hold together, where does a sample come from, what differs."""
