"""A training step of whole language models of equal parameters, in sequences of 512 tokens."""

import statistics

import torch
from torch import Tensor
from transformers import PreTrainedModel

from train.allocator import keep_freed_memory
from train.models import LanguageModelArguments, make_model

from .peers import backward_step
from .timing import Step, ratio, rounds_of

PARAMETERS = 2_000_000  # beside the embeddings, as in the comparison on WikiText-103, and the models as there
TOKENS, VOCABULARY = 512, 4096
BATCHES = (1, 2, 4, 8)
PEER = "LSTM"
MODELS = {
    "mixer": {"architecture": "mixer"},
    "mixer, token memory": {"architecture": "mixer", "token_memory_size": 256},
    "gated cell": {
        "integrator": "gated",
        "hidden_size": 352,
        "layer_scale_init_value": 0.02,
        "longest_timescale": 2,
    },
    PEER: {"architecture": "lstm"},
    "GRU": {"architecture": "gru"},
    "Transformer": {"architecture": "transformer"},
}


def language_model(**options: object) -> PreTrainedModel:
    """Two layers of this architecture, untrained, as `train.language_model` makes them."""
    torch.manual_seed(0)
    sizes = {"parameters": PARAMETERS, "count_embeddings": False, "sliding_window": TOKENS, "residual": True}
    model_args = LanguageModelArguments(hidden_dropout=0.0, embedding_dropout=0.0, **sizes, **options)
    return make_model(model_args, "language", vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)


def training_step(model: PreTrainedModel, input_ids: Tensor) -> Step:
    """A function that runs forward and backward once, on these tokens, as `train.trainer` does."""
    return backward_step(model, lambda: model(input_ids, labels=input_ids, skip_logits=True).loss)


def print_language_models(rounds: int) -> None:
    """Print the section. From it on the process keeps freed memory, as `train` does."""
    keep_freed_memory()
    models = {name: language_model(**options) for name, options in MODELS.items()}
    print(f"{'batch':7}{'model':21}{'parameters':>11}{'tokens/s':>10}  over the {PEER}'s")
    for batch in BATCHES:
        input_ids = torch.randint(VOCABULARY, (batch, TOKENS))
        times = rounds_of({name: training_step(model, input_ids) for name, model in models.items()}, rounds)
        for name, model in models.items():
            rate = batch * TOKENS / statistics.median(times[name])
            # Seconds of the peer over seconds of the model: tokens/s of the model over the peer's.
            faster = "" if name == PEER else ratio(times[PEER], times[name])
            print(f"{batch:<7}{name:21}{model.num_parameters():>11,}{rate:>10,.0f}  {faster}", flush=True)
