"""Training: the pictures it reads, the step, interruptions, and what it says to bad input."""

import csv
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import covariance
import diffusion
import perfusion
import train
from perfusion import Concept
from models import ROOT, write_weights
from pictures import list_images, prepare_data
from train import Data, Settings, Training
from weights_loader import load

SMALL = ["--resolution", "16", "--batch", "4", "--preview", "0", "--device", "cpu"]


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are then taken in one order: bit-identity is tested."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a random model and its covariance."""
    folder = write_weights(tmp_path_factory.mktemp("weights"))
    model = load(folder)
    captions = covariance.built_in_captions(200, model.tokenizer)
    covariance.store(covariance.covariance(model.text_encoder, model.tokenizer, captions), model)
    return folder


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
    return train.main([str(x) for x in arguments])


# --------------------------------------------------------------------------------------------------- the step

@pytest.mark.parametrize("lock, targets", [("locked", 1), ("trained", 2), ("none", 0)])
def test_the_optimizer_holds_exactly_the_embedding_and_one_target_per_layer(setting, lock, targets):
    training = setting(lock=lock)
    held = [x for group in training.optimizer.param_groups for x in group["params"]]
    layers = len(training.model.unet.cross_attentions)
    assert len(held) == 1 + targets * layers and held[0].shape == (2, 16)
    assert [x.ndim for x in held[1:]] == [1] * (targets * layers)
    rates = {group["lr"] for group in training.optimizer.param_groups}
    embedding, values = train.TINY.lr_embedding, train.TINY.lr
    assert rates == ({embedding, values} if targets else {embedding})


@pytest.mark.parametrize("lock", perfusion.LOCKS)
def test_a_step_changes_what_is_trained_and_nothing_else(setting, lock):
    training = setting(lock=lock)
    networks = training.model.unet, training.model.text_encoder
    frozen = [p.clone() for network in networks for p in network.parameters()]
    before, i_star = training.result(), training.i_star
    training.step(), training.step()
    after = training.result()
    assert not torch.equal(before.embedding, after.embedding)
    assert all(not torch.equal(a, b) for a, b in zip(before.values, after.values))
    if lock != "none":
        assert all(torch.equal(a, b) == (lock == "locked") for a, b in zip(before.keys, after.keys))
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
    assert all(torch.equal(o, expected) for o, expected in zip(concept.values + concept.keys, targets))
    assert torch.equal(concept.i_star, i_super)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_masked_error_in_what_the_network_predicts(setting, prediction_type):
    training = setting(accumulate=2)
    schedule, training.model.schedule = training.model.schedule, diffusion.Schedule.sd_v1(prediction_type)
    try:
        generator = training.generator.get_state()
        picture, flip, template, t, noise = training.draw()
        training.generator.set_state(generator)
        loss = training.step()
        fresh = setting()
        prompts = [perfusion.TEMPLATES[i].format("<teddy>") for i in template]
        concept = training.concept                      # holds the i_star that the step used
        concept = Concept(**{**vars(fresh.concept), "i_star": concept.i_star, "d_star": concept.d_star})
        model = training.model
        e, _, _ = perfusion.encode(model.text_encoder, model.tokenizer, prompts, [concept])
        keys, values = perfusion.keys_and_values(model.unet, e, None, [concept], [0.75], [0.1])
        z, m = training.data.latents[picture, flip], training.data.masks[picture, flip]
        output = model.unet(model.schedule.add_noise(z, noise, t), t, keys, values)
        target = model.schedule.target(z, noise, t)
        assert loss == pytest.approx((m * (target - output) ** 2).mean().item(), rel=1e-4)
    finally:
        training.model.schedule = schedule


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


