"""Side-by-side benchmarks: variants measured in turn in one run, and the ratios between them.

A benchmark is a module with ``run(overrides) -> BenchReport``; ``mllm bench`` finds it by its name
in :data:`mllm.cli.BENCHMARKS`.
"""

from mllm.bench.measure import interleave, median_ratio
from mllm.bench.options import parse_options
from mllm.bench.report import BenchReport

__all__ = ["BenchReport", "interleave", "median_ratio", "parse_options"]
