"""What a model's folder needs to open anywhere: code, config entries and files, and the checks that they are there."""

import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedConfig, logging
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

from . import open_folder as clean_process
from .configuration_enn import EnnConfig
from .image_processing_enn import EnnImageProcessor
from .modeling_enn import EnnForCausalLM, EnnForImageClassification, EnnForSequenceClassification, EnnModel

MODEL_CLASSES = {
    "AutoModel": EnnModel,
    "AutoModelForCausalLM": EnnForCausalLM,
    "AutoModelForSequenceClassification": EnnForSequenceClassification,
    "AutoModelForImageClassification": EnnForImageClassification,
}
# What everyone who opens a model with transformers has. Anything else may be imported inside `try:` only.
PACKAGES = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


class FolderError(ValueError):
    """A folder that others could not open, with all that is wrong with it."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n- ".join([f"{folder} is not ready for the Hub:", *problems]))


def reference(cls: type) -> str:
    """A class as `auto_map` names it: file and class, `modeling_enn.EnnModel`."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """The entries of config.json for `trust_remote_code`: every model class that accepts the config."""
    entries = {"AutoConfig": reference(EnnConfig)}
    for name, model_class in MODEL_CLASSES.items():
        try:
            with torch.device("meta"):
                model_class(copy.deepcopy(config))
        except ValueError:
            continue
        entries[name] = reference(model_class)
    return entries


def copy_code(folder: Path) -> None:
    """Put the modules that the models and the image processor need into `folder`, found as transformers finds them."""
    for cls in (EnnModel, EnnImageProcessor):
        entry = inspect.getfile(cls)
        for module in (entry, *get_relative_import_files(entry)):
            shutil.copyfile(module, folder / Path(module).name)


def finish_configs(folder: Path, entries: dict[str, str]) -> None:
    """Name the code in the saved configs, and undo what training leaves in them."""
    rewrite_json(folder / "config.json", auto_map=entries, use_cache=True)
    if (folder / "generation_config.json").is_file():
        rewrite_json(folder / "generation_config.json", use_cache=True)
    processor = read_json(folder / "preprocessor_config.json")
    if processor.get("image_processor_type") == EnnImageProcessor.__name__:
        name = {"AutoImageProcessor": reference(EnnImageProcessor)}
        rewrite_json(folder / "preprocessor_config.json", auto_map=name)


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def rewrite_json(path: Path, **values: Any) -> None:
    """Set `values` in a JSON file."""
    content = {**read_json(path), **values}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def find_problems(folder: Path) -> list[str]:
    """All that is missing from `folder`, in words; nothing is run."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != EnnConfig.model_type:
        return [f"config.json is missing, or its model_type is not {EnnConfig.model_type!r}"]
    problems = []
    if not config.get("use_cache"):
        problems.append("config.json has use_cache false, so that the model would return no state")
    problems += code_problems(folder, config) + weight_problems(folder)
    if config.get("image_sequence") is not None and not (folder / "preprocessor_config.json").is_file():
        problems.append("preprocessor_config.json is missing: an image model needs its EnnImageProcessor")
    if config.get("vocab_size") is not None and not (folder / "tokenizer_config.json").is_file():
        problems.append("tokenizer_config.json is missing: a model with a vocabulary needs its tokenizer")
    return problems + card_problems(folder)


def code_problems(folder: Path, config: dict[str, Any]) -> list[str]:
    """Entries of `auto_map` without code, and code that needs what a user may not have."""
    missing = {"AutoConfig", "AutoModel"} - config.get("auto_map", {}).keys()
    if missing:
        return [f"auto_map in config.json lacks {sorted(missing)}"]
    processor = read_json(folder / "preprocessor_config.json")
    entries = (config["auto_map"] | processor.get("auto_map", {})).values()
    modules = sorted({entry.split(".")[0] for entry in entries})
    problems = []
    for module in modules:  # grows while it is read
        file = folder / f"{module}.py"
        if not file.is_file():
            problems.append(f"{file.name} is missing, which the model's code imports")
            continue
        modules += [name for name in sorted(get_relative_imports(file)) if name not in modules]
        unusual = set(get_imports(file)) - PACKAGES - set(sys.stdlib_module_names)
        if unusual:
            problems.append(f"{file.name} imports {sorted(unusual)} outside of `try`, which not everyone has")
    return problems


def weight_problems(folder: Path) -> list[str]:
    """Weights that are missing, cut off or pickled."""
    index = read_json(folder / WEIGHTS_INDEX)
    names = [WEIGHTS] if (folder / WEIGHTS).is_file() or not index else sorted(set(index["weight_map"].values()))
    problems = []
    for name in names:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except FileNotFoundError:
            pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
            hint = f"; {', '.join(pickles)} will not do, weights are shared as safetensors only" if pickles else ""
            problems.append(f"{name} is missing{hint}")
        except SafetensorError as error:
            problems.append(f"{name} is damaged: {error}")
    return problems


def card_problems(folder: Path) -> list[str]:
    """A card that is missing, whose metadata are not valid, or that shows pictures which are not there."""
    if not (folder / "README.md").is_file():
        return ["README.md, the card, is missing"]
    try:
        card = ModelCard.load(folder / "README.md")
    except ValueError as error:
        return [f"README.md: {error}"]
    problems = [] if card.data.to_dict() else ["README.md has no metadata between lines of ---"]
    pictures = [part.split(")")[0] for part in card.text.split("](")[1:]]
    return problems + [
        f"README.md refers to {name}, which is missing"
        for name in pictures
        if "://" not in name and not name.startswith("#") and not (folder / name).is_file()
    ]


def check_folder(folder: str | Path) -> None:
    """Make sure that others can open `folder`: that it is complete, and that it answers the same everywhere.

    Opens it in a clean process (hf_engram out of reach, empty caches, no network) with every Auto class that it names,
    and compares the answers to a fixed input with those of the installed package, bit for bit.

    Raises:
        FolderError: something is missing or differs; nothing is left unsaid.
    """
    folder = Path(folder).resolve()
    problems = find_problems(folder)
    if problems:
        raise FolderError(folder, problems)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that some heads have no weights yet is no news here
    try:
        with torch.random.fork_rng(devices=[]):
            ours = clean_process.open_folder(folder, remote_code=False)
    finally:
        logging.set_verbosity(verbosity)
    theirs = answers_of_a_clean_process(folder)
    differing = sorted(name for name in ours.keys() | theirs.keys() if not torch.equal(ours[name], theirs[name]))
    if differing:
        message = "answers with its own code otherwise than with the installed hf_engram"
        raise FolderError(folder, [f"{name} {message}" for name in differing])


def answers_of_a_clean_process(folder: Path) -> dict[str, torch.Tensor]:
    """What `folder` answers where nothing but transformers is installed."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))},
            **{name: value for name, value in os.environ.items() if name.startswith("HF_ENGRAM_")},
            "HF_HOME": scratch,
            "HF_HUB_OFFLINE": "1",
        }
        answers = Path(scratch, "answers.safetensors")
        script = inspect.getfile(clean_process)
        command = [sys.executable, "-P", script, str(folder), str(answers), str(torch.get_num_threads())]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise FolderError(folder, [f"a clean process cannot open it:\n{done.stderr.strip()}"])
        return load_file(answers)
