// Brings Node programs under the proxy where Node does not: before 22.21, and in 24 before 24.5, neither `fetch` nor
// `node:https` looks at HTTPS_PROXY, and later ones leave out the agents that a program makes for itself.
//
// `exec` has every Node process load this first, by NODE_OPTIONS. A dispatcher of a program's own, or an agent that has its
// own way to connect, stays as it is. It is plain enough for a Node that is older still, which it must not stop from starting.
'use strict';

const http = require('http');
const https = require('https');
const net = require('net');
const tls = require('tls');

const DISPATCHER = Symbol.for('undici.globalDispatcher.1');
// Kept from before anybody wraps it: instruments and mocks of a program have no business in our CONNECT.
const { request } = http;

const [major, minor] = process.versions.node.split('.').map(Number);
const doneByNode = major > 24 || (major === 24 && minor >= 5) || (major === 22 && minor >= 21);
http.Agent.prototype.createConnection = through('http', 80, http.Agent.prototype.createConnection);
https.Agent.prototype.createConnection = through('https', 443, https.Agent.prototype.createConnection);
if (!doneByNode && globalThis.fetch) globalThis[DISPATCHER] = dispatcher();
require('./undici.cjs');

// An agent's way to connect, with a tunnel first where the host has a proxy.
function through(scheme, usual, direct) {
  return function createConnection(options, done) {
    // Without a callback the caller wants its socket at once, and a tunnel takes a moment.
    const wanted = options && typeof done === 'function' && !options.socketPath && !options.socket;
    // With `proxyEnv` an agent of Node's is on its way to the proxy already.
    const tunnelled = wanted && !(this && this.options && this.options.proxyEnv);
    const port = tunnelled && (options.port || usual);
    const proxy = tunnelled && proxyFor(scheme, options.host || 'localhost', port);
    if (!proxy) return direct.apply(this, arguments);
    tunnel(proxy, options.host || 'localhost', port, (error, socket) => {
      if (error) done(error);
      else done(null, scheme === 'https' ? direct.call(this, { ...options, socket }) : socket);
    });
  };
}

// What `fetch` sends its requests by; undici from npm shares it, up to its version 7.
function dispatcher() {
  // Whoever looks at this has Node load its own undici, which then has a dispatcher, and so a class to build on.
  void globalThis.Response;
  const direct = globalThis[DISPATCHER];
  class Through extends direct.constructor {
    dispatch(options, handler) {
      const { scheme, host, port } = target(new URL(options.origin));
      return proxyFor(scheme, host, port) ? super.dispatch(options, handler) : direct.dispatch(options, handler);
    }
  }
  return new Through({ connect });
}

function connect(options, done) {
  const { scheme, host, port } = target(options);
  tunnel(proxyFor(scheme, host, port), host, port, (error, socket) => {
    if (error || scheme === 'http') return done(error, socket);
    const servername = options.servername || (net.isIP(host) ? '' : host);
    const secured = tls.connect({ socket, host, servername, ALPNProtocols: ['http/1.1'] });
    const once = (error) => {
      const call = done;
      done = () => {};
      call(error, error ? undefined : secured);
    };
    secured.once('secureConnect', () => once(null)).on('error', once);
  });
}

function target({ protocol, hostname, port }) {
  const scheme = protocol.slice(0, -1);
  return { scheme, host: hostname.replace(/^\[|\]$/g, ''), port: port || (scheme === 'https' ? 443 : 80) };
}

// Hands over a connection to the host, once the proxy has opened it.
function tunnel(proxy, host, port, done) {
  const path = `${net.isIPv6(host) ? `[${host}]` : host}:${port}`;
  const headers = { host: path };
  if (proxy.username) {
    const credentials = `${decodeURIComponent(proxy.username)}:${decodeURIComponent(proxy.password)}`;
    headers['proxy-authorization'] = `Basic ${Buffer.from(credentials).toString('base64')}`;
  }
  const { host: address, port: listening } = target(proxy);
  const createConnection = () => net.connect({ host: address, port: listening, noDelay: true });
  const asked = request({ method: 'CONNECT', path, headers, createConnection });
  asked.once('error', done).once('connect', (answer, socket, head) => {
    if (answer.statusCode !== 200) {
      socket.destroy();
      return done(new Error(`the proxy answered ${answer.statusCode} to CONNECT ${path}`));
    }
    if (head.length) socket.unshift(head);
    done(null, socket);
  }).end();
}

// The proxy for a host. Read at each use, because a program may set its variables itself.
function proxyFor(scheme, host, port) {
  const { env } = process;
  const value = env[`${scheme}_proxy`] || env[`${scheme.toUpperCase()}_PROXY`];
  if (!value || excepted((env.no_proxy || env.NO_PROXY || '').toLowerCase(), host.toLowerCase(), port)) return null;
  return new URL(value.includes('://') ? value : `http://${value}`);
}

// As curl reads NO_PROXY: a name stands for what is under it too, and may have a port.
function excepted(list, host, port) {
  return list.split(/[\s,]+/).some((entry) => {
    const [, named, only] = /^(?:\*?\.)?(\[.*\]|[^:]*)(?::(\d+))?$/.exec(entry) || [null, entry];
    const name = named.replace(/^\[|\]$/g, '');
    const covers = name === '*' || (name && (host === name || host.endsWith(`.${name}`)));
    return covers && (!only || Number(only) === Number(port));
  });
}
