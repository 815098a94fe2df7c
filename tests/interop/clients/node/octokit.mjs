// GitHub's SDK.

import { Octokit } from 'octokit';

import { takeTurns } from './turns.mjs';

const octokit = new Octokit({ auth: process.env.GH_TOKEN, retry: { enabled: false } });

await takeTurns(
  async () => JSON.stringify((await octokit.request('GET /echo')).data),
  async () => (await octokit.request('GET /events', { request: { parseSuccessResponseBody: false } })).data,
);
