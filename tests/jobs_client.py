#!/usr/bin/env python3
"""Everything that jobs do at once, asked of a running server: jobs_client.py PORT STEP. `busy`: uploads, long conversations
that are prepared while they are answered, cancelled jobs, deleted contexts, lists; one upload is left unfinished. `rest`,
after a restart: it is ready in the end."""
import http.client
import json
import sys
import threading
import time

PORT, STEP = int(sys.argv[1]), sys.argv[2]
LIMIT = time.monotonic() + 300
failures = []


def text(seed, sentences):
    return " ".join(f"Crate {i * seed % 97} of ship {seed} holds {i * i % 89} lamps and {i % 7} ropes." for i in range(sentences))


def call(method, path, body=None, kind="application/json"):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": kind})
    response = connection.getresponse()
    found = response.read()
    connection.close()
    return response.status, found


def want(status, *allowed):
    if status not in allowed:
        failures.append(f"{STEP}: status {status}, wanted {allowed}")


def states():
    return {c["id"]: c["status"] for c in json.loads(call("GET", "/v1/contexts")[1])["data"]}


def wait_for(name, *wanted):
    while time.monotonic() < LIMIT:
        state = states().get(name)
        if state in wanted:
            return
        if state in ("failed", None):
            break
        time.sleep(0.1)
    failures.append(f"{name} is {states().get(name)}, wanted {wanted}")


def upload(name, seed, sentences, raw=False):
    if raw:
        return call("POST", f"/v1/contexts?name={name}", text(seed, sentences).encode(), "text/plain")[0]
    return call("POST", "/v1/contexts", {"name": name, "text": text(seed, sentences)})[0]


def converse(seed, sentences, stream):
    status, found = call("POST", "/v1/chat/completions", {
        "messages": [{"role": "user", "content": text(seed, sentences) + "\n\nHow many lamps?"}], "max_tokens": 6,
        "temperature": 0, "stream": stream})
    want(status, 200)
    if stream and not found.rstrip().endswith(b"[DONE]"):
        failures.append("a stream without an end")


def list_for(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        want(call("GET", "/v1/contexts")[0], 200)
        want(call("GET", "/metrics")[0], 200)


def together(*calls):
    threads = [threading.Thread(target=f, args=arguments) for f, *arguments in calls]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def cancel(name, seed, sentences, seconds):
    want(upload(name, seed, sentences), 202)
    time.sleep(seconds)
    want(call("DELETE", "/v1/contexts/" + name)[0], 200)


def busy():
    together((lambda: want(upload("first", 3, 50), 202),), (lambda: want(upload("second", 5, 60, True), 202),),
             (converse, 7, 40, True), (converse, 11, 45, False), (list_for, 2),
             (cancel, "early", 13, 60, 0), (cancel, "late", 17, 60, 0.7))
    want(upload("first", 19, 20), 409)
    wait_for("first", "ready")
    wait_for("second", "ready")
    together((converse, 7, 40, True), (converse, 3, 50, True), (lambda: want(call("DELETE", "/v1/contexts/second")[0], 200),),
             (list_for, 0.5))
    want(upload("left", 23, 80), 202)


def rest():
    wait_for("left", "ready")
    converse(3, 50, False)


{"busy": busy, "rest": rest}[STEP]()
if failures:
    sys.exit("\n".join(failures))
