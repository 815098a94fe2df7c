// node:https.

import https from 'node:https';

import { callUrl, eventsUrl, good, takeTurns } from './turns.mjs';

const get = (url) => new Promise((resolve, reject) => { https.get(url, resolve).on('error', reject); });

await takeTurns(
  async () => {
    const answer = await get(callUrl);
    good(answer.statusCode);
    return Buffer.concat(await answer.toArray()).toString();
  },
  () => get(eventsUrl),
);
