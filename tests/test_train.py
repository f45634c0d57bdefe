"""Training: the pictures it reads, the step, interruptions, and what it says to bad input."""

import copy
import dataclasses
import shutil

import pytest
import torch
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import covariance
import diffusion
import perfusion
import train
from attention_maps import noised_map, share_inside
from concept import KEYS, Concept, prepare
from models import ROOT, noise
from support import fast_cpu
from support.pictures import list_images, prepare_data
from train import Settings, Training
from weights_loader import load

SMALL = ["--super", "teddy bear", "--resolution", 16, "--batch", 4, "--preview", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder "teddy" with three images, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures") / "teddy"
    folder.mkdir()
    for i, suffix in enumerate((".jpg", ".png", ".webp")):
        noise(20, 24, seed=i).save(folder / f"{i}{suffix}")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def setting(weights, pictures):
    """A function: settings -> a Training of the random model on the three pictures; they share the model."""
    model = load(weights)
    data = prepare_data(model, list_images(pictures)[0], "teddy bear", "auto", 16)
    C_inverse = covariance.inverse(covariance.cached(model))
    return lambda **more: Training(model, data, Settings("teddy bear", "<teddy>", batch=4, **more), C_inverse)


@pytest.fixture(scope="module")
def run(weights, pictures):
    """A function: train.py on the three pictures, in this process, into a folder, with more options."""
    given = ["--images", pictures, "--weights", weights, *SMALL]
    return lambda out, *more: train.main([str(x) for x in (*given, "--out", out, *more)])


@pytest.fixture(scope="module")
def three(run, tmp_path_factory):
    """The folder of a training of three steps."""
    out = tmp_path_factory.mktemp("three")
    run(out, "--steps", 3)
    return out


# --------------------------------------------------------------------------------------------------- the step

@pytest.mark.parametrize("lock", KEYS)
def test_a_step_changes_what_is_trained_and_gradients_reach_nothing_else(setting, lock):
    training = setting(keys=lock)
    parameters = [*training.model.unet.parameters(), *training.model.text_encoder.parameters()]
    frozen = [p.clone() for p in parameters]
    before, after = copy.deepcopy(training.concept), training.concept
    training.step(), training.step()
    assert not torch.equal(before.embedding, after.embedding)
    assert all(not torch.equal(a, b) for a, b in zip(before.o_values, after.o_values))
    if lock != "none":
        assert all(torch.equal(a, b) == (lock == "locked") for a, b in zip(before.o_keys, after.o_keys))
        d_star = training.C_inverse @ training.i_star
        torch.testing.assert_close(after.d_star.double(), d_star, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(frozen, parameters))


def test_before_the_first_step_the_concept_is_its_super_category(setting):
    concept, model = setting().concept, setting().model
    e, e_super, _ = perfusion.encode(model.text_encoder, model.tokenizer, ["a <teddy> on it"], [concept])
    i_super = perfusion.super_encoding(model.text_encoder, model.tokenizer, "teddy bear")
    assert torch.equal(e, e_super) and torch.equal(concept.i_star, i_super)
    torch.testing.assert_close(concept.o_keys, model.unet.keys(i_super), rtol=0, atol=0)
    torch.testing.assert_close(concept.o_values, model.unet.values(i_super), rtol=0, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_is_the_papers_loss_and_running_mean(setting, prediction_type, monkeypatch):
    """The masked error in what the network predicts, for the random choices of the step, written out."""
    training, other = setting(steps=160, accumulate=2), setting()
    model, schedule = training.model, diffusion.Schedule.sd_v1(prediction_type)
    monkeypatch.setattr(model, "schedule", schedule)
    picture, flip, template, t, noise = other.draw()            # the same: they have the same seed
    prompts = [perfusion.TEMPLATES[i].format("<teddy>") for i in template]
    e, _, positions = perfusion.encode(model.text_encoder, model.tokenizer, prompts, [other.concept])
    keys, values, _ = perfusion.keys_and_values(model.unet, e, None, [other.concept], 0.75, 0.1)
    z, m = training.data.latents[picture, flip], training.data.masks[picture, flip]
    error = schedule.target(z, noise, t) - model.unet(schedule.add_noise(z, noise, t), t, keys, values)
    e_concept = torch.stack([row[found["<teddy>"][0][-1]] for row, found in zip(e, positions)])
    kept = 0.99 ** (400 / 160)                  # of the start, in one of 160 steps
    mean = kept * training.i_star + (1 - kept) * e_concept.mean(0)
    assert training.step() == pytest.approx((m * error ** 2).mean().item(), rel=1e-4)
    torch.testing.assert_close(training.i_star, mean, rtol=1e-4, atol=1e-5)


def gradients(training):
    """The gradients of one step, without its update."""
    training.sums.update = lambda optimizer: (0, training.i_star)
    training.step()
    return [x.grad for x in training.learned]


def test_parts_of_a_batch_and_recomputed_activations_give_the_same_gradients(setting, monkeypatch):
    whole, parts = gradients(setting()), gradients(setting(accumulate=4))
    monkeypatch.setattr(setting().model.unet, "checkpointing", True)
    for a, b, c in zip(whole, parts, gradients(setting()), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)      # float32: sums in another order
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_close_to_float32(setting, precision):
    exact, mixed = setting(), setting(precision=precision)
    for _ in range(2):
        assert mixed.step() == pytest.approx(exact.step(), rel=0.05)


# ----------------------------------------------------------------------------------- the script and its files

def test_the_script_leaves_a_usable_concept_and_says_what_it_did(weights, pictures, run, tmp_path, capsys):
    run(tmp_path, "--steps", 3)
    said = capsys.readouterr().out
    for part in ("skipped, not images: notes.txt", "keys='locked'", "16 x 16 pixels", "with epsilon",
                 'attention to "teddy bear"', "central square"):
        assert part in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt", "loss.csv", "teddy.safetensors"]
    concept, = prepare([Concept.load(tmp_path / "teddy.safetensors")], load(weights))
    about = {"steps": 3, "images": 3, "folder": pictures.as_posix()}
    assert concept.token == "<teddy>" and concept.metadata | about == concept.metadata


def test_textual_inversion_moves_the_word_at_its_own_rate_and_nothing_else(run, setting, tmp_path):
    run(tmp_path, "--steps", 1, "--lock", "none", "--masks", "none", "--token", "<my_bear>")
    concept = Concept.load(tmp_path / "my_bear.safetensors")
    assert concept.keys == "none" and concept.i_star is None and concept.o_values == []
    moved = (concept.embedding - setting().concept.embedding).abs().mean().item()
    assert moved == pytest.approx(train.INVERSION_LR, rel=0.1)      # one step of Adam


def test_photographs_for_the_cartoon_model_are_told(run, weights, tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.setattr("weights_loader.TINY", weights)
    for side, told in ((20, False), (60, True)):
        noise(side, side).save(tmp_path / f"{side}.png")
        run(tmp_path / "out", "--images", tmp_path / f"{side}.png", "--weights", "tiny", "--steps", 1)
        assert any("look like photographs" in str(warning.message) for warning in recwarn) == told
    assert "base model: tiny, a cartoon model" in capsys.readouterr().out


def test_previews_are_numbered_and_leave_the_training_as_it_was(run, three, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "EMBEDDED", dataclasses.replace(train.EMBEDDED, preview_steps=2))
    run(tmp_path, "--steps", 3, "--preview", 2)
    assert len(list(tmp_path.glob("*.png"))) == len(list((tmp_path / "steps").iterdir())) == 2
    for n in (2, 3):
        assert Image.open(tmp_path / f"preview_000{n}.png").height > 500
        assert Concept.load(tmp_path / "steps" / f"teddy_000{n}.safetensors").metadata["steps"] == n
    assert same_file(tmp_path, three)


def test_a_concept_of_other_pictures_is_replaced_only_on_request(run, pictures, three, tmp_path):
    others, out = shutil.copytree(pictures, tmp_path / "others"), shutil.copytree(three, tmp_path / "out")
    noise(20, 20, seed=9).save(others / "0.jpg")
    again = "--steps", 1, "--token", "teddy", "--images"
    with pytest.raises(ValueError, match="is of other pictures"):
        run(out, *again, others)
    assert same_file(out, three)
    run(out, *again, others, "--overwrite")
    run(out, *again, others)
    assert not same_file(out, three)


def same_file(a, b):
    return (a / "teddy.safetensors").read_bytes() == (b / "teddy.safetensors").read_bytes()


def test_two_processes_train_as_one_with_the_same_global_batch_and_one_speaks(run, three, tmp_path, capfd):
    launch = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", start_method="fork", monitor_interval=0.01)
    elastic_launch(launch, run)(tmp_path, "--steps", 3)         # what torchrun calls
    assert capfd.readouterr().out.count("starting after step 0 of 3") == 1
    one, two = (torch.load(out / "checkpoint.pt") for out in (three, tmp_path))
    for name in ("learned", "i_star"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-3)      # sums in another order
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-4)


def test_a_loss_that_is_not_a_number_keeps_the_last_good_files_and_resuming_ends_bit_identical(
        run, three, tmp_path, monkeypatch):
    honest = Training.draw

    def draw(self):
        *choices, noise = honest(self)
        return [*choices, noise * (float("nan") if len(self.losses) == 1 else 1)]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not a number"):
        patch.setattr(Training, "draw", draw)
        run(tmp_path, "--steps", 3, "--checkpoint", 1)
    assert Concept.load(tmp_path / "teddy.safetensors").metadata["steps"] == 1
    monkeypatch.setattr(covariance, "inverse", lambda C: 2 * torch.eye(len(C), dtype=torch.float64))
    run(tmp_path, "--steps", 3, "--resume")         # with the metric that it was begun with
    assert same_file(tmp_path, three)


def test_only_the_number_of_parts_and_more_steps_may_change_on_resuming(run, three, tmp_path, capsys):
    out = shutil.copytree(three, tmp_path / "out")
    for sentence, *change in ((f"lr was {train.EMBEDDED.lr}, now is 0.3", "--lr", "0.3"),
                              ("prediction was epsilon, now is v_", "--prediction", "v_prediction"),
                              ("of a later step than 2", "--steps", 2)):
        with pytest.raises(ValueError, match=sentence):
            run(out, "--resume", "--steps", 5, *change)
    assert same_file(out, three)
    (out / "teddy.safetensors").unlink()            # what is finished is written again
    run(out, "--resume", "--steps", 3)
    assert same_file(out, three)
    with pytest.warns(match="as for 3 steps, so the result differs from that of 4"):
        run(out, "--resume", "--steps", 4, "--accumulate", 2)
    assert "starting after step 3 of 4" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ what is learned

def test_a_locked_key_stays_on_the_object_and_a_trained_key_leaks():
    """The share of the word's attention inside the true mask: 0.80 locked, 0.70 trained were measured."""
    model = load("tiny")
    fast_cpu.enable(model)
    files, masks = list_images(ROOT / "examples" / "teddy")[0][:2], ROOT / "examples" / "masks" / "teddy"
    data = prepare_data(model, files, "teddy bear", str(masks), model.size[0])
    C_inverse = covariance.inverse(covariance.cached(model))

    def trained(keys):
        settings = Settings("teddy bear", "<teddy>", steps=10, batch=4, lr=0.3, keys=keys)  # few, large steps
        training = Training(model, data, settings, C_inverse)
        for _ in range(10):
            training.step()
        return training.concept

    def inside(prompt, concepts, word):
        keys, values, positions, gates = perfusion.condition(model, [prompt], concepts)
        place, = positions[0][word] if concepts else model.tokenizer.find(prompt, word)
        assert not concepts or gates[0, place[-1], 0] > 0.8     # the word opens its gate: 0.88 at i_star
        where = noised_map(model, data.latents[:, 0], 400, keys, values, place)
        return share_inside(where, data.masks[:, 0, 0]).mean().item()
    ordinary = inside("a photo of a teddy bear", [], "teddy bear")
    locked, leaking = (inside("a photo of a <teddy>", [trained(keys)], "<teddy>") for keys in KEYS[:2])
    assert abs(locked - ordinary) < 0.03 and leaking < locked - 0.05
