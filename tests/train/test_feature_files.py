"""Feature files: whole entries only, whoever writes beside whom."""

import multiprocessing
from pathlib import Path

import numpy as np

from train.feature_files import FeatureFiles

NAMES = [FeatureFiles.name(f"picture {number}") for number in range(40)]


def array(number: int) -> np.ndarray:
    return np.full((2, 3), number, np.float16)


def opened(folder: Path) -> FeatureFiles:
    return FeatureFiles(folder, (2, 3), "float16")


def add(folder: Path, numbers: list[int]) -> None:
    files = opened(folder)
    for number in numbers:
        files.add([NAMES[number]], array(number)[None])


def test_arrays_are_found_again(tmp_path: Path) -> None:
    files = opened(tmp_path)
    files.add(NAMES[:2], np.stack([array(0), array(1)]))
    files.add(NAMES[2:3], array(2)[None])
    for one in (files, opened(tmp_path)):
        assert [one[name][0, 0] for name in NAMES[:3]] == [0, 1, 2]
        assert NAMES[3] not in one
    assert isinstance(files[NAMES[0]].base, np.memmap)


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    shares = [list(range(25)), list(range(39, 14, -1))]
    writers = [context.Process(target=add, args=(tmp_path, share)) for share in shares]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    files = opened(tmp_path)
    for number, name in enumerate(NAMES):
        np.testing.assert_array_equal(files[name], array(number))


def test_what_a_killed_writer_left_counts_as_far_as_it_is_whole(tmp_path: Path) -> None:
    add(tmp_path, [0, 1, 2])
    (features,) = tmp_path.glob("*.features")
    (names,) = tmp_path.glob("*.names")
    features.write_bytes(features.read_bytes()[:-1])
    names.write_text(names.read_text()[:-5])
    files = opened(tmp_path)
    assert [name in files for name in NAMES[:3]] == [True, True, False]
    np.testing.assert_array_equal(files[NAMES[1]], array(1))


def test_names_without_arrays_are_ignored(tmp_path: Path) -> None:
    add(tmp_path, [0])
    next(tmp_path.glob("*.features")).unlink()
    assert NAMES[0] not in opened(tmp_path)
