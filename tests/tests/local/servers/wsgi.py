"""A WSGI application for gunicorn: answers with the length and the SHA-256 of the body."""

import hashlib


def app(environ, start_response):
    length, digest = 0, hashlib.sha256()
    while piece := environ["wsgi.input"].read(65536):
        length += len(piece)
        digest.update(piece)
    body = f"{length} {digest.hexdigest()}".encode()
    start_response("200 OK", [("content-length", str(len(body)))])
    return [body]
