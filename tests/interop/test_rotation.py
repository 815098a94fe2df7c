"""A refresh token that is good once: expiries, restarts and several processes never spend one twice."""

import asyncio
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx

from world import API, USER, wait_for

# A log of every frame would be most of what is measured here.
LOG = "info"

ROTATIONS = 8
# Used until 5 s before it expires (C16), so a token of this lifetime is good for a second or two.
SHORT = 7


def user(sidebearer):
    agent = sidebearer(providers={"user": USER})
    agent.connect("user")
    return agent


def assert_no_refresh_token_was_spent_twice(servers):
    report = servers.report()
    assert (report["redeemedTwice"], report["revokedGrants"], report["token"]["errors"]) == (0, 0, {})


def test_many_expiries_under_load_revoke_no_family(sidebearer, servers, figure):
    """TOK-002, RTY-014"""
    agent = user(sidebearer)
    servers.tell("set", ttl=SHORT)
    running = agent.run()
    answers = Counter()

    async def load():
        deadline = time.monotonic() + 120

        async def worker(client):
            while servers_granted < ROTATIONS and time.monotonic() < deadline:
                answers[(await client.get(f"{API}/echo")).status_code] += 1

        async def watch():
            nonlocal servers_granted
            while servers_granted < ROTATIONS and time.monotonic() < deadline:
                servers_granted = await asyncio.to_thread(servers.granted, "refresh_token")
                await asyncio.sleep(0.2)

        servers_granted = 0
        async with running.client(httpx.AsyncClient) as http1, running.client(httpx.AsyncClient, http2=True) as http2:
            await asyncio.gather(watch(), *(worker(client) for client in [http1, http2] * 6))
        return servers_granted

    rotations = asyncio.run(load())
    figure(f"{sum(answers.values())} requests over {rotations} rotations: {dict(answers)}")
    assert rotations >= ROTATIONS
    assert set(answers) == {200}
    assert_no_refresh_token_was_spent_twice(servers)


def test_a_connection_survives_a_restart(sidebearer, servers):
    agent = user(sidebearer)
    first = agent.run()
    assert first.get().status_code == 200
    assert first.terminate() == 0
    servers.tell("revoke")
    assert agent.run().get().status_code == 200
    agent.command("store", "verify", "--config", agent.config)
    assert_no_refresh_token_was_spent_twice(servers)


def test_a_running_sidecar_sees_a_connection_that_the_command_line_made(sidebearer, servers):
    """TOK-029"""
    agent = sidebearer(providers={"user": USER})
    running = agent.run()
    missing = running.get()
    assert missing.status_code == 403
    assert missing.headers["content-type"] == "application/problem+json"
    assert servers.report()["api"]["requests"] == 0
    agent.connect("user")
    wait_for(lambda: running.get().status_code == 200, "the new connection to be used")


def test_one_revocation_seen_by_five_processes_costs_one_redemption(sidebearer, servers):
    """TOK-029, TOK-033, C3"""
    agent = user(sidebearer)
    processes = [agent.run() for _ in range(5)]
    assert {process.get().json()["token"] for process in processes}
    servers.tell("reset")
    servers.tell("revoke")
    # All five requests wait at the API for one another, so each process meets the 401 on its own.
    servers.tell("hold", count=len(processes))
    with ThreadPoolExecutor(len(processes)) as pool:
        answers = list(pool.map(lambda process: process.get(), processes))
    assert [answer.status_code for answer in answers] == [200] * 5
    assert servers.report()["api"]["held"] == 5
    assert servers.report()["token"]["calls"] == {"refresh_token": 1}
    assert_no_refresh_token_was_spent_twice(servers)


def test_several_execs_beside_a_sidecar_share_one_rotating_connection(sidebearer, servers, figure):
    """TOK-029"""
    agent = user(sidebearer)
    servers.tell("set", ttl=SHORT)
    running = agent.run()
    script = f'for n in $(seq 40); do curl -fsS -o /dev/null {API}/echo || exit; sleep 0.2; done'
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(agent.exec, "sh", "-c", script, seconds=300) for _ in range(4)]
        while not all(run.done() for run in runs):
            assert running.get().status_code == 200
            time.sleep(0.1)
        for run in runs:
            run.result()
    figure(f"{servers.report()['token']['granted']} granted to 5 processes that made {servers.report()['api']['requests']} requests")
    assert_no_refresh_token_was_spent_twice(servers)


def test_a_family_revoked_by_the_provider_is_reported_and_asked_for_once(sidebearer, servers):
    """RTY-003, TOK-017, C15"""
    agent = sidebearer(providers={"user": USER})
    token = agent.connect("user")
    running = agent.run()
    # Somebody else spends the same refresh token: the provider's answer is to revoke the family.
    for _ in range(2):
        servers.call("auth", "POST", "/token", data={"grant_type": "refresh_token", "client_id": "public", "refresh_token": token})
    servers.tell("reset")
    answers = [running.get().status_code for _ in range(5)]
    assert answers == [403] * 5
    assert servers.report()["token"]["calls"] == {"refresh_token": 1}
    wait_for(lambda: agent.connection("user")["state"] == "reauthorize", "`status` to say reauthorize")
