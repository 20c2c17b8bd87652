"""The paper's ablations of PSFM at nano scale: variants, teachers' answers kept on disk, short runs, measurements."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .configuration_spa3r import Spa3RConfig
from .geometry_data import RoomGeometryDataset
from .modeling_spa3r import Spa3RForPreTraining, Spa3RTeacherOutput
from .psfm_data import sample_view_mask
from .psfm_metrics import evaluate_psfm, unseen_depth
from .spatial_probes import RoomFacts, encode_tokens, pooled_tokens, probe_facts, view_invariance


@dataclass(frozen=True)
class Ablation:
    """
    One question of the paper.

    Attributes:
        variants: Label -> changes to the configuration; the base has none.
        published: Label -> VSI-Bench score that the paper gives for it, where it does.
    """

    variants: dict[str, dict[str, Any]]
    published: dict[str, float]


# Published scores: the paper's ablation tables, as VSI-Bench averages of the Spa3-VLM built on each encoder.
ABLATIONS = {
    "targets": Ablation(
        {"geometric": {"targets": ["geometric"]}, "semantic": {"targets": ["semantic"]}, "both": {}},
        {"geometric": 57.5, "semantic": 56.7, "both": 58.6},
    ),
    "mask ratio": Ablation(
        {"25 %": {"mask_ratio": 0.25}, "50 %": {}, "75 %": {"mask_ratio": 0.75}},
        {"25 %": 57.5, "50 %": 58.6, "75 %": 58.1},
    ),
    "cameras": Ablation(
        {"Plucker": {"camera_conditioning": "plucker"}, "PRoPE": {}}, {"Plucker": 57.6, "PRoPE": 58.6}
    ),
    "masking": Ablation({"two-pass": {"masking_mode": "two_pass"}, "asymmetric": {}}, {}),
    "latents": Ablation(
        {"8": {"num_latents": 8}, "32": {}, "128": {"num_latents": 128}, "256": {"num_latents": 256}}, {}
    ),
}


def variant_id(changes: Mapping[str, Any]) -> str:
    """A name for files, the same for the same changes, whichever question asks for them."""
    words = [
        f"{key}-{'-'.join(value) if isinstance(value, list) else value}" for key, value in sorted(changes.items())
    ]
    return "_".join(words) or "base"


def all_variants() -> dict[str, dict[str, Any]]:
    """Name -> changes of every configuration that some question needs, each once."""
    return {variant_id(changes): changes for table in ABLATIONS.values() for changes in table.variants.values()}


class TeacherCache:
    """
    What frozen teachers say of fixed sets of views with fixed masks, in batches of safetensors files, float16.

    Args:
        folder: Where files are kept; its name has to say which teachers they are from.
        model: Has the teachers, and the masking mode and ratio.
        dataset: The rooms.
        num_views: Views of a sample.
        num_batches: Batches, of `batch_size` rooms each.
    """

    def __init__(
        self,
        folder: Path,
        model: Spa3RForPreTraining,
        dataset: RoomGeometryDataset,
        num_views: int,
        num_batches: int,
        batch_size: int = 4,
    ):
        self.folder = folder
        self.num_batches = num_batches
        folder.mkdir(parents=True, exist_ok=True)
        for batch in range(num_batches):
            path = self._path(batch)
            if path.exists():
                continue
            # The same views and draws for every masking mode and ratio.
            keys = [(batch * batch_size // len(dataset), batch * batch_size + i, num_views) for i in range(batch_size)]
            pixels = torch.stack([dataset[key]["pixel_values"] for key in keys])
            rngs = [np.random.default_rng((*key, 1)) for key in keys]
            masks = np.stack([sample_view_mask(num_views, model.config.mask_ratio, rng) for rng in rngs])
            answers = model.teach(pixels.to(model.device), torch.from_numpy(masks).to(model.device))
            tensors = {
                name: value.half().cpu().contiguous()
                if name.endswith(("tokens", "target"))
                else value.cpu().contiguous()
                for name, value in answers.items()
            }
            save_file(tensors, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch_{batch}.safetensors"

    def batches(self, seed: int) -> Iterator[Spa3RTeacherOutput]:
        """Without end; every pass in another order."""
        rng = np.random.default_rng(seed)
        while True:
            for batch in rng.permutation(self.num_batches).tolist():
                tensors = {name: value.float() for name, value in load_file(self._path(batch)).items()}
                tensors["view_mask"] = tensors["view_mask"].bool()
                yield Spa3RTeacherOutput(**tensors)


def teacher_fingerprint(model: Spa3RForPreTraining) -> str:
    """Changes when a frozen weight does."""
    digest = hashlib.sha256()
    for part in (model.spa3r.backbone, model.semantic_teacher):
        if part is not None:
            for name, value in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def build_variant(base: Spa3RForPreTraining, changes: Mapping[str, Any], seed: int) -> Spa3RForPreTraining:
    """A fresh model with the teachers of `base` and a changed configuration."""
    torch.manual_seed(seed)
    settings = base.config.to_dict() | {"attn_implementation": base.config._attn_implementation} | dict(changes)
    model = Spa3RForPreTraining(Spa3RConfig(**settings))
    model.spa3r.backbone.load_state_dict(base.spa3r.backbone.state_dict())
    if model.semantic_teacher is not None and base.semantic_teacher is not None:
        model.semantic_teacher.load_state_dict(base.semantic_teacher.state_dict())
    return model


def train_variant(
    model: Spa3RForPreTraining,
    cache: TeacherCache,
    image_size: tuple[int, int],
    steps: int,
    seed: int,
    learning_rate: float = 1.5e-3,
) -> list[float]:
    """
    Train on a cache, one batch a step: AdamW, 5 % warm-up, cosine to a tenth, computing in bfloat16.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: A loss is not finite.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=1e-4)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.55 + 0.45 * float(np.cos(np.pi * step / steps)))
    )
    losses = []
    for step, teachers in zip(range(steps), cache.batches(seed), strict=False):
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model.learn(teachers, image_size)["loss"]
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}; expected a finite one")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@dataclass(frozen=True)
class ProbeData:
    """
    Backbone tokens (rooms, V, P, 2C) to probe with: `tokens` of all rooms, the first `num_train` to learn from, and
    `halves` of the test rooms from two disjoint sets of views.
    """

    tokens: Tensor
    num_train: int
    facts: RoomFacts
    halves: tuple[Tensor, Tensor]


