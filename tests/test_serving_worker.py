"""The worker that draws for several people at once, with a toy in the place of a model."""

import threading
from concurrent.futures import wait

import numpy as np
import pytest

from jaxsd.errors import JaxsdError
from jaxsd.serving.batching import Worker
from jaxsd.serving.limits import Busy


class Toy:
    """Draws what it is asked for, as a grey value; its requests are (kind, value)."""

    batch_size = 4

    def __init__(self):
        self.batches, self.steps = [], 3
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def kind(self, request):
        return request[0]

    def frames_at(self, request):
        return [0, 1]

    def preview(self, latents):
        return np.full((self.batch_size, 1, 1, 3), latents, np.uint8)

    def draw(self, requests, watch=None):
        self.batches.append(list(requests))
        self.begun.set()
        assert self.gate.wait(10)
        for i in range(self.steps):
            watch(i, 0.0, 10 + i)
        if "broken" in [value for _, value in requests]:
            raise JaxsdError("this one is broken")
        return np.stack([np.full((1, 1, 3), value, np.uint8) for _, value in requests])


@pytest.fixture
def toy():
    return Toy()


@pytest.fixture
def worker():
    worker = Worker(waiting=6)
    yield worker
    worker.stop()


def held(toy, worker):
    """A worker that is busy until the gate opens."""
    toy.gate.clear()
    (job,) = worker.submit(toy, [("held", 0)])
    assert toy.begun.wait(10)
    return job


def test_what_waits_and_is_alike_is_drawn_together(toy, worker):
    first = held(toy, worker)
    jobs = worker.submit(toy, [("a", 1), ("a", 2), ("b", 3)]) + worker.submit(toy, [("a", 4)])
    toy.gate.set()
    values = [int(job.picture.result(10)[0, 0, 0]) for job in [first, *jobs]]
    assert values == [0, 1, 2, 3, 4]
    assert toy.batches == [[("held", 0)], [("a", 1), ("a", 2), ("a", 4)], [("b", 3)]]


def test_no_more_than_a_batch_and_the_longest_waiting_first(toy, worker):
    held(toy, worker)
    jobs = worker.submit(toy, [("b", 0), *(("a", i) for i in range(1, 6))])
    toy.gate.set()
    wait([job.picture for job in jobs], 10)
    assert [len(batch) for batch in toy.batches] == [1, 1, 4, 1]


def test_two_models_never_share_a_batch(toy, worker):
    other = Toy()
    held(toy, worker)
    jobs = worker.submit(toy, [("a", 1)]) + worker.submit(other, [("a", 2)])
    toy.gate.set()
    assert [int(job.picture.result(10)[0, 0, 0]) for job in jobs] == [1, 2]
    assert other.batches == [[("a", 2)]]


def test_a_full_queue_takes_all_of_a_request_or_nothing(toy, worker):
    held(toy, worker)
    jobs = worker.submit(toy, [("a", i) for i in range(5)])
    with pytest.raises(Busy, match=r"5 pictures wait already, and 6 are the most: ask again in \d"):
        worker.submit(toy, [("a", 5), ("a", 6)])
    assert worker.waiting == 5
    jobs += worker.submit(toy, [("a", 5)])
    with pytest.raises(Busy) as caught:
        worker.submit(toy, [("a", 6)])
    assert 1 <= caught.value.retry_after <= 60
    toy.gate.set()
    assert [int(job.picture.result(10)[0, 0, 0]) for job in jobs] == [*range(6)]


def test_who_has_left_makes_room_and_is_not_drawn(toy, worker):
    held(toy, worker)
    jobs = worker.submit(toy, [("a", i) for i in range(6)])
    for job in jobs[:5]:
        job.picture.cancel()
    jobs += worker.submit(toy, [("a", 6)])
    toy.gate.set()
    assert [int(job.picture.result(10)[0, 0, 0]) for job in jobs[5:]] == [5, 6]
    assert toy.batches[1:] == [[("a", 5), ("a", 6)]]


def test_a_run_that_nobody_waits_for_ends_early(toy, worker):
    toy.steps = 1000
    seen = []
    (job,) = worker.submit(toy, [("a", 1)], lambda *frame: seen.append(frame))
    job.picture.cancel()
    (other,) = worker.submit(toy, [("b", 2)])
    assert int(other.picture.result(10)[0, 0, 0]) == 2
    assert toy.batches[-1] == [("b", 2)]


def test_pictures_on_the_way_go_to_those_who_asked(toy, worker):
    held(toy, worker)
    seen = []
    (looking,) = worker.submit(toy, [("a", 1)], lambda i, n, p: seen.append((i, n, p[0, 0, 0])))
    worker.submit(toy, [("a", 2)])
    toy.gate.set()
    looking.picture.result(10)
    assert seen == [(1, 2, 10), (2, 2, 11)]


def test_who_cannot_look_costs_nobody_a_picture(toy, worker):
    held(toy, worker)
    jobs = worker.submit(toy, [("a", 1)], lambda *frame: 1 // 0)
    jobs += worker.submit(toy, [("a", 2)])
    toy.gate.set()
    assert [int(job.picture.result(10)[0, 0, 0]) for job in jobs] == [1, 2]
    assert toy.batches[1:] == [[("a", 1), ("a", 2)]]


def test_one_that_fails_takes_nobody_with_it(toy, worker):
    held(toy, worker)
    jobs = worker.submit(toy, [("a", 1), ("a", "broken"), ("a", 3)])
    toy.gate.set()
    assert int(jobs[0].picture.result(10)[0, 0, 0]) == 1
    with pytest.raises(JaxsdError, match="this one is broken"):
        jobs[1].picture.result(10)
    assert int(jobs[2].picture.result(10)[0, 0, 0]) == 3


@pytest.mark.parametrize(
    "fault",
    [
        {"frames_at": lambda request: 1 // 0},
        {"draw": lambda requests, watch: np.zeros((3, 1, 1, 3), np.uint8)},
    ],
)
def test_no_fault_of_a_model_ends_the_worker(toy, worker, fault):
    vars(toy).update(fault)
    (job,) = worker.submit(toy, [("a", 1)], lambda *frame: None)
    with pytest.raises((ZeroDivisionError, ValueError)):
        job.picture.result(10)
    for name in fault:
        delattr(toy, name)
    (job,) = worker.submit(toy, [("a", 2)])
    assert int(job.picture.result(10)[0, 0, 0]) == 2


def test_stopping_answers_what_runs_and_refuses_the_rest(toy):
    worker = Worker(waiting=6)
    running = held(toy, worker)
    (waiting,) = worker.submit(toy, [("a", 1)])
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    with pytest.raises(Busy, match="the server is stopping"):
        waiting.picture.result(10)
    assert not worker.alive and not running.picture.done()
    with pytest.raises(Busy, match="the server is stopping"):
        worker.submit(toy, [("a", 2)])
    toy.gate.set()
    stopping.join(10)
    assert int(running.picture.result(0)[0, 0, 0]) == 0
