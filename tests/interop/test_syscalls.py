"""Every system call by which a rotation writes: the sidecar is killed at it, and it fails (SEMANTICS C12, C13, C14).

strace comes to the running sidecar between two steps of a rotation, so that what it counts is of one step, whose writes are
all of one thread: its counts are per thread.
"""

import os
import re
import signal
import sqlite3
import subprocess
from contextlib import closing, contextmanager
from typing import NamedTuple

import httpx
import pytest

from world import USER, binary, wait_for

# A log of every frame would be most of what is waited for here.
LOG = "info"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may trace a process that shows itself to nobody")

# Those that are not on every machine have a question mark.
WRITING = "pwrite64,fsync,fdatasync,ftruncate,?rename,?renameat,?renameat2,?link,?linkat,?unlink,?unlinkat"
KILL = "kill"
ERRORS = ("ENOSPC", "EIO", "EROFS")
OLD, NEW, LOST = "the old one works", "the new one works", "reauthorize, lost_rotation"
UNSTORED = "a rotated refresh token could not be stored; it is held in memory and tried again"
STORED = "the rotated refresh token is stored now"
LIFETIME, AGE = 3600, 3400


class Call(NamedTuple):
    """A system call of one step, and which one of its name it is there."""

    name: str
    number: int
    file: str

    def __str__(self):
        return f"{self.name} {self.number} of {self.file}"

    def struck(self, fault, on=""):
        """What has strace kill at it, or let it fail; `on` goes behind its number."""
        how = "signal=KILL" if fault == KILL else f"error={fault}"
        return f"inject={self.name}:{how}:when={self.number}{on}"


class Trace:
    """strace on a live sidecar, which is let alone again at the end of the `with`."""

    def __init__(self, running, log, *expressions, traced=WRITING):
        self.log = log
        expressions = [word for expression in (f"trace={traced}", *expressions) for word in ("-e", expression)]
        # Without `-s 0`, what is written to the disk would stand here too.
        self.process = subprocess.Popen(
            ["strace", "-f", "-yy", "-ttt", "-s", "0", "-o", log, "-p", str(running.process.pid), *expressions],
            stderr=subprocess.PIPE, text=True,
        )
        said = self.process.stderr.readline()
        assert "attached" in said, said

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=10)
        self.process.stderr.close()

    def calls(self):
        """The calls on the store, in order."""
        seen, calls = {}, []
        for line in self.log.read_text().splitlines():
            call = re.match(r"\d+ +[\d.]+ (\w+)\((.*)", line)
            if not call:
                continue
            path = re.findall(r'[<"](/[^>"]*)', call[2])[-1]
            assert "/store" in path, line
            seen[call[1]] = seen.get(call[1], 0) + 1
            calls.append(Call(call[1], seen[call[1]], os.path.basename(path)))
        return calls

    def order(self, ports):
        return list(order_of(self.log, ports))

    def failures(self):
        return self.log.read_text().count("(INJECTED)")


def order_of(log, ports):
    """What was done in which order: what goes to a port when it sets out, all else when it is done."""
    begun = {}
    for line in log.read_text().splitlines():
        thread, _, rest = line.split(maxsplit=2)
        if rest.startswith("<..."):
            yield from begun.pop(thread, ())
        elif call := re.match(r"(\w+)\((.*)", rest):
            if to := re.search(r"->127\.0\.0\.1:(\d+)\]", call[2]):
                if port := ports.get(int(to[1])):
                    yield f"to the {port}"
            elif found := re.findall(r'[<"](/[^>"]*)', call[2]):
                done = [f"{call[1]} of {os.path.basename(found[-1])}"]
                if rest.endswith("<unfinished ...>"):
                    begun[thread] = done
                else:
                    yield from done


