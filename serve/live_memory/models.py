"""Checkpoints: which ones a visitor may choose, and the ones that are loaded."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from hf_engram.configuration_enn import ATTENTION_LAYER_TYPES, memory_layers


class ModelChoice(NamedTuple):
    """A checkpoint.

    Attributes:
        name: folder, or id on the Hugging Face Hub.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run Python code that comes with the checkpoint.
    """

    name: str
    revision: str = "main"
    trust_remote_code: bool = False

    @property
    def is_local(self) -> bool:
        """Whether the name is a folder's."""
        return Path(self.name).is_dir() or self.name.startswith((".", "/", "~"))


class LoadedModel(NamedTuple):
    """A checkpoint in memory.

    Attributes:
        choice: what it was loaded from.
        model: in evaluation mode.
        processor: its tokenizer, or its image processor.
        reads: "text" or "image".
    """

    choice: ModelChoice
    model: PreTrainedModel
    processor: Any
    reads: str

    def describe(self) -> str:
        """One line about it."""
        config = self.model.config
        layers = "1 layer" if config.num_hidden_layers == 1 else f"{config.num_hidden_layers} layers"
        types = config.layer_types
        parts = [f"{self.model.num_parameters():,} parameters", layers]
        if "engram" in types:
            parts.append(f"{config.memory_size} slots of {config.hidden_size} features")
        if "engram_mixer" in types:
            heads = config.num_attention_heads
            parts.append(f"{config.memory_size} slots of {config.head_dim} features in each of {heads} heads")
        attention = sum(layer_type in ATTENTION_LAYER_TYPES for layer_type in types)
        if attention:
            parts.append(f"{attention} of them attention, which is not shown")
        return ", ".join(parts)


def load_model(choice: ModelChoice) -> LoadedModel:
    """Load a checkpoint from safetensors files; a folder is loaded without asking the Hub for anything.

    Raises:
        ValueError: it cannot be had, or is not one whose memory this page can show; the message is a sentence.
    """
    options: dict[str, Any] = {"trust_remote_code": choice.trust_remote_code, "local_files_only": choice.is_local}
    if not choice.is_local:
        options["revision"] = choice.revision
    try:
        config = AutoConfig.from_pretrained(choice.name, **options)
        if config.model_type != "enn":
            raise ValueError(f"it is a {config.model_type!r} model, and this page shows the memory of 'enn' models.")
        if not memory_layers(config.layer_types):
            raise ValueError("all of its layers are attention: it has no memory that this page could show.")
        architecture = (config.architectures or ["none"])[0]
        if architecture == "EnnForCausalLM":
            processor = AutoTokenizer.from_pretrained(choice.name, **options)
            model_class, reads = AutoModelForCausalLM, "text"
        elif architecture == "EnnForImageClassification":
            processor = AutoImageProcessor.from_pretrained(choice.name, **options)
            model_class, reads = AutoModelForImageClassification, "image"
        else:
            raise ValueError(
                f"its architecture is {architecture!r}; this page shows language models and image classifiers."
            )
        model = model_class.from_pretrained(choice.name, use_safetensors=True, **options).eval()
    except Exception as error:  # remote code may raise anything
        if "trust_remote_code" in str(error) and not choice.trust_remote_code:
            reason = "it comes with Python code of its own, which is run only if you tick that you trust its author."
        else:
            reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{choice.name!r} was not loaded: {reason}") from error
    return LoadedModel(choice, model, processor, reads)


class ModelShelf:
    """The page's own checkpoints, and others that are loaded; the one unused for longest makes room for a new one.

    Args:
        own: what is watched at first, a model for texts at least; they stay.
        capacity: how many others.
        folders: where visitors may load checkpoints from. Paths outside are refused.
        allow_remote_code: visitors may choose to run code that comes with a checkpoint.
    """

    def __init__(
        self,
        own: Sequence[LoadedModel],
        capacity: int,
        folders: Sequence[Path] = (),
        allow_remote_code: bool = False,
    ) -> None:
        self.own = {loaded.reads: loaded for loaded in own}
        self.capacity = capacity
        self.folders = [folder.resolve() for folder in folders]
        self.allow_remote_code = allow_remote_code
        self._loaded: OrderedDict[ModelChoice, LoadedModel] = OrderedDict()
        self._lock = threading.Lock()  # never held while a model is loaded, which may take minutes
        # Of the choices that are being looked up, so that two visitors who choose the same model load it once.
        self._choice_locks: weakref.WeakValueDictionary[ModelChoice, threading.Lock] = weakref.WeakValueDictionary()

    def watched(self, choices: dict[str, ModelChoice], reads: str) -> LoadedModel:
        """The model that reads texts or images for a visitor: what they chose, or the page's own.

        Raises:
            ValueError: it cannot be loaded, or there is none.
        """
        if reads in choices:
            return self.get(choices[reads])
        if reads not in self.own:
            raise ValueError(f"There is no model for {reads}s here: choose one first.")
        return self.own[reads]

    def get(self, choice: ModelChoice) -> LoadedModel:
        """The model of a choice that has been checked before.

        Raises:
            ValueError: it cannot be loaded.
        """
        for loaded in self.own.values():
            if loaded.choice == choice:
                return loaded
        with self._lock:
            choice_lock = self._choice_locks.setdefault(choice, threading.Lock())
        with choice_lock:
            with self._lock:
                found = self._loaded.get(choice)
            found = found or load_model(choice)
            with self._lock:
                self._loaded[choice] = found
                self._loaded.move_to_end(choice)
                while len(self._loaded) > self.capacity:
                    self._loaded.popitem(last=False)
        return found

    def check(self, name: str, revision: str, trust_remote_code: bool) -> ModelChoice:
        """What a visitor typed, as a choice.

        Raises:
            ValueError: it is not allowed; the message says why.
        """
        choice = ModelChoice(name.strip(), revision.strip() or "main", trust_remote_code)
        if not choice.name:
            raise ValueError("Write the id of a model on the Hugging Face Hub, or the path of a checkpoint folder.")
        if trust_remote_code and not self.allow_remote_code:
            raise ValueError("This server does not run code that comes with a model.")
        if choice.is_local:
            path = Path(choice.name).resolve()
            if not any(path.is_relative_to(folder) for folder in self.folders):
                raise ValueError(f"{choice.name!r} is outside the folders that this page may read checkpoints from.")
            return choice
        try:
            validate_repo_id(choice.name)
        except HFValidationError as error:
            raise ValueError(
                f"{choice.name!r} is neither a model id (user/name) nor a checkpoint folder here."
            ) from error
        return choice
