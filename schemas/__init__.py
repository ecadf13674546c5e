"""What the data means: config models, table schemas, manifests, and the one door to a run's files."""
