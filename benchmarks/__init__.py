"""Figures, never timed tests: `python -m benchmarks` measures Scrip on this machine. docs/performance.md."""
