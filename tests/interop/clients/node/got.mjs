// got.

import got from 'got';

import { callUrl, eventsUrl, takeTurns } from './turns.mjs';

await takeTurns(() => got(callUrl, { retry: { limit: 0 } }).text(), () => got.stream(eventsUrl));
