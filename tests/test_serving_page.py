"""The page in headless Chromium, which has no network but this machine."""

import base64
import io
import shutil
import socket
import threading

import numpy as np
import pytest
from PIL import Image
from test_serving import PROMPTS, lone, mask, scan
from test_serving_api import bomb, picture

import jaxsd
from jaxsd.serving.batching import Worker
from jaxsd.serving.limits import Limits
from jaxsd.serving.models import Served
from jaxsd.serving.page import made_for
from jaxsd.serving.panels import escape
from jaxsd.serving.server import Server, address, listen
from jaxsd.serving.service import Service

pytestmark = pytest.mark.slow  # a browser

LIMITS = Limits(upload_pixels=100_000)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
OFFLINE = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
SECONDS = 60_000  # in milliseconds; the machine may have other work


class Gated(Served):
    """Draws while the gate is open, which it is unless a test closes it."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gate, self.begun, self.drawn = threading.Event(), threading.Event(), 0
        self.gate.set()

    def draw(self, requests, watch=None):
        def patient(i, t, latents):
            while not self.gate.wait(0.01):
                watch(i, t, latents)  # which ends a run that nobody waits for
            watch(i, t, latents)

        self.begun.set()
        pictures = super().draw(requests, patient if watch else None)
        self.drawn += len(requests)
        return pictures


@pytest.fixture(scope="module")
def service():
    names = ("digits", "digits-4step")
    models = {name: Gated(name, jaxsd.load(name), LIMITS, batch_size=4) for name in names}
    return Service(models, Worker(LIMITS.waiting), LIMITS)


@pytest.fixture(scope="module")
def called():
    """Every address that this process connects to."""
    found, connect = [], socket.socket.connect
    socket.socket.connect = lambda self, where: (found.append(where), connect(self, where))[1]
    yield found
    socket.socket.connect = connect


@pytest.fixture(scope="module")
def site(service, called):
    bound = listen("127.0.0.1", 0)
    server = Server(service, names={"localhost"})  # as `serve` has it on this address
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    yield address(bound)
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        yield browser
        browser.close()


class Page:
    """The page as somebody uses it; `asked` has the addresses that the browser went to."""

    def __init__(self, browser, site, **looks):
        self.context = browser.new_context(**looks)
        self.page, self.asked, self.wrong = self.context.new_page(), [], []
        self.page.set_default_timeout(SECONDS)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.goto(site)
        self.page.wait_for_selector("#draw")

    def set(self, name, value):
        kind = (
            "input[type=number]"
            if name in ("steps", "guidance_scale", "seed", "strength")
            else "textarea"
        )
        field = self.page.locator(f"#{name} {kind}, #{name} input[type=text]").first
        field.fill(str(value))
        field.blur()

    def choose(self, name, option):
        self.page.locator(f"#{name} input").click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def draw(self, **fields):
        for name, value in fields.items():
            self.set(name, value)
        self.page.click("#draw")

    def upload(self, name, data, file="picture.png"):
        field = self.page.locator(f"#{name} input[type=file]")
        field.set_input_files({"name": file, "mimeType": "image/png", "buffer": data})
        self.page.wait_for_selector(f"#{name} img")

    def pictures(self, count):
        """The pixels of that many pictures, once they are done."""
        done = "document.querySelectorAll('#pictures [data-state=done]').length"
        self.page.wait_for_function(f"{done} == {count}")
        images = self.page.locator("#pictures .jaxsd-frame img")
        addresses = [images.nth(i).get_attribute("src") for i in range(count)]
        return [picture({"b64_json": src.partition(",")[2]})[0] for src in addresses]

    def sentence(self):
        return self.page.locator("#pictures [role=alert]").inner_text()


@pytest.fixture
def page(browser, site):
    page = Page(browser, site)
    yield page
    page.context.close()
    assert not page.wrong


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_prompt_a_button_a_picture(page, service):
    page.choose("beside", "nothing")
    page.draw(prompt=PROMPTS[1], seed=7, steps=6, guidance_scale=3)
    (drawn,) = page.pictures(1)
    asked = dict(steps=6, guidance_scale=3.0)
    np.testing.assert_array_equal(drawn, lone(service.first, PROMPTS[1], 7, **asked))
    caption = page.page.locator("#pictures figcaption").inner_text()
    assert caption == "6 steps, ddim, guidance 3, seed 7"


def test_every_field_reaches_the_model(page, service):
    page.choose("beside", "nothing")
    page.choose("sampler", "dpmpp_2m")
    page.draw(prompt="seven", negative_prompt="blue", seed=3, steps=5, guidance_scale=4.5)
    (drawn,) = page.pictures(1)
    asked = dict(negative_prompt="blue", steps=5, guidance_scale=4.5, sampler="dpmpp_2m")
    np.testing.assert_array_equal(drawn, lone(service.first, "seven", 3, **asked))


def test_teacher_and_student_side_by_side(page, service):
    page.draw(prompt=PROMPTS[0], seed=5, steps=6, guidance_scale=3)
    teacher, student = page.pictures(2)
    asked = dict(guidance_scale=3.0)
    np.testing.assert_array_equal(teacher, lone(service.first, PROMPTS[0], 5, steps=6, **asked))
    other = service.model("digits-4step")
    np.testing.assert_array_equal(student, lone(other, PROMPTS[0], 5, **asked))
    assert page.page.locator("#pictures h3").all_inner_texts() == ["digits", "digits-4step"]


def test_pictures_come_on_the_way(page):
    page.page.evaluate("""() => {
        window.seen = [];
        const look = () => window.seen.push(document.querySelectorAll("#pictures figure:first-child .jaxsd-strip img").length);
        new MutationObserver(look).observe(document.querySelector("#pictures"), {childList: true, subtree: true});
    }""")  # noqa: E501
    page.draw(prompt=PROMPTS[0], steps=60)
    page.pictures(2)
    seen = page.page.evaluate("window.seen")
    assert max(seen) == 8 and len(set(seen) - {0, 8}) >= 2


def test_what_a_student_cannot_do_is_said_beside_the_teachers_picture(page):
    page.draw(prompt=PROMPTS[0], negative_prompt="blue", steps=5)
    page.pictures(1)
    assert "distilled from guidance" in page.sentence() and page.sentence().endswith(".")


def test_errors_are_sentences(page):
    page.choose("beside", "nothing")
    page.draw(prompt="   ")
    page.page.wait_for_selector("#pictures [role=alert]")
    assert page.sentence().startswith("Give a prompt, such as")
    page.draw(prompt="seven " * 90)
    page.page.wait_for_function("document.querySelector('#pictures').innerText.includes('shorten')")
    assert "longer than the model's text tower reads" in page.sentence()
    page.draw(prompt=PROMPTS[0], steps=5)
    page.pictures(1)  # and afterwards all is well


def test_from_a_picture_and_with_a_mask(page, service):
    page.choose("beside", "nothing")
    page.page.click("#from_picture button")
    page.upload("image", png(scan()))
    page.set("strength", 0.6)
    page.draw(prompt=PROMPTS[0], seed=2, steps=10, guidance_scale=3)
    (drawn,) = page.pictures(1)
    asked = dict(steps=10, guidance_scale=3.0, image=scan(), strength=0.6)
    np.testing.assert_array_equal(drawn, lone(service.first, PROMPTS[0], 2, **asked))
    page.upload("mask", png(mask()))
    page.draw(seed=4)
    page.page.wait_for_function("document.querySelector('#pictures').innerText.includes('seed 4')")
    (drawn,) = page.pictures(1)
    alone = lone(service.first, PROMPTS[0], 4, **asked, mask=mask())
    np.testing.assert_array_equal(drawn, alone)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"no picture at all", "Image cannot be read"),
        (base64.b64decode(bomb()), "pixels; 100000 are the most"),
        (png(Image.new("RGB", (500, 500))), "Image has 500x500 pixels; 100000 are the most"),
    ],
    ids=("broken", "bomb", "large"),
)
def test_uploads_that_are_refused(page, data, said):
    page.page.click("#from_picture button")
    page.upload("image", data)
    page.draw()
    page.page.wait_for_selector("#pictures [role=alert]")
    assert said in page.sentence()


@pytest.mark.slow
def test_ten_pages_at_once_lose_nothing(browser, site, service):
    pages = [Page(browser, site) for _ in range(10)]
    for i, one in enumerate(pages):
        one.choose("beside", "nothing")
        one.set("prompt", PROMPTS[i % 3])
        one.set("seed", 100 + i)
        one.set("steps", 20)
    service.first.gate.clear()  # so that all of them wait at once
    for one in pages:
        one.page.click("#draw")
    for _ in range(600):
        if service.worker.waiting >= 6:  # the others run
            break
        pages[0].page.wait_for_timeout(50)
    service.first.gate.set()
    for i, one in enumerate(pages):
        (drawn,) = one.pictures(1)
        alone = lone(service.first, PROMPTS[i % 3], 100 + i, steps=20)
        np.testing.assert_array_equal(drawn, alone)
        one.context.close()


@pytest.mark.parametrize("leave", ["close", "stop"])
def test_who_leaves_gives_up_the_place(browser, site, service, leave):
    model = service.first
    before = model.drawn
    model.gate.clear(), model.begun.clear()
    page = Page(browser, site)
    try:
        page.choose("beside", "nothing")
        page.draw(steps=50)
        assert model.begun.wait(60)
        page.page.click("#stop") if leave == "stop" else page.context.close()
        jobs = service.worker.submit(model, [model.request("seven", steps=2)])
        for _ in range(600):  # the next one begins, though the gate is closed to the first
            if not service.worker.waiting:
                break
            threading.Event().wait(0.05)
        assert not service.worker.waiting
    finally:
        model.gate.set()
    assert jobs[0].picture.result(60).shape == (32, 32, 3)
    assert model.drawn == before + 1
    if leave == "stop":
        page.context.close()


def test_nothing_comes_from_elsewhere(page, site, called):
    page.draw(prompt=PROMPTS[0], steps=4)
    page.pictures(2)
    assert page.asked
    assert not [url for url in page.asked if not url.startswith((site, "data:", "blob:"))]
    fonts = page.page.evaluate("[...document.fonts].filter(f => f.status == 'loaded').length")
    assert fonts == 0
    places = {where[0] for where in called if isinstance(where, tuple)}
    assert places <= {"127.0.0.1", "::1", "localhost"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits(browser, site, scheme, width):
    looks = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme}
    page = Page(browser, site, **looks)
    page.draw(prompt=PROMPTS[0], steps=4)
    page.pictures(2)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    frames = page.page.locator("#pictures .jaxsd-frame")
    boxes = [frames.nth(i).bounding_box() for i in range(2)]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width == 1280)  # side by side, or one below
    page.context.close()


def test_what_a_student_has_of_its_own(service):
    assert service.model("digits").pipe.schedule.default_guidance_scale == 3
    assert made_for(service.model("digits")) == set()  # which is a teacher
    assert made_for(service.model("digits-4step")) == {"steps", "sampler"}
    classes = Served("digits-ddpm-4step", jaxsd.load("digits-ddpm-4step"))
    assert made_for(classes) == {"steps", "sampler", "guidance_scale"}


def test_words_do_not_become_code():
    said = escape("<b>{{x}} ${y} `z`")
    assert said == "&lt;b&gt;&#123;&#123;x}} &#36;&#123;y} &#96;z&#96;"


def test_a_prompt_is_shown_as_it_is(page):
    page.choose("beside", "nothing")
    page.draw(prompt='<img src=x onerror="window.bad=1"> {{7*7}} ${window.bad=1}', steps=2)
    page.pictures(1)
    assert page.page.evaluate("window.bad") is None
    alt = page.page.locator("#pictures .jaxsd-frame img").get_attribute("alt")
    assert alt == '<img src=x onerror="window.bad=1"> {{7*7}} ${window.bad=1}'
