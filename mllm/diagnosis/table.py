"""A diagnosis as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mllm.diagnosis.measure import I2T, T2I, Diagnosis


def diagnosis_table(diagnosis: Diagnosis) -> str:
    """What the numbers say, in the order in which one asks."""
    data = diagnosis.data
    queries = list(diagnosis.shares[diagnosis.experts[0]])
    used = f"{data['name']}: {data['num_pictures']} pictures, {data['num_captions']} captions"
    if data["skipped"]:
        used += "".join(f"\nleft out: {reason}" for reason in data["skipped"].values())
    sections = [
        used,
        _matrix(
            "answered, in % (retrieval: first of all; an attribute: before its changed caption)",
            queries,
            {
                name: [f"{100 * shares[query]:.1f}" for query in queries]
                for name, shares in diagnosis.shares.items()
            },
        ),
        _oracle(diagnosis, queries),
        _complementarity(diagnosis),
        _geometry(diagnosis),
        _routing(diagnosis),
        _matrix(
            "one expert left out: change in points [95 % interval]",
            [I2T, T2I],
            {
                name: [
                    f"{100 * one[query].difference:+.1f}"
                    f" [{100 * one[query].low:+.1f}, {100 * one[query].high:+.1f}]"
                    for query in (I2T, T2I)
                ]
                for name, one in diagnosis.leave_one_out.items()
            },
        ),
    ]
    return "\n\n".join(sections)


def _oracle(diagnosis: Diagnosis, queries: Sequence[str]) -> str:
    rows = {}
    for query in queries:
        gap = diagnosis.oracle[query]
        capture = "-" if gap.capture is None else f"{100 * gap.capture:.0f}"
        rows[query] = [f"{100 * one:.1f}" for one in (gap.best_single, gap.mixture, gap.oracle)]
        rows[query].append(capture)
        if diagnosis.control_oracle is not None:
            excess = gap.oracle - diagnosis.control_oracle[query].oracle
            rows[query].append(f"{100 * excess:+.1f}")
    columns = ["best expert", "mixture", "any expert", "captured"]
    columns += ["above control"] if diagnosis.control_oracle is not None else []
    title = "how much of what any expert answers does the mixture, in %"
    if diagnosis.control_oracle is None:
        title += " (any several models make an oracle: give a --control)"
    return _matrix(title, columns, rows)


def _complementarity(diagnosis: Diagnosis) -> str:
    rows = {}
    for query, values in diagnosis.complementarity.items():
        for name in ("disagreement", "double_fault", "kappa"):
            off = _off_diagonal(values[name])
            rows[f"{query}: {name.replace('_', ' ')}"] = [
                f"{number:.3f}" for number in (off.min(), off.mean(), off.max())
            ]
    return _matrix("pairs of experts", ["least", "mean", "most"], rows)


def _geometry(diagnosis: Diagnosis) -> str:
    rows = {}
    for tower in ("image", "text"):
        for name, values in (("CKA", diagnosis.cka), ("subspaces", diagnosis.subspaces)):
            off = _off_diagonal(values[tower])
            rows[f"{tower} features: {name}"] = [
                f"{number:.3f}" for number in (off.min(), off.mean(), off.max())
            ]
    cosines = [_off_diagonal(one) for one in diagnosis.weight_cosines.values()]
    every = np.concatenate(cosines) if cosines else np.array([])
    every = every[np.isfinite(every)]
    if len(every):
        rows["weight changes: cosine"] = [
            f"{number:.3f}" for number in (every.min(), every.mean(), every.max())
        ]
    return _matrix("how alike the experts are", ["least", "mean", "most"], rows)


def _routing(diagnosis: Diagnosis) -> str:
    rows = {}
    for number, (block, kinds) in enumerate(diagnosis.survey.items()):
        for kind, counts in kinds.items():
            statistics = counts.statistics()
            bits = counts.information()
            best = max(bits, key=bits.__getitem__, default=None)
            rows[f"{number:>2} {block.partition('.')[0]}, {kind}"] = [
                f"{statistics.load_entropy:.3f}",
                f"{statistics.max_violation:.2f}",
                str(statistics.num_dead),
                f"{statistics.token_entropy:.3f}",
                "-" if best is None else f"{best} {bits[best]:.2f}",
                *(
                    [f"{100 * diagnosis.agreement[block]:.0f} %"]
                    if diagnosis.agreement and block in diagnosis.agreement
                    else []
                ),
            ]
    columns = ["load entropy", "violation", "dead", "token entropy", "bits about"]
    columns += ["as control"] if diagnosis.agreement else []
    return _matrix("routing, by block and kind of token", columns, rows)


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
    if len(matrix) < 2:
        return np.array([np.nan])
    return matrix[~np.eye(len(matrix), dtype=bool)]


def _matrix(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    first = max((len(name) for name in rows), default=0)
    widths = [
        max([len(column), *(len(row[i]) for row in rows.values() if i < len(row))])
        for i, column in enumerate(columns)
    ]
    head = "  ".join(f"{column:>{w}}" for column, w in zip(columns, widths, strict=True))
    lines = [title, f"{'':<{first}}  {head}"]
    for name, row in rows.items():
        values = "  ".join(f"{value:>{w}}" for value, w in zip(row, widths, strict=False))
        lines.append(f"{name:<{first}}  {values}")
    return "\n".join(lines)
