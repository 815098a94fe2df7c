// The authorization server: the certified `oidc-provider`, strict about rotation and about form-urlencoded credentials.

import { generateKeyPairSync } from 'node:crypto';

import { Provider } from 'oidc-provider';

import { devicePages, interactions, pausePage } from './interactions.mjs';
import { send, stopped } from './state.mjs';

export const ISSUER = 'https://auth.test';
const GRANT_TYPES = ['authorization_code', 'refresh_token', 'client_credentials'];
const DEVICE_CODE = 'urn:ietf:params:oauth:grant-type:device_code';

// Every character here means something else when RFC 6749 2.3.1's form-urlencoding is left out.
const ODD = { client_id: 'agent:7 +%41&=', client_secret: 'p%2B: +&="/?#\\~' };
const CLIENTS = [
  { client_id: 'basic', client_secret: 'basic-canary-secret-5f1c', token_endpoint_auth_method: 'client_secret_basic' },
  { client_id: 'post', client_secret: 'post-canary-secret-77ab', token_endpoint_auth_method: 'client_secret_post' },
  { ...ODD, token_endpoint_auth_method: 'client_secret_basic' },
  { client_id: 'public', token_endpoint_auth_method: 'none', grant_types: ['authorization_code', 'refresh_token'] },
  { client_id: 'api', client_secret: 'api-secret', token_endpoint_auth_method: 'client_secret_basic' },
  { client_id: 'app', ...onLoopback(), token_endpoint_auth_method: 'none' },
  { client_id: 'vault', client_secret: 'vault-canary-secret-b20e', ...onLoopback(), token_endpoint_auth_method: 'client_secret_basic' },
];

// RFC 8252 7.3: any port will do.
function onLoopback() {
  return {
    application_type: 'native',
    grant_types: ['authorization_code', 'refresh_token', DEVICE_CODE],
    redirect_uris: ['http://127.0.0.1/callback', 'http://127.0.0.1/callback/main'],
  };
}

export async function createProvider(world) {
  const provider = new Provider(ISSUER, configuration(world));
  watch(provider, world);
  provider.use(whims(world));
  provider.use(interactions(provider, world));
  world.mint = (clientId, scope, user) => mint(provider, clientId, scope, user);
  const handle = provider.callback();
  return (request, response) => {
    if (!world.rfc8414 && request.url === '/.well-known/oauth-authorization-server') {
      response.writeHead(404).end();
      return;
    }
    if (request.url === '/token') {
      world.lastTokenRequest = { authorization: (request.headers.authorization ?? '').split(' ')[0] };
      // Now: the socket of a caller that dies no longer knows it.
      request.entrance = request.socket.localPort;
      const { kill } = world;
      if (kill && (kill.entrance ?? request.entrance) === request.entrance) killAround(response, world);
      if (world.kept) keepBack(response, world.kept);
    }
    handle(request, response);
  };
}

function configuration(world) {
  const signing = generateKeyPairSync('ec', { namedCurve: 'P-256' }).privateKey.export({ format: 'jwk' });
  return {
    adapter: (model) => new Rows(model, world),
    clients: CLIENTS.map((client) => ({
      grant_types: GRANT_TYPES,
      response_types: ['code'],
      redirect_uris: ['https://agent.test/callback'],
      id_token_signed_response_alg: 'ES256',
      ...client,
    })),
    jwks: { keys: [{ ...signing, alg: 'ES256', use: 'sig' }] },
    cookies: { keys: ['signs the cookies of a provider that lives for one test run'] },
    pkce: { required: () => true },
    scopes: ['openid', 'offline_access', 'read', 'write', 'delete'],
    features: {
      clientCredentials: { enabled: true },
      deviceFlow: { enabled: true, ...devicePages },
      devInteractions: { enabled: false },
      introspection: { enabled: true, allowedPolicy: () => true },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => undefined,
        getResourceServerInfo: () => ({ scope: 'read write', accessTokenFormat: 'opaque' }),
        useGrantedResource: () => true,
      },
      revocation: { enabled: true, allowedPolicy: () => true },
    },
    findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
    // Always: a refresh token is good once, and its second use revokes the whole family, unless a test has it otherwise.
    rotateRefreshToken: true,
    ttl: {
      AccessToken: () => world.ttl,
      ClientCredentials: () => world.ttl,
      Grant: () => 86400,
      IdToken: () => 3600,
      Interaction: () => 3600,
      RefreshToken: () => 86400,
      Session: () => 3600,
    },
  };
}

