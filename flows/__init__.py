"""What runs, in order: Prefect flows and the command line. No numerics, no file formats."""
