"""A stand-in of the Hugging Face Hub on loopback: its client runs as it is, and every request is recorded.

It answers what ``huggingface_hub`` asks for when files are read by revision and token, and when a folder is uploaded.
Files are sent whole with the commit, as the Hub takes small ones; the storage of large files is not part of it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api

from genalign.runtime.hub import hub_answers
from tests.http_servers import Answer, Seen, stub


@dataclass
class StandInHub:
    """Repositories by name and revision, each a folder, and what was asked of them."""

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    tokens: dict[str, str] = field(default_factory=dict)  # the token that a private repository needs
    writers: set[str] = field(default_factory=set)  # tokens that may write
    seen: list[Seen] = field(default_factory=list)
    pushed: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by repository
    created: list[dict] = field(default_factory=list)

    def __call__(self, seen: Seen) -> Answer:
        self.seen.append(seen)
        parts = [unquote(part) for part in urlsplit(seen.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "repos"]:
            return self.answer_create(seen)
        if parts[:2] == ["api", "validate-yaml"]:
            return _json({"errors": [], "warnings": []})
        is_api = parts[0] == "api" and parts[1] in ("models", "datasets")
        if parts[0] == "datasets":
            parts = parts[1:]
        name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        if rest[:1] == ["preupload"]:
            files = [{"path": one["path"], "uploadMode": "regular"} for one in seen.json["files"]]
            return _json({"files": [{**one, "shouldIgnore": False} for one in files]})
        if rest[:1] == ["commit"]:
            return self._commit(name, seen)
        return self._read(name, rest, seen, is_api)

    def _read(self, name: str, rest: list[str], seen: Seen, is_api: bool) -> Answer:
        token = seen.headers.get("authorization", "").removeprefix("Bearer ")
        if name not in self.repositories and name not in self.pushed:
            return _error(404, "RepoNotFound")
        if self.tokens.get(name, token) != token:
            return _error(401, "RepoNotFound")
        if name in self.gated and not (is_api and not rest):
            return _error(403, "GatedRepo")
        kind, revision = (rest[0], rest[1]) if len(rest) > 1 else ("", "main")
        folders = self.repositories.get(name, {})
        commits = {_commit_of(branch): folder for branch, folder in folders.items()}
        folder = folders.get(revision, commits.get(revision))
        if folder is None and name not in self.pushed:
            return _error(404, "RevisionNotFound")
        commit = revision if revision in commits else _commit_of(revision)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
        if kind == "tree":
            entries = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
            return _json([{"type": "file", "path": path, "size": size, "oid": commit} for path, size in entries])
        if kind == "resolve":
            return _file(folder / "/".join(rest[2:]), commit)
        siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
        return _json({"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def answer_create(self, seen: Seen) -> Answer:
        token, wanted = seen.headers.get("authorization", "").removeprefix("Bearer "), seen.json
        if token not in self.writers:
            return _error(403, "")
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        self.created.append(wanted)
        self.pushed[name] = {}
        return _json({"url": f"https://huggingface.co/{name}", "name": name, "id": name})

    def _commit(self, name: str, seen: Seen) -> Answer:
        for line in map(json.loads, seen.body.decode().splitlines()):
            if line["key"] == "file":
                self.pushed[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return _json({"commitUrl": f"https://huggingface.co/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})


def _commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


def _json(content: object) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def _error(status: int, code: str) -> Answer:
    return Answer(status, b"{}", {"X-Error-Code": code} if code else {})


def _file(path: Path, commit: str) -> Answer:
    if not path.is_file():
        return Answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
    content = path.read_bytes()
    return Answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})


@contextlib.contextmanager
def stand_in_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[StandInHub]:
    """Run a stand-in that the Hub's client talks to, with an empty cache and no token."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    hub = StandInHub()
    with stub(hub) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", url)
        hub_answers.cache_clear()
        yield hub
    hub_answers.cache_clear()
