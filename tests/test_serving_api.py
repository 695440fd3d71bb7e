"""The endpoint as OpenAI's clients use it, without a port: requests, refusals, ten at once."""

import asyncio
import base64
import io
import json
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image
from test_serving import PROMPTS, lone, mask, scan

import jaxsd
from jaxsd.serving.api import make_app
from jaxsd.serving.batching import Worker
from jaxsd.serving.kept import Kept
from jaxsd.serving.limits import Limits
from jaxsd.serving.models import Served
from jaxsd.serving.page import mount
from jaxsd.serving.service import Service

LIMITS = Limits(upload_bytes=100_000, upload_pixels=100_000, waiting=16)
URL = "/v1/images/generations"


@pytest.fixture(scope="module")
def service():
    names = ("digits", "digits-4step")
    models = {name: Served(name, jaxsd.load(name), LIMITS, batch_size=4) for name in names}
    service = Service(models, Worker(LIMITS.waiting), LIMITS)
    yield service
    service.worker.stop()


def with_client(service, use):
    async def run():
        transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await use(client)

    return asyncio.run(run())


def talk(service, *calls):
    """Answers to requests that are made at once: (method, path, arguments of httpx)."""

    def all_of_them(client):
        return asyncio.gather(
            *[client.request(method, path, **more) for method, path, more in calls]
        )

    return with_client(service, all_of_them)


def ask(service, **body):
    (answer,) = talk(service, ("POST", URL, {"json": {"prompt": "a red seven"} | body}))
    return answer


def picture(item):
    data = base64.b64decode(item["b64_json"], validate=True)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image), image.text


def encoded(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def test_pictures_from_a_prompt(service):
    answer = ask(service, prompt=PROMPTS[0], model="digits", n=3, seed=5, steps=4, size="32x32")
    assert answer.status_code == 200
    said = answer.json()
    assert said["size"] == "32x32" and said["model"] == "digits" and said["created"] > 1.7e9
    assert [item["seed"] for item in said["data"]] == [5, 6, 7]
    for item in said["data"]:
        pixels, notes = picture(item)
        alone = lone(service.model("digits"), PROMPTS[0], item["seed"], steps=4)
        np.testing.assert_array_equal(pixels, alone)
        assert notes["prompt"] == PROMPTS[0] and notes["seed"] == str(item["seed"])
        assert notes["model"] == "digits" and notes["steps"] == "4"


def test_every_field_counts(service):
    plain = {"seed": 5, "steps": 4, "guidance_scale": 3}
    first = picture(ask(service, **plain).json()["data"][0])[0]
    changes = [
        {"prompt": "a blue three"},
        {"negative_prompt": "red"},
        {"seed": 6},
        {"steps": 5},
        {"guidance_scale": 1},
        {"sampler": "euler"},
        {"model": "digits-4step"},
        {"image": encoded(scan()), "strength": 0.5},
    ]
    for change in changes:
        answer = ask(service, **plain | change)
        assert answer.status_code == 200, (change, answer.text)
        assert (picture(answer.json()["data"][0])[0] != first).any(), change


def test_from_a_picture_with_a_mask(service):
    shown = {"image": encoded(scan()), "mask": f"data:image/png;base64,{encoded(mask())}"}
    answer = ask(service, seed=2, steps=5, guidance_scale=3.0, **shown)
    pixels, _ = picture(answer.json()["data"][0])
    asked = dict(steps=5, guidance_scale=3.0, image=scan(), mask=mask())
    np.testing.assert_array_equal(pixels, lone(service.first, "a red seven", 2, **asked))


def test_a_seed_is_drawn_where_none_is_given_and_told(service):
    seeds = [ask(service, steps=1).json()["data"][0]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


def test_what_other_clients_send_besides_is_taken(service):
    more = {"user": "me", "quality": "auto", "background": "auto", "output_format": "png"}
    assert ask(service, steps=1, size="auto", **more).status_code == 200


def test_an_address_in_place_of_bytes(service):
    async def both():
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"prompt": "a red seven", "seed": 1, "steps": 2, "response_format": "url"}
            said = (await client.post(URL, json=body)).json()
            return await client.get(said["data"][0]["url"]), await client.get("/v1/images/no.png")

    there, not_there = asyncio.run(both())
    assert there.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(there.content)) as image:
        pixels = np.asarray(image)
    np.testing.assert_array_equal(pixels, lone(service.first, "a red seven", 1, steps=2))
    assert not_there.status_code == 404 and "kept for 600 s" in not_there.json()["error"]["message"]


