// Server-sent events read as an agent reads them, with fetch or with EventSource. Runs what standard input says, a line
// of JSON each, and says on standard output what came of it.

import { createInterface } from 'node:readline';

const inbox = [];
let waiting;
let stop;
const arrived = (data) => { inbox.push(data); waiting?.(); };

const steps = {
  async fetch({ url }) {
    const controller = new AbortController();
    stop = () => controller.abort();
    const answer = await fetch(url, { signal: controller.signal });
    // It fails when it is hung up; whoever asks for more then waits in vain, and is seen to.
    read(answer.body.pipeThrough(new TextDecoderStream())).catch(() => {});
    return { status: answer.status, type: answer.headers.get('content-type') };
  },
  async eventSource({ url }) {
    const source = new EventSource(url);
    stop = () => source.close();
    source.addEventListener('message', ({ data }) => arrived(data));
    await new Promise((resolve, reject) => { source.onopen = resolve; source.onerror = reject; });
    return { status: 200, type: 'text/event-stream' };
  },
  async next() {
    while (inbox.length === 0) await new Promise((resolve) => { waiting = resolve; });
    return { data: inbox.shift() };
  },
  hangUp() { stop(); },
};

async function read(pieces) {
  for await (const piece of pieces) {
    for (const [, data] of piece.matchAll(/^data: (.*)\n\n/gm)) arrived(data);
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const { do: step, ...options } = JSON.parse(line);
  process.stdout.write(`${JSON.stringify(await steps[step](options) ?? {})}\n`);
}
process.exit(0);
