"""The plugin of lmms-eval: ``python -m lmms_eval --model mllm --model_args pretrained=DIR``.

lmms-eval finds :func:`manifest` by the entry point ``lmms_eval.models``.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Tells lmms-eval which class the model ``mllm`` is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mllm", chat_class_path="mllm.lmms_model.MLLM")
