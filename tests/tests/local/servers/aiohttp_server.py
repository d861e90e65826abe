"""aiohttp: `/bulk` is the file in one piece, `/stream` in many, `/file` an aiohttp FileResponse; `/post` returns the length
and the SHA-256 of the body."""

import asyncio
import hashlib
import socket
import sys

from aiohttp import web

content = open(sys.argv[1], "rb").read()


async def bulk(_):
    return web.Response(body=content)


async def stream(request):
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for at in range(0, len(content), 10_000):
        await response.write(content[at : at + 10_000])
        await asyncio.sleep(0.001)
    await response.write_eof()
    return response


async def file(_):
    return web.FileResponse(sys.argv[1])


async def post(request):
    length, digest = 0, hashlib.sha256()
    async for piece in request.content.iter_any():
        length += len(piece)
        digest.update(piece)
    return web.Response(text=f"{length} {digest.hexdigest()}")


app = web.Application()
app.add_routes([web.get("/bulk", bulk), web.get("/stream", stream), web.get("/file", file), web.post("/post", post)])
bound = socket.create_server(("127.0.0.1", 0))
print("listening on %s:%d" % bound.getsockname(), flush=True)
web.run_app(app, sock=bound, print=None)
