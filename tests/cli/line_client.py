#!/usr/bin/env python3
"""What a line between two hosts does to datagrams: `line_client.py answer PORT` on one sends each back, `line_client.py ask
ADDRESS PORT N` on the other sends N, 2 ms apart, and prints the least and the median time of their ways there and back
in microseconds, and how many of them never came."""

import select
import socket
import sys
import time


def answer(port):
    line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    line.bind(("", port))
    print("ready", flush=True)
    while True:
        line.sendto(*line.recvfrom(2000))


def ask(address, port, n):
    line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    line.setblocking(False)
    sent, took = {}, {}
    end = time.perf_counter() + 60
    while len(took) < n and time.perf_counter() < end:
        now = time.perf_counter()
        if len(sent) < n and now >= max(sent.values(), default=0) + 2e-3:
            sent[len(sent)] = now
            line.sendto(str(len(sent) - 1).encode(), (address, port))
            if len(sent) == n:
                end = now + 2
        if select.select([line], [], [], 5e-4)[0]:
            which = int(line.recv(2000))
            took.setdefault(which, time.perf_counter() - sent[which])
    times = sorted(took.values()) or [float("inf")]
    print(round(1e6 * times[0]), round(1e6 * times[len(times) // 2]), n - len(took))


if sys.argv[1] == "answer":
    answer(int(sys.argv[2]))
else:
    ask(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
