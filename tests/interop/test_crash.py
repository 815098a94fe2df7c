"""`kill -9` between the provider's answer and the token's use: nothing is ever silently lost."""

import os
import random
import time
from collections import Counter

import httpx

from world import USER, wait_for

# A log of every frame would be most of what is measured here.
LOG = "info"

# Never used twice, since a token rests for its last 5 s (C16): each request renews. A revocation would not do here,
# because a 401 forces only one renewal in 30 s (C5).
SHORTEST = 3
KILLS = int(os.environ.get("INTEROP_KILLS", "100"))


def get(running):
    try:
        return running.get().status_code
    except (httpx.HTTPError, OSError):
        return None


def killed_while_renewing(servers, running, before_answer, microseconds=0):
    """Kills the sidecar around the provider's answer to the next request's renewal."""
    servers.tell("kill", pid=running.process.pid, beforeAnswer=before_answer, microseconds=microseconds)
    get(running)
    wait_for(lambda: running.process.poll() is not None, "the sidecar to be killed")


def lost(agent):
    connection = agent.connection("user")
    return (connection.get("state"), connection.get("reason")) == ("reauthorize", "lost_rotation")


def test_a_rotation_lost_before_its_answer_arrived_is_tried_once_and_reported(sidebearer, servers):
    """TOK-024, C14"""
    agent, running = connected(sidebearer, servers)
    killed_while_renewing(servers, running, before_answer=True)
    servers.tell("reset")
    restarted = agent.run()
    assert all(get(restarted) != 200 for _ in range(3))
    assert lost(agent), agent.connection("user")
    assert servers.report()["token"]["calls"] == {"refresh_token": 1}
    agent.connect("user")
    wait_for(lambda: get(restarted) == 200, "the new connection to be used")


def connected(sidebearer, servers):
    servers.tell("set", ttl=SHORTEST)
    agent = sidebearer(providers={"user": USER})
    agent.connect("user")
    running = agent.run()
    assert get(running) == 200
    return agent, running


def window(running):
    """Microseconds that a request with a renewal takes: from the provider's answer to the token's use is less."""
    spans = []
    for _ in range(5):
        started = time.monotonic()
        assert get(running) == 200
        spans.append(time.monotonic() - started)
    return int(sorted(spans)[2] * 1_000_000)


def moment(number, span, chance):
    """One kill in ten before the answer leaves, two as it leaves, the rest up to some way past the token's use."""
    if number % 10 < 3:
        return number % 10 == 0, 0
    # Every scale alike: storing the answer takes a hundredth of the whole.
    return False, int(10 * (span / 10) ** chance.random())


def test_kill_9_at_random_moments_loses_no_connection_silently(sidebearer, servers, figure):
    """TOK-020, TOK-024"""
    seed = int(os.environ.get("INTEROP_SEED", time.time()))
    chance = random.Random(seed)
    agent, running = connected(sidebearer, servers)
    span = window(running)
    tally, latest_loss = Counter(), 0
    for number in range(KILLS):
        before, microseconds = moment(number, span, chance)
        killed_while_renewing(servers, running, before, microseconds)
        running = agent.run()
        if get(running) == 200:
            tally["survived"] += 1
            continue
        if lost(agent):
            tally["reported as lost_rotation"] += 1
            latest_loss = max(latest_loss, microseconds)
        else:
            tally["silently gone"] += 1
            print(f"kill {number}, {microseconds} us after the answer: {agent.connection('user')}")
        agent.connect("user")
        wait_for(lambda: get(running) == 200, "the new connection to be used")
    figure(f"{KILLS} kills within {span} us of the answer, the last loss {latest_loss} us after it, seed {seed}: {dict(tally)}")
    assert tally["silently gone"] == 0
    assert tally["survived"] > 0
    assert tally["survived"] + tally["reported as lost_rotation"] == KILLS
    agent.command("store", "verify", "--config", agent.config)
