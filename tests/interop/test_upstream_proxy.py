"""A company's own proxy on the only way out: Debian's tinyproxy, with credentials, which alone knows the servers' names."""

import json
import os
import socket
import subprocess

import pytest

from test_tunnel import connect
from world import POST, free_port, wait_for

# tinyproxy has no other characters; the URL holds them as if it could not.
PASSWORD = "canary-corporate.3e"
TWICE = 'set -e; "$@"; curl -fsS -o /dev/null -X POST "$CONTROL/revoke"; "$@"'


class Tinyproxy:
    """A real proxy that asks who comes, and the log of what it was asked."""

    def __init__(self, folder, names):
        self.port = free_port()
        self.log = folder / "tinyproxy.log"
        hosts, config = folder / "hosts", folder / "tinyproxy.conf"
        hosts.write_text("".join(f"127.0.0.1 {name}\n" for name in names))
        config.write_text(
            f'Port {self.port}\nListen 127.0.0.1\nBasicAuth agents {PASSWORD}\nLogFile "{self.log}"\nLogLevel Connect\n'
        )
        # It asks the system about names; the wrapper lets one process have names of its own.
        environment = os.environ | {"LD_PRELOAD": "libnss_wrapper.so", "NSS_WRAPPER_HOSTS": str(hosts)}
        self.process = subprocess.Popen(["tinyproxy", "-d", "-c", config], env=environment, stdout=subprocess.DEVNULL)
        wait_for(self.answers, "tinyproxy")

    def answers(self):
        with socket.socket() as attempt:
            return attempt.connect_ex(("127.0.0.1", self.port)) == 0

    def url(self, password=PASSWORD):
        return f"http://agents:{password.replace('.', '%2E')}@127.0.0.1:{self.port}"

    def asked(self):
        lines = self.log.read_text().splitlines()
        return [line.split("): ", 1)[1].rsplit(" ", 1)[0] for line in lines if "Request (file descriptor" in line]

    def stop(self):
        self.process.kill()
        self.process.wait(timeout=10)


@pytest.fixture
def tinyproxy(tmp_path):
    proxy = Tinyproxy(tmp_path, [f"{name}.test" for name in ("auth", "api", "plain", "stranger")])
    yield proxy
    proxy.stop()


@pytest.fixture
def company(sidebearer, servers, tinyproxy):
    """Makes a `sidebearer` that finds nothing but that proxy; and the hosts, with the ports that they have there."""
    hosts = {name: f"{name}.test:{servers.ports[name]}" for name in ("auth", "api", "plain", "stranger")}

    def make(password=PASSWORD):
        agent = sidebearer(
            providers={"service": POST | {"token_endpoint": f"https://{hosts['auth']}/token", "client_credentials": {"scopes": ["read"]}}},
            routes=[
                {"host": hosts["api"], "provider": "service"},
                {"host": hosts["plain"], "provider": "service", "plaintext": True},
            ],
            resolve={},
            upstream_proxy="${CORPORATE_PROXY}",
        )
        agent.environment["CORPORATE_PROXY"] = tinyproxy.url(password)
        return agent

    yield make, hosts
    for output in tinyproxy.log.parent.glob("sidebearer-*/outputs/*"):
        assert "canary-corporate" not in output.read_text()


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_an_api_and_its_provider_are_reached_through_it(company, servers, tinyproxy, version):
    """RTY-001, LST-012"""
    make, hosts = company
    done = make().exec("sh", "-c", TWICE, "sh", "curl", "-fsS", version, f"https://{hosts['api']}/echo")
    echoes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [echo["authorizations"] for echo in echoes] == [1, 1]
    assert not [name for echo in echoes for name in echo["headers"] if name.startswith("proxy-")]
    assert servers.report()["token"]["granted"] == {"client_credentials": 2}
    asked = tinyproxy.asked()
    assert set(asked) == {f"CONNECT {hosts['auth']}", f"CONNECT {hosts['api']}"}


def test_a_request_in_the_clear_is_one_to_the_proxy(company, tinyproxy):
    make, hosts = company
    done = make().exec("curl", "-fsS", f"http://{hosts['plain']}/echo?q=1%2F2", "-d", "a body")
    echo = json.loads(done.stdout)
    assert (echo["authorizations"], echo["path"], echo["bodyLength"]) == (1, "/echo?q=1%2F2", 6)
    assert not [name for name in echo["headers"] if name.startswith("proxy-")]
    assert tinyproxy.asked() == [f"CONNECT {hosts['auth']}", f"POST http://{hosts['plain']}/echo?q=1%2F2"]


def test_a_blind_tunnel_leads_through_it(company, servers, tinyproxy):
    """TLS-001"""
    make, hosts = company
    target = hosts["stranger"].encode()
    stream, status = connect(make().run(), b"CONNECT " + target + b" HTTP/1.1\r\nHost: " + target + b"\r\n\r\n")
    assert status.split()[1] == b"200"
    stream.close()
    assert tinyproxy.asked() == [f"CONNECT {hosts['stranger']}"]


def test_a_wrong_password_is_told_of_and_nobody_is_reached(company, servers):
    make, hosts = company
    agent = make("wrong")
    shown = agent.exec("curl", "-sS", "-o", "/dev/null", "-w", "%{http_connect}", f"https://{hosts['stranger']}/", check=False)
    assert shown.stdout == "502"
    refused = json.loads(agent.exec("curl", "-sS", f"https://{hosts['api']}/echo").stdout)
    assert (refused["status"], refused["code"]) == (503, "token_unavailable")
    assert "the upstream proxy does not accept the credentials" in refused["detail"]
    assert servers.report()["api"]["requests"] == 0
