// Anthropic's SDK.

import Anthropic from '@anthropic-ai/sdk';

import { takeTurns } from './turns.mjs';

const client = new Anthropic({ maxRetries: 0 });

await takeTurns(
  async () => (await client.models.list().asResponse()).text(),
  async function* events() {
    const messages = [{ role: 'user', content: 'count' }];
    for await (const event of await client.messages.create({ model: 'any', max_tokens: 9, messages, stream: true })) {
      yield event.delta.text;
    }
  },
);
