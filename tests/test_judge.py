"""The judge: right on renders that it never saw, soft ones too; its statistics; its training in miniature."""
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tiny"))
import judge as judges
import world


@pytest.fixture(scope="module")
def judge():
    return judges.Judge.load()


@pytest.fixture(scope="module")
def held_out():
    rng = random.Random(77)
    specs = [world.random_spec(rng, allow_held_out=True) for _ in range(300)]
    return specs, judges.renders(specs)


def accuracy(judge, specs, images):
    """Head -> share of right answers."""
    found, truth = judge.classify(images), judges.labels(specs)
    return {head: np.mean([f[head] == judges.HEADS[head][y] for f, y in zip(found, truth[head].tolist())])
            for head in judges.HEADS}


def test_the_judge_knows_renders_it_never_saw(judge, held_out):
    right = accuracy(judge, *held_out)
    # `judge.py accuracy` measures 98 % or more of 2000; a sample of 300 of that may lie 2 % lower.
    assert right["subject"] > 0.96 and right["scene"] > 0.96
    assert min(right.values()) > 0.85


def test_the_judge_bears_softness_and_noise(judge, held_out):
    specs, images = held_out
    right = accuracy(judge, specs, judges.soften(images.clone()))
    assert right["subject"] > 0.94 and right["scene"] > 0.94


def test_an_individual_is_found_among_fifty_of_its_kind(judge):
    rng, hits = random.Random(5), []
    for k, kind in enumerate(world.WEARERS):
        me = world.random_individual(rng, kind)
        known = judges.lineup(judge, me, k)
        assert known.shape == (50, judges.EMBEDDING)
        drawn = judges.renders([judges.view(rng, me) for _ in range(10)])
        hits += ((judge.embed(drawn) @ known.T).argmax(1) == 0).tolist()
    assert np.mean(hits) > 0.85


def test_embeddings_are_unit_vectors_and_masks_are_shares(judge, held_out):
    images = held_out[1][:20]
    for second in (False, True):
        assert torch.allclose(judge.embed(images, second).norm(dim=1), torch.ones(20), atol=1e-5)
    masks = judge.masks(images)
    assert torch.allclose(sum(masks.values()), torch.ones(20, 16, 16), atol=1e-5)


def test_the_mask_lies_on_the_subject(judge, held_out):
    specs = held_out[0][:40]
    truth = torch.stack([torch.from_numpy(world.render(spec, masks=True)[1]["subject"]) for spec in specs])
    truth = torch.nn.functional.avg_pool2d(truth, 4) > 0.5
    overlap = judges.intersection_over_union(judge.masks(held_out[1][:40])["subject"] > 0.5, truth)
    assert overlap.mean() > 0.7


def test_the_weights_are_a_small_float16_file():
    assert judges.FILE.stat().st_size < 2e6


def test_a_missing_judge_is_named_in_one_sentence(tmp_path):
    command = [sys.executable, ROOT / "tiny" / "judge.py", "accuracy", "--judge", tmp_path / "no"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "judge.py train" in done.stderr


def test_training_writes_a_judge_that_loads(tmp_path, capsys):
    file = tmp_path / "judge.safetensors"
    trained = judges.train(2, 4, file)
    x = torch.rand(3, 3, 64, 64)
    assert torch.allclose(judges.Judge.load(file)(x)["subject"], trained(x)["subject"], atol=0.05)  # float16


def test_partners_of_a_batch_are_the_same_individuals():
    specs, same, same_second = judges.training_batch(random.Random(0), 20)
    for n, spec in enumerate(specs):
        assert specs[same[n]].individual == spec.individual and same[n] != n
        if same_second[n] >= 0:
            assert specs[same_second[n]].second == spec.second and same_second[n] != n
        else:
            assert spec.second is None


def test_the_contrastive_loss_is_small_only_for_the_right_partner():
    e, partner = torch.eye(4)[[0, 0, 1, 1]], torch.tensor([1, 0, 3, 2])
    assert judges.contrast(e, partner) < 1e-4 < 1 < judges.contrast(e, partner[[2, 3, 0, 1]].flip(0))
    mixed = judges.contrast(torch.eye(5)[[0, 0, 4, 1, 1]], torch.tensor([1, 0, -1, 4, 3]))
    assert mixed < 1e-4


def test_the_interval_is_wilsons():
    assert judges.interval(8, 10) == "80.0 % (49.0 to 94.3, n = 10)"
    assert judges.interval(0, 0) == "none asked for"


def test_prompts_of_held_out_combinations_are_held_out():
    for held_out in (False, True):
        pairs = judges.prompts_of_the_world(20, held_out, seed=0)
        assert all(world.held_out(spec) == held_out for spec, _ in pairs)


def test_only_what_a_prompt_names_is_asked_for():
    rng = random.Random(0)
    spec = world.place(rng, world.random_individual(rng, "cat", "red"), "beach", "hat")
    judged = {"subject": "cat", "color": "blue", "accessory": "hat", "scene": "beach", "second": "none"}
    kept = judges.follow([judged], [(spec, "a photo of a cat wearing a hat on the beach")])
    assert kept["subject"] == kept["scene"] == kept["accessory"] == [True] and not kept["color"]
    assert judges.follow([judged], [(spec, "a photo of a red cat wearing a hat")])["color"] == [False]
