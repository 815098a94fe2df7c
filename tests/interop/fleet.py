"""Many sidecars on one store, the agents of many users, and a desk at which who has lost a grant connects again."""

import asyncio
import base64
import json
import random
import sqlite3
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime

import httpx

from faults import Faults
from postgres import HOST, ROLE
from world import PLAIN, SECRETS, USER

KEYS = [base64.b64encode(bytes(range(32))).decode()]
AGENTS = [{"name": "fleet", "secret": "${RESEARCHER_SECRET}", "users": ["*"]}]
ROUTES = [{"host": "plain.test:80", "provider": "main", "plaintext": True}]
# A sidecar uses such a token for 15 s (C16): each user's is renewed several times a minute.
LIFETIME = 20
# An agent gives up when it hears nothing for so long.
PATIENCE = 20


def now():
    """Microseconds since 1970, as in the provider's ledger and the sidecars' logs."""
    return time.time_ns() // 1000


def credentials(user):
    return "Basic " + base64.b64encode(f"{user}:{SECRETS['RESEARCHER_SECRET']}".encode()).decode()


class SharedDirectory:
    """A store that is a directory of this machine."""

    name = "SQLite"

    def __init__(self, folder):
        self.path = folder / "shared-store"

    def network(self):
        return None

    def settings(self, _=None):
        return {"store": {"path": str(self.path), "keys": KEYS}}

    @contextmanager
    def held(self):
        """Somebody else is in the midst of writing: we, unless it is a sidecar that is stopped there."""
        other = sqlite3.connect(self.path / "sidebearer.db", isolation_level=None, timeout=1)
        try:
            other.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            pass
        yield
        other.close()


class SharedServer:
    """A store that is a database of a server, to which each sidecar has a network of its own."""

    name = "PostgreSQL"

    def __init__(self, postgres):
        self.server = postgres
        self.database = postgres.database()

    def network(self):
        return Faults(lambda: self.server.port)

    def sql(self, text):
        """Looks into it, or meddles with it, past every sidecar."""
        return self.server.sql(text, self.database)

    def settings(self, network=None, host=HOST):
        url = f"postgres://{ROLE}@{host}:5432/{self.database}?sslmode=verify-full"
        port = network.port if network else self.server.port
        store = {"url": url, "password": "${STORE_PASSWORD}", "keys": KEYS}
        return {"store": store, "resolve": {f"{host}:5432": f"127.0.0.1:{port}"}}


class Member:
    """One sidecar of a fleet, through its lives."""

    def __init__(self, number, make, servers, store, entrance=None, settings={}):
        """The provider knows it by the port at which it calls."""
        self.number = number
        self.entrance = entrance or servers.entrance()
        self.network = store.network()
        usual = {"providers": {"main": USER}, "routes": ROUTES, "agents": AGENTS, "ports": {"auth": self.entrance}}
        self.sidebearer = make(**usual | store.settings(self.network) | settings)
        self.running = self.client = None
        self.is_well = False
        self.troubles = []  # what, since when, until when

    def start(self):
        """As an orchestrator does: until it runs, for a store may be away."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self.running = self.sidebearer.run()
                break
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(proxy=f"http://{self.running.address}", trust_env=False, timeout=PATIENCE, limits=limits)
        self.is_well = True

    def signal(self, what):
        self.running.process.send_signal(what)

    @contextmanager
    def trouble(self, what):
        """Something happens to it, which the judge will want to know."""
        since = now()
        self.is_well = False
        yield
        self.is_well = True
        self.troubles.append((what, since, now()))

    async def ask(self, user):
        """What an agent hears that asks for its user: the status, and the code of an answer of the sidecar's own."""
        try:
            url = f"{PLAIN}/quick/{user}/{self.number}"
            answer = await self.client.get(url, headers={"proxy-authorization": credentials(user)})
        except httpx.ConnectError:
            return None, "unreachable"
        except httpx.TimeoutException:
            return None, "no answer"
        except httpx.HTTPError:
            return None, "cut short"
        is_our_own = answer.headers.get("content-type") == "application/problem+json"
        return answer.status_code, answer.json()["code"] if is_our_own else ""

    def renewals(self):
        """By its logs, for each user: when a renewed token was there, and when it was safe in the store."""
        found = defaultdict(list)
        for log in sorted(self.sidebearer.outputs.glob("*-run")):
            unsaved = set()
            for event in events(log):
                user, message, at = event["subject"], event["message"], microseconds(event["timestamp"])
                if message.startswith("a rotated refresh token could not be stored"):
                    unsaved.add(user)
                elif message == "token obtained":
                    found[user].append([at, None if user in unsaved else at])
                elif message == "the rotated refresh token is stored now":
                    unsaved.discard(user)
                    found[user][-1][1] = at
        return found


