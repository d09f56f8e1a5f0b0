"""A record of LLaVA's, and folders with files of records."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

RECORD: dict[str, Any] = {
    "id": "cat-17",
    "image": "cat.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Its color?"},
        {"from": "gpt", "value": "Black."},
    ],
}


@pytest.fixture
def record() -> dict[str, Any]:
    return json.loads(json.dumps(RECORD))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds cat.png and dog.jpg."""
    Image.new("RGB", (8, 6), "black").save(tmp_path / "cat.png")
    Image.new("RGB", (9, 7), "brown").save(tmp_path / "dog.jpg")
    return tmp_path
