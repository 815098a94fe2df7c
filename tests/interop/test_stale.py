"""An API that closes idle connections whenever it likes, under load: agents do not see it, and nothing is done twice."""

import random
import select
import socket
import struct
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from raw import Reader, Server
from world import API

# A log of every frame would be most of what is measured here.
LOG = "info"

REQUESTS = 1000
AGENTS = 8


class Fickle:
    """Answers some requests on each connection, then closes it a moment after, in one of the ways that servers do.

    A `deaf` one no longer looks, in that moment, whether somebody has asked for something else.
    """

    def __init__(self, servers, ways, deaf):
        self.random = random.Random(7)
        self.ways = ways
        self.deaf = deaf
        self.seen = Counter()
        self.server = Server(servers.certificates, self.serve)

    def serve(self, stream, _):
        reader = Reader(stream)
        for _ in range(self.random.randint(1, 6)):
            self.answer(stream, reader)
        # About as long as an agent takes to ask again, so that the two cross.
        if self.deaf:
            time.sleep(self.random.random() * 0.01)
        else:
            while select.select([stream], [], [], self.random.random() * 0.01)[0]:
                self.answer(stream, reader)
        way = self.random.choice(self.ways)
        if way == "reset":
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return way != "good-bye"

    def answer(self, stream, reader):
        _, fields = reader.head()
        reader.body(fields)
        self.seen[fields["x-request-id"]] += 1
        stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.fixture
def fickle(servers):
    started = []

    def start(*ways, deaf=False):
        started.append(Fickle(servers, ways, deaf))
        return started[-1]

    yield start
    for one in started:
        one.server.close()


def load(running, method, content=None):
    """Counts the answers to many requests, from agents that keep their own connections to the sidecar."""
    answers = Counter()
    left = iter(range(REQUESTS))
    turn = threading.Lock()

    def agent(_):
        pause = random.Random(_)
        with running.client() as client:
            while True:
                with turn:
                    if (number := next(left, None)) is None:
                        return
                try:
                    got = client.request(method, API, content=content, headers={"x-request-id": str(number)})
                    outcome = got.status_code
                except httpx.HTTPError as error:
                    outcome = repr(error)
                with turn:
                    answers[outcome] += 1
                time.sleep(pause.random() * 0.01)

    with ThreadPoolExecutor(AGENTS) as pool:
        list(pool.map(agent, range(AGENTS)))
    return answers


WAYS = pytest.mark.parametrize("ways", [["good-bye"], ["good-bye", "cut", "reset"]], ids=["politely", "in every way"])


@WAYS
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_no_repeatable_request_fails_when_idle_connections_close_under_load(sidebearer, fickle, figure, ways, method):
    """RTY-032"""
    api = fickle(*ways, deaf=True)
    answers = load(sidebearer(ports={"api": api.server.port}).run(), method, b"body" if method == "PUT" else None)
    figure(f"{len(api.server.connections)} connections, {sum(api.seen.values())} arrivals, answers {dict(answers)}")
    assert answers == {200: REQUESTS}
    assert len(api.server.connections) > REQUESTS / 8


@WAYS
def test_no_post_arrives_twice_when_idle_connections_close_under_load(sidebearer, fickle, figure, ways):
    """RTY-032, C6"""
    api = fickle(*ways)
    answers = load(sidebearer(ports={"api": api.server.port}).run(), "POST", b"body")
    figure(f"{len(api.server.connections)} connections, {sum(api.seen.values())} arrivals, answers {dict(answers)}")
    assert set(api.seen.values()) == {1}
    # Of those that were written as their connection closed nobody knows, so their agents are told.
    assert set(answers) <= {200, 502}
    assert answers[200] > REQUESTS / 2
    assert len(api.server.connections) > REQUESTS / 20
