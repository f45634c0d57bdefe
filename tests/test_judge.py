"""The judge finds each thing of a picture and tells what and who it is; it never saw these renders."""
import random

import pytest
import torch

import judge as judges
import world


@pytest.fixture(scope="module")
def judge():
    return judges.Judge.load()


def test_the_things_of_a_picture_and_its_scene_are_recognised(judge):
    rng = random.Random(10**9)
    specs = [world.random_spec(rng, allow_held_out=True) for _ in range(60)]
    images = judges.renders(specs)
    found, places, right = judge.find(images), judge.places(images), []
    for spec, things, place in zip(specs, found, places):
        truth = sorted((t.individual.kind, t.individual.colors["main"], t.accessory or "none")
                       for t in spec.things)
        right.append(truth == sorted((t.kind, t.color, t.accessory or "none") for t in things)
                     and place == (spec.scene, spec.prop))
    assert sum(right) >= 52     # measured: kind 99.9 %, colour 98.6 %, accessory 99.6 % per thing


def test_two_things_of_one_kind_are_both_found(judge):
    rng = random.Random(7)
    specs = [judges.view(rng, *(world.random_individual(rng, "cat") for _ in range(2))) for _ in range(20)]
    assert sum([thing.kind for thing in found] == ["cat", "cat"]
               for found in judge.find(judges.renders(specs))) >= 18


def test_nothing_is_found_where_nothing_is(judge):
    assert judge.find(torch.ones(2, 3, 64, 64)) == [[], []]


def test_an_individual_is_first_among_fifty_in_company(judge):
    rng, hits = random.Random(11), 0
    for k in range(4):
        me = world.random_individual(rng, "robot")
        known = judges.lineup(judge, me, k)
        found, = judge.find(judges.renders([judges.view(rng, me, world.random_individual(rng, "dog"))]))
        hits += bool(judges.recognise(found, "robot", known))
    assert hits >= 3            # measured: 97 % alone, 96 % both of a pair


def test_a_missing_judge_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="none cannot be read"):
        judges.Judge.load(tmp_path / "none")


def test_silhouettes_lie_on_the_things(judge):
    specs = [world.random_spec(random.Random(seed)) for seed in range(20)]
    images, masks = zip(*[world.render(spec, masks=True) for spec in specs])
    truth = judges.coarse(list(masks))
    share = judge.silhouettes(judges.to_images(images))
    assert share.shape == (20, 16, 16)
    found, true = share > 0.5, truth[:, 1] > 0.5
    assert (found & true).sum() > 0.7 * (found | true).sum()      # measured: 0.82
