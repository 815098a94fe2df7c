"""The world the tests speak of: real servers, a real `sidebearer`, and folders that vanish afterwards."""

import base64
import itertools
import json
import os
import platform
import re
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote_plus

import httpx

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CPU = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
NODE = HERE / f"node_modules/node-linux-{CPU}/bin/node"
# The last that does not know proxies by itself.
NODE20 = HERE / f"node_modules/node20-linux-{CPU}/bin/node"
PYTHON = HERE / ".venv/bin/python"
CLIENTS = HERE / "clients"
API = "https://api.test"
PLAIN = "http://plain.test"
# Hosts that clients know by heart. Here they are the API.
KNOWN = ("api.github.com", "api.openai.com", "api.anthropic.com")

# Secrets reach the sidecar the way operators send them: by variables that proxy.yaml names.
SECRETS = {
    "BASIC_SECRET": "basic-canary-secret-5f1c",
    "POST_SECRET": "post-canary-secret-77ab",
    "ODD_SECRET": 'p%2B: +&="/?#\\~',
    "VAULT_SECRET": "vault-canary-secret-b20e",
    "RESEARCHER_SECRET": "researcher-canary-41c7",
    "WRITER_SECRET": "writer-canary-secret-9d03",
    "ADMIN_TOKEN": "admin-canary-token-e8f5",
    "STORE_PASSWORD": "store-canary-password-c31a",
}
BASIC = {"issuer": "https://auth.test", "client_id": "basic", "client_secret": "${BASIC_SECRET}"}
POST = {
    "token_endpoint": "https://auth.test/token",
    "client_id": "post",
    "client_secret": "${POST_SECRET}",
    "client_auth": "client_secret_post",
}
ODD = {"issuer": "https://auth.test", "client_id": "agent:7 +%41&=", "client_secret": "${ODD_SECRET}"}
PUBLIC = {"issuer": "https://auth.test", "client_id": "public", "client_auth": "none"}

SERVICE = BASIC | {"client_credentials": {"scopes": ["read"]}}
USER_SCOPES = ["openid", "offline_access", "read"]
USER = PUBLIC | {"refresh_token": {"scopes": USER_SCOPES}}
# What a user consents to in a browser. The provider keeps to OpenID Connect 11: offline access is asked for anew each time.
CONSENT = {
    "title": "Main",
    "issuer": "https://auth.test",
    "client_id": "app",
    "client_auth": "none",
    "authorization_code": {"scopes": ["read"]},
    "required_scopes": ["offline_access"],
    "authorization_params": {"prompt": "consent"},
}


def binary():
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return os.environ.get("SIDEBEARER_BIN", str(target / "debug/sidebearer"))


