"""grpcio, as an agent uses it, by asyncio: it finds proxy and roots in its environment."""

import asyncio
import json
import sys

import grpc


async def main():
    async with grpc.aio.secure_channel(sys.argv[1], grpc.ssl_channel_credentials()) as channel:
        echo = await channel.unary_unary("/test.Api/Echo")("grüße".encode(), timeout=30)
        split = [piece async for piece in channel.unary_stream("/test.Api/Split")(b"abc", timeout=30)]
    print(json.dumps({"echo": echo.decode(), "split": len(split)}))


asyncio.run(main())
