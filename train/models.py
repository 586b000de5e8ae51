"""The model of a run: its architecture, and the width at which it has a given number of parameters."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_engram import EnnForCausalLM, EnnForImageClassification
from hf_engram.configuration_enn import FIELDS_OF_LAYER_TYPES

from .ablations import ABLATIONS, ablate
from .arguments import require
from .baselines import BASELINES, BaselineForCausalLM, BaselineForImageClassification

# Types of the layers, repeated until there are as many as the model has.
LAYER_TYPES = {
    "enn": ("engram",),
    "mixer": ("engram_mixer",),
    "hybrid": ("engram_mixer", "sliding_attention"),
    "transformer": ("sliding_attention",),
}
ARCHITECTURES = (*LAYER_TYPES, *BASELINES)
TOLERANCE = 0.02
BROADEST = 1 << 16
MODEL_CLASSES = {
    "language": (EnnForCausalLM, BaselineForCausalLM),
    "images": (EnnForImageClassification, BaselineForImageClassification),
}
ENN_ONLY = {name for names in FIELDS_OF_LAYER_TYPES.values() for name in names} - {"longest_timescale"}


@dataclass
class ModelArguments:
    """The model; what it shares with the text or the images it reads is set by them."""

    _argument_group_name = "model"

    architecture: str = field(
        default="enn",
        metadata={
            "help": "The layers: 'enn', the paper's cell; 'mixer', a memory that trains in parallel; 'hybrid', mixers "
            "and attention by turns; or a baseline between the same embeddings and head.",
            "choices": ARCHITECTURES,
        },
    )
    parameters: int | None = field(
        default=None,
        metadata={
            "help": "Choose the width so that the model has this many parameters, within 2 %%: integrator_size of "
            "an ENN that has one, else hidden_size (and intermediate_size where there is one). None: the widths below."
        },
    )
    count_embeddings: bool = field(
        default=True, metadata={"help": "Whether `parameters` counts token embeddings, which grow with the width, too."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of the hidden state and of every memory slot."})
    num_hidden_layers: int = field(default=1, metadata={"help": "Stacked layers."})
    residual: bool = field(
        default=False, metadata={"help": "Wrap each layer in a pre-norm block, as mixers and attention always are."}
    )
    layer_scale_init_value: float | None = field(
        default=None,
        metadata={
            "help": "ENN with residual: begin with what a layer adds scaled to this, about the size of the embeddings."
        },
    )
    hidden_dropout: float = field(default=0.1, metadata={"help": "Dropout on the output of every layer."})
    embedding_dropout: float = field(default=0.1, metadata={"help": "Dropout on the input of the first layer."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of embeddings and heads."})

    memory_size: int = field(
        default=64, metadata={"help": "ENN: slots of the bank and of the trace; mixer: the same, of every head."}
    )
    integrator: str = field(
        default="recurrent",
        metadata={
            "help": "ENN: 'recurrent', the paper's; 'gated', which moves the hidden state by a gated step; or 'gru'."
        },
    )
    integrator_size: int | None = field(
        default=None,
        metadata={"help": "ENN: width of the integrator's inner layer. None: the paper's number of parameters."},
    )
    longest_timescale: float | None = field(
        default=None,
        metadata={
            "help": "Gated ENN, GRU, LSTM: longest of the time scales, in steps, at which the units start out, spread "
            "on a log scale from 2. None: 3.7 steps for all in the ENN, Keras' start in the baselines."
        },
    )
    hebbian_lr: float = field(default=0.05, metadata={"help": "ENN: share of the trace that one write replaces."})
    trace_scale: float = field(default=0.5, metadata={"help": "ENN: weight of the trace beside the bank."})
    trace_clip: float | None = field(
        default=None, metadata={"help": "ENN: bound of every trace entry (the paper: 0.1). None: no bound."}
    )
    trace_scope: str = field(
        default="sequence",
        metadata={"help": "ENN: one trace per 'sequence', or one per 'batch', as published."},
    )
    trace_noise: float = field(default=0.0, metadata={"help": "ENN: standard deviation of the noise in every write."})
    initial_state_std: float = field(
        default=0.0, metadata={"help": "ENN: standard deviation of a random first state, in training."}
    )
    recall_temperature: float = field(
        default=1.5, metadata={"help": "ENN: temperature of recall, before 1 + 10 * sparsity_strength divides it."}
    )
    sparsity_strength: float = field(default=0.1, metadata={"help": "ENN: sharpens recall; see recall_temperature."})
    recall_entropy_weight: float = field(
        default=0.0, metadata={"help": "ENN: weight of recall's mean entropy in the training loss."}
    )
    num_attention_heads: int = field(default=4, metadata={"help": "Mixer, attention: heads of a layer."})
    conv_kernel: int = field(
        default=4, metadata={"help": "Mixer: tokens that its convolution reads, the token at hand included."}
    )
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Mixer, attention: width of the feed-forward layer. None: 8/3 of hidden_size."}
    )
    ablation: str | None = field(
        default=None,
        metadata={
            "help": "Mixer: take one part out, to measure what it is worth: "
            + " ".join(f"'{name}': {take_out.__doc__}" for name, take_out in ABLATIONS.items())
        },
    )
    sliding_window: int = field(
        default=1024, metadata={"help": "Attention: tokens that it looks back on, and keeps as its state."}
    )

    def __post_init__(self) -> None:
        require(self, "architecture", self.architecture in ARCHITECTURES, f"one of {ARCHITECTURES}")


@dataclass
class LanguageModelArguments(ModelArguments):
    """The model of text."""

    num_hidden_layers: int = field(default=2, metadata={"help": "Stacked layers."})
    residual: bool = field(default=True, metadata={"help": "Wrap each layer in a pre-norm residual block."})
    sliding_window: int | None = field(
        default=None,
        metadata={"help": "Attention: tokens that it looks back on, and keeps as its state. None: block_size."},
    )
    token_memory_size: int | None = field(
        default=None,
        metadata={
            "help": "Slots of a memory in the head of any architecture, which mixes the tokens that followed into the "
            "prediction. None: no such memory."
        },
    )
    tie_word_embeddings: bool = field(default=True, metadata={"help": "Use the token embeddings as output layer."})
    raw_token_ids: bool = field(
        default=False,
        metadata={
            "help": "Feed a token's id as one number in place of an embedding, as the paper's WikiText run did; with "
            "embedding_dropout 0."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kept = not self.raw_token_ids or self.embedding_dropout == 0
        require(self, "embedding_dropout", kept, "0, with raw_token_ids, whose ids it would turn into others")


@dataclass
class ImageModelArguments(ModelArguments):
    """The model of images."""

    hidden_size: int = field(default=128, metadata={"help": "Width of the hidden state and of every memory slot."})
    hidden_dropout: float = field(default=0.0, metadata={"help": "Dropout on the output of every layer."})
    embedding_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the first layer."})
    classifier_dropout: float = field(default=0.0, metadata={"help": "Dropout before the head."})
    position_embedding_size: int | None = field(
        default=None,
        metadata={"help": "Width of a learned embedding of every step's place, read beside its pixels. None: none."},
    )
    pooling: str = field(
        default="last",
        metadata={"help": "What the head reads: the 'last' step, the 'mean' over steps, or 'attention' over them."},
    )


def make_model(model_args: ModelArguments, task: str, **fields: Any) -> PreTrainedModel:
    """A model with random weights.

    Args:
        model_args: architecture and sizes.
        task: "language" or "images": which head it has.
        **fields: further fields of the config, set by the data.
    """
    types = LAYER_TYPES.get(model_args.architecture)
    values = {**dataclasses.asdict(model_args), **fields}
    parameters, count_embeddings = values.pop("parameters"), values.pop("count_embeddings")
    ablation = values.pop("ablation")
    values.pop("raw_token_ids", None)
    if types is None:
        values = {name: value for name, value in values.items() if name not in ENN_ONLY}
    else:
        del values["architecture"]
        values["layer_types"] = [types[index % len(types)] for index in range(model_args.num_hidden_layers)]
    model_class = MODEL_CLASSES[task][1 if types is None else 0]

    def make(**width: int) -> PreTrainedModel:
        return model_class(model_class.config_class(**{**values, **width}))

    def count(**widths: int) -> int:
        with torch.device("meta"):  # the model is not made
            return make(**widths).num_parameters(exclude_embeddings=not count_embeddings)

    widths = {} if parameters is None else solve_widths(count, solved_widths(model_args), parameters)
    model = make(**widths)
    if ablation is not None:
        ablate(model, ablation)
    return model


def solved_widths(model_args: ModelArguments) -> tuple[str, ...]:
    """The widths that `parameters` chooses, one after the other."""
    if model_args.architecture in BASELINES:
        return ("hidden_size",)
    if model_args.architecture == "enn":
        return ("hidden_size",) if model_args.integrator == "gru" else ("integrator_size",)
    return ("hidden_size", "intermediate_size")


def solve_widths(count: Callable[..., int], names: tuple[str, ...], parameters: int) -> dict[str, int]:
    """The widths, found one after the other, at which `count(**widths)` comes closest to a number of parameters.

    Raises:
        ValueError: none comes within 2 %.
    """
    widths: dict[str, int] = {}
    for name in names:
        widths[name] = closest_width(lambda width, name=name: count(**{**widths, name: width}), parameters)
    found = count(**widths)
    if abs(found - parameters) > TOLERANCE * parameters:
        raise ValueError(
            f"parameters is {parameters:,}: the closest model, with {widths}, has {found:,}; allowed: within 2 %."
        )
    return widths


def closest_width(count_at: Callable[[int], int], parameters: int) -> int:
    """The width whose model, counted by `count_at`, which grows with it, has the number of parameters closest by."""
    low, high = 1, 2
    while count_at(high) < parameters and high < BROADEST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_at(middle) < parameters else (low, middle)
    return min((low, high), key=lambda width: abs(count_at(width) - parameters))
