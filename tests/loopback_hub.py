"""
A Hub on loopback: what `huggingface_hub`, `transformers` and `evaluate` ask of huggingface.co, kept in memory.

    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "home", token=OWNER)  # for a process of its own
        hub.interrupt("PUT", "/lfs/", times=1)
"""

import base64
import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml


OWNER, STRANGER = "hf_owner", "hf_stranger"  # tokens
LFS_SUFFIXES = (".safetensors", ".png", ".gif", ".ply", ".mp4")
SDKS, COLOURS = ("gradio", "docker", "static"), "red yellow green blue indigo purple pink gray".split()
LICENCES = ("mit", "apache-2.0", "cc-by-nc-4.0", "other")  # those that are used here


@dataclass
class Repo:
    """Files of each commit, and what branches and tags point to."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str) -> str:
        names = [f"{len(self.commits)}", *(name + hashlib.sha1(files[name]).hexdigest() for name in sorted(files))]
        commit = hashlib.sha1("\n".join(names).encode()).hexdigest()
        self.commits[commit], self.refs[ref] = files, commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


def metadata_errors(text: str, repo_type: str) -> list[str]:
    """What the Hub would refuse in the front matter of a card (as far as it is known here)."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        data = yaml.safe_load(match.group(1)) if match else {}
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    errors = []
    if data.get("license", "mit") not in LICENCES:
        errors.append(f"license {data['license']!r}")
    if data.get("license") == "other" and not {"license_name", "license_link"} <= data.keys():
        errors.append("license 'other' without license_name and license_link")
    if repo_type == "space":
        if data.get("sdk") not in SDKS:
            errors.append(f"sdk {data.get('sdk')!r}")
        errors += [f"{key} {data[key]!r}" for key in ("colorFrom", "colorTo") if data.get(key, "red") not in COLOURS]
        if len(data.get("short_description", "")) > 60:
            errors.append("short_description of more than 60 characters")
    errors += [f"tag {tag!r}" for tag in data.get("tags", []) if not isinstance(tag, str)]
    return errors


