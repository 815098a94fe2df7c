"""Kubernetes' Pod Security Standard `restricted`, which holds `baseline`: its rules, of a pod's spec."""

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
CAPABILITIES = {"NET_BIND_SERVICE"}
PROFILES = {"RuntimeDefault", "Localhost"}
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start", "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports", "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}


def violations(pod):
    return list(of_pod(pod)) + [
        f"{container['name']}: {what}"
        for container in pod.get("initContainers", []) + pod.get("ephemeralContainers", []) + pod["containers"]
        for what in of_container(container, pod.get("securityContext", {}))
    ]


def of_pod(pod):
    yield from (name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name))
    for volume in pod.get("volumes", []):
        yield from (f"volume of kind {kind}" for kind in set(volume) - {"name"} - VOLUMES)
    security = pod.get("securityContext", {})
    yield from (f"sysctl {one['name']}" for one in security.get("sysctls", []) if one["name"] not in SYSCTLS)
    yield from of_both(security)


def of_container(container, pods):
    security = container.get("securityContext", {})
    yield from of_both(security)
    # A container may leave to its pod what it does not say.
    if security.get("runAsNonRoot", pods.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    if security.get("seccompProfile", pods.get("seccompProfile", {})).get("type") not in PROFILES:
        yield "seccompProfile is neither RuntimeDefault nor Localhost"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if security.get("privileged"):
        yield "privileged"
    capabilities = security.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - CAPABILITIES:
        yield "capabilities are not all dropped"
    if security.get("procMount", "Default") != "Default":
        yield "procMount"
    yield from (f"hostPort {port['hostPort']}" for port in container.get("ports", []) if port.get("hostPort"))
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        if any(handler.get("host") for handler in container.get(probe, {}).values() if isinstance(handler, dict)):
            yield f"{probe} to another host"


def of_both(security):
    if security.get("runAsUser") == 0:
        yield "runAsUser is root"
    if security.get("windowsOptions", {}).get("hostProcess"):
        yield "hostProcess"
    if security.get("seccompProfile", {}).get("type", "RuntimeDefault") not in PROFILES:
        yield "seccompProfile is unconfined"
    if security.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in PROFILES:
        yield "appArmorProfile is unconfined"
    if security.get("seLinuxOptions", {}).get("type", "") not in ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"):
        yield "seLinuxOptions.type"
