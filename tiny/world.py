"""A cartoon world that the embedded model is trained on, drawn with Pillow, with exact masks of every object.

Six kinds of thing vary widely within their kind (colours of each part, a pattern, proportions), so that one
individual is a concept and not a caption. Half of the pictures show two things. They are equals: of one size,
on either side, described alike, named in random order. Half of the scenes hold a prop (a palm, a tent, ...).
A caption always names the kinds and the accessories, nearly always the scene and the prop, and only in a
random part of the pictures raised arms, colours, parts and patterns: a text-to-image model learns directions
for such details though no caption says all about an individual.
"""
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128  # pixels of a picture
COLORS = {
    "red": (214, 40, 40), "orange": (245, 135, 30), "yellow": (250, 215, 60), "olive": (128, 128, 40),
    "green": (50, 165, 70), "turquoise": (60, 205, 190), "blue": (50, 105, 225), "navy": (30, 40, 115),
    "purple": (135, 60, 175), "pink": (248, 145, 185), "maroon": (120, 22, 50), "brown": (135, 85, 45),
    "white": (246, 246, 244), "gray": (140, 142, 148),
}
DARK, CREAM = (32, 28, 34), (240, 220, 185)

# The parts of each kind that may have a colour of their own, and their natural one; None is the main colour.
PARTS = {
    "teddy bear": {"belly": "cream", "ears": None, "paws": None, "muzzle": "cream"},
    "cat": {"belly": "cream", "ears": None, "paws": None, "tail": None},
    "dog": {"belly": "cream", "ears": None, "paws": None, "muzzle": "cream"},
    "robot": {"belly": "cream", "ears": "gray", "arms": None, "face": None},
    "mug": {"handle": None, "rim": "cream"},
    "ball": {"middle": None},
}
# How a part and a pattern are called in front of the thing: "a yellow bellied red starred teddy bear".
ADJECTIVES = {"belly": "bellied", "ears": "eared", "paws": "pawed", "muzzle": "muzzled", "tail": "tailed",
              "arms": "armed", "face": "faced", "handle": "handled", "rim": "rimmed", "middle": "middled",
              "star": "starred", "heart": "hearted", "stripes": "striped", "dots": "dotted"}
KINDS = tuple(PARTS)
KIND_WEIGHTS = (0.28, 0.18, 0.16, 0.16, 0.11, 0.11)
WEARERS = ("teddy bear", "cat", "dog", "robot")
PATTERNS = ("star", "heart", "stripes", "dots")
ACCESSORIES = {"hat": "wearing a hat", "sunglasses": "wearing sunglasses",
               "balloon": "holding a balloon", "scarf": "wearing a scarf"}
SCENES = {"beach": "on the beach", "grass": "on the grass", "snow": "in the snow", "night": "at night",
          "room": "in a room"}
PROPS = {"beach": ("palm", "boat"), "grass": ("tree", "house"), "snow": ("snowman", "igloo"),
         "night": ("lamp", "tent"), "room": ("clock", "shelf")}
ALL_PROPS = tuple(prop for props in PROPS.values() for prop in props)
GESTURE = "with arms up"
BACKGROUNDS = ("red", "yellow", "green", "blue", "pink", "white", "gray")
ALL_SCENES = tuple(SCENES) + BACKGROUNDS
CONNECTIVES = ("next to", "next to", "and", "beside")
REGIONS = ("background", "first", "first's accessory", "second", "second's accessory", "prop")  # of the masks

# Combinations that never occur in training, to see whether the model composes.
HELD_OUT_SCENE = {("teddy bear", "snow"), ("robot", "beach"), ("dog", "night")}
HELD_OUT_ACCESSORY = {("cat", "hat"), ("robot", "scarf")}
HELD_OUT_PAIR = {frozenset(("teddy bear", "mug")), frozenset(("cat", "robot"))}

# How captions begin: mostly a plain photograph, now and then one of the forms that personalization uses.
OPENINGS = ("a good photo of {a}", "the photo of {a}", "a good photo of the {plain}", "image of {a}",
            "image of the {plain}", "a photograph of {a}", "{a} shown in a photo", "a picture of {a}")


