"""The page shows what was measured; it works with mouse, finger and keyboard, and asks for nothing."""

import base64
import gzip
import json
import re
import shutil

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import diffusion
from attention_maps import share_inside
from concept import Concept
from diffusion import seeded_noise
from models import tiny_model
from support import explorer
from support.explorer import View, Word

PROMPT = "a photo of a <teddy> next to a <cat>"
CONCEPTS = [Concept("<teddy>", "teddy bear", torch.zeros(2, 16)), Concept("<cat>", "cat", torch.zeros(1, 16))]
SIZES = ((8, 8), (8, 8), (4, 4), (2, 2))        # of the mean map and of three layers
LOCKS = ("super-category", "locked keys", "global lock", "trained keys", "textual inversion")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def words(model):
    return explorer.prompt_words(model.tokenizer, PROMPT, CONCEPTS)


def views_of(words, steps=4):
    """Locks with random pictures, maps and gates; the two objects are the halves of the picture."""
    tokens = sum(len(word.tokens) for word in words)
    masks = torch.zeros(2, 8, 8)
    masks[0, :, :4], masks[1, :, 4:] = 1, 1
    return [View(lock, f"about {lock}", torch.rand(3, 16, 16),
                 [torch.rand(steps, len(words), *size).softmax(1) for size in SIZES], masks,
                 None if lock in (LOCKS[0], LOCKS[4]) else torch.rand(tokens, 2)) for lock in LOCKS]


def page_of(words, views, **limit):
    about = {"lead": "lead", "made": "made", "concepts": ["<teddy>", "<cat>"],
             "objects": ["teddy bear", "cat"]}
    tokens = sum(len(word.tokens) for word in words)
    layers = ["layer 1", "layer 2", "layer 3"]
    return explorer.page(about, words, layers, views, [0.4, 0.7, 1.0], torch.rand(3, 3, 3, 16, 16),
                         torch.rand(3, tokens, 2), [5, 6, 7], **limit)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# ------------------------------------------------------------------------------------------- words and maps

def test_a_concept_is_one_word_and_so_are_the_pieces_of_an_ordinary_word(model, words):
    assert [word.label for word in words] == ["start", *PROMPT.split(), "end", "padding"]
    assert words[5] == Word("<teddy>", [5, 6], ["teddy", "bear"], concept=0) and words[9].concept == 1
    assert [t for word in words for t in word.tokens] == list(range(24))
    pieces = explorer.prompt_words(model.tokenizer, "a xyz of", [])[2]
    assert (pieces.label, pieces.pieces) == ("xyz", ["x", "y", "z"])
    twice = explorer.prompt_words(model.tokenizer, "<teddy> <teddy>", CONCEPTS)
    assert [word.tokens for word in twice[1:3]] == [[1, 2], [3, 4]]


def test_watching_does_not_change_the_picture(model, words):
    ids, _ = model.tokenizer.encode(["", "a photo of a teddy bear next to a cat"])
    e = model.text_encoder(model.text_encoder.embed(ids))
    keys, values = model.unet.keys(e), model.unet.values(e)
    latents, _, seen = explorer.watch(model, keys, values, words, seed=3, steps=2, guidance=2.0)
    size = latents.shape[-2:]
    unwatched = diffusion.draw_latents(model.unet, model.schedule, keys, values, [3], size, 2, 2.0)
    assert torch.equal(latents, unwatched)
    assert torch.equal(seen[0], seeded_noise(3, latents.shape[1:])[0]) and len(seen) == 2


# -------------------------------------------------------------------------------------------------- the file

def test_the_page_holds_the_maps_on_one_scale_for_all_locks(words):
    views = views_of(words)
    data = data_of(page_of(words, views))
    raw = torch.frombuffer(bytearray(gzip.decompress(base64.b64decode(data["maps"]))), dtype=torch.uint8)
    start = 0
    for i, (h, w) in enumerate(data["sizes"]):
        expected = torch.stack([view.maps[i] for view in views])
        scale = torch.tensor(data["scales"][i])[:, None, None]
        found = raw[start:start + expected.numel()].view(expected.shape) / 255 * scale
        assert ((found - expected).abs() <= scale / 510 + 1e-6).all()       # half a step of 255
        start += expected.numel()
    assert start == len(raw)


