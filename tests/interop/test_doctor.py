"""`doctor` on the runtimes of this machine: what it says of each, and which fix a broken setup leads to."""

import json
import os
import subprocess

import pytest

from world import HERE, free_port

# What takes long to start when nothing of it was read before, and is given 10 s.
SLOW = (["chromium", "--version"], ["java", "-version"], [HERE / ".venv/bin/python", "-m", "pip", "--version"])
PATH = os.pathsep.join([str(HERE / ".venv/bin"), str(HERE / "node_modules/.bin"), os.environ["PATH"]])


@pytest.fixture(scope="module", autouse=True)
def warm():
    for command in SLOW:
        subprocess.run(command, check=True, capture_output=True)


def doctor(agent, *command, as_is=False, **environment):
    """The exit code, the rows by their program and client, and what is said of the environment."""
    environment = {"PATH": PATH} | environment
    words = [*(["--as-is"] if as_is else []), *(["--", *command] if command else [])]
    done = agent.command("doctor", "--json", "--config", agent.config, *words, check=False, **environment)
    said = json.loads(done.stdout)
    rows = {" ".join(filter(None, [row["runtime"], row["client"]])): row for row in said["runtimes"]}
    assert done.returncode == (0 if said["ok"] else 1)
    return done.returncode, rows, said["environment"]


def test_every_runtime_of_this_machine_is_judged(sidebearer):
    """CLIENTS.md 1: what was measured there is what doctor finds."""
    _, rows, environment = doctor(sidebearer())
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    well = ("curl", "wget", "git", "python3 urllib", "python3 requests", "python3 httpx", "python3 pip", "node fetch", "node https")
    assert {name: verdicts.get(name) for name in well} == dict.fromkeys(well, "ok")
    assert (rows["curl"]["detail"], rows["python3 requests"]["detail"]) == ("HTTP/2", "HTTP/1.1")
    # Nobody can give a browser a CA by a variable.
    assert verdicts["chromium"] == "untrusted"
    assert "--nss" in rows["chromium"]["fix"]
    assert environment == []


def test_a_scripts_own_python_is_the_one_that_is_tried(sidebearer):
    agent = sidebearer()
    python = HERE / ".venv/bin/python"
    script = agent.folder / "agent.py"
    script.write_text(f"#!{python}\nraise SystemExit('nobody runs this')\n")
    script.chmod(0o755)
    _, rows, _ = doctor(agent, script, PATH="/nowhere")
    assert {row["program"] for row in rows.values()} == {str(python)}
    assert [rows[name]["verdict"] for name in ("python3 urllib", "python3 requests", "python3 httpx")] == ["ok"] * 3
    # By itself it does not look at the variables; of urllib3, which is there as a part of requests, nothing is said.
    assert rows["python3 aiohttp"]["verdict"] == "direct"
    assert "trust_env=True" in rows["python3 aiohttp"]["fix"]
    assert "python3 urllib3" not in rows


@pytest.mark.parametrize(
    "program, file, text, verdict, fix",
    [
        ("curl", ".curlrc", 'noproxy = "*"\n', "direct", "remove `noproxy` from ~/.curlrc, line 1: it wins over the variables"),
        ("curl", ".curlrc", "silent\ncacert = /dev/null\n", "untrusted", "remove `cacert` from ~/.curlrc, line 2: it wins over the variables"),
        ("git", ".gitconfig", "[http]\n\tproxy = http://ada:hunter2@127.0.0.1:1\n", "direct", "remove `proxy` from ~/.gitconfig, line 2: it wins over the variables"),
        ("wget", ".wgetrc", "use_proxy = off\n", "direct", "remove `use_proxy` from ~/.wgetrc, line 1: it wins over the variables"),
    ],
)
def test_a_setting_that_wins_over_the_variables_is_found(sidebearer, program, file, text, verdict, fix):
    agent = sidebearer()
    (agent.home / file).write_text(text)
    code, rows, _ = doctor(agent, program)
    assert code == 1
    assert (rows[program]["verdict"], rows[program]["fix"]) == (verdict, fix)


def test_an_exception_for_everything_is_gone_behind_exec_and_one_for_a_routed_host_is_told(sidebearer):
    agent = sidebearer()
    assert doctor(agent, "curl", NO_PROXY="*")[0] == 0
    code, rows, environment = doctor(agent, "curl", NO_PROXY=".test")
    assert (code, rows["curl"]["verdict"]) == (1, "ok")
    assert [found["code"] for found in environment] == ["no_proxy"]
    assert environment[0]["fix"] == "take `.test` out of NO_PROXY and no_proxy"


def test_the_present_environment_is_tried_as_it_is(sidebearer):
    agent = sidebearer(listen=f"127.0.0.1:{free_port()}")
    code, rows, environment = doctor(agent, "curl", as_is=True)
    assert (code, rows["curl"]["verdict"]) == (1, "direct")
    assert [found["code"] for found in environment] == ["proxy_unset", "ca_unset"]

    variables = json.loads(agent.command("env", "--config", agent.config, "--shell", "json").stdout)
    # Before the sidecar has written its files, and after it has stopped.
    code, rows, environment = doctor(agent, "curl", as_is=True, **variables)
    assert (code, rows, environment[0]["code"]) == (1, {}, "no_roots")
    with_system_roots = {name: value for name, value in variables.items() if name != "SSL_CERT_FILE"}
    _, _, environment = doctor(agent, "curl", as_is=True, **with_system_roots)
    assert [found["code"] for found in environment] == ["proxy_down", "ca_unset"]
    agent.run()
    script = "curl; git; node; python3; java"
    tried = ("curl", "git", "node fetch", "node https", "python3 requests", "java")
    _, rows, environment = doctor(agent, "sh", "-c", script, as_is=True, **variables)
    assert {name: rows[name]["verdict"] for name in tried} == dict.fromkeys(tried, "ok")
    assert environment == []

    code, rows, environment = doctor(agent, "sh", "-c", script, as_is=True, **variables | {"NO_PROXY": "*", "no_proxy": "*"})
    assert {rows[name]["verdict"] for name in ("curl", "git", "node fetch", "python3 requests")} == {"direct"}
    assert environment[0]["fix"] == "take `*` out of NO_PROXY and no_proxy"


def test_a_command_is_run_and_what_came_of_it_is_told(sidebearer):
    agent = sidebearer()
    script = "curl -fsS https://api.test/echo; curl -sS --cacert /dev/null https://old.test/; true"
    done = agent.command("doctor", "--run", "--json", "--config", agent.config, "--", "sh", "-c", script, check=False)
    said = json.loads(done.stdout)
    hosts = {host["authority"]: (host["verdict"], host["detail"]) for host in said["hosts"]}
    assert hosts["api.test:443"] == ("ok", "1 request, HTTP/2")
    assert hosts["old.test:443"][0] == "untrusted"
    assert (done.returncode, said["ok"], said["exit_code"]) == (1, False, 0)
