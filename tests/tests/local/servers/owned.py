"""A server that does unusual things with its sockets, as the first argument says: `mptcp` listens with Multipath TCP; `message`
and `verdict` put each accepted socket into a sockmap of the server's own, which has a program that passes everything; `late` does
so with the second request of a connection.

`/bulk` is the file with a length, `/stream` the file in chunks, `/post` returns the length and the SHA-256 of the body. The field
`x-owned` says `yes`, or the error of the attempt."""

import ctypes
import errno
import hashlib
import http.server
import platform
import socket
import struct
import sys
import time

# linux/bpf.h and the system call tables.
BPF_SYSCALL = {"x86_64": 321, "aarch64": 280}[platform.machine()]
MAP_CREATE, MAP_UPDATE_ELEM, PROG_LOAD, PROG_ATTACH = 0, 2, 5, 8
SOCKMAP = 15
# The type of the program, and where it is attached.
PROGRAMS = {"message": (16, 7), "verdict": (14, 5), "late": (16, 7)}
# r0 = SK_PASS; exit
PASS = struct.pack("<BBhi", 0xB7, 0, 0, 1) + struct.pack("<BBhi", 0x95, 0, 0, 0)

libc = ctypes.CDLL(None, use_errno=True)
kind, content = sys.argv[1], open(sys.argv[2], "rb").read()


def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"))
    result = libc.syscall(BPF_SYSCALL, command, buffer, len(buffer))
    if result < 0:
        raise OSError(ctypes.get_errno(), errno.errorcode[ctypes.get_errno()])
    return result


def own_map():
    program_type, attach_type = PROGRAMS[kind]
    made = bpf(MAP_CREATE, struct.pack("<5I", SOCKMAP, 4, 4, 64, 0))
    code, licence = ctypes.create_string_buffer(PASS), ctypes.create_string_buffer(b"GPL")
    load = struct.pack("<IIQQ", program_type, len(PASS) // 8, ctypes.addressof(code), ctypes.addressof(licence))
    program = bpf(PROG_LOAD, load.ljust(68, b"\0") + struct.pack("<I", attach_type))
    bpf(PROG_ATTACH, struct.pack("<4I", made, program, attach_type, 0))
    return made


def add(connection):
    key, value = (ctypes.create_string_buffer(struct.pack("<I", n)) for n in (connection.fileno() % 64, connection.fileno()))
    bpf(MAP_UPDATE_ELEM, struct.pack("<IIQQQ", sockets, 0, ctypes.addressof(key), ctypes.addressof(value), 0))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.owned, self.requests = "yes", 0
        if kind in ("message", "verdict"):
            self.own()

    def own(self):
        try:
            add(self.connection)
        except OSError as error:
            self.owned = error.strerror

    def log_message(self, *_):
        pass

    def answer(self, *fields):
        self.requests += 1
        if kind == "late" and self.requests == 2:
            self.own()
        self.send_response(200)
        for name, value in (("x-owned", self.owned), *fields):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        if self.path == "/bulk":
            self.answer(("content-length", str(len(content))))
            self.wfile.write(content)
            return
        self.answer(("transfer-encoding", "chunked"))
        for at in range(0, len(content), 10_000):
            piece = content[at : at + 10_000]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            time.sleep(0.001)
        self.wfile.write(b"0\r\n\r\n")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        result = f"{len(body)} {hashlib.sha256(body).hexdigest()}".encode()
        self.answer(("content-length", str(len(result))))
        self.wfile.write(result)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler, bind_and_activate=False)
        if kind == "mptcp":
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
        self.server_bind()
        self.server_activate()


sockets = own_map() if kind in PROGRAMS else None
server = Server()
print("listening on %s:%d" % server.socket.getsockname(), flush=True)
server.serve_forever()
