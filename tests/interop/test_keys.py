"""The store's keys are replaced, and the store is moved, while real sidecars use refresh tokens that are good once."""

import base64
import json
import os
import pty
import subprocess
import threading
from collections import Counter

import httpx
import pytest

from fleet import SharedDirectory, SharedServer
from world import USER, binary, wait_for

# A log of every frame would be most of what is measured here.
LOG = "info"
# Never used twice, since a token rests for its last 5 s (C16): each request renews.
SHORTEST = 3
ROTATIONS, VALUES = 100, 20
OLD, NEW = (base64.b64encode(bytes(range(start, start + 32))).decode() for start in (0, 32))


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def store(request, tmp_path):
    if request.param == "SQLite":
        return SharedDirectory(tmp_path)
    return SharedServer(request.getfixturevalue("postgres"))


def sidecar(make, store, *keys):
    agent = make(providers={"user": USER}, **store.settings())
    with_keys(agent, *keys)
    return agent


def with_keys(agent, *keys):
    config = json.loads(agent.config.read_text())
    config["store"]["keys"] = keys
    agent.config.write_text(json.dumps(config, indent=2))


def counts(agent):
    """How many values each key has sealed; that each of them opens."""
    verified = agent.command("store", "verify", "--json", "--config", agent.config)
    return [key["values"] for key in json.loads(verified.stdout)["keys"]]


def known(agent):
    """Whose grants are there, and how often they were renewed."""
    return [(one["user"], one["state"], one["generation"]) for one in agent.connections()]


def assert_no_refresh_token_was_spent_twice(servers):
    report = servers.report()
    assert (report["redeemedTwice"], report["revokedGrants"], report["token"]["errors"]) == (0, 0, {})


class Agent(threading.Thread):
    """Asks all the time, and remembers what it hears."""

    def __init__(self, running):
        super().__init__()
        self.running, self.answers, self.is_over = running, Counter(), False

    def run(self):
        with self.running.client() as client:
            while not self.is_over:
                try:
                    self.answers[client.get("https://api.test/echo").status_code] += 1
                except httpx.HTTPError as error:
                    self.answers[type(error).__name__] += 1

    def __enter__(self):
        self.start()
        wait_for(lambda: self.answers[200] > 0, "the first answer")
        return self

    def __exit__(self, *_):
        self.is_over = True
        self.join()


def test_a_rekey_beside_a_sidecar_that_renews_all_the_time_is_not_noticed(sidebearer, servers, store, figure):
    """TOK-029, C12"""
    servers.tell("set", ttl=SHORTEST)
    agent, desk = sidecar(sidebearer, store, NEW, OLD), sidecar(sidebearer, store, NEW, OLD)
    agent.connect("user")
    running = agent.run()
    rekeyed = 0
    with Agent(running) as busy:
        while rekeyed < VALUES or servers.granted("refresh_token") < ROTATIONS:
            # Back and forth, so that there is always something to do.
            for keys in ((OLD, NEW), (NEW, OLD)):
                with_keys(desk, *keys)
                done = desk.command("store", "rekey", "--json", "--config", desk.config, check=False)
                rekeyed += json.loads(done.stdout)["resealed"]
                assert json.loads(done.stdout)["left"] == []
    rotations = servers.granted("refresh_token")
    figure(f"{rekeyed} values sealed anew over {rotations} rotations: {dict(busy.answers)}")
    assert set(busy.answers) == {200}
    assert running.terminate() == 0
    assert_no_refresh_token_was_spent_twice(servers)
    desk.command("store", "rekey", "--config", desk.config)
    assert counts(desk)[1] == 0
    with_keys(agent, NEW)
    assert agent.run().get().status_code == 200
    assert_no_refresh_token_was_spent_twice(servers)


