"""Training: the pictures it reads, the step, interruptions, and what it says to bad input."""

import csv
import dataclasses
import functools
import multiprocessing
import os
import shutil
import socket
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import covariance
import diffusion
import export
import perfusion
import train
import weights_loader
from attention_maps import noised_map, share_inside
from concept import KEYS, Concept, prepare
from models import ROOT, noise, run_script
from support import fast_cpu
from support.pictures import list_images, prepare_data
from train import Settings, Training
from weights_loader import load

SMALL = ["--resolution", "16", "--batch", "4", "--preview", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder "teddy" with three images, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures") / "teddy"
    folder.mkdir()
    for i, suffix in enumerate((".jpg", ".png", ".webp")):
        noise(20, 24, seed=i).save(folder / f"{i}{suffix}")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_text("nor this")
    return folder


@pytest.fixture(scope="module")
def setting(weights, pictures):
    """A function: settings -> a Training of the random model on the three pictures; they share the model."""
    model = load(weights)
    files, _ = list_images(pictures)
    data = prepare_data(model, files, "teddy bear", side=16)
    C_inverse = covariance.inverse(covariance.cached(model))

    def build(data=data, **fields):
        return Training(model, data, Settings("teddy bear", "<teddy>", **{"batch": 4} | fields), C_inverse)
    return build


def command(weights, pictures, out, *more):
    return ["--images", pictures, "--super", "teddy bear", "--weights", weights, "--out", out, *SMALL, *more]


def run(*arguments):
    """The script's exit code."""
    return run_script("train.py", *arguments)[0]


@pytest.fixture(scope="module")
def three(weights, pictures, tmp_path_factory):
    """What a training of three steps says, and its folder."""
    out = tmp_path_factory.mktemp("three") / "out"
    code, said, _ = run_script("train.py", *command(weights, pictures, out, "--steps", 3))
    assert code == 0
    return said, out


# --------------------------------------------------------------------------------------------------- the step

@pytest.mark.parametrize("lock", KEYS)
def test_a_step_changes_what_is_trained_and_nothing_else(setting, lock):
    training = setting(keys=lock)
    networks = training.model.unet, training.model.text_encoder
    frozen = [p.clone() for network in networks for p in network.parameters()]
    before, i_star = training.result(), training.i_star
    training.step(), training.step()
    after = training.result()
    assert not torch.equal(before.embedding, after.embedding)
    assert all(not torch.equal(a, b) for a, b in zip(before.o_values, after.o_values))
    if lock != "none":
        assert all(torch.equal(a, b) == (lock == "locked") for a, b in zip(before.o_keys, after.o_keys))
        assert not torch.equal(i_star, training.i_star)
        d_star = training.C_inverse @ training.i_star
        torch.testing.assert_close(after.d_star.double(), d_star, rtol=1e-5, atol=1e-5)
    now = [p for network in networks for p in network.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(frozen, now, strict=True))


def test_before_the_first_step_the_concept_is_its_super_category(setting):
    concept, model = setting().result(), setting().model
    prompts = ["a <teddy> on the beach"]
    e, e_super, _ = perfusion.encode(model.text_encoder, model.tokenizer, prompts, [concept])
    assert torch.equal(e, e_super)
    i_super = perfusion.super_encoding(model.text_encoder, model.tokenizer, "teddy bear")
    targets = model.unet.values(i_super) + model.unet.keys(i_super)
    assert all(torch.equal(o, expected) for o, expected in zip(concept.o_values + concept.o_keys, targets))
    assert torch.equal(concept.i_star, i_super)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_is_the_papers_loss_and_running_mean(setting, prediction_type, monkeypatch):
    """The masked error in what the network predicts, for the random choices of the step, written out."""
    training, other = setting(accumulate=2), setting()
    model, schedule = training.model, diffusion.Schedule.sd_v1(prediction_type)
    monkeypatch.setattr(model, "schedule", schedule)
    picture, flip, template, t, noise = other.draw()            # the same: they have the same seed
    prompts = [perfusion.TEMPLATES[i].format("<teddy>") for i in template]
    e, _, positions = perfusion.encode(model.text_encoder, model.tokenizer, prompts, [other.concept])
    keys, values, _ = perfusion.keys_and_values(model.unet, e, None, [other.concept], 0.75, 0.1)
    z, m = training.data.latents[picture, flip], training.data.masks[picture, flip]
    error = schedule.target(z, noise, t) - model.unet(schedule.add_noise(z, noise, t), t, keys, values)
    last = [found["<teddy>"][0][-1] for found in positions]
    mean = perfusion.running_mean(training.i_star, e[range(len(last)), last].mean(0), 0.99 ** (400 / 160))
    assert training.step() == pytest.approx((m * error ** 2).mean().item(), rel=1e-4)
    torch.testing.assert_close(training.i_star, mean, rtol=1e-4, atol=1e-5)


def gradients(training):
    """The gradients of one step, with the optimizer held back."""
    training.optimizer.step = lambda *args, **kwargs: None
    training.optimizer.zero_grad = lambda *args, **kwargs: None
    training.step()
    return [x.grad.clone() for x in training.learned]


def test_parts_of_a_batch_and_recomputed_activations_give_the_same_gradients(setting):
    whole = gradients(setting())
    assert all(g.abs().max() > 0 for g in whole)
    parts = gradients(setting(accumulate=4))
    training = setting()
    training.model.unet.checkpointing = True
    recomputed = gradients(training)
    training.model.unet.checkpointing = False
    for a, b, c in zip(whole, parts, recomputed):       # float32: sums in another order
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_close_to_float32(setting, precision):
    exact, mixed = setting(), setting(precision=precision)
    for _ in range(2):
        assert mixed.step() == pytest.approx(exact.step(), rel=0.05)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in mixed.learned)


