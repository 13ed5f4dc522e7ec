#!/usr/bin/env python3
"""Tests of two `squeeze serve` behind nginx, by names: proxy_client.py HTTPS-PORT CERTIFICATE PORT PORT NAME..."""
import http.client
import json
import ssl
import sys
import time

PROXY, CERTIFICATE, SERVERS = int(sys.argv[1]), sys.argv[2], [int(port) for port in sys.argv[3:5]]
KEYS = [f"sk-proxy-test-{number:04d}" for number in range(8)]
TLS = ssl.create_default_context(cafile=CERTIFICATE)


def connect(port=None):
    if port:
        return http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    return http.client.HTTPSConnection("localhost", PROXY, timeout=60, context=TLS)


def call(method, path, body=None, key=KEYS[0], port=None, **headers):
    """Through the proxy, or to one server."""
    connection = connect(port)
    data = json.dumps(body) if isinstance(body, dict) else body
    connection.request(method, path, data, {"Authorization": f"Bearer {key}", **headers})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, text


def question(words, **more):
    return {"messages": [{"role": "user", "content": words}], "temperature": 0, "max_tokens": 4, **more}


def metric(port, name):
    _, text = call("GET", "/metrics", port=port)
    return next(int(line.split()[1]) for line in text.decode().splitlines() if line.startswith(f"squeeze_{name} "))


def answering():
    return sum(metric(port, "answers_active") for port in SERVERS)


def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_stream():
    """Tokens arrive while the answer is still being made, one by one; who goes away frees the place."""
    connection = connect()
    long_one = {"type": "array", "items": {"enum": ["a long word"]}, "minItems": 100, "maxItems": 200}
    body = question("Say it again.", stream=True, max_tokens=1500, response_format={
        "type": "json_schema", "json_schema": {"name": "long", "schema": long_one}})
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {KEYS[0]}"})
    response = connection.getresponse()
    assert response.status == 200 and response.getheader("Content-Type") == "text/event-stream", response.headers
    pieces = [response.read1(65536) for _ in range(12)]
    assert all(piece.count(b"data: ") <= 4 for piece in pieces), pieces
    assert answering() == 1, "the answer was finished before its first tokens arrived"
    connection.close()
    until(lambda: answering() == 0)
    assert sum(metric(port, "requests_abandoned_total") for port in SERVERS) == 1


def test_shared():
    """What one server prepares the other lists and uses."""
    text = "The lighthouse keeper Ida Brandt found a blue bottle on the northern beach. " * 12
    status, said = call("POST", "/v1/contexts?name=beach", text, port=SERVERS[0], **{"Content-Type": "text/plain"})
    assert status == 202, said
    until(lambda: json.loads(call("GET", "/v1/contexts/beach", port=SERVERS[0])[1])["status"] == "ready")
    listed = json.loads(call("GET", "/v1/contexts", port=SERVERS[1])[1])["data"]
    assert [entry["status"] for entry in listed if entry["id"] == "beach"] == ["ready"], listed
    status, said = call("POST", "/v1/chat/completions", question("Who found a bottle?", model="beach"), port=SERVERS[1])
    assert status == 200 and json.loads(said)["usage"]["prompt_tokens_details"]["cached_tokens"] > 100, said


def test_in_work():
    """What one server is preparing the other leaves alone."""
    text = " ".join(f"Room {number} of the hotel has a view of the harbour and {number * 7} books." for number in range(300))
    status, said = call("POST", "/v1/contexts?name=hotel", text, port=SERVERS[0], **{"Content-Type": "text/plain"})
    assert status == 202, said
    status, said = call("POST", "/v1/contexts?name=hotel", text, port=SERVERS[1], **{"Content-Type": "text/plain"})
    assert status == 409 and json.loads(said)["error"]["code"] == "context_exists", (status, said)


def test_not_mine():
    """A server that starts now takes up nothing that another is at work on."""
    status, said = call("GET", "/v1/contexts/hotel", port=SERVERS[1])
    assert status == 404 or json.loads(said)["status"] == "ready", said  # ready: it took long to start
    assert call("DELETE", "/v1/contexts/hotel", port=SERVERS[0])[0] == 200


def test_spread():
    """Users come to both servers, each always to one."""
    before = [metric(port, "requests_total") for port in SERVERS]
    for key in KEYS:
        for _ in range(2):
            status, said = call("POST", "/v1/chat/completions", question("Who found a bottle?", model="beach"), key)
            assert status == 200, said
    got = [metric(port, "requests_total") - was for port, was in zip(SERVERS, before)]
    assert sum(got) == 2 * len(KEYS) and min(got) > 0 and all(n % 2 == 0 for n in got), got


def test_upload():
    """Larger than nginx takes unless told; a page of another place is refused through the proxy as well."""
    status, said = call("POST", "/tokenize", {"content": "word " * 400000})
    assert status == 200, (status, said[:200])
    status, said = call("GET", "/v1/contexts", Origin="https://elsewhere.example")
    assert status == 403, said
    status, said = call("GET", "/v1/contexts", Origin=f"https://localhost:{PROXY}")
    assert status == 200, said
    assert call("GET", "/v1/contexts", key="sk-of-nobody-at-all")[0] == 401
    assert call("GET", "/metrics")[0] == 404


def test_one_left():
    """The first server is gone: every user is answered."""
    for key in KEYS:
        status, said = call("POST", "/v1/chat/completions", question("Who found a bottle?", model="beach"), key)
        assert status == 200, said


for name in sys.argv[5:]:
    began = time.monotonic()
    globals()[f"test_{name}"]()
    print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
