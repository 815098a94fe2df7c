"""`connect` and `disconnect`: a connection made on the command line, with a browser, without one, and by a device's code."""

import json
import os
import re
import socket
import time
from itertools import pairwise
from urllib.parse import parse_qs, urlsplit

import pytest

from world import CONSENT, free_port, wait_for


class Desk:
    """A place to run `connect` at, with an `xdg-open` that only remembers what it was to open."""

    def __init__(self, agent, folder):
        self.agent = agent
        self.opened = folder / "opened"
        opener = folder / "bin/xdg-open"
        opener.parent.mkdir(parents=True)
        opener.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{self.opened}.part" && mv "{self.opened}.part" "{self.opened}"\n')
        opener.chmod(0o755)
        agent.environment["PATH"] = f"{opener.parent}:{os.environ['PATH']}"

    def connect(self, *options):
        return self.agent.start("connect", "main", *options, "--config", self.agent.config)

    def url(self):
        """What the browser was opened with."""
        wait_for(self.opened.exists, "the browser to be opened")
        [url] = self.opened.read_text().splitlines()
        return url

    def state(self):
        return self.agent.connection("main")["state"]


@pytest.fixture
def desk(sidebearer, tmp_path):
    def sit_down(settings={}, **provider):
        return Desk(sidebearer(providers={"main": CONSENT | provider}, **settings), tmp_path / "desk")

    return sit_down


CONNECTED = "connected `main` for `default`: {}; the token is good for 60 min\n"


def assert_connected(desk, connecting):
    code, out, err = connecting.ends()
    assert code == 0, err
    assert out in {CONNECTED.format("read offline_access"), CONNECTED.format("offline_access read")}
    assert desk.state() == "connected"


def assert_failed(desk, connecting, *words):
    code, out, err = connecting.ends()
    assert (code, out) == (1, "")
    assert re.search(r"^error: .+", err, re.MULTILINE) and re.search(r"^ *hint: .+", err, re.MULTILINE), err
    assert all(word in err for word in words), err
    assert desk.state() == "not_connected"


def test_connect_opens_the_browser_and_ends_when_its_user_has_consented(desk, servers, person):
    """OAU-008, OAU-010"""
    here, alice = desk(), person()
    connecting = here.connect()
    url = here.url()
    assert connecting.says("open") == url
    back = urlsplit(parse_qs(urlsplit(url).query)["redirect_uri"][0])
    assert (back.hostname, back.path) == ("127.0.0.1", "/callback")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", back.port), timeout=1)
    alice.open(url)
    alice.consent()
    alice.sees("Main is connected")
    alice.picture("connected-by-the-command-line")
    assert_connected(here, connecting)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((back.hostname, back.port), timeout=1)
    assert json.loads(here.agent.exec("curl", "-fsS", "https://api.test/echo").stdout)["sub"] == "alice"
    assert servers.report()["token"]["calls"] == {"authorization_code": 1}


def test_without_a_browser_the_address_that_one_ends_at_elsewhere_can_be_pasted(desk, servers, person):
    servers.tell("set", pause=True)
    here, alice = desk(), person()
    connecting = here.connect("--no-browser")
    alice.open(connecting.says("open"))
    alice.consent()
    connecting.type("not what was asked for")
    connecting.type(alice.way_back())
    assert_connected(here, connecting)
    assert not here.opened.exists()


def test_without_a_terminal_to_paste_in_the_browser_alone_is_enough(desk, person):
    here, alice = desk(), person()
    connecting = here.connect("--no-browser")
    connecting.process.stdin.close()
    alice.open(connecting.says("open"))
    alice.consent()
    alice.sees("Main is connected")
    assert_connected(here, connecting)


def test_a_machine_whose_browser_does_not_open_says_where_to_go(desk, person):
    here, alice = desk(), person()
    (here.opened.parent / "bin/xdg-open").write_text("#!/bin/sh\nexit 3\n")
    connecting = here.connect()
    alice.open(connecting.says("open"))
    alice.consent()
    alice.sees("Main is connected")
    assert_connected(here, connecting)


def test_a_refusal_ends_connect_and_says_what_to_do(desk, servers, person):
    """OAU-003: what the provider says cannot steer the terminal."""
    servers.tell("set", refusal="no\u001b[31m\r\nerror: `rm -rf ~` to mend it")
    here, alice = desk(), person()
    connecting = here.connect()
    alice.open(here.url())
    alice.refuse()
    alice.sees("Main is not connected")
    alice.sees_code("access_denied")
    assert_failed(here, connecting, "access_denied")
    err = connecting.err.read_text()
    assert "\u001b" not in err and "\nerror: `rm" not in err
    assert servers.report()["token"]["calls"] == {}


def test_connect_refuses_an_answer_in_another_issuers_name(desk, servers, person):
    """OAU-004"""
    servers.tell("set", iss="https://evil.test")
    here, alice = desk(), person()
    connecting = here.connect()
    alice.open(here.url())
    alice.consent()
    alice.sees("Main is not connected")
    assert_failed(here, connecting, "another server answered than the one that was asked")
    assert servers.report()["token"]["calls"] == {}


