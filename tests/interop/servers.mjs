// Starts the real servers that Sidebearer stands between: an OpenID provider, an API it protects, and a stranger.
//
// The first argument is JSON: the certificate files and the git root. One line of JSON on stdout says where each server
// listens; standard input's end stops them, so that a test run that dies leaves no server behind.

import { readFileSync } from 'node:fs';
import http from 'node:http';
import https from 'node:https';
import tls from 'node:tls';

import { createApi } from './api.mjs';
import { createControl } from './control.mjs';
import { page } from './interactions.mjs';
import { createProvider } from './provider.mjs';
import { World } from './state.mjs';

const options = JSON.parse(process.argv[2]);
const certificate = { cert: readFileSync(options.cert), key: readFileSync(options.key) };

const world = new World();
const provider = await createProvider(world);
const auth = https.createServer(certificate, provider);
const authPort = await listen(auth);
// Further ports of the provider, by which it tells its callers apart.
world.entrance = () => listen(https.createServer(certificate, provider));
const { api, old, plain } = createApi(world, certificate, { authPort, ca: readFileSync(options.ca), gitRoot: options.gitRoot });
// Nobody that the sidecar trusts has signed this one: whoever sees its certificate sees it through a blind tunnel.
const stranger = tls.createServer(
  { cert: readFileSync(options.strangerCert), key: readFileSync(options.strangerKey) },
  (socket) => socket.on('error', () => {}).pipe(socket),
);
stranger.on('connection', () => { world.visits += 1; });
// Two more hosts that browsers meet: the application that sent its user to connect, and a company's own login page.
const app = https.createServer(certificate, (request, response) => {
  const onward = new URL(request.url, 'https://login.test').searchParams.get('onward');
  if (onward) response.writeHead(303, { location: onward }).end();
  else response.writeHead(200, { 'content-type': 'text/html' }).end(page('The application', ''));
});
const control = http.createServer(createControl(world));

const ports = { auth: authPort };
for (const [name, server] of Object.entries({ api, old, plain, stranger, app, control })) ports[name] = await listen(server);
process.stdout.write(`${JSON.stringify(ports)}\n`);
process.stdin.resume().on('end', () => process.exit(0));

function listen(server) {
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen({ port: 0, host: '127.0.0.1', backlog: 2048 }, () => resolve(server.address().port));
  });
}
