"""The folder that `save_for_hub` writes: complete, or refused with what is missing."""

import json
import shutil

import pytest
import torch
from helpers import ARCHITECTURES, same, tiny_model
from hub_scripts import ANSWER, MAKE
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, Trainer, TrainingArguments

from hf_engram import EnnForCausalLM, EnnForImageClassification, EnnForSequenceClassification, EnnImageProcessor
from hf_engram.hub import FolderError, check_folder, left_by_earlier_models, main, save_for_hub
from hf_engram.hub_folder import find_problems

BOOKS = "model_cards/enn-books"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BOOKS)


@pytest.fixture(scope="module")
def text_model():
    return tiny_model(dtype=torch.float32, vocab_size=4096, hidden_size=8)


@pytest.fixture(scope="module")
def complete(tmp_path_factory, text_model, tokenizer):
    return save_for_hub(text_model, tmp_path_factory.mktemp("hub") / "complete", tokenizer)


@pytest.fixture
def folder(complete, tmp_path):
    """A copy of a complete folder, to be spoilt."""
    return shutil.copytree(complete, tmp_path / "folder")


def read(path):
    return json.loads(path.read_text())


def test_config_names_every_auto_class_that_applies(complete, tmp_path):
    assert read(complete / "config.json")["auto_map"] == {
        "AutoConfig": "configuration_enn.EnnConfig",
        "AutoModel": "modeling_enn.EnnModel",
        "AutoModelForCausalLM": "modeling_enn.EnnForCausalLM",
        "AutoModelForSequenceClassification": "modeling_enn.EnnForSequenceClassification",
    }
    images = tiny_model(EnnForImageClassification, dtype=torch.float32)
    save_for_hub(images, tmp_path, EnnImageProcessor(num_channels=3, size={"height": 8, "width": 8}))
    assert "AutoModelForImageClassification" in read(tmp_path / "config.json")["auto_map"]
    assert "AutoModelForCausalLM" not in read(tmp_path / "config.json")["auto_map"]
    processor = {"AutoImageProcessor": "image_processing_enn.EnnImageProcessor"}
    assert read(tmp_path / "preprocessor_config.json")["auto_map"] == processor


def test_what_training_left_in_the_config_is_undone(tmp_path, tokenizer):
    model = tiny_model(dtype=torch.float32, vocab_size=4096, hidden_size=8)
    Trainer(model, TrainingArguments(str(tmp_path / "run"), use_cpu=True))
    assert model.config.use_cache is False
    save_for_hub(model, tmp_path, tokenizer)
    assert read(tmp_path / "config.json")["use_cache"] is True


def test_saving_changes_nothing_about_the_model_and_keeps_other_files(tmp_path, text_model, tokenizer):
    (tmp_path / "notes.txt").write_text("mine")
    before = text_model.config.to_dict()
    save_for_hub(text_model, tmp_path, tokenizer)
    assert text_model.config.to_dict() == before
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_push_removes_what_earlier_models_left_and_nothing_else(tmp_path, text_model, tokenizer):
    save_for_hub(text_model, tmp_path, tokenizer)
    of_others = ["README.md", "memory.safetensors", "adapter_model.safetensors", "app.py", "old/model.safetensors"]
    earlier = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "gone_enn.py"]
    remote = [*of_others, *earlier, "pytorch_model.bin", "modeling_enn.py", "model.safetensors"]
    assert left_by_earlier_models(remote, tmp_path) == [*sorted(earlier), "pytorch_model.bin"]


def test_shards_of_an_earlier_save_are_not_loaded_in_place_of_the_new_weights(tmp_path, text_model, tokenizer):
    other = tiny_model(dtype=torch.float32, vocab_size=4096, hidden_size=8, num_hidden_layers=3)
    other.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    save_for_hub(text_model, tmp_path, tokenizer)
    assert [path.name for path in tmp_path.glob("model*.*") if path.suffix != ".py"] == ["model.safetensors"]
    same(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), text_model.state_dict())


def test_shards_count_as_weights_when_all_are_there(folder, text_model):
    config = (folder / "config.json").read_text()
    (folder / "model.safetensors").unlink()
    text_model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "config.json").write_text(config)
    assert find_problems(folder) == []
    shard = min(folder.glob("model-*.safetensors"))
    shard.unlink()
    assert find_problems(folder) == [f"{shard.name} is missing"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "model.safetensors is missing"),
        ("tokenizer_config.json", "tokenizer_config.json is missing: a model with a vocabulary needs its tokenizer"),
        ("ops_enn.py", "ops_enn.py is missing, which the model's code imports"),
        ("modeling_enn.py", "modeling_enn.py is missing"),
        ("README.md", "README.md, the card, is missing"),
    ],
)
def test_incomplete_folder_is_refused(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(FolderError, match=message):
        check_folder(folder)


def test_everything_that_is_wrong_is_told_at_once(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-10])
    (folder / "ops_enn.py").write_text("import numba\n" + (folder / "ops_enn.py").read_text())
    (folder / "README.md").write_text("# A model\n\n![The trace](trace.png)\n")
    config = read(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    with pytest.raises(FolderError) as refused:
        check_folder(folder)
    for message in (
        "model.safetensors is damaged",
        "ops_enn.py imports ['numba'] outside of `try`",
        "README.md has no metadata",
        "README.md refers to trace.png, which is missing",
        "config.json has use_cache false",
    ):
        assert message in str(refused.value)
    assert len(refused.value.problems) == 5


def test_pickled_weights_are_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FolderError, match=r"pytorch_model\.bin will not do, weights are shared as safetensors only"):
        check_folder(folder)


