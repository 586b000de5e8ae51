"""Weights come from safetensors files: opening a model never runs what a pickle says."""

import os
from typing import Any

from transformers.utils.hub import has_file

PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
REFUSAL = """{path} holds pickled weights ({file}). Opening a pickle can run any code; ENN models load safetensors only.
If you trust the file, convert it once, in a folder that also holds its config.json:

    import hf_engram  # registers the models
    import torch
    from transformers import AutoConfig, {auto_class}
    model = {auto_class}.from_config(AutoConfig.from_pretrained("folder"))
    model.load_state_dict(torch.load("folder/pytorch_model.bin", weights_only=True))
    model.save_pretrained("folder")
"""
AUTO_CLASSES = {
    "EnnForCausalLM": "AutoModelForCausalLM",
    "EnnForSequenceClassification": "AutoModelForSequenceClassification",
    "EnnForImageClassification": "AutoModelForImageClassification",
}


class SafetensorsOnly:
    """A `from_pretrained` that reads safetensors, for classes derived from `PreTrainedModel`."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> "SafetensorsOnly":
        """As `PreTrainedModel.from_pretrained`, from safetensors files.

        Raises:
            ValueError: `use_safetensors` is false.
            OSError: there are no weights, or pickled ones; the message says how to convert them.
        """
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("`use_safetensors` is False; allowed: True. ENN models load no pickles.")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)
        except OSError as error:
            pickled = find_pickled_weights(pretrained_model_name_or_path, **kwargs)
            if pickled is None:
                raise
            auto_class = AUTO_CLASSES.get(cls.__name__, "AutoModel")
            message = REFUSAL.format(path=pretrained_model_name_or_path, file=pickled, auto_class=auto_class)
            raise OSError(message) from error


def find_pickled_weights(path: str | os.PathLike, subfolder: str = "", **kwargs: Any) -> str | None:
    """The file of pickled weights in a folder or repository, if there is one."""
    where = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
    for name in PICKLED_WEIGHTS:
        file = f"{subfolder}/{name}" if subfolder else name
        try:
            if has_file(path, file, **where):
                return file
        except (OSError, ValueError):  # the path, and not its weights, is what is wrong
            return None
    return None