def test_fewer_steps_are_shown_rather_than_more_bytes(words):
    views = views_of(words, steps=20)
    per_step = 5 * 12 * sum(h * w for h, w in SIZES)
    for limit, shown in ((10 ** 9, explorer.STEPS_SHOWN), (3 * per_step, 3), (1, 1)):
        data = data_of(page_of(words, views, map_bytes=limit))
        assert len(data["steps"]) == shown
        assert len(gzip.decompress(base64.b64decode(data["maps"]))) == shown * per_step
    data = data_of(page_of(words, views))
    assert (data["steps"][0], data["steps"][-1]) == ({"number": 1, "t": 951}, {"number": 20, "t": 1})


def test_a_prompt_cannot_end_the_script_that_holds_it():
    words = [Word("</script><b>", [0], ["</script><b>"], 0)]
    page = page_of(words, views_of(words))
    assert "</script><b>" not in page and data_of(page)["words"][0]["label"] == "</script><b>"


# ------------------------------------------------------------------------------------------------ the browser

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync", "--no-first-run",
         "--disable-background-networking", "--disable-component-update")


class Browser(webdriver.Chrome):
    """Headless Chromium, with what is done to the page here."""
    js = webdriver.Chrome.execute_script

    def emulate(self, width, theme="light", touch=False):
        screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": touch}
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def open(self, path):
        self.get(path.as_uri())
        WebDriverWait(self, 60, 0.02).until(lambda _: self.all(".rank li"))

    def all(self, css):
        return self.find_elements(By.CSS_SELECTOR, css)

    def texts(self, css):
        return self.js("return [...document.querySelectorAll(arguments[0])].map(x => x.innerText)", css)

    def point(self, element, x=0, y=0, kind="mouse", press=False):
        """Move a pointer to an element, x and y pixels from its centre, and press it there."""
        actions = ActionBuilder(self, mouse=PointerInput(kind, kind), duration=0)
        actions.pointer_action.move_to(element, x, y)
        if press:
            actions.pointer_action.click()
        actions.perform()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromedriver") or not shutil.which("chromium"):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with Browser(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(words, tmp_path_factory):
    """Locks and the file of their page."""
    torch.manual_seed(0)
    views, path = views_of(words), tmp_path_factory.mktemp("page") / "explorer.html"
    page = page_of(words, views)
    path.write_text(page, encoding="utf-8")
    return views, path, data_of(page)


@pytest.fixture
def page(browser, shown):
    browser.emulate(1280)
    browser.open(shown[1])
    return browser


def shares_shown(browser):
    """The percentages (locks, objects) on the page."""
    numbers = [float(text.split(" %")[0]) for text in browser.texts(".share div")]
    return torch.tensor(numbers).view(5, 2)


def shares_expected(views, level, step, word):
    return torch.tensor([[100 * share_inside(view.maps[level][step, word][None], mask[None]).item()
                          for mask in view.masks] for view in views])


def test_pointing_at_a_word_shows_its_shares_under_every_lock(page, shown):
    for word in (3, 0, 11):     # an ordinary word, the start, the padding
        page.point(page.all("#chips .chip")[word])
        assert page.all("#chips [aria-pressed=true]")[0] == page.all("#chips .chip")[word]
        # shown without decimals, from maps in steps of 1/255
        assert (shares_shown(page) - shares_expected(shown[0], 0, 2, word)).abs().max() < 0.6
    assert page.texts("#views h3") == list(LOCKS)
    page.point(page.all("#chips .chip")[8], press=True)
    page.point(page.all("#chips .chip")[3])
    page.point(page.all("h1")[0])
    assert page.all("#chips [aria-pressed=true]")[0] == page.all("#chips .chip")[8]   # the chosen one


def test_the_sliders_choose_the_step_and_the_layer(page, shown):
    page.all("#step")[0].send_keys(Keys.RIGHT)
    page.all("#layer")[0].send_keys(Keys.RIGHT * 2)
    assert page.texts("#step-name, #layer-name") == ["4 of 4 (t = 1)", "layer 2"]
    assert (shares_shown(page) - shares_expected(shown[0], 2, 3, 5)).abs().max() < 0.6


