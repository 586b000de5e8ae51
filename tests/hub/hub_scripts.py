"""Code that runs in fresh processes."""

# The same question, asked by those who push a model and by those who open it.
ANSWER = """
import torch

torch.use_deterministic_algorithms(True)

def answer(model):
    if model.main_input_name == "pixel_values":
        return model(torch.arange(192.0).reshape(1, 3, 8, 8) / 192).logits[0].tolist()
    output = model(torch.arange(40)[None])
    return (output.logits if "logits" in output else output.last_hidden_state)[0, -1].tolist()
"""

MAKE = """
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import hf_engram
from hf_engram.hub import PushError, RemoteCodeCallback, push_to_hub, save_for_hub

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

def make_image_model():
    images = {"image_sequence": "row", "image_size": 8, "num_channels": 3, "num_labels": 4}
    return make_model(model_class=hf_engram.EnnForImageClassification, **images)
"""

# The check before a push is tested in test_folder.py and by the first pushes of conftest.py; it takes seconds.
WITHOUT_CHECK = """
hf_engram.hub.check_folder = lambda folder: None
"""

OPEN = """
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(given["text"], **trust)
tokenizer = AutoTokenizer.from_pretrained(given["text"], **trust)
model = AutoModelForCausalLM.from_pretrained(given["text"], **trust)
backbone = AutoModel.from_pretrained(given["text"], **trust)
classifier = AutoModelForSequenceClassification.from_pretrained(given["text"], **trust)
revisions = {
    revision: answer(AutoModelForCausalLM.from_pretrained(given["text"], revision=revision, **trust))
    for revision in ("main", "first", given["commit"], "wider")
}
inputs = tokenizer(["long ago", "what was written long ago"], padding=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)
writer = pipeline("text-generation", given["text"], tokenizer=tokenizer, **trust)

processor = AutoImageProcessor.from_pretrained(given["images"], **trust)
images = AutoModelForImageClassification.from_pretrained(given["images"], **trust)

try:
    AutoModelForCausalLM.from_pretrained(given["text"], trust_remote_code=False)
except ValueError as error:
    refusal = str(error)
try:
    AutoModelForCausalLM.from_pretrained("user/not-there", **trust)
except OSError as error:
    missing = str(error)

model.push_to_hub("someone-else/copy")
tokenizer.push_to_hub("someone-else/copy")

everything = (config, model, backbone, classifier, processor, images)
result = {
    "packages": sorted({type(one).__module__.split(".")[0] for one in everything}),
    "use_cache": config.use_cache,
    "text": answer(model),
    "backbone": answer(backbone),
    "classifier_backbone": answer(classifier.model),
    "images": answer(images),
    "pixels": list(processor(torch.zeros(3, 20, 30, dtype=torch.uint8), return_tensors="pt")["pixel_values"].shape),
    "image_classes": sorted(images.config.auto_map),
    "revisions": revisions,
    "trace": list(output.past_key_values.layers[0].state.trace.shape),
    "generated": output.sequences.shape[1] - inputs["input_ids"].shape[1],
    "written": writer("long ago", max_new_tokens=5)[0]["generated_text"],
    "refusal": refusal,
    "missing": missing,
}
"""