class LoopbackHub:
    """
    Attributes:
        repos: By (type, id): ("model", "org/name").
        requests: All so far, "GET /path", with the range that is asked for.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[str] = []
        self._interruptions: list[list] = []

    def __enter__(self) -> "LoopbackHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = None, **changes: str) -> dict[str, str]:
        """Environment variables of a process whose Hub this is, with its cache in `home`."""
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        return settings | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | changes

    def interrupt(self, method: str, part: str, times: int = 1, after: float = 0.5) -> None:
        """Drop the connection of the next `times` requests with `part` in their path, `after` a share of the body."""
        self._interruptions.append([method, part, times, after])

    def recover(self) -> None:
        """Interrupt nothing any more."""
        self._interruptions.clear()

    def interruption(self, method: str, path: str) -> float | None:
        for entry in self._interruptions:
            if entry[0] == method and entry[1] in path and entry[2] > 0:
                entry[2] -= 1
                return entry[3]
        return None

    def url(self, repo_type: str, repo_id: str) -> str:
        return f"{self.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_type, repo_id]
        return repo.commits[repo.resolve(revision)]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    # --- answers

    def answer(self, status: int, content: bytes | dict | list = b"", **headers: str | int) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.dropped_after is not None:
            self.wfile.write(body[: int(self.dropped_after * len(body))])
            self.drop()
        else:
            self.wfile.write(body)

    def fail(self, status: int, code: str, **headers: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code, **headers)

    def drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(2)

    # --- requests

    def handle_any(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        start = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {self.path}{start and f' {start}'}")
        self.dropped_after = self.hub.interruption(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        if (length or chunked) and self.dropped_after is not None:
            self.rfile.read(int(self.dropped_after * length))
            return self.drop()
        self.body = b"".join(iter(self.read_chunk, b"")) if chunked else self.rfile.read(length)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if match := re.fullmatch(r"/lfs/(\w+)", self.path):
            return self.put_blob(match.group(1))
        if self.path in ("/interrupt", "/recover"):  # for processes that are tested
            getattr(self.hub, self.path[1:])(**json.loads(self.body))
            return self.answer(200)
        if self.path == "/api/repos/create":
            return self.create_repo(json.loads(self.body))
        if self.path == "/api/validate-yaml":
            question = json.loads(self.body)
            errors = metadata_errors(question["content"], question["repoType"])
            found = {"errors": [{"message": error} for error in errors], "warnings": []}
            return self.answer(400 if errors else 200, found)
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"name": "org", "type": "user", "orgs": []}) if self.token else self.fail(401, "")
        kinds = r"(?:(datasets|spaces)/|(?:models/)?)"
        for pattern, action in (
            (rf"/api/{kinds}([\w.-]+/[\w.-]+)(?:/(preupload|commit|revision|tree|branch|tag)/(.+))?", self.use_api),
            (rf"/{kinds}([\w.-]+/[\w.-]+)\.git/info/lfs/objects/(batch)()", self.use_api),
            (rf"/{kinds}([\w.-]+/[\w.-]+)/(resolve)/(.+)", self.use_api),
        ):
            if match := re.fullmatch(pattern, self.path):
                return action(*match.groups())
        self.fail(404, "NotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def put_blob(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.fail(400, "WrongHash")
        self.hub.blobs[oid] = self.body
        self.answer(200)

    def create_repo(self, settings: dict) -> None:
        repo_type = settings.get("type", "model")
        repo_id = f"{settings.get('organization') or 'org'}/{settings['name']}"
        if self.token != OWNER:
            return self.fail(401, "Unauthorized")
        url = self.hub.url(repo_type, repo_id)
        if (repo_type, repo_id) in self.hub.repos:
            return self.answer(409, {"error": "You already created this repo", "url": url, "name": repo_id})
        repo = self.hub.repos[repo_type, repo_id] = Repo(private=settings.get("visibility") == "private")
        repo.commit({}, "main")
        self.answer(200, {"url": url, "name": repo_id})

    def use_api(self, kind: str | None, repo_id: str, action: str | None, rest: str | None) -> None:
        repo = self.hub.repos.get(((kind or "models").removesuffix("s"), repo_id))
        if repo is None or (repo.private and self.token != OWNER):
            return self.fail(404 if self.token else 401, "RepoNotFound")
        if action in ("preupload", "commit", "batch", "branch", "tag") and self.token != OWNER:
            return self.fail(403, "Forbidden")
        if repo.gated and action == "resolve" and self.token != OWNER:
            return self.fail(403 if self.token else 401, "GatedRepo")
        content = json.loads(self.body) if self.body and action != "commit" else {}
        if action == "preupload":
            modes = ["lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular" for file in content["files"]]
            files = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for file, mode in zip(content["files"], modes, strict=True)
            ]
            return self.answer(200, {"files": files})
        if action == "batch":
            known = self.hub.blobs
            objects = [
                entry
                | (
                    {}
                    if entry["oid"] in known
                    else {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}}
                )
                for entry in content["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if action in ("branch", "tag"):
            name, start = (rest, content.get("startingPoint")) if action == "branch" else (content["tag"], rest)
            if name in repo.refs:
                return self.fail(409, "Conflict")
            repo.refs[str(name)] = str(repo.resolve(start or "main"))
            return self.answer(201)
        revision, _, path = (rest or "main").partition("/")
        commit = repo.resolve(revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound")
        if action == "commit":
            return self.commit(repo, revision, (kind or "models").removesuffix("s"), repo_id)
        if action == "resolve":
            return self.resolve(repo, commit, path)
        if action == "tree":
            return self.tree(repo.commits[commit], path)
        siblings = [{"rfilename": name} for name in repo.commits[commit]]
        facts = {"id": repo_id, "sha": commit, "private": repo.private, "gated": repo.gated, "tags": []}
        self.answer(200, facts | {"siblings": siblings, "downloads": 0, "likes": 0})

    def commit(self, repo: Repo, revision: str, repo_type: str, repo_id: str) -> None:
        if revision not in repo.refs:
            return self.fail(404, "RevisionNotFound")
        files = dict(repo.commits[repo.refs[revision]])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.fail(400, "MissingBlob")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        commit = repo.commit(files, revision)
        url = f"{self.hub.url(repo_type, repo_id)}/commit/{commit}"
        self.answer(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def resolve(self, repo: Repo, commit: str, path: str) -> None:
        content = repo.commits[commit].get(path)
        if content is None:
            return self.fail(404, "EntryNotFound", X_Repo_Commit=commit)
        is_lfs = path.endswith(LFS_SUFFIXES)
        etag = (hashlib.sha256 if is_lfs else hashlib.sha1)(content).hexdigest()
        headers = {"X_Repo_Commit": commit, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        headers |= {"X_Linked_Size": len(content), "X_Linked_Etag": f'"{etag}"'} if is_lfs else {}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match.group(1))
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[start:], Content_Range=place, **headers)
        self.answer(200, content, **headers)

    def tree(self, files: dict[str, bytes], folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = {name: content for name, content in files.items() if name.startswith(prefix)}
        if folder and not inside:
            return self.fail(404, "EntryNotFound")
        entries = []
        for name, content in inside.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if name.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries)
