"""A model on the Hub opens with every Auto class, with hf_engram and without it, to the very same numbers."""

import pytest
from hub_scripts import ASK, MAKE

pytestmark = pytest.mark.slow


def test_text_model_opens_without_the_package(fresh_python, text_model, hub):
    opened = fresh_python(
        ASK,
        """
        import json
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
        from transformers import AutoTokenizer, pipeline

        options = {"trust_remote_code": True, "revision": given["commit"]}
        config = AutoConfig.from_pretrained(given["repo"], **options)
        tokenizer = AutoTokenizer.from_pretrained(given["repo"], **options)
        backbone = AutoModel.from_pretrained(given["repo"], **options)
        model = AutoModelForCausalLM.from_pretrained(given["repo"], **options)
        classifier = AutoModelForSequenceClassification.from_pretrained(given["repo"], **options)
        inputs = tokenizer(["long ago", "what was written long ago"], padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)
        writer = pipeline("text-generation", given["repo"], trust_remote_code=True, tokenizer=tokenizer)
        result = {
            "modules": sorted({type(one).__module__.rpartition(".")[2] for one in (config, backbone, model)}),
            "packages": sorted({type(one).__module__.split(".")[0] for one in (config, backbone, model, classifier)}),
            "logits": answer(model),
            "backbone": backbone(torch.arange(40)[None]).last_hidden_state[0, -1].tolist(),
            "classifier_backbone": classifier.model(torch.arange(40)[None]).last_hidden_state[0, -1].tolist(),
            "trace": output.past_key_values.layers[0].state.trace.shape,
            "generated": output.sequences.shape[1] - inputs["input_ids"].shape[1],
            "written": writer("long ago", max_new_tokens=5)[0]["generated_text"],
            "use_cache": config.use_cache,
        }
        """,
        **text_model,
    )
    assert opened["modules"] == ["configuration_enn", "modeling_enn"]
    assert opened["packages"] == ["transformers_modules"]
    assert opened["logits"] == text_model["logits"]
    assert opened["backbone"] == opened["classifier_backbone"] == text_model["backbone"]
    assert opened["trace"] == [2, 8, 16]
    assert opened["generated"] == 5
    assert opened["written"].startswith("long ago")
    assert opened["use_cache"] is True


def test_text_model_opens_with_the_package(fresh_python, text_model):
    opened = fresh_python(
        ASK,
        """
        import hf_engram
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(given["repo"])
        flagged = AutoModelForCausalLM.from_pretrained(given["repo"], trust_remote_code=True)
        direct = hf_engram.EnnForCausalLM.from_pretrained(given["repo"])
        result = {
            "classes": [type(one) is hf_engram.EnnForCausalLM for one in (model, flagged, direct)],
            "logits": [answer(model), answer(flagged), answer(direct)],
            "tokens": len(AutoTokenizer.from_pretrained(given["repo"])),
        }
        """,
        package=True,
        **text_model,
    )
    assert opened["classes"] == [True] * 3
    assert opened["logits"] == [text_model["logits"]] * 3
    assert opened["tokens"] > 256


def test_image_model_opens_without_the_package(fresh_python, image_model):
    opened = fresh_python(
        """
        import torch
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

        torch.use_deterministic_algorithms(True)
        processor = AutoImageProcessor.from_pretrained(given["repo"], trust_remote_code=True)
        model = AutoModelForImageClassification.from_pretrained(given["repo"], trust_remote_code=True)
        backbone = AutoModel.from_pretrained(given["repo"], trust_remote_code=True)
        image = torch.arange(3 * 10 * 10, dtype=torch.uint8).reshape(3, 10, 10) % 251
        result = {
            "processor": type(processor).__module__.split(".")[0],
            "logits": model(**processor(image, return_tensors="pt")).logits[0].tolist(),
            "backbone": type(backbone).__name__,
            "classes": sorted(model.config.auto_map),
        }
        """,
        **image_model,
    )
    assert opened["processor"] == "transformers_modules"
    assert opened["logits"] == image_model["logits"]
    assert opened["backbone"] == "EnnModel"
    assert "AutoModelForImageClassification" in opened["classes"]
    assert "AutoModelForCausalLM" not in opened["classes"]


def test_weights_travel_as_large_files_and_only_what_belongs_to_the_model_is_sent(hub, text_model):
    commit = hub.repository(text_model["repo"]).commit()
    assert commit.oid == text_model["commit"]
    assert commit.files["model.safetensors"].large
    assert not commit.files["config.json"].large
    assert {"README.md", "tokenizer.json", "modeling_enn.py"} <= commit.files.keys()
    assert not [path for path in commit.files if path.endswith((".bin", ".pt", ".pkl"))]
    assert hub.commits(text_model["repo"]) == ["Upload model"]


def test_card_on_the_hub_loads_its_own_repository(hub, text_model):
    card = hub.files(text_model["repo"])["README.md"].decode()
    assert card.count(f'from_pretrained("{text_model["repo"]}"') == 2
    assert "pipeline_tag: text-generation" in card


def test_code_runs_only_with_consent(fresh_python, text_model):
    message = fresh_python(
        """
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained(given["repo"], trust_remote_code=False)
        except ValueError as error:
            result = str(error)
        """,
        **text_model,
    )
    assert "trust_remote_code=True" in message


def test_revision_pins_weights_and_code(fresh_python, hub):
    name = "user/two-versions"
    pushed = fresh_python(
        MAKE,
        """
        from huggingface_hub import HfApi

        first, second = make_model(seed=1), make_model(seed=2, hidden_size=24)
        save_for_hub(first, "model", make_tokenizer())
        oid = push_to_hub("model", given["name"]).oid
        HfApi().create_tag(given["name"], tag="v1", revision=oid)
        save_for_hub(second, "model", make_tokenizer())
        push_to_hub("model", given["name"], revision="wider", commit_message="Wider")
        result = {"oid": oid, "first": answer(first), "second": answer(second)}
        """,
        package=True,
        name=name,
    )
    assert hub.commits(name) == ["Upload model"]
    opened = fresh_python(
        ASK,
        """
        from transformers import AutoModelForCausalLM

        result = {}
        for revision in (given["oid"], "v1", "main", "wider"):
            model = AutoModelForCausalLM.from_pretrained(given["name"], revision=revision, trust_remote_code=True)
            result[revision] = answer(model)
        """,
        name=name,
        oid=pushed["oid"],
    )
    assert opened[pushed["oid"]] == opened["v1"] == opened["main"] == pushed["first"]
    assert opened["wider"] == pushed["second"] != pushed["first"]
