"""Files for the test servers of VQAv2, VizWiz (JSON) and MMBench (an Excel sheet)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from mllm.evaluate_scores import Evaluation
from mllm.tasks import get_scorer
from vision_moe import InputError, atomic_write_bytes

_AS_SHEET = ("mmbench", "mmbench_single")


def write_submission(evaluation: Evaluation, folder: str | Path, data: str | None = None) -> Path:
    """Write what the task's test server takes, into the evaluation's folder.

    Raises:
        InputError: The benchmark has no such server, or the sheet's library is not installed.
    """
    name = evaluation.scores["task"]
    rows = get_scorer(name, data).submission([(p.item, p.text) for p in evaluation.predictions])
    if name in _AS_SHEET:
        path = Path(folder) / "submission.xlsx"
        atomic_write_bytes(path, _sheet(rows))
    else:
        path = Path(folder) / "submission.json"
        atomic_write_bytes(path, json.dumps(rows).encode())
    return path


def _sheet(rows: list[dict[str, Any]]) -> bytes:
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE, WriteOnlyCell
    except ImportError:
        raise InputError(
            "MMBench's server takes an Excel sheet, and openpyxl is not installed:"
            " pip install 'mllm-moe[eval]'"
        ) from None
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(list(rows[0]))
    for row in rows:
        cells = []
        for value in row.values():
            text = ILLEGAL_CHARACTERS_RE.sub("", value) if isinstance(value, str) else value
            cell = WriteOnlyCell(sheet, text)
            if isinstance(text, str):
                cell.data_type = "s"  # an answer that begins with "=" is no formula
            cells.append(cell)
        sheet.append(cells)
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()
