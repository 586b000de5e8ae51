"""The pipelines of transformers, with a model and its tokenizer opened from a folder."""

import pytest
import torch
from helpers import tiny_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from hf_engram import (
    EnnForCausalLM,
    EnnForImageClassification,
    EnnForSequenceClassification,
    EnnImageProcessor,
    EnnModel,
)

VOCABULARY = ("<pad>", "<eos>", "<unk>", "a", "cell", "of", "recalls", "slot", "the", "trace", "writes")


@pytest.fixture
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@pytest.fixture
def open_pipeline(tmp_path, tokenizer):
    """Save a model and what it needs, and open both in a pipeline."""

    def opened(task, model_class, **kwargs):
        tokens = {} if model_class is EnnForImageClassification else {"vocab_size": len(tokenizer), "pad_token_id": 0}
        model = tiny_model(model_class, dtype=torch.float32, **tokens, **kwargs)
        model.save_pretrained(tmp_path)
        if model_class is EnnForImageClassification:
            EnnImageProcessor(num_channels=3, size={"height": 8, "width": 8}).save_pretrained(tmp_path)
        else:
            tokenizer.save_pretrained(tmp_path)
        return pipeline(task, str(tmp_path), device="cpu")

    return opened


@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_generation(open_pipeline, batch_size):
    generator = open_pipeline("text-generation", EnnForCausalLM)
    prompts = ["the cell", "a slot of the trace writes"]
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    together = generator(prompts, batch_size=batch_size, **options)
    alone = [generator(prompt, **options) for prompt in prompts]
    assert together == alone
    for prompt, [text] in zip(prompts, alone, strict=True):
        input_ids = generator.tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = generator.model.generate(input_ids, max_new_tokens=5, do_sample=False)[0, input_ids.shape[1] :]
        assert text["generated_text"].strip() == generator.tokenizer.decode(expected, skip_special_tokens=True)
    assert alone[0] != alone[1]


def test_feature_extraction(open_pipeline):
    extract = open_pipeline("feature-extraction", EnnModel)
    features = extract(["the cell recalls", "a slot"], return_tensors=True)
    assert [tuple(feature.shape) for feature in features] == [(1, 3, 16), (1, 2, 16)]
    expected = extract.model(torch.tensor([extract.tokenizer("a slot")["input_ids"]])).last_hidden_state
    assert torch.equal(features[1], expected)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_classification(open_pipeline, batch_size):
    classify = open_pipeline("text-classification", EnnForSequenceClassification, pooling="mean", num_labels=3)
    texts = ["the cell recalls", "a slot"]
    together = classify(texts, batch_size=batch_size, top_k=None)
    for scores, text in zip(together, texts, strict=True):
        assert {score["label"] for score in scores} == {"LABEL_0", "LABEL_1", "LABEL_2"}
        assert sum(score["score"] for score in scores) == pytest.approx(1)
        assert [s["score"] for s in scores] == pytest.approx([s["score"] for s in classify(text, top_k=None)], rel=1e-4)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "activation"),
    [("multi_label_classification", 3, torch.sigmoid), ("regression", 1, lambda logits: logits)],
)
def test_text_classification_of_other_kinds(open_pipeline, problem_type, num_labels, activation):
    classify = open_pipeline(
        "text-classification", EnnForSequenceClassification, problem_type=problem_type, num_labels=num_labels
    )
    scores = classify("the cell recalls", top_k=None)
    logits = classify.model(**classify.tokenizer("the cell recalls", return_tensors="pt")).logits[0]
    expected = sorted(activation(logits).tolist(), reverse=True)
    assert [score["score"] for score in scores] == pytest.approx(expected)


def test_text_generation_streams(open_pipeline):
    generator = open_pipeline("text-generation", EnnForCausalLM)
    streamer = TextIteratorStreamer(generator.tokenizer, skip_prompt=True, skip_special_tokens=True)
    [text] = generator("the cell", max_new_tokens=5, do_sample=False, return_full_text=False, streamer=streamer)
    assert "".join(streamer).strip() == text["generated_text"].strip()


def test_image_classification(open_pipeline):
    classify = open_pipeline("image-classification", EnnForImageClassification, id2label={0: "cat", 1: "dog"})
    [first, second] = classify([Image.new("RGB", (20, 10), "red"), Image.new("L", (8, 8))])
    for scores in (first, second):
        assert {score["label"] for score in scores} == {"cat", "dog"}
        assert sum(score["score"] for score in scores) == pytest.approx(1)
    assert first != second
