// OpenAI's SDK.

import OpenAI from 'openai';

import { takeTurns } from './turns.mjs';

const client = new OpenAI({ maxRetries: 0 });

await takeTurns(
  async () => (await client.models.list().asResponse()).text(),
  async function* events() {
    const messages = [{ role: 'user', content: 'count' }];
    for await (const chunk of await client.chat.completions.create({ model: 'any', messages, stream: true })) {
      yield chunk.choices[0].delta.content;
    }
  },
);
