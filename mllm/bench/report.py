"""What a benchmark found: raw repeats, ratios with their goals, as a table and as JSON."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mllm.bench.measure import median_ratio
from mllm.versions import hardware, library_versions
from vision_moe import atomic_write_text


@dataclass(frozen=True)
class Ratio:
    """A measured ratio, and what it should be."""

    value: float
    bound: Literal["<=", ">="] | None = None
    goal: float | None = None

    @property
    def reached(self) -> bool | None:
        """``None`` where there is no goal."""
        if self.bound is None or self.goal is None:
            return None
        return self.value <= self.goal if self.bound == "<=" else self.value >= self.goal


@dataclass
class BenchReport:
    """Filled step by step by a benchmark.

    Attributes:
        name: Of the benchmark.
        config: What was chosen.
        repeats: Every measured repeat, by label, with the unit in the label where it is not
            seconds.
        ratios: By label.
        facts: Other findings: counts, accuracies, memory.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    repeats: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add_repeats(self, repeats: Mapping[str, Sequence[float]], prefix: str = "") -> None:
        """Keep the raw repeats of :func:`mllm.bench.interleave`."""
        for label, values in repeats.items():
            self.repeats[f"{prefix}{label}"] = list(values)

    def compare(
        self,
        label: str,
        numerator: str,
        denominator: str,
        bound: Literal["<=", ">="] | None = None,
        goal: float | None = None,
        scale: float = 1.0,
    ) -> float:
        """Add the median ratio of two series of repeats, times ``scale``."""
        value = scale * median_ratio(self.repeats[numerator], self.repeats[denominator])
        return self.add_ratio(label, value, bound, goal)

    def add_ratio(
        self,
        label: str,
        value: float,
        bound: Literal["<=", ">="] | None = None,
        goal: float | None = None,
    ) -> float:
        """Add a ratio that was found in another way."""
        self.ratios[label] = Ratio(value, bound, goal)
        return value

    def table(self) -> str:
        """Medians, ratios and facts as lines of text."""
        labels = [*self.repeats, *self.ratios, *self.facts]
        width = max(map(len, labels), default=0)
        lines = [f"mllm bench {self.name}"]
        for label, values in self.repeats.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            lines.append(
                f"  {label:<{width}}  {middle:10.4f}   ({low:.4f} to {high:.4f}, n = {len(values)})"
            )
        for label, ratio in self.ratios.items():
            line = f"  {label:<{width}}  {ratio.value:10.3f} x"
            if ratio.reached is not None:
                verdict = "reached" if ratio.reached else "MISSED"
                line += f" (goal {ratio.bound} {ratio.goal:g}: {verdict})"
            lines.append(line)
        lines += [f"  {label:<{width}}  {fact}" for label, fact in self.facts.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with ``"ratios": {label: median}``."""
        return {
            "benchmark": self.name,
            "config": dict(self.config),
            "ratios": {label: ratio.value for label, ratio in self.ratios.items()},
            "goals": {
                label: f"{ratio.bound} {ratio.goal:g}"
                for label, ratio in self.ratios.items()
                if ratio.reached is not None
            },
            "repeats": self.repeats,
            "facts": self.facts,
            "hardware": hardware(),
            "versions": library_versions(),
        }

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict`, whole or not at all."""
        atomic_write_text(Path(file), json.dumps(self.to_dict(), indent=2) + "\n")
