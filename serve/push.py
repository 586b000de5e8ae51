"""Publish the page as a Space on the Hugging Face Hub, in one commit.

python -m serve.push you/engram-memory
python -m serve.push you/engram-memory --dry-run
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from .app import IMAGE_MODEL, MODEL

ROOT = Path(__file__).parent.parent
MODELS = (Path(MODEL), Path(IMAGE_MODEL))
NOT_SENT = ("push.py",)
MOST_BYTES = 10**9  # what a Space may hold for free


def main(argv: list[str] | None = None) -> None:
    """Read the command line, say what is sent, send it."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repo_id", help="user/name of the Space; it is made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    parser.add_argument("--dry-run", action="store_true", help="list the files and their size, send nothing")
    args = parser.parse_args(argv)
    files = space_files()
    size = sum(path.stat().st_size for path in files.values())
    if args.dry_run:
        sys.stdout.writelines(f"{path.stat().st_size:>12,}  {name}\n" for name, path in files.items())
    sys.stdout.write(f"{len(files)} files, {size / 1e6:.1f} MB\n")
    if size > MOST_BYTES:
        sys.exit(f"A Space holds {MOST_BYTES / 1e9:.0f} GB at most.")
    if not args.dry_run:
        try:
            commit = push_space(args.repo_id, files, private=args.private)
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
            sys.exit(f"The Space {args.repo_id!r} was not pushed: {explain(error)}")
        sys.stdout.write(f"{commit.repo_url}\n")


def space_files() -> dict[str, Path]:
    """Everything the Space needs, by its path there: this folder, the library, and the checkpoints that are here."""
    files = {name: path for name, path in files_below(ROOT / "serve").items() if name not in NOT_SENT}
    for folder in (Path("hf_engram"), *MODELS):
        files |= {str(folder / name): path for name, path in files_below(ROOT / folder).items()}
    return files


def files_below(folder: Path) -> dict[str, Path]:
    """The files in `folder`, by their path below it, without caches."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def push_space(repo_id: str, files: dict[str, Path], private: bool = False) -> CommitInfo:
    """Make the Space if it does not exist, and send `files` in one commit: others see all of them or none."""
    api = HfApi()
    api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    return api.create_commit(repo_id, operations, commit_message="Upload the page", repo_type="space")


def explain(error: Exception) -> str:
    """What a refusal means."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "the Hub does not know you. Log in with `hf auth login`."
    if status == 403:
        return "your token may not write there. Check the name, and that the token's role is 'write'."
    return str(error)


if __name__ == "__main__":
    main()
