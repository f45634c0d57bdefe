"""Weights come from the hub once, exactly the files that are needed, and are there offline afterwards.

A stand-in for the hub on 127.0.0.1 serves a small model and writes down what it is asked for.
"""

import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file
from small_model import single_file_tensors, small_model

import weights_loader

ROOT = Path(__file__).parents[1]
REPO, REVISION = weights_loader.SD15
NEEDED = {"unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
          "tokenizer/vocab.json", "tokenizer/merges.txt"}
WEIGHTS = {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
           "text_encoder/model.safetensors"}
LOAD = """
import sys, weights_loader
from small_model import TEXT, UNET, VAE
weights_loader.SINGLE_FILE_CONFIGS = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
try:
    model = weights_loader.load(sys.argv[1], variant=sys.argv[2] if len(sys.argv) > 2 else None)
    print(model.fingerprint, model.name)
except weights_loader.LoadError as error:
    print("LoadError:", error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        """/owner/name/resolve/revision/path as huggingface.co answers: the commit, a tag, byte ranges."""
        self.server.asked.append((self.command, self.path))
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        file = self.server.folder / name
        known = (repo, revision) in ((REPO, REVISION), ("someone/model", "main"))
        if not known or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A repository that holds much more than is needed."""
    folder = tmp_path_factory.mktemp("repository")
    weights_loader.save(small_model(), folder)
    for name in WEIGHTS:
        path = folder / name
        path.with_suffix(".fp16.safetensors").write_bytes(path.read_bytes())
        path.with_suffix(".bin").write_bytes(b"big")
    for name in ("v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "model_index.json", "safety_checker.safetensors"):
        (folder / name).write_bytes(b"big")
    return folder


@pytest.fixture
def hub(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = folder, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load(port, cache, *arguments):
    """Load in a process of its own, whose hub is on that port: (what it printed, seconds)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, arguments)], cwd=cache, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), time.perf_counter() - start


def closed_port():
    """A port on which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fetched(hub, repo=REPO, revision=REVISION):
    prefix = f"/{repo}/resolve/{revision}/"
    assert all(path.startswith(prefix) for _, path in hub.asked), hub.asked
    files = [path.removeprefix(prefix) for method, path in hub.asked if method == "GET"]
    assert len(files) == len(set(files))
    return set(files)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_exactly_the_needed_files_at_the_pinned_revision_once(hub, folder, tmp_path, variant):
    arguments = ["sd15"] + [variant] * bool(variant)
    answer, _ = load(hub.server_port, tmp_path, *arguments)
    assert answer == f"{weights_loader.load(folder).fingerprint} sd15"
    weights = {name.replace(".safetensors", ".fp16.safetensors") for name in WEIGHTS} if variant else WEIGHTS
    assert fetched(hub) == NEEDED | weights
    hub.asked.clear()
    again, _ = load(closed_port(), tmp_path, *arguments)  # no hub, no network
    assert again == answer
    once_more, _ = load(hub.server_port, tmp_path, *arguments)
    assert once_more == answer and not hub.asked  # not even asked whether there is something new


def test_an_interrupted_download_goes_on(hub, folder, tmp_path):
    name = "unet/diffusion_pytorch_model.safetensors"
    hub.folder = tmp_path / "broken"
    hub.folder.symlink_to(folder)
    data = (folder / name).read_bytes()
    blobs = tmp_path / "cache" / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(data).hexdigest()}.incomplete").write_bytes(data[:100_000])
    answer, _ = load(hub.server_port, tmp_path / "cache", "sd15")
    assert answer == f"{weights_loader.load(folder).fingerprint} sd15"


def test_a_single_file_without_a_vocabulary_fetches_only_that(hub, tmp_path):
    model = small_model()
    save_file({key: tensor.contiguous() for key, tensor in single_file_tensors(model).items()},
              tmp_path / "v1.safetensors")
    answer, _ = load(hub.server_port, tmp_path, tmp_path / "v1.safetensors")
    assert answer.endswith(" v1") and fetched(hub) == {"tokenizer/vocab.json", "tokenizer/merges.txt"}
    again, _ = load(closed_port(), tmp_path, tmp_path / "v1.safetensors")
    assert again == answer


def test_any_repository_in_this_layout_can_be_named(hub, tmp_path):
    answer, _ = load(hub.server_port, tmp_path, "someone/model")
    assert answer.endswith(" someone/model") and fetched(hub, "someone/model", "main") == NEEDED | WEIGHTS
    again, _ = load(closed_port(), tmp_path, "someone/model")
    assert again == answer


def test_without_network_and_cache_there_is_one_sentence_quickly(tmp_path):
    answer, seconds = load(closed_port(), tmp_path, "sd15")
    assert answer.startswith(f"LoadError: {REPO}: unet/config.json is not in the local cache and could not be")
    assert "\n" not in answer
    assert seconds < 60  # most of it imports; the hub's client gives up after a few seconds


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    answer, _ = load(hub.server_port, tmp_path, "no/such-model")
    assert answer == "LoadError: no/such-model: neither a folder here nor a public repository on the hub"
    answer, _ = load(hub.server_port, tmp_path, "sd15", "bf16")
    assert answer == f"LoadError: {REPO}: there is no file unet/diffusion_pytorch_model.bf16.safetensors " \
                     "in this hub repository"


def test_only_the_listed_files_of_the_published_repository_are_named():
    """4.27 GB and 2.13 GB: the published sizes of the six files of weights."""
    sizes = {"unet/diffusion_pytorch_model.safetensors": 3438167540, "text_encoder/model.safetensors": 492265874,
             "vae/diffusion_pytorch_model.safetensors": 334643276,
             "unet/diffusion_pytorch_model.fp16.safetensors": 1719125304,
             "text_encoder/model.fp16.safetensors": 246144864, "vae/diffusion_pytorch_model.fp16.safetensors": 167335342}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_loader, "hub_files", lambda repo, revision, names: names)
        for variant, total in ((None, 4.27e9), ("fp16", 2.13e9)):
            names = weights_loader.download(REPO, REVISION, variant)
            assert abs(sum(sizes.get(name, 0) for name in names) - total) < 0.01e9
            assert len(set(names) & sizes.keys()) == 3
