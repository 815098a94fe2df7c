"""What goes wrong in a fleet: processes die and freeze, its store and the way to it fail. All of it in a seeded order."""

import asyncio
import random
import signal
import time

from fleet import SharedServer

# The right to renew a grant outlives whoever held it by up to 35 s (C19). Then they are waited for a little.
JUST_PAST_THE_LEASE, FAR_PAST_THE_LEASE = 40, 60


class Troubles:
    """A deck of them, dealt again and again."""

    def __init__(self, fleet):
        self.fleet = fleet
        self.chance = random.Random(fleet.seed)
        self.aiming = asyncio.Lock()
        self.deck = [self.kill, self.kill, self.kill_around_an_answer, self.kill_around_an_answer, self.kill_around_an_answer]
        self.deck += [self.stop_for_a_moment]
        if isinstance(fleet.store, SharedServer):
            self.deck += [self.cut_one, self.cut_all, self.refuse_one, self.stall_one, self.slow_all]
            self.deck += [self.restart_fast, self.restart_immediately]
            self.long = [self.stop_past_the_lease, self.cut_off_past_the_lease]
        else:
            self.deck += [self.hold_the_store]
            self.long = [self.stop_past_the_lease]

    async def happen(self, seconds):
        """For so long; then everything is mended."""
        deadline = time.monotonic() + seconds
        absences = asyncio.create_task(self.long_absences(deadline))
        while time.monotonic() < deadline:
            for trouble in self.chance.sample(self.deck, len(self.deck)):
                if time.monotonic() >= deadline:
                    break
                await asyncio.sleep(self.chance.uniform(0.2, 1.2))
                await trouble()
        await absences

    async def long_absences(self, deadline):
        """One after the other, at least one, beside all else; a sidecar that is alone is not away for long."""
        long, seconds = self.stop_past_the_lease, JUST_PAST_THE_LEASE
        while len(self.fleet.members) > 1:
            await long(seconds)
            long, seconds = self.chance.choice(self.long), self.chance.choice([JUST_PAST_THE_LEASE, FAR_PAST_THE_LEASE])
            if time.monotonic() + seconds > deadline:
                return

    def somebody(self):
        """A sidecar that is well."""
        return self.chance.choice([member for member in self.fleet.members if member.is_well])

    def count(self, what):
        self.fleet.counts[what] += 1

    async def kill(self):
        self.count("kills")
        member = self.somebody()
        with member.trouble("kill"):
            member.running.kill()
            await asyncio.to_thread(member.start)

    async def kill_around_an_answer(self):
        """Between the provider's commit and the store's, or a little beside."""
        member = self.somebody()
        before = self.chance.random() < 0.2
        await self.aim(member, "SIGKILL", before, int(10 * 3000 ** self.chance.random()))
        self.count("kills around an answer")
        with member.trouble("kill"):
            member.running.kill()
            await asyncio.to_thread(member.start)

    async def stop_for_a_moment(self):
        self.count("stops")
        member = self.somebody()
        with member.trouble("stop"):
            member.signal(signal.SIGSTOP)
            # A token that is sent has at least its last 5 s left, in which its request has to arrive too.
            await asyncio.sleep(self.chance.uniform(1, 3))
            member.signal(signal.SIGCONT)

    async def stop_past_the_lease(self, seconds):
        member = self.somebody()
        await self.aim(member, "SIGSTOP", True, 0)
        self.count("stops past the lease")
        with member.trouble("stop past the lease"):
            member.signal(signal.SIGSTOP)
            await asyncio.sleep(seconds)
            member.signal(signal.SIGCONT)

    async def cut_off_past_the_lease(self, seconds):
        self.count("cut off past the lease")
        member = self.somebody()
        with member.trouble("cut off past the lease"):
            member.network.refuse()
            await asyncio.sleep(seconds)
            member.network.heal()

    async def aim(self, member, what, before, microseconds):
        """Lets the provider send the signal, around its next answer to this sidecar."""
        process, servers = member.running.process, self.fleet.servers
        wish = {"pid": process.pid, "entrance": member.entrance, "signal": what, "beforeAnswer": before, "microseconds": microseconds}
        async with self.aiming:
            await asyncio.to_thread(servers.tell, "kill", **wish)
            deadline = time.monotonic() + 8
            while time.monotonic() < deadline and not has_got_it(process):
                await asyncio.sleep(0.01)
            await asyncio.to_thread(servers.tell, "set", kill=None)

    async def cut_one(self):
        self.count("cuts")
        with self.fleet.outage():
            self.somebody().network.cut()

    async def cut_all(self):
        self.count("cuts")
        with self.fleet.outage():
            for member in self.fleet.members:
                member.network.cut()

    async def refuse_one(self):
        """It loses its store for a while, and the others do not."""
        self.count("cut off")
        member = self.somebody()
        with member.trouble("cut off"):
            member.network.refuse()
            await asyncio.sleep(self.chance.uniform(4, 8))
            member.network.heal()

    async def stall_one(self):
        self.count("stalls")
        member = self.somebody()
        with member.trouble("stall"):
            member.network.stall()
            await asyncio.sleep(self.chance.uniform(2, 6))
            member.network.heal()

    async def slow_all(self):
        self.count("slow networks")
        slowed = [member for member in self.fleet.members if member.is_well]
        for member in slowed:
            member.network.delay(0.03)
        await asyncio.sleep(2)
        for member in slowed:
            member.network.heal()

    async def restart_fast(self):
        await self.restart(immediate=False)

    async def restart_immediately(self):
        await self.restart(immediate=True)

    async def restart(self, immediate):
        self.count("restarts of the store")
        server = self.fleet.store.server
        with self.fleet.outage():
            await asyncio.to_thread(server.stop, immediate)
            await asyncio.sleep(self.chance.uniform(0, 2))
            await asyncio.to_thread(server.start)

    async def hold_the_store(self):
        self.count("times that the store was held")
        with self.fleet.store.held():
            # Together with a stop just before, in the midst of somebody's writing, less than the 5 s that the others wait.
            await asyncio.sleep(self.chance.uniform(1, 1.5))


def has_got_it(process):
    """Whether it is dead, or stopped."""
    if process.poll() is not None:
        return True
    with open(f"/proc/{process.pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"
