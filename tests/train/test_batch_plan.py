"""What each epoch draws, and how its batches stand in steps."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.batch_plan import WeightedDraws, plan_batches
from train.instruction_rows import Pieces, RowLimits
from train.row_store import RowStore


def row_store(shown: Sequence[bool]) -> RowStore:
    """Rows of five tokens, some with a picture."""
    store = RowStore(RowLimits(image_token_id=0, num_image_tokens=lambda _: 1))
    for number, has_picture in enumerate(shown):
        store.append(Pieces((number,) if has_picture else (), [1, 2, 3, 4, 5], []), 5)
    return store


def plan(
    shown: Sequence[bool], count: int, seed: int = 0, step_batches: int | None = None
) -> list[list[int]]:
    rows = row_store(shown)
    draws = WeightedDraws(rows.sources, [1.0], seed)
    return list(islice(plan_batches(rows, draws, 4, 100, seed, step_batches), count))


def test_plan_is_the_same_for_a_seed_and_differs_between_epochs() -> None:
    first = plan([True] * 20, 10)
    assert first == plan([True] * 20, 10) != plan([True] * 20, 10, seed=1)
    assert first[:5] != first[5:]
    assert sorted(row for batch in first[:5] for row in batch) == list(range(20))


def test_half_a_source_is_another_half_in_the_next_epoch() -> None:
    draws = WeightedDraws([0] * 10, [0.5], seed=0)
    epochs = [draws.of_epoch(epoch).tolist() for epoch in range(4)]
    again = WeightedDraws([0] * 10, [0.5], seed=0)
    assert len(draws) == 5
    assert sorted(epochs[0] + epochs[1]) == sorted(epochs[2] + epochs[3]) == list(range(10))
    assert epochs[0] != epochs[2]
    assert epochs == [again.of_epoch(epoch).tolist() for epoch in range(4)]
    assert epochs[0] != WeightedDraws([0] * 10, [0.5], seed=1).of_epoch(0).tolist()


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.1, 0.5, 1.0, 1.5, 3.0]), min_size=3, max_size=3),
    epochs=st.integers(1, 7),
)
def test_rows_of_a_source_are_seen_equally_often(
    sizes: list[int], weights: list[float], epochs: int
) -> None:
    sources = [number for number, size in enumerate(sizes) for _ in range(size)]
    draws = WeightedDraws(sources, weights[: len(sizes)], seed=3)
    seen = Counter(row for epoch in range(epochs) for row in draws.of_epoch(epoch).tolist())
    assert sum(seen.values()) == epochs * len(draws)
    for number, count in enumerate(draws.counts):
        times = [seen[row] for row, source in enumerate(sources) if source == number]
        assert sum(times) == epochs * count
        assert max(times, default=0) - min(times, default=0) <= 1


def test_pictures_and_text_alone_stand_in_steps_apart() -> None:
    """23 rows with pictures and 13 of text: 6 and 4 batches, so 2 and 1 whole steps of three; of
    the two epochs' last batches one step is mixed at most where they meet."""
    shown = [True] * 23 + [False] * 13
    batches = plan(shown, 20, step_batches=3)
    for epoch in (batches[:10], batches[10:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(36))
    kinds = [{shown[row] for row in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    steps = [set().union(*kinds[at : at + 3]) for at in range(0, 18, 3)]
    assert [len(step) for step in steps].count(1) >= 5
    assert {True} in steps and {False} in steps
    assert plan(shown, 20, step_batches=3) == batches


@pytest.mark.parametrize("step_batches", [None, 2])
def test_first_step_and_batch_are_the_largest(step_batches: int | None) -> None:
    lengths = [5] * 17 + [60] + [5] * 13 + [9]
    rows = row_store([True] * len(lengths))
    for number, length in enumerate(lengths):
        rows.lengths[number] = length
    draws = WeightedDraws(rows.sources, [1.0], 0)
    batches = list(islice(plan_batches(rows, draws, 4, 1000, 0, step_batches), 8))
    assert 17 in batches[0]
    assert sorted(row for batch in batches for row in batch) == list(range(32))
