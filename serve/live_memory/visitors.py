"""Who is on the page, and what is kept for them."""

import threading
from collections import OrderedDict

import gradio as gr

from .session import Session


class Visitors:
    """A session for every open page, forgotten as soon as the page is closed.

    Args:
        capacity: how many; further ones take the place of those idle for longest.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def sessions(self) -> list[Session]:
        """All sessions, the one idle for longest first."""
        return list(self._sessions.values())

    def session(self, request: gr.Request) -> Session:
        """The session of the page that asks."""
        with self._lock:
            session = self._sessions.setdefault(str(request.session_hash), Session())
            self._sessions.move_to_end(str(request.session_hash))
            idle = [key for key, other in self._sessions.items() if not other.running and other is not session]
            for key in idle[: max(0, len(self._sessions) - self.capacity)]:
                self._sessions.pop(key).close()
            return session

    def leave(self, request: gr.Request) -> None:
        """Forget a page that was closed, and end its run."""
        with self._lock:
            session = self._sessions.pop(str(request.session_hash), None)
        if session is not None:
            session.close()