@dataclass(frozen=True)
class Individual:
    """A thing that can be drawn in any scene. `colors` maps "main" and each part to a colour name or None
    (the kind's natural colour); `shape` holds six numbers in [0, 1] (proportions)."""
    kind: str
    colors: dict
    pattern: str | None
    pattern_color: str
    shape: tuple


@dataclass(frozen=True)
class Thing:
    """An individual in a picture. pose: (x, base, height, mirrored), in units of the picture's side."""
    individual: Individual
    accessory: str | None
    accessory_color: str
    pose: tuple
    arms_up: bool = False


@dataclass(frozen=True)
class Spec:
    """Everything that decides a picture: one or two things, the scene and its prop.

    `scenery` is six numbers in [0, 1]."""
    things: tuple
    scene: str
    scenery: tuple
    prop: str | None = None


def random_individual(rng: random.Random, kind: str | None = None, color: str | None = None) -> Individual:
    """A new individual; kind and main colour are drawn unless given."""
    kind = kind or rng.choices(KINDS, KIND_WEIGHTS)[0]
    main = color or rng.choice(list(COLORS))
    others = [name for name in COLORS if name != main]
    colors = {"main": main} | {part: rng.choice(others) if rng.random() < 0.6 else None
                               for part in PARTS[kind]}
    under = colors.get("belly") or main
    return Individual(kind, colors, rng.choice(PATTERNS) if rng.random() < 0.6 else None,
                      rng.choice([name for name in COLORS if name not in (under, main)]),
                      tuple(rng.random() for _ in range(6)))


def held_out(spec: Spec) -> bool:
    """True where the picture shows a combination that is kept out of training."""
    return (any((thing.individual.kind, spec.scene) in HELD_OUT_SCENE
                or (thing.individual.kind, thing.accessory) in HELD_OUT_ACCESSORY for thing in spec.things)
            or frozenset(thing.individual.kind for thing in spec.things) in HELD_OUT_PAIR)


def place(rng: random.Random, individuals: list, scene: str, accessories: tuple = (None, None)) -> Spec:
    """A picture of one or two individuals in this scene, in fresh poses, which are nearly aligned."""
    side, things = rng.choice((-1, 1)), []
    for individual, accessory in zip(individuals, accessories):
        mirrored = rng.random() < 0.5
        if len(individuals) == 1:
            x, height = 0.5 + rng.uniform(-0.04, 0.04), rng.uniform(0.74, 0.82)
        else:
            x, height = 0.5 + side * rng.uniform(0.21, 0.25), rng.uniform(0.5, 0.6)
        if accessory == "balloon":      # it is held on the outer side, and needs room there
            hand = -1 if individual.kind in ("cat", "dog") else 1
            mirrored = (hand * side < 0)
            x -= 0.05 * side
        height *= {"hat": 0.88, "balloon": 0.9}.get(accessory, 1.0)
        color = rng.choice(("red", "yellow", "green", "blue", "purple"))
        things.append(Thing(individual, accessory, color, (x, rng.uniform(0.89, 0.93), height, mirrored)))
        side = -side
    return Spec(tuple(things), scene, tuple(rng.random() for _ in range(6)))


def random_spec(rng: random.Random, allow_held_out: bool = False) -> Spec:
    """One picture of the training distribution."""
    count = rng.choice((1, 2))      # before the loop: pairs are refused more often
    while True:
        individuals = [random_individual(rng) for _ in range(count)]
        worn = [rng.choice(list(ACCESSORIES)) if one.kind in WEARERS and rng.random() < 0.5 / len(individuals)
                else None for one in individuals]
        scene = rng.choice(list(SCENES)) if rng.random() < 0.75 else rng.choice(BACKGROUNDS)
        spec = place(rng, individuals, scene, worn)
        things, accessories = [one.kind for one in individuals], [one for one in worn if one]
        distinct = len(set(things)) == len(things) and len(set(accessories)) == len(accessories)
        visible = scene not in [one.colors["main"] for one in individuals]
        if distinct and visible and (allow_held_out or not held_out(spec)):
            return enliven(rng, spec)


