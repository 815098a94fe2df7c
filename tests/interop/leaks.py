"""Looks for secrets where none may be: in everything that a sidecar has written."""

import base64
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from urllib.parse import quote_plus

from world import ODD, SECRETS, as_sent

# What the provider makes up is of these characters; a file is cut into runs of them once, however many secrets there are.
RUN = re.compile(rb"[A-Za-z0-9_-]{20,}")


def known():
    """The secrets that every test knows, in each spelling that they go out in."""
    for secret in SECRETS.values():
        yield from {secret, quote_plus(secret)}
    yield as_sent("basic", SECRETS["BASIC_SECRET"])
    yield as_sent("vault", SECRETS["VAULT_SECRET"])
    yield as_sent(ODD["client_id"], SECRETS["ODD_SECRET"])
    for who, secret in (("alice", "RESEARCHER_SECRET"), ("operator", "ADMIN_TOKEN")):
        yield base64.b64encode(f"{who}:{SECRETS[secret]}".encode()).decode()


def canaries(servers):
    yield from known()
    yield from servers.issued()


def leaks(folder, secrets):
    needles = {secret.encode() for secret in secrets}
    runs = {needle for needle in needles if RUN.fullmatch(needle)}
    sizes = {len(needle) for needle in runs}
    for file in filter(lambda path: path.is_file(), folder.rglob("*")):
        content = file.read_bytes()
        found = {(content.find(needle), needle) for needle in needles - runs if needle in content}
        for run in RUN.finditer(content):
            text = run.group()
            # A secret may stand in the midst of a longer run.
            found |= {(run.start() + at, text[at:at + size]) for size in sizes for at in range(len(text) - size + 1) if text[at:at + size] in runs}
        for at, needle in found:
            line = content[content.rfind(b"\n", 0, at) + 1:at][-300:].decode(errors="replace")
            yield f"{file}: {needle[:4].decode()}... after {line!r}"


def leaks_in_all(folders, secrets):
    """The same, where there is more than a gigabyte to look through."""
    # Spawned: a fork would take along what gRPC's threads hold.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = pool.map(partial(leaks_in, secrets), folders, chunksize=20)
        return [leak for leaks in found for leak in leaks]


def leaks_in(secrets, folder):
    return list(leaks(folder, secrets))
