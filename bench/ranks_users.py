#!/usr/bin/env python3
"""Users who ask about one context in shards at once, by `squeeze serve` alone and with ranks.

ranks_users.py PROGRAM FOLDER CONTEXT [TOKENS]: CONTEXT is the name of a context in FOLDER. Prints rows of JSON: ms is the time
between two tokens of a stream, the median of all streams, while all of them are answered; vs_one how many times as fast as
one process.
"""
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time

program, folder, context = sys.argv[1:4]
n_tokens = int(sys.argv[4]) if len(sys.argv) > 4 else 24


def start(ranks):
    arguments = [program, "serve", "--contexts", folder, "--port", "0", "--together", "each"]
    server = subprocess.Popen(arguments + (["--ranks", str(ranks)] if ranks > 1 else []), stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if "listening on http" in line:
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return server, int(line.rpartition(":")[2])
    sys.exit("the server has ended")


def ask(port, number, budget, gaps):
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    line.request("POST", "/v1/chat/completions", json.dumps({
        "model": context, "stream": True, "temperature": 0, "max_tokens": n_tokens, "squeeze": {"budget": budget},
        "messages": [{"role": "user", "content": f"Explain section {number} of it in many words."}]}),
        {"Content-Type": "application/json"})
    times = []
    for event in line.getresponse():
        if b'"content":"' in event and b'"content":""' not in event:
            times.append(time.monotonic())
    gaps += [b - a for a, b in zip(times, times[1:])]


def measure(port, users, budget):
    gaps = []
    streams = [threading.Thread(target=ask, args=(port, i, budget, gaps)) for i in range(users)]
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.join()
    return 1000 * statistics.median(gaps)


alone = {}
for ranks in (1, 2, 4):
    server, port = start(ranks)
    line = http.client.HTTPConnection("127.0.0.1", port)
    line.request("GET", "/v1/models")
    tokens = [m["context_tokens"] for m in json.load(line.getresponse())["data"] if m["id"].endswith(":" + context)]
    measure(port, 1, 1)
    for budget in (1, 0.1):
        for users in (1, 4, 8):
            ms = measure(port, users, budget)
            alone.setdefault((users, budget), ms)
            print(json.dumps({"ranks": ranks, "kind": "mpi", "users": users, "context_tokens": tokens[0],
                              "budget": budget, "ms": round(ms, 2), "vs_one": round(alone[users, budget] / ms, 3)}), flush=True)
    server.terminate()
    server.wait()