def test_pictures_are_kept_for_a_while_and_within_bounds():
    kept = Kept(seconds=100.0, most=10)
    names = [kept.add(bytes([i]) * 4) for i in range(3)]
    assert [kept.find(name) for name in names] == [None, b"\1" * 4, b"\2" * 4]
    brief = Kept(seconds=0.0)
    assert brief.find(brief.add(b"gone")) is None


def test_ten_at_once_lose_nothing_and_get_their_own(service):
    bodies = [
        {"prompt": PROMPTS[i % 3], "seed": i, "steps": 4, "guidance_scale": 2.0 + i % 4}
        for i in range(10)
    ]
    answers = talk(service, *[("POST", URL, {"json": body}) for body in bodies])
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200, answer.text
        (item,) = answer.json()["data"]
        assert item["seed"] == body["seed"]
        asked = dict(steps=4, guidance_scale=body["guidance_scale"])
        alone = lone(service.first, body["prompt"], body["seed"], **asked)
        np.testing.assert_array_equal(picture(item)[0], alone)


def test_models(service):
    (answer,) = talk(service, ("GET", "/v1/models", {}))
    said = answer.json()
    assert said["object"] == "list" and [m["id"] for m in said["data"]] == [*service.models]
    teacher, student = said["data"]
    assert teacher["sizes"] == ["32x32"] and "dpmpp_2m" in teacher["samplers"]
    assert teacher["negative_prompt"] and not student["negative_prompt"]
    (one, none) = talk(service, ("GET", "/v1/models/digits", {}), ("GET", "/v1/models/gpt-9", {}))
    assert one.json() == teacher
    assert none.status_code == 404 and none.json()["error"]["code"] == "model_not_found"


def test_a_method_that_a_route_does_not_take(service):
    (answer,) = talk(service, ("POST", "/health", {}))
    assert answer.status_code == 405 and answer.headers["allow"] == "GET"
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_health(service):
    (answer,) = talk(service, ("GET", "/health", {}))
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        "drawing": 0,
        "waiting": 0,
        "models": [*service.models],
    }


def bomb():
    """A PNG of a few hundred bytes that promises 40000 x 40000 pixels."""

    def chunk(name, data):
        crc = zlib.crc32(name + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + name + data + crc

    size = (40000).to_bytes(4, "big")
    head = chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0]))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return base64.b64encode(data + chunk(b"IEND", b"")).decode()


def noise(side):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))


BROKEN = base64.b64encode(b"no picture at all").decode()
CUT = base64.b64encode(base64.b64decode(encoded(scan()))[:-400]).decode()