def measure_features(data: ProbeData, features: Tensor, halves: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Probes and view-invariance of features (rooms, p) and (test rooms, p) twice."""
    scores = {f"probe {name}": value for name, value in _probe(features, data).items()}
    return scores | {f"invariance {name}": value for name, value in view_invariance(*halves).items()}


def _probe(features: Tensor, data: ProbeData) -> dict[str, float]:
    return probe_facts(features[: data.num_train], features[data.num_train :], data.facts)


def measure_variant(
    model: Spa3RForPreTraining,
    batches: list[dict[str, Tensor]],
    means: dict[str, Tensor],
    data: ProbeData,
    image_size: tuple[int, int],
) -> dict[str, float]:
    """All that is measured of a trained variant; see `evaluate_psfm`, `unseen_depth` and `measure_features`."""
    model.eval()
    inputs = [{key: batch[key] for key in ("pixel_values", "view_mask")} for batch in batches]
    scores = {key: value for key, value in evaluate_psfm(model, inputs, means).items() if key.endswith("_cosine")}
    scores |= {f"depth {name}": value for name, value in unseen_depth(model, batches).items()}
    latents, *halves = (encode_tokens(model.spa3r, tokens, image_size) for tokens in (data.tokens, *data.halves))
    scores |= measure_features(data, latents.flatten(1), (halves[0].flatten(1), halves[1].flatten(1)))
    return scores


def measure_backbone(model: Spa3RForPreTraining, data: ProbeData) -> dict[str, float]:
    """The same probes on mean-pooled backbone features."""
    prefix = model.config.backbone_config.num_prefix_tokens
    pooled, *halves = (pooled_tokens(tokens, prefix) for tokens in (data.tokens, *data.halves))
    return measure_features(data, pooled, (halves[0], halves[1]))


def write_result(path: Path, content: Mapping[str, Any], started: float) -> None:
    """A run's JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**content, "seconds": round(time.monotonic() - started, 1)}, indent=2) + "\n")
    part.replace(path)
