"""What the training of a semantic teacher leaves for people: scores and a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import DINOv3ViTConfig

from .model_card import measured, paragraph, write_teacher_card
from .semantic_trainer import MIN_SHARE, probe_table


PROBED_ROOMS = 64
"""Rooms of the training split that probes are learnt on."""


def write_semantic_report(
    folder: Path, config: DINOv3ViTConfig, scores: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
    """Write `eval.json`, `run.json` and the card to `folder`."""
    for name, content in (("eval.json", scores), ("run.json", run)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    write_teacher_card(
        folder,
        run,
        summary=paragraph(
            "A small vision transformer in the architecture of DINOv3, for use as the semantic teacher of Spa3R. It "
            "was trained from scratch on procedural rooms to predict which categories of things each patch shows, "
            "and in what shares; it has nothing of DINOv3's weights or data."
        ),
        use=f"""from transformers import AutoModel

model = AutoModel.from_pretrained("{run["name"]}")
# pictures (B, 3, {config.image_size}, {config.image_size}), ImageNet mean 0 and standard deviation 1
features = model(pixel_values).last_hidden_state[:, {1 + config.num_register_tokens}:]  # of patches, row by row""",
        results=paragraph(
            f"Linear probes for the category of a patch (patches with at least {MIN_SHARE:.0%} of one category), "
            f"learnt on {PROBED_ROOMS} training rooms, scored on {run['held_out']}."
        )
        + f"\n\n{probe_table(scores)}",
        eval_results=measured(
            scores,
            {
                "model.accuracy": "accuracy of a linear probe",
                "model.mean_class_accuracy": "mean accuracy over categories",
            },
            task="image-feature-extraction",
            data=f"categories of patches, {run['held_out']}",
        ),
        tags=["dinov3"],
        pipeline_tag="image-feature-extraction",
    )
