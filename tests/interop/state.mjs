// What the servers have seen, and how the tests have told them to behave.

import { readdirSync, readFileSync } from 'node:fs';
import { Worker } from 'node:worker_threads';

import { Ledger } from './ledger.mjs';

const SECRET_MODELS = new Set(['AccessToken', 'AuthorizationCode', 'ClientCredentials', 'DeviceCode', 'RefreshToken']);
const ACCESS_MODELS = ['AccessToken', 'ClientCredentials'];
const USER_MODELS = ['AccessToken', 'RefreshToken'];

export class World {
  constructor() {
    this.rows = new Map(); // `Model:id` -> payload, the provider's whole memory
    this.issued = new Set(); // every token, code and PKCE verifier there ever was
    this.ledger = new Ledger();
    this.killer = null;
    this.websockets = new Set(); // those that are open
    this.listeners = new Set(); // answers that send events
    this.reset();
  }

  reset() {
    this.ttl = 3600;
    this.rfc8414 = true;
    this.pause = false; // whether to show where the browser would go next, in place of sending it there
    this.iss = undefined; // in place of our own in an authorization response; null leaves it out
    this.refusal = 'the user said no'; // the description that comes with access_denied
    this.detour = false; // whether the login page is at another host
    this.slowDowns = 0; // how many polls of a device to answer with slow_down in place of authorization_pending
    this.polls = []; // seconds at which a device asked for its token
    this.kill = null; // whom to send a signal around the answer to a token request, and when
    this.reuse = 'revoke'; // or `refuse`, or `grant`: what a second use of a refresh token comes to
    this.ledger.clear();
    this.hold?.release();
    this.hold = null;
    this.kept?.release();
    this.kept = null;
    this.token = { calls: {}, granted: {}, errors: {} };
    this.lastTokenRequest = null;
    this.revokedGrants = 0;
    this.redeemedTwice = 0;
    this.api = { requests: 0, authorized: 0, refused: 0, held: 0 };
    for (const socket of this.websockets) socket.terminate();
    for (const answer of this.listeners) answer.destroy();
    this.closes = []; // how WebSockets ended: code and reason
    this.pings = 0;
    this.visits = 0; // connections to the stranger
    this.authorizations = new Set(); // how many Authorization fields requests came with
    this.tries = new Map(); // X-Request-Id -> how often that request arrived
  }

  report() {
    const most = Math.max(0, ...this.tries.values());
    const { token, lastTokenRequest, revokedGrants, redeemedTwice, polls, api, closes, pings, visits } = this;
    return {
      token, kept: this.kept?.count ?? 0, lastTokenRequest, revokedGrants, redeemedTwice, polls, api, closes, pings, visits,
      authorizations: [...this.authorizations],
      tries: { requests: this.tries.size, most },
      open: { websockets: this.websockets.size, events: this.listeners.size },
    };
  }

  saved(model, id, payload) {
    if (SECRET_MODELS.has(model)) this.issued.add(id);
    if (model === 'RefreshToken') this.ledger.issued(id, payload);
  }

  revokeAccessTokens() {
    this.delete(ACCESS_MODELS);
  }

  // What a user does who takes the application's access back at the provider.
  revokeConnections() {
    this.delete(USER_MODELS);
  }

  delete(models) {
    for (const key of this.rows.keys()) {
      if (models.includes(key.split(':')[0])) this.rows.delete(key);
    }
  }

  // The next `count` API requests wait for one another, so that they all carry the same token.
  holdRequests(count) {
    const hold = { missing: count };
    hold.open = new Promise((resolve) => { hold.release = resolve; });
    this.hold = hold;
    this.giveUp('hold');
  }

  // The token endpoint's answers wait from now on until they are let go.
  keepAnswers() {
    const kept = { count: 0 };
    kept.open = new Promise((resolve) => { kept.release = resolve; });
    this.kept = kept;
    this.giveUp('kept');
  }

  // A test that can never collect them all must fail by its own assertion, not hang: they go on, and are counted no more.
  giveUp(what) {
    const waiting = this[what];
    setTimeout(() => {
      waiting.release();
      if (this[what] === waiting) this[what] = null;
    }, 90_000).unref();
  }

  async heldTogether() {
    const { hold } = this;
    if (!hold || hold.missing === 0) return;
    hold.missing -= 1;
    this.api.held += 1;
    if (hold.missing === 0) hold.release();
    await hold.open;
  }

  // What is remembered of an access token, whether or not it has ended.
  accessToken(token) {
    for (const model of ACCESS_MODELS) {
      const row = this.rows.get(`${model}:${token}`);
      if (row) return row;
    }
    return undefined;
  }

  // `kill -9`, or another signal, microseconds from now, from a thread that waits without stopping the servers.
  killLater(pid, signal, microseconds) {
    if (microseconds === 0) {
      send(pid, signal);
      return;
    }
    this.killer ??= new Worker(
      `const { parentPort } = require('node:worker_threads');
       const never = new Int32Array(new SharedArrayBuffer(4));
       parentPort.on('message', ({ pid, signal, microseconds }) => {
         Atomics.wait(never, 0, 0, microseconds / 1000);
         try { process.kill(pid, signal); } catch {}
       });`,
      { eval: true },
    );
    this.killer.unref();
    this.killer.postMessage({ pid, signal, microseconds });
  }
}

// Whoever is gone already needs none.
export function send(pid, signal) {
  try {
    process.kill(pid, signal);
  } catch (error) {
    if (error.code !== 'ESRCH') throw error;
  }
}

// Waits until all its threads stand still: the first of them to see the signal tells the others.
export async function stopped(pid) {
  const stands = (thread) => /\) [TtZX]/.test(readFileSync(`/proc/${pid}/task/${thread}/stat`, 'latin1'));
  try {
    while (!readdirSync(`/proc/${pid}/task`).every(stands)) await new Promise((resolve) => { setTimeout(resolve, 1); });
  } catch (error) {
    if (!['ENOENT', 'ESRCH'].includes(error.code)) throw error;
  }
}