class Rotation:
    """One rotation of a connection that is not lost from one to the next, step by step."""

    def __init__(self, agent, servers, folder):
        self.agent, self.servers, self.folder = agent, servers, folder
        self.running = None
        self.old = None
        self.traces = 0

    def connect(self):
        self.agent.connect("user")
        running = self.agent.run()
        assert running.get().status_code == 200
        assert running.terminate() == 0

    def prepare(self):
        """The next request is answered with the token at hand, and has it renewed."""
        # Its times are not sealed.
        with closing(sqlite3.connect(self.store())) as database, database:
            aged = "UPDATE grants SET obtained_at = obtained_at - :age, expires_at = expires_at - :age"
            assert database.execute(aged, {"age": AGE * 1000}).rowcount == 1
        self.servers.tell("reset")
        self.servers.tell("keep-answers")
        self.running = self.agent.run()

    def store(self):
        return self.agent.folder / "store/sidebearer.db"

    def intend(self):
        self.old = self.token()
        self.wait_for(lambda: self.servers.report()["kept"] or self.said("no new token"), "the token call")

    def keep(self):
        self.servers.tell("let-go")
        self.wait_for(lambda: self.said("token obtained"), "the answer to be taken")

    def stop(self):
        self.running.process.send_signal(signal.SIGTERM)
        self.wait_for(lambda: False, "the end")

    def wait_for(self, condition, what):
        """For the condition, or for the sidecar's end."""
        wait_for(lambda: self.running.process.poll() is not None or condition(), what)

    def said(self, message):
        return [event for event in self.running.events() if event["message"] == message]

    def token(self):
        """Which token the API sees, if it sees a good one."""
        try:
            answer = self.running.get()
        except (httpx.HTTPError, OSError):
            return None
        return answer.json()["token"] if answer.status_code == 200 else None

    def redeemed(self):
        return self.servers.report()["token"]["calls"].get("refresh_token", 0)

    @contextmanager
    def at(self, step, *expressions):
        """Comes to a step, and takes it under strace."""
        self.prepare()
        for each in (self.intend, self.keep, self.stop):
            if each == step:
                break
            each()
        self.traces += 1
        with Trace(self.running, self.folder / f"trace-{self.traces}", *expressions) as trace:
            step()
            yield trace

    def calls_of(self, step):
        with self.at(step) as trace:
            pass
        self.servers.tell("let-go")
        self.stop()
        self.outcome()
        assert trace.calls(), "nothing is written"
        return trace.calls()

    def outcome(self):
        """What a new start finds: the store is whole, and one of the two refresh tokens is good, or its loss is told."""
        self.running.kill()
        renewed = bool(self.servers.granted("refresh_token"))
        self.agent.command("store", "verify", "--config", self.agent.config)
        self.running = self.agent.run()
        # Or the stored access token would do.
        self.servers.tell("let-go")
        self.servers.tell("revoke")
        if self.token():
            outcome = NEW if renewed else OLD
        else:
            connection = self.agent.connection("user")
            assert (connection["state"], connection["reason"]) == ("reauthorize", "lost_rotation")
            assert renewed, "told as lost, and never redeemed"
            outcome = LOST
            self.agent.connect("user")
            wait_for(self.token, "the new connection to be used")
        assert self.servers.report()["redeemedTwice"] == 0
        assert self.running.terminate() == 0
        return outcome


@pytest.fixture
def rotation(sidebearer, servers, tmp_path):
    rotation = Rotation(sidebearer(providers={"user": USER}), servers, tmp_path)
    rotation.connect()
    return rotation


def test_whatever_befalls_the_intent_the_old_refresh_token_is_good(rotation, figure):
    """TOK-020, TOK-021"""
    outcomes = {}
    for call in rotation.calls_of(rotation.intend):
        outcomes[call, KILL] = killed(rotation, rotation.intend, call)
        assert outcomes[call, KILL] == OLD
        for fault in ERRORS:
            with rotation.at(rotation.intend, call.struck(fault)) as trace:
                assert trace.failures() == 1
                redeemed = rotation.redeemed()
                assert rotation.token() == rotation.old
            if call.file == "store":
                # SQLite has its new log's name synced, and does not mind when that fails: not every file system can.
                assert redeemed == 1
                rotation.keep()
                outcomes[call, fault] = f"not minded by SQLite, {rotation.outcome()}"
                assert outcomes[call, fault].endswith(NEW)
                continue
            assert redeemed == 0
            [said] = rotation.said("no new token")
            assert said["serving_old"]
            outcomes[call, fault] = f"not redeemed, the old access token serves, {rotation.outcome()}"
            assert outcomes[call, fault].endswith(OLD)
    figure(table(outcomes))


def test_whatever_befalls_the_new_row_nothing_is_lost_in_silence(rotation, figure):
    """TOK-020, TOK-022"""
    outcomes = {}
    for call in rotation.calls_of(rotation.keep):
        outcomes[call, KILL] = killed(rotation, rotation.keep, call)
        # What was written and not synced is lost with the machine, not with the process.
        assert outcomes[call, KILL] in ((NEW,) if call.name == "fsync" else (LOST,))
        for fault in ERRORS:
            with rotation.at(rotation.keep, call.struck(fault)) as trace:
                rotation.wait_for(lambda: rotation.said(STORED), "the new row to be stored after all")
                # Once on each thread that has tried.
                assert trace.failures()
                assert rotation.token() not in (None, rotation.old)
            assert rotation.redeemed() == 1
            outcomes[call, fault] = f"served from memory, stored at the next try, {rotation.outcome()}"
            assert outcomes[call, fault].endswith(NEW)
    figure(table(outcomes))


@pytest.mark.parametrize(("name", "fault"), [("pwrite64", "ENOSPC"), ("fsync", "EIO")])
def test_a_new_row_that_cannot_be_stored_for_long_is_served_and_a_stop_waits_for_it(rotation, servers, name, fault):
    """TOK-022, TOK-044"""
    with rotation.at(rotation.keep, Call(name, 1, "").struck(fault, on="+")) as trace:
        assert rotation.said(UNSTORED)
        assert [rotation.token() == rotation.old for _ in range(5)] == [False] * 5
        # A 401 has neither of the two refresh tokens sent: the old one is spent, and the new one in no store yet.
        servers.tell("revoke")
        assert [rotation.running.get().status_code for _ in range(3)] == [401] * 3
        assert rotation.redeemed() == 1
        rotation.running.process.send_signal(signal.SIGTERM)
        wait_for(lambda: rotation.said("stopping; a second signal stops at once"), "the stop to begin")
        failures = trace.failures()
        wait_for(lambda: trace.failures() > failures, "another try")
        assert rotation.running.process.poll() is None and not rotation.said(STORED)
    assert rotation.running.process.wait(timeout=20) == 0
    assert rotation.said(STORED)
    assert rotation.outcome() == NEW


