"""Run from the root of the repository, as python3 -m benchmarks.<name>."""
