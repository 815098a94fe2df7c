"""The machine's two cores, the upstream on one of them, and the load generator, which shares it."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
# Every contender opens two descriptors for each of 2,000 connections, and some more.
DESCRIPTORS = 16384


class Failed(Exception):
    """Something did not work; the text says what, in a line."""


class World:
    def __init__(self, load, proxy_core, load_core, options=()):
        raise_descriptors()
        self.load, self.proxy_core, self.load_core = load, str(proxy_core), str(load_core)
        self.directory = TARGET / "compare"
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        self.log = open(self.directory / "upstream.log", "w")
        self.process, self.upstream = self.start_upstream(options)
        # By the names that the templates of the contenders use.
        self.places = {
            "tls_port": port(self.upstream["tls"]),
            "plain_port": port(self.upstream["plain"]),
            "token_port": port(self.upstream["token_endpoint"].removesuffix("/token")),
            "token_endpoint": self.upstream["token_endpoint"],
            "authorization": self.upstream["authorization"],
            "upstream": self.upstream["directory"],
            "ca": self.upstream["directory"] + "/ca.pem",
        }
        self.join_files()

    def start_upstream(self, options):
        command = ["taskset", "-c", self.load_core, self.load, "upstream", "--directory", self.directory / "upstream"]
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=self.log, text=True)
        line = process.stdout.readline()
        if not line:
            raise Failed(f"the upstream did not start: see {self.log.name}")
        return process, json.loads(line)

    def join_files(self):
        """haproxy and squid want a certificate and its key in one file, and so does mitmproxy."""
        upstream = Path(self.places["upstream"])
        for name, parts in {"leaf-and-key.pem": ["leaf.pem", "leaf.key"], "ca-and-key.pem": ["ca.pem", "ca.key"]}.items():
            (upstream / name).write_text("".join((upstream / part).read_text() for part in parts))

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def authority(self, shape):
        """Whom requests are for. What is tunnelled is called by its address: no contender has to resolve it."""
        if shape == "tunnel":
            return f"127.0.0.1:{self.places['tls_port']}"
        return f"api.load.test:{self.places['plain_port' if 'plain' in shape else 'tls_port']}"

    def direct_address(self, shape):
        return self.upstream["plain" if "plain" in shape else "tls"]

    def generate(self, command, shape, address, cas=(), behind=(), environment=None, **options):
        """Runs the generator, and gives what it printed. Every wrong answer is a failure."""
        arguments = ["taskset", "-c", self.load_core, self.load, command, "--shape", shape, "--address", address]
        arguments += ["--authority", self.authority(shape)]
        for ca in [self.places["ca"], *cas]:
            arguments += ["--ca", str(ca)]
        for name, value in options.items():
            if value is not None:
                arguments += ["--" + name.replace("_", "-"), str(value)]
        try:
            done = subprocess.run([*arguments, *behind], capture_output=True, text=True, timeout=600, env=environment)
        except subprocess.TimeoutExpired:
            raise Failed("it took longer than ten minutes") from None
        if done.returncode != 0:
            raise Failed((done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("load: "))
        return json.loads(done.stdout)


def raise_descriptors():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        raise Failed(f"{DESCRIPTORS} open files are needed, and the limit is {hard}: raise it with `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))


def port(address):
    return address.rsplit(":", 1)[1]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def write_template(name, destination, values):
    destination.write_text(Template((HERE / "configs" / name).read_text()).substitute(values))
