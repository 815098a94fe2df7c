// What every client does: calls, waits to be told that its token is revoked, calls again, and reads a stream as it comes.

import { once } from 'node:events';

export const [callUrl, eventsUrl] = process.argv.slice(2);

export async function takeTurns(call, events) {
  console.log((await call()).trim());
  await once(process.stdin, 'data');
  process.stdin.destroy();
  console.log((await call()).trim());
  for await (const chunk of await events()) console.log(typeof chunk === 'string' ? chunk : Buffer.from(chunk).toString());
}

export function good(status) {
  if (status !== 200) throw new Error(`answered ${status}`);
}
