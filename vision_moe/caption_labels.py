"""Stage labels of pairs that no tower has encoded, guessed by their captions.

Ridge regression from the words of a caption to the clusters of its pair, learnt on a sample of the
pairs that has features.  Each word counts twice: as it is, and with how early it comes, since what
a picture shows above all is named first.

N captions, L tokens.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.preprocessing import normalize

_COLUMN_BITS = 16  # words share columns by chance: of 65,536 too few to matter
_MULTIPLIER = np.uint64(11400714819323198485)  # Knuth's, 2^64 / the golden ratio
#: Weight of the ridge beside rows of norm 1; three times more or less made no difference.
_ALPHA = 0.3
#: Far from exact, but 0.1 % of the guesses are others where it is a hundredth of it.
_TOLERANCE = 1e-2
_NUM_FOLDS = 3


class CaptionLabels:
    """What captions say of their pairs' stage labels.

    Args:
        tokens: ``(N, L)``, of the sample's captions.
        labels: ``(N,)``, of :func:`vision_moe.clustering.stage_labels`; none negative.
        clusters: ``(K, K)`` for labels by text and image cluster, ``(K,)`` for those by one
            modality's.
        pad_id: The token that fills up short captions.
        seed: Of the folds.

    Attributes:
        agreement: For each of ``clusters`` the share of the sample whose cluster is guessed right
            by what the rest of the sample says.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        clusters: tuple[int, ...],
        pad_id: int = 0,
        seed: int = 0,
    ) -> None:
        self.clusters = clusters
        self.pad_id = pad_id
        self.ridge = Ridge(_ALPHA, solver="sparse_cg", tol=_TOLERANCE)
        parts = np.unravel_index(labels.astype(np.int64), clusters)
        known = zip(clusters, parts, strict=True)
        targets = np.concatenate([np.eye(k, dtype=np.float32)[part] for k, part in known], axis=1)
        words = _words(tokens, pad_id)
        folds = KFold(min(_NUM_FOLDS, len(tokens)), shuffle=True, random_state=seed)
        guessed = self._parts(cross_val_predict(self.ridge, words, targets, cv=folds))
        self.agreement = [
            float(np.mean(guess == part)) for guess, part in zip(guessed, parts, strict=True)
        ]
        self.ridge.fit(words, targets)

    def guess(self, tokens: np.ndarray) -> np.ndarray:
        """The likeliest labels ``(N,)`` of other captions, in the smallest integers."""
        parts = self._parts(self.ridge.predict(_words(tokens, self.pad_id)))
        labels = np.ravel_multi_index(parts, self.clusters)
        return labels.astype(np.min_scalar_type(-int(np.prod(self.clusters))))

    def _parts(self, scores: np.ndarray) -> tuple[np.ndarray, ...]:
        """For each of ``clusters`` the best ``(N,)`` of its columns."""
        columns = np.split(scores, np.cumsum(self.clusters)[:-1], axis=1)
        return tuple(one.argmax(axis=1) for one in columns)


def _words(tokens: np.ndarray, pad_id: int) -> csr_matrix:
    """Rows of norm 1, a column for a token and one for it among the first, the next 2, 4, 8 …"""
    row, place = np.nonzero(tokens != pad_id)
    token = tokens[row, place].astype(np.uint64)
    early = np.frexp(place + 1.0)[1].astype(np.uint64)
    keys = np.concatenate([token * np.uint64(64), token * np.uint64(64) + early])
    column = (keys * _MULTIPLIER) >> np.uint64(64 - _COLUMN_BITS)
    ones = np.ones(len(keys), np.float32)
    shape = len(tokens), 1 << _COLUMN_BITS
    return normalize(csr_matrix((ones, (np.tile(row, 2), column.astype(np.int32))), shape))
