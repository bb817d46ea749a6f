"""A peer's endpoint: its app on uvicorn with the extra `standard`, on a free port."""

from __future__ import annotations

import socket
import sys

import uvicorn

if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(sys.argv[1], log_config=None, access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
