"""aiohttp, which looks at proxies only with `trust_env`."""

import asyncio
import sys

import aiohttp

call_url, events_url = sys.argv[1:]


async def call(session):
    async with session.get(call_url, raise_for_status=True) as answer:
        print((await answer.text()).strip(), flush=True)


async def main():
    async with aiohttp.ClientSession(trust_env=True) as session:
        await call(session)
        input()
        await call(session)
        async with session.get(events_url) as answer:
            async for line in answer.content:
                print(line.decode(), end="", flush=True)


asyncio.run(main())
