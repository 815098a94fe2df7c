// The API's server-sent events: each is sent only when a test says so, to whoever listens then.

export function listen(request, response, world) {
  response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' });
  // Nothing but the head has been sent, and it must arrive.
  response.flushHeaders?.();
  world.listeners.add(response);
  response.on('close', () => world.listeners.delete(response));
}

export function announce(world, { event, data }) {
  const named = event ? `event: ${event}\n` : '';
  for (const response of world.listeners) response.write(`${named}data: ${data}\n\n`);
}

export function fallSilent(world) {
  for (const response of world.listeners) response.end();
}
