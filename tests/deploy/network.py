"""A network of our own, in which there is only loopback: pods that share it find our servers, and nobody else does."""

import ctypes
import fcntl
import os
import socket
import struct
import threading

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def leave_the_network():
    """For this process and all that it starts, once."""
    if [name for _, name in socket.if_nameindex()] == ["lo"]:
        return
    # Of a process, only the calling thread changes; those that it starts later have its network.
    assert threading.current_thread() is threading.main_thread()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"no network of our own: {os.strerror(ctypes.get_errno())}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


class NameServer:
    """Answers every question for an IPv4 address with 127.0.0.1, and remembers the names."""

    def __enter__(self):
        self.asked = set()
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 53))
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        return self

    def serve(self):
        while True:
            question, caller = self.socket.recvfrom(512)
            if not question:
                return
            self.socket.sendto(self.answer(question), caller)

    def answer(self, question):
        labels, at = [], 12
        while size := question[at]:
            labels.append(question[at + 1:at + 1 + size].decode())
            at += 1 + size
        self.asked.add(".".join(labels))
        (kind,) = struct.unpack(">H", question[at + 1:at + 3])
        is_ipv4 = kind == 1
        head = question[:2] + struct.pack(">HHHHH", 0x8180, 1, int(is_ipv4), 0, 0)
        record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + socket.inet_aton("127.0.0.1") if is_ipv4 else b""
        return head + question[12:at + 5] + record

    def __exit__(self, *_):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"", ("127.0.0.1", 53))
        self.thread.join()
        self.socket.close()


class Relay:
    """A port of every address, behind which is one of loopback."""

    def __init__(self, to):
        self.to = to

    def __enter__(self):
        self.listener = socket.create_server(("0.0.0.0", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def serve(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.to))
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self.copy, args=(one, other), daemon=True).start()

    @staticmethod
    def copy(one, other):
        try:
            while block := one.recv(65536):
                other.sendall(block)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def __exit__(self, *_):
        self.listener.close()
