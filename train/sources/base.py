"""What a source of instruction samples gives, and the account of what could not be read."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from train.instruction_rows import InstructionSample
from vision_moe import InputError

logger = logging.getLogger(__name__)

MAX_SKIPPED_SHARE = 0.01
_NUM_LISTED = 20


@dataclass
class SkippedSamples:
    """Samples that are left out because something about them cannot be read.

    Attributes:
        num_seen: All samples so far, with those that are left out.
        faults: ``"file, record 3: what is wrong"`` of each that is left out.
    """

    num_seen: int = 0
    faults: list[str] = field(default_factory=list)

    def enforce_limit(self) -> None:
        """Stop the run when too much is missing.

        Raises:
            InputError: More than 1 % of the samples are left out.
        """
        if len(self.faults) > MAX_SKIPPED_SHARE * self.num_seen:
            raise InputError(
                f"{self.faults[0]} ({len(self.faults):,} of {self.num_seen:,} samples cannot be"
                f" used, more than {MAX_SKIPPED_SHARE:.0%}; 'mllm check-data' lists them)"
            )

    def report(self) -> None:
        """List in the log what was left out, at the end of a run."""
        if not self.faults:
            return
        logger.warning(
            "%s of %s samples were left out:", f"{len(self.faults):,}", f"{self.num_seen:,}"
        )
        for fault in self.faults[:_NUM_LISTED]:
            logger.warning("  %s", fault)
        if len(self.faults) > _NUM_LISTED:
            logger.warning("  ... and %s more", f"{len(self.faults) - _NUM_LISTED:,}")


@dataclass(frozen=True)
class InstructionData:
    """Samples, and the pictures that their ``image_keys`` number.

    Attributes:
        samples: Keys count the distinct pictures from 0.
        open_images: One function for each picture; :class:`vision_moe.InputError` where it cannot
            be read.
        image_identities: One string for each picture; equal strings are equal pictures.
        skipped: What was left out.
    """

    samples: list[InstructionSample]
    open_images: list[Callable[[], Image.Image]]
    image_identities: list[str]
    skipped: SkippedSamples = field(default_factory=SkippedSamples)


def draw(items: Sequence[Any], count: int | None, seed: Sequence[int]) -> list[Any]:
    """``count`` of the items in an order of their own, or all of them in theirs."""
    if count is None or count >= len(items):
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), size=count, replace=False)
    return [items[index] for index in chosen]
