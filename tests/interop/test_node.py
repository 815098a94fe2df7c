"""What `exec` has Node load first: with it programs come through whatever their habits, and find nothing else changed."""

import json

import pytest

from world import CLIENTS, NODE, NODE20, ROOT, SECRETS, SERVICE

ROUTES = [{"host": "api.test", "provider": "service"}, {"host": "plain.test:80", "provider": "service", "plaintext": True}]
HABITS = ["--no-warnings", CLIENTS / "node/habits.mjs"]
COMMON = {
    "anAgentOfItsOwnKeepsItsConnection": [{"status": 200, "reused": False}, {"status": 200, "reused": True}],
    "noAgentAtAll": {"status": 200, "reused": False},
    "anAgentWithItsOwnWayToConnect": ["connect ENOENT /nowhere", 1],
    "aDispatcherOfItsOwn": ["mine was asked"] * 3,
    "theDispatcherOfAllWithMoreAroundIt": 200,
    "manyAtOnce": 50,
    "withoutTls": [200, 200, 200],
    "pastTheProxy": ["direct", 200],
    "withoutTlsToAHostThatNoRouteNames": ["/"],
    "aLongAnswer": 9_000_000,
    "aBody": 300_000,
    "aWorker": 200,
    "aChild": "200",
}
UNREACHABLE = "the proxy answered 502 to CONNECT nowhere.test:443"
DIRECT = "getaddrinfo ENOTFOUND api.test"


def seen(output):
    return {name: outcome for line in output.splitlines() for name, outcome in json.loads(line).items()}


def of_node(errors):
    """What the program itself wrote there; Sidebearer's own lines are JSON."""
    return [line for line in errors.splitlines() if not line.startswith("{")]


def test_an_older_node_goes_through_and_reads_the_variables_when_it_calls(sidebearer):
    done = sidebearer(routes=ROUTES).exec(NODE20, *HABITS, "undici")
    assert seen(done.stdout) == COMMON | {"aHostThatIsNotThere": [UNREACHABLE] * 2, "variablesOfItsOwn": [DIRECT] * 2}
    assert of_node(done.stderr) == []


@pytest.mark.parametrize("undici", ["undici", "undici8"])
def test_a_node_that_knows_proxies_goes_through_with_what_a_program_brings_too(sidebearer, undici):
    done = sidebearer(routes=ROUTES).exec(NODE, *HABITS, undici)
    outcomes = seen(done.stdout)
    # Its fetch and its global agents are Node's own affair.
    outcomes.pop("aHostThatIsNotThere")
    assert outcomes.pop("variablesOfItsOwn")[0] == DIRECT
    assert outcomes == COMMON


@pytest.mark.parametrize("node", [NODE, NODE20], ids=["Node 22", "Node 20"])
def test_without_it_a_program_of_those_would_go_past_the_proxy(sidebearer, servers, node):
    done = sidebearer().exec("env", "-u", "NODE_OPTIONS", node, *HABITS, "undici", check=False)
    assert done.returncode == 1
    assert DIRECT in done.stderr
    assert servers.report()["api"]["requests"] == 0


def test_it_names_the_agent_where_the_proxys_url_does(sidebearer):
    agent = sidebearer(agents=[{"name": "writer", "secret": "${WRITER_SECRET}", "users": ["*"]}], providers={"service": SERVICE})
    running = agent.run()
    variables = {"NODE_EXTRA_CA_CERTS": str(agent.ca), "NODE_OPTIONS": f"--require {ROOT / 'src/app/agent/node.cjs'}"}
    script = "fetch('https://api.test/echo').then(({ status }) => console.log(status), ({ cause }) => console.log(cause.message))"
    named = f"http://alice%40b:{SECRETS['WRITER_SECRET']}@{running.address}"
    assert agent.outside(NODE20, "-e", script, HTTPS_PROXY=named, **variables) == "200\n"
    nameless = agent.outside(NODE20, "-e", script, HTTPS_PROXY=f"http://{running.address}", **variables)
    assert nameless == "the proxy answered 407 to CONNECT api.test:443\n"


def test_options_that_the_agent_had_stay_and_a_folder_may_have_any_name(sidebearer, tmp_path):
    odd = tmp_path / 'a "quoted" \\ folder'
    odd.mkdir()
    script = "fetch('https://api.test/echo').then(({ status }) => console.log(status, process.title))"
    done = sidebearer().exec(NODE20, "-e", script, TMPDIR=str(odd), NODE_OPTIONS="--title=kept")
    assert done.stdout == "200 kept\n"
    assert list(odd.iterdir()) == []
