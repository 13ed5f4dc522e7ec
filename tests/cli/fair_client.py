#!/usr/bin/env python3
"""Many at once, and who is served when: fair_client.py PORT NAME... asks a running `squeeze serve` that knows two
keys."""
import concurrent.futures
import http.client
import json
import socket
import sys
import time

PORT = int(sys.argv[1])
ANN, BOB = "sk-of-ann-0123456789", "sk-of-bob-0123456789"


def request(key, body, path="/v1/chat/completions", connection=None):
    """Status, headers, text; on a connection of its own where none is given."""
    c = connection or http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
    c.request("POST", path, json.dumps(body), {"Authorization": "Bearer " + key, "Content-Type": "application/json"})
    response = c.getresponse()
    text = response.read()
    if not connection:
        c.close()
    return response.status, dict(response.getheaders()), text


def user(text, **more):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **more}


def metric(name):
    c = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    c.request("GET", "/metrics", headers={"x-api-key": ANN})
    for line in c.getresponse().read().decode().split("\n"):
        if line.startswith("squeeze_" + name + " "):
            return int(line.split()[1])
    raise AssertionError(name)


def wait_for(what, seconds=60):
    until = time.time() + seconds
    while not what():
        assert time.time() < until, f"waited {seconds} s"
        time.sleep(0.02)


class Stream:
    """An answer that goes on for so many tokens; no more of it is read than is asked for."""

    def __init__(self, key, tokens=4000):
        body = json.dumps(user("A long story.", stream=True, max_tokens=tokens, logit_bias={"0": -100, "2": -100}))
        self.socket = socket.create_connection(("127.0.0.1", PORT), timeout=60)
        self.socket.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
                            f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        self.seen = b""
        self.until(b"\r\n\r\n")

    def until(self, words):
        """Reads until these have come."""
        while words not in self.seen:
            more = self.socket.recv(65536)
            assert more, self.seen[-300:]
            self.seen += more

    def has(self, words):
        """Whether these are in what has come by now."""
        self.socket.setblocking(False)
        try:
            self.seen += self.socket.recv(1 << 20)
        except BlockingIOError:
            pass
        return words in self.seen

    def close(self):
        self.socket.close()


def t_many():
    """200 requests from 32 connections, none with an error."""
    def work(worker):
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
        results = []
        for i in range(worker, 200, 32):
            text = f"What is {i} plus 1?"
            if i % 8 == 0:
                path, body = "/v1/messages", {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
            elif i % 8 == 1:
                path, body = "/v1/responses", {"input": text, "max_output_tokens": 2, "stream": i % 16 == 1}
            elif i % 8 == 2:
                path, body = "/v1/chat/completions", user(text, max_tokens=2, stream=i % 16 == 2)
            else:
                path, body = "/v1/completions", {"prompt": f"{i} and", "max_tokens": 2, "stream": i % 4 == 2}
            results.append((i, *request(BOB if i % 3 else ANN, body, path, connection)))
        connection.close()
        return results

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        results = [one for some in pool.map(work, range(32)) for one in some]
    assert len(results) == 200
    for i, status, _, text in results:
        assert status == 200 and b'"error":{' not in text, (i, status, text[:300])
    assert metric("requests_refused_total") == 0


def t_every_byte():
    """A request in two pieces, cut at every byte, and in three."""
    body = json.dumps({"messages": [{"role": "user", "content": "H\u00e4, \U0001f40d?"}]}, ensure_ascii=False).encode()
    data = (f"POST /v1/messages/count_tokens HTTP/1.1\r\nHost: localhost\r\nx-api-key: {ANN}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body
    s = socket.create_connection(("127.0.0.1", PORT), timeout=60)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wanted = None
    for at in range(1, len(data)):
        for pieces in ((data[:at], data[at:]), (data[:at], data[at : at + 1], data[at + 1 :])):
            for piece in pieces:
                s.sendall(piece)
                time.sleep(0.001)
            got = b""
            while b"}" not in got:
                more = s.recv(4096)
                assert more, (at, got)
                got += more
            assert got.startswith(b"HTTP/1.1 200 "), (at, got)
            answer = got.split(b"\r\n\r\n")[1]
            wanted = wanted or answer
            assert answer == wanted, (at, answer, wanted)
    s.close()


def t_fair():
    """Ann has much to ask, Bob comes later with little: he does not wait for all of hers."""
    ann = [Stream(ANN, 60) for _ in range(24)]
    wait_for(lambda: metric("answers_active") == 4 and metric("requests_waiting") == 20)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        bob = pool.map(lambda i: request(BOB, {"prompt": f"{i} is", "max_tokens": 8}, "/v1/completions"), range(4))
        assert [status for status, _, _ in bob] == [200] * 4
    begun = sum(s.has(b'"role"') for s in ann)
    for s in ann:
        s.close()
    assert 4 <= begun <= 12, f"{begun} of Ann's 24 were begun before Bob had his four"
    wait_for(lambda: metric("answers_active") == 0 and metric("requests_waiting") == 0)


def t_full():
    """One place and a queue of four: what comes then is refused, or takes the place of who has most there."""
    running = Stream(ANN)
    running.until(b"data: ")
    wait_for(lambda: metric("answers_active") == 1)
    waiting = [Stream(ANN) for _ in range(4)]
    wait_for(lambda: metric("requests_waiting") == 4)
    for path, body in (("/v1/chat/completions", user("x")), ("/v1/messages", user("x"))):
        status, headers, text = request(ANN, body, path)
        assert status == 429 and int(headers["Retry-After"]) >= 1, (status, headers, text)
        assert json.loads(text)["error"]["type"] == "rate_limit_error", text
    assert metric("requests_refused_total") == 2
    bobs = [Stream(BOB), Stream(BOB)]  # two of Ann's four make room for them
    told = [s for s in waiting[:1:-1]]
    for s in told:
        s.until(b'"queue_full"')
        s.close()
    assert request(BOB, user("x"))[0] == 429  # each has two by now
    assert metric("requests_waiting") == 4
    running.close()
    bobs[0].until(b'"role"')  # who has nothing yet comes first
    assert b'"role"' not in waiting[0].seen
    for s in bobs + waiting[:2]:
        s.close()
    wait_for(lambda: metric("answers_active") == 0 and metric("requests_waiting") == 0)
    assert request(ANN, user("x", max_tokens=1))[0] == 200


for name in sys.argv[2:]:
    since = time.time()
    globals()["t_" + name]()
    print(f"{name}: {time.time() - since:.1f} s", flush=True)
