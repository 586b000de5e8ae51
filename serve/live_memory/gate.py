"""What Gradio would fetch from elsewhere on a visitor's behalf is refused."""

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

FORBIDDEN = ("/file=http:", "/file=https:", "/file/http:", "/file/https:", "/proxy=")


class LocalOnly:
    """Middleware in front of Gradio's routes `file=<url>` and `proxy=<url>`, which make the server ask other hosts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or pass the request on."""
        path = scope.get("path", "").lower()
        if any(part in path for part in FORBIDDEN):
            await PlainTextResponse("This page fetches nothing from elsewhere.", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)
