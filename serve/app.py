"""Serve a web page on which ENNs write texts and read images, with their memory beside them, live.

python -m serve.app
python -m serve.app --model path/to/checkpoint --port 8000
"""

import argparse
import os
import sys
from importlib import import_module, util
from pathlib import Path

MODEL = "model_cards/enn-wikitext103-mixer"
IMAGE_MODEL = "model_cards/enn-mnist-rows"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Read the command line, load the models, serve until interrupted."""
    args = parse_args()
    if util.find_spec("gradio") is None:
        sys.exit("The page needs gradio, which is not installed: pip install 'hf-engram[serve]'.")
    check_folder("--model", args.model, MODEL)
    if args.image_model:
        check_folder("--image-model", args.image_model, IMAGE_MODEL)
    # Read by the libraries when they are imported: nothing is reported to anybody.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

    # In the repository this file belongs to the package `serve`; at the root of a Space it is a script.
    package = ".live_memory" if __package__ else "live_memory"
    limits, models, page = (import_module(f"{package}.{name}", __package__) for name in ("limits", "models", "page"))
    choices = [models.ModelChoice(args.model, args.revision, args.trust_remote_code)]
    if args.image_model or Path(IMAGE_MODEL).is_dir():
        choices.append(models.ModelChoice(args.image_model or IMAGE_MODEL))
    try:
        own = [models.load_model(choice) for choice in choices]
    except ValueError as error:
        sys.exit(str(error))
    if [loaded.reads for loaded in own] != ["text", "image"][: len(own)]:
        sys.exit("--model takes a language model, --image-model an image classifier.")

    host = args.host or os.environ.get("GRADIO_SERVER_NAME", LOOPBACK[0])
    shelf = models.ModelShelf(
        own,
        capacity=limits.Limits().models,
        folders=[Path("model_cards"), *args.models_from],
        # Whoever reaches a page that only listens on this machine may run code on it anyway.
        allow_remote_code=host in LOOPBACK,
    )
    page.open_page(shelf, server_name=host, server_port=args.port)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=MODEL,
        help="folder of a language model and its tokenizer, or its id on the Hugging Face Hub (default: %(default)s)",
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the Hub (default: %(default)s)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with --model; only for authors you trust (default: do not)",
    )
    parser.add_argument(
        "--image-model",
        help=f"folder or id of an image classifier for the image tab (default: {IMAGE_MODEL}, if there)",
    )
    parser.add_argument(
        "--models-from",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folders below which visitors may choose checkpoints, beside model_cards (default: none)",
    )
    parser.add_argument(
        "--host",
        help="address to listen on; 0.0.0.0 lets other machines in, and then nobody may choose models that bring code "
        f"of their own (default: {LOOPBACK[0]}, or GRADIO_SERVER_NAME if set)",
    )
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    return parser.parse_args()


def check_folder(option: str, model: str, default: str) -> None:
    """Leave the program if `model`, given by an option, is meant to be a folder on this machine and is missing."""
    path = Path(model)
    if not path.is_dir() and (
        model == default or path.is_absolute() or (path.parent.is_dir() and path.parent != Path())
    ):
        sys.exit(
            f"There is no checkpoint folder {model!r} in {Path.cwd()}. Start this at the root of the repository, name "
            f"another checkpoint with {option}, or train one: "
            f"python -m train.{'language_model' if option == '--model' else 'image_classification'} --help"
        )


if __name__ == "__main__":
    main()
