"""The page computes what torch computes; it works with a mouse and with a keyboard, and asks for nothing."""

import itertools
import json
import re
import shutil

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import covariance
import diffusion
import perfusion
import weights_loader
from attention_maps import attention, share_inside, word_map
from concept import Concept
from models import ROOT
from support import page as pages
from support.study import Study, Word, prompt_words, thinned

MADE = "</script><b>"                       # a prompt can be anything


def concept(model, name, words, keys):
    """A concept of the embedded model that is its ordinary word; its trained keys are somewhere else."""
    i_super = perfusion.super_encoding(model.text_encoder, model.tokenizer, words)
    d_star = covariance.inverse(covariance.cached(model)) @ i_super.double()
    embedding = model.text_encoder.embed(model.tokenizer.encode([words])[0])[0, 1:1 + len(words.split())]
    moved = [k + (keys == "trained") * torch.randn_like(k) for k in perfusion.locked_keys(model, words)]
    return Concept(name, words, embedding, i_super, d_star.float(), model.unet.values(i_super), moved,
                   keys=keys, metadata={"base": model.fingerprint})


@pytest.fixture(scope="module")
def study():
    torch.manual_seed(0)
    model = weights_loader.load("tiny")
    concepts = [{keys: concept(model, name, words, keys) for keys in ("locked", "trained")}
                for name, words in (("<teddy>", "teddy bear"), ("<cat>", "cat"))]
    return Study(model, "a photo of a {} next to a {}", concepts, steps=2, seeds=[3, 5])


RECORDS = {"fingerprint": "f", "command": "measure", "rows": {     # of two pairs and three seeds
    f"pair: {keys}": {"kinds": [[1, 1, 0], [1, 1, 1]], "both": [[1, 0, 0], [1, 1, 0]]}
    for keys in ("locked keys", "trained keys", "textual inversion")} | {
    title: {"first": [[1, 0], [1, 1]], "pattern": [[1, 1]], "kept": [[0.5, 1.0], [1.0, 0.5]]}
    for title in ("locked keys, beta 0.7", "trained keys, beta 0.7", "textual inversion")}}


@pytest.fixture(scope="module")
def file(study, tmp_path_factory):
    """The page of that study."""
    path = tmp_path_factory.mktemp("page") / "index.html"
    training = [study.pictures("ordinary words")] * 2
    path.write_text(pages.page(study, training, MADE, RECORDS), encoding="utf-8")
    return path


