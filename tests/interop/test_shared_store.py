"""Sidecars that share a database: each step of the rotation that two of them can trip over, one by one."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from faults import Faults
from fleet import AGENTS, Member, SharedServer, credentials, events, microseconds
from troubles import has_got_it
from world import CONSENT, PLAIN, wait_for

# A sidecar uses such a token for 7 s.
SHORT = 12


@pytest.fixture
def store(postgres):
    return SharedServer(postgres)


@pytest.fixture
def replica(sidebearer, servers, store):
    """Makes one more sidecar on the store."""
    made = []

    def make(start=True, entrance=None, **settings):
        made.append(Member(len(made), sidebearer, servers, store, entrance, settings))
        if start:
            made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.network.close()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def ask(member, user="alice", path="/echo"):
    # Nothing here is TLS, and what would be trusted takes long to read.
    with httpx.Client(proxy=f"http://{member.running.address}", trust_env=False, timeout=60, verify=False) as client:
        return client.get(PLAIN + path, headers={"proxy-authorization": credentials(user)})


def connect(member, *users):
    for user in users:
        member.sidebearer.connect("main", user)


def uses(servers):
    """What became of each use of a refresh token: whose, which of the family, and how."""
    return [(use["user"], use["rotation"], use["outcome"]) for use in servers.ledger()["uses"]]


def state(member, user="alice"):
    connection = next(one for one in member.sidebearer.connections() if one["user"] == user)
    return connection["state"], connection["reason"]


def stopped_before_its_answer(member, servers, pool):
    """Asks it, and stops it when the provider has granted the renewal and it does not know yet; gives what it will answer."""
    process = member.running.process
    servers.tell("kill", pid=process.pid, entrance=member.entrance, signal="SIGSTOP", beforeAnswer=True)
    answer = pool.submit(ask, member)
    wait_for(lambda: has_got_it(process), "the sidecar to be stopped")
    return answer


def resume(member):
    member.running.process.send_signal(signal.SIGCONT)


def end_the_lease(store):
    """As if its time had passed."""
    assert store.sql("UPDATE sidebearer.leases SET expires_at = now() RETURNING 1")


def forget_the_lease(store):
    """As if its time had passed, and whoever had it were not worth waiting for."""
    assert store.sql("DELETE FROM sidebearer.leases RETURNING 1")


def test_two_replicas_redeem_each_generation_once_however_many_ask_at_once(replica, servers, pool):
    """TOK-030"""
    users = ["alice", "bob", "carol", "dave"]
    replicas = [replica(), replica()]
    connect(replicas[0], *users)
    requests = [(replicas[number % 2], users[number // 2 % 4], "/quick") for number in range(200)]
    # None has a token; then each has one that is revoked.
    for generation in range(2):
        statuses = list(pool.map(lambda request: ask(*request).status_code, requests))
        assert statuses == [200] * 200
        assert sorted(uses(servers)) == sorted((user, past, "granted") for user in users for past in range(generation + 1))
        servers.tell("revoke")


def test_a_lease_holder_that_stands_still_past_its_time_is_waited_for_and_its_token_adopted(replica, servers, store, pool):
    """TOK-031"""
    first, second = replica(), replica()
    connect(first, "alice")
    late = stopped_before_its_answer(first, servers, pool)
    end_the_lease(store)
    heir = pool.submit(ask, second)
    wait_for(lambda: store.sql("SELECT 1 FROM sidebearer.leases WHERE inherited"), "the lease to be taken over")
    resume(first)
    assert late.result().json()["token"] == heir.result().json()["token"]
    assert uses(servers) == [("alice", 0, "granted")]


def test_a_lease_holder_that_comes_back_after_its_peer_rotated_adopts_what_the_peer_stored(replica, servers, store, pool):
    """TOK-031"""
    servers.tell("set", reuse="grant")
    first, second = replica(), replica()
    connect(first, "alice")
    late = stopped_before_its_answer(first, servers, pool)
    forget_the_lease(store)
    peers = ask(second).json()["token"]
    resume(first)
    assert late.result().json()["token"] == peers
    assert ask(first).json()["token"] == peers
    assert uses(servers) == [("alice", 0, "granted")] * 2


TWICE = [("alice", 0, "granted"), ("alice", 0, "invalid_grant")]


def test_a_grant_lost_by_a_lease_holder_that_stood_still_is_told_as_lost(replica, servers, store, pool):
    """TOK-031, C14"""
    first, second = replica(), replica()
    connect(first, "alice")
    late = stopped_before_its_answer(first, servers, pool)
    forget_the_lease(store)
    assert ask(second).json()["code"] == "reauthorize"
    assert state(second) == ("reauthorize", "lost_rotation")
    resume(first)
    # What it has in its hands is stored: a provider that only refuses a second use would honour it. This one has revoked
    # the family, and says so.
    assert late.result().status_code in (401, 403)
    wait_for(lambda: state(second)[0] == "reauthorize", "the grant to be known as lost")
    assert uses(servers) in (TWICE, [*TWICE, ("alice", 1, "invalid_grant")])
    assert {ask(one).status_code for one in (first, second)} <= {401, 403}
    connect(second, "alice")
    for one in (first, second):
        wait_for(lambda: ask(one).status_code == 200, "the new grant to be used")


def test_a_replica_that_is_refused_because_its_peer_was_quicker_adopts_the_peer_s_token(replica, servers, store, pool):
    """TOK-033, C15"""
    servers.tell("set", reuse="refuse")
    entrance = servers.entrance()
    way_to_provider = Faults(lambda: entrance)
    first, second = replica(entrance=way_to_provider.port), replica()
    connect(first, "alice")
    # What it learns of the provider at first is no part of this.
    connect(first, "bob")
    assert ask(first, "bob").status_code == 200
    way_to_provider.stall()
    late = pool.submit(ask, first)
    wait_for(lambda: store.sql("SELECT 1 FROM sidebearer.grants WHERE intent_hash IS NOT NULL"), "the call to be under way")
    forget_the_lease(store)
    peers = ask(second).json()["token"]
    way_to_provider.heal()
    assert late.result().json()["token"] == peers
    assert uses(servers)[1:] == [("alice", 0, "granted"), ("alice", 0, "invalid_grant")]
    way_to_provider.close()


def troubles_of(member):
    answer = httpx.get(f"{member.running.admin}/readyz", trust_env=False, timeout=60)
    assert answer.status_code == 200
    return [trouble["code"] for trouble in answer.json()["troubles"]]


def test_while_the_database_server_is_down_valid_tokens_serve_and_nothing_is_redeemed(replica, servers, store):
    """TOK-032, C19"""
    servers.tell("set", ttl=SHORT)
    one = replica()
    connect(one, "alice")
    assert ask(one).status_code == 200
    store.server.stop(immediate=True)
    assert ask(one).status_code == 200
    wait_for(lambda: "store_away" in troubles_of(one), "readiness to tell of it")
    refused = wait_for(lambda: (answer := ask(one)).status_code != 200 and answer, "the token to end")
    assert (refused.status_code, refused.json()["code"]) == (503, "token_unavailable")
    assert int(refused.headers["retry-after"]) > 0
    assert ask(one, "bob").status_code == 503
    assert uses(servers) == [("alice", 0, "granted")]
    store.server.start()
    wait_for(lambda: ask(one).status_code == 200, "it to recover by itself")
    wait_for(lambda: troubles_of(one) == [], "readiness to tell of it")
    # By then it may have been renewed once more.
    assert uses(servers)[:2] == [("alice", 0, "granted"), ("alice", 1, "granted")]


def test_a_database_server_that_does_not_answer_delays_no_valid_token(replica, servers):
    """TOK-032"""
    servers.tell("set", ttl=27)
    one = replica()
    connect(one, "alice")
    assert ask(one).status_code == 200
    one.network.stall()
    # Longer than it takes until the token is due.
    until, slowest = time.monotonic() + 18.5, 0
    while time.monotonic() < until:
        started = time.monotonic()
        assert ask(one).status_code == 200
        slowest = max(slowest, time.monotonic() - started)
        time.sleep(0.05)
    # Who waits for the store waits for 5 s.
    assert slowest < 4
    assert uses(servers) == [("alice", 0, "granted")]
    one.network.heal()
    wait_for(lambda: len(uses(servers)) == 2, "it to be renewed by itself")
    assert ask(one).status_code == 200


def told(member, message):
    """When its log has said so, in microseconds."""
    return [microseconds(event["timestamp"]) for event in events(member.running.log) if event["message"] == message]


def test_a_grant_a_renewal_and_a_disconnect_reach_all_replicas(replica, servers, figure):
    replicas = [replica() for _ in range(4)]
    waits = {}
    assert {ask(one).json()["code"] for one in replicas} == {"not_connected"}
    connect(replicas[0], "alice")
    began = time.monotonic()
    for one in replicas:
        wait_for(lambda: ask(one).status_code == 200, "the grant to be seen")
    waits["grant"] = time.monotonic() - began
    assert uses(servers) == [("alice", 0, "granted")]
    servers.tell("revoke")
    assert ask(replicas[0]).status_code == 200
    others = replicas[1:]
    # Without a request.
    adopted = lambda one: told(one, "token adopted from the store")
    wait_for(lambda: all(len(adopted(one)) == 2 for one in others), "the renewal to be seen")
    waits["renewal"] = max(adopted(one)[-1] - told(replicas[0], "token obtained")[-1] for one in others) / 1_000_000
    assert {ask(one).status_code for one in replicas} == {200}
    assert uses(servers) == [("alice", 0, "granted"), ("alice", 1, "granted")]
    replicas[0].sidebearer.command("disconnect", "main", "--user", "alice", "--config", replicas[0].sidebearer.config)
    began = time.monotonic()
    for one in replicas:
        wait_for(lambda: ask(one).status_code == 403, "the disconnect to be seen")
    waits["disconnect"] = time.monotonic() - began
    figure("seen by 4 replicas after " + ", ".join(f"{what}: {1000 * wait:.0f} ms" for what, wait in waits.items()))
    # Once a second at most is looked for a grant that was missing; and this machine may be very busy.
    assert max(waits.values()) < 10


def test_sidecars_that_start_on_an_empty_database_at_the_same_moment_all_serve(replica, pool):
    replicas = [replica(start=False) for _ in range(4)]
    list(pool.map(lambda one: one.sidebearer.run(), replicas))
    connect(replicas[0], "alice")
    assert state(replicas[3]) == ("connected", None)


def refused(member, **settings):
    done = member.sidebearer.command("run", "--config", member.sidebearer.config, check=False, seconds=60, **settings)
    assert done.returncode == 1
    return done.stderr


def test_a_database_server_that_is_not_who_it_has_to_be_gets_no_password(replica, store):
    for wrong, why in (({"extra_ca_files": []}, "UnknownIssuer"), (store.settings(host="other.test"), "not valid for name")):
        said = refused(replica(start=False, **wrong))
        assert "certificate" in said and why in said


def test_a_wrong_password_is_told_and_not_repeated(replica):
    said = refused(replica(start=False), STORE_PASSWORD="another-canary-9c1e")
    assert 'password authentication failed for user "sidebearer"' in said
    assert "hint: " in said
    assert "another-canary-9c1e" not in said


def test_a_consent_that_begins_at_one_replica_ends_at_another(replica, servers, person):
    replicas = [replica(providers={"main": CONSENT}) for _ in range(2)]
    for one in replicas:
        assert ask(one, "default").status_code == 403
    servers.tell("set", pause=True)
    alice = person()
    first, second = (one.running.admin for one in replicas)
    alice.open(f"{first}/connect/main?user=default")
    alice.press("Continue to Main")
    alice.consent("alice")
    # As if both stood behind one address.
    way_back = alice.way_back()
    assert way_back.startswith(first)
    alice.open(way_back.replace(first, second))
    alice.sees("Main is connected")
    for one in replicas:
        wait_for(lambda: ask(one, "default").status_code == 200, "the grant to be seen")
    assert servers.report()["token"]["calls"] == {"authorization_code": 1}
