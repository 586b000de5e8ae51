"""A tiny model with random weights, and a tokenizer that has seen some markup."""

import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_engram import EnnConfig, EnnForCausalLM

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

MARKUP = '<img src="x" onerror="window.ran = 1">'  # one token, so that it is whole wherever tokens are shown
TEXT = [
    "the memory of a recurrent network is written one token at a time",
    "it is read back by attention over its slots, and <b>what</b> was written long ago fades",
    "a page shows <script>window.ran = 1</script> as it is",
]


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ"]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=240, initial_alphabet=alphabet))
    tokenizer.add_tokens([MARKUP])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def make_model(tokenizer):
    def make(**kwargs):
        torch.manual_seed(0)
        tiny = {"vocab_size": len(tokenizer), "hidden_size": 24, "num_hidden_layers": 2, "memory_size": 16}
        return EnnForCausalLM(EnnConfig(**{**tiny, "residual": True, **kwargs})).eval()

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()
