"""What the README claims, as commands: python -m benchmarks.NAME [--quick] [--json FILE]."""
