"""What build.sh makes: a static program, its bill of materials, and an image of nothing else."""

import hashlib
import json
import tarfile

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from license_expression import get_spdx_licensing

from containers import ARCH, SIDEBEARER, run, target
from world import ROOT

TRIPLE = {"amd64": "x86_64-unknown-linux-gnu", "arm64": "aarch64-unknown-linux-gnu"}[ARCH]


@pytest.fixture(scope="module")
def bill(program):
    return json.loads(program.with_name(program.name + ".cdx.json").read_text())


def test_the_program_needs_no_library_and_names_no_path_of_the_builder(program):
    assert "There is no dynamic section" not in run("readelf", "--dynamic", program).stdout
    assert "NEEDED" not in run("readelf", "--dynamic", program).stdout
    assert "INTERP" not in run("readelf", "--program-headers", program).stdout
    content = program.read_bytes()
    assert [path for path in (str(ROOT), str(target().resolve()), "/.cargo/registry") if path.encode() in content] == []


def test_the_bill_of_materials_is_valid_and_names_each_crate_with_version_and_licence(bill):
    assert JsonStrictValidator(SchemaVersion.V1_5).validate_str(json.dumps(bill)) is None
    spdx = get_spdx_licensing()
    for component in bill["components"]:
        assert spdx.validate(component["licenses"][0]["expression"]).errors == [], component
    # By cargo's own account, which the bill was not made from.
    tree = run("cargo", "tree", "--locked", "--edges", "normal", "--target", TRIPLE, "--prefix", "none", cwd=ROOT).stdout
    crates = {tuple(line.split()[:2]) for line in tree.splitlines() if line}
    listed = {(component["name"], f"v{component['version']}") for component in [bill["metadata"]["component"], *bill["components"]]}
    assert {name for name, _ in listed - crates} == {"glibc", "rust-std"}
    assert crates - listed == set()


def test_every_sum_is_right(built):
    sums = dict(reversed(line.split()) for line in (built / "SHA256SUMS").read_text().splitlines())
    assert sums == {name.name: hashlib.sha256(name.read_bytes()).hexdigest() for name in built.glob("sidebearer-*")}


def test_the_image_holds_the_program_and_two_empty_folders_and_is_nobodys(engine, tmp_path):
    config = engine.inspect(SIDEBEARER)
    assert (config["User"], config["Config"]["Entrypoint"], config["Config"]["Cmd"]) == ("65532:65532", ["/sidebearer"], ["run"])
    assert (config["Os"], config["Architecture"]) == ("linux", ARCH)
    container = engine.podman("create", SIDEBEARER).stdout.strip()
    engine.podman("export", "--output", tmp_path / "root.tar", container)
    engine.podman("rm", container)
    with tarfile.open(tmp_path / "root.tar") as root:
        files = {one.name: one for one in root}
    assert {name for name, one in files.items() if one.isfile() and one.size} == {"sidebearer"}
    assert {(name, files[name].uid) for name in ("var/lib/sidebearer", "run/sidebearer")} == {
        ("var/lib/sidebearer", 65532), ("run/sidebearer", 65532),
    }


def test_the_archive_is_an_oci_index_with_a_platform_for_each_manifest(built):
    with tarfile.open(next(built.glob("*.oci.tar"))) as archive:
        read = lambda digest: json.load(archive.extractfile(f"blobs/{digest.replace(':', '/')}"))
        index = read(json.load(archive.extractfile("index.json"))["manifests"][0]["digest"])
        assert index["mediaType"] == "application/vnd.oci.image.index.v1+json"
        platforms = [(one["platform"]["os"], one["platform"]["architecture"]) for one in index["manifests"]]
    assert ("linux", ARCH) in platforms and len(platforms) == len(set(platforms))
