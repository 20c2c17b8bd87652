"""
Convert an original checkpoint (the Spa3R release, VGGT-1B or DINOv3) to a folder that `from_pretrained` loads.

Smoke: python training/convert_spa3r.py --kind spa3r --checkpoint tests/fixtures/spa3r_reference_rmsnorm.safetensors \
           --reference tests/fixtures/spa3r_reference_rmsnorm.safetensors --output_dir /tmp/spa3r-tiny
Real:  python training/convert_spa3r.py --kind spa3r --checkpoint spa3r.ckpt --output_dir outputs/spa3r \
           --reference numbers_of_the_release.safetensors --push_to_hub org/spa3r
"""

import argparse
import json
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from spa3r_hf import Spa3RImageProcessor, conversion_spa3r


logger = logging.getLogger("convert_spa3r")
CONVERTERS: dict[str, tuple[Callable[..., Any], Callable[..., PreTrainedModel]]] = {
    "spa3r": (conversion_spa3r.infer_spa3r_config, conversion_spa3r.convert_original_spa3r),
    "vggt": (conversion_spa3r.infer_vggt_config, conversion_spa3r.convert_original_vggt),
    "dinov3": (conversion_spa3r.infer_dinov3_config, conversion_spa3r.convert_original_dinov3),
}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """
    State dict of a safetensors file or a pickle. In a pickle it may lie under `state_dict` or `model`; in a reference
    file it lies beside inputs and outputs, under `weights.*`.

    Raises:
        ValueError: The file is absent or damaged, or holds more than tensors and plain containers, or no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            weights = {key.removeprefix("weights."): tensors[key] for key in tensors if key.startswith("weights.")}
            return weights or tensors
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is refused; expected safetensors or a pickle of tensors alone: {error}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict; expected tensors by name, bare, or under state_dict or model")
    return content


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
    state_dict = conversion_spa3r.strip_prefix(read_checkpoint(checkpoint))
    model = convert_original(state_dict, infer_config(state_dict, **options))
    logger.info("converted %d tensors, %.1f M parameters", len(state_dict), model.num_parameters() / 1e6)
    logger.info("configuration: %s", model.config.to_json_string())
    if reference is None:
        logger.warning("no --reference: nothing shows that this model computes what the original does")
    else:
        for name, difference in conversion_spa3r.compare_with_reference(model, load_file(reference)).items():
            logger.info("agrees with the reference: %s (largest difference %.2g)", name, difference)
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(CONVERTERS), required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help=".safetensors, or a pickle of tensors")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings that shapes cannot tell")
    parser.add_argument("--reference", type=Path, help="input.images and output.* of the original, .safetensors")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the folder to this repository")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    try:
        model = convert(args.kind, args.checkpoint, parse_settings(args.set), args.reference)
    except (OSError, StrictDataclassError, TypeError, ValueError) as error:
        logger.error("nothing is saved: %s", error)
        sys.exit(1)

    model.save_pretrained(args.output_dir)
    if args.kind != "dinov3":
        backbone = getattr(model.config, "backbone_config", model.config)
        Spa3RImageProcessor(size=backbone.image_size, patch_size=backbone.patch_size).save_pretrained(args.output_dir)
    logger.info("saved to %s", args.output_dir)
    if args.push_to_hub:
        api = HfApi()
        api.create_repo(args.push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=args.push_to_hub, folder_path=args.output_dir)
        logger.info("uploaded to %s", args.push_to_hub)


if __name__ == "__main__":
    main()