def enliven(rng: random.Random, spec: Spec) -> Spec:
    """The spec with a prop in half of the scenes, and with raised arms where there are two free ones."""
    things = [replace(one, arms_up=one.individual.kind in WEARERS and one.accessory != "balloon"
                      and rng.random() < 0.3) for one in spec.things]
    prop = rng.choice(PROPS[spec.scene]) if spec.scene in PROPS and rng.random() < 0.5 else None
    return replace(spec, things=tuple(things), prop=prop)


def article(words: str) -> str:
    """`words` behind a or an."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def details(rng: random.Random, individual: Individual, limit: int) -> str:
    """Up to `limit` random details of an individual as a phrase: " with pink ears and a red star"."""
    phrases = []
    for part in PARTS[individual.kind]:
        color = individual.colors[part]
        if color and rng.random() < 0.35:
            phrases.append(f"{color} {part}")
    if individual.pattern and rng.random() < 0.5:
        words = individual.pattern
        if rng.random() < 0.7:
            words = f"{individual.pattern_color} {words}"
        phrases.append(words)
    rng.shuffle(phrases)
    phrases = [words if words.endswith("s") else article(words) for words in phrases[:limit]]
    return " with " + " and ".join(phrases) if phrases else ""


def adjectives(individual: Individual) -> list:
    """All details of an individual, as they stand in front of the thing: ["yellow bellied", ...]."""
    phrases = [f"{color_name(individual, part)} {ADJECTIVES[part]}" for part in PARTS[individual.kind]]
    pattern = individual.pattern
    return phrases + [f"{individual.pattern_color} {ADJECTIVES[pattern]}" if pattern else "plain"]


def color_name(individual: Individual, part: str) -> str:
    """The name of a part's colour: its own, else the kind's natural one, else the main colour."""
    return individual.colors[part] or PARTS[individual.kind][part] or individual.colors["main"]


def phrase(rng: random.Random, individual: Individual, limit: int) -> str:
    """An individual in words, without an article: "red bellied purple cat", "cat with a star", ...

    limit: the most details in front of the thing; behind it there are at most two.
    """
    words, chance = individual.kind, rng.random()
    if rng.random() < 0.5:
        words = f"{individual.colors['main']} {words}"
    if chance < 0.3:
        return words + details(rng, individual, min(2, limit - 1))
    if chance < 0.75:
        phrases = adjectives(individual)
        return " ".join([*rng.sample(phrases, rng.randint(1, min(limit, len(phrases)))), words])
    return words


def describe(spec: Spec, rng: random.Random) -> str:
    """A caption as a person would write it."""
    limit = 5 if len(spec.things) == 1 else 3
    named = []
    for thing in rng.sample(spec.things, len(spec.things)):
        words = phrase(rng, thing.individual, limit)
        words += " " + ACCESSORIES[thing.accessory] if thing.accessory else ""
        named.append(words + (" " + GESTURE if thing.arms_up and rng.random() < 0.5 else ""))
    others = "".join(f" {rng.choice(CONNECTIVES)} {article(words)}" for words in named[1:])
    chance = rng.random()
    opening = "a photo of {a}" if chance < 0.6 else "{a}" if chance < 0.8 else rng.choice(OPENINGS)
    if others and "shown" in opening:
        opening = "a photo of {a}"
    text = opening.format(a=article(named[0]), plain=named[0]) + others
    chance, where = rng.random(), scene_words(spec.scene)
    if spec.prop and rng.random() < 0.85:
        where += f" near {article(spec.prop)}"
    if chance < 0.25:
        return f"{where}, {text}"
    return f"{text} {where}" if chance < 0.93 else text


def scene_words(scene: str) -> str:
    """The phrase that names a scene in a caption."""
    return SCENES.get(scene) or f"on {article(scene)} background"


def nouns(spec: Spec) -> tuple:
    """The words for the REGIONS of a picture, as captions name them; "" where there is nothing."""
    words = [spec.scene if spec.scene in SCENES else "background"]
    for thing in spec.things:
        words += [thing.individual.kind, thing.accessory or ""]
    return (*words, "", "")[:len(REGIONS) - 1] + (spec.prop or "",)


class Pen:
    """Draws in an object's own coordinates (x to the right, y up from its base, height about 1).

    A colour is RGB, or the name of a part of the individual that is drawn.
    """

    def __init__(self, side: int, masks: bool):
        self.image, self.ids, self.side, self.id = Image.new("RGB", (side, side)), None, side, 0
        self.draws = [ImageDraw.Draw(self.image)]
        if masks:
            self.ids = Image.new("L", (side, side))
            self.draws.append(ImageDraw.Draw(self.ids))
        self.stand()

    def stand(self, pose: tuple = (0.0, 1.0, 1.0, False), me: Individual | None = None, arms_up=False):
        """What is drawn from here on stands at this pose, and is this individual if it is one."""
        self.x, self.base, self.height, mirrored = pose
        self.sign, self.me, self.arms_up = -1 if mirrored else 1, me, arms_up

    def point(self, x: float, y: float) -> tuple:
        """Object coordinates to pixels."""
        return ((self.x + self.sign * x * self.height) * self.side, (self.base - y * self.height) * self.side)

    def paint(self, shape, color: tuple | str):
        """shape(draw, ink), once in the colour and, with the number of its region as ink, in the masks."""
        if isinstance(color, str):
            color = COLORS.get(color_name(self.me, color), CREAM)
        for draw, ink in zip(self.draws, (color, self.id)):
            shape(draw, ink)

    def ellipse(self, x, y, rx, ry, color, ring=0.0):
        """`ring`: the width of its line, if it is not filled."""
        (cx, cy), scale = self.point(x, y), self.height * self.side
        box = [cx - rx * scale, cy - ry * scale, cx + rx * scale, cy + ry * scale]
        width = round(ring * scale)
        self.paint(lambda draw, ink: draw.ellipse(box, None if ring else ink, ink, width), color)

    def rectangle(self, x0, y0, x1, y1, color):
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)

    def polygon(self, points, color):
        corners = [self.point(*p) for p in points]
        self.paint(lambda draw, ink: draw.polygon(corners, ink), color)

    def line(self, points, color, width):
        path, pixels = [self.point(*p) for p in points], max(1, round(width * self.height * self.side))
        self.paint(lambda draw, ink: draw.line(path, ink, pixels, "curve"), color)

    def both(self, draw, *shape):
        """A shape (pen.ellipse, ...) on both sides: its mirror image too."""
        for _ in range(2):
            self.sign = -self.sign
            draw(*shape)


STAR = [(radius * np.sin(k * np.pi / 5), radius * np.cos(k * np.pi / 5))
        for k, radius in enumerate((1, 0.45) * 5)]


def draw_pattern(pen: Pen, y: float, r: float):
    """The individual's pattern, of radius r around (0, y)."""
    pattern, color = pen.me.pattern, COLORS[pen.me.pattern_color]
    if pattern == "star":
        pen.polygon([(r * a, y + r * b) for a, b in STAR], color)
    elif pattern == "heart":
        pen.both(pen.ellipse, r * 0.43, y + r * 0.35, r * 0.52, r * 0.5, color)
        pen.polygon([(-r * 0.92, y + r * 0.2), (r * 0.92, y + r * 0.2), (0, y - r * 0.95)], color)
    elif pattern == "stripes":
        for k in (-1, 0, 1):
            middle = y + 0.62 * k * r
            pen.rectangle(-r * 0.9, middle - 0.17 * r, r * 0.9, middle + 0.17 * r, color)
    elif pattern == "dots":
        for b in (0.5, -0.5):
            pen.both(pen.ellipse, r * 0.55, y + r * b, r * 0.32, r * 0.32, color)


