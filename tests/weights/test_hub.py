"""The Hub, both ways, against a small stand-in on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import yaml

from msn.commands.entry import compose
from msn.errors import UserError
from msn.weights import hub, load_backbone
from tests.weights.builders import make_trunk, save_run

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: what huggingface_hub asks to read one, to make one, and to commit."""

    files: dict[str, dict[str, bytes]]
    asked: list[str]

    def log_message(self, *_):
        pass

    def answer(self, data=b"", status=200, **headers):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"]:
            name = "/".join(path[2:4])
            if name not in self.files:
                return self.answer(
                    {"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound"
                )
            if "tree" in path:
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                    for file, data in self.files[name].items()
                ]
                return self.answer(tree)
            siblings = [{"rfilename": file} for file in self.files[name]]
            return self.answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})
        name, file = "/".join(path[:2]), "/".join(path[4:])
        data = self.files.get(name, {}).get(file)
        if data is None:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self):
        self.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"me/{asked['name']}"
            self.files.setdefault(name, {})["private"] = json.dumps(asked).encode()
            return self.answer({"url": f"{ENDPOINT[0]}/{name}"})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self.answer({"files": modes})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[name][value["path"]] = base64.b64decode(value["content"])
            url = f"{ENDPOINT[0]}/{name}/commit/{COMMIT}"
            return self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.answer({})


ENDPOINT = [""]


@pytest.fixture
def stand_in():
    Hub.files, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    ENDPOINT[0] = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield ENDPOINT[0]
    server.shutdown()


def run(endpoint, folder, *arguments, **more):
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": "hf_x",
        "HF_HUB_DISABLE_XET": "1",
        **more,
    }
    return subprocess.run(
        [sys.executable, "-m", "msn", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )


@pytest.mark.slow
def test_an_export_is_pushed_and_read_again_also_without_the_network(stand_in, tmp_path):
    save_run(tmp_path / "run", make_trunk())
    made = run(
        *(stand_in, tmp_path, "export", "checkpoint=run", "format=huggingface", "out=hf"),
        "push=me/msn-small",
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1] == f"pushed to: {stand_in}/me/msn-small"
    held = Hub.files["me/msn-small"]
    assert b"private" in held.pop("private").lower()
    assert {name: data for name, data in held.items()} == {
        path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()
    }
    held["evil.py"] = b"raise SystemExit(3)"
    get = ("export", "checkpoint=hf://me/msn-small", "format=torch")
    assert run(stand_in, tmp_path, *get, "out=again").returncode == 0
    assert "evil.py" not in " ".join(Hub.asked)
    offline = run("http://127.0.0.1:1", tmp_path, *get, "out=offline", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    ours = load_backbone(tmp_path / "run").state_dict()
    for out in ("again", "offline"):
        theirs = load_backbone(tmp_path / out).state_dict()
        assert all(theirs[name].equal(tensor) for name, tensor in ours.items())
    nothing = ("export", "checkpoint=hf://me/nothing", "format=torch", "out=no")
    wrong = run(stand_in, tmp_path, *nothing)
    assert wrong.returncode == 2
    (line,) = wrong.stderr.splitlines()
    assert "hf://me/nothing: cannot be fetched from the Hub" in line


def test_what_fails_is_one_line_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"push=me/x: no token: run `hf auth login`"):
        hub.check_push("me/x")
    with pytest.raises(UserError, match=r"push=x: must be USER/NAME"):
        hub.check_push("x")

    def unreachable(*_, **__):
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for address in ("hf://a/b", "hf:/a/b@v1"):
        with pytest.raises(
            UserError, match="^hf://a/b.*: cannot be fetched from the Hub .no route."
        ):
            hub.local_path(address)
    with pytest.raises(UserError, match="must be hf://USER/NAME"):
        hub.local_path("hf://a")
    assert hub.local_path("a/b").parts == ("a", "b")


def test_a_revision_is_asked_for(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path)
    )
    assert hub.local_path("hf://a/b@v1.0") == tmp_path
    ((arguments, options),) = asked
    assert arguments == ("a/b",)
    assert options["revision"] == "v1.0"


def test_metrics_stand_in_the_cards_front_matter():
    rows = [
        {"backbone": "msn", "classifier": "logistic", "labels": "5", "top1_mean": 0.875},
        {"backbone": "msn", "classifier": "knn", "labels": "all", "top1_mean": 0.9},
        {"backbone": "random", "classifier": "knn", "labels": "all", "top1_mean": 0.1},
    ]
    read = yaml.safe_load("\n".join(hub.model_index("msn", rows, "it's digits")))
    (model,) = read["model-index"]
    assert [r["metrics"][0]["value"] for r in model["results"]] == [0.875, 0.9]
    assert model["results"][0]["metrics"][0]["name"] == "top-1, logistic, 5 labels per class"
    assert model["results"][0]["dataset"]["name"] == "it's digits"
    assert hub.model_index("msn", rows[2:], "x") == []


def test_private_is_the_default():
    assert compose("export", ["checkpoint=x", "format=timm", "out=y"]).private is True
