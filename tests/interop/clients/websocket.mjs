// A `ws` client, as an agent writes one: Node's own agent finds the proxy. Runs what standard input says, a line of JSON
// each, and says on standard output what came of it.

import http from 'node:http';
import https from 'node:https';
import { createInterface } from 'node:readline';

import WebSocket from 'ws';

let socket;
const inbox = [];
let waiting;
const arrived = (what) => { inbox.push(what); waiting?.(); };

const steps = {
  async open({ url, protocols, ...options }) {
    inbox.length = 0;
    const { globalAgent } = url.startsWith('wss:') ? https : http;
    socket = new WebSocket(url, protocols ?? [], { agent: globalAgent, maxPayload: 64 * 1024 * 1024, ...options });
    const mine = socket;
    socket.on('message', (data, isBinary) => arrived({ message: isBinary ? data.toString('base64') : data.toString(), isBinary }));
    socket.on('pong', (data) => arrived({ pong: data.toString() }));
    socket.on('ping', (data) => arrived({ ping: data.toString() }));
    socket.on('close', (code, reason) => mine === socket && arrived({ close: code, reason: reason.toString() }));
    let error;
    socket.on('error', (seen) => { error = seen.message; });
    await new Promise((resolve) => socket.once('open', resolve).once('close', resolve));
    return { opened: socket.readyState === WebSocket.OPEN, error, extensions: socket.extensions, protocol: socket.protocol };
  },
  send({ text, bytes, long, ...options }) {
    socket.send(text ?? (bytes ? Buffer.from(bytes, 'base64') : pattern(long)), options);
  },
  ping({ data }) { socket.ping(data); },
  close({ code, reason }) { socket.close(code, reason); },
  async receive() {
    while (inbox.length === 0) await new Promise((resolve) => { waiting = resolve; });
    return inbox.shift();
  },
  // Long messages are compared here.
  async receiveLong({ long }) {
    const { message } = await steps.receive();
    return { same: Buffer.from(message, 'base64').equals(pattern(long)) };
  },
};

function pattern(length) {
  const bytes = Buffer.alloc(length);
  for (let place = 0; place + 4 <= length; place += 4) bytes.writeUInt32BE(Math.imul(place, 2654435761) >>> 0, place);
  return bytes;
}

for await (const line of createInterface({ input: process.stdin })) {
  const { do: step, ...options } = JSON.parse(line);
  process.stdout.write(`${JSON.stringify(await steps[step](options) ?? {})}\n`);
}
process.exit(0);
