// What the provider and the API write down of a fleet: every use of a refresh token, and every access token past its end.

export class Ledger {
  constructor() {
    this.tokens = new Map(); // refresh token -> whose it is, and its place in its family
    this.families = new Map(); // grant -> user
    this.clear();
  }

  clear() {
    this.beginning = wallAtZero();
    this.commits = new Map(); // refresh token -> when it was exchanged for another
    this.uses = []; // of refresh tokens, in order
    this.revocations = []; // of families
    this.expired = []; // access tokens that the API was shown after their end
    this.mistaken = 0; // requests that came with another user's token
  }

  report() {
    const { uses, revocations, expired, mistaken } = this;
    return { uses, revocations, expired, mistaken };
  }

  // Microseconds since 1970, as the sidecars' log lines have them.
  now() {
    return Math.round((this.beginning + performance.now()) * 1000);
  }

  issued(token, { accountId, grantId, rotations }) {
    this.tokens.set(token, { user: accountId, family: grantId, rotation: rotations ?? 0 });
    this.families.set(grantId, accountId);
  }

  // From here on the provider takes it for stolen when it comes again.
  consumed(token) {
    this.commits.set(token, this.now());
  }

  used(ctx, outcome) {
    const token = ctx.oidc.body?.refresh_token;
    if (token === undefined) return;
    const known = this.tokens.get(token) ?? { user: null, family: null, rotation: null };
    const committed = outcome === 'granted' ? this.commits.get(token) : null;
    this.uses.push({ ...known, outcome, at: this.now(), committed, entrance: ctx.req.entrance });
  }

  revoked(ctx, grantId) {
    this.revocations.push({ user: this.families.get(grantId), family: grantId, by: ctx.path, at: this.now() });
  }

  // What a request that names its user in its path came with.
  shown(path, row) {
    const [, , user, sidecar] = path.split('/');
    if (!row || !user) return;
    if (row.accountId !== user) this.mistaken += 1;
    const late = Date.now() / 1000 - row.exp;
    if (late >= 0) this.expired.push({ user, sidecar, late, at: this.now() });
  }
}

// What the wall says when `performance.now()` is 0, to some microseconds: the start of a millisecond is waited for.
function wallAtZero() {
  const before = Date.now();
  for (;;) {
    const wall = Date.now();
    if (wall !== before) return wall - performance.now();
  }
}
