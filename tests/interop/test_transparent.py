"""Agents that do not heed HTTPS_PROXY: a packet filter leads their connections to the sidecar, and nothing else out.

In two network namespaces, by the very rules that the egress lock of deploy/ installs in a pod.
"""

import json
import os
import re
import subprocess
from contextlib import closing, suppress

import pytest
import yaml

from network import AGENT, POD, SIDECAR, Network, v4, v6
from world import ROOT, SERVICE, wait_for

LOCKED = ROOT / "deploy/kubernetes/locked/proxy.yaml"
LOCK = ROOT / "deploy/kubernetes/components/egress-lock/egress-lock.sh"
PORT = "3131"
PLACES = [f"127.0.0.1:{PORT}", f"[::1]:{PORT}"]
ROUTES = [{"host": "api.test", "provider": "service"}, {"host": "plain.test", "provider": "service", "plaintext": True}]
# Where the servers are in the world.
API, AUTH, STRANGER, PLAIN, TALKER, CLOSED = 1, 2, 3, 4, 5, 6
BOTH = pytest.mark.parametrize("address", [v4, v6], ids=["IPv4", "IPv6"])
GREETING = b"SSH-2.0-talker\r\n"
# Says what is heard on a connection of this kind, or what went wrong.
PROBE = """
import os, socket, ssl, sys
kind, address, port, says, enough = sys.argv[1:]
v6, says = ":" in address, bytes.fromhex(says)
kinds = {"udp": (socket.SOCK_DGRAM, 0), "icmp": (socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP)}
try:
    stream = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, *kinds.get(kind, (socket.SOCK_STREAM, 0)))
    stream.settimeout(30)
    stream.connect((address, int(port)))
    if kind == "tls":
        trust = ssl.create_default_context(cafile=os.environ["TRUST"])
        stream = trust.wrap_socket(stream, server_hostname="stranger.test")
    if says:
        stream.send(says)
    heard = stream.recv(100)
    while len(heard) < int(enough) and (more := stream.recv(100)):
        heard += more
    print(heard.hex())
except OSError as error:
    print(error.strerror or error)
"""
# Greets whoever comes, and says at which port.
SERVER = """
import socket, sys
address, says = sys.argv[1], bytes.fromhex(sys.argv[2])
listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
print(listener.getsockname()[1], flush=True)
while True:
    with listener.accept()[0] as stream:
        stream.sendall(says)
"""
# An ICMP echo request (RFC 792, RFC 4443 section 4.1), as anybody may send one who may ping.
PING = {v4: b"\x08\0\0\0\0\0\0\0", v6: b"\x80\0\0\0\0\0\0\0"}
FORBIDDEN = ("Permission denied", "Operation not permitted")


@pytest.fixture(scope="module")
def network(all_servers):
    with closing(Network()) as network:
        for number, name, port in ((API, "api", 443), (AUTH, "auth", 443), (STRANGER, "stranger", 443), (PLAIN, "plain", 80)):
            network.serve(number, port, all_servers.ports[name])
        network.serve(TALKER, 443, talk)
        network.serve(TALKER, 9999, talk)
        yield network


def talk(stream):
    """Speaks first, as SSH and SMTP servers do, and then repeats what it hears."""
    with stream, suppress(OSError):
        stream.sendall(GREETING)
        while chunk := stream.recv(100):
            stream.sendall(chunk)


@pytest.fixture
def pod(network, sidebearer):
    """Starts a sidecar in the locked pod, and gives what an agent there needs."""
    locked = network.as_init_container("sh", LOCK, TRANSPARENT_PORT=PORT)
    assert locked.returncode == 0, locked.stderr
    return lambda **settings: Pod(network, sidebearer, settings)


class Pod:
    def __init__(self, network, sidebearer, settings):
        self.network = network
        hosts = {"api.test:443": (API, 443), "auth.test:443": (AUTH, 443), "plain.test:80": (PLAIN, 80)}
        resolve = {host: f"{v4(number)}:{port}" for host, (number, port) in hosts.items()}
        settings = {"transparent": PLACES, "resolve": resolve, "routes": ROUTES, "providers": {"service": SERVICE}} | settings
        self.agent = sidebearer(**settings)
        self.agent.under = network.within(SIDECAR)
        self.running = self.agent.run()

    def curl(self, url, number, address, *options, to=None):
        """An agent's call, with no word of a proxy: it finds the host at an address of the world."""
        host, port = url.split("/")[2], 443 if url.startswith("https") else 80
        at = f"{host}:{port}:[{address(number)}]" if ":" in address(number) else f"{host}:{port}:{address(number)}"
        command = ["curl", "-sS", "--max-time", "50", "--resolve", at, "--cacert", self.agent.ca, *options, url]
        done = subprocess.run([*self.network.within(AGENT), *command], capture_output=True, text=True, env={}, timeout=60)
        return done.returncode, done.stdout, done.stderr

    def probe(self, *what, **environment):
        return probe(self.network, AGENT, *what, **environment)

    def told(self, **fields):
        """The request of the log that has these fields."""
        def found():
            events = [event for event in self.running.events() if fields.items() <= event.items()]
            return events and events[-1]

        return wait_for(found, f"a request with {fields}")


