"""Engram Neural Networks for Hugging Face transformers.

The Engram Neural Network of Szelogowski (arXiv 2507.21474): a recurrent network with an explicit memory.
Importing this package registers its models with the Auto classes of transformers.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from .cache_enn import as_new_sequence
from .configuration_enn import EnnConfig
from .image_processing_enn import EnnImageProcessor
from .memory_files import load_memory, save_memory
from .modeling_enn import EnnForCausalLM, EnnForImageClassification, EnnForSequenceClassification, EnnModel

__version__ = "0.1.0"
__all__ = [
    "EnnConfig",
    "EnnForCausalLM",
    "EnnForImageClassification",
    "EnnForSequenceClassification",
    "EnnImageProcessor",
    "EnnModel",
    "as_new_sequence",
    "load_memory",
    "save_memory",
]

AutoConfig.register("enn", EnnConfig, exist_ok=True)
AutoModel.register(EnnConfig, EnnModel, exist_ok=True)
AutoModelForCausalLM.register(EnnConfig, EnnForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(EnnConfig, EnnForSequenceClassification, exist_ok=True)
AutoModelForImageClassification.register(EnnConfig, EnnForImageClassification, exist_ok=True)
AutoImageProcessor.register(EnnConfig, image_processor_classes={"pil": EnnImageProcessor}, exist_ok=True)