def wait_for(condition, what, seconds=30):
    """Polls until `condition` gives something, because a sleep that is long enough here is too short elsewhere."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s in vain for {what}")


def wait_until_still(figure, pause):
    """What a figure has grown to once three looks in a row find it the same: between two, the machine may have stood still."""
    looks = []
    while len(looks) < 3 or len(set(looks[-3:])) > 1:
        looks.append(figure())
        time.sleep(pause)
    return looks[-1]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Certificates:
    """A CA that the sidecar is told to trust, and a stranger that nobody trusts."""

    def __init__(self, folder):
        self.folder = folder
        self.ca, self.ca_key = folder / "ca.crt", folder / "ca.key"
        self.cert, self.key = folder / "servers.crt", folder / "servers.key"
        self.stranger_cert, self.stranger_key = folder / "stranger.crt", folder / "stranger.key"
        self._make(self.ca, self.ca_key, "CN=Interop Test CA", "CA:TRUE", "keyUsage=critical,keyCertSign")
        signed = ["-CA", str(self.ca), "-CAkey", str(self.ca_key)]
        names = ",".join(f"DNS:{name}" for name in ("auth.test", "api.test", "old.test", *KNOWN))
        self._make(self.cert, self.key, "CN=servers", "CA:FALSE", f"subjectAltName={names}", signed_by=signed)
        self._make(self.stranger_cert, self.stranger_key, "CN=stranger", "CA:FALSE", "subjectAltName=DNS:stranger.test")

    def make_for(self, name, folder):
        """A certificate for one more server, and its key."""
        cert, key = folder / f"{name}.crt", folder / f"{name}.key"
        signed = ["-CA", str(self.ca), "-CAkey", str(self.ca_key)]
        self._make(cert, key, f"CN={name}", "CA:FALSE", f"subjectAltName=DNS:{name}", signed_by=signed)
        return cert, key

    def _make(self, cert, key, subject, kind, *extensions, signed_by=()):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        command += ["-subj", f"/{subject}", "-out", str(cert), "-keyout", str(key), *signed_by]
        # Said for each: openssl's own configuration makes every certificate a CA, which rustls refuses in a server's.
        for extension in (f"basicConstraints=critical,{kind}", *extensions):
            command += ["-addext", extension]
        subprocess.run(command, check=True, capture_output=True)


class Servers:
    """The OpenID provider, the API it protects, a stranger, and the way to tell them what to do."""

    def __init__(self, folder):
        self.certificates = Certificates(folder)
        self.git_root = folder / "git"
        self._make_repository()
        options = {
            "ca": str(self.certificates.ca),
            "cert": str(self.certificates.cert),
            "key": str(self.certificates.key),
            "strangerCert": str(self.certificates.stranger_cert),
            "strangerKey": str(self.certificates.stranger_key),
            "gitRoot": str(self.git_root),
        }
        self.log = (folder / "servers.log").open("w+")
        self.process = subprocess.Popen(
            [NODE, HERE / "servers.mjs", json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )
        first_line = self.process.stdout.readline()
        assert first_line, f"the servers did not start:\n{Path(self.log.name).read_text()}"
        self.ports = json.loads(first_line)
        self.control_url = f"http://127.0.0.1:{self.ports['control']}"
        self._control = httpx.Client(base_url=self.control_url, trust_env=False, timeout=30)

    def stop(self):
        self._control.close()
        self.process.stdin.close()
        self.process.wait(timeout=10)

    def tell(self, what, **wish):
        answer = self._control.post(f"/{what}", json=wish)
        answer.raise_for_status()
        return answer.json()

    def report(self):
        return self._control.get("/report").json()

    def granted(self, grant):
        return self.report()["token"]["granted"].get(grant, 0)

    def issued(self):
        return self._control.get("/issued").json()

    def ledger(self):
        """What the provider and the API have written down of each refresh token's use, and of tokens past their end."""
        return self._control.get("/ledger").json()

    def entrance(self):
        """One more port of the provider: it knows its callers by the port that they come to."""
        return self.tell("entrance")

    def refresh_token(self, client="public", user="alice"):
        return self.tell("refresh-token", client=client, user=user, scope=" ".join(USER_SCOPES))

    def active(self, token):
        """Whether the provider still honours it."""
        basic = {"authorization": f"Basic {as_sent('api', 'api-secret')}"}
        return self.call("auth", "POST", "/token/introspection", headers=basic, data={"token": token}).json()["active"]

    def call(self, name, method, path, http2=False, port=None, **request):
        """Calls one of the servers with no sidecar between, at its usual port or another of its own."""
        trust = ssl.create_default_context(cafile=self.certificates.ca)
        headers = httpx.Headers(request.pop("headers", {}))
        headers["host"] = f"{name}.test"
        with httpx.Client(verify=trust, trust_env=False, http2=http2, timeout=60) as client:
            url = f"https://127.0.0.1:{port or self.ports[name]}{path}"
            return client.request(method, url, headers=headers, extensions={"sni_hostname": f"{name}.test"}, **request)

    def _make_repository(self):
        work, repository = self.git_root / "work", self.git_root / "notes.git"
        work.mkdir(parents=True)
        (work / "README").write_text("cloned over HTTPS\n")
        author = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "First"], ["clone", "-q", "--bare", ".", str(repository)]):
            subprocess.run(["git", *author, *command], cwd=work, check=True)