def draw_raised_arms(pen: Pen, head: float):
    """Both arms beside a head of this half width, in the colour of the paws or arms."""
    color, x = "arms" if pen.me.kind == "robot" else "paws", head + 0.11
    pen.both(pen.line, [(x - 0.12, 0.4), (x, 0.5), (x + 0.03, 0.72)], color, 0.11)
    pen.both(pen.ellipse, x + 0.03, 0.74, 0.08, 0.08, color)


def eyes(pen: Pen, x: float, y: float, r: float):
    pen.both(pen.ellipse, x, y, r * 1.25, r * 1.25, (250, 250, 250))
    pen.both(pen.ellipse, x, y, r * 0.8, r * 0.9, DARK)


def draw_teddy_bear(pen: Pen) -> dict:
    wide, ear = 0.25 + 0.05 * pen.me.shape[0], 0.13 + 0.03 * pen.me.shape[1]
    pen.both(pen.ellipse, 0.2, 0.09, 0.14, 0.11, "paws")
    if not pen.arms_up:
        pen.both(pen.ellipse, wide + 0.05, 0.41, 0.13, 0.1, "paws")
    pen.ellipse(0, 0.32, wide, 0.28, "main")
    pen.ellipse(0, 0.3, wide - 0.045, 0.22, "belly")
    draw_pattern(pen, 0.3, 0.16)
    pen.both(pen.ellipse, 0.22, 0.88, ear, ear, "ears")
    pen.ellipse(0, 0.71, 0.27, 0.22, "main")
    pen.ellipse(0, 0.63, 0.15, 0.11, "muzzle")
    pen.ellipse(0, 0.665, 0.05, 0.035, DARK)
    pen.rectangle(-0.045, 0.575, 0.045, 0.598, DARK)
    eyes(pen, 0.12, 0.77, 0.045)
    return {"top": 0.9, "eyes": 0.77, "neck": 0.5, "hand": (wide + 0.1, 0.41), "head": 0.27}


