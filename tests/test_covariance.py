"""The covariance of text encodings: its definition, its cache, its script."""

import pytest
import torch
from safetensors import safe_open

import covariance
from models import run_script, tiny_model, write_weights
from weights_loader import load

CAPTIONS = ["a photo of a teddy bear", "cat", "a cat on the beach", "wearing hat", "next to a bear"] * 3


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load(write_weights(tmp_path / "weights"))


def encodings(model, caption):
    ids, _ = model.tokenizer.encode([caption])
    return model.text_encoder(model.text_encoder.embed(ids))[0].double()


def test_it_is_the_mean_outer_product_of_the_encodings(model):
    rows = torch.cat([encodings(model, caption) for caption in CAPTIONS])
    C = covariance.covariance(model.text_encoder, model.tokenizer, CAPTIONS)
    assert C.dtype == torch.float64
    # 1e-5: the encodings are float32 and differ by rounding with the size of a batch
    torch.testing.assert_close(C, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-5)


def test_the_inverse_is_exact_and_refuses_a_singular_covariance():
    x = torch.randn(100, 8, dtype=torch.float64)
    C = x.T @ x
    one = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(covariance.inverse(C) @ C, one, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="span only 4 of 8 dimensions.*captions"):
        covariance.inverse(x[:4].T @ x[:4])


def test_built_in_captions_are_reproducible_and_varied(model):
    captions = covariance.built_in_captions(2000, model.tokenizer)
    assert captions == covariance.built_in_captions(2000, model.tokenizer)
    assert len(set(captions)) > 1700 and not any("{" in caption or "}" in caption for caption in captions)


def test_it_is_computed_once_and_kept_beside_the_weights(files, monkeypatch):
    monkeypatch.setattr(covariance, "CAPTIONS", 300)
    lines = []
    C = covariance.cached(files, lines.append)
    assert len(lines) == 2 and "condition number" in lines[1]
    assert (files.folder / covariance.FILE).is_file()
    assert torch.equal(covariance.cached(files, lines.append), C) and len(lines) == 2
    with safe_open(files.folder / covariance.FILE, "pt") as file:
        assert file.metadata()["captions"] == "built-in 300"


def test_where_no_cache_can_be_written_the_training_goes_on(files, tmp_path, monkeypatch):
    monkeypatch.setattr(covariance, "CAPTIONS", 200)
    C = covariance.cached(files, lambda line: None)
    files.folder = None
    for cache in (tmp_path / "file" / "cache", "not/absolute"):         # a file in its way; no home folder
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        with pytest.warns(UserWarning, match="cannot be kept"):
            assert torch.equal(covariance.cached(files, lambda line: None), C)


def test_a_file_of_another_model_or_a_damaged_one_is_computed_again(files, monkeypatch):
    monkeypatch.setattr(covariance, "CAPTIONS", 200)
    path = covariance.store(torch.eye(16), files)
    files.fingerprint = "another"
    lines = []
    covariance.cached(files, lines.append)
    path.write_bytes(b"damaged")
    covariance.cached(files, lines.append)
    assert len(lines) == 4


def test_weights_without_a_folder_of_their_own_use_the_users_cache(files, tmp_path):
    files.folder = None
    path = covariance.store(torch.eye(16), files)
    assert path.parent == tmp_path / "cache" / "perfusion" and files.fingerprint in path.name
    assert torch.equal(covariance.cached(files), torch.eye(16).double())


def test_the_script_stores_and_reports(files, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(covariance.built_in_captions(90, files.tokenizer)))
    code, said, _ = run_script("covariance.py", "--weights", files.folder, "--captions", captions)
    assert code == 0 and "90 captions, condition number" in said
    with safe_open(files.folder / covariance.FILE, "pt") as file:
        assert file.metadata()["captions"] == "captions.txt"
