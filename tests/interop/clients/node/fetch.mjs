// Node's own fetch.

import { callUrl, eventsUrl, good, takeTurns } from './turns.mjs';

await takeTurns(
  async () => {
    const answer = await fetch(callUrl);
    good(answer.status);
    return answer.text();
  },
  async () => (await fetch(eventsUrl)).body,
);
