"""What a run of Spa3-VLM's training leaves beside its weights: `run.json` and a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .model_card import CITATION, _facts, markdown_table


def write_spa3_vlm_report(folder: Path, run: Mapping[str, Any], results: str = "") -> None:
    """
    Write `run.json` and `README.md`, the card of an adapter trained here.

    Args:
        folder: Where the adapter is.
        run: Its `run_facts`, and `name`, `vlm`, `spatial_encoder`, `adapter` (its configuration), `trained`, `data`
            (lines), `loss` (the last that was logged) and `bad_samples` (message -> times).
        results: Markdown: what was measured.
    """
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    adapter = run["adapter"]
    data = ModelCardData(
        library_name="spa3r_hf",
        pipeline_tag="image-text-to-text",
        base_model=run["vlm"],
        tags=["spa3r", "spatial-intelligence", "vision-language-model", "adapter"],
        model_name=run["name"],
    )
    facts = {
        "base VLM": run["vlm"],
        "spatial encoder": run["spatial_encoder"],
        "trained": run["trained"],
        "data": "; ".join(run["data"]),
        "last loss": f"{run['loss']:.4f}",
        **_facts(run),
    }
    bad_samples = "".join(f"- left out {times} times: {message}\n" for message, times in run["bad_samples"].items())
    text = f"""---
{data.to_yaml()}
---

# {run["name"]}

An adapter of Spa3-VLM ([arXiv 2602.21186](https://arxiv.org/abs/2602.21186)): the visual tokens of a vision-language
model read the scene that its pictures show, by `{adapter["integration"]}` of `{adapter["spatial_features"]}`.

## Use

```python
from spa3r_hf import Spa3VLM, Spa3VLMProcessor

model = Spa3VLM.from_pretrained("{run["name"]}")
processor = Spa3VLMProcessor.from_pretrained("{run["name"]}")
content = [{{"type": "video", "video": "room.mp4"}}, {{"type": "text", "text": "How many chairs are in this room?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
{results and f"{chr(10)}## Results{chr(10)}{chr(10)}{results}{chr(10)}"}
## Training

{markdown_table(["", "this run"], [[key, value] for key, value in facts.items()])}

{bad_samples}
## Licence

What was trained here is for whoever trained it to license; the base VLM and the spatial encoder keep their licences.

## Citation

```bibtex
{CITATION}
```
"""
    ModelCard(text).save(folder / "README.md")


__all__ = ["write_spa3_vlm_report"]
