"""Who is on the page, and what is kept for them."""

import threading
from collections import OrderedDict

import gradio as gr

from .models import ModelChoice
from .session import Session


class Visitors:
    """A session for every open page, forgotten as soon as the page is closed.

    Args:
        capacity: how many; further ones take the place of those idle for longest.
        choices: how many of those whose session is gone find the models again that they had chosen. Their page may
            still be open, and shows these models.
    """

    def __init__(self, capacity: int, choices: int) -> None:
        self.capacity = capacity
        self.choices = choices
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._choices: OrderedDict[str, dict[str, ModelChoice]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def sessions(self) -> list[Session]:
        """All sessions, the one idle for longest first."""
        return list(self._sessions.values())

    def session(self, request: gr.Request) -> Session:
        """The session of the page that asks."""
        with self._lock:
            key = str(request.session_hash)
            if key not in self._sessions:
                self._sessions[key] = Session(self._choices.pop(key, None))
            session = self._sessions[key]
            self._sessions.move_to_end(key)
            idle = [key for key, other in self._sessions.items() if not other.running and other is not session]
            for key in idle[: max(0, len(self._sessions) - self.capacity)]:
                self._give_up(key)
            return session

    def leave(self, request: gr.Request) -> None:
        """Forget a page that was closed, and end its run."""
        with self._lock:
            self._give_up(str(request.session_hash))

    def _give_up(self, key: str) -> None:
        session = self._sessions.pop(key, None)
        if session is None:
            return
        if session.choices:
            self._choices[key] = session.choices
            while len(self._choices) > self.choices:
                self._choices.popitem(last=False)
        session.close()
