"""Code that several tests run in fresh processes."""

# Runs before the code of every process that makes models.
MAKE = """
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
import hf_engram
from hf_engram.hub import push_to_hub, save_for_hub

torch.use_deterministic_algorithms(True)

def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(["what was written long ago fades"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")

def make_model(seed=0, model_class=hf_engram.EnnForCausalLM, **kwargs):
    torch.manual_seed(seed)
    fields = {"vocab_size": 300, "hidden_size": 16, "memory_size": 8, "num_hidden_layers": 2, "initializer_range": 0.5}
    return model_class(hf_engram.EnnConfig(**{**fields, **kwargs})).eval()

def answer(model):
    return model(torch.arange(40)[None]).logits[0, -1].tolist()

def make_image_model():
    images = {"image_sequence": "row", "image_size": 8, "num_channels": 3, "num_labels": 4}
    return make_model(model_class=hf_engram.EnnForImageClassification, **images)
"""
# The same question, asked by those who open it.
ASK = """
import torch

torch.use_deterministic_algorithms(True)

def answer(model):
    return model(torch.arange(40)[None]).logits[0, -1].tolist()
"""
