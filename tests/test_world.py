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


def test_the_two_things_of_a_pair_are_equals():
    pairs = [spec for spec in SPECS if len(spec.things) == 2]
    assert 0.46 < len(pairs) / len(SPECS) < 0.54                                       # half of the pictures
    first, second = (np.array([pair.things[k].pose for pair in pairs], float) for k in (0, 1))
    assert abs(first[:, 2].mean() - second[:, 2].mean()) < 0.01                     # of one size
    assert 0.4 < (first[:, 0] < second[:, 0]).mean() < 0.6                          # on either side


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


def test_unseen_concepts_are_distinct_and_learned_in_other_scenes_than_drawn():
    individuals, specs = zip(*[make_examples.individual_and_specs(f"c{k}") for k in range(24)])
    assert len(set(map(str, individuals))) == 24 and {len(own) for own in specs} == {5}
    assert not {spec.scene for own in specs for spec in own} & set(make_examples.NEW_SCENES)


def test_the_two_of_a_new_example_pair_share_no_strong_colour():
    for k, kinds in enumerate(make_examples.NEW_PAIRS):
        pair = [make_examples.individual_and_specs(f"e{n}")[0] for n in (2 * k, 2 * k + 1)]
        a, b = ({*one.colors.values(), one.pattern_color} - {None} for one in pair)
        assert tuple(one.kind for one in pair) == kinds and len(a) == len(b) == 3 and not a & b
