"""The shared store's engine by itself, on a real PostgreSQL: every promise that each engine makes."""

import os
import subprocess
from urllib.parse import quote

from world import ROOT


def test_the_shared_engine_keeps_what_every_engine_promises(postgres):
    """C12, C19, TOK-029, TOK-030, TOK-031, TOK-038, TOK-042"""
    url = f"postgres://postgres@{quote(str(postgres.folder), safe='')}:{postgres.port}/postgres?sslmode=disable"
    command = ["cargo", "test", "--locked", "--lib", "store::contract", "--", "--ignored"]
    environment = os.environ | {"SIDEBEARER_TEST_POSTGRES": url}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test store::contract::ending::who_let_its_lease_end" in done.stdout
