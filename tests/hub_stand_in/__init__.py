"""A Hugging Face Hub on 127.0.0.1, for tests: repositories in memory, the HTTP API, and clients in fresh processes.

The fixtures `hub` (the server), `hub_api` (a client in this process) and `fresh_python` are in tests/conftest.py.
"""

from .clients import FreshPython
from .server import StandInHub

__all__ = ["FreshPython", "StandInHub"]