def data_of(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


# --------------------------------------------------------------------------------------- the study, the data

def test_a_concept_is_one_word_and_so_are_the_pieces_of_an_ordinary_word(study):
    words, tokenizer, T = study.words, study.model.tokenizer, study.model.text_encoder.config.max_length
    assert " ".join(x.label for x in words) == "start a photo of a <teddy> next to a <cat> end padding"
    assert words[5] == Word("<teddy>", [5, 6], ["teddy", "bear"], concept=0) and words[9].concept == 1
    assert [t for word in words for t in word.tokens] == list(range(T))
    pieces = prompt_words(tokenizer, "a xyz of", [])[2]
    assert (pieces.label, pieces.pieces) == ("xyz", ["x", "y", "z"])
    twice = prompt_words(tokenizer, "<teddy> <teddy>", study.locked)
    assert [word.tokens for word in twice[1:3]] == [[1, 2], [3, 4]]


def test_watching_does_not_change_the_picture(study):
    given, model = study.condition("locked keys"), study.model
    unwatched = diffusion.draw(model, given.keys, given.values, [3], model.size, study.steps, model.guidance)
    drawn = study.drawn("locked keys", 3)
    assert torch.equal(drawn.picture, unwatched[0]) and len(drawn.seen) == study.steps
    assert torch.equal(drawn.seen[:1], diffusion.seeded_noise(3, drawn.seen.shape[1:]))


def test_sliding_moves_the_keys_alone_from_locked_to_trained(study):
    ends = study.condition("locked keys"), study.condition("trained keys")
    half = study.condition("locked keys", slide=0.5)
    for middle, *keys in zip(half.keys, *(end.keys for end in ends)):
        assert torch.allclose(middle, sum(keys) / 2, atol=1e-4) and not torch.allclose(*keys, atol=0.1)
    assert all(map(torch.equal, half.values, ends[0].values))


def test_the_queries_of_a_large_layer_are_some_of_its_own():
    queries = torch.rand(64 * 32, 5)
    assert torch.equal(thinned(queries, (64, 32)), queries.view(64, 32, 5)[2::4, 2::4])      # 16 rows of 64


def test_fewer_steps_and_seeds_are_shown_rather_than_more_bytes(study):
    for limit in (10 ** 9, 1):
        shown = 2 if limit > 1 else 1
        assert len(pages.explorer(study, limit)["steps"]) == len(pages.live(study, limit)["masks"]) == shown


def test_the_committed_page_is_of_these_weights_and_records():
    path, measured = ROOT / "docs" / "index.html", ROOT / "tiny" / "records.json"
    data, again = data_of(path), "make it again: the command is in diagnostics.py"
    assert path.stat().st_size <= 2_000_000
    assert data["fingerprint"] == weights_loader.load("tiny").fingerprint, again
    assert data["records"] == (json.loads(measured.read_text()) if measured.exists() else None), again


# ----------------------------------------------------------------------------------------------- the browser

class Browser(webdriver.Chrome):
    """Headless Chromium, with what is done to the page here."""
    js = webdriver.Chrome.execute_script

    def emulate(self, width, theme):
        screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def open(self, path):
        self.emulate(1280, "light")
        self.get(path.as_uri())
        WebDriverWait(self, 60, 0.02).until(lambda _: self.js("return document.body.dataset.ready"))
        self.js("document.getElementById('explore').open = true")

    def all(self, css):
        return self.find_elements(By.CSS_SELECTOR, css)

    def texts(self, css):
        return self.js("return [...document.querySelectorAll(arguments[0])].map(x => x.innerText)", css)

    def press(self, *keys):
        for key in keys:
            ActionChains(self, duration=0).send_keys(key).perform()
        self.frame()
        return self.switch_to.active_element

    def frame(self):
        """Wait until what was changed is shown."""
        self.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromedriver") or not shutil.which("chromium"):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 "--disable-component-update", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with Browser(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        yield browser


@pytest.fixture
def page(browser, file):
    """The open page; whatever is done to it, the console stays empty and nothing is asked of the network."""
    browser.get_log("performance")
    browser.open(file)
    yield browser
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events
             if event["method"] == "Network.requestWillBeSent"]
    assert asked and {url.split(":")[0] for url in asked} <= {"file", "data", "blob"}


def maps_of_torch(study, seed, slide, beta, tau):
    """The maps (words, h, w) of the concepts' words: the queries of a locked drawing meet all keys."""
    queries = [q.flatten(0, 1)[None] for q in study.drawn("locked keys", seed).queries]
    keys = study.condition("locked keys", beta, tau, slide).keys
    maps = attention(queries, [k[1:] for k in keys], study.model.unet.config.attention_heads)
    size = study.drawn("locked keys", seed).queries[0].shape[:2]
    return torch.cat([word_map(maps, word.tokens, size) * len(word.tokens) for word in study.named])


def test_the_maps_computed_in_the_page_are_those_of_torch(page, study):
    for place in itertools.product((0, 1), (0, 0.5, 1), (0.5, 0.7, 1.0), (0.1, 0.15)):
        seed, *settings = place             # slide, beta, tau
        found = torch.tensor(page.js("return mapsAt(...arguments).map(map => [...map])", *place))
        expected = maps_of_torch(study, study.seeds[seed], *settings)
        assert (found - expected.flatten(1)).abs().max() < 0.005, settings


def test_sliding_the_key_shows_the_nearest_picture_and_the_shares_of_torch(page, study, file):
    page.js("document.getElementById('lambda').focus()")
    page.press(*[Keys.RIGHT] * 40)
    assert page.texts("#mix") == ["0.60 locked + 0.40 trained"]
    data, picture = data_of(file), page.all("#slide .tiles img")[0]
    assert picture.get_attribute("src") == data["slid"][2][0] and "0.5" in page.texts("#slide .nearest")[0]
    maps, masks = maps_of_torch(study, 3, 0.4, 0.7, 0.15), study.drawn("locked keys", 3).masks
    expected = [100 * share_inside(a[None], mask[None]).item() for a in maps for mask in masks]
    found = page.texts("#slide .share b")
    assert [float(text.split()[0]) for text in found] == pytest.approx(
        expected, abs=1.1)                                  # whole per cents, of maps that differ by 0.005
    page.all("#slide .seeds input")[1].click()
    page.frame()
    assert picture.get_attribute("src") == data["slid"][2][1] and page.texts("#slide .share b") != found