# ----------------------------------------------------------------------------------- the script and its files

def test_the_script_leaves_a_usable_concept_and_says_what_it_did(weights, pictures, three):
    said, out = three
    for part in ("skipped, not images: .hidden.png, notes.txt", 'keys locked to "teddy bear"',
                 "16 x 16 pixels", "frozen (epsilon)", 'attention to "teddy bear"', "central square"):
        assert part in said
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "loss.csv", "teddy.safetensors"]
    concept, = prepare([Concept.load(out / "teddy.safetensors")], load(weights))
    about = {"steps": 3, "images": 3, "folder": pictures.as_posix()}
    assert concept.token == "<teddy>" and concept.metadata | about == concept.metadata
    assert len(list(csv.DictReader(open(out / "loss.csv")))) == 3


EMBEDDINGS = {
    "diffusers": ({"<x>": torch.arange(16.0)}, (1, 16)),
    "the web UI": ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 16)}}, (2, 16)),
    "the original": ({"string_to_param": torch.nn.ParameterDict({"*": torch.ones(2, 16)})}, (2, 16)),
    "two words": ({"<x>": torch.ones(16), "<y>": torch.ones(16)}, None)}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_textual_inversion_is_read_in_every_form(tmp_path, name):
    content, shape = EMBEDDINGS[name]
    torch.save(content, tmp_path / "x.pt")
    if shape is None:
        with pytest.raises(ValueError, match="x.pt is not a textual inversion"):
            export.read_embedding(tmp_path / "x.pt")
    else:
        assert export.read_embedding(tmp_path / "x.pt").shape == shape


def test_a_training_can_start_from_a_textual_inversion(weights, pictures, tmp_path):
    save_file({"emb_params": torch.full((2, 16), 0.5)}, tmp_path / "x.safetensors")
    more = ["--steps", 1, "--lock", "none", "--masks", "none", "--token", "<my_bear>", "--init-embedding"]
    assert run(*command(weights, pictures, tmp_path, *more, tmp_path / "x.safetensors")) == 0
    concept = Concept.load(tmp_path / "my_bear.safetensors")
    assert concept.keys == "none" and concept.i_star is None and concept.o_values == []
    assert 0 < (concept.embedding - 0.5).abs().max() <= 0.0061      # one step of Adam, at its learning rate


