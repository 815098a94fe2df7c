"""Who is compared: how each is set up and started, and which shapes of requests it knows."""

import os
import pwd
import shutil
import signal
import subprocess
import time

from world import Failed, free_port, write_template

# Hosts that handshakes are made for, each for the first time: those that are measured, then those that warm up.
HOSTS = 230
FORWARD = {"plain": "plain", "h1": "h1", "h2": "h2", "tunnel": "tunnel"}
REVERSE = {"plain": "reverse-plain", "h1": "reverse", "h2": "reverse-h2"}


class Contender:
    """A program that is configured anew, and started on its core, for each round."""

    title = ""
    shapes = FORWARD
    environment = {}
    template = None

    def __init__(self, world, programs):
        self.world, self.programs = world, programs
        self.process = None

    def configure(self):
        """A directory of its own, empty, and ports that nobody has."""
        self.directory = self.world.directory / self.name
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        self.port, self.second_port = free_port(), free_port()
        self.values = {
            **self.world.places,
            "port": self.port,
            "second_port": self.second_port,
            "directory": self.directory,
        }
        if self.template:
            self.config = self.directory / self.template
            write_template(self.template, self.config, self.values)

    def command(self):
        raise NotImplementedError

    def pinned(self):
        return ["taskset", "-c", self.world.proxy_core, *map(str, self.command())]

    def start_anew(self):
        """One that is started, answers once, and is stopped."""
        return self.generate("start", "h1", behind=["--", *self.pinned()], environment=self.variables())

    def cas(self):
        """Whom the agent trusts besides the upstream's CA."""
        return []

    def address(self, shape):
        return f"127.0.0.1:{self.second_port if shape == 'reverse-plain' else self.port}"

    def __enter__(self):
        """Started, and known to answer."""
        self.log = open(self.directory / "output.log", "w")
        self.process = subprocess.Popen(
            self.pinned(), stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=self.variables()
        )
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def variables(self):
        return {**os.environ, **self.environment}

    def generate(self, command, shape, **options):
        its = self.shapes[shape]
        pid = self.process.pid if self.process and command != "start" else None
        return self.world.generate(command, its, self.address(its), cas=self.cas(), pid=pid, **options)

    def wait_until_it_answers(self):
        """A peer may listen before it can do its job."""
        for _ in range(100):
            if self.process.poll() is not None:
                raise Failed(f"it ended with {self.process.returncode}: {self.last_words()}")
            try:
                return self.generate("handshakes", "h1", requests=1, warm_up=0)
            except Failed as error:
                reason = error
            time.sleep(0.1)
        raise Failed(f"no right answer within 10 s: {reason}; its log ends: {self.last_words()}")

    def last_words(self):
        lines = [line for line in (self.directory / "output.log").read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "nothing"


class Sidebearer(Contender):
    name, title = "sidebearer", "sidebearer"
    # As the peers: no line for each request.
    environment = {"RUST_LOG": "warn"}
    grant = "client_credentials"
    # More of these for `grows`.
    routes = agents = ""

    def configure(self):
        super().configure()
        self.store = self.directory / "store"
        self.write_secret("secret", "load-secret")
        self.write_secret("key", "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=")
        hosts = [("api", self.values["tls_port"]), ("api", self.values["plain_port"])]
        self.config = self.directory / "proxy.yaml"
        self.write_config(hosts)
        # The CA is made now, and found by every later start.
        with self:
            self.wait_for_ca()
        self.start_config = self.config.with_name("start.yaml")
        self.config.rename(self.start_config)
        self.write_config(hosts + [(f"h{number}", self.values["tls_port"]) for number in range(HOSTS)])

    def write_config(self, hosts):
        lines = [f"  {host}.load.test:{port}: 127.0.0.1:{port}" for host, port in hosts]
        write_template("sidebearer.yaml", self.config, {**self.values, **self.parts(lines)})

    def parts(self, lines):
        return {
            "resolve": "\n".join(lines),
            "grant": self.grant,
            "routes": self.routes,
            "agents": self.agents,
            "store": self.store,
        }

    def write_secret(self, name, value):
        (self.directory / name).write_text(value)
        (self.directory / name).chmod(0o600)

    def wait_for_ca(self):
        for _ in range(100):
            if self.cas()[0].exists():
                return
            time.sleep(0.1)
        raise Failed(f"it made no CA within 10 s: {self.last_words()}")

    def start_anew(self):
        """With the few lines of configuration that the peers have too: no host needs to be resolved."""
        usual, self.config = self.config, self.start_config
        try:
            return super().start_anew()
        finally:
            self.config = usual

    def command(self):
        return [self.programs.sidebearer, "run", "--config", self.config]

    def cas(self):
        return [self.store / "ca/ca.pem"]


class SidebearerLogging(Sidebearer):
    name, title = "sidebearer-log", "sidebearer, a log line for each request (default)"
    environment = {"RUST_LOG": "info"}


class Floor(Contender):
    name, title = "floor", "floor (least hyper + rustls code)"

    def command(self):
        program = getattr(self.programs, self.name)
        return [program, f"127.0.0.1:{self.port}", self.values["upstream"], self.values["authorization"]]


class Hudsucker(Floor):
    name, title = "hudsucker", "hudsucker 0.25, fixed header"


class Envoy(Contender):
    name, title = "envoy", "Envoy, oauth2 injector"
    template = "envoy.yaml"

    def command(self):
        options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
        return [self.programs.envoy, "-c", self.config, *options]


class Squid(Contender):
    name, title = "squid", "squid, ssl-bump, fixed header"
    template = "squid.conf"
    shapes = {shape: its for shape, its in FORWARD.items() if shape != "h2"}

    def configure(self):
        super().configure()
        names = " ".join(["api.load.test", *(f"h{number}.load.test" for number in range(HOSTS))])
        (self.directory / "hosts").write_text(f"127.0.0.1 {names}\n")
        certgen = ["/usr/lib/squid/security_file_certgen", "-c", "-s", self.directory / "certificates", "-M", "16MB"]
        subprocess.run(certgen, check=True, capture_output=True)
        if os.geteuid() == 0:
            give_to("proxy", self.directory)

    def command(self):
        return [shutil.which("squid"), "-N", "-f", self.config]


class Mitmproxy(Contender):
    name, title = "mitmproxy", "mitmproxy, 5-line addon"
    template = "mitmproxy.py"

    def configure(self):
        super().configure()
        (self.directory / "home").mkdir()
        shutil.copy(f"{self.values['upstream']}/ca-and-key.pem", self.directory / "home/mitmproxy-ca.pem")

    def command(self):
        settings = {
            "confdir": self.directory / "home",
            "ssl_verify_upstream_trusted_ca": self.values["ca"],
            "connection_strategy": "lazy",
            "stream_large_bodies": "1m",
        }
        chosen = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        where = ["--listen-host", "127.0.0.1", "--listen-port", self.port, "--ignore-hosts", r"^127\.0\.0\.1:"]
        return [self.programs.mitmdump, "-q", "-s", self.config, *where, *chosen]


class Haproxy(Contender):
    name, title = "haproxy", "haproxy, reverse, fixed header"
    shapes = REVERSE
    template = "haproxy.cfg"

    def command(self):
        return [shutil.which("haproxy"), "-f", self.config]


class Nginx(Contender):
    name, title = "nginx", "nginx, reverse, fixed header"
    shapes = REVERSE
    template = "nginx.conf"

    def configure(self):
        super().configure()
        if os.geteuid() == 0:
            give_to("nobody", self.directory)

    def command(self):
        return [shutil.which("nginx"), "-c", self.config, "-e", self.directory / "nginx.log"]


def give_to(user, directory):
    """Started by root, it works as somebody else, who needs the directory."""
    uid = pwd.getpwnam(user).pw_uid
    for path in [directory, *directory.rglob("*")]:
        os.chown(path, uid, -1)


ALL = [Sidebearer, SidebearerLogging, Floor, Hudsucker, Envoy, Squid, Mitmproxy, Haproxy, Nginx]