def test_what_the_mask_hides_does_not_enter_the_loss(setting):
    data = setting().data
    masks = torch.ones_like(data.masks)
    masks[..., 4:] = 0
    training = setting(Data(data.images, data.latents, masks))
    model, zero = training.model, torch.tensor([0])
    keys, values, _ = training.project(zero)
    t, still = torch.tensor([500]), torch.zeros(1, *data.latents.shape[2:])
    loss = training.loss(zero, zero, t, still, keys + values)
    output = model.unet(model.schedule.add_noise(data.latents[:1, 0], still, t), t, keys, values)
    torch.testing.assert_close(loss, output[..., :4].square().sum() / output.numel(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_close_to_float32(setting, precision):
    exact, mixed = setting(), setting(precision=precision)
    for _ in range(2):
        assert mixed.step() == pytest.approx(exact.step(), rel=0.05)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in mixed.learned)


def test_one_token_starts_from_the_mean_of_the_super_categorys(setting):
    training, pair = setting(one_token=True), setting()
    torch.testing.assert_close(training.concept.embedding, pair.concept.embedding.mean(0, keepdim=True))
    assert np.isfinite(training.step())


def test_a_batch_that_cannot_be_shared_is_refused(setting):
    with pytest.raises(ValueError, match="multiple"):
        setting(batch=4, accumulate=3)


# ----------------------------------------------------------------------------------- the script and its files

def test_the_script_leaves_a_usable_concept_and_the_promised_files(weights, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*command(weights, pictures, out, "--steps", 3, "--export-embedding")) == 0
    said = capsys.readouterr().out
    assert "skipped, not images: .hidden.png, notes.txt" in said and 'keys locked to "teddy bear"' in said
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt", "learned_embeds.safetensors", "loss.csv", "teddy.safetensors"]
    model = load(weights)
    concept, = perfusion.prepare([Concept.load(out / "teddy.safetensors")], model)
    assert concept.token == "<teddy>" and concept.metadata | {"steps": 3, "images": 3} == concept.metadata
    assert len(list(csv.DictReader(open(out / "loss.csv")))) == 3
    exported = train.read_embedding(out / "learned_embeds.safetensors")
    torch.testing.assert_close(exported, concept.embedding, rtol=1e-2, atol=1e-3)     # the concept is float16
    more = ["--steps", 1, "--lock", "none", "--masks", "none", "--token", "<my_bear>"]
    assert run(*command(weights, pictures, tmp_path / "again", *more, "--init-embedding",
                        out / "learned_embeds.safetensors")) == 0
    again = Concept.load(tmp_path / "again" / "my_bear.safetensors")
    assert again.lock == "none" and again.i_star is None and again.values == []
    assert (again.embedding - exported).abs().max() <= 0.0061       # one step of Adam, at its learning rate


def test_previews_are_numbered_and_leave_the_training_as_it_was(weights, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TINY", train.dataclasses.replace(train.TINY, sampling_steps=1,
                                                                 prompts=train.TINY.prompts[:3]))
    assert run(*command(weights, pictures, tmp_path / "a", "--steps", 3, "--preview", 2)) == 0
    assert run(*command(weights, pictures, tmp_path / "b", "--steps", 3)) == 0
    previews = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert previews == ["preview_0000.png", "preview_0002.png", "preview_0003.png"]
    assert Image.open(tmp_path / "a" / previews[0]).size[1] > 500
    assert same_file(tmp_path / "a", tmp_path / "b")


def same_file(a, b, name="teddy.safetensors"):
    return (a / name).read_bytes() == (b / name).read_bytes()


def test_a_resumed_training_ends_bit_identical(weights, pictures, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*command(weights, pictures, whole, "--steps", 7, "--seed", 3)) == 0
    for steps in (2, 5, 7):
        assert run(*command(weights, pictures, parts, "--steps", steps, "--seed", 3, "--resume")) == 0
    assert same_file(whole, parts) and same_file(whole, parts, "loss.csv")


# The script, which dies where it is told to: of its n-th file only the first half is written.
DYING = """
import os, signal, sys, train
replace, left = os.replace, [int(sys.argv.pop(1))]
def replace_or_die(partial, path):
    left[0] -= 1
    if left[0] == 0:
        os.truncate(partial, os.path.getsize(partial) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(partial, path)
os.replace = replace_or_die
sys.exit(train.main())
"""


def start(weights, pictures, out, steps, *more, dies_at=0):
    """The script in a process of its own, saving a checkpoint after every step. dies_at: a file's number."""
    arguments = command(weights, pictures, out, "--steps", steps, "--checkpoint", 1, "--resume", *more)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", DYING, str(dies_at), *map(str, arguments)], cwd=ROOT,
                            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_after(process, ready, wait):
    """kill -9, `wait` seconds after ready() first holds."""
    while process.poll() is None and not ready():
        time.sleep(0.01)
    time.sleep(wait)
    process.kill()
    process.wait()


def whole_files(out):
    """Every file in the folder can be read, but those that were being written; the number of losses."""
    losses = []
    for path in out.iterdir():
        if path.suffix == ".safetensors":
            Concept.load(path)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".png":
            Image.open(path).verify()
        elif path.suffix == ".csv":
            losses = [float(row["loss"]) for row in csv.DictReader(path.open())]
            assert path.read_text().endswith("\n")
        else:
            assert path.suffix == ".partial"
    return len(losses)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
