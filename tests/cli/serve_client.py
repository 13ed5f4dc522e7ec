#!/usr/bin/env python3
"""Tests of a running `squeeze serve`, by names: serve_client.py PORT NAME... Python's own library alone, and raw sockets
where a request has to be wrong."""
import concurrent.futures
import http.client
import json
import os
import resource
import socket
import sys
import time

PORT = int(sys.argv[1])
KEY = "sk-serve-test-0123456789"
MODEL = None


def call(method, path, body=None, headers=None, timeout=300):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=timeout)
    data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
    connection.request(method, path, data, headers or {})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), text


def post(path, body, status=200, **more):
    got, _, text = call("POST", path, body, **more)
    assert got == status, (path, body if len(str(body)) < 300 else "...", got, text[:500])
    return json.loads(text)


def get(path, status=200):
    got, _, text = call("GET", path)
    assert got == status, (path, got, text[:500])
    return json.loads(text)


def user(text, **more):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **more}


def events(path, body):
    """The objects of a stream, and whether it ended as it should."""
    status, headers, text = call("POST", path, {**body, "stream": True})
    assert status == 200 and headers["Content-Type"] == "text/event-stream", (status, headers, text[:300])
    lines = [line[6:] for line in text.decode().split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", lines[-3:]
    return [json.loads(line) for line in lines[:-1]]


def raw(data, wait=10, pieces=None):
    """Sends bytes as they are; what comes back until the end or for so long."""
    s = socket.create_connection(("127.0.0.1", PORT), timeout=wait)
    for piece in pieces or [data]:
        s.sendall(piece)
    got = b""
    try:
        while True:
            more = s.recv(65536)
            if not more:
                break
            got += more
            if b"\r\n\r\n" in got:
                head, body = got.split(b"\r\n\r\n", 1)
                for line in head.split(b"\r\n"):
                    if line.lower().startswith(b"content-length:") and len(body) >= int(line.split(b":")[1]):
                        return got
    except (TimeoutError, ConnectionError):
        pass
    finally:
        s.close()
    return got


def request_bytes(body, path="/v1/chat/completions", extra=""):
    data = json.dumps(body).encode()
    return (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n{extra}\r\n").encode() + data


def alive():
    assert get("/health") == {"status": "ok"}


# ---- What it says of itself -------------------------------------------------------------


def t_health():
    alive()


def t_info():
    alive()
    props = get("/props")
    assert props["n_slots"] == 4 and props["has_chat_template"] is True, props
    paths = get("/openapi.json")["paths"]
    assert "/v1/chat/completions" in paths
    for path, methods in paths.items():  # every path and method of the document is there
        for method in methods:
            status, headers, _ = call(method.upper(), path.replace("{id}", "none"), b"{}" if method != "get" else None)
            assert status not in (405, 501) and (status != 404 or "{id}" in path), (path, method, status)
        status, headers, _ = call("PUT", path.replace("{id}", "none"))
        assert status == 405 and headers["Allow"], (path, status)
        assert {m.strip().lower() for m in headers["Allow"].split(",")} == set(methods), (path, headers["Allow"])
    status, headers, text = call("GET", "/metrics")
    assert status == 200 and b"\nsqueeze_answer_tokens_total " in text
    status, headers, text = call("HEAD", "/health")
    assert status == 200 and text == b""
    get("/nowhere", 404)
    get("/v1/models/none", 404)


def t_models():
    names = [m["id"] for m in get("/v1/models")["data"]]
    assert len(names) == 2 and names[1] == names[0] + ":book", names
    assert get("/v1/models/" + names[1])["context_tokens"] > 100
    states = {c["id"]: c["status"] for c in get("/v1/contexts")["data"]}
    assert states == {"book": "ready", "damaged": "failed"}, states
    reply = post("/v1/chat/completions", user("Hello", model=names[0] + ":damaged"), 409)
    assert reply["error"]["code"] == "context_unusable" and "/" not in reply["error"]["message"], reply
    assert post("/v1/chat/completions", user("Hello", model="gpt-4"), 404)["error"]["code"] == "model_not_found"


# ---- Answers --------------------------------------------------------------------------------


def t_chat():
    reply = post("/v1/chat/completions", user("What is the capital of France? One word."))
    message = reply["choices"][0]["message"]
    assert reply["object"] == "chat.completion" and message["role"] == "assistant" and "Paris" in message["content"], reply
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"]
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 and "squeeze" not in reply["usage"]
    parts = [{"type": "text", "text": "What is the capital of France? "}, {"type": "text", "text": "One word."}]
    again = post("/v1/chat/completions", {**user(""), "messages": [{"role": "user", "content": parts}]})
    assert again["choices"][0]["message"]["content"] == message["content"]
    short = post("/v1/chat/completions", user("Count to a hundred.", max_tokens=3))
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 3
    one = post("/v1/chat/completions", user("A purple elephant?", temperature=1.5, seed=5))
    two = post("/v1/chat/completions", user("A purple elephant?", temperature=1.5, seed=5))
    assert one["choices"] == two["choices"], (one, two)
    post("/v1/chat/completions", user("Hi", messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "y"},
         {"role": "assistant", "content": None}, {"role": "tool", "content": "z", "tool_call_id": "1"}]))


