// Node's own fetch, as an agent uses it: it finds the proxy by NODE_USE_ENV_PROXY alone.

const answer = await fetch(process.argv[2]);
if (!answer.ok) throw new Error(`answered ${answer.status}`);
process.stdout.write(await answer.text());
console.log('spoke 1.1');
