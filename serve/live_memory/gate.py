"""What Gradio would fetch from elsewhere on a visitor's behalf is refused."""

from typing import Any, NoReturn

import gradio as gr
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

REFUSAL = "This page fetches nothing from elsewhere."
FORBIDDEN = ("/file=http:", "/file=https:", "/file/http:", "/file/https:", "/proxy=")


class LocalOnly:
    """Middleware in front of Gradio's routes `file=<url>` and `proxy=<url>`, which make the server ask other hosts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or pass the request on."""
        path = scope.get("path", "").lower()
        if any(part in path for part in FORBIDDEN):
            await PlainTextResponse(REFUSAL, 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class LocalBlocks(gr.Blocks):
    """Blocks that download no file which an event names by its URL, in the value of whatever component."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Every way to an event, queued or not, leads through here before Gradio looks for the files in its inputs.

        Raises:
            gr.Error: one of them is a URL.
        """
        traverse(inputs, refuse, lambda value: is_file_obj_with_meta(value) and is_http_url_like(value["path"]))
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def refuse(file: dict[str, Any]) -> NoReturn:
    """Refuse a file that is not on this machine."""
    raise gr.Error(REFUSAL, print_exception=False)
