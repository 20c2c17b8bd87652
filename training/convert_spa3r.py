"""
Convert an original checkpoint (the Spa3R or Spa3-VLM release, VGGT-1B or DINOv3) to a folder that `from_pretrained`
loads.

Smoke: python training/convert_spa3r.py --kind spa3r --checkpoint tests/fixtures/spa3r_reference_rmsnorm.safetensors \
           --reference tests/fixtures/spa3r_reference_rmsnorm.safetensors --output_dir /tmp/spa3r-tiny
Real:  python training/convert_spa3r.py --kind spa3r --checkpoint spa3r.ckpt --output_dir outputs/spa3r \
           --reference numbers_of_the_release.safetensors --push_to_hub org/spa3r
       python training/convert_spa3r.py --kind spa3_vlm --checkpoint Spa3-VLM-4B --output_dir outputs/spa3-vlm

Of a Spa3-VLM, the folder gets the adapter and its processor, the spatial encoder in `spatial_encoder`, and the VLM in
`vlm`.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from spa3r_hf import (
    Spa3RImageProcessor,
    Spa3RVGGTConfig,
    Spa3VLM,
    Spa3VLMProcessor,
    conversion_spa3_vlm,
    conversion_spa3r,
)
from spa3r_hf.checkpoint_spa3_vlm import SPATIAL_ENCODER_FOLDER, VLM_FOLDER, revision_of
from spa3r_hf.conversion_files import folder_of, read_checkpoint, read_config
from spa3r_hf.conversion_keys import strip_prefix


logger = logging.getLogger("convert_spa3r")
CONVERTERS: dict[str, tuple[Callable[..., Any], Callable[..., PreTrainedModel]]] = {
    "spa3r": (conversion_spa3r.infer_spa3r_config, conversion_spa3r.convert_original_spa3r),
    "vggt": (conversion_spa3r.infer_vggt_config, conversion_spa3r.convert_original_vggt),
    "dinov3": (conversion_spa3r.infer_dinov3_config, conversion_spa3r.convert_original_dinov3),
}


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["mask_ratio=0.25", "backbone_config.dpt_layers=[0,1,2,3]"]` -> nested dict; values are JSON, or else text."""
    options: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not name or not separator:
            raise ValueError(f"--set {setting}; expected key=value")
        *parents, key = name.split(".")
        target = options
        for parent in parents:
            target = target.setdefault(parent, {})
        try:
            target[key] = json.loads(text)
        except json.JSONDecodeError:
            target[key] = text
    return options


def convert(kind: str, checkpoint: Path, options: dict[str, Any], reference: Path | None) -> PreTrainedModel:
    """Convert strictly, and compare with the reference numbers; errors as in `conversion_spa3r`."""
    infer_config, convert_original = CONVERTERS[kind]
    state_dict = strip_prefix(read_checkpoint(checkpoint))
    model = convert_original(state_dict, infer_config(state_dict, **options))
    logger.info("converted %d tensors, %.1f M parameters", len(state_dict), model.num_parameters() / 1e6)
    logger.info("configuration: %s", model.config.to_json_string())
    compare(conversion_spa3r.compare_with_reference, model, reference)
    return model


