"""A real PostgreSQL of the suite's own, with TLS and passwords, whose files vanish with it."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from world import SECRETS, free_port, wait_for

HOST = "db.test"
ROLE = "sidebearer"
# Who may connect: its superuser by a socket that lies in a folder of its own, the sidecars by TLS with a password.
ACCESS = f"local all postgres trust\nhostssl all {ROLE} 127.0.0.1/32 scram-sha-256\n"


def programs():
    """Where Debian keeps the newest server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    assert found, "there is no PostgreSQL under /usr/lib/postgresql"
    return found[-1].parent


class Postgres:
    """The server. It refuses to run as root, so root lets somebody else run it."""

    def __init__(self, certificates):
        self.certificates = certificates
        self.programs = programs()
        self.folder = Path(tempfile.mkdtemp(prefix="sidebearer-postgres-"))
        self.data, self.log = self.folder / "data", self.folder / "log"
        self.process = None
        self.starter = ThreadPoolExecutor(1)
        self.databases = 0
        self.somebody = self._somebody()
        cert, key = certificates.make_for(HOST, self.folder)
        for path in (self.folder, cert, key):
            self._give(path)
        self._run("initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        access = self.folder / "access"
        access.write_text(ACCESS)
        # Not before: meanwhile it would be anybody's.
        self.port = free_port()
        settings = {
            "listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self.folder, "hba_file": access,
            "ssl": "on", "ssl_cert_file": cert, "ssl_key_file": key, "password_encryption": "scram-sha-256",
            "fsync": "on", "synchronous_commit": "on", "max_connections": 200, "timezone": "UTC", "log_timezone": "UTC",
        }
        self.options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        self.start()
        self.sql(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{SECRETS['STORE_PASSWORD']}'")

    def database(self):
        """Makes an empty one, and gives its name."""
        self.databases += 1
        name = f"fleet{self.databases}"
        self.sql(f"CREATE DATABASE {name} OWNER {ROLE}")
        return name

    def start(self):
        # It ends with the thread that started it, in whatever way our process ends: so that is always the same one.
        command = [*self._as_somebody(), "--pdeathsig", "QUIT", self.programs / "postgres", "-D", self.data, *self.options]
        with self.log.open("a") as log:
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": self.folder}
            self.process = self.starter.submit(subprocess.Popen, command, **options).result()

        def ready():
            assert self.process.poll() is None, f"PostgreSQL did not start:\n{self.log.read_text()}"
            command = [self.programs / "pg_isready", "-q", "-h", self.folder, "-p", str(self.port)]
            return subprocess.run(command).returncode == 0

        wait_for(ready, "PostgreSQL to take connections")

    def stop(self, immediate=False):
        """Fast: connections are ended and all is written. Immediate: as if it crashed."""
        self.process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
        self.process.wait(timeout=30)

    def restart(self, immediate=False):
        self.stop(immediate)
        self.start()

    def sql(self, text, database="postgres"):
        """Runs it as the superuser, and gives the rows as lists of texts."""
        arguments = ["-X", "-q", "-A", "-t", "-F", "\t", "-v", "ON_ERROR_STOP=1", "-h", self.folder, "-p", str(self.port)]
        lines = self._run("psql", *arguments, "-U", "postgres", "-d", database, "-c", text).splitlines()
        return [line.split("\t") for line in lines]

    def close(self):
        if self.process.poll() is None:
            self.stop(immediate=True)
        self.starter.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _somebody(self):
        if os.geteuid() != 0:
            return None
        names = {user.pw_name for user in pwd.getpwall()}
        return pwd.getpwnam("postgres" if "postgres" in names else "nobody")

    def _as_somebody(self):
        if self.somebody is None:
            return ["setpriv"]
        return ["setpriv", f"--reuid={self.somebody.pw_uid}", f"--regid={self.somebody.pw_gid}", "--clear-groups"]

    def _give(self, path):
        if self.somebody is not None:
            os.chown(path, self.somebody.pw_uid, self.somebody.pw_gid)

    def _run(self, program, *arguments):
        command = [*self._as_somebody(), self.programs / program, *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, f"{program} exited {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout
