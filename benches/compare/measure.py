"""What is measured of a contender in a round, and where it is kept."""

import subprocess
import time
from collections import defaultdict
from statistics import median

from world import Failed

CONNECTIONS = 16
RATE = 200


class Samples:
    """Values of each contender by what they are of, a value for each round; and what went wrong."""

    def __init__(self):
        self.values = defaultdict(list)
        self.problems = defaultdict(dict)

    def add(self, contender, what, value):
        self.values[contender, what].append(value)

    def median(self, contender, what):
        values = self.values.get((contender, what))
        return median(values) if values else None

    def attempt(self, contender, what, measure):
        """A failure is kept for the table; what else there is to measure goes on."""
        try:
            measure()
        except (Failed, OSError, subprocess.SubprocessError) as error:
            self.problems[contender].setdefault(what, str(error))


class Effort:
    """How long and how much."""

    def __init__(self, quick, seconds):
        self.seconds = seconds or (1 if quick else 3)
        self.latency_seconds = 2 if quick else 5
        self.connections = 50 if quick else 400
        # No more than there are hosts that can be resolved.
        self.distinct = 50 if quick else 200
        self.bodies = 2 if quick else 8
        self.idle = 200 if quick else 2000
        self.starts = 1 if quick else 3


class Round:
    """One contender's share of a round."""

    def __init__(self, samples, effort, contender, direct):
        self.samples, self.effort, self.contender, self.direct = samples, effort, contender, direct

    def add(self, what, value):
        self.samples.add(self.contender.name, what, value)

    def run(self):
        self.contender.configure()
        self.attempt("start", self.start)
        with self.contender:
            self.contender.wait_until_it_answers()
            time.sleep(0.5)
            self.add("rss.idle", self.resident())
            for shape in self.contender.shapes:
                self.attempt(f"requests, {shape}", lambda: self.requests(shape))
            for shape in [shape for shape in ("h1", "h2") if shape in self.contender.shapes]:
                self.attempt(f"latency, {shape}", lambda: self.latency(shape))
            self.attempt("new connections, same host", lambda: self.connections("same", self.effort.connections))
            if self.contender.shapes["h1"] == "h1":
                distinct = lambda: self.connections("distinct", self.effort.distinct, distinct_from=0)
                self.attempt("new connections, distinct hosts", distinct)
            for shape in [shape for shape in ("h1", "h2", "tunnel") if shape in self.contender.shapes]:
                self.attempt(f"bulk, {shape}", lambda: self.bulk(shape))
        # In a new process: one that has had memory before asks for less now.
        self.contender.configure()
        with self.contender:
            self.contender.wait_until_it_answers()
            self.attempt("idle connections", self.idle)

    def attempt(self, what, measure):
        self.samples.attempt(self.contender.name, what, measure)

    def start(self):
        for _ in range(self.effort.starts):
            result = self.contender.start_anew()
            self.add("start.ready", result["ready_us"] / 1000)
            self.add("start.first", result["first_200_us"] / 1000)

    def resident(self):
        return self.contender.generate("idle", "h1", connections=0, hold=0)["rss_kib"] / 1024

    def requests(self, shape):
        result = self.contender.generate("run", shape, connections=CONNECTIONS, seconds=self.effort.seconds)
        self.add(f"cpu.{shape}", result["cpu_ms_per_1000"])
        self.add(f"rate.{shape}", result["requests_per_second"])
        self.add(f"busy.{shape}", result["cpu_busy"])
        if shape == "h1":
            self.add("rss.load", result["rss_kib"] / 1024)

    def latency(self, shape):
        seconds = self.effort.latency_seconds
        result = self.contender.generate("run", shape, connections=CONNECTIONS, seconds=seconds, rate=RATE)
        for name in ("p50", "p99"):
            self.add(f"added_{name}.{shape}", result[f"{name}_us"] - self.direct[shape][f"{name}_us"])

    def connections(self, which, count, **options):
        result = self.contender.generate("handshakes", "h1", requests=count, **options)
        self.add(f"new_p50.{which}", result["p50_us"])
        self.add(f"new_cpu.{which}", result["cpu_ms_per_1000"] / 1000)

    def bulk(self, shape):
        result = self.contender.generate("bulk", shape, bodies=self.effort.bodies)
        self.add(f"bulk_cpu.{shape}", result["cpu_s_per_gib"])
        self.add(f"bulk_rate.{shape}", result["mib_per_second"])

    def idle(self):
        self.contender.generate("run", "h1", connections=CONNECTIONS, requests=2000)
        result = self.contender.generate("idle", "h1", connections=self.effort.idle)
        self.add("rss.connections", result["rss_kib"] / 1024)
        self.add("rss.connection", result["kib_per_connection"])


def direct(world, samples, effort):
    """The same without a proxy: what the others are compared with in this round."""
    latencies = {}
    address = world.direct_address("direct")
    for shape, its in {"plain": "direct-plain", "h1": "direct"}.items():
        result = world.generate("run", its, world.direct_address(its), connections=CONNECTIONS, seconds=effort.seconds)
        samples.add("direct", f"rate.{shape}", result["requests_per_second"])
    slow = world.generate("run", "direct", address, connections=CONNECTIONS, seconds=effort.latency_seconds, rate=RATE)
    # Intercepted h2 is compared with direct's h1 too: it is what the upstream speaks, whoever asks.
    for shape in ("h1", "h2"):
        latencies[shape] = slow
    for name in ("p50", "p99"):
        samples.add("direct", f"added_{name}.h1", slow[f"{name}_us"])
    for which, first in {"same": None, "distinct": 0}.items():
        result = world.generate("handshakes", "direct", address, requests=effort.distinct, distinct_from=first)
        samples.add("direct", f"new_p50.{which}", result["p50_us"])
    result = world.generate("bulk", "direct", address, bodies=effort.bodies)
    samples.add("direct", "bulk_rate.h1", result["mib_per_second"])
    return latencies
