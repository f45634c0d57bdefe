"""The covariance of text encodings: its definition, its cache, its script."""

import pytest
import torch

import covariance
from models import run_script, tiny_model, write_weights
from weights_loader import load

CAPTIONS = ["a photo of a teddy bear", "cat", "a cat on the beach", "wearing hat", "next to a bear"] * 3


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model with a folder of its own, of few captions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(covariance, "CAPTIONS", 200)
    return load(write_weights(tmp_path / "weights"))


def test_it_is_the_mean_outer_product_of_the_encodings():
    model = tiny_model()
    ids = torch.cat([model.tokenizer.encode([caption])[0] for caption in CAPTIONS])
    rows = model.text_encoder(model.text_encoder.embed(ids)).double().flatten(0, 1)
    C = covariance.covariance(model.text_encoder, model.tokenizer, CAPTIONS)
    assert C.dtype == torch.float64
    torch.testing.assert_close(C, rows.T @ rows / len(rows), rtol=1e-6, atol=1e-6)      # of float32 encodings


def test_the_inverse_is_exact_and_refuses_a_singular_covariance():
    x = torch.randn(100, 8, dtype=torch.float64)
    C, one = x.T @ x, torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(covariance.inverse(C) @ C, one, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="span only 4 of 8 dimensions.*captions"):
        covariance.inverse(x[:4].T @ x[:4])


def test_it_is_computed_once_for_a_model_kept_beside_its_weights_and_again_where_the_file_is_damaged(
        model, capsys):
    def computed():
        results.append(covariance.cached(model))
        return "computing" in capsys.readouterr().out
    results, path = [], model.folder / covariance.FILE
    assert computed() and path.is_file() and not computed()
    path.write_bytes(b"damaged")
    assert computed() and not computed()
    assert all(torch.equal(C, results[0]) for C in results)
    model.fingerprint = "another"
    assert computed()


def test_where_the_weights_are_only_to_be_read_it_is_in_the_users_cache_and_without_one_a_training_goes_on(
        model, tmp_path, monkeypatch):
    (model.folder / covariance.FILE).mkdir()        # nothing can be written there
    C = covariance.cached(model)
    file, = (tmp_path / "cache" / "perfusion").iterdir()
    assert model.fingerprint in file.name and torch.equal(covariance.cached(model), C)
    for cache in (file / "cache", "not/absolute"):                      # a file in its way; no home folder
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        with pytest.warns(UserWarning, match="cannot be kept"):
            assert torch.equal(covariance.cached(model), C)


def test_the_script_stores_and_reports(model, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(covariance.built_in_captions(90, model.tokenizer)))
    code, said, _ = run_script("covariance.py", "--weights", model.folder, "--captions", captions)
    assert code == 0 and f"{model.folder / covariance.FILE}: the covariance, condition number" in said
    assert torch.linalg.cond(covariance.cached(model)) > 1
