#!/usr/bin/env python3
"""A server of two ranks on two hosts: one that is killed on each, a line that is cut and joined again, and the end.

hosts_client.py PROGRAM INDEX CONTEXTS SEED HOSTS CUT JOIN FAR: runs on the first host. HOSTS is as --hosts takes it, CUT and JOIN
are commands for the line of the second, FAR prints what runs on the second, a process a line. RANKS_FOLDER marks
processes of ranks, wherever they run.
"""
import os
import signal
import subprocess
import sys
import time

import ranks_client
from ranks_client import CHAT, HANG_SECONDS, LONG, Request, Server, chance, ends_of, fail, get, say, wait_for

hosts, cut, join, far = sys.argv[5:9]
mark = b"RANKS_FOLDER=" + os.environ["RANKS_FOLDER"].encode()


def ranks_anywhere(_top):
    """The processes of ranks, by their numbers. Those of another host are below nobody here."""
    found = {}
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                entries = file.read().split(b"\0")
        except OSError:
            continue
        if mark in entries:
            for entry in entries:
                if entry.startswith(b"OMPI_COMM_WORLD_RANK="):
                    found[int(entry.partition(b"=")[2])] = int(name)
    return found


def on_far_host():
    return subprocess.run(far, shell=True, capture_output=True, text=True, check=False).stdout.split("\n")[:-1]


def lose_line(server, answer, moment):
    what = "the line is cut off"
    requests = [Request(server.port, "/v1/chat/completions", CHAT | LONG | {"stream": True}),
                Request(server.port, "/v1/chat/completions", CHAT | LONG)]
    requests[0].begun.wait(HANG_SECONDS)
    time.sleep(moment)
    since = time.monotonic()
    subprocess.run(cut, shell=True, check=True)
    for request in requests:
        request.join(HANG_SECONDS)
    stream, whole = requests
    took = max(request.ended for request in requests) - since
    if '"code":"rank_lost"' not in stream.text or whole.status != 503 or "rank 1 of 2" not in whole.text:
        fail(f"{what}: {stream.text[-300:]!r} {whole.status} {whole.text} {whole.broke}\n{server.said()}")
    # Everything that was on the other host ends there, although nobody can reach it.
    wait_for(lambda: not on_far_host(), f"{what}: nothing left on the other host")
    empty = time.monotonic() - since
    if get(server.port, "/health")[0] != 503:
        fail(f"{what}: /health is not 503")
    subprocess.run(join, shell=True, check=True)
    joined = time.monotonic()
    wait_for(lambda: get(server.port, "/health")[0] == 200, f"{what}: a server that is back", 2 * HANG_SECONDS)
    back = time.monotonic() - joined
    again = ends_of(server)
    if again != answer:
        fail(f"{what}: behind it the answer is {again!r}, wanted {answer!r}")
    say(f"{what} after {moment:.2f} s: requests ended after {took:.1f} s, the other host was empty after {empty:.1f} s, all was "
        f"back {back:.1f} s after it was joined")


ranks_client.N = 2
ranks_client.ranks_below = ranks_anywhere
server = Server("hosts", "--hosts", hosts)
if not server.port:
    fail(f"it ended\n{server.said()}")
else:
    try:
        first = ends_of(server)
        print(first)
        one_job = len(on_far_host())
        for restarts, rank in enumerate((1, 0), 1):
            server.lose(rank, signal.SIGKILL, chance.random(), restarts, first)
            wait_for(lambda: len(on_far_host()) == one_job, f"what is left on the other host: {on_far_host()}")
        lose_line(server, first, chance.random())
        server.end(signal.SIGTERM)
        wait_for(lambda: not on_far_host(), f"what is left on the other host at the end: {on_far_host()}")
    except Exception as error:  # whatever a client can run into
        fail(f"{error!r}\n{server.said()}")
    finally:
        server.process.kill()
sys.exit(1 if ranks_client.failures else 0)