def draw_cat(pen: Pen) -> dict:
    wide, tall = 0.22 + 0.04 * pen.me.shape[0], 0.1 + 0.05 * pen.me.shape[1]
    pen.line([(0.12, 0.08), (0.34, 0.1), (0.4, 0.28), (0.36, 0.46)], "tail", 0.11)
    pen.ellipse(0, 0.28, wide, 0.28, "main")
    pen.ellipse(0, 0.28, wide - 0.04, 0.22, "belly")
    draw_pattern(pen, 0.29, 0.15)
    pen.both(pen.ellipse, 0.15, 0.065, 0.13, 0.08, "paws")
    pen.both(pen.polygon, [(0.26, 0.72), (0.23, 0.9 + tall), (0.05, 0.84)], "ears")
    pen.ellipse(0, 0.7, 0.27, 0.19, "main")
    pen.both(pen.ellipse, 0.13, 0.74, 0.062, 0.062, (225, 235, 90))
    pen.both(pen.ellipse, 0.13, 0.74, 0.028, 0.058, DARK)
    pen.polygon([(-0.05, 0.665), (0.05, 0.665), (0, 0.625)], (235, 120, 140))
    pen.rectangle(-0.06, 0.585, 0.06, 0.607, DARK)
    return {"top": 0.88, "eyes": 0.74, "neck": 0.5, "hand": (-wide - 0.02, 0.4), "head": 0.25}


def draw_dog(pen: Pen) -> dict:
    wide, drop = 0.23 + 0.04 * pen.me.shape[0], 0.15 + 0.05 * pen.me.shape[1]
    pen.line([(0.15, 0.2), (0.3, 0.26), (0.37, 0.4)], "main", 0.07)
    pen.ellipse(0, 0.3, wide, 0.27, "main")
    pen.ellipse(0, 0.31, wide - 0.045, 0.21, "belly")
    draw_pattern(pen, 0.31, 0.15)
    pen.both(pen.rectangle, 0.07, 0, 0.25, 0.16, "paws")
    pen.ellipse(0, 0.74, 0.24, 0.22, "main")
    pen.both(pen.ellipse, 0.27, 0.74, 0.1, drop, "ears")
    pen.ellipse(0, 0.62, 0.15, 0.11, "muzzle")
    pen.ellipse(0, 0.69, 0.068, 0.045, DARK)
    pen.rectangle(-0.04, 0.52, 0.04, 0.605, (232, 84, 98))
    eyes(pen, 0.11, 0.82, 0.042)
    return {"top": 0.92, "eyes": 0.81, "neck": 0.49, "hand": (-wide - 0.02, 0.38), "head": 0.24}


