"""What a run of Spa3-VLM's training leaves beside its weights: `run.json` and a model card."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .licences import describe_sources
from .model_card import benchmark_metrics, markdown_table, measured, paragraph, write_card
from .shown_names import shown_path, shown_text


def write_spa3_vlm_report(
    folder: Path, run: Mapping[str, Any], results: str = "", scores: Mapping[str, Any] | None = None
) -> None:
    """
    Write `run.json` and `README.md`, the card of an adapter trained here.

    Args:
        folder: Where the adapter is.
        run: Its `run_facts`, and `name`, `vlm`, `spatial_encoder`, `adapter` (its configuration), `trained`, `data`
            (lines), `loss` (the last that was logged) and `bad_samples` (message -> times).
        results: Markdown: what was measured.
        scores: The adapter's own scores, 0-100, as VSI-Bench's metric gives them: for `eval.json` and the card's
            `model-index`.
    """
    data = [re.sub(r".* records of (.*) an epoch", r"\1", line) for line in run["data"]]
    sources = describe_sources([run["vlm"], run["spatial_encoder"], *data])
    base_models, datasets = [run["vlm"], run["spatial_encoder"]], data
    run = _without_folders({"sources": sources, **run})
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    if scores is not None:
        (folder / "eval.json").write_text(json.dumps(scores, indent=2) + "\n")
    adapter = run["adapter"]
    bad_samples = "".join(f"- left out {times} times: {message}\n" for message, times in run["bad_samples"].items())
    own = scores or {}
    write_card(
        folder,
        run,
        summary=paragraph(
            "An adapter of Spa3-VLM ([arXiv 2602.21186](https://arxiv.org/abs/2602.21186)): the visual tokens of a "
            "vision-language model read the scene that its pictures show, by "
            f"`{adapter['integration']}` of `{adapter['spatial_features']}`."
        ),
        use=f"""from spa3r_hf import Spa3VLM, Spa3VLMProcessor

model = Spa3VLM.from_pretrained("{run["name"]}")
processor = Spa3VLMProcessor.from_pretrained("{run["name"]}")
content = [{{"type": "video", "video": "room.mp4"}}, {{"type": "text", "text": "How many chairs are in this room?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))""",
        results=results,
        eval_results=measured(
            own,
            benchmark_metrics(own),
            task="visual-question-answering",
            data="VSI-Bench's questions about procedural rooms",
        ),
        tags=["spatial-intelligence", "vision-language-model", "adapter"],
        pipeline_tag="image-text-to-text",
        library_name="spa3r_hf",
        base_models=base_models,
        base_model_relation="adapter",
        datasets=datasets,
        rows={
            "base VLM": run["vlm"],
            "spatial encoder": str(run["spatial_encoder"]),
            "trained": run["trained"],
            "data": "; ".join(run["data"]),
            "last loss": f"{run['loss']:.4f}",
        },
        after_training=bad_samples,
    )


def evaluation_table(scores: Mapping[str, float]) -> str:
    """What `Spa3VLMTrainer.score` gives, as a Markdown table."""
    of_tokens = ("loss", "token_accuracy")
    rows = [[name, f"{value:.4f}" if name in of_tokens else f"{value:.1f}"] for name, value in scores.items()]
    return markdown_table(["on the evaluation set", ""], rows)


def _without_folders(run: Mapping[str, Any]) -> dict[str, Any]:
    """Names of models, and messages, as others may see them."""

    def shown(facts: Mapping[str, Any], *names: str) -> dict[str, Any]:
        return {**facts, **{name: shown_path(facts[name]) for name in names if facts.get(name)}}

    adapter = shown(run["adapter"], "base_model_name_or_path", "spatial_encoder_name_or_path")
    bad_samples = {shown_text(message): times for message, times in run["bad_samples"].items()}
    data = [shown_text(line) for line in run["data"]]
    return {**shown(run, "vlm", "spatial_encoder"), "adapter": adapter, "data": data, "bad_samples": bad_samples}


__all__ = ["evaluation_table", "write_spa3_vlm_report"]
