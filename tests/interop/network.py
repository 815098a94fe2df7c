"""Two network namespaces with a cable between: a pod, and the world as it reaches it, where servers have addresses of their own."""

import ctypes
import os
import socket
import subprocess
import threading
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000
# Of the pod, and of each server in the world; for IPv6, `fd99::` and the last number.
POD = 100
SIDECAR, AGENT = 2102, 4242


def v4(number):
    return f"10.99.0.{number}"


def v6(number):
    return f"fd99::{number}"


class Network:
    def __init__(self):
        self.pod, self.world = (f"sidebearer-{what}-{os.getpid()}" for what in ("pod", "world"))
        self.listeners = []
        for name in (self.pod, self.world):
            run("ip", "netns", "add", name)
            self._ip(name, "link", "set", "lo", "up")
        run("ip", "link", "add", "cable", "netns", self.pod, "type", "veth", "peer", "name", "cable", "netns", self.world)
        for name, numbers in ((self.pod, [POD]), (self.world, range(1, 10))):
            self._ip(name, "link", "set", "cable", "up")
            for number in numbers:
                self._address(name, number)

        # Everybody there may ping, as in containers.
        run("nsenter", f"--net=/run/netns/{self.pod}", "sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")

    def _ip(self, name, *words):
        run("ip", "-n", name, *words)

    def _address(self, name, number):
        self._ip(name, "address", "add", f"{v4(number)}/24", "dev", "cable")
        # Without looking for others of the same address, which takes its time.
        self._ip(name, "address", "add", f"{v6(number)}/64", "dev", "cable", "nodad")

    def serve(self, number, port, to):
        """Has connections to this address of the world answered: by a server of this machine's loopback at a port, or by a
        function that is given each."""
        for address in (v4(number), v6(number)):
            listener = self._listen(address, port)
            self.listeners.append(listener)
            threading.Thread(target=accept, args=(listener, to), daemon=True).start()

    def _listen(self, address, port):
        """A socket belongs to the namespace that its thread was in, wherever it is used later."""
        made = []

        def there():
            with Path(f"/run/netns/{self.world}").open() as name:
                if LIBC.setns(name.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            made.append(socket.create_server((address, port), family=family))

        thread = threading.Thread(target=there)
        thread.start()
        thread.join()
        return made[0]

    def within(self, uid, where=None):
        """What has a command run in the pod as somebody. They may read the tests' files, which are root's; and nothing else
        that they could not."""
        there = f"--net=/run/netns/{where or self.pod}"
        command = ["nsenter", there, "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        return [*command, "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]

    def as_init_container(self, *command, **variables):
        """Runs a command as the egress lock's container does: as root, with its two capabilities and no other."""
        of_its = "--bounding-set=-all,+net_admin,+net_raw"
        prefix = ["nsenter", f"--net=/run/netns/{self.pod}", "setpriv", of_its, "--inh-caps=-all"]
        environment = {"PATH": os.environ["PATH"]} | variables
        return subprocess.run([*prefix, *command], env=environment, capture_output=True, text=True, timeout=30)

    def close(self):
        for listener in self.listeners:
            listener.close()
        for name in (self.pod, self.world):
            subprocess.run(["ip", "netns", "delete", name], check=False)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    hint = "only root makes network namespaces: run the suite as root"
    assert done.returncode == 0, f"`{' '.join(command)}` failed: {done.stderr.strip()}\n{hint}"


def accept(listener, to):
    while True:
        try:
            stream, _ = listener.accept()
        except OSError:
            return
        answer = relay if isinstance(to, int) else to
        arguments = (stream, to) if isinstance(to, int) else (stream,)
        threading.Thread(target=answer, args=arguments, daemon=True).start()


def relay(stream, port):
    with stream, socket.create_connection(("127.0.0.1", port)) as server:
        up = threading.Thread(target=pump, args=(stream, server), daemon=True)
        up.start()
        pump(server, stream)
        up.join()


def pump(source, to):
    try:
        while chunk := source.recv(65536):
            to.sendall(chunk)
        to.shutdown(socket.SHUT_WR)
    except OSError:
        pass
