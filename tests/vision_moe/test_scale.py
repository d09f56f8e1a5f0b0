"""The plan on paper for 10^8 pairs, held against ten million labels."""

import time
import tracemalloc

import numpy as np
import pytest

from vision_moe import ClusterBatchSampler

M, B = 10_000_000, 800


def test_ten_million_labels_take_a_tenth_of_the_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = np.random.default_rng(0)
    # Clusters of very different sizes, as they are: about 700 of the 729 can fill a batch.
    share = rng.dirichlet(np.full(9, 2.0), size=3)
    labels = np.stack([rng.choice(9, M, p=share[d]).astype(np.int8) for d in range(3)], axis=1)
    tracemalloc.start()
    try:
        started = time.perf_counter()
        sampler = ClusterBatchSampler(labels, B)
        batches = sampler.batches()
        seconds = time.perf_counter() - started
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with capsys.disabled():
        print(f"\n{M:,} labels: {peak / 1e6:.0f} MB at most, {seconds:.1f} s, ", end="")
        print(f"{len(sampler.ancestors[-1]):,} clusters, {len(batches):,} batches of {B}")
    assert peak <= 0.1 * 1.6e9 * 1.1  # and what does not grow with the pairs; seen: 160 MB
    seen = np.zeros(M, bool)
    for batch in batches:
        assert not seen[batch].any()
        seen[batch] = True
    assert seen.all()
    pure = sum(len(np.unique(labels[batch], axis=0)) == 1 for batch in batches[::50])
    assert pure > 0.9 * len(batches[::50])
