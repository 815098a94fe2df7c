"""The quick start can be pasted."""

import re
import shutil

import kubernetes_validate
import pytest

from containers import run
from kubelet import find, kustomize, pod_of
from restricted import violations
from world import ROOT

PATCHES = """\
patches:
  - target: {kind: Deployment}
    patch: '{apiVersion: apps/v1, kind: Deployment, metadata: {name: my-agent}, spec: {replicas: 3}}'
"""


def test_the_quick_start_makes_an_agent_with_its_sidecar(tmp_path):
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    text = (ROOT / "README.md").read_text()
    run("bash", "-euc", re.search(r"^```sh\n(.*?)^```$", text, re.M | re.S)[1], cwd=tmp_path)
    # As whoever goes on from there may.
    with (tmp_path / "mine/kustomization.yaml").open("a") as file:
        file.write(PATCHES)
    manifests = kustomize(tmp_path / "mine")
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    assert find(manifests, "Deployment", "my-agent")["spec"]["replicas"] == 3
    pod = pod_of(find(manifests, "Deployment", "my-agent"))
    assert (violations(pod), pod["initContainers"][0]["image"]) == ([], "registry.example.com/sidebearer:0.1.0")
    configuration = find(manifests, "ConfigMap", "sidebearer")["data"]["proxy.yaml"]
    assert configuration == (ROOT / "deploy/kubernetes/base/proxy.yaml").read_text()


@pytest.mark.parametrize("readme", ["README.md", "deploy/README.md", "deploy/monitoring/README.md"])
def test_every_file_that_a_readme_names_is_there(readme):
    text, folder = (ROOT / readme).read_text(), (ROOT / readme).parent
    commands = re.findall(r"\bdeploy/(?:compose|container|env|kubernetes|monitoring|systemd)[\w./-]*", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    named = [folder / link for link in links] + [ROOT / path for path in commands]
    assert [str(path) for path in named if not path.exists()] == []
