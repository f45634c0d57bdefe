"""Weights come from the hub once, exactly the files that are needed, and are there offline afterwards.

A stand-in for the hub on 127.0.0.1 serves a small model and writes down what it is asked for.
"""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import save_file

import weights_loader
from models import ROOT, bins, half, rewritten, shards, single_file_tensors, small_model

REPO, REVISION = weights_loader.SD15
NEEDED = {"unet/config.json", "vae/config.json", "text_encoder/config.json",
          "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}
WEIGHTS = {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
           "text_encoder/model.safetensors"}
WORKER = """
import json, sys, time, weights_loader
from huggingface_hub import constants
from models import SMALL
weights_loader.weight_formats.SD_V1 = SMALL
for line in sys.stdin:
    constants.HF_HUB_CACHE, weights, variant = json.loads(line)
    start = time.perf_counter()
    try:
        model = weights_loader.load(weights, variant=variant)
        answer = f"{model.fingerprint} {model.name}"
    except ValueError as error:
        answer = f"error: {error}"
    print(json.dumps([answer, time.perf_counter() - start]), flush=True)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        """/owner/name/resolve/revision/path as huggingface.co answers: the commit and a tag."""
        self.server.asked.append((self.command, self.path))
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        owner, _, kind = repo.partition("/")
        known = (repo, revision) == (REPO, REVISION) or (owner, revision) == ("someone", "main")
        file = self.server.folder / (kind if owner == "someone" else "model") / name
        if not known or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            if known:
                self.send_header("X-Repo-Commit", REVISION)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


KINDS = {"bins": bins, "half": half, "shards": shards}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Repositories: `model` holds much more than is needed, those of KINDS only one form of weights."""
    folder = tmp_path_factory.mktemp("repositories")
    weights_loader.save(small_model(), folder / "model")
    for kind, write in KINDS.items():
        rewritten(Path(shutil.copytree(folder / "model", folder / kind)), write)
    for name in WEIGHTS:
        path = folder / "model" / name
        path.with_suffix(".fp16.safetensors").write_bytes(path.read_bytes())
        path.with_suffix(".bin").write_bytes(b"big")
    for name in ("v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "model_index.json"):
        (folder / "model" / name).write_bytes(b"big")
    return folder


@pytest.fixture(scope="module")
def fingerprint(folder):
    return weights_loader.load(folder / "model").fingerprint


class Stand:
    """The stand-in, on or off, and one process whose HF_ENDPOINT it is."""

    def __init__(self, folder, home):
        self.folder, self.asked, self.server, self.port = folder, [], None, 0
        self.switch(True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        self.worker = subprocess.Popen([sys.executable, "-c", WORKER], cwd=home, env=environment, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def switch(self, on):
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
        if on:
            self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Hub)
            self.port = self.server.server_port
            self.server.folder, self.server.asked = self.folder, self.asked
            threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def load(self, cache, weights, variant=None):
        """(fingerprint and name, or the error; seconds)."""
        self.worker.stdin.write(json.dumps([str(cache), str(weights), variant]) + "\n")
        self.worker.stdin.flush()
        return json.loads(self.worker.stdout.readline())

    def fetched(self, repo=REPO, revision=REVISION):
        """The files of the repository that were fetched since the last call; nothing else was asked for."""
        prefix = f"/{repo}/resolve/{revision}/"
        client = "/api/agent-harnesses"  # which the client asks for, for its own user agent
        asked = [(method, path) for method, path in self.asked if path != client]
        assert all(path.startswith(prefix) for _, path in asked), asked
        files = [path.removeprefix(prefix) for method, path in asked if method == "GET"]
        assert len(files) == len(set(files))
        self.asked.clear()
        return set(files)


@pytest.fixture(scope="module")
def stand(folder, tmp_path_factory):
    stand = Stand(folder, tmp_path_factory.mktemp("home"))
    yield stand
    stand.worker.stdin.close()
    stand.worker.wait(60)
    stand.switch(False)


@pytest.fixture
def hub(stand):
    stand.switch(True)
    stand.asked.clear()
    return stand


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_exactly_the_needed_files_at_the_pinned_revision_once(hub, fingerprint, tmp_path, variant):
    answer, _ = hub.load(tmp_path, "sd15", variant)
    assert answer == f"{fingerprint} sd15"
    weights = {name.replace(".safetensors", ".fp16.safetensors") for name in WEIGHTS} if variant else WEIGHTS
    assert hub.fetched() == NEEDED | weights
    assert hub.load(tmp_path, "sd15", variant)[0] == answer and not hub.asked  # not even for something newer
    hub.switch(False)
    assert hub.load(tmp_path, "sd15", variant)[0] == answer
    if variant:  # what is there is not taken for what was asked for
        assert hub.load(tmp_path, "sd15")[0].startswith(f"error: {REPO}: neither a folder here, nor is")


@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_with_another_form_of_weights_is_there_offline(hub, folder, fingerprint, tmp_path, kind):
    repo = f"someone/{kind}"
    assert hub.load(tmp_path, repo)[0] == f"{fingerprint} {repo}"
    weights = {str(path.relative_to(folder / kind)) for name in WEIGHTS
               for path in (folder / kind / name).parent.iterdir() if path.name != "config.json"}
    assert hub.fetched(repo, "main") == NEEDED | weights
    hub.switch(False)
    assert hub.load(tmp_path, repo)[0] == f"{fingerprint} {repo}"  # what it lacks is remembered, too


def test_a_single_file_without_a_vocabulary_fetches_only_that(hub, fingerprint, tmp_path):
    save_file({key: tensor.contiguous() for key, tensor in single_file_tensors(small_model()).items()},
              tmp_path / "v1.safetensors")
    assert hub.load(tmp_path, tmp_path / "v1.safetensors")[0] == f"{fingerprint} v1"
    assert hub.fetched() == {"tokenizer/vocab.json", "tokenizer/merges.txt"}
    hub.switch(False)
    assert hub.load(tmp_path, tmp_path / "v1.safetensors")[0] == f"{fingerprint} v1"


def test_without_network_and_cache_there_is_one_sentence_quickly(hub, tmp_path):
    hub.switch(False)
    answer, seconds = hub.load(tmp_path, "sd15")
    assert answer.startswith(f"error: {REPO}: neither a folder here, nor is unet/config.json in the local")
    assert seconds < 5  # the client's five retries would take 23


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    answer, _ = hub.load(tmp_path, "no/such-model")
    assert answer.endswith("to be had from the hub (RepositoryNotFoundError)")
    answer, _ = hub.load(tmp_path, "sd15", "bf16")
    assert answer.startswith(f"error: {REPO}: there is no file unet/diffusion_pytorch_model.bf16.safetensors")