def test_a_killed_training_resumes_and_ends_bit_identical(weights, pictures, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*command(weights, pictures, whole, "--steps", 20)) == 0
    kill_after(start(weights, pictures, killed, 20), (killed / "checkpoint.pt").exists, 0.1)
    whole_files(killed)
    assert run(*command(weights, pictures, killed, "--steps", 20, "--resume")) == 0
    assert same_file(whole, killed) and same_file(whole, killed, "loss.csv")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
def test_twenty_kills_at_random_moments_leave_whole_files_and_change_nothing(weights, pictures, tmp_path):
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    concept, more, start_time = killed / "teddy.safetensors", ("--preview", 50), time.time()
    assert run(*command(weights, pictures, whole, "--steps", 200, *more)) == 0
    seconds, done, alive, halves = time.time() - start_time, 0, 0, set()

    def written():
        return concept.stat().st_mtime_ns if concept.exists() else 0
    for k in range(20):                 # by turns at any time, and in the middle of any file
        if k % 2:
            process = start(weights, pictures, killed, 200, *more, dies_at=rng.randrange(1, 30))
            process.wait()
        else:
            before, process = written(), start(weights, pictures, killed, 200, *more)
            kill_after(process, lambda: written() != before, rng.uniform(0, seconds / 20))
        alive += process.returncode == -9
        halves |= {(path.name, path.stat().st_mtime_ns) for path in killed.glob("*.partial")}
        last, done = done, whole_files(killed)
        assert done >= last
    print(f"{alive} kills met a living process, {len(halves)} of them in the middle of a file")
    assert alive >= 15 and len(halves) >= 8
    assert run(*command(weights, pictures, killed, "--steps", 200, "--resume", *more)) == 0
    assert whole_files(killed) == 200
    assert same_file(whole, killed) and same_file(whole, killed, "loss.csv")