def test_beta_and_tau_move_the_gates_and_beta_the_picture(page, study, file):
    page.js("document.getElementById('beta').focus()")
    page.press(*[Keys.RIGHT] * 21)
    page.press(Keys.TAB, *[Keys.LEFT] * 5)
    assert page.texts("#beta-is, #tau-is") == ["0.91", "0.10"]
    gates = study.condition("locked keys", beta=0.91, tau=0.1).gates[1]
    own = [f"{100 * gates[word.tokens[-1], j]:.0f}\u00a0% open" for j, word in enumerate(study.named)]
    assert all(text in page.texts("#gate-says")[0] for text in own)
    assert page.all("#gate .tiles img")[0].get_attribute("src") == data_of(file)["swept"][4][0]


def test_what_was_measured_is_counted_from_the_records_and_what_was_typed_is_text(page):
    assert page.texts("footer") == [MADE]
    assert page.texts("#dots b") == ["5 of 6", "3"] * 3
    assert [text.split()[0] for text in page.texts("#alone tr:first-child td")] == ["75", "100", "75"]
    assert len(page.all("#dots .both")) == 9 and len(page.all("#dots .lost")) == 3
    assert "in 5 of 6 pictures with locked keys" in page.texts("#apart-count")[0]


def test_a_place_ranks_the_words_and_a_click_there_chooses_the_strongest(page, study):
    tile, views = page.all("#views .tile")[2], study.locks           # the second lock's picture
    side = page.js("return arguments[0].clientWidth", tile)
    x, y = int(side / 16 * 5.5) - side // 2, int(side / 16 * 9.5) - side // 2         # row 9, column 5 of 16
    ActionChains(page, duration=0).move_to_element_with_offset(tile, x, y).perform()
    step = page.js("return data.explorer.steps[chosen.step].number") - 1
    for i, name in enumerate(views):
        shares, order = study.drawn(name, 3).maps[0][step, :, 9, 5].sort(descending=True)
        ranked = [text.split() for text in page.texts(f"#views figure:nth-child({i + 1}) li")]
        assert [label for label, *_ in ranked] == [study.words[w].label for w in order[:5]]
        assert [float(share) for _, share, _ in ranked] == pytest.approx(
            (100 * shares[:5]).tolist(), abs=0.8)           # whole per cents, of maps in steps of 1 / 255
    ActionChains(page, duration=0).click().perform()
    strongest = study.drawn(views[1], 3).maps[0][step, :, 9, 5].argmax().item()
    assert page.texts(".chip[aria-pressed=true]")[0].startswith(study.words[strongest].label)


def test_a_step_shows_its_picture_and_can_be_played(page, file):
    def shown():
        return page.texts("#step-name")[0], page.all("#views img")[0].get_attribute("src")
    seen = data_of(file)["explorer"]["views"][0]["seen"]
    page.js("document.getElementById('step').focus()")
    page.press(Keys.HOME)
    assert shown() == ("1 of 2 (t = 501)", seen[0])
    page.all("#play")[0].click()
    WebDriverWait(page, 10, 0.02).until(lambda _: shown() == ("2 of 2 (t = 1)", seen[1]))
    page.press(Keys.ESCAPE)
    assert page.texts("#play") == ["Play the steps"] and page.js("return !live.player")


