"""The Hub's HTTP API, as far as huggingface_hub, transformers and datasets use it, over `repositories`."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .cards import SPACE_SDKS, card_errors
from .repositories import File, HubError, Repository, is_large

NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{NAME}"
FILES = rf"/(?:(?P<kind>datasets|spaces)/)?{NAME}"


class StandInHub:
    """A running server.

    Attributes:
        url: its address, for HF_ENDPOINT.
        token: the one token that may write; any other is refused, none at all may read what is public.
        requests: what was asked, as "METHOD /path".
    """

    token = "hf_stand_in"
    user = "stand-in-user"

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._refused: dict[str, int] = {}
        self._held: dict[str, tuple[threading.Event, threading.Event]] = {}
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop to answer."""
        self._server.shutdown()
        self._server.server_close()

    def repository(self, name: str, kind: str = "models") -> Repository:
        """A repository by its name; raises `HubError` if there is none."""
        if (kind, name) not in self.repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repositories[kind, name]

    def files(self, name: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        """Content of all files of a repository, by path."""
        files = self.repository(name, kind).commit(revision).files
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    def commits(self, name: str, kind: str = "models") -> list[str]:
        """Titles of the commits on main, newest first, without the empty one that creates a repository."""
        return [commit.title for commit in self.repository(name, kind).commit().history()[:-1]]

    @contextmanager
    def refusing(self, request: str, status: int) -> Iterator[None]:
        """Answer every request whose "METHOD /path" contains `request` with an error."""
        self._refused[request] = status
        try:
            yield
        finally:
            del self._refused[request]

    @contextmanager
    def holding(self, request: str) -> Iterator[threading.Event]:
        """Leave requests that contain `request` unanswered; yields the event of the first one's arrival."""
        arrived, released = self._held[request] = threading.Event(), threading.Event()
        try:
            yield arrived
        finally:
            del self._held[request]
            released.set()

    def admit(self, request: str) -> None:
        """Note a request, and do with it what `refusing` or `holding` said."""
        self.requests.append(request)
        for text, status in list(self._refused.items()):
            if text in request:
                raise HubError(status, "Refused", "Refused by the test")
        for text, (arrived, released) in list(self._held.items()):
            if text in request:
                arrived.set()
                released.wait()
                raise HubError(503, "Held", "Held by the test")


class Handler(BaseHTTPRequestHandler):
    """Requests to repositories: looks up the route, checks the token, answers with JSON or bytes."""

    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def do_GET(self) -> None:
        """Answer any method; HEAD is GET without the body."""
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        body = self._body()
        try:
            self.hub.admit(f"{self.command} {path}")
            method = "GET" if self.command == "HEAD" else self.command
            for routed, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if routed == method and match:
                    self._check_token(writes=method != "GET" and answer not in (validate_yaml, put_large_file))
                    fields = match.groupdict()
                    if "kind" in fields:
                        fields["kind"] = fields["kind"] or "models"
                        self._check_privacy(fields["kind"], fields["name"])
                    answer(self, body, **fields)
                    return
            raise HubError(404, "NotFound", f"The stand-in has no route for {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error), **self._commit_header(path)}
            self.reply({"error": str(error)}, error.status, headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *args: Any) -> None:
        """Keep quiet; `hub.requests` has them."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _check_token(self, writes: bool) -> None:
        given = self.headers.get("Authorization")
        if given is None and not writes:
            return
        if given != f"Bearer {self.hub.token}":
            raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")

    def _check_privacy(self, kind: str, name: str) -> None:
        if self.hub.repository(name, kind).private and "Authorization" not in self.headers:
            raise HubError(401, "RepoNotFound", "Repository not found")

    def _commit_header(self, path: str) -> dict[str, str]:
        match = re.fullmatch(FILES + r"/resolve/(?P<revision>[^/]+)/.+", path)
        repository = match and self.hub.repositories.get((match["kind"] or "models", match["name"]))
        try:
            return {"X-Repo-Commit": repository.commit(match["revision"]).oid} if repository else {}
        except HubError:
            return {}

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send JSON, or bytes as they are."""
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def create(handler: Handler, body: bytes) -> None:
    """Create a repository: 409 if it exists."""
    request = json.loads(body)
    kind, hub = f"{request.get('type') or 'model'}s", handler.hub
    name = f"{request.get('organization') or hub.user}/{request['name']}"
    known = (kind, name) in hub.repositories
    if kind == "spaces" and request.get("sdk") not in SPACE_SDKS:
        raise HubError(400, "BadRequest", f"sdk is {request.get('sdk')!r}; allowed: {sorted(SPACE_SDKS)}")
    if not known:
        private = bool(request.get("private")) or request.get("visibility") == "private"
        hub.repositories[kind, name] = Repository(kind, name, private, request.get("sdk"))
    prefix = "" if kind == "models" else f"{kind}/"
    handler.reply({"url": f"{hub.url}/{prefix}{name}", "id": name, "name": name}, 409 if known else 200)


def delete(handler: Handler, body: bytes) -> None:
    """Delete a repository."""
    request = json.loads(body)
    repository = handler.hub.repository(
        f"{request.get('organization') or handler.hub.user}/{request['name']}", f"{request.get('type') or 'model'}s"
    )
    del handler.hub.repositories[repository.kind, repository.name]
    handler.reply({})


def validate_yaml(handler: Handler, body: bytes) -> None:
    """Check the metadata of a card."""
    request = json.loads(body)
    errors = card_errors(request["content"], request["repoType"])
    handler.reply({"errors": [{"message": message} for message in errors], "warnings": []}, 400 if errors else 200)


def preupload(handler: Handler, body: bytes, kind: str, name: str, revision: str) -> None:
    """Say which files go through LFS, and which are there already."""
    files = handler.hub.repository(name, kind).commit(revision).files
    answers = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
            "shouldIgnore": False,
            "oid": files[file["path"]].oid if file["path"] in files else None,
        }
        for file in json.loads(body)["files"]
    ]
    handler.reply({"files": answers})


