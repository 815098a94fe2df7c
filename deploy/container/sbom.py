"""Writes a CycloneDX bill of materials of what `cargo metadata`, on standard input, says goes into the program.

The first argument is what `cargo build --message-format json` wrote: metadata alone would list crates that only tests turn
on. Each further one is a part that cargo does not know of: NAME@VERSION=LICENCE.
"""

import hashlib
import json
import os
import re
import sys
import uuid
from datetime import datetime, timezone

REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"


def packages_in(path):
    with open(path) as messages:
        return {json.loads(line).get("package_id") for line in messages}


def linked(metadata, compiled):
    """The crates that reach the program, by what each of them needs; not those that only build it."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    needs, left = {}, [metadata["resolve"]["root"]]
    while left:
        one = left.pop()
        if one in needs:
            continue
        needs[one] = sorted(
            dependency["pkg"] for dependency in nodes[one]["deps"]
            if dependency["pkg"] in compiled and any(kind["kind"] is None for kind in dependency["dep_kinds"])
        )
        left += needs[one]
    return needs


def purl(package):
    return f"pkg:cargo/{package['name']}@{package['version']}"


def component(package):
    # Older crates write `/` where SPDX has `OR`.
    licence = re.sub(r"\s*/\s*", " OR ", package["license"] or "")
    if not licence:
        sys.exit(f"sbom.py: {package['id']} names no licence")
    return {
        "type": "library" if package["source"] else "application",
        "bom-ref": purl(package),
        "name": package["name"],
        "version": package["version"],
        "purl": purl(package),
        "licenses": [{"expression": licence}],
    }


def further(argument):
    name, version, licence = re.fullmatch("(.+)@(.+)=(.+)", argument).groups()
    ref = f"pkg:generic/{name}@{version}"
    licences = [{"expression": licence}]
    return {"type": "library", "bom-ref": ref, "name": name, "version": version, "purl": ref, "licenses": licences}


def bill(metadata, compiled, others):
    packages = {package["id"]: package for package in metadata["packages"]}
    needs = linked(metadata, compiled)
    if strange := [one for one in needs if packages[one]["source"] not in (None, REGISTRY)]:
        sys.exit(f"sbom.py: these do not come from crates.io, so their purl would be wrong: {strange}")
    root = metadata["resolve"]["root"]
    components = [component(packages[one]) for one in sorted(needs) if one != root] + [further(other) for other in others]
    dependencies = [
        {"ref": purl(packages[one]), "dependsOn": [purl(packages[other]) for other in needs[one]]} for one in sorted(needs)
    ]
    # From what it lists and from nothing else: the same crates have the same bill.
    name = uuid.UUID(bytes=hashlib.sha256(json.dumps(components).encode()).digest()[:16], version=4)
    written = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", 0)), timezone.utc)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{name}",
        "version": 1,
        "metadata": {"timestamp": written.strftime("%Y-%m-%dT%H:%M:%SZ"), "component": component(packages[root])},
        "components": components,
        "dependencies": dependencies,
    }


json.dump(bill(json.load(sys.stdin), packages_in(sys.argv[1]), sys.argv[2:]), sys.stdout, indent=1)