def events(log):
    """What a sidecar has logged of its users' tokens; a killed one may not have finished its last line."""
    lines = log.read_text().rpartition("\n")[0].splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and '"subject":' in line]


def microseconds(timestamp):
    moment = datetime.fromisoformat(timestamp.replace("Z", "+00:00"))
    return int(moment.replace(microsecond=0).timestamp()) * 1_000_000 + moment.microsecond


class Fleet:
    """The sidecars and their users. Whatever is random comes from the seed."""

    def __init__(self, make, servers, store, size, users, seed):
        self.servers, self.store, self.seed = servers, store, seed
        self.users = [f"user{number:03}" for number in range(users)]
        self.guests = []  # users who come and go as they like
        servers.tell("set", ttl=LIFETIME)
        self.desk = make(providers={"main": USER}, routes=ROUTES, agents=AGENTS, **store.settings())
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self.connect, self.users))
            self.members = [Member(number, make, servers, store) for number in range(size)]
            list(pool.map(Member.start, self.members))
        self.is_over = False
        self.answers = Counter()
        self.has_revoked = False  # all access tokens at once
        self.refused = []  # user and status of answers that only a lost grant explains
        self.suspects = set()
        self.losses = []  # user and reason
        self.counts = Counter()
        self.outages = []  # of the store, or of the ways to it: since when, until when

    def connect(self, user):
        self.desk.connect("main", user)

    def close(self):
        for network in filter(None, (member.network for member in self.members)):
            network.close()

    @contextmanager
    def outage(self):
        since = now()
        yield
        self.outages.append((since, now()))

    async def load(self, agents):
        """The users' agents, each of which asks any sidecar for any user."""
        async def agent(number):
            chance = random.Random(f"{self.seed}/{number}")
            while not self.is_over:
                await asyncio.sleep(chance.random() * 0.8)
                member = chance.choice(self.members)
                # Few go on asking one that does not answer.
                if member.is_well or chance.random() < 0.1:
                    self.answers[await self.ask(member, chance.choice(self.users + self.guests))] += 1

        await asyncio.gather(*(agent(number) for number in range(agents)))

    async def ask(self, member, user):
        status, code = await member.ask(user)
        # The second token that a request is sent with may be a sibling's, and revoked as well.
        if user not in self.guests and (status == 403 or status == 401 and not self.has_revoked):
            self.refused.append((user, status))
            self.suspects.add(user)
        return f"{status or ''} {code}".strip()

    async def revoke(self):
        """The provider takes every access token back: what serves after that is a refresh token."""
        self.has_revoked = True
        await asyncio.to_thread(self.servers.tell, "revoke")

    async def reconnect(self):
        """The desk is open all day."""
        while not self.is_over:
            await asyncio.sleep(0.5)
            if self.suspects:
                await asyncio.to_thread(self.reconnect_the_lost)

    def reconnect_the_lost(self):
        suspects = set(self.suspects)
        status = self.desk.command("status", "--json", "--config", self.desk.config, check=False)
        if status.returncode != 0:
            return
        for one in json.loads(status.stdout):
            if one["user"] in suspects and one["state"] == "reauthorize":
                # The store may have gone away again; then they come back later.
                try:
                    self.connect(one["user"])
                except AssertionError:
                    return
                self.losses.append((one["user"], one["reason"]))
        self.suspects -= suspects

    async def everyone_is_served(self):
        """Each user, by some sidecar; who is not, is named."""
        chance, turn = random.Random(self.seed), asyncio.Semaphore(20)
        deadline = time.monotonic() + 90

        async def served(user):
            async with turn:
                while time.monotonic() < deadline:
                    if await self.ask(chance.choice(self.members), user) == "200":
                        return True
                    await asyncio.sleep(0.3)

        served = await asyncio.gather(*map(served, self.users))
        return [user for user, is_served in zip(self.users, served) if not is_served]