def test_missing_tokenizer_or_processor_is_told_when_saving(tmp_path, text_model):
    with pytest.raises(FolderError, match="needs its tokenizer"):
        save_for_hub(text_model, tmp_path / "text")
    with pytest.raises(FolderError, match="needs its EnnImageProcessor"):
        save_for_hub(tiny_model(EnnForImageClassification), tmp_path / "images")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_models_of_features_need_neither(tmp_path):
    save_for_hub(tiny_model(EnnForSequenceClassification, dtype=torch.float32, vocab_size=None), tmp_path)
    assert read(tmp_path / "config.json")["auto_map"].keys() == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForSequenceClassification",
    }


@pytest.mark.parametrize("model", [BertModel(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1))])
def test_other_models_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match="`model` is a BertModel; allowed: the models of hf_engram"):
        save_for_hub(model, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "hidden_states = self.embedding_dropout(inputs_embeds)",
            "hidden_states = self.embedding_dropout(2 * inputs_embeds)",
            "AutoModelForCausalLM answers with its own code otherwise than with the installed hf_engram",
        ),
        ("class EnnModel(", "raise RuntimeError('broken')\nclass EnnModel(", "a clean process cannot open it.*broken"),
    ],
    ids=["other_code", "broken_code"],
)
def test_folder_is_opened_with_its_own_code(folder, monkeypatch, old, new, message):
    monkeypatch.setenv("HF_ENGRAM_SCAN", "chunkwise")  # the clean process would compile loops, which takes a while
    code = (folder / "modeling_enn.py").read_text()
    assert old in code
    (folder / "modeling_enn.py").write_text(code.replace(old, new))
    with pytest.raises(FolderError, match=rf"(?s){message}"):
        check_folder(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_other_copies_of_the_code_in_a_process_leave_a_model_its_own(fresh_python):
    """Each repository on the Hub brings a copy: here one whose operators and cache layers would not do."""
    answers = fresh_python(
        ANSWER,
        MAKE,
        """
        from pathlib import Path
        import shutil
        import sys

        sys.path.append(".")
        copy = Path(shutil.copytree(Path(hf_engram.__file__).parent, "other_copy"))
        (copy / "__init__.py").write_text("")
        memory = (copy / "memory_enn.py").read_text()
        call = "run_over_rows(forward_rows"
        assert call in memory
        (copy / "memory_enn.py").write_text(memory.replace(call, "raise RuntimeError('other code') or (forward_rows"))

        model = make_model(hidden_size=8, num_hidden_layers=1)
        before = answer(model)
        import other_copy.modeling_enn
        after = answer(model)
        written = model.generate(torch.arange(9)[None], max_new_tokens=3, pad_token_id=0)
        result = {"same": after == before, "written": written.shape[1] - 9}
        """,
        package=True,
        variables={"HF_ENGRAM_SCAN": "auto"},
    )
    assert answers == {"same": True, "written": 3}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ["mixer", "hybrid"])
def test_models_with_other_layers_are_pushed_with_all_their_code(architecture, fresh_python, hub):
    fields = ARCHITECTURES[architecture]
    pushed = fresh_python(
        ANSWER,
        MAKE,
        """
        model = make_model(**given["fields"])
        save_for_hub(model, "model", make_tokenizer())
        hf_engram.hub.main(["push", "model", given["repo_id"]])
        result = answer(model)
        """,
        package=True,
        fields=fields,
        repo_id=f"user/{architecture}",
    )
    wanted = ("mixer_enn", "ops_mixer_enn", "scan_mixer_enn", "attention_enn", "shared_memory_enn")
    assert {f"{name}.py" for name in wanted} <= hub.files(f"user/{architecture}").keys()
    opened = fresh_python(
        ANSWER,
        """
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(given["repo_id"], trust_remote_code=True)
        written = model.generate(torch.arange(9)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        result = {"answer": answer(model), "written": written.shape[1] - 9}
        """,
        repo_id=f"user/{architecture}",
    )
    assert opened == {"answer": pushed, "written": 3}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_check_and_describe_a_folder(folder, capsys):
    (folder / "README.md").unlink()
    with pytest.raises(SystemExit, match=r"README.md, the card, is missing"):
        main(["check", str(folder)])
    with pytest.raises(SystemExit, match="No such file or directory"):
        main(["card", str(folder / "nothing")])
    main(["card", str(folder)])
    main(["check", str(folder)])
    assert capsys.readouterr().out.splitlines() == [f"{folder}/README.md written", f"{folder} opens everywhere"]
    assert EnnForCausalLM.from_pretrained(folder).config.use_cache
