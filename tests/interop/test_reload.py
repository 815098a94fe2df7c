"""`run` reads its configuration again while agents call: as a ConfigMap is updated, and as an operator asks for it."""

import json
import os
import signal
import threading

import pytest

from world import API, SERVICE, wait_for

# At trace, its log would be most of what is measured here.
LOG = "info"

RELOADS = 50
# So many of them are left to be found, which takes two looks.
FOUND = 1


class Mounted:
    """A folder as the kubelet mounts a ConfigMap: each file is a link into `..data`, a link that is swapped."""

    def __init__(self, agent):
        self.folder = agent.folder / "mounted"
        self.folder.mkdir()
        self.count = 0
        self.write(agent.config.read_text())
        agent.config.unlink()
        agent.config.symlink_to(self.folder / "..data/proxy.yaml")

    def write(self, text):
        self.count += 1
        version = self.folder / f"..{self.count}"
        version.mkdir()
        (version / "proxy.yaml").write_text(text)
        (version / "proxy.yaml").chmod(0o600)
        (self.folder / "..next").symlink_to(version.name)
        os.replace(self.folder / "..next", self.folder / "..data")


class Told:
    """What the log says of reloads, read on from where it was read last."""

    def __init__(self, running):
        self.log = running.log.open()
        self.rest = ""
        self.said = []

    def count(self):
        whole, _, self.rest = (self.rest + self.log.read()).rpartition("\n")
        lines = [json.loads(line) for line in whole.splitlines() if '"configuration ' in line]
        self.said += [line["message"] for line in lines]
        return len(self.said)


class Agents:
    """Call until they are told to stop, each in its own way, and keep what was not answered with 200."""

    def __init__(self, running):
        self.running, self.over = running, threading.Event()
        self.answered, self.failed = [0, 0, 0], []
        calls = [lambda: self.kept(0), lambda: self.kept(1, http2=True), lambda: self.anew(2)]
        self.threads = [threading.Thread(target=call) for call in calls]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def kept(self, which, **options):
        with self.running.client(**options) as client:
            while not self.over.is_set():
                self.call(client, which)

    def anew(self, which):
        while not self.over.is_set():
            with self.running.client() as client:
                self.call(client, which)

    def call(self, client, which):
        try:
            status = client.post(f"{API}/echo", content=b"a body").status_code
            self.answered[which] += 1
            if status != 200:
                self.failed.append(status)
        except Exception as error:
            self.failed.append(repr(error))


def test_no_request_fails_over_fifty_reloads_and_no_token_is_asked_for_anew(sidebearer, servers, figure):
    """TOK-045"""
    agent = sidebearer()
    good = json.loads(agent.config.read_text())
    another = good | {"drain": "19s", "routes": [*good["routes"], {"host": "more.test", "deny": True}]}
    bad = good | {"drian": "19s"}
    mounted = Mounted(agent)
    running = agent.run()
    told = Told(running)
    versions = [another, bad, good, bad]
    with Agents(running) as agents:
        wait_for(lambda: all(agents.answered), "each agent's first answer")
        for number in range(RELOADS):
            before = list(agents.answered)
            mounted.write(json.dumps(versions[number % 4] | {"replay_limit": f"{number + 1}KiB"}))
            if number >= FOUND:
                running.process.send_signal(signal.SIGHUP)
            wait_for(lambda: told.count() > number, f"reload {number}")
            wait_for(lambda: all(map(int.__gt__, agents.answered, before)), "answers after it")
    figure(f"{sum(agents.answered)} requests, {len(agents.failed)} failed")
    assert agents.failed == []
    refused = "configuration refused, the one before stays in effect"
    assert told.said == ["configuration reloaded", refused] * (RELOADS // 2)
    assert servers.granted("client_credentials") == 1


@pytest.mark.parametrize("signalled", [True, False], ids=["at SIGHUP", "when the file changes"])
def test_a_client_whose_secret_is_corrected_works_with_the_next_request(sidebearer, tmp_path, signalled):
    """TOK-018"""
    # Beside what the sidecar writes, which is searched for secrets.
    secret = tmp_path / "secret"
    agent = sidebearer(providers={"service": SERVICE | {"client_secret": f"${{file:{secret}}}"}})
    secret.write_text("mistyped\n")
    secret.chmod(0o600)
    running = agent.run()
    for _ in range(3):
        assert running.get().json()["code"] == "fix_configuration"
    secret.write_text(agent.environment["BASIC_SECRET"] + "\n")
    if signalled:
        running.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "configuration reloaded" in running.log.read_text(), "the reload")
    assert running.get().status_code == 200