def probe(network, uid, kind, address, port, says=b"", hears=GREETING, where=None, **environment):
    """What somebody in the pod, or elsewhere, hears who says this, at least as much as they should; or what went wrong."""
    command = ["python3", "-c", PROBE, kind, address, str(port), says.hex(), str(len(hears))]
    environment = {"PATH": os.environ["PATH"]} | environment
    done = subprocess.run(
        [*network.within(uid, where), *command], env=environment, capture_output=True, text=True, timeout=60, check=True,
    )
    said = done.stdout.strip()
    return bytes.fromhex(said) if re.fullmatch("([0-9a-f]{2})*", said) else said


@BOTH
def test_an_agent_that_knows_of_no_proxy_is_authenticated(pod, servers, address):
    pod = pod()
    code, answer, error = pod.curl("https://api.test/echo", API, address)
    assert (code, json.loads(answer or "{}").get("authorizations")) == (0, 1), error
    # In the clear, where a route says so.
    code, answer, error = pod.curl("http://plain.test/echo", PLAIN, address)
    assert (code, json.loads(answer or "{}").get("authorizations")) == (0, 1), error
    assert servers.report()["api"]["requests"] == 2


@BOTH
def test_a_name_at_an_address_that_is_not_its_own_gets_nothing_there(pod, servers, address):
    """CLR-001"""
    pod = pod()
    # At somebody else's address: the API itself is asked, and nobody else hears of it.
    code, answer, error = pod.curl("https://api.test/echo", CLOSED, address)
    assert (code, json.loads(answer or "{}").get("authorizations")) == (0, 1), error
    code, answer, error = pod.curl("http://plain.test/echo", TALKER, address)
    assert (code, json.loads(answer or "{}").get("authorizations")) == (0, 1), error
    # At the API's address with another name: its bytes go there unseen, and get no token.
    before = servers.report()["api"]["requests"]
    code, answer, error = pod.curl("https://stranger.test/echo", API, address, "--insecure", "-w", "%{http_code}")
    assert (code, answer[-3:]) == (0, "401"), error
    assert servers.report()["api"]["requests"] == before + 1
    assert pod.told(authority="stranger.test:443")["status"] == 200


@BOTH
def test_what_no_route_names_goes_unseen_where_it_was_meant_to_go(pod, servers, address):
    """CLR-002"""
    pod = pod()
    own = {"TRUST": str(servers.certificates.stranger_cert)}
    # It is the stranger's own certificate that is trusted here, and the stranger repeats what it hears.
    assert pod.probe("tls", address(STRANGER), 443, b"hello", b"hello", **own) == b"hello"
    assert servers.report()["visits"] == 1
    assert pod.probe("tcp", address(TALKER), 443) == GREETING
    assert pod.told(authority=f"{bracketed(address(TALKER))}:443")["status"] == 200
    for says in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00\x01\x02", b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n"):
        assert pod.probe("tcp", address(TALKER), 443, says, GREETING + says) == GREETING + says


@BOTH
def test_under_deny_it_is_refused_and_said_why(pod, servers, address):
    """CLR-002, CLR-005"""
    pod = pod(unmatched="deny")
    code, _, error = pod.curl("https://stranger.test/", STRANGER, address)
    assert code == 35 and "access denied" in error, error
    assert pod.told(authority="stranger.test:443", code="unmatched")["status"] == 403
    code, answer, _ = pod.curl("http://other.test/", PLAIN, address)
    assert (code, json.loads(answer)["code"]) == (0, "unmatched")
    code, answer, _ = pod.curl("http://api.test/", PLAIN, address)
    assert (code, json.loads(answer)["code"]) == (0, "plaintext_refused")
    assert pod.probe("tcp", address(TALKER), 443, b"\x00\x01\x02") in (b"", "Connection reset by peer")
    assert pod.curl("https://api.test/echo", API, address)[0] == 0
    assert servers.report()["api"]["requests"] == 1


def test_a_redirected_connection_is_its_listener_s_agent_s(pod):
    """CLR-003"""
    agents = [{"name": "researcher", "secret": "${RESEARCHER_SECRET}", "users": ["alice"], "providers": []}]
    pod = pod(agents=agents, transparent=[{"address": place, "agent": "researcher"} for place in PLACES])
    code, answer, _ = pod.curl("https://api.test/echo", API, v4)
    assert (code, json.loads(answer)["code"]) == (0, "provider_not_allowed")
    assert pod.told(code="provider_not_allowed")["agent"] == "researcher"


