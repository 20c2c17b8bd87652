"""
What lmms-eval finds of this package, through the entry-point group `lmms_eval.models`.

    python -m lmms_eval --model spa3_vlm --tasks vsibench --model_args pretrained=ADAPTER,min_frames=32,max_frames=32
"""

from typing import Any

from .optional import require


def manifests() -> list[Any]:
    """lmms-eval's `ModelManifest` of Spa3-VLM; the model's class is imported once it is asked for."""
    registry = require("lmms_eval.models.registry_v2", extra="lmms")
    return [
        registry.ModelManifest(
            model_id="spa3_vlm",
            simple_class_path=None,
            chat_class_path="spa3r_hf.lmms_eval_model.Spa3VLMChat",
            aliases=("spa3r_hf",),
        )
    ]


__all__ = ["manifests"]
