"""A Hub in a thread: the part of the Hugging Face Hub's HTTP API that pushing and loading a model needs.

`HubServer` keeps repositories (commits, branches, pull requests), large files and tokens in memory, and answers
huggingface_hub's client. Large files go over LFS, in parts above `PART` bytes. `faults` lets a request fail: (method,
part of its path) to what is to happen with the next ones: "drop" (the connection closes in the middle), "after" (it is
done, and the connection closes before the answer), "late" (it is done, and a gateway has answered 504 before), "wait"
(it hangs, and `waiting` is set), "pass" or a status. `requests` holds what was asked: (method, path), and `uploaded`
the digests of the large files that came in.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

PART = 200_000
TOKENS = {"hf_ada": "ada", "hf_grace": "grace"}


@dataclass
class Repo:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    # Commit to its message and its files: path to (digest, content); a large file's content is in the server's store.
    commits: dict[str, tuple[str, dict]] = field(default_factory=dict)

    def commit(self, ref: str, message: str, files: dict) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = (message, files)
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: dict[tuple[str, str], list] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploaded: list[str] = []
        self.lock, self.waiting, self.go_on = threading.RLock(), threading.Event(), threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.hub = self
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.http.shutdown()
            self.http.server_close()
            thread.join()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository as they are now."""
        repo = self.repos[repo_id]
        _, files = repo.commits[repo.resolve(revision)]
        return {path: self.content(entry) for path, entry in files.items()}

    def content(self, entry) -> bytes:
        digest, content = entry
        return self.large[digest] if content is None else content

    def history(self, repo_id: str) -> list[str]:
        """Messages of all commits, the first one first."""
        return [message for message, _ in self.repos[repo_id].commits.values()]

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
        """A repository that is there already."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        repo.commit("main", "initial commit", {path: (git_digest(data), data) for path, data in files.items()})


def git_digest(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".bin", ".jpg", ".png")) or size > 10_000_000


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def handle_one(self):
        url = urlsplit(self.path)
        self.segments = [unquote(part) for part in url.path.strip("/").split("/")]
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, unquote(url.path)))
        self.loses_answer: str | None = None
        if self.fails(url.path):
            return
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        try:
            with self.hub.lock:
                self.route()
        except Refused as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def fails(self, path: str) -> bool:
        """Let this request fail, if it is one of those that are to."""
        for (method, part), outcomes in self.hub.faults.items():
            if method == self.command and part in path and outcomes:
                outcome = outcomes.pop(0)
                if outcome == "pass":
                    return False
                if outcome in ("after", "late"):
                    self.loses_answer = outcome
                    return False
                if outcome == "drop":
                    if self.command in ("POST", "PUT"):
                        self.rfile.read(1)  # something came
                    self.close_connection = True
                    self.connection.close()
                elif outcome == "wait":  # for a client that is stopped in the middle
                    self.rfile.read(1)
                    self.hub.waiting.set()
                    self.hub.go_on.wait(60)
                    self.close_connection = True
                else:
                    self.rfile.read(int(self.headers.get("Content-Length") or 0))
                    self.answer({"error": "out of order"}, outcome)
                return True
        return False

    def answer(self, content, status: int = 200, headers: dict | None = None):
        if self.loses_answer == "after":
            self.close_connection = True
            self.connection.close()
            return
        if self.loses_answer == "late":
            content, status, headers = b"Gateway Time-out", 504, None
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- who asks, and for what

    @property
    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def repo(self, repo_id: str, writes: bool = False) -> Repo:
        user, owner = self.user, repo_id.partition("/")[0]
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user != owner):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if writes and user != owner:
            raise Refused(403 if user else 401, f"You have no right to write to {repo_id}")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        if (oid := repo.resolve(revision)) is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def route(self):
        match self.segments:
            case ["api", "whoami-v2"]:
                if self.user is None:
                    raise Refused(401, "Invalid username or password.")
                self.answer({"type": "user", "name": self.user})
            case ["api", "repos", "create"]:
                self.create()
            case ["api", "validate-yaml"]:
                self.validate(json.loads(self.body)["content"])
            case ["api", "models", owner, name]:
                self.info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self.info(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision, *folder]:
                self.tree(f"{owner}/{name}", revision, "/".join(folder))
            case ["api", "models", owner, name, "refs"]:
                self.refs(f"{owner}/{name}")
            case ["api", "models", owner, name, "branch", branch]:
                self.branch(f"{owner}/{name}", branch)
            case ["api", "models", owner, name, "preupload", revision]:
                self.preupload(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "commit", revision]:
                self.commit(f"{owner}/{name}", revision)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self.batch(f"{owner}/{name.removesuffix('.git')}")
            case ["lfs", digest, *part]:
                self.store(digest, part)
            case [owner, name, "resolve", revision, *path]:
                self.resolve(f"{owner}/{name}", revision, "/".join(path))
            case _:
                raise Refused(404, f"This Hub knows no {self.path}")

    # --- repositories

    def create(self):
        asked = json.loads(self.body)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        repo_id = f"{asked['organization'] or self.user}/{asked['name']}"
        if repo_id.partition("/")[0] != self.user:
            raise Refused(403, f"You have no right to make a model under {repo_id.partition('/')[0]}")
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self.answer(url | {"error": "You already created this model repo"}, 409)
        self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs"}, asked.get("visibility") == "private")
        return self.answer(url)

    def validate(self, content: str):
        try:
            metadata = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            errors = [] if isinstance(metadata, dict) else [{"message": "metadata is no dictionary"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        for result in [] if errors else (metadata.get("model-index") or [{}])[0].get("results", []):
            if not {"type", "name"} <= result["dataset"].keys() or "type" not in result["task"]:
                errors.append({"message": '"model-index" lacks a dataset or a task'})
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, repo_id: str, revision: str):
        repo = self.repo(repo_id)
        oid = self.commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[oid][1]]
        self.answer({"id": repo_id, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, repo_id: str, revision: str, folder: str):
        repo = self.repo(repo_id)
        files = repo.commits[self.commit_of(repo, revision)][1]
        found = []
        for path, entry in files.items():
            if folder and not path.startswith(folder + "/"):
                continue
            size = len(self.hub.content(entry))
            lfs = {"lfs": {"oid": entry[0], "size": size, "pointerSize": 130}} if entry[1] is None else {}
            found.append({"type": "file", "path": path, "size": size, "oid": entry[0][:40], **lfs})
        if folder and not found:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        self.answer(found)

    def refs(self, repo_id: str):
        repo = self.repo(repo_id)
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in repo.refs.items()]
        self.answer({"branches": branches, "converts": [], "tags": []})

    def branch(self, repo_id: str, branch: str):
        repo = self.repo(repo_id, writes=True)
        if branch in repo.refs:
            raise Refused(409, f"Reference {branch} exists already")
        repo.refs[branch] = repo.refs["main"]
        self.answer({})

    # --- uploads

    def preupload(self, repo_id: str, revision: str):
        repo = self.repo(repo_id, writes=True)
        files = repo.commits[self.commit_of(repo, revision)][1]
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                "oid": files[file["path"]][0] if file["path"] in files else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer({"files": answers})

    def batch(self, repo_id: str):
        self.repo(repo_id, writes=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            digest, size, found = asked["oid"], asked["size"], {}
            href = f"{self.hub.url}/lfs/{digest}"
            if digest not in self.hub.large:
                upload = {"href": href}
                if size > PART:
                    count = -(-size // PART)
                    upload["href"] += "/complete"
                    upload["header"] = {"chunk_size": str(PART)}
                    upload["header"] |= {str(part): f"{href}/{part}" for part in range(1, count + 1)}
                found = {"actions": {"upload": upload, "verify": {"href": f"{href}/verify"}}}
            objects.append({"oid": digest, "size": size, **found})
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, digest: str, part: list[str]):
        if part == ["verify"]:
            if len(self.hub.large.get(digest, b"")) != json.loads(self.body)["size"]:
                raise Refused(400, f"{digest} is not there")
            return self.answer({})
        if part and part != ["complete"]:
            self.hub.parts[digest, int(part[0])] = self.body
            return self.answer(b"", headers={"ETag": hashlib.md5(self.body).hexdigest()})
        content = self.body
        if part:
            numbers = [each["partNumber"] for each in json.loads(self.body)["parts"]]
            content = b"".join(self.hub.parts.pop((digest, number)) for number in numbers)
        if hashlib.sha256(content).hexdigest() != digest:
            raise Refused(400, f"The content is not that of {digest}")
        self.hub.large[digest] = content
        self.hub.uploaded.append(digest)
        return self.answer({})

    def commit(self, repo_id: str, revision: str):
        repo = self.repo(repo_id, writes=True)
        parent = self.commit_of(repo, revision)
        files, summary = dict(repo.commits[parent][1]), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    summary = value["summary"]
                case "file":
                    content = base64.b64decode(value["content"])
                    files[value["path"]] = (git_digest(content), content)
                case "lfsFile":
                    if len(self.hub.large.get(value["oid"], b"")) != value["size"]:
                        raise Refused(400, f"{value['path']} was not uploaded")
                    files[value["path"]] = (value["oid"], None)
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Refused(404, f"There is no {value['path']} to delete", "EntryNotFound")
        ref = revision
        if "create_pr" in self.query:
            ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.refs)}"
        oid = repo.commit(ref, summary, files)
        pull_request = f"{self.hub.url}/{repo_id}/discussions/{ref.rpartition('/')[2]}"
        self.answer(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}",
                "pullRequestUrl": pull_request if "create_pr" in self.query else None,
            }
        )

    # --- downloads

    def resolve(self, repo_id: str, revision: str, path: str):
        repo = self.repo(repo_id)
        oid = self.commit_of(repo, revision)
        headers = {"X-Repo-Commit": oid}
        entry = repo.commits[oid][1].get(path)
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = self.hub.content(entry)
        headers |= {"ETag": f'"{entry[0]}"', "Accept-Ranges": "bytes"}
        if entry[1] is None:
            headers |= {"X-Linked-Etag": f'"{entry[0]}"', "X-Linked-Size": str(len(content))}
        self.answer(content, headers=headers)
