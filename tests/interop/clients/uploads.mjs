// Many uploads of one file at once, as streams of one HTTP/2 connection through the proxy; prints each answer.
// (curl 7.88 spins while it waits for room in a window, and many of them leave nothing for anybody else.)

import { createReadStream, readFileSync } from 'node:fs';
import http from 'node:http';
import http2 from 'node:http2';
import tls from 'node:tls';

const [proxy, ca, url, file, count] = process.argv.slice(2);
const { hostname: servername, origin, pathname } = new URL(url);
const target = `${servername}:443`;
const [host, port] = proxy.split(':');
const tunnel = http.request({ host, port, method: 'CONNECT', path: target, headers: { host: target } });
tunnel.once('connect', ({ statusCode }, socket) => {
  if (statusCode !== 200) throw new Error(`the proxy answered ${statusCode}`);
  const secure = tls.connect({ socket, servername, ca: readFileSync(ca), ALPNProtocols: ['h2'] });
  const session = http2.connect(origin, { createConnection: () => secure });
  Promise.all(Array.from({ length: Number(count) }, () => upload(session))).then(() => session.close());
}).end();

async function upload(session) {
  const stream = session.request({ ':method': 'PUT', ':path': pathname });
  createReadStream(file, { highWaterMark: 256 * 1024 }).pipe(stream);
  let answer = '';
  for await (const piece of stream.setEncoding('utf8')) answer += piece;
  process.stdout.write(answer);
}