// What a test may ask for, done to an answer that is otherwise the provider's own.
function whims(world) {
  return async (ctx, next) => {
    await next();
    if (ctx.path === '/token' && ctx.body?.error === 'authorization_pending' && world.slowDowns > 0) {
      world.slowDowns -= 1;
      ctx.body = { error: 'slow_down', error_description: 'asked too often' };
    }
    if (ctx.path === '/device/auth' && ctx.status === 200) ctx.body = { ...ctx.body, interval: 1 };
    if (ctx.status !== 303) return;
    const location = new URL(ctx.response.get('location'), ISSUER);
    if (location.pathname.startsWith('/interaction/') && world.detour) {
      ctx.redirect(`https://login.test/?${new URLSearchParams({ onward: location.href })}`);
    }
    if (!location.pathname.startsWith('/callback')) return;
    if (world.iss === null) location.searchParams.delete('iss');
    else if (world.iss) location.searchParams.set('iss', world.iss);
    ctx.redirect(location.href);
    if (world.pause) {
      ctx.status = 200;
      ctx.body = pausePage(location.href);
    }
  };
}

function watch(provider, world) {
  const count = (table, name) => { table[name ?? 'none'] = (table[name ?? 'none'] ?? 0) + 1; };
  const seen = (ctx) => {
    // The form as it was sent: the provider's own `params` leave out what it does not know, such as `audience`.
    const { client_secret: secret, refresh_token: _, ...form } = ctx.oidc.body ?? {};
    count(world.token.calls, form.grant_type);
    if (form.code_verifier) world.issued.add(form.code_verifier);
    if (form.grant_type === DEVICE_CODE) world.polls.push(Date.now() / 1000);
    Object.assign(world.lastTokenRequest, { form, secretInBody: secret !== undefined });
    return form.grant_type;
  };
  provider.on('grant.success', (ctx) => {
    count(world.token.granted, seen(ctx));
    world.ledger.used(ctx, 'granted');
  });
  provider.on('grant.error', (ctx, error) => {
    seen(ctx);
    count(world.token.errors, error.error);
    world.ledger.used(ctx, error.error);
  });
  provider.on('grant.revoked', (ctx, grantId) => {
    world.revokedGrants += 1;
    world.ledger.revoked(ctx, grantId);
  });
  provider.on('server_error', (_, error) => console.error(error));
}

// What a user's consent with `offline_access` leaves behind, without the browser.
async function mint(provider, clientId, scope, user) {
  const client = await provider.Client.find(clientId);
  const grant = new provider.Grant({ accountId: user, clientId });
  grant.addOIDCScope(scope);
  const grantId = await grant.save();
  const token = new provider.RefreshToken({
    accountId: user, client, grantId, scope, gty: 'authorization_code', rotations: 0, authTime: Math.floor(Date.now() / 1000),
  });
  return token.save();
}

// Kills the caller, or stops it, on one side or the other of the answer that carries its rotated refresh token.
function killAround(response, world) {
  const { pid, signal = 'SIGKILL', beforeAnswer, microseconds = 0 } = world.kill;
  world.kill = null;
  if (beforeAnswer) {
    const { end } = response;
    response.end = (...answer) => {
      send(pid, signal);
      if (signal === 'SIGKILL') return end.apply(response, answer);
      stopped(pid).then(() => end.apply(response, answer));
      return response;
    };
  } else {
    response.once('finish', () => world.killLater(pid, signal, microseconds));
  }
}

// Holds the answer back until the test lets it go: what it says is committed here, and not yet known to the caller.
function keepBack(response, kept) {
  const { end } = response;
  response.end = (...answer) => {
    kept.count += 1;
    kept.open.then(() => end.apply(response, answer));
    return response;
  };
}

// The provider's storage: a map that tests can look into and revoke from.
class Rows {
  constructor(model, world) {
    this.model = model;
    this.world = world;
  }

  key(id) {
    return `${this.model}:${id}`;
  }

  async upsert(id, payload) {
    this.world.rows.set(this.key(id), payload);
    this.world.saved(this.model, id, payload);
  }

  async find(id) {
    const row = this.world.rows.get(this.key(id));
    return this.world.reuse === 'refuse' && row?.consumed ? undefined : row;
  }

  async consume(id) {
    const row = this.world.rows.get(this.key(id));
    // Two redemptions that overtake each other both pass the provider's own check; here they are seen.
    if (row.consumed) this.world.redeemedTwice += 1;
    if (this.world.reuse !== 'grant') row.consumed = Math.floor(Date.now() / 1000);
    this.world.ledger.consumed(id);
  }

  async destroy(id) {
    this.world.rows.delete(this.key(id));
  }

  async revokeByGrantId(grantId) {
    for (const [key, row] of this.world.rows) {
      if (row.grantId === grantId) this.world.rows.delete(key);
    }
  }

  async findByUid(uid) {
    return this.where((row) => row.uid === uid);
  }

  async findByUserCode(userCode) {
    return this.where((row) => row.userCode === userCode);
  }

  where(condition) {
    for (const [key, row] of this.world.rows) {
      if (key.startsWith(`${this.model}:`) && condition(row)) return row;
    }
    return undefined;
  }
}