def convert_spa3_vlm(
    checkpoint: Path, options: dict[str, Any], reference: Path | None, base_vlm: str | None
) -> Spa3VLM:
    """The same for a Spa3-VLM; errors as in `conversion_spa3_vlm`."""
    state_dict = read_checkpoint(checkpoint)
    vlm_config: Any = read_config(checkpoint)
    if vlm_config is None:
        if base_vlm is None:
            raise ValueError(f"there is no config.json with {checkpoint}; expected one, or --base_vlm")
        vlm_config = AutoConfig.from_pretrained(base_vlm)
    has_encoder = any(key.startswith(conversion_spa3_vlm.ENCODER_PREFIX) for key in state_dict)
    encoder_config = None
    if has_encoder or options:
        encoder_config = conversion_spa3_vlm.infer_spatial_encoder_config(state_dict, **options)
    model = conversion_spa3_vlm.convert_original_spa3_vlm(state_dict, vlm_config, encoder_config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("converted %d tensors, %.1f M parameters", len(state_dict), num_parameters / 1e6)
    if not has_encoder:
        logger.warning("the checkpoint has no spatial encoder: what is converted reads spatial_latents that are given")
    compare(conversion_spa3_vlm.compare_with_release, model, reference)
    if (folder_of(checkpoint) / GENERATION_CONFIG_NAME).is_file():
        model.vlm.generation_config = GenerationConfig.from_pretrained(folder_of(checkpoint))
    if base_vlm is not None:
        name_base_vlm(model, base_vlm)
    logger.info("adapter: %s", json.dumps(model.adapter_config.to_dict()))
    return model


def compare(comparison: Callable[..., dict[str, float]], model: Any, reference: Path | None) -> None:
    if reference is None:
        logger.warning("no --reference: nothing shows that this model computes what the original does")
        return
    for name, difference in comparison(model, load_file(reference)).items():
        logger.info("agrees with the reference: %s (largest difference %.2g)", name, difference)


def name_base_vlm(model: Spa3VLM, base_vlm: str) -> None:
    """Let the adapter name the base VLM, not a copy beside it, if its weights are those of the checkpoint."""
    base = AutoModelForImageTextToText.from_pretrained(base_vlm, dtype=model.vlm.dtype)
    weights, own = base.state_dict(), model.vlm.state_dict()
    if weights.keys() == own.keys() and all(torch.equal(value, own[key]) for key, value in weights.items()):
        model.adapter_config.base_model_name_or_path = base_vlm
        model.adapter_config.base_model_revision = revision_of(base)
        logger.info("the VLM has the weights of %s, which the adapter names", base_vlm)
    else:
        logger.info("the VLM has other weights than %s: it was trained, and is saved as well", base_vlm)


def image_processor_of(backbone: Spa3RVGGTConfig) -> Spa3RImageProcessor:
    return Spa3RImageProcessor(size=backbone.image_size, patch_size=backbone.patch_size)


def processor_of(model: Spa3VLM, checkpoint: Path, base_vlm: str | None) -> Spa3VLMProcessor | None:
    """The processor, with the VLM's parts from the checkpoint's folder or from the base VLM, as far as they exist."""
    folder = folder_of(checkpoint)
    source = str(folder) if (folder / "tokenizer_config.json").is_file() else base_vlm
    if source is None:
        logger.warning("there is no tokenizer in %s, so that no processor is saved; see --base_vlm", folder)
        return None
    spatial = None
    if model.spatial_encoder is not None:
        spatial = image_processor_of(model.spatial_encoder.config.backbone_config)
    return Spa3VLMProcessor.from_vlm(source, spatial)


def save_spa3_vlm(model: Spa3VLM, processor: Spa3VLMProcessor | None, folder: Path) -> None:
    """Adapter, spatial encoder and, if it has no home elsewhere, VLM, each with its processor."""
    model.save_pretrained(folder)
    if model.spatial_encoder is not None:
        spatial = image_processor_of(model.spatial_encoder.config.backbone_config)
        spatial.save_pretrained(folder / SPATIAL_ENCODER_FOLDER)
    if processor is not None:
        processor.save_pretrained(folder)
        if (folder / VLM_FOLDER).is_dir():
            processor.vlm_processor.save_pretrained(folder / VLM_FOLDER)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted([*CONVERTERS, "spa3_vlm"]), required=True)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help=".safetensors, a pickle of tensors, or a folder of either"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings that shapes cannot tell")
    parser.add_argument("--reference", type=Path, help="input.* and output.* of the original, .safetensors")
    parser.add_argument(
        "--base_vlm",
        metavar="NAME",
        help="the VLM that a Spa3-VLM was made of, folder or Hub repo: where the checkpoint has no config.json or no "
        "tokenizer, they are taken from there; and if its weights are the same, it is named, not saved again",
    )
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the folder to this repository")
    args = parser.parse_args(arguments)
    if args.base_vlm and args.kind != "spa3_vlm":
        parser.error(f"--base_vlm is for --kind spa3_vlm; this is {args.kind}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    try:
        options = parse_settings(args.set)
        if args.kind == "spa3_vlm":
            spa3_vlm = convert_spa3_vlm(args.checkpoint, options, args.reference, args.base_vlm)
            processor = processor_of(spa3_vlm, args.checkpoint, args.base_vlm)
        else:
            model = convert(args.kind, args.checkpoint, options, args.reference)
    except (OSError, StrictDataclassError, TypeError, ValueError) as error:
        logger.error("nothing is saved: %s", error)
        sys.exit(1)

    if args.kind == "spa3_vlm":
        save_spa3_vlm(spa3_vlm, processor, args.output_dir)
    else:
        model.save_pretrained(args.output_dir)
        if args.kind != "dinov3":
            backbone: Any = getattr(model.config, "backbone_config", model.config)
            image_processor_of(backbone).save_pretrained(args.output_dir)
    logger.info("saved to %s", args.output_dir)
    if args.push_to_hub:
        api = HfApi()
        api.create_repo(args.push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=args.push_to_hub, folder_path=args.output_dir)
        logger.info("uploaded to %s", args.push_to_hub)


if __name__ == "__main__":
    main()