def draw_robot(pen: Pen) -> dict:
    wide, head = 0.22 + 0.04 * pen.me.shape[0], 0.2 + 0.04 * pen.me.shape[1]
    pen.both(pen.rectangle, 0.05, 0, 0.19, 0.16, "arms")
    if not pen.arms_up:
        pen.both(pen.rectangle, wide, 0.22, wide + 0.12, 0.52, "arms")
    pen.both(pen.rectangle, head - 0.01, 0.66, head + 0.09, 0.84, "ears")
    pen.rectangle(-wide, 0.13, wide, 0.54, "main")
    pen.rectangle(-wide + 0.035, 0.165, wide - 0.035, 0.505, "belly")
    draw_pattern(pen, 0.335, 0.155)
    pen.rectangle(-0.02, 0.9, 0.02, 0.99, DARK)
    pen.ellipse(0, 0.99, 0.06, 0.06, "ears")
    pen.rectangle(-head, 0.57, head, 0.92, "main")
    pen.rectangle(-head + 0.04, 0.61, head - 0.04, 0.88, "face")
    pen.rectangle(-0.1, 0.64, 0.1, 0.69, DARK)
    eyes(pen, 0.1, 0.79, 0.05)
    return {"top": 0.9, "eyes": 0.79, "neck": 0.55, "hand": (wide + 0.05, 0.3), "head": 0.23}


def draw_mug(pen: Pen):
    wide, tall = 0.28 + 0.04 * pen.me.shape[0], 0.6 + 0.1 * pen.me.shape[1]
    pen.ellipse(wide + 0.03, tall * 0.53, 0.17, 0.2, "handle", ring=0.075)
    pen.ellipse(0, 0.06, wide, 0.06, "main")
    pen.rectangle(-wide, 0.06, wide, tall, "main")
    pen.ellipse(0, tall, wide, 0.085, "rim")
    pen.ellipse(0, tall, wide - 0.05, 0.055, DARK)
    draw_pattern(pen, tall * 0.46, 0.2)


def draw_ball(pen: Pen):
    r = 0.34 + 0.06 * pen.me.shape[0]
    pen.ellipse(0, r, r, r, "main")
    if pen.me.colors["middle"]:
        angles = [-0.32, -0.1, 0.1, 0.32]
        pen.polygon([(r * np.cos(a), r + r * np.sin(a)) for a in angles]
                    + [(-r * np.cos(a), r + r * np.sin(a)) for a in reversed(angles)], "middle")
    draw_pattern(pen, r, r * 0.6)
    pen.ellipse(-r * 0.45, r * 1.55, r * 0.14, r * 0.14, (255, 255, 255))


DRAW = dict(zip(KINDS, (draw_teddy_bear, draw_cat, draw_dog, draw_robot, draw_mug, draw_ball)))


def draw_accessory(pen: Pen, thing: Thing, at: dict):
    """The accessory where the individual wears it; `at` holds the anchor points that its drawing returned."""
    color, head = COLORS[thing.accessory_color], at["head"]
    if thing.accessory == "hat":
        y = at["top"]
        pen.rectangle(-head * 0.62, y, head * 0.62, y + 0.21, color)
        pen.rectangle(-head * 0.62, y, head * 0.62, y + 0.06, DARK)
        pen.rectangle(-head * 1.1, y - 0.045, head * 1.1, y + 0.015, color)
    elif thing.accessory == "sunglasses":
        y = at["eyes"]
        pen.rectangle(-head, y + 0.025, head, y + 0.06, DARK)
        pen.both(pen.rectangle, head * 0.1, y - 0.065, head * 0.86, y + 0.06, DARK)
        pen.both(pen.rectangle, head * 0.3, y - 0.01, head * 0.55, y + 0.03, (120, 130, 150))
    elif thing.accessory == "scarf":
        y = at["neck"]
        pen.rectangle(-0.23, y - 0.05, 0.23, y + 0.05, color)
        pen.rectangle(0.06, y - 0.24, 0.19, y + 0.04, color)
        pen.rectangle(0.06, y - 0.19, 0.19, y - 0.14, (250, 250, 250))
    elif thing.accessory == "balloon":
        x, y = at["hand"]
        away = 1 if x > 0 else -1
        pen.line([(x, y), (x + 0.12 * away, y + 0.4)], DARK, 0.018)
        pen.ellipse(x + 0.13 * away, y + 0.52, 0.14, 0.17, color)
        pen.ellipse(x + 0.09 * away, y + 0.58, 0.035, 0.045, (255, 255, 255))


