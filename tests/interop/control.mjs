// How the tests talk to the servers: plain HTTP on loopback, which clients send past the proxy.

import { announce, fallSilent } from './events.mjs';

export function createControl(world) {
  const actions = {
    'GET /report': () => world.report(),
    'GET /issued': () => [...world.issued],
    'GET /ledger': () => world.ledger.report(),
    'POST /reset': () => world.reset(),
    'POST /revoke': () => world.revokeAccessTokens(),
    'POST /revoke-connections': () => world.revokeConnections(),
    'POST /set': (wish) => { Object.assign(world, wish); },
    'POST /hold': ({ count }) => world.holdRequests(count),
    'POST /keep-answers': () => world.keepAnswers(),
    'POST /let-go': () => world.kept?.release(),
    'POST /kill': (wish) => { world.kill = wish; },
    'POST /entrance': () => world.entrance(),
    'POST /announce': (event) => announce(world, event),
    'POST /fall-silent': () => fallSilent(world),
    'POST /refresh-token': ({ client, scope, user }) => world.mint(client, scope, user),
  };
  return async (request, response) => {
    let text = '';
    for await (const chunk of request) text += chunk;
    const action = actions[`${request.method} ${request.url}`];
    if (!action) {
      response.writeHead(404).end();
      return;
    }
    const result = await action(text ? JSON.parse(text) : {});
    response.setHeader('content-type', 'application/json');
    response.end(JSON.stringify(result ?? null));
  };
}