class Sidebearer:
    """One proxy.yaml with its store and its CA, and the real program run on it."""

    def __init__(self, servers, folder, providers, routes=None, ports=None, **settings):
        """`ports` says where a test's own servers listen in place of the usual ones."""
        self.servers = servers
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.outputs = folder / "outputs"
        self.outputs.mkdir()
        self.numbers = itertools.count()
        self.config = folder / "proxy.yaml"
        self.ca = folder / "ca/ca.pem"
        self.running = []
        self.log = "info"
        # What stands before the program when it runs, as `strace` would.
        self.under = ()
        # Its path is short: Chromium makes sockets there, whose paths have at most 107 bytes.
        self.temporary = Path(tempfile.mkdtemp(prefix="sidebearer-test-"))
        first = next(iter(providers))
        names = ("auth", "api", "old", "stranger")
        ports = servers.ports | (ports or {})
        self.config.write_text(json.dumps({
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "health": "127.0.0.1:0",
            "extra_ca_files": [str(servers.certificates.ca)],
            "resolve": {f"{name}.test:443": f"127.0.0.1:{ports[name]}" for name in names}
            | {"plain.test:80": f"127.0.0.1:{ports['plain']}"} | settings.pop("resolve", {}),
            "providers": providers,
            "routes": routes or [{"host": host, "provider": first} for host in ("api.test", "old.test")],
            "store": {"path": str(folder / "store"), "keys": [base64.b64encode(bytes(range(32))).decode()]},
            "ca": {"path": str(folder / "ca")},
        } | settings, indent=2))
        self.config.chmod(0o600)
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8",
            "CONTROL": servers.control_url, "TMPDIR": str(self.temporary), **SECRETS,
        }

    def output(self, name):
        """A file of its own for what a program writes, also where several are started at once."""
        return self.outputs / f"{next(self.numbers):04}-{name}"

    def command(self, *arguments, input=None, check=True, seconds=120, **environment):
        """Runs a subcommand to its end; what it wrote is kept for the search for secrets."""
        done = subprocess.run(
            [binary(), *map(str, arguments)], env=self.environment | environment, input=input,
            capture_output=True, text=True, timeout=seconds, cwd=self.folder,
        )
        self.output(arguments[0]).write_text(done.stdout + done.stderr)
        if check:
            assert done.returncode == 0, f"`sidebearer {arguments[0]}` exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    def outside(self, *command, **environment):
        """Runs a client that was told about the proxy by hand."""
        environment = self.environment | environment
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=True, cwd=self.folder,
        ).stdout

    def exec(self, *command, **options):
        return self.command("exec", "--config", self.config, "--", *command, **options)

    def connect(self, provider, user=None, client="public"):
        """Stores a refresh token that the provider has just given out."""
        token = self.servers.refresh_token(client, user or "alice")
        whose = ["--user", user] if user else []
        self.command("import", provider, *whose, "--config", self.config, "--refresh-token-file", "-", input=token)
        return token

    def start(self, *arguments, **environment):
        """Starts a subcommand that waits for a person."""
        started = Started(self, arguments, environment)
        self.running.append(started)
        return started

    def converse(self, *command, **environment):
        """Runs an agent behind `exec` that does one thing for each line it is told, and says what came of it."""
        agent = Conversation(self, command, environment)
        self.running.append(agent)
        return agent

    def run(self, **environment):
        running = Running(self, environment)
        self.running.append(running)
        running.await_listening()
        return running

    def connections(self):
        """What `status` says."""
        return json.loads(self.command("status", "--json", "--config", self.config).stdout)

    def connection(self, provider):
        """What `status` says about one provider."""
        status = self.connections()
        found = [entry for entry in objects(status) if provider in (entry.get("provider"), entry.get("name"))]
        assert found, f"`status --json` does not mention {provider}: {status}"
        return found[0]

    def stop(self):
        for running in self.running:
            running.kill()


