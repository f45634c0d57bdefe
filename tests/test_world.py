"""The cartoon world: exact masks, honest captions, and combinations that stay out of training."""
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import make_examples
import weights_loader
import world
from models import ROOT

SPECS = [world.random_spec(random.Random(seed)) for seed in range(60)]


def test_the_coverages_of_a_picture_add_up_to_one_and_cost_nothing_in_it():
    for spec in SPECS[:12]:
        image, masks = world.render(spec, masks=True)
        assert np.array_equal(image, world.render(spec)[0])
        assert np.allclose(sum(masks.values()), 1)
        for name, there in zip(world.REGIONS, world.nouns(spec)):
            assert masks[name].any() == bool(there)


def test_the_mask_is_where_the_thing_changes_the_picture():
    rng = random.Random(1)
    me = world.random_individual(rng, "cat")
    spec = world.place(rng, [me], "grass")
    red, blue = (replace(spec, things=(replace(spec.things[0], individual=replace(
        me, colors=dict.fromkeys(me.colors, color))),)) for color in ("red", "blue"))
    (a, masks), (b, _) = world.render(red, masks=True), world.render(blue)
    changed = (a.astype(int) != b).any(-1)
    assert changed.any() and not (changed & (masks["first"] == 0)).any()


def test_the_two_things_of_a_pair_are_equals():
    rng = random.Random(2)
    pairs = [spec for spec in (world.random_spec(rng) for _ in range(1500)) if len(spec.things) == 2]
    assert 0.46 < len(pairs) / 1500 < 0.54                                          # half of the pictures
    first, second = (np.array([pair.things[k].pose for pair in pairs], float) for k in (0, 1))
    assert abs(first[:, 2].mean() - second[:, 2].mean()) < 0.01                     # of one size
    assert 0.4 < (first[:, 0] < second[:, 0]).mean() < 0.6                          # on either side
    texts = [(world.describe(pair, rng), pair) for pair in pairs]
    earlier = [text.index(pair.things[0].individual.kind) < text.index(pair.things[1].individual.kind)
               for text, pair in texts]
    assert 0.4 < np.mean(earlier) < 0.6                                             # in either order


def test_a_caption_fits_the_text_encoder_names_everything_and_may_begin_with_the_scene():
    model, rng, scene_first = weights_loader.load("tiny"), random.Random(3), 0
    for _ in range(1000):
        spec = world.random_spec(rng)
        caption = world.describe(spec, rng)
        ids, _ = model.tokenizer.encode([caption])
        assert ids[0, -2] == ids[0, -1]         # there is padding left: nothing was cut off
        for noun in world.nouns(spec)[1:-1]:
            assert not noun or model.tokenizer.find(caption, noun), (caption, noun)
        scene_first += caption.startswith(world.scene_words(spec.scene))
    assert 200 < scene_first < 300


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_picture_has_the_size_asked_for_and_looks_the_same(size):
    image, _ = world.render(SPECS[1], size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    small, reference = (np.asarray(Image.fromarray(x).resize((16, 16), Image.Resampling.BOX), float)
                        for x in (image, world.render(SPECS[1], 64)[0]))
    assert np.abs(small - reference).mean() < 6  # of 255: antialiasing differs


def test_held_out_combinations_never_occur_in_training():
    rng = random.Random(0)
    assert not any(world.held_out(world.random_spec(rng)) for _ in range(2000))
    drawn = [world.random_spec(rng, allow_held_out=True) for _ in range(1000)]
    assert any(world.held_out(spec) for spec in drawn)
    teddy = world.random_individual(rng, "teddy bear")
    assert world.held_out(world.place(rng, [teddy], "snow"))
    assert world.held_out(world.place(rng, [teddy, world.random_individual(rng, "mug")], "room"))


def test_an_individual_keeps_its_colours_in_every_scene():
    rng, me = random.Random(1), make_examples.TEDDY
    for scene in world.ALL_SCENES:
        image, masks = world.render(world.place(rng, [me], scene), masks=True)
        inside = image[masks["first"] == 1].astype(int)
        for color in ("turquoise", "yellow"):
            distance = np.abs(inside - world.COLORS[color]).sum(1)
            assert (distance < 12).mean() > 0.01, (scene, color)


def test_the_example_folders_are_what_the_script_draws(tmp_path):
    for name, (individual, scenes) in make_examples.EXAMPLES.items():
        make_examples.write_pictures(make_examples.example_specs(individual, scenes, name), tmp_path / name,
                                     tmp_path / "masks" / name)
        for kind in (Path(name), Path("masks") / name):
            drawn, kept = sorted((tmp_path / kind).iterdir()), sorted((ROOT / "examples" / kind).iterdir())
            assert [path.name for path in drawn] == [path.name for path in kept]
            for a, b in zip(drawn, kept):
                assert np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))


def test_unseen_concepts_are_distinct_and_learned_in_other_scenes_than_drawn():
    concepts = [make_examples.individual_and_specs(f"c{k}") for k in range(24)]
    assert len({str(individual) for individual, _ in concepts}) == 24
    for _, specs in concepts:
        assert len(specs) == 5 and not {spec.scene for spec in specs} & set(make_examples.NEW_SCENES)


def test_the_two_of_a_new_example_pair_share_no_strong_colour():
    for k in range(0, 2 * len(make_examples.NEW_PAIRS), 2):
        pair = [make_examples.individual_and_specs(f"e{n}")[0] for n in (k, k + 1)]
        assert tuple(one.kind for one in pair) == make_examples.NEW_PAIRS[k // 2]
        a, b = ({*one.colors.values(), one.pattern_color} - {None} for one in pair)
        assert len(a) == len(b) == 3 and not a & b