def test_whatever_befalls_the_store_s_last_writes_the_new_refresh_token_is_good(rotation, figure):
    """TOK-020: a stop copies the log into the database."""
    outcomes = {}
    for call in rotation.calls_of(rotation.stop):
        outcomes[call, KILL] = killed(rotation, rotation.stop, call)
        for fault in ERRORS:
            with rotation.at(rotation.stop, call.struck(fault)) as trace:
                assert trace.failures() == 1
                assert rotation.running.process.returncode == 0
            outcomes[call, fault] = rotation.outcome()
    figure(table(outcomes))
    assert set(outcomes.values()) == {NEW}


def test_a_full_disk_costs_no_connection(small_disk, sidebearer, servers, tmp_path):
    """TOK-021, TOK-022"""
    rotation = Rotation(sidebearer(providers={"user": USER}), servers, tmp_path)
    rotation.connect()
    rotation.prepare()
    full = filled(small_disk)
    rotation.intend()
    assert "no room is left to write the store" in rotation.said("no new token")[0]["error"]
    assert rotation.token() == rotation.old and rotation.redeemed() == 0
    full.unlink()
    wait_for(lambda: rotation.token() and servers.report()["kept"], "the renewal, by itself")
    filled(small_disk)
    rotation.keep()
    assert rotation.said(UNSTORED) and rotation.token() not in (None, rotation.old)
    full.unlink()
    wait_for(lambda: rotation.said(STORED), "the new row to be stored, by itself")
    assert rotation.redeemed() == 1
    assert rotation.outcome() == NEW


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB, where the test's first sidecar has its store."""
    disk = tmp_path / "sidebearer-0/store"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "none", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def filled(disk):
    """What takes the last byte of a disk."""
    full = disk / "full"
    with full.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    return full


def test_the_new_row_is_on_the_disk_before_the_api_sees_its_token(sidebearer, servers, tmp_path):
    """TOK-023: however long the disk takes."""
    agent = sidebearer(providers={"user": USER})
    agent.connect("user")
    running = agent.run()
    ports = {servers.ports["auth"]: "provider", servers.ports["api"]: "API"}
    sending = f"{WRITING},write,writev,sendto,sendmsg"
    with Trace(running, tmp_path / "trace", "inject=fsync,fdatasync:delay_exit=100000", traced=sending) as trace:
        assert running.get().status_code == 200
    order = trace.order(ports)
    served = order.index("to the API")
    asked = max(at for at, what in enumerate(order[:served]) if what == "to the provider")
    intended, stored = order[:asked], order[asked:served]
    # A sync may be of the log's name, too, where the log is new.
    for written in (intended, stored):
        log = [what for what in written if what.endswith("sidebearer.db-wal")]
        assert log[-3:] == ["pwrite64 of sidebearer.db-wal"] * 2 + ["fsync of sidebearer.db-wal"], order


def test_a_new_store_is_on_the_disk_before_it_has_its_name_and_its_name_before_anything_is_kept_in_it(sidebearer, servers, tmp_path):
    """TOK-023"""
    agent = sidebearer(providers={"user": USER})
    log = tmp_path / "trace"
    command = ["strace", "-f", "-yy", "-ttt", "-s", "0", "-o", log, "-e", f"trace={WRITING}", binary()]
    command += ["import", "user", "--config", agent.config, "--refresh-token-file", "-"]
    environment = agent.environment
    subprocess.run(command, input=servers.refresh_token(), env=environment, cwd=agent.folder, text=True, check=True)
    order = [re.sub(r"\.new-\w+", ".new", what) for what in order_of(log, {})]
    # `store` is the directory.
    named = next(at for at, what in enumerate(order) if re.fullmatch(r"(rename|link)\w* of sidebearer.db", what))
    before, after = order[:named], order[named + 1:]
    last_write = max(at for at, what in enumerate(before) if re.match("pwrite64 of .new", what))
    assert "fsync of .new" in before[last_write:], order
    first_write = next(at for at, what in enumerate(after) if what.startswith("pwrite64"))
    assert "fsync of store" in after[:first_write], order


def killed(rotation, step, call):
    with rotation.at(step, call.struck(KILL)):
        assert rotation.running.process.poll() == -signal.SIGKILL, call
    return rotation.outcome()


def table(outcomes):
    """A line for each call; faults with one outcome stand together."""
    lines = {}
    for (call, fault), outcome in outcomes.items():
        lines.setdefault(call, {}).setdefault(outcome, []).append(fault)
    return "\n".join(
        [""] + [f"  {str(call):31} " + "; ".join(f"{', '.join(faults)}: {outcome}" for outcome, faults in line.items()) for call, line in lines.items()]
    )
