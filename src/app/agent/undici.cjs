// Has undici 8 from npm send its requests by the dispatcher that Node has. Left to itself it makes one that knows no proxy,
// and Node's own `fetch` takes that one from then on.
//
// Node before 26 brings an older undici, whose dispatchers tell of an answer in other words: those of a handler's version 1.
'use strict';

const OLDER = Symbol.for('undici.globalDispatcher.1');
const NEWER = Symbol.for('undici.globalDispatcher.2');

// Node has its dispatcher only when it has loaded what comes first, as this does. Whoever sets one of their own replaces ours.
if (!(NEWER in globalThis)) {
  let ours;
  const get = () => ours || (ours = globalThis[OLDER] && withHandlers(globalThis[OLDER]));
  const set = (theirs) => { ours = theirs; };
  Object.defineProperty(globalThis, NEWER, { configurable: true, get, set });
}

// The same dispatcher, for handlers of either version.
function withHandlers(older) {
  const dispatch = (options, handler) => older.dispatch(options, handler.onRequestStart ? new Handler(handler) : handler);
  return Object.create(older, { dispatch: { value: dispatch, configurable: true, writable: true } });
}

// Told of an answer by a dispatcher of version 1, it tells a handler of version 2.
class Handler {
  constructor(handler) {
    this.handler = handler;
  }

  onConnect(abort, context) {
    this.controller = new Controller(abort);
    this.handler.onRequestStart(this.controller, context);
  }

  onUpgrade(status, rawHeaders, socket) {
    this.controller.rawHeaders = rawHeaders;
    this.handler.onRequestUpgrade(this.controller, status, fields(rawHeaders), socket);
  }

  onHeaders(status, rawHeaders, goOn, reason) {
    Object.assign(this.controller, { rawHeaders, goOn });
    this.handler.onResponseStart(this.controller, status, fields(rawHeaders), reason);
    return !this.controller.paused;
  }

  onData(chunk) {
    this.handler.onResponseData(this.controller, chunk);
    return !this.controller.paused;
  }

  onComplete(rawTrailers) {
    this.controller.rawTrailers = rawTrailers;
    this.handler.onResponseEnd(this.controller, fields(rawTrailers || []));
  }

  onError(error) {
    this.handler.onResponseError(this.controller, error);
  }

  onBodySent(chunk) {
    if (this.handler.onBodySent) this.handler.onBodySent(chunk);
  }

  onRequestSent() {
    if (this.handler.onRequestSent) this.handler.onRequestSent();
  }

  onResponseStarted() {
    if (this.handler.onResponseStarted) this.handler.onResponseStarted();
  }
}

// How a handler of version 2 holds back or ends its answer.
class Controller {
  constructor(end) {
    Object.assign(this, { end, paused: false, aborted: false, reason: null, rawHeaders: null, rawTrailers: null });
  }

  pause() {
    this.paused = true;
  }

  resume() {
    if (!this.paused) return;
    this.paused = false;
    if (this.goOn) this.goOn();
  }

  abort(reason) {
    if (this.aborted) return;
    Object.assign(this, { aborted: true, reason });
    this.end(reason);
  }
}

function fields(raw) {
  const found = {};
  for (let at = 0; at < raw.length; at += 2) {
    const name = raw[at].toString().toLowerCase();
    const value = raw[at + 1].toString();
    found[name] = name in found ? [].concat(found[name], value) : value;
  }
  return found;
}
