// The protected API: asks the provider about every token it is shown, and echoes what else it was sent.

import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import http from 'node:http';
import http2 from 'node:http2';
import https from 'node:https';
import { Readable } from 'node:stream';

import { listen } from './events.mjs';
import { acceptWebSockets } from './websocket.mjs';

const BLOCK = 64 * 1024;
// Where answers come event by event; two of them where the SDKs of language models look for them.
const EVENTS = new Set(['/events', '/v1/chat/completions', '/v1/messages']);
const INTROSPECTOR = `Basic ${Buffer.from('api:api-secret').toString('base64')}`;

export function createApi(world, certificate, { authPort, ca, gitRoot }) {
  const agent = new https.Agent({ keepAlive: true, maxSockets: 16 });
  // With room for many answers that wait for whoever does not read: with less, Node refuses everybody else on the connection.
  const api = http2.createSecureServer({ ...certificate, allowHTTP1: true, maxSessionMemory: 1024 });
  api.on('sessionError', () => {});
  api.on('request', serve);
  // The same API as an old server speaks it.
  const old = https.createServer(certificate, serve);
  // And as it is inside a network that trusts itself.
  const plain = http.createServer(serve);
  for (const server of [api, old, plain]) acceptWebSockets(server, world, judge);
  return { api, old, plain };

  async function serve(request, response) {
    request.on('error', () => {});
    response.on('error', () => {});
    try {
      await answer(request, response);
    } catch (error) {
      console.error(error);
      response.destroy();
    }
  }

  async function answer(request, response) {
    if (request.url === '/favicon.ico') {
      // A browser asks by itself, at a moment of its own: no part of what a test counts.
      response.writeHead(404).end();
      return;
    }
    world.api.requests += 1;
    world.authorizations.add(fields(request).filter((name) => name === 'authorization').length);
    const id = request.headers['x-request-id'];
    if (id) world.tries.set(id, (world.tries.get(id) ?? 0) + 1);
    await world.heldTogether();
    // An API that looks at the token only once the whole body has arrived.
    const body = request.url === '/judged-late' ? await digest(request) : null;
    const { token, about } = await judge(request);
    if (!about.active) {
      world.api.refused += 1;
      const challenge = token ? 'Bearer realm="api", error="invalid_token"' : 'Bearer realm="api"';
      response.writeHead(401, { 'www-authenticate': challenge, 'content-type': 'text/plain' });
      response.end('the api does not know this token\n');
      return;
    }
    const needed = /^\/needs\/([a-z]+)/.exec(request.url)?.[1];
    if (needed && !about.scope?.split(' ').includes(needed)) {
      const challenge = `Bearer realm="api", error="insufficient_scope", scope="${needed}"`;
      response.writeHead(403, { 'www-authenticate': challenge, 'content-type': 'text/plain' });
      response.end(`this token is not for ${needed}\n`);
      return;
    }
    world.api.authorized += 1;
    if (request.url.startsWith('/git/')) git(request, response, gitRoot);
    else if (request.url.startsWith('/numbered/')) numbered(response, Number(request.url.split('/')[2]));
    else if (request.url.startsWith('/quick')) response.end('quick\n');
    else if (EVENTS.has(request.url)) listen(request, response, world);
    else echo(request, response, { token, about, ...body ?? await digest(request) });
  }

  async function judge(request) {
    const token = bearer(request);
    if (request.url.startsWith('/quick')) return { token, about: remembered(request.url, token) };
    return { token, about: token ? await introspect(token) : { active: false } };
  }

  // Under load the provider's memory is asked, which is in this process, and not the provider.
  function remembered(path, token) {
    const row = world.accessToken(token);
    world.ledger.shown(path, row);
    return { active: row !== undefined && row.exp > Date.now() / 1000 };
  }

  function introspect(token) {
    return new Promise((resolve, reject) => {
      const body = new URLSearchParams({ token }).toString();
      const call = https.request({
        agent, ca, host: '127.0.0.1', port: authPort, servername: 'auth.test', method: 'POST', path: '/token/introspection',
        headers: { host: 'auth.test', authorization: INTROSPECTOR, 'content-type': 'application/x-www-form-urlencoded' },
      }, async (answer) => {
        let text = '';
        for await (const chunk of answer) text += chunk;
        if (answer.statusCode === 200) resolve(JSON.parse(text));
        else reject(new Error(`introspection answered ${answer.statusCode}: ${text}`));
      });
      call.on('error', reject).end(body);
    });
  }
}

function bearer(request) {
  return /^Bearer (.+)$/.exec(request.headers.authorization ?? '')?.[1];
}

// The names of its header fields, as often as they came.
function fields(request) {
  return request.rawHeaders.filter((_, index) => index % 2 === 0).map((name) => name.toLowerCase());
}

async function digest(request) {
  const hash = createHash('sha256');
  let length = 0;
  for await (const chunk of request) {
    hash.update(chunk);
    length += chunk.length;
  }
  return { bodyLength: length, bodySha256: hash.digest('hex') };
}

function echo(request, response, { token, about, ...body }) {
  const names = fields(request);
  response.setHeader('content-type', 'application/json');
  response.end(`${JSON.stringify({
    method: request.method,
    path: request.url,
    httpVersion: request.httpVersion,
    host: request.headers[':authority'] ?? request.headers.host,
    headers: names.filter((name) => !name.startsWith(':')),
    authorizations: names.filter((name) => name === 'authorization').length,
    token: createHash('sha256').update(token).digest('hex').slice(0, 16),
    sub: about.sub,
    ...body,
  })}\n`);
}

// Blocks of 64 KiB, each with its number in front, so that none can be missing, twice or in another's place unnoticed.
function numbered(response, length) {
  response.setHeader('content-length', length);
  Readable.from((function* blocks() {
    for (let number = 0; number * BLOCK < length; number += 1) {
      const block = Buffer.alloc(Math.min(BLOCK, length - number * BLOCK));
      block.writeUInt32BE(number);
      yield block;
    }
  })()).pipe(response);
}

// Git's own smart HTTP server, over CGI (RFC 3875).
function git(request, response, root) {
  const url = new URL(request.url, 'https://api.test');
  const backend = spawn('git', ['http-backend'], {
    stdio: ['pipe', 'pipe', 'inherit'],
    env: {
      PATH: process.env.PATH,
      GIT_PROJECT_ROOT: root,
      GIT_HTTP_EXPORT_ALL: '1',
      GIT_PROTOCOL: request.headers['git-protocol'] ?? '',
      REQUEST_METHOD: request.method,
      PATH_INFO: url.pathname.slice('/git'.length),
      QUERY_STRING: url.search.slice(1),
      CONTENT_TYPE: request.headers['content-type'] ?? '',
      HTTP_CONTENT_ENCODING: request.headers['content-encoding'] ?? '',
    },
  });
  backend.stdin.on('error', () => {});
  request.pipe(backend.stdin);
  let head = Buffer.alloc(0);
  const readHead = (chunk) => {
    head = Buffer.concat([head, chunk]);
    const end = head.indexOf('\r\n\r\n');
    if (end < 0) return;
    backend.stdout.off('data', readHead);
    for (const line of head.subarray(0, end).toString().split('\r\n')) {
      const [name, value] = line.split(/: */);
      if (name === 'Status') response.statusCode = parseInt(value, 10);
      else response.setHeader(name, value);
    }
    response.write(head.subarray(end + 4));
    backend.stdout.pipe(response);
  };
  backend.stdout.on('data', readHead);
}