LANDSCAPES = {  # the sky, or several to choose from; the ground; the ground in a thing's shade
    "beach": ((140, 205, 245), (238, 212, 150), (208, 182, 124)),
    "grass": ((165, 215, 250), (85, 175, 65), (62, 140, 48)),
    "snow": ((178, 192, 212), (244, 248, 252), (206, 214, 226)),
    "night": ((16, 20, 60), (34, 48, 62), (20, 28, 38)),
    "room": ((235, 222, 195), (205, 218, 205), (232, 205, 205), (165, 115, 75), (134, 92, 58)),
}
WOOD, LEAF, WHITE = (110, 70, 40), (40, 130, 55), (250, 252, 255)
PROP_SHAPES = {  # as Pen's methods take them
    "palm": [("line", [(0.02, 0), (-0.02, 0.75)], WOOD, 0.1),
             *[("line", [(-0.02, 0.78), tip], LEAF, 0.13)
               for tip in ((-0.32, 0.7), (-0.24, 0.98), (0.24, 0.98), (0.32, 0.7))]],
    "boat": [("polygon", [(-0.36, 0.3), (0.36, 0.3), (0.22, 0.05), (-0.22, 0.05)], (150, 50, 40)),
             ("line", [(0, 0.3), (0, 0.98)], DARK, 0.05),
             ("polygon", [(0.04, 0.38), (0.04, 0.98), (0.34, 0.38)], WHITE)],
    "tree": [("line", [(0, 0), (0, 0.5)], WOOD, 0.13), ("ellipse", 0, 0.66, 0.32, 0.32, (25, 95, 45))],
    "house": [("rectangle", -0.28, 0, 0.28, 0.55, (240, 225, 190)),
              ("polygon", [(-0.36, 0.53), (0.36, 0.53), (0, 0.98)], (185, 60, 45)),
              ("rectangle", -0.09, 0, 0.09, 0.34, WOOD)],
    "snowman": [*[("ellipse", 0, y, r + edge, r + edge, color)
                  for y, r in ((0.22, 0.25), (0.57, 0.18), (0.84, 0.13))
                  for edge, color in ((0.03, (130, 150, 185)), (0, WHITE))],
                ("polygon", [(0, 0.87), (0, 0.8), (0.2, 0.82)], (240, 120, 30))],
    "igloo": [("ellipse", 0, 0.0, 0.4, 0.62, (120, 170, 215)), ("rectangle", -0.4, 0.28, 0.4, 0.32, WHITE),
              ("ellipse", 0, 0.0, 0.14, 0.3, (40, 60, 100)),
              ("rectangle", -0.42, -0.64, 0.42, 0.0, (244, 248, 252))],
    "lamp": [("line", [(0, 0), (0, 0.75)], (120, 120, 130), 0.07),
             ("ellipse", 0, 0.82, 0.2, 0.18, (255, 225, 110))],
    "tent": [("polygon", [(-0.38, 0), (0.38, 0), (0, 0.8)], (225, 110, 45)),
             ("polygon", [(-0.13, 0), (0.13, 0), (0, 0.5)], DARK)],
    "clock": [("ellipse", 0, 0.72, 0.27, 0.27, WOOD), ("ellipse", 0, 0.72, 0.21, 0.21, WHITE),
              ("line", [(0, 0.9), (0, 0.72), (0.13, 0.72)], DARK, 0.05)],
    "shelf": [("rectangle", -0.3, 0, 0.3, 0.95, (100, 60, 35)),
              *[("rectangle", x, y, x + 0.14, y + 0.34, color) for y in (0.08, 0.52)
                for x, color in ((-0.24, (200, 60, 50)), (-0.07, (60, 110, 190)), (0.1, (230, 190, 70)))]],
}


