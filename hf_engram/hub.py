"""Share a model on the Hugging Face Hub, as one folder that opens with hf_engram, without it, and for reading.

    from hf_engram.hub import push_to_hub, save_for_hub

    save_for_hub(model, "my-model", tokenizer)
    push_to_hub("my-model", "my-name/my-model")

From a shell:

    python -m hf_engram.hub check my-model
    python -m hf_engram.hub card my-model
    python -m hf_engram.hub push my-model my-name/my-model
"""

import argparse
import fnmatch
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .configuration_enn import EnnConfig
from .hub_folder import (
    PICKLES,
    FolderError,
    auto_map,
    check_folder,
    copy_code,
    find_problems,
    finish_configs,
)
from .model_card import RUN_FILES, DataSource, TrainingRun, draw_trace, name_in_card, write_card
from .modeling_enn import EnnModel

__all__ = [
    "DataSource",
    "FolderError",
    "PushError",
    "RemoteCodeCallback",
    "TrainingRun",
    "check_folder",
    "push_to_hub",
    "save_for_hub",
    "write_card",
]

NOT_SENT = [*(f"*{kind}" for kind in PICKLES), "checkpoint-*", ".*", "__pycache__*"]
REPLACED = ("model*.safetensors", "model.safetensors.index.json", "*_enn.py")  # what an earlier model may have left


class PushError(OSError):
    """The Hub did not take a folder; the message says why, and what to do."""


def save_for_hub(
    model: PreTrainedModel,
    folder: str | Path,
    processing_class: Any = None,
    run: TrainingRun | None = None,
    example: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write everything that a repository on the Hub needs: weights, configs, code, tokenizer or image processor, card.

    The files are made beside `folder` and moved into it when they are complete: after an error it is as it was.
    Further files in `folder` stay; the numbers in all_results.json and trainer_state.json go into the card.

    Args:
        model: a model of this package.
        folder: where to write; made if it does not exist.
        processing_class: the tokenizer (for models with a vocabulary) or the image processor (for images).
        run: what the card tells about the training. Without it, run.json in `folder` if there is one.
        example: inputs of the model, such as `tokenizer(text, return_tensors="pt")`, whose memory is drawn for the card
            (needs matplotlib). Without it, trace.png in `folder` if there is one.

    Returns:
        `folder`.

    Raises:
        ValueError: this is not a model of this package.
        FolderError: something is missing, such as the tokenizer.
        OSError: the disk is full, or may not be written to.
    """
    if getattr(model.config, "model_type", None) != EnnConfig.model_type or not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` is a {type(model).__name__}; allowed: the models of hf_engram. "
            "An adapter is merged first: `model = model.merge_and_unload()`."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        stage = Path(scratch)
        try:
            model.save_pretrained(stage)
            if processing_class is not None:
                processing_class.save_pretrained(stage)
            for path in (*stage.glob("*.py"), *stage.glob("README.md")):
                path.unlink()  # what a model loaded as remote code brings along
            copy_code(stage)
            finish_configs(stage, auto_map(model.config))
            for path in (folder / name for name in RUN_FILES if (folder / name).is_file()):
                shutil.copyfile(path, stage / path.name)
            if run is not None:
                run.save(stage)
            if example is not None:
                draw_trace(model, example, stage, processing_class)
            write_card(stage, name=folder.resolve().name)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder} could not be written, and is as it was: {error}") from error
        problems = find_problems(stage)
        if problems:
            raise FolderError(folder, problems)
        for pattern in REPLACED:
            for path in folder.glob(pattern):
                if not (stage / path.name).is_file():
                    path.unlink()  # of an earlier save; old weights would be loaded in place of the new ones
        for path in stage.iterdir():
            path.replace(folder / path.name)
    return folder


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Check a folder that `save_for_hub` wrote, and send it to the Hub in one commit.

    No file is sent before [`check_folder`] has opened the folder in a clean process. As all files go into one commit,
    what others see is the whole model or, after an error or Ctrl-C, what was there before. Weights, code and pickles
    that an earlier model left in the repository are removed by the same commit. Checkpoints, pickles and hidden files
    are not sent.

    Args:
        folder: the folder.
        repo_id: `"user/name"`. The repository is made if it does not exist.
        private: whether a new repository is private. Defaults to the organisation's choice (public for users).
        revision: the branch to commit to; made if it does not exist. Defaults to `"main"`.
        token: an access token that may write; defaults to the one of `hf auth login`.
        commit_message: title of the commit.

    Returns:
        the commit; its `oid` is the `revision=` that pins this very model, its `repo_url` where it can be seen.

    Raises:
        ValueError: `repo_id` is not a name that a repository can have.
        FolderError: the folder is incomplete, or does not open; nothing was sent.
        PushError: the Hub refused it.
    """
    folder, api = Path(folder), HfApi(token=token)
    validate_repo_id(repo_id)
    try:
        api.whoami()  # a wrong token is told at once, not after the check
    except Exception as error:
        raise PushError(explain(error, repo_id)) from error
    check_folder(folder)
    name_in_card(folder, repo_id)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        stale = left_by_earlier_models(api.list_repo_files(repo_id, revision=revision), folder)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            ignore_patterns=NOT_SENT,
            delete_patterns=stale,
        )
    except Exception as error:
        raise PushError(explain(error, repo_id)) from error


