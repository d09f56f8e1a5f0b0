"""What the person who starts the demo decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DemoOptions:
    """Options of ``mllm demo``; ``None`` is a default that depends on the rest.

    Attributes:
        checkpoint: MLLM folder, hub name, or folder of adapters.
        compare: A second one, for the Compare tab.
        base: Model that adapters stand on; what their own configuration names by default.
        clip: CLIP-MoE folder of the Zero-shot tab; ``clip_moe`` beside the checkpoint by default.
        dense_clip: Its dense counterpart; ``clip`` beside the checkpoint by default.
        load_in: Bits of the language model's linear layers.
        device: ``cpu``, ``cuda`` or ``mps``; a GPU when there is one by default.
        host: Address to listen on.
        port: Port; the first free one from 7860 by default.
        share: Open a public address through Gradio's servers.
        auth_file: Lines of ``user:password``; nobody else gets in.
        queue_size: Requests that may wait; further ones are refused.
        max_image_pixels: Largest picture.
        max_upload_megabytes: Largest file.
        max_new_tokens: Longest answer, in tokens.
    """

    checkpoint: str
    compare: str | None = None
    base: str | None = None
    clip: Path | None = None
    dense_clip: Path | None = None
    load_in: Literal["4bit", "8bit"] | None = None
    device: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    auth_file: Path | None = None
    queue_size: int = 64
    max_image_pixels: int = 50_000_000
    max_upload_megabytes: int = 50
    max_new_tokens: int = 256
