"""The admission policy makes of a pod what the component makes of it; its CEL is evaluated, as far as that is CEL's own.

Of Kubernetes' types only the results are checked: `Object.spec{name: x}` is read as the map {"name": x}.
"""

import json
import os
import re

import cel
import kubernetes_validate
import pytest

from kubelet import KUBERNETES, find, kustomize, pod_of

# By which key the API server merges these lists.
KEYS = {"containers": "name", "env": "name", "volumeMounts": "mountPath", "volumes": "name"}
AGENT = {"name": "agent", "image": "agent"}
PODS = {
    "one container": {"containers": [AGENT]},
    "an init container": {"containers": [AGENT], "initContainers": [{"name": "first", "image": "agent"}]},
    "two containers with what is theirs": {
        "containers": [
            AGENT | {"env": [{"name": "MODE", "value": "fast"}], "volumeMounts": [{"name": "data", "mountPath": "/data"}]},
            {"name": "second", "image": "agent"},
        ],
        "volumes": [{"name": "data", "emptyDir": {}}],
    },
}


@pytest.fixture(scope="module")
def policy():
    return find(kustomize(KUBERNETES / "inject"), "MutatingAdmissionPolicy", "sidebearer")["spec"]


def evaluated(expression, pod, variables):
    parts = re.split(r'("(?:[^"\\]|\\.)*")', expression)
    for at in range(0, len(parts), 2):
        maps = re.sub(r"\b(?:Object|JSONPatch)[\w.]*\{", "{", parts[at])
        parts[at] = re.sub(r"(?<=[{,\s])([A-Za-z]\w*):(?=\s)", r'"\1":', maps)
    return cel.evaluate("".join(parts), {"object": {"spec": pod}, "variables": variables})


def merged(into, what):
    for name, value in what.items():
        if name in KEYS:
            into[name] = merged_lists(into.get(name, []), value, KEYS[name])
        elif isinstance(value, dict):
            into[name] = merged(into.get(name, {}), value)
        else:
            into[name] = value
    return into


def merged_lists(into, what, key):
    made = {one[key]: one for one in into}
    for one in what:
        made[one[key]] = merged(made.get(one[key], {}), one)
    return list(made.values())


def patched(pod, operations):
    for operation in operations:
        match operation["path"].split("/")[2:]:
            case [name]:
                pod[name] = operation["value"]
            case [name, "0"]:
                pod[name].insert(0, operation["value"])
    return pod


def injected(policy, pod):
    pod = json.loads(json.dumps(pod))
    if not all(evaluated(condition["expression"], pod, {}) for condition in policy["matchConditions"]):
        return pod
    variables = {one["name"]: evaluated(one["expression"], pod, {}) for one in policy["variables"]}
    for mutation in policy["mutations"]:
        if mutation["patchType"] == "JSONPatch":
            pod = patched(pod, evaluated(mutation["jsonPatch"]["expression"], pod, variables))
        else:
            pod = merged(pod, evaluated(mutation["applyConfiguration"]["expression"], pod, variables)["spec"])
    return pod


def through_the_component(folder, pod):
    workload = {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "one", "labels": {"sidebearer": "agent"}},
        "spec": {"selector": {}, "template": {"metadata": {}, "spec": pod}},
    }
    (folder / "one.yaml").write_text(json.dumps(workload))
    image = {"name": "sidebearer", "newName": "registry.example.com/sidebearer", "newTag": "0.1.0"}
    (folder / "kustomization.yaml").write_text(json.dumps(
        {"resources": ["one.yaml"], "components": [os.path.relpath(KUBERNETES / "components/sidecar", folder)], "images": [image]}
    ))
    return pod_of(find(kustomize(folder), "Deployment", "one"))


def ordered(value):
    """Without the order of lists that have keys."""
    if isinstance(value, dict):
        return {name: ordered(sorted(one, key=lambda each: each[KEYS[name]]) if name in KEYS else one) for name, one in value.items()}
    return [ordered(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_the_policy_and_the_component_make_the_same_pod(policy, pod, tmp_path):
    made = injected(policy, pod)
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": made}, "1.37", strict=True)
    assert ordered(made) == ordered(through_the_component(tmp_path, pod))


def test_a_pod_that_has_its_sidecar_is_left_alone(policy):
    once = injected(policy, PODS["one container"])
    assert injected(policy, once) == once
    # As the classic job has it.
    classic = {"containers": [AGENT, {"name": "sidebearer", "image": "sidebearer"}]}
    assert injected(policy, classic) == classic


def test_only_labelled_pods_of_labelled_namespaces_come_to_it(policy):
    constraints = policy["matchConstraints"]
    assert constraints["objectSelector"] == {"matchLabels": {"sidebearer": "agent"}}
    assert constraints["namespaceSelector"] == {"matchLabels": {"sidebearer": "inject"}}
    assert policy["failurePolicy"] == "Fail"
