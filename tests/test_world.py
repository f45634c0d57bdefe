"""The cartoon world: exact masks, honest captions, and combinations that stay out of training."""
import random

import numpy as np
from PIL import Image

import make_examples
import weights_loader
import world
from models import ROOT

SPECS = [world.random_spec(random.Random(seed)) for seed in range(1500)]


def test_the_coverages_of_a_picture_add_up_to_one_and_cost_nothing_in_it():
    for spec in SPECS[:12]:
        image, masks = world.render(spec, masks=True)
        assert np.array_equal(image, world.render(spec)[0])
        assert np.allclose(sum(masks.values()), 1)
        for name, there in zip(world.REGIONS, world.nouns(spec)):
            assert masks[name].any() == bool(there)


def test_the_mask_is_where_the_thing_changes_the_picture():
    rng = random.Random(1)
    spec = world.place(rng, [world.random_individual(rng, "cat")], "grass")
    a, masks = world.render(spec, masks=True)
    colors = spec.things[0].individual.colors
    colors.update(dict.fromkeys(colors, "blue"))
    b, _ = world.render(spec)
    changed = (a.astype(int) != b).any(-1)
    assert changed.any() and not (changed & (masks["first"] == 0)).any()


def test_a_caption_fits_the_text_encoder_names_everything_and_may_begin_with_the_scene():
    model, rng, scene_first = weights_loader.load("tiny"), random.Random(3), 0
    for spec in SPECS[:1000]:
        caption = world.describe(spec, rng)
        ids, _ = model.tokenizer.encode([caption])
        assert ids[0, -2] == ids[0, -1]         # there is padding left: nothing was cut off
        for noun in world.nouns(spec)[1:-1]:
            assert not noun or model.tokenizer.find(caption, noun), (caption, noun)
        scene_first += caption.startswith(world.scene_words(spec.scene))
    assert 200 < scene_first < 300


def test_held_out_combinations_never_occur_in_training():
    assert not any(world.held_out(spec) for spec in SPECS)
    rng = random.Random(0)
    teddy = world.random_individual(rng, "teddy bear")
    assert world.held_out(world.place(rng, [teddy], "snow"))
    assert world.held_out(world.place(rng, [teddy, world.random_individual(rng, "mug")], "room"))


def pixels(root):
    return {path.relative_to(root): Image.open(path).tobytes() for path in root.glob("examples/**/*.png")}


def test_the_example_folders_are_what_the_script_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(make_examples, "ROOT", tmp_path)
    make_examples.main([])
    assert pixels(tmp_path) == pixels(ROOT)
