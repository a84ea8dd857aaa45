"""The numbers of the README, as commands: python -m benchmarks.NAME [--quick] [--json FILE]."""