def test_photographs_given_to_the_cartoon_model_are_told(weights, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(weights_loader, "TINY", weights)
    for name, side in (("photos", 60), ("drawings", 20)):
        (tmp_path / name).mkdir()
        noise(side, side).save(tmp_path / name / "a.png")
        code, said, warned = run_script("train.py", *command("tiny", tmp_path / name, tmp_path / f"{name} out",
                                                             "--steps", 1))
        assert code == 0 and "base model: tiny, a cartoon model" in said
        assert ("look like photographs" in warned) == (name == "photos")


def test_previews_are_numbered_and_leave_the_training_as_it_was(
        weights, pictures, three, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "EMBEDDED", dataclasses.replace(train.EMBEDDED, preview_steps=2))
    main(*command(weights, pictures, tmp_path, "--steps", 3, "--preview", 2))
    previews = sorted(path.name for path in tmp_path.glob("*.png"))
    assert previews == ["preview_0002.png", "preview_0003.png"]
    assert Image.open(tmp_path / previews[0]).size[1] > 500
    for n, kept in zip((2, 3), sorted((tmp_path / "steps").iterdir()), strict=True):
        assert kept.name == f"teddy_000{n}.safetensors" and Concept.load(kept).metadata["steps"] == n
    assert same_file(tmp_path, three[1])


def test_a_concept_of_other_pictures_is_replaced_only_on_request(weights, pictures, three, tmp_path):
    others, out = shutil.copytree(pictures, tmp_path / "others"), shutil.copytree(three[1], tmp_path / "out")
    noise(20, 20, seed=9).save(others / "0.jpg")
    assert run(*command(weights, pictures, out, "--steps", 1)) == 0
    before = (out / "teddy.safetensors").read_bytes()
    again = command(weights, others, out, "--steps", 1, "--token", "teddy")
    code, _, error = run_script("train.py", *again)
    assert code == 2 and "is of other pictures" in error and error.count("\n") == 1
    assert (out / "teddy.safetensors").read_bytes() == before
    assert run(*again, "--overwrite") == 0


def main(*arguments):
    """The script in this module's copy of it, which a test may have changed."""
    train.main([str(x) for x in arguments])


def same_file(a, b, name="teddy.safetensors"):
    return (a / name).read_bytes() == (b / name).read_bytes()


def start(arguments, **environment):
    """The script in a process of its own, forked, as importing torch anew takes seconds."""
    def child():
        os.environ.update(environment)
        main(*arguments)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
def test_a_killed_training_resumes_and_ends_bit_identical(weights, pictures, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*command(weights, pictures, whole, "--steps", 7)) == 0
    process = start(command(weights, pictures, killed, "--steps", 7, "--checkpoint", 2))
    while process.is_alive() and not (killed / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -9
    assert run(*command(weights, pictures, killed, "--steps", 7, "--resume")) == 0
    assert same_file(whole, killed) and same_file(whole, killed, "loss.csv")


def test_two_processes_train_as_one_with_the_same_global_batch(weights, pictures, three, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(command(weights, pictures, tmp_path, "--steps", 3), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port), WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank)  # as torchrun does
                 for rank in "01"]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (Concept.load(out / "teddy.safetensors") for out in (three[1], tmp_path))
    for a, b in zip([one.embedding, one.i_star, *one.o_values], [two.embedding, two.i_star, *two.o_values]):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)          # float16, and sums in another order
    losses = [[float(row["loss"]) for row in csv.DictReader(open(out / "loss.csv"))]
              for out in (three[1], tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_loss_that_is_not_a_number_keeps_the_last_good_file(weights, pictures, tmp_path, monkeypatch):
    honest = Training.draw

    def draw(self):
        *choices, noise = honest(self)
        return [*choices, noise * (float("nan") if len(self.losses) == 2 else 1)]
    monkeypatch.setattr(Training, "draw", draw)
    with pytest.raises(ValueError, match="not a number in step 2.*is good"):
        main(*command(weights, pictures, tmp_path, "--steps", 5, "--checkpoint", 1))
    assert Concept.load(tmp_path / "teddy.safetensors").metadata["steps"] == 2


def test_only_the_number_of_parts_and_of_steps_may_change_on_resuming(weights, pictures, three, tmp_path):
    again = command(weights, pictures, shutil.copytree(three[1], tmp_path / "out"), "--resume")
    code, _, error = run_script("train.py", *again, "--steps", 3, "--lr", "0.3")
    assert code == 2 and f"lr was {train.EMBEDDED.lr}, now is 0.3" in error
    code, said, _ = run_script("train.py", *again, "--steps", 4, "--accumulate", 2)
    assert code == 0 and "resumed after step 3 of 4; i_star moves as for 4 steps, not 3" in said


# ------------------------------------------------------------------------------------------ what is learned

@pytest.fixture(scope="module")
def teddy():
    """The embedded model and a function: a short training on it, of two pictures from the examples."""
    model = load("tiny")
    fast_cpu.enable(model)
    files, _ = list_images(ROOT / "examples" / "teddy")
    masks = ROOT / "examples" / "masks" / "teddy"
    data = prepare_data(model, files[:2], "teddy bear", str(masks), report=lambda line: None)
    C_inverse = covariance.inverse(covariance.cached(model))

    @functools.cache
    def trained(keys="locked"):
        settings = Settings("teddy bear", "<teddy>", steps=10, batch=4, lr=0.3, keys=keys)    # few, large steps
        training = Training(model, data, settings, C_inverse)
        return training, train.run(training)
    return trained


def test_a_locked_key_stays_on_the_object_and_a_trained_key_leaks(teddy):
    """The share of the word's attention inside the true mask: 0.80 locked, 0.70 trained were measured."""
    def inside(prompt, concepts, word):
        keys, values, positions, _ = perfusion.condition(model, [prompt], concepts)
        place, = positions[0][word] if concepts else model.tokenizer.find(prompt, word)
        where = noised_map(model, data.latents[:, 0], 400, keys, values, place)
        return share_inside(where, data.masks[:, 0, 0]).mean().item()
    model, data = teddy()[0].model, teddy()[0].data
    ordinary = inside("a photo of a teddy bear", [], "teddy bear")
    locked, trained = (inside("a photo of a <teddy>", [teddy(keys)[1]], "<teddy>") for keys in KEYS[:2])
    assert abs(locked - ordinary) < 0.03 and trained < locked - 0.05


def test_the_loss_falls(teddy):
    training, _ = teddy()
    before = Training(training.model, training.data, training.settings, training.C_inverse)
    training.draw = lambda choices=before.draw(): choices
    before.draw = training.draw
    assert training.step() < 0.9 * before.step()            # measured: 0.77


def test_a_trained_word_opens_its_gate_in_every_training_template(teddy):
    """sim / energy of its last token is 1."""
    (training, concept), prompts = teddy(), [text.format("<teddy>") for text in perfusion.TEMPLATES]
    model = training.model
    e, _, positions = perfusion.encode(model.text_encoder, model.tokenizer, prompts, [concept])
    _, ratio = perfusion.split(e, concept.i_star[None], concept.d_star[None])
    last = [found["<teddy>"][0][-1] for found in positions]
    assert ratio[range(len(last)), last, 0].tolist() == pytest.approx([1] * len(last), abs=0.1)