def draw_scene(pen: Pen, spec: Spec):
    """The background; `scenery` decides horizon, sun, clouds, stars, window and tints."""
    u, scene = spec.scenery, spec.scene
    horizon = 1 - (0.55 + 0.1 * u[0])
    if scene in BACKGROUNDS:
        pen.rectangle(0, 0, 1, 1, COLORS[scene])
        return
    *skies, ground, _ = LANDSCAPES[scene]
    pen.rectangle(0, 0, 1, 1, skies[int(u[1] * 2.999) % len(skies)])
    if scene == "beach":
        pen.rectangle(0, horizon - 0.01, 1, horizon + 0.15, (35, 120, 190))
    pen.rectangle(0, 0, 1, horizon, ground)
    if scene == "beach" and u[1] > 0.4:
        pen.ellipse(0.12 + 0.76 * (u[2] > 0.5), 0.87, 0.075, 0.075, (255, 235, 110))
    elif scene == "grass" and u[1] > 0.4:
        x = 0.14 + 0.62 * (u[2] > 0.5)
        pen.ellipse(x, 0.88, 0.11, 0.05, (252, 252, 252))
        pen.ellipse(x + 0.08, 0.91, 0.08, 0.05, (252, 252, 252))
    elif scene == "snow":
        for k in range(8):
            x, y = (0.07 + 0.13 * k + 0.3 * u[1]) % 1, 0.55 + 0.4 * ((0.37 * k + u[2]) % 1)
            pen.ellipse(x, y, 0.016, 0.016, (255, 255, 255))
    elif scene == "night":
        for k in range(5):
            x, y = (0.1 + 0.21 * k + 0.3 * u[1]) % 1, 0.55 + 0.4 * ((0.43 * k + u[2]) % 1)
            pen.ellipse(x, y, 0.011, 0.011, (245, 240, 190))
        pen.ellipse(0.12 + 0.76 * (u[3] > 0.5), 0.87, 0.075, 0.075, (245, 238, 185))
    elif scene == "room":
        x = 0.05 if u[2] > 0.5 else 0.71
        pen.rectangle(x, 0.66, x + 0.24, 0.93, (248, 246, 240))
        pen.rectangle(x + 0.025, 0.685, x + 0.215, 0.905, (150, 210, 245))
        pen.rectangle(x + 0.11, 0.685, x + 0.13, 0.905, (248, 246, 240))


def draw_prop(pen: Pen, spec: Spec):
    """The prop: behind the things, at the left or right, and in the middle of a pair."""
    x = 0.5 if len(spec.things) == 2 else 0.13 if spec.scenery[4] > 0.5 else 0.87
    pen.stand((x, 0.55 + 0.04 * spec.scenery[5], 0.42, False))
    for name, *shape in PROP_SHAPES[spec.prop]:
        getattr(pen, name)(*shape)


def render(spec: Spec, size: int = SIDE, masks: bool = False, supersample: int = 3) -> tuple:
    """Draw a spec. Returns image (size, size, 3) uint8 and, if asked for, a dict of (size, size) float32
    coverages of the REGIONS, which sum to one (else None)."""
    pen = Pen(size * supersample, masks)
    draw_scene(pen, spec)
    if spec.prop:
        pen.id = len(REGIONS) - 1
        draw_prop(pen, spec)
        pen.stand()
        pen.id = 0
    if spec.scene in SCENES:
        for x, base, height, _ in (thing.pose for thing in spec.things):
            pen.ellipse(x, 1 - base, 0.34 * height, 0.05 * height, LANDSCAPES[spec.scene][-1])
    for k, thing in reversed(list(enumerate(spec.things))):
        pen.id = 2 * k + 1
        pen.stand(thing.pose, thing.individual, thing.arms_up)
        anchors = DRAW[thing.individual.kind](pen)
        if thing.arms_up:
            draw_raised_arms(pen, anchors["head"])
        if thing.accessory:
            pen.id = 2 * k + 2
            draw_accessory(pen, thing, anchors)
    image = np.asarray(pen.image.reduce(supersample))
    if not masks:
        return image, None
    ids, none = np.asarray(pen.ids), np.zeros((size, size), np.uint8)
    samples = [ids[i::supersample, j::supersample] for i in range(supersample) for j in range(supersample)]
    return image, {name: sum((sample == k for sample in samples), none) / np.float32(supersample ** 2)
                   for k, name in enumerate(REGIONS)}
