"""Clients of the stand-in: Python processes that know nothing but what a new user has."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from .server import StandInHub

ROOT = Path(__file__).parents[2]

# Ends the process where nothing can catch it: what a library swallows would go unseen.
GUARD = """
import json, os, sys

context = json.loads(os.environ.pop("CONTEXT"))

def guard(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        forbidden = path.startswith(context["root"] + os.sep) and not path.startswith(context["environment"] + os.sep)
    elif event == "socket.connect":
        path = arguments[1]
        forbidden = isinstance(path, tuple) and path[0] not in ("127.0.0.1", "::1")
    else:
        return
    if forbidden:
        os.write(2, f"\\nThis process reached for {path} ({event}).\\n".encode())
        os._exit(70)

sys.addaudithook(guard)
if not context["package"]:
    sys.modules["hf_engram"] = None
given, result = context["given"], None
exec(compile(os.environ.pop("CODE"), "<test>", "exec"))
if result is not None:
    print("\\nRESULT " + json.dumps(result))
"""


class FreshPython:
    """Runs code in a new process: an empty HF_HOME and working folder, no source tree, no network but the stand-in.

    Args:
        hub: the Hub that the process knows.
        folder: where working folders and caches are made.
        package: a folder with hf_engram as a wheel installs it.
    """

    def __init__(self, hub: StandInHub, folder: Path, package: Path) -> None:
        self.hub, self.folder, self.package = hub, folder, package
        self._count = 0

    def command(
        self, *code: str, package: bool = False, variables: dict[str, str] | None = None, **given: Any
    ) -> dict[str, Any]:
        """Arguments for `subprocess` that run the pieces of `code`, each of them dedented."""
        self._count += 1
        home = self.folder / f"process-{self._count}"
        (home / "work").mkdir(parents=True)
        context = {"root": str(ROOT), "environment": sys.prefix, "package": package, "given": given}
        ours = {
            "CONTEXT": json.dumps(context, default=str),
            "CODE": "\n".join(map(textwrap.dedent, code)),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": self.hub.url,
            "HF_TOKEN": self.hub.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "OMP_NUM_THREADS": "1",
            "HF_ENGRAM_SCAN": "chunkwise",  # with empty caches, compiling the loops would take longer than all the rest
            "PYTHONPATH": str(self.package) if package else "",
            **(variables or {}),
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        return {"args": [sys.executable, "-P", "-c", GUARD], "cwd": home / "work", "env": {**kept, **ours}}

    def __call__(self, *code: str, **kwargs: Any) -> Any:
        """Run `code`, which finds the keyword arguments in `given` and leaves its answer (JSON) in `result`."""
        done = subprocess.run(**self.command(*code, **kwargs), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        answers = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        return json.loads(answers[-1]) if answers else None