@BOTH
def test_a_sidecar_that_is_led_back_to_itself_finds_out_at_once(pod, network, address):
    """CLR-004: the rules let somebody else out."""
    pod = pod()
    locked = network.as_init_container("sh", LOCK, TRANSPARENT_PORT=PORT, SIDECAR_UID="1234")
    assert locked.returncode == 0, locked.stderr
    assert pod.curl("https://stranger.test/", STRANGER, address, "--insecure")[0] == 35

    def own(event):
        return event.get("code") == "proxy_loop_detected" or "connection of our own" in event.get("message", "")

    wait_for(lambda: any(map(own, pod.running.events())), "word of the loop")
    passed = [event for event in pod.running.events() if event.get("message") == "redirected connection passed on"]
    assert len(passed) <= 1


@BOTH
def test_the_lock_stops_whatever_the_agent_sends_out_itself(pod, network, address):
    """Not the sidecar, nor who asks the agent."""
    pod()
    refused = "Connection refused"
    assert probe(network, AGENT, "tcp", address(TALKER), 9999) == refused
    for port in (53, 443):
        assert probe(network, AGENT, "udp", address(TALKER), port, b"hello") in FORBIDDEN
    assert probe(network, AGENT, "icmp", address(TALKER), 0, PING[address]) in FORBIDDEN
    assert probe(network, 0, "tcp", address(TALKER), 9999) == refused, "root is an agent too"
    for port in (443, 9999):
        assert probe(network, SIDECAR, "tcp", address(TALKER), port) == GREETING
    assert probe(network, SIDECAR, "udp", address(TALKER), 443, b"hello") == refused, "nobody listens, and its machine says so"
    assert isinstance(probe(network, SIDECAR, "icmp", address(TALKER), 0, PING[address], b""), bytes)


@BOTH
def test_the_lock_leaves_the_agent_what_is_asked_of_it_and_what_is_on_its_own_machine(pod, network, address):
    pod()
    command = ["python3", "-c", SERVER, address(POD), GREETING.hex()]
    with subprocess.Popen([*network.within(AGENT), *command], stdout=subprocess.PIPE, text=True) as server:
        port = server.stdout.readline().strip()
        asks = [probe(network, AGENT, "tcp", address(POD), port, where=where) for where in (network.world, network.pod)]
        server.kill()
    assert asks == [GREETING, GREETING]


def test_a_locked_agent_gets_nowhere_else_by_its_sidecar_either(pod, servers):
    """With what the shipped configuration says of strangers: neither by the proxy nor by a redirect."""
    pod = pod(unmatched=yaml.safe_load(LOCKED.read_text())["unmatched"])
    by_proxy = ("--proxy", f"http://{pod.running.address}", "-k")
    for options in ((), by_proxy):
        code, _, error = pod.curl("https://stranger.test/", STRANGER, v4, *options)
        assert code in (35, 56), error
    refused = lambda: [event for event in pod.running.events() if event.get("code") == "unmatched"]
    wait_for(lambda: len(refused()) == 2, "both refusals in the log")
    code, answer, error = pod.curl("https://api.test/echo", API, v4, *by_proxy)
    assert (code, json.loads(answer or "{}").get("authorizations")) == (0, 1), error
    assert servers.report()["visits"] == 0


def test_the_lock_is_refused_to_a_sidecar_that_takes_agents_anywhere(network):
    base = ROOT / "deploy/kubernetes/base/proxy.yaml"
    done = network.as_init_container("sh", LOCK, PROXY_YAML=str(base))
    assert done.returncode == 1 and "does not say `unmatched: deny`" in done.stderr
    done = network.as_init_container("sh", LOCK, PROXY_YAML=str(LOCKED))
    assert done.returncode == 0, done.stderr


# Everywhere, and what an interface says for itself.
IPV6 = ["all=1 lo=0", "all=1 lo=1", "all=0 lo=1"]


@pytest.mark.parametrize("ipv6", IPV6)
def test_ipv6_is_locked_though_it_is_said_to_be_off(ipv6):
    settings = "".join(f"sysctl -qw net.ipv6.conf.{name.replace('=', '.disable_ipv6=')}; " for name in ipv6.split())
    script = f"set -e; {settings} sh {LOCK}; ip6tables -S OUTPUT; iptables -S OUTPUT"
    done = subprocess.run(["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout.count("-A OUTPUT -j SIDEBEARER") == 2, done.stderr


@pytest.mark.parametrize(("settings", "why"), [
    ({"SIDECAR_UID": "0"}, "the sidecar runs as root"),
    ({"SIDECAR_UID": "agent"}, "`agent` is not a number"),
    ({"AGENT_UIDS": "1000 2102"}, "the agent has the sidecar's uid"),
    ({"DNS": "ns.test"}, "`ns.test` is not the address of a name server"),
    ({"REDIRECT_PORTS": "80;443"}, "REDIRECT_PORTS"),
])
def test_a_lock_that_would_not_hold_is_not_taken_for_one(network, settings, why):
    done = network.as_init_container("sh", LOCK, **settings)
    assert done.returncode != 0 and why in done.stderr


def bracketed(address):
    return f"[{address}]" if ":" in address else address