def t_stream():
    whole = post("/v1/chat/completions", user("Say something nice.", max_tokens=20))
    chunks = events("/v1/chat/completions", user("Say something nice.", max_tokens=20, stream_options={"include_usage": True}))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == whole["choices"][0]["message"]["content"], (text, whole)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant" and chunks[-1]["usage"] == whole["usage"]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1] if c["choices"][0]["finish_reason"]] == [
        whole["choices"][0]["finish_reason"]]
    assert len(chunks) > 5


def t_completions():
    ask = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 5}
    whole = post("/v1/completions", ask)
    assert whole["object"] == "text_completion" and "Paris" in whole["choices"][0]["text"], whole
    tokens = post("/tokenize", {"content": ask["prompt"]})["tokens"]
    assert post("/v1/completions", {**ask, "prompt": tokens})["choices"] == whole["choices"]
    two = post("/v1/completions", {**ask, "prompt": [ask["prompt"], "One, two, three,"]})
    assert [c["index"] for c in two["choices"]] == [0, 1] and "four" in two["choices"][1]["text"]
    text = "".join(c["choices"][0]["text"] for c in events("/v1/completions", ask))
    assert text == whole["choices"][0]["text"]
    one = post("/v1/completions", {**ask, "prompt": "x"})
    assert one["usage"]["prompt_tokens"] == 1
    post("/v1/completions", {**ask, "prompt": [[1, 2], [49151]]})
    for bad in ([1, -1], [1, 49152], [], [[]], 5, {}, [1, "x"], ""):
        assert "error" in post("/v1/completions", {**ask, "prompt": bad}, 400), bad


def t_logprobs():
    reply = post("/v1/chat/completions", user("The capital of France?", logprobs=True, top_logprobs=3))
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(content) in (reply["usage"]["completion_tokens"], reply["usage"]["completion_tokens"] + 1)
    for token in content:
        assert len(token["top_logprobs"]) == 3 and token["logprob"] <= 0
        assert token["top_logprobs"][0]["token"] == token["token"]  # greedy
        assert bytes(token["bytes"]).decode(errors="replace") == token["token"]
    chunks = events("/v1/chat/completions", user("The capital of France?", logprobs=True, top_logprobs=3))
    streamed = [t for c in chunks if c["choices"] and c["choices"][0]["logprobs"] for t in c["choices"][0]["logprobs"]["content"]]
    assert [t["token"] for t in streamed] == [t["token"] for t in content]
    text = post("/v1/completions", {"prompt": "One, two,", "max_tokens": 4, "temperature": 0, "logprobs": 2})
    assert len(text["choices"][0]["logprobs"]["tokens"]) == 4


def t_choices():
    reply = post("/v1/chat/completions", user("Name an animal.", n=3, temperature=1.5, seed=3, max_tokens=6))
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2]
    assert len({c["message"]["content"] for c in reply["choices"]}) > 1
    chunks = events("/v1/chat/completions", user("Name an animal.", n=2, max_tokens=6))
    assert {c["choices"][0]["index"] for c in chunks} == {0, 1}
    post("/v1/chat/completions", user("Name an animal.", n=5), 400)  # four slots


def t_stops():
    ask = user("Count: one, two, three, four, five, six, seven.", max_tokens=40)
    full = post("/v1/chat/completions", ask)["choices"][0]["message"]["content"]
    stop = full[5:8]
    cut = post("/v1/chat/completions", {**ask, "stop": stop})["choices"][0]
    assert cut["message"]["content"] == full[: full.index(stop)] and cut["finish_reason"] == "stop", (full, cut)
    chunks = events("/v1/chat/completions", {**ask, "stop": ["@@@", stop]})
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == full[: full.index(stop)]


def t_schema():
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"},
              "kind": {"enum": ["cat", "dog"]}}, "required": ["name", "age", "kind"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}}
    for seed in range(2):
        reply = post("/v1/chat/completions", user("Describe a pet.", response_format=form, max_tokens=120, temperature=1, seed=seed))
        if reply["choices"][0]["finish_reason"] == "stop":
            pet = json.loads(reply["choices"][0]["message"]["content"])
            assert set(pet) == {"name", "age", "kind"} and isinstance(pet["age"], int) and pet["kind"] in ("cat", "dog"), pet
    reply = post("/v1/chat/completions", user("A JSON object, please.", response_format={"type": "json_object"}, max_tokens=60))
    assert reply["choices"][0]["message"]["content"].startswith("{")
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "("}}}
    assert post("/v1/chat/completions", user("x", response_format=bad), 400)["error"]["code"] == "unsupported_schema"