def large_file_batch(handler: Handler, body: bytes, kind: str, name: str) -> None:
    """Say where to put large files; those that are there need no upload."""
    handler.hub.repository(name, kind)
    objects = json.loads(body)["objects"]
    for item in objects:
        if item["oid"] not in handler.hub.large_files:
            item["actions"] = {"upload": {"href": f"{handler.hub.url}/large-files/{item['oid']}"}}
    handler.reply({"transfer": "basic", "objects": objects})


def put_large_file(handler: Handler, body: bytes, oid: str) -> None:
    """Store a large file under its SHA-256."""
    if hashlib.sha256(body).hexdigest() != oid:
        raise HubError(422, "BadContent", "The content is not what its SHA-256 says")
    handler.hub.large_files[oid] = body
    handler.reply({})


def commit(handler: Handler, body: bytes, kind: str, name: str, revision: str) -> None:
    """Add all files of a request in one commit."""
    repository, header = handler.hub.repository(name, kind), {}
    changes: dict[str, File | None] = {}
    for line in body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header":
            header = value
        elif entry["key"] == "file":
            changes[value["path"]] = File(base64.b64decode(value["content"]), large=False)
        elif entry["key"] == "lfsFile":
            if value["oid"] not in handler.hub.large_files:
                raise HubError(400, "BadRequest", f"{value['path']} was never uploaded")
            changes[value["path"]] = File(handler.hub.large_files[value["oid"]], large=True)
        elif entry["key"] in ("deletedFile", "deletedFolder"):
            changes[value["path"]] = None
        else:
            raise HubError(400, "BadRequest", f"unknown operation {entry['key']}")
    oid = repository.add(revision, header["summary"], changes, header.get("parentCommit")).oid
    url = f"{handler.hub.url}/{name}/commit/{oid}"
    handler.reply({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def info(handler: Handler, body: bytes, kind: str, name: str, revision: str | None = None) -> None:
    """What `model_info` and its kin show."""
    repository = handler.hub.repository(name, kind)
    head = repository.commit(revision)
    answer = {
        "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
        "id": name,
        "sha": head.oid,
        "private": repository.private,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "createdAt": repository.commit().history()[-1].date,
        "lastModified": head.date,
        "siblings": [{"rfilename": path, "size": len(file.content)} for path, file in sorted(head.files.items())],
    }
    handler.reply(answer | ({"sdk": repository.sdk} if kind == "spaces" else {}))


def tree(handler: Handler, body: bytes, kind: str, name: str, revision: str, folder: str | None = None) -> None:
    """List a folder."""
    recursive = handler.query.get("recursive", "").lower() in ("1", "true")
    handler.reply(handler.hub.repository(name, kind).tree(revision, folder or "", recursive))


def paths_info(handler: Handler, body: bytes, kind: str, name: str, revision: str) -> None:
    """Describe the files asked for, leaving out those that do not exist."""
    files = handler.hub.repository(name, kind).commit(revision).files
    handler.reply([files[path].describe(path) for path in parse_qs(body.decode())["paths"] if path in files])


def refs(handler: Handler, body: bytes, kind: str, name: str) -> None:
    """Branches and tags."""
    repository = handler.hub.repository(name, kind)
    described = {
        group: [{"name": ref, "ref": f"refs/{path}/{ref}", "targetCommit": head.oid} for ref, head in names.items()]
        for group, path, names in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
    }
    handler.reply({**described, "converts": []})


def commits(handler: Handler, body: bytes, kind: str, name: str, revision: str) -> None:
    """The history of a revision, newest first."""
    history = handler.hub.repository(name, kind).commit(revision).history()
    described = {"message": "", "authors": [{"user": handler.hub.user}]}
    handler.reply([{"id": item.oid, "title": item.title, "date": item.date, **described} for item in history])


def add_branch(handler: Handler, body: bytes, kind: str, name: str, branch: str) -> None:
    """Begin a branch."""
    repository = handler.hub.repository(name, kind)
    repository.branches[branch] = repository.commit(json.loads(body or b"{}").get("startingPoint"))
    handler.reply({})


def add_tag(handler: Handler, body: bytes, kind: str, name: str, revision: str) -> None:
    """Tag a revision."""
    repository = handler.hub.repository(name, kind)
    repository.tags[json.loads(body)["tag"]] = repository.commit(revision)
    handler.reply({})


def resolve(handler: Handler, body: bytes, kind: str, name: str, revision: str, path: str) -> None:
    """A file, or the part of it that a Range header asks for."""
    head = handler.hub.repository(name, kind).commit(revision)
    if path not in head.files:
        raise HubError(404, "EntryNotFound", "Entry not found")
    file, status, content = head.files[path], 200, head.files[path].content
    headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": head.oid, "Accept-Ranges": "bytes"}
    if file.large:
        headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(content))}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    if wanted:
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        status, content = 206, content[first : last + 1]
    handler.reply(content, status, headers)


def who_am_i(handler: Handler, body: bytes) -> None:
    """The owner of the token."""
    handler._check_token(writes=True)
    handler.reply({"type": "user", "name": handler.hub.user, "orgs": [], "auth": {"type": "access_token"}})


REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", create),
    ("DELETE", r"/api/repos/delete", delete),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("GET", r"/api/whoami-v2", who_am_i),
    ("GET", API, info),
    ("GET", rf"{API}/revision/{REVISION}", info),
    ("POST", rf"{API}/preupload/{REVISION}", preupload),
    ("POST", rf"{API}/commit/{REVISION}", commit),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<folder>.+))?", tree),
    ("POST", rf"{API}/paths-info/{REVISION}", paths_info),
    ("GET", rf"{API}/refs", refs),
    ("GET", rf"{API}/commits/{REVISION}", commits),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", add_branch),
    ("POST", rf"{API}/tag/{REVISION}", add_tag),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", large_file_batch),
    ("PUT", r"/large-files/(?P<oid>\w+)", put_large_file),
    ("GET", rf"{FILES}/resolve/{REVISION}/(?P<path>.+)", resolve),
]