@pytest.mark.parametrize(
    "body, status, param, said",
    [
        ({"prompt": None}, 400, "prompt", "prompt must be string, not null"),
        ({"prompt": ""}, 400, "prompt", "give a prompt, such as"),
        ({"prompt": ["a", "b"]}, 400, "prompt", "prompt must be string, not ["),
        ({"prompt": "a\ud800"}, 400, "prompt", "prompt is not Unicode text"),
        ({"prompt": "x" * 2000}, 400, "prompt", "2000 characters; 1000 are the most"),
        ({"model": "dall-e-3"}, 404, "model", "no model 'dall-e-3' here; there are digits"),
        ({"n": 0}, 400, "n", "n must be from 1 to 8, not 0"),
        ({"n": 9}, 400, "n", "n must be from 1 to 8, not 9"),
        ({"n": "two"}, 400, "n", 'n must be integer, not "two"'),
        ({"n": True}, 400, "n", "n must be integer, not true"),
        ({"size": "1024x1024"}, 400, "size", "digits draws 32x32 here, not 1024x1024"),
        ({"size": "large"}, 400, "size", 'size must be WIDTHxHEIGHT, such as 512x512, not "large"'),
        ({"size": "9" * 50}, 400, "size", "size must be WIDTHxHEIGHT"),
        ({"response_format": "jpeg"}, 400, "response_format", "'b64_json' or 'url'"),
        ({"stream": True}, 400, "stream", "stream must be False, not true"),
        ({"style": "vivid"}, 400, "style", "style is not known; there are prompt, model"),
        ({"steps": 0}, 400, "steps", "steps must be from 1 to 100, not 0"),
        ({"steps": 10**9}, 400, "steps", "steps must be from 1 to 100"),
        ({"steps": 2.5}, 400, "steps", "steps must be integer, not 2.5"),
        ({"seed": -1}, 400, "seed", "seed must be from 0"),
        ({"seed": 2**32 - 1, "n": 2}, 400, "seed", "2 pictures take seeds from 4294967295 on"),
        ({"sampler": "magic"}, 400, "sampler", "unknown sampler 'magic'; there are ddim, ddpm"),
        ({"guidance_scale": 1e9}, 400, "guidance_scale", "guidance_scale must be from 0 to 100"),
        ({"guidance_scale": 10**400}, 400, "guidance_scale", "guidance_scale must be"),
        ({"model": "digits-4step", "negative_prompt": "blue"}, 400, "negative_prompt",
         "distilled from guidance"),
        ({"strength": 0.5}, 400, "image", "strength says how far to leave a picture"),
        ({"mask": encoded(mask())}, 400, "image", "give the picture, too"),
        ({"image": "%%%"}, 400, "image", "image must be a picture's bytes in base64"),
        ({"image": BROKEN}, 400, "image", "image cannot be read: it must be a whole picture, JPEG"),
        ({"image": CUT}, 400, "image", "image cannot be read"),
        ({"image": encoded(scan()), "mask": BROKEN}, 400, "mask", "mask cannot be read"),
        ({"image": bomb()}, 413, "image", "far too many pixels; 100000 are the most"),
        ({"image": encoded(Image.new("RGB", (500, 500)))}, 413, "image", "500x500 pixels"),
        ({"image": encoded(noise(250))}, 413, "image", "more than 100000 bytes"),
        ({"image": encoded(noise(500))}, 413, None, "the body has more than"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_requests_get_a_sentence(service, body, status, param, said):
    sent = json.dumps({"prompt": "a red seven"} | body)
    headers = {"content-type": "application/json"}
    (answer,) = talk(service, ("POST", URL, {"content": sent, "headers": headers}))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert said in error["message"] and error["param"] == param, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


@pytest.mark.parametrize(
    "sent, said",
    [
        (b"{", "the body must be JSON"),
        (b"", "the body must be JSON"),
        (b"[" * 100_000, "the body must be JSON"),
        (b"\xff\xfe{}", "the body must be JSON"),
        (b"[1]", "the body must be a JSON object"),
        (b"{}", "prompt is missing"),
        (b'{"prompt": "7", "guidance_scale": NaN}', "guidance_scale must be a finite number"),
    ],
)
def test_bodies_that_are_none(service, sent, said):
    headers = {"content-type": "application/json"}
    (answer,) = talk(service, ("POST", URL, {"content": sent, "headers": headers}))
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_other_ways_to_ask(service):
    form, get, nowhere = talk(
        service,
        ("POST", URL, {"data": {"prompt": "7"}}),
        ("GET", URL, {}),
        ("POST", "/v1/chat/completions", {"json": {}}),
    )
    assert form.status_code == 400 and "content-type: application/json" in form.text
    for answer in (get, nowhere):
        assert answer.status_code == 404
        assert "POST /v1/images/generations" in answer.json()["error"]["message"]


def test_no_answer_lets_a_browser_fetch_from_elsewhere(service):
    for answer in talk(service, ("GET", "/health", {}), ("POST", URL, {"json": {}})):
        assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "[::1]:7860", "origin": "http://[::1]:7860"}, 200),
        ({"host": "Pictures.example.org", "origin": "https://pictures.example.org:8443"}, 200),
        # A proxy that hands on a host of its own; browsers say whose page it was
        ({"origin": "https://elsewhere.org", "sec-fetch-site": "same-origin"}, 200),
        ({"host": "rebound.org:7860", "origin": "http://rebound.org:7860"}, 403),
        ({"host": "rebound.org:7860"}, 403),
        ({"host": "[::1"}, 403),
        ({"origin": "https://elsewhere.org"}, 403),
        ({"origin": "https://elsewhere.org", "sec-fetch-site": "cross-site"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_pages_of_other_sites_get_nothing(service, headers, status):
    async def use():
        app = make_app(service, {"localhost", "pictures.example.org"})
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/v1/models", headers=headers)

    answer = asyncio.run(use())
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "foreign_site"
        assert "content-security-policy" in answer.headers


@pytest.mark.parametrize("last", ["goes away", "is too large"])
def test_an_upload_that_breaks_off_leaves_nothing(service, tmp_path, monkeypatch, last):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    body = b'--b\r\ncontent-disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    left = [{"type": "http.request", "body": body + bytes(9999), "more_body": True}]
    if last == "is too large":
        end = b"\r\n--b\r\n".join([b"", body[5:] + bytes(LIMITS.upload_bytes // 2)])
        left += [left[0] | {"body": end}] * 9
    left.append({"type": "http.disconnect"})
    said = []

    async def receive():
        return left.pop(0)

    async def send(message):
        said.append(message)

    headers = [(b"content-type", b"multipart/form-data; boundary=b")]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
    scope |= {"query_string": b"", "scheme": "http", "server": ("127.0.0.1", 80)}

    async def upload():
        await mount(make_app(service), service)(scope, receive, send)

    asyncio.run(upload())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [m["status"] for m in said if "status" in m] == [400 if last == "goes away" else 413]
