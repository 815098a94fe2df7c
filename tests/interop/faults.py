"""A network that fails when told to: a TCP relay in front of one server."""

import asyncio
import socket
import struct
import threading

PIECE = 65536


class Faults:
    """Relays connections to a port of this machine, and breaks them on command; from any thread."""

    def __init__(self, target):
        """`target` gives the port to relay to, anew for each connection: a server may come back on another."""
        self.target = target
        self.pairs = set()
        self.refusing, self.pause = False, 0
        self.loop = asyncio.new_event_loop()
        self.open = asyncio.Event()
        self.open.set()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.server = self._do(asyncio.start_server(self._relay, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]

    def cut(self):
        """Ends all connections of this moment, as a network device that restarts does."""
        self._do(self._cut())

    def refuse(self):
        """Ends all connections, and every new one."""
        self.refusing = True
        self.cut()

    def stall(self):
        """Takes what comes, and passes nothing on."""
        self.loop.call_soon_threadsafe(self.open.clear)

    def delay(self, seconds):
        """Holds each piece back for so long."""
        self.pause = seconds

    def heal(self):
        self.refusing, self.pause = False, 0
        self.loop.call_soon_threadsafe(self.open.set)

    def close(self):
        self.refuse()
        self._do(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    async def _close(self):
        self.server.close()

    async def _cut(self):
        for pair in list(self.pairs):
            pair.abort()

    async def _relay(self, reader, writer):
        pair = Pair()
        pair.add(writer)
        self.pairs.add(pair)
        try:
            if self.refusing:
                return pair.abort()
            await self.open.wait()
            onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self.target())
            pair.add(onward_writer)
            await asyncio.gather(self._pump(reader, onward_writer), self._pump(onward_reader, writer))
            pair.close()
        except OSError:
            pair.abort()
        finally:
            self.pairs.discard(pair)

    async def _pump(self, reader, writer):
        while piece := await reader.read(PIECE):
            await self.open.wait()
            if self.pause:
                await asyncio.sleep(self.pause)
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


class Pair:
    """The two sides of a relayed connection."""

    def __init__(self):
        self.writers = []

    def add(self, writer):
        self.writers.append(writer)

    def abort(self):
        """A reset, not a good-bye."""
        for writer in self.writers:
            if not writer.transport.is_closing():
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def close(self):
        for writer in self.writers:
            writer.close()
