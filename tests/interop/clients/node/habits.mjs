// What programs do beside plain calls, each on its own, with the undici that is named; prints what came of each as JSON.

import { execFile } from 'node:child_process';
import http from 'node:http';
import https from 'node:https';
import net from 'node:net';
import { promisify } from 'node:util';
import { Worker } from 'node:worker_threads';

const { fetch: ours, getGlobalDispatcher, request: theirs } = await import(process.argv[2]);

const API = 'https://api.test/echo';
const PLAIN = 'http://plain.test/echo';
const later = (value) => new Promise((resolve) => { setTimeout(resolve, 1, value); });
const get = (from, url, options = {}) => new Promise((resolve, reject) => {
  const call = from.get(url, options, async (answer) => {
    await answer.toArray();
    resolve({ status: answer.statusCode, reused: call.reusedSocket });
  });
  call.on('error', reject);
});

const habits = {
  async anAgentOfItsOwnKeepsItsConnection() {
    const agent = new https.Agent({ keepAlive: true });
    return [await get(https, API, { agent }), await get(https, API, { agent })];
  },
  async noAgentAtAll() { return get(https, API, { agent: false }); },
  async anAgentWithItsOwnWayToConnect() {
    let asked = 0;
    const agent = new https.Agent();
    agent.createConnection = () => { asked += 1; return net.connect({ path: '/nowhere' }); };
    return [await failure(get(https, API, { agent })), asked];
  },
  async aDispatcherOfItsOwn() {
    const dispatcher = { dispatch() { throw new Error('mine was asked'); } };
    return [await failure(fetch(API, { dispatcher })), await failure(ours(API, { dispatcher })), await failure(theirs(API, { dispatcher }))];
  },
  async theDispatcherOfAllWithMoreAroundIt() {
    const dispatcher = getGlobalDispatcher().compose((dispatch) => (options, handler) => dispatch(options, handler));
    return (await theirs(API, { dispatcher })).statusCode;
  },
  async manyAtOnce() {
    const answers = await Promise.all(Array.from({ length: 50 }, () => fetch(API).then((answer) => answer.json())));
    return answers.filter(({ authorizations }) => authorizations === 1).length;
  },
  async withoutTls() {
    return [(await fetch(PLAIN)).status, (await get(http, PLAIN)).status, (await get(http, PLAIN, { agent: new http.Agent() })).status];
  },
  async pastTheProxy() {
    const server = http.createServer((_, response) => response.end('direct')).listen(0, '127.0.0.1');
    await new Promise((resolve) => { server.once('listening', resolve); });
    const url = `http://localhost:${server.address().port}/`;
    const answers = [await (await fetch(url)).text(), (await get(http, url)).status];
    server.close().closeAllConnections();
    return answers;
  },
  async withoutTlsToAHostThatNoRouteNames() {
    const seen = [];
    const server = http.createServer((request, response) => { seen.push(request.url); response.end(); }).listen(0, '127.0.0.1');
    await new Promise((resolve) => { server.once('listening', resolve); });
    const script = `require('http').get('http://127.0.0.1:${server.address().port}/', (answer) => answer.resume())`;
    await promisify(execFile)(process.execPath, ['--no-warnings', '-e', script], { env: { ...process.env, no_proxy: '', NO_PROXY: '' } });
    server.close().closeAllConnections();
    return seen;
  },
  async aLongAnswer() {
    let length = 0;
    // A reader that is slower than what comes has it held back.
    for await (const piece of (await theirs('https://api.test/numbered/9000000')).body) length += await later(piece.length);
    return length;
  },
  async aBody() {
    const answer = await fetch(API, { method: 'POST', body: 'x'.repeat(300_000) });
    return (await answer.json()).bodyLength;
  },
  async aWorker() {
    const worker = new Worker("fetch(require('worker_threads').workerData).then(({ status }) => require('worker_threads').parentPort.postMessage(status))", { eval: true, workerData: API });
    return new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject));
  },
  async aChild() {
    const script = `fetch('${API}').then(({ status }) => console.log(status))`;
    return (await promisify(execFile)(process.execPath, ['--no-warnings', '-e', script])).stdout.trim();
  },
  async aHostThatIsNotThere() { return [await failure(fetch('https://nowhere.test/')), await failure(get(https, 'https://nowhere.test/'))]; },
  // Last, since it changes what all of them look at.
  async variablesOfItsOwn() {
    process.env.no_proxy = process.env.NO_PROXY = 'other.example,.test';
    return [await failure(get(https, API, { agent: new https.Agent() })), await failure(fetch(API))];
  },
};

async function failure(call) {
  try {
    await call;
    return null;
  } catch (error) {
    return (error.cause ?? error).message;
  }
}

for (const [name, habit] of Object.entries(habits)) {
  process.stdout.write(`${JSON.stringify({ [name]: await habit() })}\n`);
}
process.exit(0);
