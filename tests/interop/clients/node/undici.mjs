// undici from npm.

import { request } from 'undici';

import { callUrl, eventsUrl, good, takeTurns } from './turns.mjs';

await takeTurns(
  async () => {
    const { statusCode, body } = await request(callUrl);
    good(statusCode);
    return body.text();
  },
  async () => (await request(eventsUrl)).body,
);
