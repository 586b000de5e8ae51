"""Model cards, made from the files of a run: every number in a card is in one of them."""

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from .configuration_enn import FIELDS_OF_LAYER_TYPES, EnnConfig, memory_layers

PICTURE = "trace.png"
RUN_FILES = ("run.json", "all_results.json", "trainer_state.json", PICTURE)
TASKS = {
    "EnnForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "EnnForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "EnnForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "EnnModel": ("feature-extraction", "AutoModel"),
}
TRAINING_FIELDS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
)
# What the Trainer writes beside the scores of a split.
NOT_SCORES = {"runtime", "samples_per_second", "steps_per_second", "samples"}
LOGGED_ROWS = 10


@dataclass(frozen=True)
class DataSource:
    """A data set that a model was trained or evaluated on.

    Attributes:
        name: what it is called.
        license: its licence, or what else allows its use.
        hub_id: its id on the Hub, if it is there.
        config: the configuration of it that was used.
    """

    name: str
    license: str | None = None
    hub_id: str | None = None
    config: str | None = None


@dataclass
class TrainingRun:
    """What a card says about a training run that no other of its files does; kept beside the weights as run.json.

    Attributes:
        name: the model's name, `"user/name"` where it is on the Hub.
        description: a sentence or two on what the model is.
        intended_use: what it is good for, and what not.
        license: licence of the weights, as the Hub abbreviates it ("apache-2.0").
        language: code of the text's language ("en"), or several.
        data: what it was trained on; scores are reported on the first.
        command: the command that made it.
        arguments: the options of the run that matter.
        hardware: the machine.
        versions: versions of the packages.
    """

    name: str | None = None
    description: str | None = None
    intended_use: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    data: list[DataSource] = field(default_factory=list)
    command: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    hardware: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def on_this_machine(cls, args: TrainingArguments | None = None, **kwargs: Any) -> "TrainingRun":
        """A run with the hardware and versions of this process, and the options in `args` that change what is learned.

        `kwargs` are further attributes; `arguments` among them are added to those of `args`.
        """
        options = {} if args is None else args.to_dict()
        if options.get("max_steps", -1) > 0:
            del options["num_train_epochs"]  # max_steps overrides it
        given = {name: options[name] for name in TRAINING_FIELDS if options.get(name) not in (None, -1)}
        arguments = {name: value for name, value in given.items() if value is not False}  # but 0: it says something
        return cls(
            arguments={**kwargs.pop("arguments", {}), **arguments}, hardware=hardware(), versions=versions(), **kwargs
        )

    def save(self, folder: Path) -> None:
        """Write run.json."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / "run.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TrainingRun":
        """Read run.json; a run of which nothing is known if it is not there.

        Raises:
            ValueError: the file has fields that a run does not have.
        """
        path = folder / "run.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(content) - set(known))
        if unknown:
            raise ValueError(f"{path} has the unknown fields {unknown}; allowed: {known}.")
        return cls(**{**content, "data": [DataSource(**source) for source in content.get("data", [])]})


def hardware() -> str:
    """This machine's processor and the cores this process may use, and its GPUs."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"]
    parts += [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return "; ".join(parts)


def versions() -> dict[str, str]:
    """Versions of what computed the model."""
    return {name: metadata.version(name) for name in ("hf-engram", "torch", "transformers")}


def write_card(folder: str | Path, name: str | None = None) -> None:
    """Write README.md from config.json, the weights' header and, where they are, the run's files in `folder`.

    Args:
        folder: a folder with a model.
        name: the model's name if run.json has none; defaults to the folder's.

    Raises:
        FileNotFoundError: there is no config.json, or no weights.
        ValueError: it is not a model of this package, or run.json has unknown fields.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run, results = TrainingRun.load(folder), read_results(folder)
    [architecture] = config.get("architectures") or ["model of an unknown class"]
    if architecture not in TASKS:
        raise ValueError(f"{folder} holds a {architecture}; allowed: {', '.join(TASKS)}.")
    task, auto_class = TASKS[architecture]
    name = run.name or name or folder.resolve().name
    scores = find_scores(results)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": format_number, "words": describe_metric}
    layer_types = config["layer_types"]
    memories = memory_layers(layer_types)
    template = resources.files(__package__).joinpath("templates/model_card.md.jinja").read_text(encoding="utf-8")
    card = ModelCard(
        environment.from_string(template).render(
            metadata=card_metadata(name.rpartition("/")[2], task, bool(memories), run, scores).to_yaml(),
            name=name,
            title=name.rpartition("/")[2],
            run=run,
            task=task,
            auto_class=auto_class,
            config=config,
            layer_types=layer_types,
            memory_layer=memories[0] if memories else None,
            settings=describe_settings(config),
            parameters=count_parameters(folder),
            results=results,
            scores=scores,
            progress=read_progress(folder),
            picture=PICTURE if (folder / PICTURE).is_file() else None,
        )
    )
    (folder / "README.md").write_text(str(card).strip() + "\n", encoding="utf-8")


def card_metadata(
    title: str, task: str, has_memory: bool, run: TrainingRun, scores: list[tuple[str, str, float]]
) -> ModelCardData:
    """The card's head: what the Hub searches by, and the scores as a model-index."""
    data = run.data[0] if run.data else None
    evaluations = [
        EvalResult(
            task_type=task,
            dataset_type=data.hub_id or re.sub(r"[^\w.-]+", "-", data.name.lower()).strip("-"),
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=split,
            metric_type="perplexity" if metric.endswith("perplexity") else metric,
            metric_name=describe_metric(metric),
            metric_value=value,
        )
        for split, metric, value in scores
        if data is not None
    ]
    return ModelCardData(
        language=run.language,
        license=run.license,
        library_name="transformers",
        pipeline_tag=task,
        tags=["enn", "engram", "recurrent", "hebbian-memory"] if has_memory else ["enn", "transformer"],
        datasets=[source.hub_id for source in run.data if source.hub_id] or None,
        model_name=title if evaluations else None,
        eval_results=evaluations or None,
    )


def read_results(folder: Path) -> dict[str, Any]:
    """all_results.json, as `Trainer.save_metrics` writes it."""
    path = folder / "all_results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def find_scores(results: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Split, metric and value of what was measured on held-out data, texts read in order as a whole."""
    found = [
        (split, name.removeprefix(f"{split}_"), results[name])
        for split in ("eval", "validation", "test")
        for name in sorted(results)
        if name.startswith(f"{split}_") and not name.startswith(f"{split}_restarted_")
    ]
    return [score for score in found if score[1] not in NOT_SCORES]


def describe_metric(metric: str) -> str:
    """A metric in words."""
    words = {"perplexity": "perplexity per token", "word_perplexity": "perplexity per word"}
    return words.get(metric, metric.replace("_", " "))


def describe_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes and the plasticity, and every other field that the layers read and that is not the default."""
    default, layer_types = EnnConfig(), set(config["layer_types"])
    always = ("num_hidden_layers", "hidden_size", "memory_size", "vocab_size", "hebbian_lr", "trace_scope")
    always += ("num_attention_heads", "intermediate_size", "conv_kernel", "sliding_window")
    unused = {name for types, names in FIELDS_OF_LAYER_TYPES.items() if not layer_types & set(types) for name in names}
    implied = {"layer_types", "integrator_size", "embedding_size", "bos_token_id", "eos_token_id", "pad_token_id"}
    others = [name for name in EnnConfig.__annotations__ if name in config and name not in {*always, *implied}]
    types = {} if layer_types == {"engram"} else {"layer_types": ", ".join(config["layer_types"])}
    return types | {
        name: config[name]
        for name in (*always, *others)
        if name not in unused
        and config.get(name) is not None
        and (name in always or config[name] != getattr(default, name))
    }


def count_parameters(folder: Path) -> int:
    """Numbers in the weight files; tied weights are there once."""
    total = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            total += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())  # noqa: SIM118
    if not total:
        raise FileNotFoundError(f"{folder} has no model.safetensors to describe.")
    return total


def read_progress(folder: Path) -> list[dict[str, Any]]:
    """At most `LOGGED_ROWS` evaluations of the Trainer's log, first and last among them, with the training loss."""
    path = folder / "trainer_state.json"
    history = json.loads(path.read_text(encoding="utf-8"))["log_history"] if path.is_file() else []
    rows, loss = [], None
    for entry in history:
        loss = entry.get("loss", loss)
        if "eval_loss" in entry:
            rows.append({"step": entry["step"], "epoch": entry["epoch"], "loss": loss, "eval_loss": entry["eval_loss"]})
    kept = {round(index * (len(rows) - 1) / (LOGGED_ROWS - 1)) for index in range(LOGGED_ROWS)}
    return [row for index, row in enumerate(rows) if len(rows) <= LOGGED_ROWS or index in kept]


def format_number(value: Any) -> str:
    """A number for reading: thousands separated, four digits; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "not recorded" if value is None else str(value)
    if isinstance(value, float) and abs(value) < 1e4:
        return f"{value:,.4g}"
    return f"{round(value):,}"


def draw_trace(
    model: PreTrainedModel, example: Mapping[str, Tensor], folder: Path, processing_class: Any = None
) -> None:
    """Draw what the first layer's memory does while `model` reads the first row of `example`, for the card.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Recordings and figures are optional: a card does without them.
    from .plots import plot_layer
    from .traces import record

    training = model.training
    inputs = {name: value[:1].to(model.device) for name, value in example.items()}
    tokenizer = processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None
    try:
        [recording] = record(model.eval(), tokenizer=tokenizer, **inputs)
    finally:
        model.train(training)
    plot_layer(recording.layers[0]).savefig(folder / PICTURE, dpi=80)


def name_in_card(folder: Path, repo_id: str) -> None:
    """Make the card's examples load `repo_id`."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r'from_pretrained\("[^"]*"', f'from_pretrained("{repo_id}"', text), encoding="utf-8")