def test_a_key_is_replaced_in_the_order_of_the_readme_while_two_sidecars_serve(sidebearer, servers, store):
    servers.tell("set", ttl=SHORTEST)
    agents = [sidecar(sidebearer, store, OLD) for _ in range(2)]
    agents[0].connect("user")
    running = [agent.run() for agent in agents]

    def roll_out(*keys):
        for number, agent in enumerate(agents):
            # The other one serves.
            assert running[1 - number].get().status_code == 200
            assert running[number].terminate() == 0
            with_keys(agent, *keys)
            running[number] = agent.run()
            assert [one.get().status_code for one in running] == [200, 200]

    roll_out(OLD, NEW)
    roll_out(NEW, OLD)
    agents[0].command("store", "rekey", "--config", agents[0].config)
    assert [one.get().status_code for one in running] == [200, 200]
    assert counts(agents[0])[1] == 0
    roll_out(NEW)
    with_keys(agents[0], OLD)
    refused = agents[0].command("store", "verify", "--config", agents[0].config, check=False)
    assert refused.returncode == 1 and "is sealed with key" in refused.stderr
    assert_no_refresh_token_was_spent_twice(servers)


def test_a_store_moves_to_a_database_server_and_back_and_spends_no_refresh_token_twice(sidebearer, servers, postgres, tmp_path):
    servers.tell("set", ttl=SHORTEST)
    stores = [SharedDirectory(tmp_path / "first"), SharedServer(postgres), SharedDirectory(tmp_path / "last")]
    homes = [sidecar(sidebearer, store, OLD) for store in stores]
    for user in ("user", "alice"):
        homes[0].connect("user", None if user == "user" else user)
    running = homes[0].run()
    assert running.get().status_code == 200
    for before, after in zip(homes, homes[1:]):
        assert running.terminate() == 0
        exported = before.command("store", "export", "-", "--config", before.config)
        assert "the sidecars of the old store must have stopped" in exported.stderr
        for grants in (2, 0):
            arguments = ("store", "import", "-", "--config", after.config)
            imported = after.command(*arguments, input=exported.stdout)
            assert imported.stdout.startswith(f"imported {grants} grants, "), imported.stdout
        assert known(after) == known(before) and len(known(after)) == 2
        running = after.run()
        assert running.get().status_code == 200
        refused = after.command("store", "import", "-", "--config", after.config, input=exported.stdout, check=False)
        assert refused.returncode == 1
        assert "the grant of user `default` at `user` is there already, and is another one" in refused.stderr
    assert_no_refresh_token_was_spent_twice(servers)
    assert counts(homes[-1])[0] > 5


def test_an_export_goes_to_no_terminal_unless_that_is_asked_for(sidebearer, servers):
    agent = sidebearer(providers={"user": USER})
    agent.connect("user")
    ours, terminal = pty.openpty()
    command = [binary(), "store", "export", "--config", str(agent.config)]
    options = {"env": agent.environment, "stdout": terminal, "stderr": subprocess.PIPE, "text": True, "timeout": 60}
    refused = subprocess.run(command, **options)
    said = "error: an export is not for a terminal\nhint: name a file, or `-` to see it all the same\n"
    assert refused.returncode == 1 and refused.stderr.endswith(said)
    assert subprocess.run([*command, "-"], **options).returncode == 0
    os.close(terminal)
    assert os.read(ours, 1 << 16).startswith(b'{"format":"sidebearer store"')
    os.close(ours)


def test_a_program_delivers_the_key(sidebearer, servers, tmp_path):
    script = tmp_path / "keys.sh"
    script.write_text('[ "$1" = -field=key ] && [ "$VAULT_SECRET" ] && echo "$KEY"\n')
    agent = sidebearer(providers={"user": USER})
    config = json.loads(agent.config.read_text())
    config["store"] = {"path": config["store"]["path"], "key_command": ["sh", str(script), "-field=key"]}
    agent.config.write_text(json.dumps(config))
    agent.environment["KEY"] = OLD
    agent.connect("user")
    assert agent.run().get().status_code == 200
    refused = agent.command("status", "--config", agent.config, check=False, VAULT_SECRET="")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: `store.key_command`: `sh` failed, exit status: 1\n")
