// undici 8, which shares no dispatcher with Node 22.

import { request } from 'undici8';

import { callUrl, eventsUrl, good, takeTurns } from './turns.mjs';

await takeTurns(
  async () => {
    const { statusCode, body } = await request(callUrl);
    good(statusCode);
    return body.text();
  },
  async () => (await request(eventsUrl)).body,
);
