"""Open a model's folder with every Auto class it names, and see what the models answer.

As a command this is what someone without hf_engram does:

    python open_folder.py FOLDER ANSWERS.safetensors

It takes the code from the folder (`trust_remote_code=True`), refuses to see an installed hf_engram, and writes the
answers to a file. `hf_engram.hub` compares them with those of the installed package, bit for bit.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel

TEXT = "What was written long ago fades: 1, 2, 3. Ελλάδα 引擎"
STEPS = 24
SEED = 0


def open_folder(folder: Path, remote_code: bool) -> dict[str, Tensor]:
    """Open the config, tokenizer, image processor and every model class of `folder`.

    Args:
        folder: a local folder whose config.json has an `auto_map`.
        remote_code: run the code of the folder, not that of an installed hf_engram.

    Returns:
        for each Auto class the answer to a fixed input: token ids, pixel values, or the first tensor of the model's
        output. Heads that the folder has no weights for are initialised from a fixed seed.

    Raises:
        ValueError: the class that was saved lacks weights, or another class than expected was opened.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    answers = {}
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
        answers["AutoTokenizer"] = torch.tensor(tokenizer(TEXT)["input_ids"])
    if (folder / "preprocessor_config.json").is_file():
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=remote_code)
        answers["AutoImageProcessor"] = processor(gradient_image(config), return_tensors="pt")["pixel_values"]
    for name in sorted(set(config.auto_map) & set(dir(transformers)) - {"AutoConfig", "AutoImageProcessor"}):
        torch.manual_seed(SEED)
        model, report = getattr(transformers, name).from_pretrained(
            folder, trust_remote_code=remote_code, output_loading_info=True
        )
        if type(model).__module__.startswith("transformers_modules") is not remote_code:
            raise ValueError(f"{name} opened {type(model).__module__}.{type(model).__name__}, which is other code.")
        if type(model).__name__ in config.architectures and any(report.values()):
            raise ValueError(f"The weights are not those of {type(model).__name__}: {report}.")
        with torch.no_grad():
            output = model(**example_inputs(model))
        answers[name] = output.logits if "logits" in output else output.last_hidden_state
    return {name: answer.contiguous() for name, answer in answers.items()}


def gradient_image(config: PreTrainedConfig) -> Tensor:
    """A grey image `[3, 40, 40]` of bytes, larger than what most models read."""
    row = torch.arange(40, dtype=torch.uint8) * 6
    return torch.stack([row + column for column in row]).expand(3, -1, -1)


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A fixed batch of one, of the kind that the model reads first."""
    config, generator = model.config, torch.Generator().manual_seed(SEED)
    if model.main_input_name == "pixel_values":
        size = (1, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.rand(size, generator=generator)}
    if config.vocab_size is None:
        features = torch.rand((1, STEPS, config.embedding_size), generator=generator)
        return {"inputs_embeds": features.to(model.dtype)}
    return {"input_ids": torch.randint(config.vocab_size, (1, STEPS), generator=generator)}


if __name__ == "__main__":
    sys.modules["hf_engram"] = None  # any import of it fails from here on
    torch.set_num_threads(int(sys.argv[3]))
    transformers.logging.set_verbosity_error()
    save_file(open_folder(Path(sys.argv[1]), remote_code=True), sys.argv[2])
