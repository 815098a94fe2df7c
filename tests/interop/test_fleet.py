"""A fleet that shares one store, for as long as one likes, while everything fails: no grant is lost in silence."""

import asyncio
import os
import random
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet import Fleet, SharedDirectory, SharedServer
from judge import Judge
from troubles import Troubles
from world import binary

# What the sidecars log of each renewal is what the judge needs; a log of every frame would be most of what is measured.
LOG = "info"
SECONDS = float(os.environ.get("INTEROP_FLEET_SECONDS", "60"))
SEED = int(os.environ.get("INTEROP_SEED", time.time()))


@pytest.fixture
def fleet(sidebearer, servers):
    made = []

    def make(*arguments):
        print(f"seed {SEED}")
        made.append(Fleet(sidebearer, servers, *arguments, SEED))
        return made[-1]

    yield make
    for one in made:
        one.close()


async def lives(fleet, seconds, agents):
    """The troubles of so many seconds, then an evening on which every user is served, by a token that is new."""
    work = [asyncio.create_task(one) for one in (fleet.load(agents), fleet.reconnect())]
    await Troubles(fleet).happen(seconds)
    unserved = await fleet.everyone_is_served()
    # What the store holds is still worth something at the provider.
    await fleet.revoke()
    unserved += await fleet.everyone_is_served()
    fleet.is_over = True
    await asyncio.gather(*work)
    return unserved


def is_judged(fleet, unserved, figure):
    judge = Judge(fleet)
    figure(judge.table())
    assert judge.findings() == {}
    assert unserved == []
    fleet.desk.command("store", "verify", "--config", fleet.desk.config)


def test_eight_sidecars_on_one_database_server_lose_no_grant_in_silence(fleet, postgres, figure):
    fleet = fleet(SharedServer(postgres), 8, 200)
    is_judged(fleet, asyncio.run(lives(fleet, SECONDS, 40)), figure)


class Hammer:
    """Somebody at the command line who never rests, and has no patience either: every third command is killed."""

    def __init__(self, fleet, number):
        self.fleet, self.chance = fleet, random.Random(f"{fleet.seed}/hammer/{number}")
        self.guest = f"guest{number}"
        fleet.guests.append(self.guest)
        self.done, self.failed = Counter(), []

    def strikes(self):
        while not self.fleet.is_over:
            self.strike(self.chance.choice(["status", "verify", "import", "disconnect"]))

    def strike(self, what):
        to_main = ["main", "--user", self.guest]
        arguments = {
            "status": ["status", "--json"], "verify": ["store", "verify"], "disconnect": ["disconnect", *to_main],
            "import": ["import", *to_main, "--refresh-token-file", "-"],
        }[what]
        token = self.fleet.servers.refresh_token(user=self.guest) if what == "import" else ""
        seconds = self.chance.random() * 0.1 if self.chance.random() < 1 / 3 else 60
        desk = self.fleet.desk
        command = ["timeout", "--signal=KILL", str(seconds), binary(), *arguments, "--config", desk.config]
        log = desk.outputs / f"{self.guest}-{sum(self.done.values())}"
        with log.open("w") as out:
            done = subprocess.run(command, input=token, stdout=out, stderr=out, text=True, env=desk.environment, cwd=desk.folder)
        was_killed = done.returncode in (137, -9)
        self.done["killed" if was_killed else what] += 1
        # Who has not connected, or has left, cannot leave.
        if done.returncode != 0 and not was_killed and not (what == "disconnect" and "is not connected" in log.read_text()):
            self.failed.append((what, done.returncode, log.read_text()))


def test_one_sidecar_and_a_command_line_that_never_rests_share_one_directory(fleet, tmp_path, figure):
    """TOK-029"""
    fleet = fleet(SharedDirectory(tmp_path), 1, 50)
    hammers = [Hammer(fleet, number) for number in range(3)]
    with ThreadPoolExecutor(len(hammers)) as pool:
        striking = [pool.submit(hammer.strikes) for hammer in hammers]
        try:
            unserved = asyncio.run(lives(fleet, SECONDS / 3, 20))
        finally:
            fleet.is_over = True
        [one.result() for one in striking]
    done = sum((hammer.done for hammer in hammers), Counter())
    figure(f"commands: {dict(done)}")
    is_judged(fleet, unserved, figure)
    assert [failure for hammer in hammers for failure in hammer.failed] == []
    assert min(done.values()) > 5