def left_by_earlier_models(remote: list[str], folder: Path) -> list[str]:
    """Weights and code in a repository that the model in `folder` does not have, and pickles of any name."""
    at_root = [name for name in remote if "/" not in name]
    replaced = {name for pattern in REPLACED for name in fnmatch.filter(at_root, pattern)}
    pickles = [name for name in at_root if name.endswith(PICKLES)]
    return sorted(name for name in replaced if not (folder / name).is_file()) + pickles


def explain(error: Exception, repo_id: str) -> str:
    """What a failed request means to the one who pushes."""
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__  # uploads of single files wrap the error that tells what happened
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        reason = "it does not know you: `hf auth login`, or give a valid `token`"
    elif status == 403:
        reason = f"your token may not write to {repo_id!r}: check the name, and that the token's role is 'write'"
    elif isinstance(error, RepositoryNotFoundError):
        reason = f"there is no repository {repo_id!r} that your token may see"
    else:
        reason = f"{type(error).__name__}: {error}".strip()
    return (
        f"{constants.ENDPOINT} did not take the model: {reason}\n"
        "All files go into one commit, so that nothing is half published. Push again to go on."
    )


class RemoteCodeCallback(TrainerCallback):
    """Makes all that `Trainer(push_to_hub=True)` sends open through `trust_remote_code`, from the first checkpoint on.

    A Trainer sends code with its last push only, one entry of `auto_map`, and `use_cache` false. This callback puts
    the code into `output_dir` and completes the config before training begins.

    Example:

    ```python
    >>> Trainer(model, TrainingArguments("runs/mine", push_to_hub=True), ..., callbacks=[RemoteCodeCallback()])
    ```
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the code."""
        model.config.auto_map = auto_map(model.config)
        model.config.use_cache = True
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            copy_code(Path(args.output_dir))


def describe_folder(folder: Path, example: str | None = None) -> None:
    """Write the card of a folder anew; with an example text, draw what a language model's memory does with it."""
    if example is not None:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), EnnModel.from_pretrained(folder)
        draw_trace(model, tokenizer(example, return_tensors="pt"), folder, tokenizer)
    write_card(folder)


def main(argv: list[str] | None = None) -> None:
    """Check, describe or push a folder."""
    parser = argparse.ArgumentParser("python -m hf_engram.hub", description="Folders of models, ready for the Hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("check", "open a folder in a clean process, as someone without hf_engram would"),
        ("card", "write README.md anew from config.json, run.json, all_results.json and trainer_state.json"),
        ("push", "check a folder and send it to the Hub in one commit"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument("folder", type=Path, help="what save_for_hub, or a training run, wrote")
        if name == "card":
            command.add_argument("--example", help="a text whose memory is drawn for the card")
        if name == "push":
            command.add_argument("repo_id", help="user/name on the Hub")
            command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
            command.add_argument("--revision", help="branch to commit to (default: main)")
    arguments = vars(parser.parse_args(argv))
    actions = {"check": check_folder, "card": describe_folder, "push": push_to_hub}
    command, folder = arguments.pop("command"), arguments["folder"]
    try:
        done = actions[command](**arguments)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(str(error))
    message = {"check": f"{folder} opens everywhere", "card": f"{folder / 'README.md'} written"}
    print(message.get(command) or f"{done.commit_url}")


if __name__ == "__main__":
    main()
