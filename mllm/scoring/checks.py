"""What every scoring function asks of its arguments."""

from __future__ import annotations

from collections.abc import Sized


def input_error(message: str) -> ValueError:
    """The :class:`vision_moe.InputError` to raise."""
    # Here, because vision_moe loads torch and scoring alone has no need of it.
    from vision_moe import InputError

    return InputError(message)


def require_text(value: object, name: str) -> None:
    """Raise ``TypeError`` unless ``value`` is a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}")


def require_same_length(**sequences: Sized) -> None:
    """Raise ``InputError`` unless all are equally long and not empty."""
    lengths = {name: len(sequence) for name, sequence in sequences.items()}
    if len(set(lengths.values())) > 1:
        counts = " but ".join(f"{length} {name}" for name, length in lengths.items())
        raise input_error(f"there are {counts}")
    if not all(lengths.values()):
        raise input_error(f"there are no {' and no '.join(lengths)}: nothing to score")
