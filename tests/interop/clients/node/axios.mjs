// axios.

import axios from 'axios';

import { callUrl, eventsUrl, takeTurns } from './turns.mjs';

await takeTurns(
  async () => (await axios.get(callUrl, { responseType: 'text', transformResponse: (text) => text })).data,
  async () => (await axios.get(eventsUrl, { responseType: 'stream' })).data,
);
