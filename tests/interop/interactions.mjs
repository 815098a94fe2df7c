// The pages that a person meets at the provider: log in, consent, and the code of a device. They load nothing from elsewhere.

import { parse } from 'node:querystring';

export function interactions(provider, world) {
  return async (ctx, next) => {
    if (!ctx.path.startsWith('/interaction/')) return next();
    const details = await provider.interactionDetails(ctx.req, ctx.res);
    if (ctx.method === 'GET') {
      ctx.body = details.prompt.name === 'login' ? loginPage() : consentPage(details.params);
      return undefined;
    }
    const form = parse(await read(ctx.req));
    const result = await decided(form, details, provider, world);
    ctx.status = 303;
    ctx.redirect(await provider.interactionResult(ctx.req, ctx.res, result));
    return undefined;
  };
}

async function decided(form, { prompt, params, session, grantId }, provider, world) {
  if (form.decision === 'refuse') return { error: 'access_denied', error_description: world.refusal };
  // Whoever one says one is.
  if (prompt.name === 'login') return { login: { accountId: form.login } };
  const grant = await provider.Grant.find(grantId)
    ?? new provider.Grant({ accountId: session.accountId, clientId: params.client_id });
  grant.addOIDCScope((prompt.details.missingOIDCScope ?? []).join(' '));
  for (const [resource, scopes] of Object.entries(prompt.details.missingResourceScopes ?? {})) {
    grant.addResourceScope(resource, scopes.join(' '));
  }
  return { consent: { grantId: await grant.save() } };
}

async function read(request) {
  let text = '';
  for await (const chunk of request) text += chunk;
  return text;
}

function loginPage() {
  return page('Log in', '<form method="post"><label>Login <input name="login" required autofocus></label> <button>Log in</button></form>');
}

function consentPage({ client_id: client, scope }) {
  const scopes = scope.split(' ').map((one) => `<li>${escaped(one)}</li>`).join('');
  return page(`May ${escaped(client)} act for you?`, `<ul>${scopes}</ul>
    <form method="post">
      <button name="decision" value="allow">Allow</button>
      <button name="decision" value="refuse">Refuse</button>
    </form>`);
}

// The provider writes the form, with what it needs to know it again.
export const devicePages = {
  userCodeInputSource: (ctx, form, _, error) => {
    ctx.body = page('Enter the code of your device', `${error ? `<p>${escaped(error.message)}</p>` : ''}
      <label for="code">Code</label>
      ${form.replace('type="text"', 'type="text" id="code"')}
      <button form="op.deviceInputForm">Continue</button>`);
  },
  userCodeConfirmSource: (ctx, form, client, _, code) => {
    ctx.body = page(`Does your device show ${escaped(code)}?`, `${form}
      <button form="op.deviceConfirmForm">It does</button>
      <button form="op.deviceConfirmForm" name="abort" value="yes">It does not</button>`);
  },
  successSource: (ctx) => { ctx.body = page('Your device is connected', ''); },
};

// Where the browser would be sent next: for the tests that take the address elsewhere, or change it.
export function pausePage(location) {
  return page('Ready to go back', `<a id="onward" href="${escaped(location)}">Go back</a>`);
}

export function page(title, body) {
  return `<!doctype html><html lang="en"><meta charset="utf-8"><title>${title}</title>
    <style>body { font: 16px/1.5 sans-serif; max-width: 30rem; margin: 3rem auto }</style>
    <h1>${title}</h1>${body}</html>`;
}

function escaped(text) {
  return String(text).replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}
