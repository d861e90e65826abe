"""A plain ASGI application on uvicorn: `/bulk` is the file in one piece, `/stream` in many; `/post` returns the length and
the SHA-256 of the body. The event loop is the second argument."""

import asyncio
import hashlib
import socket
import sys

import uvicorn

content = open(sys.argv[1], "rb").read()
bound = socket.create_server(("127.0.0.1", 0))


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/post":
        length, digest, more = 0, hashlib.sha256(), True
        while more:
            message = await receive()
            piece, more = message.get("body", b""), message.get("more_body", False)
            length += len(piece)
            digest.update(piece)
        body = f"{length} {digest.hexdigest()}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})
        return
    if scope["path"] == "/bulk":
        headers = [(b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for at in range(0, len(content), 10_000):
        await send({"type": "http.response.body", "body": content[at : at + 10_000], "more_body": True})
        await asyncio.sleep(0.001)
    await send({"type": "http.response.body", "body": b""})


print("listening on %s:%d" % bound.getsockname(), flush=True)
loop = sys.argv[2] if len(sys.argv) > 2 else "auto"
uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", loop=loop)).run(sockets=[bound])
