"""`Trainer(push_to_hub=True)`: every commit of a run opens through remote code, from the first checkpoint on."""

import json

import pytest
from hub_scripts import ANSWER, MAKE, WITHOUT_CHECK
from hub_stand_in import FreshPython

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAIN = """
from transformers import Trainer, TrainerCallback, TrainingArguments
from safetensors.torch import load_file

model, tokenizer = make_model(residual=True), make_tokenizer()
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(300, (16, 12))]
arguments = TrainingArguments(
    "run",
    max_steps=4,
    save_steps=2,
    save_strategy="steps",
    learning_rate=0.05,
    push_to_hub=True,
    hub_model_id="user/trained",
    hub_strategy="checkpoint",
    hub_always_push=True,
    use_cpu=True,
    disable_tqdm=True,
)

# Four tiny steps take less time than a push, which uploads the files as it finds them.
class FinishPush(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        if trainer.push_in_progress is not None:
            trainer.push_in_progress.wait_until_done()

callbacks = [RemoteCodeCallback(), FinishPush()]
trainer = Trainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)
trainer.train()
steps = {step: load_file(f"run/checkpoint-{step}/model.safetensors")["model.norm.bias"].tolist() for step in (2, 4)}
trainer.push_to_hub(commit_message="Trained")
save_for_hub(trainer.model, "run", tokenizer)
push_to_hub("run", "user/trained", commit_message="Described")
result = {"answer": answer(trainer.model.eval()), "steps": steps}
"""


@pytest.fixture(scope="module")
def trained(hub, installed_package, tmp_path_factory):
    fresh_python = FreshPython(hub, tmp_path_factory.mktemp("trained"), installed_package)
    return fresh_python(ANSWER, MAKE, WITHOUT_CHECK, TRAIN, package=True)


def commit_titled(hub, title):
    history = hub.repository("user/trained").commit().history()
    return next(commit for commit in history if commit.title == title)


def test_checkpoints_are_pushed_while_training(hub, trained):
    titles = hub.commits("user/trained")
    assert titles[:2] == ["Described", "Trained"]
    assert {f"Training in progress, step {step}" for step in (2, 4)} <= set(titles)
    assert "last-checkpoint/model.safetensors" in hub.files("user/trained")


def test_every_commit_opens_through_remote_code(fresh_python, hub, trained):
    titles = {step: f"Training in progress, step {step}" for step in ("2", "4")}
    oids = {step: commit_titled(hub, title).oid for step, title in titles.items()}
    opened = fresh_python(
        ANSWER,
        """
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        result = {}
        for step, oid in given["oids"].items():
            where = {"revision": oid, "trust_remote_code": True}
            backbone = AutoModel.from_pretrained("user/trained", **where)
            assert len(AutoTokenizer.from_pretrained("user/trained", **where)) > 256
            assert backbone.config.use_cache
            result[step] = backbone.norm.bias.tolist()
        checkpoint = {"subfolder": "last-checkpoint", "trust_remote_code": True}
        result["last-checkpoint"] = answer(AutoModelForCausalLM.from_pretrained("user/trained", **checkpoint))
        result["main"] = answer(AutoModelForCausalLM.from_pretrained("user/trained", trust_remote_code=True))
        """,
        oids=oids,
    )
    assert opened["2"] == trained["steps"]["2"] != trained["steps"]["4"]
    assert opened["4"] == trained["steps"]["4"]
    assert opened["main"] == opened["last-checkpoint"] == trained["answer"]


def test_what_push_to_hub_sends_last_has_no_pickles(hub, trained):
    def pickles(commit):
        return [path for path in commit.files if path.endswith((".bin", ".pt", ".pth")) and "/" not in path]

    assert pickles(commit_titled(hub, "Trained")) == ["training_args.bin"]
    assert pickles(commit_titled(hub, "Described")) == []
    config = json.loads(hub.files("user/trained")["config.json"])
    assert config["use_cache"] is True
    assert len(config["auto_map"]) == 4
