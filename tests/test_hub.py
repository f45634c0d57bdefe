"""Weights come from the hub once, exactly the files that are needed, and are there offline afterwards.

A stand-in for the hub on 127.0.0.1 serves a small model and writes down what it is asked for.
"""

import functools
import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import weights_loader
from models import ROOT, SMALL, bins, half, rewritten, shards, single_file_tensors, small_model
from support import weight_names

REPO, REVISION = weights_loader.SD15
NEEDED = {"unet/config.json", "vae/config.json", "text_encoder/config.json",
          "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}
WEIGHTS = {f"{part}/{names[0]}" for part, names in weights_loader.WEIGHTS.items()}
KINDS = {"bins": bins, "half": half, "shards": shards}


class Answer(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with what huggingface.co says of them."""

    def send_response(self, code, message=None):
        self.server.asked.append((self.command, self.path))
        super().send_response(code, message)
        self.send_header("ETag", f'"{hashlib.sha256(self.path.encode()).hexdigest()}"')
        self.send_header(*("X-Error-Code", "RepoNotFound") if code == 404 else ("X-Repo-Commit", REVISION))


class Hub(http.server.ThreadingHTTPServer):
    """The stand-in, which serves a folder; asked: what was asked of it, as (method, path)."""

    def __init__(self, folder, cache):
        super().__init__(("127.0.0.1", 0), functools.partial(Answer, directory=folder))
        self.folder, self.cache, self.asked = folder, cache, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def off(self):
        self.shutdown()
        self.server_close()

    def fetched(self, repo=REPO, revision=REVISION):
        """The files that were fetched since the last call, each once; those of the repository without it."""
        files = [path.removeprefix(f"/{repo}/resolve/{revision}/") for method, path in self.asked
                 if method == "GET" and not path.startswith("/api/")]
        assert len(files) == len(set(files))
        self.asked.clear()
        return set(files)

    def cached(self, kind, repo, commit, named=False):
        """What another program leaves in the cache, of a repository that is one of the folder's."""
        place = self.cache / f"models--{repo.replace('/', '--')}"
        shutil.copytree(self.folder / kind, place / "snapshots" / commit)
        if named:
            (place / "refs").mkdir()
            (place / "refs" / "main").write_text(commit)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models: `model` with much more than is needed, those of KINDS with one form of weights; served."""
    folder = tmp_path_factory.mktemp("repositories")
    weights_loader.save(small_model(), folder / "model")
    for kind, write in KINDS.items():
        rewritten(Path(shutil.copytree(folder / "model", folder / kind)), write)
    for name in WEIGHTS:
        path = folder / "model" / name
        path.with_suffix(".fp16.safetensors").write_bytes(path.read_bytes())
    for name in ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", "model_index.json"):
        (folder / "model" / name).write_bytes(b"big")
    for kind in ("model", *KINDS):
        repo, revision = (REPO, REVISION) if kind == "model" else (f"someone/{kind}", "main")
        shutil.copytree(folder / kind, folder / repo / "resolve" / revision)
        listing = folder / "api" / "models" / repo / "revision" / revision
        listing.parent.mkdir(parents=True)
        files = [{"rfilename": str(path.relative_to(folder / kind))} for path in (folder / kind).rglob("*.*")]
        listing.write_text(json.dumps({"id": repo, "siblings": files}))
    return folder


@pytest.fixture(scope="module")
def fingerprint(folder):
    return weights_loader.load(folder / "model").fingerprint


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    hub = Hub(folder, tmp_path / "cache")
    url = f"http://127.0.0.1:{hub.server_port}"
    for name, value in (("ENDPOINT", url), ("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(hub.cache)),
                        ("HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(weight_names, "SD_V1", SMALL)
    yield hub
    hub.off()


def load(weights, variant=None):
    """Its fingerprint and name."""
    model = weights_loader.load(weights, variant=variant)
    return f"{model.fingerprint} {model.name}"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_exactly_the_needed_files_at_the_pinned_revision_once(hub, fingerprint, variant):
    assert load("sd15", variant) == f"{fingerprint} sd15"
    weights = {name.replace(".safetensors", ".fp16.safetensors") for name in WEIGHTS} if variant else WEIGHTS
    assert hub.fetched() == NEEDED | weights
    assert load("sd15", variant) == f"{fingerprint} sd15" and not hub.asked  # not even for something newer
    if variant:  # while the hub is there, half precision is not taken for full
        load("sd15")
        assert hub.fetched() == WEIGHTS
    hub.off()
    assert load("sd15", variant) == f"{fingerprint} sd15"


@pytest.mark.parametrize("kind, repo, commit, said", [
    ("bins", "someone/bins", "abc", ""), ("shards", "sd15", REVISION, ""),
    ("bins", "gone/away", "abc", "gone/away: out of reach, taken from the local cache, commit abc"),
    ("model", "sd15", "abc", f"{REPO}: out of reach, taken from the local cache, commit abc"),
    ("half", "sd15", REVISION, "sd15: its files are in half precision (fp16), there are no others")])
def test_a_model_in_the_cache_is_enough(hub, fingerprint, recwarn, kind, repo, commit, said):
    hub.cached(kind, REPO if repo == "sd15" else repo, commit, named=repo == "someone/bins")
    if repo != "gone/away":     # which the hub does not know
        hub.off()
    assert load(repo) == f"{fingerprint} {repo}"
    assert "".join(str(line.message) for line in recwarn) == said


def test_what_is_cached_in_part_is_completed_and_no_other_commit_counts(hub, fingerprint):
    hub.cached("model", REPO, "abc", named=True)
    hub.cached("shards", "someone/shards", REVISION, named=True)
    *_, missing = hub.cache.glob("*shards/**/*-00002-*")
    missing.unlink()
    assert load("someone/shards") == f"{fingerprint} someone/shards"
    assert hub.fetched("someone/shards", "main") == {missing.relative_to(missing.parents[1]).as_posix()}
    assert load("sd15") == f"{fingerprint} sd15" and WEIGHTS <= hub.fetched()


@pytest.mark.parametrize("kind, variant", [("bins", "fp16"), *((kind, None) for kind in KINDS)])
def test_a_repository_with_another_form_of_weights_is_there_offline(hub, folder, fingerprint, kind, variant):
    repo = f"someone/{kind}"
    assert load(repo, variant) == f"{fingerprint} {repo}"
    weights = {str(path.relative_to(folder / kind)) for name in WEIGHTS
               for path in (folder / kind / name).parent.iterdir() if path.suffix != ".json"}
    assert hub.fetched(repo, "main") == NEEDED | weights
    assert load(repo, "fp16") == f"{fingerprint} {repo}" and not hub.asked  # the full files serve for half
    hub.off()
    assert load(repo) == f"{fingerprint} {repo}"  # what it lacks is remembered, too


def test_a_single_file_without_a_vocabulary_fetches_only_that(hub, tmp_path):
    torch.save(single_file_tensors(small_model()), tmp_path / "v1.ckpt")
    found = load(tmp_path / "v1.ckpt")
    assert hub.fetched() == {"tokenizer/vocab.json", "tokenizer/merges.txt"}
    hub.off()
    assert load(tmp_path / "v1.ckpt") == found


def test_without_network_what_the_cache_lacks_is_named_quickly(hub):
    hub.cached("model", REPO, REVISION)
    next(hub.cache.glob("*/snapshots/*/vae/config.json")).unlink()
    hub.off()
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"{REPO} is no folder.*vae/config.json: there is no such"):
        load("sd15")
    assert time.perf_counter() - start < 5  # the client's five retries would take 23


def test_a_program_without_network_and_cache_ends_with_one_sentence(tmp_path, monkeypatch):
    """In a process of its own: here huggingface_hub is imported already. conftest.py keeps it offline."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "sample.py", "a cat", "--weights", "owner/name"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: owner/") and done.stderr.count("\n") == 1


def test_what_the_hub_does_not_have_is_named(hub):
    with pytest.raises(ValueError, match=r"to be had from the hub \(RepositoryNotFoundError\); in its cache"):
        load("no/such-model")
    with pytest.raises(ValueError, match=f"{REPO}/unet/.*bf16.safetensors: there is no such file$"):
        load("sd15", "bf16")
