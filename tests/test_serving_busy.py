"""The endpoint when there is too much to do: queues, time limits, those who leave, the end."""

import asyncio
import dataclasses
import json
import threading

import pytest
from test_serving_api import LIMITS, URL, ask, talk, with_client

import jaxsd
from jaxsd.serving.api import make_app
from jaxsd.serving.batching import Worker
from jaxsd.serving.models import Served
from jaxsd.serving.service import Service


class Gated(Served):
    """Draws when the gate opens."""

    gate, begun = threading.Event(), threading.Event()
    fails = False

    def draw(self, requests, watch=None):
        self.begun.set()
        assert self.gate.wait(30)
        if self.fails:
            raise ZeroDivisionError("a secret of the machine")
        return super().draw(requests, watch)


@pytest.fixture
def gated(request):
    limits = dataclasses.replace(LIMITS, waiting=3, timeout=getattr(request, "param", 60.0))
    model = Gated("slow", jaxsd.load("digits-4step"), limits, batch_size=1)
    model.gate.clear(), model.begun.clear()
    service = Service({"slow": model}, Worker(limits.waiting), limits)
    yield service
    model.gate.set()
    service.worker.stop()


async def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come")


BODY = {"prompt": "a red seven", "seed": 1}


def test_what_there_will_never_be_room_for_is_refused(gated):
    answer = ask(gated, n=4)
    assert answer.status_code == 400 and "n must be from 1 to 3, not 4" in answer.text


def test_a_full_queue_says_when_to_come_back(gated):
    async def use(client):
        first = asyncio.create_task(client.post(URL, json=BODY))
        await wait_for(gated.first.begun.is_set)
        others = [asyncio.create_task(client.post(URL, json=BODY)) for _ in range(3)]
        await wait_for(lambda: gated.worker.waiting == 3)
        health = await client.get("/health")
        refused = await client.post(URL, json=BODY)
        gated.first.gate.set()
        return health, refused, await asyncio.gather(first, *others)

    health, refused, answers = with_client(gated, use)
    assert (health.json()["drawing"], health.json()["waiting"]) == (1, 3)
    assert gated.worker.drawing == 0
    assert refused.status_code == 503
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    error = refused.json()["error"]
    assert error["code"] == "server_overloaded"
    assert error["message"].startswith("3 pictures wait already, and 3 are the most: ask again in")
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) == 1


@pytest.mark.parametrize("gated", [0.5], indirect=True)
def test_what_takes_too_long_is_given_up(gated):
    async def use(client):
        answer = await client.post(URL, json=BODY)
        return answer, gated.worker.waiting

    answer, waiting = with_client(gated, use)
    assert answer.status_code == 504 and waiting == 0
    assert "not there in 0.5 s" in answer.json()["error"]["message"]


def test_who_goes_away_gives_up_the_place(gated):
    """As uvicorn tells it: the body, and later that the client is gone."""

    async def use(client):
        app, gone = make_app(gated), asyncio.Event()
        first = asyncio.create_task(client.post(URL, json=BODY))
        await wait_for(gated.first.begun.is_set)
        body = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]
        sent = []

        async def receive():
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"host", b"test")]
        scope = {
            "type": "http", "method": "POST", "path": URL, "raw_path": URL.encode(),
            "query_string": b"", "headers": headers, "scheme": "http", "http_version": "1.1",
            "server": ("test", 80), "client": ("test", 1), "root_path": "",
        }  # fmt: skip
        leaving = asyncio.create_task(app(scope, receive, send))
        await wait_for(lambda: gated.worker.waiting == 1)
        gone.set()
        await wait_for(lambda: gated.worker.waiting == 0)
        gated.first.gate.set()
        await leaving
        return await first, sent

    answer, sent = with_client(gated, use)
    assert answer.status_code == 200 and sent[0]["status"] == 499


def test_a_fault_of_the_server_tells_nothing_of_it(gated, caplog):
    gated.first.gate.set()
    gated.first.fails = True
    answer = ask(gated)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert "a secret of the machine" in caplog.text


def test_a_server_that_stops_says_so(gated):
    gated.worker.stop()
    answer, health = talk(gated, ("POST", URL, {"json": BODY}), ("GET", "/health", {}))
    assert answer.status_code == 503 and answer.headers["retry-after"] == "60"
    assert "the server is stopping" in answer.json()["error"]["message"]
    assert health.status_code == 503 and health.json()["status"] == "stopping"