class Running:
    """A live `sidebearer run`."""

    def __init__(self, sidebearer, environment):
        self.sidebearer = sidebearer
        self.log = sidebearer.output("run")
        environment = {"RUST_LOG": sidebearer.log} | sidebearer.environment | environment
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*sidebearer.under, binary(), "run", "--config", sidebearer.config], env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=sidebearer.folder,
            )
        self.address = self.admin = self.health = None

    def await_listening(self):
        def listening():
            assert self.process.poll() is None, f"`sidebearer run` exited {self.process.returncode}:\n{self.log.read_text()}"
            return next((event for event in self.events() if event.get("message") == "listening"), None)

        event = wait_for(listening, "the line that says `listening`")
        self.address = event["address"]
        self.admin = f"http://{event['admin']}" if event.get("admin") else None
        self.health = f"http://{event['health']}" if event.get("health") else None

    def events(self):
        """The sidecar's own lines of the log; a last one still being written is left for the next look."""
        whole = self.log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{") and '"target":"sidebearer' in line]

    def trust(self):
        return ssl.create_default_context(cafile=self.sidebearer.ca)

    def client(self, kind=httpx.Client, **options):
        return kind(proxy=f"http://{self.address}", verify=self.trust(), trust_env=False, timeout=60, **options)

    def get(self, path="/echo"):
        with self.client() as client:
            return client.get(API + path)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=10)

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=40)


class Started:
    """A subcommand that a person takes part in, by a browser or by what they type."""

    def __init__(self, sidebearer, arguments, environment):
        self.out, self.err = (sidebearer.output(f"{arguments[0]}.{name}") for name in ("stdout", "stderr"))
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [binary(), *map(str, arguments)], env=sidebearer.environment | environment,
                stdin=subprocess.PIPE, stdout=out, stderr=err, text=True, cwd=sidebearer.folder,
            )

    def says(self, label):
        """What stands behind `label` on a line of standard error."""
        def said():
            # Asked first: what it writes before it ends is read then.
            ended = self.process.poll() is not None
            lines = self.err.read_text().rpartition("\n")[0].splitlines()
            if found := next((line.split(label, 1)[1] for line in lines if line.strip().startswith(label)), None):
                return found.strip()
            assert not ended, f"exited {self.process.returncode}:\n{self.out.read_text()}\n{self.err.read_text()}"

        return wait_for(said, f"the line `{label}...`")

    def prints(self, pattern, times=1):
        """Waits until standard output has it so often, and gives what is there by then."""
        def printed():
            ended = self.process.poll() is not None
            if len(re.findall(pattern, self.out.read_text(), re.M)) >= times:
                return self.out.read_text()
            assert not ended, f"exited {self.process.returncode}:\n{self.out.read_text()}\n{self.err.read_text()}"

        return wait_for(printed, f"{pattern!r} on standard output, {times} times", seconds=120)

    def type(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def ends(self, seconds=60):
        """Its exit code, standard output and standard error."""
        return self.process.wait(timeout=seconds), self.out.read_text(), self.err.read_text()

    def kill(self):
        self.process.stdin.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=10)


class Conversation:
    """A live `sidebearer exec` whose command is told what to do, one line of JSON at a time."""

    def __init__(self, sidebearer, command, environment):
        self.err = sidebearer.output("exec")
        with self.err.open("w") as err:
            self.process = subprocess.Popen(
                [binary(), "exec", "--config", sidebearer.config, "--", *map(str, command)],
                env=sidebearer.environment | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
                text=True, cwd=sidebearer.folder,
            )

    def ask(self, do, **how):
        self.process.stdin.write(json.dumps({"do": do} | how) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the agent ended while it was to {do}:\n{self.err.read_text()}"
        return json.loads(answer)

    def kill(self):
        # Its command ends with its input; `exec` ends with its command.
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stdout.close()


def objects(value):
    """Every JSON object inside `value`, outermost first."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from objects(item)


def as_sent(client_id, secret):
    """The value of the Basic header that RFC 6749 2.3.1 asks for."""
    return base64.b64encode(f"{quote_plus(client_id)}:{quote_plus(secret)}".encode()).decode()
