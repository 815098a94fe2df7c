// The API's WebSockets: asks about the token at the handshake, then does as each message says.

import { WebSocketServer } from 'ws';

const LONGEST = 64 * 1024 * 1024;
const REFUSAL = [
  'HTTP/1.1 401 Unauthorized', 'WWW-Authenticate: Bearer realm="api", error="invalid_token"', 'Content-Length: 0', '', '',
].join('\r\n');

export function acceptWebSockets(server, world, judge) {
  const endpoint = new WebSocketServer({
    noServer: true, maxPayload: LONGEST, perMessageDeflate: true, handleProtocols: (offered) => [...offered].at(-1) ?? false,
  });
  endpoint.on('connection', (socket) => serve(socket, world));
  server.on('upgrade', async (request, connection, head) => {
    connection.on('error', () => {});
    world.api.requests += 1;
    if (!(await judge(request)).about.active) {
      world.api.refused += 1;
      connection.end(REFUSAL);
      return;
    }
    world.api.authorized += 1;
    endpoint.handleUpgrade(request, connection, head, (socket) => endpoint.emit('connection', socket));
  });
}

function serve(socket, world) {
  world.websockets.add(socket);
  socket.on('error', () => {});
  socket.on('close', (code, reason) => {
    world.websockets.delete(socket);
    world.closes.push([code, reason.toString()]);
  });
  socket.on('ping', () => { world.pings += 1; });
  // Right behind the 101, before the client has said anything.
  socket.send('welcome');
  socket.on('message', (data, isBinary) => {
    const [order, ...words] = isBinary ? [] : data.toString().split(' ', 3);
    if (order === 'close') socket.close(Number(words[0]), words[1]);
    else if (order === 'vanish') socket.terminate();
    else if (order === 'fragments') fragments(socket, Number(words[0]));
    else if (order === 'ping') socket.ping('are you there');
    else socket.send(data, { binary: isBinary });
  });
}

// One message in so many frames.
function fragments(socket, count) {
  for (let number = 1; number <= count; number += 1) {
    socket.send(`${number},`, { fin: number === count, compress: false });
  }
}
