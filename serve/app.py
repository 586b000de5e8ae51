"""Serve a web page that generates text with an ENN and shows its memory live.

python -m serve.app
python -m serve.app --model path/to/checkpoint --port 8000
"""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_engram import EnnForCausalLM

DEFAULT_MODEL = "model_cards/enn-books"


def main() -> None:
    """Read the command line, load the model, serve until interrupted."""
    args = parse_args()
    is_local = check_local(args.model)
    # Read by the libraries when they are imported: nothing is reported, and a local model needs no network at all.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if is_local:
        os.environ["HF_HUB_OFFLINE"] = "1"

    model, tokenizer = load(args.model, args.revision, args.trust_remote_code)
    # In the repository this file belongs to the package `serve`; at the root of a Space it is a script.
    page = import_module(".live_memory.page" if __package__ else "live_memory.page", __package__)
    page.open_page(model, tokenizer, args.model, server_name=args.host, server_port=args.port)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="folder of a checkpoint (model and tokenizer), or the id of a model on the Hugging Face Hub "
        "(default: %(default)s)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; only for authors you trust (default: do not)",
    )
    parser.add_argument(
        "--host",
        help="address to listen on; 0.0.0.0 lets other machines in (default: 127.0.0.1, or GRADIO_SERVER_NAME if set)",
    )
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    return parser.parse_args()


def check_local(model: str) -> bool:
    """Whether `model` is a folder on this machine; leaves the program if it is meant to be one and is missing."""
    path = Path(model)
    if path.is_dir():
        return True
    if model == DEFAULT_MODEL or path.is_absolute() or (path.parent.is_dir() and path.parent != Path()):
        sys.exit(
            f"There is no checkpoint folder {model!r} in {Path.cwd()}. Start this at the root of the repository, name "
            "another checkpoint with --model, or train one: python -m train.language_model --help"
        )
    return False


def load(model: str, revision: str | None, trust_remote_code: bool) -> "tuple[EnnForCausalLM, PreTrainedTokenizerBase]":
    """Model (in evaluation mode) and tokenizer; leaves the program with a sentence if they cannot be had."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import hf_engram  # noqa: F401  registers the model with the Auto classes

    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model, **options)
        if config.model_type != "enn":
            sys.exit(f"{model!r} is a {config.model_type!r} model; this page shows the memory of an 'enn' model.")
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
        return AutoModelForCausalLM.from_pretrained(model, **options).eval(), tokenizer
    except (OSError, ValueError) as error:
        sys.exit(f"{model!r} could not be loaded: {error}")


if __name__ == "__main__":
    main()