def test_a_place_ranks_the_words_by_their_share_there_and_stays_when_pressed(page, shown):
    picture = page.all("#views .picture")[3]
    width = page.js("return arguments[0].clientWidth", picture)
    page.point(picture, x=int(width / 8 * 1.5), y=int(-width / 8 * 2.5))        # row 1, column 5 of 8
    for i, view in enumerate(shown[0]):
        shares, order = view.maps[0][2, :, 1, 5].sort(descending=True)
        found = page.texts(f"#views figure:nth-child({i + 1}) li span:last-child")
        assert [float(text.split()[0]) for text in found] == pytest.approx((100 * shares[:5]).tolist(),
                                                                           abs=0.6)
        names = page.texts(f"#views figure:nth-child({i + 1}) li span:first-of-type")
        assert names == [shown[2]["words"][w]["label"] for w in order[:5]]
    page.point(picture, x=-50, y=-50, press=True)
    chosen = page.texts(".rank")
    page.point(picture, x=60, y=60)
    assert page.texts(".rank") != chosen
    page.point(page.all("h1")[0])
    assert page.texts(".rank") == chosen


def test_the_keyboard_alone_is_enough(page):
    page.js("document.activeElement.blur()")
    first, second = page.all("#chips .chip")[0], page.all("#chips .chip")[1]
    first.send_keys(Keys.RIGHT)
    assert page.js("return document.activeElement") == second == page.all("[aria-pressed=true]")[0]
    page.js("document.querySelector('#views .picture').focus()")
    before = page.js("return document.querySelector('.spot').style.left")
    page.all("#views .picture")[0].send_keys(Keys.RIGHT)
    after = page.js("return document.querySelector('.spot').style.left")
    assert float(after[:-1]) - float(before[:-1]) == pytest.approx(100 / 8)
    indices = page.js("return [...document.querySelectorAll('button, input, [tabindex]')]"
                      ".map(x => x.tabIndex)")
    assert indices == [0] * (12 + 4 + 5)        # words, sliders with the box, pictures


def test_beta_walks_through_the_pictures_and_the_gates(page, shown):
    def state():
        picture = page.js("return document.querySelectorAll('#seeds img')[2].src")
        return page.texts("#beta-name")[0], picture, page.texts("#gates .token")[0]
    assert state()[0] == "0.70"
    page.all("#beta")[0].send_keys(Keys.RIGHT)
    last = shown[2]["betas"][2]
    assert state()[:2] == ("1.00", last["pictures"][2])
    assert state()[2].split(" · ") == [f"{gate:.2f}" for gate in last["gates"][0][0]]
    assert page.texts("#seeds p") == ["seed 5", "seed 6", "seed 7"]


def test_the_map_can_be_taken_off_the_picture(page):
    painted = ("return document.querySelector('canvas').getContext('2d').getImageData(0, 0, 320, 320)"
               ".data.some(x => x)")
    assert page.js(painted)
    page.point(page.all("#map")[0], press=True)
    assert not page.js(painted)


@pytest.mark.parametrize("width, columns", [(390, 2), (1280, 5)])
@pytest.mark.parametrize("theme, dark", [("light", False), ("dark", True)])
def test_the_layout_fits_a_phone_and_a_desk_in_both_themes(browser, shown, width, columns, theme, dark):
    browser.emulate(width, theme, touch=width < 600)
    browser.open(shown[1])
    assert browser.js("return document.documentElement.scrollWidth") <= width
    places = browser.js("return [...document.querySelectorAll('#views figure')].map(x => x.offsetLeft)")
    assert len(set(places)) == columns
    background = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 80) == dark
    if width < 600:
        browser.point(browser.all("#chips .chip")[6], kind="touch", press=True)
        assert browser.js("return arguments[0].ariaPressed", browser.all("#chips .chip")[6]) == "true"
        before = browser.texts(".rank")
        browser.point(browser.all("#views .picture")[0], x=-60, y=-60, kind="touch", press=True)
        assert browser.texts(".rank") != before


def test_nothing_is_asked_of_the_network_and_the_console_is_empty(browser, shown):
    browser.emulate(1280)
    browser.get_log("browser"), browser.get_log("performance")
    browser.open(shown[1])
    browser.point(browser.all("#chips .chip")[2], press=True)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events
             if event["method"] == "Network.requestWillBeSent"]
    assert asked and {url.split(":")[0] for url in asked} <= {"file", "data", "blob"}