def test_two_processes_train_as_one_with_the_same_global_batch(weights, pictures, tmp_path):
    arguments = [str(x) for x in command(weights, pictures, tmp_path / "two", "--steps", 3)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, str(ROOT / "train.py"), *arguments], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert run(*command(weights, pictures, tmp_path / "one", "--steps", 3)) == 0
    one, two = (Concept.load(tmp_path / name / "teddy.safetensors") for name in ("one", "two"))
    for a, b in zip([one.embedding, one.i_star, *one.values], [two.embedding, two.i_star, *two.values]):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)          # float16, and sums in another order
    losses = [[float(row["loss"]) for row in csv.DictReader(open(tmp_path / name / "loss.csv"))]
              for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_file(weights, pictures, tmp_path, capsys,
                                                                          monkeypatch):
    honest, calls = Training.loss, []

    def loss(self, *args):
        calls.append(0)
        return honest(self, *args) * (float("nan") if len(calls) == 3 else 1)
    monkeypatch.setattr(Training, "loss", loss)
    assert run(*command(weights, pictures, tmp_path, "--steps", 5, "--checkpoint", 1)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "not a number" in error and "last good" in error
    assert Concept.load(tmp_path / "teddy.safetensors").metadata["steps"] == 2


def test_ctrl_c_says_how_to_continue(weights, pictures, tmp_path, capsys, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt
    monkeypatch.setattr(Training, "step", stop)
    assert run(*command(weights, pictures, tmp_path)) == 130
    assert "--resume" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- bad inputs

def folder_with(tmp_path, name, content):
    """A folder that holds one file."""
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder


def truncated_png(tmp_path):
    noise(64, 64).save(tmp_path / "whole.png")
    return folder_with(tmp_path, "x.png", (tmp_path / "whole.png").read_bytes()[:2000])


def black_masks(tmp_path, pictures):
    folder = tmp_path / "black"
    folder.mkdir()
    for file in list_images(pictures)[0]:
        Image.new("L", (24, 20)).save(folder / f"{file.stem}.png")
    return folder


def embedding_file(tmp_path, shape, names=("<x>",)):
    path = tmp_path / "learned.safetensors"
    train.save_file({name: torch.zeros(shape) for name in names}, path)
    return path


def nameless(tmp_path, pictures):
    return Path(shutil.copytree(pictures, tmp_path / "___"))


USAGE = {  # argparse speaks
    "steps 0": ["--steps", "0"], "steps -3": ["--steps", "-3"], "steps many": ["--steps", "many"],
    "batch 0": ["--batch", "0"], "batch 1.5": ["--batch", "1.5"], "accumulate 0": ["--accumulate", "0"],
    "lr 0": ["--lr", "0"], "lr -1": ["--lr", "-1"], "lr nan": ["--lr", "nan"], "lr inf": ["--lr", "inf"],
    "lr-embedding": ["--lr-embedding", "-0.1"], "lock": ["--lock", "open"],
    "precision": ["--precision", "fp8"], "device": ["--device", "tpu"],
    "resolution": ["--resolution", "0"], "preview": ["--preview", "-1"],
    "checkpoint": ["--checkpoint", "-1"], "seed -1": ["--seed", "-1"], "seed 2**63": ["--seed", str(2**63)],
    "super empty": ["--super", " "], "super token": ["--super", "<bear>"], "super bar": ["--super", "a|b"],
    "beta": ["--beta", "nan"], "unknown": ["--colour", "red"], "no value": ["--images"],
}
WRONG = {  # the script speaks; each makes its arguments in a fresh folder
    "no such folder": lambda t, p: ["--images", t / "absent"],
    "empty folder": lambda t, p: ["--images", folder_with(t, ".keep", b"")],
    "only text": lambda t, p: ["--images", folder_with(t, "a.txt", b"a")],
    "HEIC": lambda t, p: ["--images", folder_with(t, "IMG_1.HEIC", b"x")],
    "not an image": lambda t, p: ["--images", folder_with(t, "x.jpg", b"a text under a wrong name")],
    "empty image": lambda t, p: ["--images", folder_with(t, "x.png", b"")],
    "half an image": lambda t, p: ["--images", truncated_png(t)],
    "nameless": lambda t, p: ["--images", nameless(t, p)],
    "token": lambda t, p: ["--token", "my bear"],
    "token path": lambda t, p: ["--token", "../bear"],
    "half a token": lambda t, p: ["--token", "<bear"],
    "no masks": lambda t, p: ["--masks", t / "absent"],
    "a mask is missing": lambda t, p: ["--masks", folder_with(t, "other.png", b"")],
    "black masks": lambda t, p: ["--masks", black_masks(t, p)],
    "no weights": lambda t, p: ["--weights", t / "absent"],
    "empty weights": lambda t, p: ["--weights", folder_with(t, "x", b"")],
    "odd resolution": lambda t, p: ["--resolution", "17"],
    "batch and parts": lambda t, p: ["--accumulate", "3"],
    "no checkpoint": lambda t, p: ["--resume", t / "absent.pt"],
    "no real checkpoint": lambda t, p: ["--resume", folder_with(t, "x.pt", b"x" * 100) / "x.pt"],
    "no embedding": lambda t, p: ["--init-embedding", t / "absent.safetensors"],
    "no real embedding": lambda t, p: ["--init-embedding", folder_with(t, "x.bin", b"12") / "x.bin"],
    "two embeddings": lambda t, p: ["--init-embedding", embedding_file(t, (2, 16), ("<x>", "<y>"))],
    "narrow embedding": lambda t, p: ["--init-embedding", embedding_file(t, (2, 15))],
    "short embedding": lambda t, p: ["--init-embedding", embedding_file(t, (16,))],
    "long super": lambda t, p: ["--super", "teddy " * 40],
    "out is a file": lambda t, p: ["--out", folder_with(t, "x", b"") / "x"],
    "no such device": lambda t, p: ["--device", "mps" if torch.cuda.is_available() else "cuda"],
}


@pytest.mark.parametrize("name", USAGE)
def test_a_bad_option_ends_with_one_sentence_and_code_2(pictures, capsys, name):
    with pytest.raises(SystemExit) as stop:
        run("--images", pictures, "--super", "teddy bear", *USAGE[name])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert error.splitlines()[-1].count(": error: ") == 1


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("name", WRONG)
def test_bad_input_ends_with_one_sentence_and_code_2(weights, pictures, tmp_path, capsys, name):
    code = run(*command(weights, pictures, tmp_path / "out", "--steps", 1, *WRONG[name](tmp_path, pictures)))
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error


def test_a_checkpoint_of_another_training_is_refused_by_name(weights, pictures, tmp_path, capsys):
    assert run(*command(weights, pictures, tmp_path, "--steps", 1)) == 0
    assert run(*command(weights, pictures, tmp_path, "--steps", 2, "--resume", "--lr", "0.3")) == 2
    assert f"lr was {train.TINY.lr}, now is 0.3" in capsys.readouterr().err


def test_a_concept_made_for_another_base_model_is_refused(weights, pictures, tmp_path):
    assert run(*command(weights, pictures, tmp_path, "--steps", 1)) == 0
    model = load(weights)
    model.fingerprint = "another"
    with pytest.raises(ValueError, match="another base model"):
        perfusion.prepare([Concept.load(tmp_path / "teddy.safetensors")], model)
