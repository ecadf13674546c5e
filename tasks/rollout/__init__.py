"""Sampling responses in bulk: engines, exact seeded sampling, and the shards they fill. Imports no torch."""
