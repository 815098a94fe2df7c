"""Fixtures, and the closing lines of the suite."""

import shutil

import pytest

from browser import Chromium, Person
from leaks import canaries, leaks_in_all
from postgres import Postgres
from world import SERVICE, Servers, Sidebearer

FIGURES = []
# Where each sidecar of the suite has written whatever it wrote.
FOLDERS = []
TEMPORARY = []


@pytest.fixture(scope="session")
def all_servers(tmp_path_factory):
    """The servers; when all tests are done, everything that any sidecar wrote is searched for every secret there ever was."""
    servers = Servers(tmp_path_factory.mktemp("servers"))
    yield servers
    secrets = list(canaries(servers))
    servers.stop()
    # LEK-001, LEK-006
    assert leaks_in_all(FOLDERS, secrets) == []
    for folder in TEMPORARY:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def servers(all_servers):
    all_servers.tell("reset")
    return all_servers


@pytest.fixture
def sidebearer(servers, tmp_path, request):
    """Makes a configured `sidebearer`; without arguments, one that routes the API to a client-credentials provider.

    `run` logs everything, its libraries too, which write whole headers: that is what the search for secrets is for. A
    module that measures, or sends so much that the log would be what it measures, says otherwise in its LOG.
    """
    made = []

    def make(**settings):
        settings.setdefault("providers", {"service": SERVICE})
        made.append(Sidebearer(servers, tmp_path / f"sidebearer-{len(made)}", **settings))
        made[-1].log = getattr(request.module, "LOG", "trace")
        TEMPORARY.append(made[-1].temporary)
        FOLDERS.extend((made[-1].folder, made[-1].temporary))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture(scope="session")
def all_postgres(all_servers):
    postgres = Postgres(all_servers.certificates)
    yield postgres
    postgres.close()


@pytest.fixture
def postgres(all_postgres):
    """The database server, running, however the test before has left it."""
    if all_postgres.process.poll() is not None:
        all_postgres.start()
    return all_postgres


# One a module: while Playwright runs, `asyncio.run` cannot, which other modules use.
@pytest.fixture(scope="module")
def chromium(all_servers):
    chromium = Chromium(all_servers.ports)
    yield chromium
    chromium.close()


@pytest.fixture
def person(chromium, tmp_path):
    """Seats somebody at a browser of their own; each call is somebody else."""
    people = []

    def sit_down(**options):
        people.append(Person(chromium, **options))
        return people[-1]

    yield sit_down
    for number, one in enumerate(people):
        one.leave(tmp_path / f"person-{number}.png")
    assert [violation for one in people for violation in one.violations] == []


@pytest.fixture
def figure(request):
    """Keeps a measured figure for the end of the run, where people look."""
    return lambda text: FIGURES.append(f"{request.node.name}: {text}")


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)


def pytest_unconfigure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter:
        count = {outcome: len(reporter.stats.get(outcome, [])) for outcome in ("passed", "failed", "error", "skipped")}
        skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
        print(f"{count['passed']} passed, {count['failed'] + count['error']} failed{skipped}")