def t_tools():
    tool = {"type": "function", "function": {"name": "weather", "description": "The weather in a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 30}}, "required": ["city"]}}}
    ask = user("How is the weather in Paris?", tools=[tool], tool_choice="required", max_tokens=100)
    choice = post("/v1/chat/completions", ask)["choices"][0]
    calls = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and len(calls) == 1 and calls[0]["function"]["name"] == "weather", choice
    assert isinstance(json.loads(calls[0]["function"]["arguments"])["city"], str) and choice["message"]["content"] is None
    chunks = events("/v1/chat/completions", ask)
    said = [c["choices"][0]["delta"] for c in chunks]
    assert [d for d in said if d.get("tool_calls")][0]["tool_calls"][0]["index"] == 0
    assert "".join(d.get("content", "") for d in said) == "", said
    plain = user("Say hello.", tools=[tool], max_tokens=20, logit_bias={"44": -100})  # 44: a '<', so that none is called
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in events("/v1/chat/completions", plain))
    assert text == post("/v1/chat/completions", plain)["choices"][0]["message"]["content"]
    follow = [*ask["messages"], choice["message"], {"role": "tool", "tool_call_id": calls[0]["id"], "content": "Rain."}]
    post("/v1/chat/completions", user("", messages=follow, tools=[tool]))
    named = {"type": "function", "function": {"name": "other"}}
    post("/v1/chat/completions", user("x", tools=[tool], tool_choice=named), 400)
    post("/v1/chat/completions", user("x", tools=[{"type": "function", "function": {"name": "a b"}}]), 400)


def t_prefix():
    document = open(os.environ["SERVE_DOCUMENT"]).read()
    question = "What is this licence called?"
    named = post("/v1/chat/completions", user(question, model="book"))
    assert named["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    found = post("/v1/chat/completions", user(document + "\n\n" + question))
    assert found["usage"] == named["usage"], (found["usage"], named["usage"])
    assert found["choices"] == named["choices"]
    crlf = post("/v1/chat/completions", user((document + "\n\n" + question).replace("\n", "\r\n")))
    assert crlf["choices"] == named["choices"]
    other = post("/v1/chat/completions", user(document[:-200] + "\n\n" + question))
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    assert post("/v1/chat/completions", user("", model="book", messages=system))["usage"]["squeeze"]
    post("/v1/chat/completions", user("", model="book", messages=[{"role": "assistant", "content": "x"}]), 400)


def t_squeeze():
    exact = post("/v1/chat/completions", user("What is free?", model="book", squeeze={"exact": True}))["usage"]["squeeze"]
    assert abs(exact["share_read"] - 1) < 0.01 and exact["missed_mass"] < 1e-6, exact
    assert 0 <= exact["accepted_tokens"] <= exact["drafted_tokens"] and exact["exact"] == "f16", exact
    drawn = [post("/v1/chat/completions", user("What is free?", model="book", max_tokens=24, temperature=0.8, seed=seed,
             squeeze={"exact": True}))["usage"] for seed in (1, 2)]
    assert all(u["completion_tokens"] >= 1 and u["squeeze"]["drafted_tokens"] >= 0 for u in drawn), drawn
    least = post("/v1/chat/completions", user("What is free?", model="book", squeeze={"budget": 0.05}))["usage"]["squeeze"]
    assert 0 < least["share_read"] <= 1 and 0 <= least["missed_mass"] < 1, least
    for bad in ({"budget": 0}, {"budget": 1.1}, {"budget": "1"}, {"rule": "paper"}, {"rule": "x"}, {"exact": 1}, {"read_map": 1}, 5):
        post("/v1/chat/completions", user("x", model="book", squeeze=bad), 400)


def t_exact():
    """What an answer is exact to: the rows of its context, or what was asked for."""
    planes = [post("/v1/chat/completions", user("What is free?", model="planes", squeeze={"exact": kind})) for kind in (True, "int8")]
    for answer in planes:
        read = answer["usage"]["squeeze"]
        assert 0.5 < read["share_read"] < 0.8 and read["missed_mass"] < 1e-6 and read["exact"] == "int8", read
    assert planes[0]["choices"][0]["message"] == planes[1]["choices"][0]["message"]
    for model, kind, words in (("planes", "f16", "allowed is exact int8"), ("book", "int8", "this one has F16 rows"),
                               (None, "int8", "this conversation has no context"), ("book", "f32", "allowed are true, false, f16 and int8")):
        for stream in (False, True):
            ask = user("What is free?", squeeze={"exact": kind}, stream=stream, **({"model": model} if model else {}))
            error = post("/v1/chat/completions", ask, 400)["error"]
            assert words in error["message"], error


def t_passages():
    """Passages cover the document, their shares sum to 1, and their texts are the document's, cut at characters."""
    document = open(os.environ["SERVE_DOCUMENT"], encoding="utf-8").read().rstrip("\n").encode()
    ask = user("What is free?", model="book", squeeze={"read_map": True})
    passages = post("/v1/chat/completions", ask)["usage"]["squeeze"]["passages"]
    assert passages[0]["from"] == 0 and all(a["to"] == b["from"] for a, b in zip(passages, passages[1:])), passages
    assert abs(sum(p["share"] for p in passages) - 1) < 1e-6 and all(p["share"] >= 0 for p in passages), passages
    last = events("/v1/chat/completions", {**ask, "stream_options": {"include_usage": True}})[-1]
    assert last["usage"]["squeeze"]["passages"] == passages
    assert "passages" not in post("/v1/chat/completions", user("x", model="book"))["usage"]["squeeze"]
    text = "".join(get(f"/v1/contexts/book/text?from={p['from']}&to={p['to']}")["text"] for p in passages).encode()
    whole = get("/v1/contexts/book/text")
    assert whole["bytes"] == len(text) == passages[-1]["to"] and whole["text"].encode() == text == document[:len(text)]
    assert get("/v1/contexts/book/text?from=99999999999&to=5")["text"] == ""
    for bad in ("from=-1", "to=x", "from=", "to=99999999999999999999999"):
        get("/v1/contexts/book/text?" + bad, 400)
    get("/v1/contexts/none/text", 404)
    get("/v1/contexts/damaged/text", 409)


def named_events(path, body):
    """Events by name and object, in order."""
    status, headers, text = call("POST", path, {**body, "stream": True})
    assert status == 200 and headers["Content-Type"] == "text/event-stream", (status, text[:300])
    found = []
    for block in text.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            assert lines[0].startswith("event: ") and lines[1].startswith("data: "), lines
            found.append((lines[0][7:], json.loads(lines[1][6:])))
            assert found[-1][1]["type"] == found[-1][0]
    return found


def t_responses():
    ask = {"input": "What is the capital of France? One word.", "temperature": 0, "max_output_tokens": 12}
    whole = post("/v1/responses", ask)
    assert whole["object"] == "response" and whole["status"] == "completed" and "Paris" in whole["output"][0]["content"][0]["text"]
    assert whole["usage"]["total_tokens"] == whole["usage"]["input_tokens"] + whole["usage"]["output_tokens"]
    items = [{"role": "user", "content": [{"type": "input_text", "text": ask["input"]}]}]
    assert post("/v1/responses", {**ask, "input": items})["output"][0]["content"] == whole["output"][0]["content"]
    seen = named_events("/v1/responses", ask)
    names = [n for n, _ in seen]
    assert names[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert names[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"]
    assert [e["sequence_number"] for _, e in seen] == list(range(len(seen)))
    text = "".join(e["delta"] for n, e in seen if n == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"] == seen[-1][1]["response"]["output"][0]["content"][0]["text"]
    cut = post("/v1/responses", {**ask, "max_output_tokens": 1})
    assert cut["status"] == "incomplete" and cut["incomplete_details"]["reason"] == "max_output_tokens"
    tool = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "maxLength": 20}}, "required": ["city"]}}
    called = {**ask, "input": "The weather in Paris?", "tools": [tool], "tool_choice": "required", "max_output_tokens": 80}
    reply = post("/v1/responses", called)["output"]
    assert reply[0]["type"] == "function_call" and "city" in json.loads(reply[0]["arguments"]), reply
    names = [n for n, _ in named_events("/v1/responses", called)]
    assert "response.function_call_arguments.done" in names and "response.output_text.delta" not in names
    result = {"type": "function_call_output", "call_id": reply[0]["call_id"], "output": "Rain."}
    post("/v1/responses", {**ask, "input": [*items, reply[0], result], "tools": [tool], "instructions": "Be brief."})
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    assert "city" in json.loads(post("/v1/responses", {**ask, "text": form, "max_output_tokens": 60})["output"][0]["content"][0]["text"])
    assert post("/v1/responses", {**ask, "model": "book"})["usage"]["squeeze"]["share_read"] > 0
    for bad in ({"input": 5}, {"input": []}, {"input": [{"type": "x"}]}, {"previous_response_id": "x"}, {"tools": [{"type": "x"}]},
                {"max_output_tokens": 0}, {"text": 5}, {"instructions": 5}):
        post("/v1/responses", {**ask, **bad}, 400)


def t_messages():
    ask = {"messages": [{"role": "user", "content": "What is the capital of France? One word."}], "temperature": 0, "max_tokens": 12}
    whole = post("/v1/messages", ask)
    assert whole["type"] == "message" and "Paris" in whole["content"][0]["text"] and whole["stop_reason"] == "end_turn", whole
    assert post("/v1/messages/count_tokens", {"messages": ask["messages"]}) == {"input_tokens": whole["usage"]["input_tokens"]}
    blocks = [{"role": "user", "content": [{"type": "text", "text": ask["messages"][0]["content"]}]}]
    assert post("/v1/messages", {**ask, "messages": blocks})["content"] == whole["content"]
    seen = named_events("/v1/messages", ask)
    names = [n for n, _ in seen]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(e["delta"]["text"] for n, e in seen if n == "content_block_delta") == whole["content"][0]["text"]
    assert seen[-2][1]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    word = whole["content"][0]["text"][1:3]
    cut = post("/v1/messages", {**ask, "stop_sequences": ["@@", word]})
    assert cut["stop_reason"] == "stop_sequence" and cut["stop_sequence"] == word, cut
    assert post("/v1/messages", {**ask, "max_tokens": 1})["stop_reason"] == "max_tokens"
    tool = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}}
    called = {**ask, "tools": [tool], "tool_choice": {"type": "any"}, "max_tokens": 80}
    reply = post("/v1/messages", called)
    assert reply["stop_reason"] == "tool_use" and "city" in reply["content"][0]["input"], reply
    seen = named_events("/v1/messages", called)
    assert seen[1][1]["content_block"]["type"] == "tool_use" and seen[2][1]["delta"]["type"] == "input_json_delta"
    result = {"type": "tool_result", "tool_use_id": reply["content"][0]["id"], "content": [{"type": "text", "text": "Rain."}]}
    follow = [*ask["messages"], {"role": "assistant", "content": reply["content"]}, {"role": "user", "content": [result]}]
    post("/v1/messages", {**ask, "messages": follow, "tools": [tool], "system": [{"type": "text", "text": "Be brief."}]})
    assert post("/v1/messages", {**ask, "model": "book"})["usage"]["cache_read_input_tokens"] > 100
    for bad in ({"max_tokens": None}, {"max_tokens": "5"}, {"messages": []}, {"messages": [{"role": "system", "content": "x"}]},
                {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {"tool_choice": {"type": "x"}}, {"system": 5}):
        error = post("/v1/messages", {**ask, **bad}, 400)
        assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error", error
    assert post("/v1/messages", {**ask, "model": "claude"}, 404)["error"]["type"] == "not_found_error"


def t_tokenize():
    assert post("/tokenize", {"content": ""})["tokens"] == []
    assert len(post("/tokenize", {"content": "Hello <|im_end|> world"})["tokens"]) > 3
    post("/tokenize", {"content": 5}, 400)
    post("/tokenize", {}, 400)


# ---- Hostile clients -----------------------------------------------------------------------------


def t_bad_json():
    deep = b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}"
    bodies = [b"", b"{", b"nonsense", b"[]", b"null", b'"x"', b'{"messages": "\xff\xfe"}', b'{"messages": "\\ud800"}', deep,
              b'{"a":1,"a":2}', b'{"messages":[{"role":"user","content":"\\u0000"}]}', b"{}\x00", b"\xef\xbb\xbf{}",
              b'{"max_tokens": 1e400}', b'{"max_tokens": 123456789012345678901234567890}']
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/v1/contexts"):
        for body in bodies:
            status, headers, text = call("POST", path, body, {"Content-Type": "application/json"})
            assert status == 400, (path, body[:40], status, text[:200])
            error = json.loads(text)["error"]
            assert error["message"] and error["type"] == "invalid_request_error", error
    alive()


