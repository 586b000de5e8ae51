"""What the stand-in keeps: repositories with commits, branches and tags; files, large ones by their SHA-256."""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

# The Hub's rule: the kinds of files that a new repository's .gitattributes names, and whatever is big.
LARGE_KINDS = (".safetensors", ".parquet", ".arrow", ".bin", ".pt", ".pth", ".npz", ".png", ".zip")
LARGE_SIZE = 10_000_000


def is_large(path: str, size: int) -> bool:
    """Whether a file goes through LFS."""
    return path.endswith(LARGE_KINDS) or size >= LARGE_SIZE


class HubError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class File:
    """Content of a file in a commit."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """Git's object id, or the SHA-256 of a large file."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\x00" % len(self.content) + self.content).hexdigest()

    def describe(self, path: str) -> dict[str, Any]:
        """The entry of a tree listing."""
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.large:
            entry["lfs"] = {"oid": self.oid, "size": len(self.content), "pointerSize": 130}
        return entry


@dataclass(frozen=True)
class Commit:
    """A state of all files, and where it came from."""

    files: dict[str, File]
    title: str
    parent: "Commit | None"
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    @property
    def oid(self) -> str:
        """A SHA-1 over content and history."""
        lines = [self.parent.oid if self.parent else "", self.title, self.date]
        lines += [f"{path} {file.oid}" for path, file in sorted(self.files.items())]
        return hashlib.sha1("\n".join(lines).encode()).hexdigest()

    def history(self) -> list["Commit"]:
        """This commit and all before it, newest first."""
        return [self] + (self.parent.history() if self.parent else [])


class Repository:
    """A repository of one kind: "models", "datasets" or "spaces"."""

    def __init__(self, kind: str, name: str, private: bool = False, sdk: str | None = None) -> None:
        self.kind, self.name, self.private, self.sdk = kind, name, private, sdk
        first = Commit({".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit", None)
        self.branches = {"main": first}
        self.tags: dict[str, Commit] = {}

    def commit(self, revision: str | None = None) -> Commit:
        """The commit that a branch, a tag or an id names."""
        revision = revision or "main"
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        for branch in self.branches.values():
            for commit in branch.history():
                if commit.oid == revision:
                    return commit
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def add(self, branch: str, title: str, changes: dict[str, File | None], parent: str | None) -> Commit:
        """Put a commit on a branch; `None` deletes a file, or the folder of a path that ends in a slash."""
        if branch not in self.branches:
            raise HubError(404, "RevisionNotFound", f"{branch} is not a branch")
        head = self.branches[branch]
        if parent is not None and parent != head.oid:
            raise HubError(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for path, file in changes.items():
            if file is not None:
                files[path] = file
            elif path.endswith("/"):
                files = {name: kept for name, kept in files.items() if not name.startswith(path)}
            else:
                del files[path]
        self.branches[branch] = Commit(files, title, head)
        return self.branches[branch]

    def tree(self, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The files of a folder, with its subfolders as entries of their own."""
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.commit(revision).files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                directory = prefix + "/".join(parts[:depth])
                entries[directory] = {"type": "directory", "path": directory, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = file.describe(path)
        if prefix and not entries:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        return list(entries.values())
