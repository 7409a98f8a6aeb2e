"""A Hugging Face Hub in miniature, held in memory, for the real huggingface_hub client.

Knows repositories, branches, commits, LFS and error codes of the Hub; knows nothing of moeforge.

    with HubServer() as hub:
        commit = hub.add("owner/name", {"config.json": b"{}"})
        subprocess.run([sys.executable, "-m", "moeforge", ...], env=hub.env(tmp_path / "home"))
        assert hub.sent(r"\\.safetensors") == 0

huggingface_hub reads its environment when it is imported, so clients run in a process of their own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import hub_cards

_LFS_SUFFIXES = {".safetensors", ".bin", ".gguf"}
Headers = dict[str, str]
Answer = tuple[int, Headers, bytes]


class Refused(Exception):
    """An answer that is an error, with the headers by which the client tells what it means."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        self.status, self.headers = status, {"X-Error-Message": message.replace("\n", " ")}
        if code:
            self.headers["X-Error-Code"] = code
        self.body = json.dumps({"error": message, **more}).encode()


@dataclass(frozen=True)
class Request:
    """What was asked, and how many bytes of body came with it and were sent back."""

    method: str
    path: str
    range: str
    token: str
    status: int
    received: int
    sent: int


@dataclass
class Repo:
    """Commits are whole trees: {path: content}."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Mapping[str, bytes], message: str = "") -> str:
        """Put `files`, and nothing else, on `branch`; return the commit."""
        self.messages.append(message)
        content = [len(self.commits), sorted((path, _git_oid(files[path])) for path in files)]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """Return the commit that a branch or commit names."""
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


class HubServer(ThreadingHTTPServer):
    """The server, and what it holds; a context manager that serves in a thread.

    Attributes:
        url: value for HF_ENDPOINT.
        token: the one valid token; it may write to repositories of `user`.
        reader: a token of the same user that may only read.
        repos: repositories by `owner/name`.
        requests: all that was asked so far.
        ranges: whether range requests are honoured.
        part: bytes of each part in which LFS files are sent; None for files in one piece.
        storage: folder in which hf_xet keeps what it is given; None where there is LFS only.
    """

    daemon_threads = True
    token = "hf_TheOneValidToken"
    reader = "hf_TokenThatOnlyReads"
    user = "me"
    ranges = True
    part: int | None = None
    storage: Path | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # As on the Hub, large files come from another origin, which must never see the token.
        self.cdn = f"http://localhost:{self.server_port}/cdn"
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[tuple[str, Refused | None]] = []
        self.holds: list[tuple[str, Callable[[], object]]] = []
        self.cuts: list[tuple[str, int]] = []
        self.losses: list[str] = []
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.RLock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that hangs up is no error."""

    def add(
        self, repo_id: str, files: Mapping[str, bytes], branch: str = "main", **flags: bool
    ) -> str:
        """Commit `files` as the whole tree of a branch; `private=True` and `gated=True` work."""
        repo = self.repos.setdefault(repo_id, Repo(**flags))
        self.lfs |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        return repo.commit(branch, files)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the tree of a revision."""
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def clear(self) -> None:
        """Forget all repositories, files, requests and faults."""
        held = (self.repos, self.lfs, self.parts, self.requests)
        for memory in (*held, self.faults, self.holds, self.cuts, self.losses):
            memory.clear()  # type: ignore[attr-defined]
        self.ranges, self.part, self.storage = True, None, None

    def fail(self, pattern: str, status: int, message: str = "", code: str = "") -> None:
        """Answer requests whose `METHOD /path` matches with an error; status 0 hangs up."""
        self.faults.append((pattern, Refused(status, message, code) if status else None))

    def cut(self, pattern: str, count: int) -> None:
        """Hang up when `count` bytes of the body of a request that matches have come."""
        self.cuts.append((pattern, count))

    def lose(self, pattern: str) -> None:
        """Hang up once in place of answering: a request that matches is done, and nobody told."""
        self.losses.append(pattern)

    def received(self, pattern: str) -> int:
        """Return the bytes of body of the requests so far whose `METHOD /path` matches."""
        return sum(request.received for request in self.asked(pattern))

    def hold(self, pattern: str, act: Callable[[], object]) -> None:
        """Do something before requests whose `METHOD /path` matches are answered."""
        self.holds.append((pattern, act))

    def asked(self, pattern: str) -> list[Request]:
        """Return the requests so far whose `METHOD /path` matches."""
        return [r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")]

    def sent(self, pattern: str) -> int:
        """Return the bytes of body sent in answer to requests whose `METHOD /path` matches.

        LFS files are redirected to `/cdn/{sha256}/{path}`, so that they can be told by name.
        """
        return sum(request.sent for request in self.asked(pattern))

    def env(self, home: Path, *, token: str = "", **more: str) -> dict[str, str]:
        """Return an environment where huggingface_hub uses this server and the cache in `home`."""
        unwanted = re.compile("HF_|HUGGING|TRANSFORMERS_OFFLINE|.*_PROXY", re.IGNORECASE)
        kept = {k: v for k, v in os.environ.items() if not unwanted.match(k)}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        login = {"HF_TOKEN": token} if token else {}
        return {**kept, **hub, **quiet, **login, **more}


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_lfs(path: str) -> bool:
    return PurePosixPath(path).suffix in _LFS_SUFFIXES


def _oid(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_lfs(path) else _git_oid(data)


def _json(content: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _find(storage: Path, oid: str) -> bytes:
    """Return the file with a given hash from chunks that hf_xet has stored as they are.

    A xorb is chunks with a header of 8 bytes each: version, stored size, scheme (0 for no
    compression), size.
    """
    for xorb in sorted(storage.glob("xet/xorbs/xorbs/default.*")):
        raw, chunks, at = xorb.read_bytes(), list[bytes](), 0
        while raw[at : at + 1] == b"\0" and raw[at + 4 : at + 5] == b"\0":
            size = int.from_bytes(raw[at + 1 : at + 4], "little")
            chunks.append(raw[at + 8 : at + 8 + size])
            at += 8 + size
        for start in range(len(chunks)):
            digest = hashlib.sha256()
            for end in range(start, len(chunks)):
                digest.update(chunks[end])
                if digest.hexdigest() == oid:
                    return b"".join(chunks[start : end + 1])
    raise Refused(422, f"the storage has no bytes with the hash {oid}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: without this each waits 40 ms
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _respond(self) -> None:
        self._path = urlsplit(self.path).path
        self._query = parse_qs(urlsplit(self.path).query)
        length = int(self.headers.get("Content-Length") or 0)
        cut = next((c for c in self.server.cuts if re.search(c[0], self._asked)), None)
        self._body = self.rfile.read(min(length, cut[1]) if cut else length)
        self._token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        for pattern, act in self.server.holds:
            # Not headers, which are asked for by range; others are served meanwhile.
            if re.search(pattern, self._asked) and "Range" not in self.headers:
                act()
        with self.server.lock:
            try:
                if cut:
                    raise ConnectionAbortedError
                status, headers, body = self._answer()
                for pattern in self.server.losses:
                    if re.search(pattern, self._asked):
                        self.server.losses.remove(pattern)
                        raise ConnectionAbortedError
            except Refused as error:
                status, headers, body = error.status, error.headers, error.body
            except ConnectionAbortedError:
                status, headers, body = 0, {}, b""
            sent = 0 if self.command == "HEAD" else len(body)
            asked = (self.command, self._path, self.headers.get("Range", ""), self._token)
            self.server.requests.append(Request(*asked, status, len(self._body), sent))
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _respond

    @property
    def _asked(self) -> str:
        return f"{self.command} {self._path}"

    def _answer(self) -> Answer:
        asked = self._asked
        for pattern, error in self.server.faults:
            if re.search(pattern, asked):
                raise error or ConnectionAbortedError
        if self._token not in ("", self.server.token, self.server.reader):
            raise Refused(401, "Invalid credentials in Authorization header")
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, asked):
                return answer(self, **{k: unquote(v) for k, v in match.groupdict().items() if v})
        raise Refused(404, f"this miniature has no {asked}")

    def _repo(self, repo: str) -> Repo:
        found = self.server.repos.get(repo)
        if found is None or (found.private and not self._token):
            raise Refused(404 if self._token else 401, "Repository not found", "RepoNotFound")
        return found

    def _own(self, repo: str) -> Repo:
        """Return a repository that the client may write to."""
        self._check_owner(repo)
        return self._repo(repo)

    def _check_owner(self, repo: str) -> None:
        if not self._token:
            raise Refused(401, "Invalid username or password.")
        if self._token == self.server.reader:
            raise Refused(403, "this token may not write")
        owner = repo.partition("/")[0]
        if owner != self.server.user:
            raise Refused(403, f"You don't have the rights for the namespace {owner}")

    def _ranged(self, data: bytes, headers: Headers) -> Answer:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted or not self.server.ranges:
            return 200, headers, data
        start, end = int(wanted[1]), int(wanted[2] or len(data)) + 1
        part = data[start:end]
        if not part:
            raise Refused(416, "Range not satisfiable")
        span = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        return 206, {**headers, "Content-Range": span}, part

    # Reading

    def _info(self, repo: str, revision: str = "main") -> Answer:
        found = self._repo(repo)
        commit = found.resolve(revision)
        siblings = [{"rfilename": path} for path in found.commits[commit]]
        flags = {"private": found.private, "gated": "manual" if found.gated else False}
        return _json({"id": repo, "sha": commit, "siblings": siblings, **flags})

    def _tree(self, repo: str, revision: str, folder: str = "") -> Answer:
        found = self._repo(repo)
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, data in found.commits[found.resolve(revision)].items():
            if not path.startswith(prefix):
                continue
            child, _, below = path.removeprefix(prefix).partition("/")
            if below and "recursive=true" not in self.path.lower():
                entries[child] = {"type": "directory", "path": prefix + child, "oid": "0" * 40}
                continue
            entry = {"type": "file", "path": path, "oid": _git_oid(data), "size": len(data)}
            if _is_lfs(path):
                entry["lfs"] = {"oid": _oid(path, data), "size": len(data), "pointerSize": 134}
            entries[path] = entry
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        return _json(list(entries.values()))

    def _resolve(self, repo: str, revision: str, path: str) -> Answer:
        found = self._repo(repo)
        headers = {"X-Repo-Commit": found.resolve(revision)}
        if found.gated:
            status = 403 if self._token else 401
            raise Refused(status, f"Access to {repo} is restricted", "GatedRepo")
        data = found.commits[headers["X-Repo-Commit"]].get(path)
        if data is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        oid = _oid(path, data)
        if not _is_lfs(path):
            return self._ranged(data, {**headers, "ETag": f'"{oid}"'})
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{oid}"'}
        return 302, {**headers, "Location": f"{self.server.cdn}/{oid}/{path}"}, b""

    def _cdn(self, oid: str) -> Answer:
        return self._ranged(self.server.lfs[oid], {"ETag": f'"{oid}"'})

    # Writing

    def _whoami(self) -> Answer:
        if not self._token:
            raise Refused(401, "Invalid username or password.")
        role = "write" if self._token == self.server.token else "read"
        token = {"accessToken": {"displayName": "a", "role": role}}
        return _json({"type": "user", "name": self.server.user, "orgs": [], "auth": token})

    def _may_write(self, repo: str) -> Answer:
        self._repo(repo)
        self._own(repo)
        return _json({})

    def _xet_token(self, repo: str, revision: str) -> Answer:
        if self.server.storage is None:
            raise Refused(404, "no such page")
        self._changed(repo)
        ends = int(time.time()) + 3600
        cas = f"local://{self.server.storage}"
        return _json({"accessToken": "xet_Secret", "exp": ends, "casUrl": cas})

    def _changed(self, repo: str) -> Repo:
        """Return a repository that the client may write to, or open a pull request in."""
        if "create_pr" in self._query and self._token:
            return self._repo(repo)
        return self._own(repo)

    def _create(self) -> Answer:
        asked = json.loads(self._body)
        repo = f"{asked['organization'] or self.server.user}/{asked['name']}"
        self._check_owner(repo)
        url = f"{self.server.url}/{repo}"
        if repo in self.server.repos:
            raise Refused(409, "You already created this model repo", url=url)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return _json({"url": url, "id": repo})

    def _branch(self, repo: str, branch: str) -> Answer:
        found = self._own(repo)
        if branch in found.branches:
            raise Refused(409, "Reference already exists")
        found.branches[branch] = found.resolve("main")
        return _json({})

    def _validate_yaml(self) -> Answer:
        found = hub_cards.problems(json.loads(self._body)["content"])
        errors = [{"message": text} for text in found]
        status, headers, body = _json({"errors": errors, "warnings": []})
        return (400 if errors else status), headers, body

    def _preupload(self, repo: str, revision: str) -> Answer:
        found = self._changed(repo)
        tree = found.commits[found.resolve(revision)]
        modes = []
        for path in (file["path"] for file in json.loads(self._body)["files"]):
            mode = {"path": path, "uploadMode": "lfs" if _is_lfs(path) else "regular"}
            if path in tree:
                mode["oid"] = _oid(path, tree[path])
            modes.append({**mode, "shouldIgnore": False})
        return _json({"files": modes})

    def _lfs_batch(self, repo: str) -> Answer:
        self._repo(repo)
        objects = json.loads(self._body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.lfs:
                url, size = f"{self.server.url}/lfs/{item['oid']}", self.server.part
                upload: dict[str, Any] = {"href": url}
                if size and item["size"] > size:
                    count = -(-item["size"] // size)
                    urls = {str(number): f"{url}/{number}" for number in range(1, count + 1)}
                    upload = {"href": f"{url}/parts", "header": {"chunk_size": str(size), **urls}}
                item["actions"] = {"upload": upload}
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_put_part(self, oid: str, number: str) -> Answer:
        self.server.parts.setdefault(oid, {})[int(number)] = self._body
        return 200, {"ETag": f'"{hashlib.md5(self._body).hexdigest()}"'}, b""

    def _lfs_join(self, oid: str) -> Answer:
        parts, told = self.server.parts.pop(oid), json.loads(self._body)["parts"]
        assert [part["partNumber"] for part in told] == sorted(parts)
        self._body = b"".join(parts[number] for number in sorted(parts))
        return self._lfs_put(oid)

    def _lfs_put(self, oid: str) -> Answer:
        if hashlib.sha256(self._body).hexdigest() != oid:
            raise Refused(400, "the bytes do not have that hash")
        self.server.lfs[oid] = self._body
        return 200, {}, b""

    def _commit(self, repo: str, branch: str) -> Answer:
        found = self._changed(repo)
        head = found.resolve(branch)
        tree = dict(found.commits[head])
        for line in self._body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    message = value["summary"]
                    if value.get("parentCommit", head) != head:
                        raise Refused(412, "A commit has happened since. Please refresh.")
                case "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    tree[value["path"]] = self._stored(value["oid"])
                case "deletedFile":
                    del tree[value["path"]]
        page, more = f"{self.server.url}/{repo}", {}
        if "create_pr" in self._query:
            number = 1 + sum(name.startswith("refs/pr/") for name in found.branches)
            branch, more = f"refs/pr/{number}", {"pullRequestUrl": f"{page}/discussions/{number}"}
        commit = found.commit(branch, tree, message)
        return _json({"commitOid": commit, "commitUrl": f"{page}/commit/{commit}", **more})

    def _stored(self, oid: str) -> bytes:
        """Return a large file from where the client has put it."""
        if oid not in self.server.lfs and self.server.storage:
            self.server.lfs[oid] = _find(self.server.storage, oid)
        return self.server.lfs[oid]


_REPO, _REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ROUTES = (
    (rf"GET /api/models/{_REPO}(/revision/{_REV})?", _Handler._info),
    (rf"GET /api/models/{_REPO}/tree/{_REV}(/(?P<folder>.+))?", _Handler._tree),
    (rf"(GET|HEAD) /{_REPO}/resolve/{_REV}/(?P<path>.+)", _Handler._resolve),
    (r"(GET|HEAD) /cdn/(?P<oid>[^/]+)/.+", _Handler._cdn),
    (r"GET /api/whoami-v2", _Handler._whoami),
    (rf"GET /api/models/{_REPO}/auth-check/write", _Handler._may_write),
    (rf"GET /api/models/{_REPO}/xet-write-token/{_REV}", _Handler._xet_token),
    (r"POST /api/repos/create", _Handler._create),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>[^/]+)", _Handler._branch),
    (r"POST /api/validate-yaml", _Handler._validate_yaml),
    (rf"POST /api/models/{_REPO}/preupload/{_REV}", _Handler._preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (r"PUT /lfs/(?P<oid>[^/]+)", _Handler._lfs_put),
    (r"PUT /lfs/(?P<oid>[^/]+)/(?P<number>\d+)", _Handler._lfs_put_part),
    (r"POST /lfs/(?P<oid>[^/]+)/parts", _Handler._lfs_join),
    (rf"POST /api/models/{_REPO}/commit/(?P<branch>[^/]+)", _Handler._commit),
)