def t_bad_values():
    wrong = {"max_tokens": [0, -1, 1.5, "5", True, 2**31, 2**63 - 1, [], {}], "temperature": [-0.1, 11, "1", True, []],
             "top_p": [-1, 1.1, "x"], "n": [0, 17, 1.5, "1"], "seed": [-2, 1.5, "x", 2**60], "stream": [1, "true"],
             "top_k": [-1, 0.5], "stop": [5, [5], "", [""], ["x"] * 17, "x" * 300, {}], "logprobs": [5, "x"],
             "top_logprobs": [21, -1, 1], "messages": [[], {}, "x", [5], [{}], [{"role": "king", "content": "x"}],
             [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image_url"}]}]], "model": [5, []],
             "logit_bias": [{"x": 1}, {"1": 101}, {"1": "x"}, {"-1": 1}, [], 5], "tools": [5, [5], [{}]],
             "tool_choice": [5, "x", "required"], "response_format": [5, {}, {"type": "xml"}, {"type": "json_schema"}],
             "stream_options": [5], "frequency_penalty": [3, "x"], "min_p": [2]}
    for key, values in wrong.items():
        for value in values:
            reply = post("/v1/chat/completions", user("x", **{key: value}), 400)
            assert reply["error"]["type"] == "invalid_request_error", (key, value, reply)
    post("/v1/chat/completions", user("x", logit_bias={"99999999": 1}), 400)
    post("/v1/chat/completions", user("word " * 9000), 400)
    assert post("/v1/chat/completions", user("word " * 9000), 400)["error"]["code"] == "context_length_exceeded"
    for null in ("max_tokens", "temperature", "stop", "tools", "response_format", "squeeze", "seed"):
        post("/v1/chat/completions", user("x", **{"max_tokens": 1, null: None}) | {"stream": None, "max_tokens": 1})
    alive()


def t_bad_http():
    for data in (b"\x00\x01\x02\x03\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 5000,
                 b"GET /" + b"a" * 30000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
                 b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
                 b"GET /health HTTP/1.1\r\n\r\n",
                 b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}",
                 b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
                 b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"):
        got = raw(data, 3)
        assert not got or got.split()[1][:1] == b"4" or got.split()[1] == b"505", (data[:60], got[:100])
    for path in ("/../../etc/passwd", "/v1/contexts/../../etc/passwd", "/v1/contexts/%2e%2e%2fetc", "/v1/contexts/..",
                 "/v1/contexts/.hidden", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/contexts/bad%20name", "//health"):
        got = raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), 5)
        assert b" 404 " in got.split(b"\r\n")[0], (path, got[:100])
        got = raw(f"DELETE {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), 5)
        assert got.split()[1] in (b"404", b"405"), (path, got[:100])
    assert os.path.exists(os.environ["SERVE_FOLDER"] + "/contexts/bad name.sqz.gguf")
    alive()


def t_split_bytes():
    data = request_bytes(user("Hi", max_tokens=1))
    for at in range(1, len(data), 7):
        got = raw(None, 30, [data[:at], data[at:]])
        assert b" 200 " in got.split(b"\r\n")[0], (at, got[:200])
    s = socket.create_connection(("127.0.0.1", PORT), timeout=60)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for i in range(len(data)):  # each byte by itself
        s.sendall(data[i : i + 1])
        time.sleep(0.001)
    assert b" 200 " in s.recv(4096)
    s.close()
    body = json.dumps(user("Hi", max_tokens=1)).encode()
    chunked = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
        b"1\r\n" + body[i : i + 1] + b"\r\n" for i in range(len(body))) + b"0\r\n\r\n"
    assert b" 200 " in raw(chunked, 30).split(b"\r\n")[0]


def t_oversized():
    big = user("x" * (1 << 20))
    assert post("/v1/chat/completions", big, 413)["error"]["code"] == "body_too_large"
    assert b" 413 " in raw(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n", 10)
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    try:
        got = raw(None, 20, [head] + [piece] * 40 + [b"0\r\n\r\n"])
        assert not got or b" 413 " in got, got[:100]
    except ConnectionError:
        pass
    alive()


def t_slow_head():
    s = socket.create_connection(("127.0.0.1", PORT), timeout=30)
    since = time.time()
    try:
        for byte in b"GET /health HTTP/1.1\r\nX: " + b"y" * 100:  # a byte at a time for longer than is allowed
            s.sendall(bytes([byte]))
            time.sleep(0.2)
        assert False, "a slow head was let go on"
    except ConnectionError:
        assert time.time() - since < 15
    alive()


def t_wrong_host():
    for host in ("evil.example", "127.0.0.1.evil.example:80"):
        assert b" 403 " in raw(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()), host
    evil = request_bytes(user("x"), extra="Origin: http://evil.example\r\n")
    assert b" 403 " in raw(evil).split(b"\r\n")[0]
    own = request_bytes(user("x", max_tokens=1), extra="Origin: http://localhost\r\n")
    assert b" 200 " in raw(own, 60).split(b"\r\n")[0]


# ---- Many at once ------------------------------------------------------------------------------------


def metric(name):
    for line in call("GET", "/metrics")[2].decode().split("\n"):
        if line.startswith("squeeze_" + name + " "):
            return int(line.split()[1])
    raise AssertionError(name)


def open_stream(max_tokens=4000):
    s = socket.create_connection(("127.0.0.1", PORT), timeout=60)
    s.sendall(request_bytes({"messages": [{"role": "user", "content": "Write a very long story."}], "stream": True,
                             "max_tokens": max_tokens, "temperature": 1, "logit_bias": {"2": -100, "0": -100}}))
    return s


def wait_for(what, seconds):
    since = time.time()
    while not what():
        assert time.time() - since < seconds, f"waited {seconds} s"
        time.sleep(0.02)
    return time.time() - since


def t_leaves():
    s = open_stream()
    s.recv(1000)
    wait_for(lambda: metric("answers_active") == 1, 30)
    s.close()
    took = wait_for(lambda: metric("answers_active") == 0, 10)
    print(f"place free after {took:.2f} s")
    whole = socket.create_connection(("127.0.0.1", PORT), timeout=60)  # one that does not stream
    whole.sendall(request_bytes({"messages": [{"role": "user", "content": "A long story."}], "max_tokens": 4000,
                                 "logit_bias": {"2": -100, "0": -100}}))
    wait_for(lambda: metric("answers_active") == 1, 30)
    whole.close()
    wait_for(lambda: metric("answers_active") == 0, 10)


def t_queue():
    streams = [open_stream() for _ in range(4)]
    wait_for(lambda: metric("answers_active") == 4, 60)
    waiting = [open_stream(3) for _ in range(8)]
    wait_for(lambda: metric("requests_waiting") == 8, 30)
    status, headers, text = call("POST", "/v1/chat/completions", user("x"))
    assert status == 429 and int(headers["Retry-After"]) > 0, (status, text)
    assert json.loads(text)["error"]["type"] == "rate_limit_error"
    seen = b""
    until = time.time() + 20
    while b"\n: " not in seen and time.time() < until:  # one that waits is told that it is not forgotten
        seen += waiting[0].recv(1000)
    assert b": still here" in seen, seen[-200:]
    alive()
    for s in waiting[1:4] + streams:
        s.close()
    for s in waiting[:1] + waiting[4:]:
        got = b""
        while b"[DONE]" not in got:
            more = s.recv(65536)
            assert more, got[-300:]
            got += more
        s.close()
    wait_for(lambda: metric("answers_active") == 0 and metric("requests_waiting") == 0, 20)


def t_many():
    def one(i):
        body = user(f"What is {i} plus 1?", max_tokens=3, stream=i % 2 == 0, **({"model": "book"} if i % 3 == 0 else {}))
        until = time.time() + 300
        while True:  # eight may wait, thirty-two want to: who is refused comes again
            status, headers, text = call("POST", "/v1/chat/completions", body)
            if status != 429 or time.time() > until:
                return status, text
            time.sleep(0.2)

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        for status, text in pool.map(one, range(60)):
            assert status == 200, (status, text[:300])


# ---- Contexts ---------------------------------------------------------------------------------------------


def story(n):
    return "".join(f"On day {i} the ship had gone {i * 37} miles. " for i in range(n))


def wait_ready(name, seconds=300):
    seen = set()

    def ready():
        state = get("/v1/contexts/" + name)
        seen.add(state["status"])
        assert state["status"] != "failed", state
        return state["status"] == "ready"

    wait_for(ready, seconds)
    return seen


def t_contexts():
    reply = post("/v1/contexts", {"name": "ship", "text": story(60)}, 202)
    assert reply["id"] == "ship" and reply["status"] in ("waiting", "reading", "squeezing", "ready"), reply
    post("/v1/contexts", {"name": "ship", "text": "x"}, 409)
    for bad in ("", "../x", "a/b", ".x", "a b", "x" * 65, "\u00e4"):
        post("/v1/contexts", {"name": bad, "text": "x"}, 400)
    post("/v1/contexts", {"name": "y", "text": ""}, 400)
    post("/v1/contexts", {"name": "y", "text": "%PDF-1.4 x"}, 400)
    post("/v1/contexts", {"name": "y", "text": story(3000)}, 413 if len(story(3000)) > 256 << 20 else 400)
    wait_ready("ship")
    reply = post("/v1/chat/completions", user("How far on day 30?", model="ship", max_tokens=4))
    assert reply["usage"]["squeeze"]["share_read"] > 0
    status, _, text = call("POST", "/v1/contexts?name=plain", story(30).encode(), {"Content-Type": "text/plain"})
    assert status == 202, text
    wait_ready("plain")
    assert json.loads(call("PATCH", "/v1/contexts/ship", {"pinned": True})[2])["pinned"] is True
    assert os.path.exists(os.environ["SERVE_FOLDER"] + "/contexts/ship.pinned")
    assert json.loads(call("PATCH", "/v1/contexts/ship", {"pinned": False})[2])["pinned"] is False
    assert call("PATCH", "/v1/contexts/ship", {"pinned": 5})[0] == 400
    for name in ("ship", "plain"):
        assert json.loads(call("DELETE", "/v1/contexts/" + name)[2])["deleted"] is True
        get("/v1/contexts/" + name, 404)
    post("/v1/contexts", {"name": "gone", "text": story(200)}, 202)
    assert call("DELETE", "/v1/contexts/gone")[0] == 200
    get("/v1/contexts/gone", 404)
    left = [n for n in os.listdir(os.environ["SERVE_FOLDER"] + "/contexts") if n.startswith(("ship", "plain"))]
    assert left == [], left
    get("/v1/contexts/none", 404)


def t_cut():
    """A context file that is cut off while it is read: its answer ends with an error, it is refused, others go on, and
    it is there again when the file is."""
    path = os.environ["SERVE_FOLDER"] + "/contexts/cut.sqz.gguf"
    whole = open(path, "rb").read()
    assert "cut" in [c["id"] for c in get("/v1/contexts")["data"]]
    wait_ready("cut")
    ask = user("Tell a long story.", model="cut", stream=True, max_tokens=2000, squeeze={"exact": True},
               logit_bias={"2": -100, "0": -100})
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(ask).encode())
    response = connection.getresponse()
    assert response.status == 200, response.read()
    while b'"content":"' not in response.readline():
        pass
    os.truncate(path, 4096)
    last = [line for line in response.read().split(b"\n") if line.startswith(b"data: {")][-1]
    error = json.loads(last[6:])["error"]
    assert error["code"] == "context_unusable" and "/" not in error["message"], error
    assert "the context cut cannot be used: the context file changed" in error["message"], error
    later = post("/v1/chat/completions", user("Hello", model="cut"), 409)["error"]
    assert later["code"] == "context_unusable", later
    alive()
    assert post("/v1/chat/completions", user("What is free?", model="book"))["usage"]["squeeze"]
    state = get("/v1/contexts/cut")
    assert state["status"] == "failed" and "changed" in state["error"], state
    with open(path, "wb") as file:
        file.write(whole)
    # Cut off between two requests, without anybody who reads it: the next one says so.
    wait_for(lambda: get("/v1/contexts")["data"] and get("/v1/contexts/cut")["status"] == "ready", 20)
    post("/v1/chat/completions", user("What is free?", model="cut", max_tokens=2))
    os.truncate(path, 4096)
    again = post("/v1/chat/completions", user("What is free?", model="cut"), 409)["error"]
    assert again["code"] == "context_unusable" and "4096 now" in again["message"], again
    os.remove(path)


def automatic():
    return [c for c in get("/v1/contexts")["data"] if c["automatic"]]


def t_auto():
    """A long beginning is answered at once, and is a context for the next request."""
    document = story(100)
    first = post("/v1/chat/completions", user(document + "\n\nHow far on day 30?", max_tokens=2))
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 and "squeeze" not in first["usage"]
    wait_for(lambda: [c["status"] for c in automatic()] == ["ready"], 300)
    # It was read once: what the answer read was taken over, but for the tokens that calibration runs again.
    assert 0 < metric("document_tokens_total") <= 64, metric("document_tokens_total")
    second = post("/v1/chat/completions", user(document + "\n\nWhat is a mile?", max_tokens=2))
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 1000 and second["usage"]["squeeze"]["share_read"] > 0, second["usage"]
    # The question's own turn is not needed for it: with more said, it is still the same beginning.
    more = user("", messages=[{"role": "user", "content": document + "\n\nWhat is a mile?"},
                              {"role": "assistant", "content": "A distance."}, {"role": "user", "content": "How long?"}])
    assert post("/v1/chat/completions", more)["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    post("/v1/chat/completions", user("Short. How far?", max_tokens=2))
    assert len(automatic()) == 1


def t_auto_gone():
    """Who brought the document leaves: it is read on from where the answer came to."""
    document = "Another ship. " + story(200)
    s = socket.create_connection(("127.0.0.1", PORT), timeout=60)
    s.sendall(request_bytes(user(document + "\n\nHow far?", stream=True)))
    wait_for(lambda: any(c.get("progress", 0) > 0.2 for c in automatic()), 300)
    before = metric("document_tokens_total")
    s.close()
    name = next(c["id"] for c in automatic() if c["status"] != "ready")
    wait_ready(name)
    tokens, read = get("/v1/contexts/" + name)["tokens"], metric("document_tokens_total") - before
    assert 0 < read <= 0.8 * tokens, (read, tokens)
    call("DELETE", "/v1/contexts/" + name)


def t_auto_again():
    """After a restart, for anybody."""
    assert [c["status"] for c in automatic()] == ["ready"]
    usage = post("/v1/messages", {"messages": [{"role": "user", "content": story(100) + "\n\nWhere?"}], "max_tokens": 1})["usage"]
    assert usage["cache_read_input_tokens"] > 1000, usage


def t_disk():
    """The least recently used goes when the folder is full, one that is pinned never."""
    assert json.loads(call("PATCH", "/v1/contexts/book", {"pinned": True})[2])["pinned"] is True
    for name in ("one", "two"):
        post("/v1/contexts", {"name": name, "text": story(40)}, 202)
        wait_ready(name)
        time.sleep(1.1)
    post("/v1/chat/completions", user("x", model="one", max_tokens=1))
    post("/v1/contexts", {"name": "three", "text": story(40)}, 202)
    wait_ready("three")
    wait_for(lambda: len([c for c in get("/v1/contexts")["data"] if c["status"] == "ready"]) <= 3, 20)
    left = {c["id"] for c in get("/v1/contexts")["data"]}
    assert {"book", "one", "three"} <= left and "two" not in left, left
    assert not os.path.exists(os.environ["SERVE_FOLDER"] + "/contexts/two.sqz.gguf")


def memory_bytes():
    for line in open(f"/proc/{os.environ['SERVE_PROCESS']}/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("VmRSS")


def t_idle():
    """Streams that wait cost little."""
    n = int(os.environ.get("SERVE_STREAMS", "2000"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(n + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    busy = open_stream()
    wait_for(lambda: metric("answers_active") == 1, 60)
    # The one that is answered meanwhile keeps its tokens: four layers, 3 heads of 64, keys and values in 16 bits.
    rows = lambda: metric("answer_tokens_total") * 4 * 3 * 64 * 2 * 2
    before = memory_bytes() - rows()
    streams = []
    for i in range(n):
        streams.append(open_stream(3))
    wait_for(lambda: metric("requests_waiting") == n, 60)
    time.sleep(3)  # comments have been sent to all
    each = (memory_bytes() - rows() - before) / n
    print(f"{n} streams, {each:.0f} bytes each")
    assert each < 16 * 1024, each
    for s in streams[::100]:
        assert b": still here" in s.recv(65536)
    for s in streams + [busy]:
        s.close()
    wait_for(lambda: metric("requests_waiting") == 0 and metric("answers_active") == 0, 30)
    alive()


def t_begin_job():
    post("/v1/contexts", {"name": "long", "text": story(200)}, 202)
    wait_for(lambda: get("/v1/contexts/long")["status"] in ("reading", "squeezing"), 60)


def t_end_job():
    assert get("/v1/contexts/long")["status"] in ("waiting", "reading", "squeezing", "ready")
    wait_ready("long")


# ---- Keys, and the end -----------------------------------------------------------------------------------------


def t_keys():
    alive()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"x-api-key": KEY[:-1]},
                    {"Authorization": "Bearer " + "x" * 5000}):
        status, got, text = call("GET", "/v1/models", headers=headers)
        assert status == 401 and got["WWW-Authenticate"] == "Bearer", (headers, status)
        status, _, _ = call("POST", "/v1/chat/completions", user("x"), headers)
        assert status == 401
    for headers in ({"Authorization": "Bearer " + KEY}, {"x-api-key": KEY}, {"Authorization": "bearer " + KEY}):
        assert call("GET", "/v1/models", headers=headers)[0] == 200, headers
    assert call("POST", "/v1/chat/completions", user("x", max_tokens=1), {"x-api-key": KEY})[0] == 200


def t_slow_answer():
    s = open_stream(60)
    got = s.recv(1000)
    print("begun", flush=True)
    while b"[DONE]" not in got:
        more = s.recv(65536)
        assert more, got[-300:]
        got += more


def t_together():
    """Users of one context, one alone and then three at the same time, by whatever place it lies in."""
    body = user("Who may copy it?", model="b", max_tokens=6, squeeze={"budget": 0.3})

    def answered():
        reply = post("/v1/chat/completions", body)
        assert reply["choices"][0]["message"]["content"] and reply["usage"]["completion_tokens"] > 0, reply
        assert 0.05 < reply["usage"]["squeeze"]["share_read"] <= 1, reply

    answered()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for answer in [pool.submit(answered) for _ in range(3)]:
            answer.result()


def t_meanwhile():
    """On a card a document is squeezed by the thread that answers: a stream goes on while it is."""
    s = open_stream(4000)
    s.settimeout(0.005)
    post("/v1/contexts", {"name": "beside", "text": story(60)}, status=202)
    seen, since, state = {}, time.time(), ""
    while state != "ready":
        assert time.time() < since + 300, seen
        state = get("/v1/contexts/beside")["status"]
        assert state != "failed", get("/v1/contexts/beside")
        try:
            seen[state] = seen.get(state, 0) + s.recv(65536).count(b"data: ")
        except TimeoutError:
            pass
    s.close()
    print("pieces", seen, flush=True)
    assert seen.get("reading", 0) > 0 and seen.get("squeezing", 0) > 0, seen
    call("DELETE", "/v1/contexts/beside")


if sys.argv[2:] == ["story"]:
    print(story(40))
    sys.exit()
for name in sys.argv[2:]:
    since = time.time()
    globals()["t_" + name]()
    print(f"{name}: {time.time() - since:.1f} s", flush=True)
