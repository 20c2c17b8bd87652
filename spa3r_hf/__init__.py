"""
Spa3R: spatial latents from unposed pictures, as Hugging Face models.

Importing the package registers its configurations, models and image processor with the Auto classes of `transformers`.
(The Auto classes import torch themselves, so there is no lighter way to be known to them.)
"""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor

# `transformers` itself hides this class where torchvision is missing (5.17), although it works without.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_spa3_vlm import Spa3AdapterConfig
from .configuration_spa3r import Spa3RConfig
from .configuration_spa3r_vggt import Spa3RVGGTConfig
from .image_processing_spa3r import Spa3RImageProcessor
from .modeling_spa3_vlm import Spa3VLM, get_spa3_vlm
from .modeling_spa3r import Spa3RForPreTraining, Spa3RModel
from .modeling_spa3r_vggt import Spa3RVGGTModel
from .processing_spa3_vlm import Spa3VLMProcessor


__version__ = "0.1.0"
__all__ = [
    "Spa3AdapterConfig",
    "Spa3RConfig",
    "Spa3RForPreTraining",
    "Spa3RImageProcessor",
    "Spa3RModel",
    "Spa3RVGGTConfig",
    "Spa3RVGGTModel",
    "Spa3VLM",
    "Spa3VLMProcessor",
    "get_spa3_vlm",
]

AutoConfig.register("spa3r_vggt", Spa3RVGGTConfig)
AutoConfig.register("spa3r", Spa3RConfig)
AutoModel.register(Spa3RVGGTConfig, Spa3RVGGTModel)
AutoModel.register(Spa3RConfig, Spa3RModel)
AutoModelForPreTraining.register(Spa3RConfig, Spa3RForPreTraining)
AutoImageProcessor.register(Spa3RConfig, Spa3RImageProcessor)
AutoProcessor.register(Spa3AdapterConfig, Spa3VLMProcessor)

# A saved folder carries the code of its classes: it loads with `trust_remote_code` where the package is absent.
Spa3RVGGTConfig.register_for_auto_class()
Spa3RConfig.register_for_auto_class()
Spa3RVGGTModel.register_for_auto_class("AutoModel")
Spa3RModel.register_for_auto_class("AutoModel")
Spa3RForPreTraining.register_for_auto_class("AutoModelForPreTraining")
Spa3RImageProcessor.register_for_auto_class("AutoImageProcessor")
Spa3VLMProcessor.register_for_auto_class("AutoProcessor")