def test_a_page_that_guesses_the_port_of_connect_changes_nothing(desk, servers, person):
    """OAU-001: whoever else finds the listener has no state."""
    here, alice = desk(), person()
    connecting = here.connect()
    url = here.url()
    listener = parse_qs(urlsplit(url).query)["redirect_uri"][0]
    for guess in ("", "?code=made-up&state=made-up", "?error=access_denied&state=made-up", "?error=access_denied"):
        assert person().open(listener + guess).status == 400
    assert connecting.process.poll() is None
    alice.open(url)
    alice.consent()
    alice.sees("Main is connected")
    assert_connected(here, connecting)
    assert servers.report()["token"]["calls"] == {"authorization_code": 1}


def test_a_provider_that_allows_one_redirect_uri_gets_exactly_that(desk, person):
    """OAU-008"""
    exact = f"http://127.0.0.1:{free_port()}/callback"
    here, alice = desk(authorization_code={"scopes": ["read"], "redirect_uri": exact}), person()
    connecting = here.connect()
    assert parse_qs(urlsplit(here.url()).query)["redirect_uri"] == [exact]
    alice.open(here.url())
    alice.consent()
    alice.sees("Main is connected")
    assert_connected(here, connecting)


def test_a_redirect_uri_whose_port_is_taken_is_reported(desk):
    """OAU-010"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        here = desk(authorization_code={"scopes": ["read"], "redirect_uri": f"http://127.0.0.1:{port}/callback"})
        assert_failed(here, here.connect(), str(port))


def test_connect_asks_for_further_scopes_and_for_another_user(desk, person):
    here, alice = desk(), person()
    connecting = here.connect("--user", "alice", "--scope", "write", "--scope", "delete")
    assert set(parse_qs(urlsplit(here.url()).query)["scope"][0].split()) == {"read", "write", "delete", "offline_access"}
    alice.open(here.url())
    alice.consent()
    alice.sees("Main is connected")
    code, out, _ = connecting.ends()
    assert (code, out.startswith("connected `main` for `alice`: ")) == (0, True)


def test_a_running_sidecar_uses_what_the_command_line_connected_and_disconnected(desk, servers, person):
    """TOK-029"""
    here, alice = desk(), person()
    running = here.agent.run()
    assert running.get().status_code == 403
    assert here.state() == "not_connected"
    connecting = here.connect()
    alice.open(here.url())
    alice.consent()
    assert_connected(here, connecting)
    wait_for(lambda: running.get().status_code == 200, "the new connection to be used")
    done = here.agent.command("disconnect", "main", "--config", here.agent.config)
    assert done.stdout == "disconnected `main` for `default`, and revoked at the provider\n"
    assert servers.report()["revokedGrants"] == 1
    wait_for(lambda: running.get().status_code == 403, "the connection to be gone")
    assert here.state() == "not_connected"
    alice.sees_state(running, "not_connected")


def test_disconnecting_what_is_not_connected_says_so(desk):
    here = desk()
    done = here.agent.command("disconnect", "main", "--config", here.agent.config, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "not connected" in done.stderr


# RFC 8628.


def at_the_device_page(connecting, somebody):
    somebody.open(connecting.says("open"))
    somebody.enter_code(connecting.says("code"))


def test_a_device_connects_by_a_code_that_its_user_enters_elsewhere(desk, servers, person):
    """TOK-048"""
    here, alice = desk(), person()
    connecting = here.connect("--device", "--no-browser")
    assert re.fullmatch(r"[A-Z]{4}-[A-Z]{4}", connecting.says("code"))
    assert connecting.says("open") == "https://auth.test/device"
    at_the_device_page(connecting, alice)
    alice.press("It does")
    alice.consent()
    alice.sees("Your device is connected")
    assert_connected(here, connecting)
    assert json.loads(here.agent.exec("curl", "-fsS", "https://api.test/echo").stdout)["sub"] == "alice"


def test_a_device_that_is_told_to_slow_down_asks_five_seconds_less_often(desk, servers, person):
    """TOK-048"""
    servers.tell("set", slowDowns=1)
    here, alice = desk(), person()
    asked = time.time()
    connecting = here.connect("--device", "--no-browser")
    at_the_device_page(connecting, alice)
    wait_for(lambda: servers.report()["polls"], "the first poll")
    alice.press("It does")
    alice.consent()
    assert_connected(here, connecting)
    first, second, *_ = servers.report()["polls"]
    # After the provider's one second and not the usual five; then after five more, and not ten.
    assert 1 <= first - asked < 5
    assert 6 <= second - first < 11


def test_a_device_whose_user_says_no_is_told_so(desk, servers, person):
    """TOK-048"""
    here, alice = desk(), person()
    connecting = here.connect("--device", "--no-browser")
    at_the_device_page(connecting, alice)
    alice.press("It does not")
    assert_failed(here, connecting, "access_denied")
    # Asked once a second, until the answer was final.
    polls = servers.report()["polls"]
    assert polls and all(later - earlier >= 0.99 for earlier, later in pairwise(polls))