def test_the_keyboard_alone_reaches_and_uses_everything(page):
    stops = page.js("return all('input, button, summary, [tabindex]').filter(x => x.tabIndex === 0 && "
                    "!(x.type === 'radio' && !x.checked))")         # of radio buttons, a group is one stop
    page.js("document.activeElement.blur()")
    assert [page.press(Keys.TAB) for _ in stops] == stops
    pressed = page.texts("[aria-pressed=true]")
    page.js("document.querySelector('.chip[aria-pressed=true]').focus()")
    focused = page.press(Keys.LEFT, Keys.LEFT)
    assert page.texts("[aria-pressed=true]") == pressed and focused.text.startswith("of")
    assert page.js("return all('.chip').filter(x => x.tabIndex === 0)") == [focused]
    page.press(Keys.ENTER)
    assert page.texts("[aria-pressed=true]") == [focused.text]
    page.press(Keys.ESCAPE)
    assert page.texts("[aria-pressed=true]") == pressed
    page.js("document.querySelector('#views .tile').focus()")
    x, y = page.js("return chosen.place")
    page.press(Keys.RIGHT, Keys.DOWN)
    assert page.js("return chosen.place") == pytest.approx([x + 1 / 16, y + 1 / 16])
    page.press(Keys.ENTER)
    assert page.texts("[aria-pressed=true]")[0].split()[0] == page.texts(".rank b")[0]
    page.press(Keys.ESCAPE)
    assert page.js("return chosen.place") == [x, y]


def test_a_screen_reader_hears_names_values_in_words_and_headings_in_order(page):
    nodes = [node for node in page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
             if not node["ignored"]]

    def having(role):
        return [node for node in nodes if node["role"]["value"] == role]
    for role in ("button", "slider", "radio", "image", "application", "toolbar", "heading"):
        assert having(role) and all(node["name"]["value"].strip() for node in having(role)), role
    # Chromium's tree leaves this attribute out
    texts = page.js("return all('[type=range]').map(x => x.getAttribute('aria-valuetext'))")
    assert len(texts) == len(having("slider")) and all(re.search("[a-z]{3}", text) for text in texts)
    levels = page.js("return all('h1, h2, h3, h4').map(x => Number(x.tagName[1]))")
    assert levels[0] == levels.count(1) == 1 and max(levels) == 3
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    assert len(having("status")) == len(page.all("output")) >= 10       # what is said when it changes


CONTRAST = """        // of all texts, the least first
const light = colour => {
  const [r, g, b] = colour.match(/^rgb\\((.*)\\)$/)[1].split(",").map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b + .05;
};
const behind = x => {
  const colour = getComputedStyle(x).backgroundColor;
  return colour === "rgba(0, 0, 0, 0)" && x.parentElement ? behind(x.parentElement) : colour;
};
return all("body *").filter(x => x.getClientRects().length && [...x.childNodes].some(
  child => child.nodeType === 3 && child.data.trim())).map(x => {
    const front = getComputedStyle(x)[x.closest("svg") ? "fill" : "color"];
    const [low, high] = [light(front), light(behind(x))].sort((a, b) => a - b);
    return [high / low, x.textContent.slice(0, 40)];
}).sort((a, b) => a[0] - b[0])"""


@pytest.mark.parametrize("theme", ("light", "dark"))
def test_the_layout_fits_and_all_text_can_be_read(page, theme):
    for width in (320, 390, 768, 1280, 1920):
        page.emulate(width, theme)
        page.frame()
        assert page.js("return document.documentElement.scrollWidth") <= width
        contrast = page.js(CONTRAST)
        assert len(contrast) > 100 and contrast[0][0] >= 4.5, (width, contrast[:3])
        slide, locks = (page.js("return all(arguments[0]).map(x => x.getBoundingClientRect().top)", css)
                        for css in ("#slide .tiles > figure", "#views figure"))
        assert len(set(slide)) == 1                         # what is compared stands side by side
        assert locks[0] == locks[1]                         # locked and trained keys
        background = page.js("return getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", background))) < 80) == (theme == "dark")


def test_a_page_of_one_concept_without_trained_keys_or_records_has_the_other_parts(browser, study, tmp_path):
    alone = Study(study.model, "a {} on the grass", [{"locked": study.concepts[0]["locked"]}], 2, [0])
    path = tmp_path / "index.html"
    path.write_text(pages.page(alone, [[]], MADE, None), encoding="utf-8")
    browser.open(path)
    assert browser.get_log("browser") == []
    assert [title.split()[0] for title in browser.texts("section:not([hidden]) h2")] == [
        "A", "Learn", "The", "Explore"]
    assert "both words" not in browser.texts("main")[0]


def test_the_template_without_data_says_what_it_is(browser):
    browser.get((ROOT / "support" / "page.html").as_uri())
    assert not browser.all("main")[0].is_displayed() and "empty template" in browser.texts("footer")[0]
