#!/usr/bin/env python3
"""One step of bench/serve.sh, which describes them: serve_client.py STEP OPTIONS. Python's own library alone."""
import argparse
import glob
import http.client
import json
import os
import platform
import re
import selectors
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time

# 40 tokens with what stands around it.
QUESTION = ("What does the writer of this text want the reader to know about {}, and which of the facts that are "
            "told in it are there to support that view of it?")
SUBJECTS = ["people", "money", "places", "time", "science", "work", "danger", "history"]


def parse():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("step")
    p.add_argument("--squeeze", required=True)
    p.add_argument("--llama", help="llama-server of the same llama.cpp")
    p.add_argument("--model", required=True)
    p.add_argument("--documents", required=True)
    p.add_argument("--work", required=True)
    p.add_argument("--tokens", type=int, default=7900)
    p.add_argument("--answer", type=int, default=64)
    p.add_argument("--budget", type=float, default=0.1)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--users", type=int, default=8)
    p.add_argument("--different", type=int, help="documents of the users on documents of their own (one each)")
    p.add_argument("--slot-document", type=int, help="what all of llama-server's slots hold then, a copy each: a document "
                   "takes it long to read, and how fast it answers does not depend on which one it is")
    p.add_argument("--ends", default="0,2", help="tokens by which the model ends an answer (the default model's)")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--streams", type=int, default=10000)
    p.add_argument("--only", choices=["squeeze", "llama"], help="of a step that measures both")
    p.add_argument("--out")
    p.add_argument("--command", default="")
    return p.parse_args()


def say(*words):
    print("serve:", *words, file=sys.stderr, flush=True)


def keep(o, name, value):
    """What a step measured; steps may run apart, and their results are joined later."""
    path = f"{o.work}/{name}.json"
    with open(path + ".new", "w") as f:
        json.dump(value, f, indent=2)
    os.replace(path + ".new", path)
    say(name, json.dumps(value))


# ---- Servers -----------------------------------------------------------------------------


class Server:
    """A server that runs until the end of a `with`; `since` is when it was started, `ready` when it answers."""

    def __init__(self, command, port, name):
        self.command, self.port, self.name = command, port, name

    def __enter__(self):
        self.since = time.monotonic()
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=open(os.devnull, "w"), start_new_session=True)
        while self.process.poll() is None:
            try:
                if self.call("GET", "/health")[0] == 200:
                    self.ready = time.monotonic()
                    return self
            except OSError:
                pass
            time.sleep(0.01)
        raise SystemExit(f"serve: {self.name} did not start: {shlex.join(self.command)}")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def call(self, method, path, body=None, timeout=900):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        data = json.dumps(body).encode() if body is not None else None
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, text

    def post(self, path, body):
        status, text = self.call("POST", path, body)
        if status not in (200, 202):
            raise SystemExit(f"serve: {self.name} {path}: {status} {text[:400]}")
        return json.loads(text)

    def memory(self, kind):
        """Of the process, in bytes: Rss, Pss, Pss_Anon..."""
        for line in open(f"/proc/{self.process.pid}/smaps_rollup"):
            if line.startswith(kind + ":"):
                return int(line.split()[1]) * 1024
        raise SystemExit(f"serve: no {kind} of {self.name}")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def squeeze_server(o, *more, contexts="contexts"):
    port = free_port()
    return Server([o.squeeze, "serve", "-m", o.model, "--contexts", f"{o.work}/{contexts}", "--port", str(port),
                   "-b", str(o.budget), *more], port, "squeeze serve")


def llama_server(o, n_slots, unified, n_tokens=8192):
    """With flash attention, all threads, no copies of idle slots, and a cache for every slot that is used."""
    port = free_port()
    return Server([o.llama, "-m", o.model, "--port", str(port), "-np", str(n_slots), "-c", str(n_slots * n_tokens),
                   "-t", str(o.threads), "-tb", str(o.threads), "-fa", "on", "-b", "2048", "-ub", "512",
                   "--kv-unified" if unified else "--no-kv-unified", "--no-cache-idle-slots", "-cram", "0",
                   "--slot-save-path", f"{o.work}/slots"], port, "llama-server")


# ---- Answers as they come ------------------------------------------------------------------


class Stream:
    """A streamed answer: when its pieces came, and the text. Bytes are noted as they come and read when all have: the
    client shares the cores with the server."""

    def __init__(self, server, path, body, watch):
        data = json.dumps({**body, "stream": True}).encode()
        self.server, self.times, self.text, self.usage, self.came = server, [], "", None, []
        self.head, self.chunk_left, self.body, self.rest = True, 0, b"", b""
        self.sent = time.monotonic()
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=900)
        self.socket.sendall((f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                             f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n").encode() + data)
        watch.register(self.socket, selectors.EVENT_READ, self)

    def take(self):
        """Whether the answer goes on."""
        data = self.socket.recv(65536)
        self.came.append((time.monotonic(), data))
        return bool(data)

    def read(self):
        for now, data in self.came:
            self.rest += data
            if self.head:
                at = self.rest.find(b"\r\n\r\n")
                if at < 0:
                    continue
                if b" 200 " not in self.rest[:16]:
                    raise SystemExit(f"serve: {self.server.name}: {self.rest[:400]}")
                self.head, self.rest = False, self.rest[at + 4:]
            self.dechunk()
            *lines, self.body = self.body.split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    self.event(json.loads(line[6:]), now)

    def dechunk(self):
        while True:
            if self.chunk_left == 0:
                at = self.rest.find(b"\r\n")
                if at < 0:
                    return
                self.chunk_left, self.rest = int(self.rest[:at], 16) + 2, self.rest[at + 2:]
            n = min(self.chunk_left, len(self.rest))
            if n == 0:
                return
            end = max(0, n - max(0, 2 - (self.chunk_left - n)))  # the chunk's own end of line is no part of it
            self.body += self.rest[:end]
            self.rest, self.chunk_left = self.rest[n:], self.chunk_left - n

    def event(self, event, now):
        piece = event.get("content") or "".join(c["delta"].get("content") or "" for c in event.get("choices", []))
        if piece:
            self.times.append(now)
            self.text += piece
        if event.get("usage"):
            self.usage = event["usage"]
        if event.get("timings"):
            self.usage = {"completion_tokens": event["timings"]["predicted_n"],
                          "prompt_tokens": event["timings"]["prompt_n"]}


def follow(streams, watch, renew=None, until=None):
    """Until all answers have come. `renew` may give a stream that follows one that ended."""
    left = len(streams)
    while left and not (until and until()):
        for key, _ in watch.select(0.05):
            stream = key.data
            if stream.take():
                continue
            watch.unregister(stream.socket)
            stream.socket.close()
            following = renew(stream) if renew else None
            if following:
                streams.append(following)
            elif stream in streams:
                left -= 1
    for stream in streams:
        stream.socket.close()
        stream.read()


def ask_squeeze(o, server, context, subject, watch, **more):
    body = {"model": context, "messages": [{"role": "user", "content": QUESTION.format(subject)}], "temperature": 0,
            "max_tokens": o.answer, "stream_options": {"include_usage": True}, **more}
    return Stream(server, "/v1/chat/completions", body, watch)


def ask_llama(o, server, slot, tokens, watch):
    body = {"prompt": tokens, "n_predict": o.answer, "temperature": 0, "cache_prompt": True, "id_slot": slot,
            "ignore_eos": True}
    return Stream(server, "/completion", body, watch)


def biases(o):
    """Keeps an answer from ending before its last token."""
    return {token: -100 for token in o.ends.split(",")}


def gaps(streams):
    return [b - a for s in streams for a, b in zip(s.times, s.times[1:])]


def together(streams, n_tokens):
    """What users who began together got. Every answer has its length, or the figure would not be theirs."""
    for s in streams:
        if s.usage["completion_tokens"] != n_tokens:
            raise SystemExit(f"serve: an answer of {s.usage['completion_tokens']} tokens, not {n_tokens}")
    seconds = max(s.times[-1] for s in streams) - min(s.sent for s in streams)
    return {"tokens_s": len(streams) * n_tokens / seconds,
            "first_token_s": statistics.median(s.times[0] - s.sent for s in streams),
            "seconds": seconds}


# ---- What is asked about ---------------------------------------------------------------------


def documents(o):
    """Texts that are long enough for certain, as many as there are users, the same ones every time."""
    texts = []
    for path in sorted(glob.glob(f"{o.documents}/*")):
        if path.endswith(".jsonl"):
            texts += [json.loads(line)["input"] for line in open(path) if line.strip()]
        elif path.endswith(".txt"):
            texts.append(open(path).read())
    texts = [t for t in dict.fromkeys(texts) if len(t.encode()) > 5.2 * o.tokens]
    if len(texts) <= o.users:
        raise SystemExit(f"serve: {len(texts)} long documents in {o.documents}: {o.users + 1} are needed")
    return texts[:o.users + 1]


def step_prepare(o):
    """Contexts of the documents, and their texts; the last one's is left unprepared."""
    os.makedirs(f"{o.work}/contexts", exist_ok=True)
    for i, text in enumerate(documents(o)):
        path, context = f"{o.work}/document-{i}.txt", f"{o.work}/contexts/document-{i}.sqz.gguf"
        with open(path, "w") as f:
            f.write(text)
        if i < o.users and not os.path.exists(context):
            subprocess.run([o.squeeze, "prepare", "-q", "-m", o.model, f"--truncate={o.tokens}", path, "-o", context],
                           check=True)


def prompt_of(o, server, i):
    """The first tokens of a document, as llama-server takes them."""
    text = open(f"{o.work}/document-{i}.txt").read()
    return server.post("/tokenize", {"content": text})["tokens"][:o.tokens]


def step_read(o):
    """llama-server reads every document once and keeps what it has of it in a file."""
    os.makedirs(f"{o.work}/slots", exist_ok=True)
    for i in range(o.users):
        if os.path.exists(f"{o.work}/slots/document-{i}"):
            continue
        with llama_server(o, 1, True) as server:
            server.post("/completion", {"prompt": prompt_of(o, server, i), "n_predict": 1, "cache_prompt": True,
                                        "id_slot": 0})
            server.post("/slots/0?action=save", {"filename": f"document-{i}.new"})
            os.replace(f"{o.work}/slots/document-{i}.new", f"{o.work}/slots/document-{i}")
            say("llama-server has read document", i)


# ---- The figures ---------------------------------------------------------------------------------


def question_tokens(o, server, subject):
    """As many tokens for llama-server as the question takes behind a context."""
    return server.post("/tokenize", {"content": f"<|im_start|>user\n{QUESTION.format(subject)}<|im_end|>\n"
                                                "<|im_start|>assistant\n"})["tokens"]


def users_squeeze(o, context_of, n_users):
    """On contexts of a folder of their own, so that the process holds nothing else."""
    names, folder = {context_of(i) for i in range(n_users)}, f"contexts-{n_users}"
    os.makedirs(f"{o.work}/{folder}", exist_ok=True)
    for path in glob.glob(f"{o.work}/{folder}/*"):
        os.unlink(path)
    for name in names:
        os.link(f"{o.work}/contexts/{name}.sqz.gguf", f"{o.work}/{folder}/{name}.sqz.gguf")
    with squeeze_server(o, contexts=folder) as server:
        bias = biases(o)
        results = []
        for i in range(n_users):  # pages of the contexts come to memory
            server.post("/v1/chat/completions", {"model": context_of(i), "messages": [
                {"role": "user", "content": "Why?"}], "max_tokens": 1})
        alone = server.memory("Rss"), server.memory("Pss_Anon")
        for _ in range(o.rounds):
            with selectors.DefaultSelector() as watch:
                streams = [ask_squeeze(o, server, context_of(i), SUBJECTS[i % 8], watch, logit_bias=bias)
                           for i in range(n_users)]
                follow(streams, watch)
            results.append({**together(streams, o.answer),
                            "share_read": streams[0].usage["squeeze"]["share_read"],
                            "question_tokens": streams[0].usage["prompt_tokens"] - o.tokens})
        result = statistics.median_low(r["tokens_s"] for r in results)
        return {**next(r for r in results if r["tokens_s"] == result),
                "answer_tokens": o.answer, "contexts": len(names), "memory_alone_bytes": alone[0], "memory_users_bytes": server.memory("Rss"),
                "memory_grown_bytes": server.memory("Pss_Anon") - alone[1]}


def users_llama(o, document_of, n_users, unified):
    with llama_server(o, n_users, unified) as server:
        for i in range(n_users):
            status, text = server.call("POST", f"/slots/{i}?action=restore",
                                       {"filename": f"document-{document_of(i)}"})
            if status != 200 and not unified:
                say("llama-server without a unified cache does not take the saved slots:", text[:200])
                return None
            if status != 200:
                raise SystemExit(f"serve: llama-server, slot {i}: {status} {text[:400]}")
        prompts = {d: prompt_of(o, server, d) for d in {document_of(i) for i in range(n_users)}}
        with selectors.DefaultSelector() as watch:
            streams = [ask_llama(o, server, i, prompts[document_of(i)] +
                                 question_tokens(o, server, SUBJECTS[i % 8]), watch) for i in range(n_users)]
            follow(streams, watch)
        again = max(s.usage["prompt_tokens"] for s in streams)
        if again > 100:
            raise SystemExit(f"serve: llama-server read {again} tokens again")
        return {**together(streams, o.answer), "answer_tokens": o.answer, "memory_users_bytes": server.memory("Rss"),
                "documents": len(prompts)}


def step_users(o, name, number_of, slot_of=None):
    if o.only != "llama":
        keep(o, name + "-squeeze", users_squeeze(o, lambda i: f"document-{number_of(i)}", o.users))
    if o.only != "squeeze":
        for unified in (True, False):
            found = users_llama(o, slot_of or number_of, o.users, unified)
            if found:
                keep(o, f"{name}-llama-{'unified' if unified else 'apart'}", found)


def step_one(o):
    step_users(o, "one", lambda i: 0)


def step_many(o):
    n = o.different or o.users
    copies = None if o.slot_document is None else lambda i: o.slot_document
    step_users(o, "many", lambda i: i % n, copies)


def step_alone(o):
    """One user: what eight are held against in memory."""
    keep(o, "alone-squeeze", users_squeeze(o, lambda i: "document-0", 1))


def step_restart(o):
    """A question right after a restart: from the file, and by reading the document again."""
    times = []
    for _ in range(max(3, o.rounds)) if o.only != "llama" else []:
        with squeeze_server(o) as server, selectors.DefaultSelector() as watch:
            streams = [ask_squeeze(o, server, "document-0", SUBJECTS[0], watch)]
            follow(streams, watch)
            times.append((streams[0].times[0] - streams[0].sent, server.ready - server.since,
                          streams[0].usage["prompt_tokens"] - o.tokens))
    if times:
        first = sorted(times)[len(times) // 2]
        keep(o, "restart-squeeze", {"first_token_s": first[0], "start_s": first[1], "question_tokens": first[2]})
    if o.only == "squeeze":
        return
    with llama_server(o, 1, True) as server, selectors.DefaultSelector() as watch:
        prompt = prompt_of(o, server, 0) + question_tokens(o, server, SUBJECTS[0])
        body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "cache_prompt": True}
        streams = [Stream(server, "/completion", body, watch)]
        follow(streams, watch)
        keep(o, "restart-llama", {"first_token_s": streams[0].times[0] - streams[0].sent,
                                  "start_s": server.ready - server.since})


def step_overhead(o):
    """The same question by the program alone and through the server, in turns."""
    question, rates = QUESTION.format(SUBJECTS[0]), {"ask": [], "serve": []}

    def program():
        text = subprocess.run([o.squeeze, "ask", "-m", o.model, f"{o.work}/contexts/document-0.sqz.gguf", question,
                               "-b", str(o.budget), "-n", str(o.answer), "--json"],
                              check=True, capture_output=True, text=True).stdout
        answer = json.loads(text)
        answer = answer["answers"][0] if "answers" in answer else answer
        rates["ask"].append(answer["tokens_per_second"])
        return answer["text"] if "text" in answer else answer["answer"]

    def served(server):
        with selectors.DefaultSelector() as watch:
            streams = [ask_squeeze(o, server, "document-0", SUBJECTS[0], watch)]
            follow(streams, watch)
        s = streams[0]
        rates["serve"].append((s.usage["completion_tokens"] - 1) / (s.times[-1] - s.times[0]))
        return s.text

    with squeeze_server(o) as server:
        served(server), program()
        rates = {"ask": [], "serve": []}
        for i in range(max(7, o.rounds)):
            pair = (program(), served(server)) if i % 2 else (served(server), program())
            if len(pair[0]) < 3 * o.answer or len(pair[1]) < 3 * o.answer:
                raise SystemExit(f"serve: an answer is too short to be timed: {pair}")
    keep(o, "overhead", {"ask_tokens_s": statistics.median(rates["ask"]),
                         "serve_tokens_s": statistics.median(rates["serve"]),
                         "overhead": statistics.median(1 - s / a for s, a in zip(rates["serve"], rates["ask"])),
                         "rounds": len(rates["ask"]), "all": rates})


def longest(streams, begin, end):
    """The longest gap of each answer that reaches into a span, and all gaps of the span."""
    found = [(b - a) for s in streams for a, b in zip(s.times, s.times[1:]) if b > begin and a < end]
    return max(found), found


def step_gap(o):
    """Gaps between the pieces of streams while a document is read, over those before it."""
    text = open(f"{o.work}/document-{o.users}.txt").read()
    with squeeze_server(o) as server:
        bias = biases(o)
        for way in ("job", "auto"):
            for n in (1, o.users):
                keep(o, f"gap-{way}-{n}", gap_of(o, server, text, way, n, bias))
            text = text[len(text) // 4:]  # the next way reads another document


def context_states(server, way):
    return {c["id"]: c["status"] for c in json.loads(server.call("GET", "/v1/contexts")[1])["data"]
            if c["id"].startswith("gap" if way == "job" else "auto-")}


def gap_of(o, server, text, way, n, bias):
    quiet_seconds, read_seconds = (4 if n == 1 else 9), 10
    since, part, long = time.monotonic(), text[:4 * o.tokens // 2], {"logit_bias": bias, "max_tokens": 200}
    with selectors.DefaultSelector() as watch:
        extra = []

        def again(stream):
            if stream in extra or time.monotonic() > since + quiet_seconds + read_seconds:
                return None
            return ask_squeeze(o, server, "document-0", SUBJECTS[len(streams) % 8], watch, **long)

        def watch_begin():
            if extra or time.monotonic() < since + quiet_seconds:
                return time.monotonic() > since + quiet_seconds + read_seconds + 0.5
            if way == "auto":
                body = {"messages": [{"role": "user", "content": part + "\n\nWhat is it?"}], "max_tokens": 4}
                extra.append(Stream(server, "/v1/chat/completions", body, watch))
            else:
                server.post("/v1/contexts", {"name": "gap", "text": part})
                extra.append(None)
            return False

        streams = [ask_squeeze(o, server, "document-0", SUBJECTS[i % 8], watch, **long) for i in range(n)]
        follow(streams, watch, again, watch_begin)
        for stream in filter(None, extra):
            stream.socket.close()
    begin = since + quiet_seconds
    usual = longest(streams, begin - 3, begin)
    read = longest(streams, begin, begin + read_seconds)
    before = json.loads(server.call("GET", "/v1/contexts")[1])
    for c in before["data"]:
        if not c["id"].startswith("document-"):
            server.call("DELETE", "/v1/contexts/" + c["id"])
    return {"usual_s": statistics.median(usual[1]), "usual_longest_s": usual[0], "longest_s": read[0],
            "median_s": statistics.median(read[1]), "gap_ratio": read[0] / statistics.median(usual[1]), "streams": n}


def step_idle(o):
    """Streams that wait for a place, each a connection with a comment line a second."""
    with squeeze_server(o, "--slots", "1", "--queue", str(o.streams + 10), "--connections", str(o.streams + 100)) as s:
        def metric(name):
            return float(re.search(rf"^squeeze_{name} (.*)$", s.call("GET", "/metrics")[1].decode(), re.M).group(1))

        def open_one():
            body = {"messages": [{"role": "user", "content": "Tell a story."}], "max_tokens": 4000, "stream": True,
                    "temperature": 0, "logit_bias": bias}
            data = json.dumps(body).encode()
            c = socket.create_connection(("127.0.0.1", s.port), timeout=60)
            c.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                      b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            return c

        bias = biases(o)
        streams = [open_one()]
        while metric("answers_active") != 1:
            time.sleep(0.05)
        before = s.memory("Pss_Anon")
        streams += [open_one() for _ in range(o.streams)]
        since = time.monotonic()
        while metric("requests_waiting") != o.streams and time.monotonic() < since + 60:
            time.sleep(0.1)
        time.sleep(3)  # comments have gone to all
        held = int(metric("requests_waiting"))
        keep(o, "idle", {"streams": held, "bytes_a_stream": (s.memory("Pss_Anon") - before) / held})
        for c in streams:
            c.close()


# ---- The table -------------------------------------------------------------------------------------


def read_kept(o, name):
    try:
        return json.load(open(f"{o.work}/{name}.json"))
    except FileNotFoundError:
        return None


def rows_of_users(o, name, what):
    ours = read_kept(o, name + "-squeeze")
    theirs = {k: read_kept(o, f"{name}-llama-{k}") for k in ("unified", "apart")}
    theirs = {k: v for k, v in theirs.items() if v}
    if not ours or not theirs:
        return []
    best = max(theirs, key=lambda k: theirs[k]["tokens_s"])
    if ours["answer_tokens"] != theirs[best]["answer_tokens"]:
        raise SystemExit(f"serve: answers of {ours['answer_tokens']} and {theirs[best]['answer_tokens']} tokens")
    row = {"what": what, "users": o.users, "contexts": ours["contexts"], "answer_tokens": ours["answer_tokens"],
           "llama_documents": theirs[best]["documents"], "tokens_s": ours["tokens_s"],
           "llama_tokens_s": theirs[best]["tokens_s"], "llama_cache": best,
           "vs_llama_server": ours["tokens_s"] / theirs[best]["tokens_s"],
           **{f"vs_llama_server_{k}": ours["tokens_s"] / v["tokens_s"] for k, v in theirs.items()},
           "first_token_s": ours["first_token_s"], "llama_first_token_s": theirs[best]["first_token_s"],
           "share_read": ours["share_read"], "memory_bytes": ours["memory_users_bytes"],
           "llama_memory_bytes": theirs[best]["memory_users_bytes"]}
    alone = read_kept(o, "alone-squeeze")
    if name == "one" and alone:
        row["memory_one_user_bytes"] = alone["memory_users_bytes"]
        row["memory_a_user_bytes"] = (ours["memory_grown_bytes"] - alone["memory_grown_bytes"]) / (o.users - 1)
    return [row]


def rows(o):
    found = rows_of_users(o, "one", "users on one context") + rows_of_users(o, "many", "users on documents of their own")
    ours, theirs = read_kept(o, "restart-squeeze"), read_kept(o, "restart-llama")
    if ours and theirs:
        found.append({"what": "first token after a restart", "users": 1, "contexts": 1,
                      "first_token_s": ours["first_token_s"], "llama_first_token_s": theirs["first_token_s"],
                      "vs_llama_server": theirs["first_token_s"] / ours["first_token_s"],
                      "start_s": ours["start_s"], "llama_start_s": theirs["start_s"]})
    overhead = read_kept(o, "overhead")
    if overhead:
        found.append({"what": "overhead over squeeze ask", "users": 1, "contexts": 1,
                      "tokens_s": overhead["serve_tokens_s"], "ask_tokens_s": overhead["ask_tokens_s"],
                      "overhead": overhead["overhead"], "rounds": overhead["rounds"]})
    for way, what in (("job", "longest gap while a document is prepared"),
                      ("auto", "longest gap while a document of a request is read")):
        for n in (1, o.users):
            gap = read_kept(o, f"gap-{way}-{n}")
            if gap:
                found.append({"what": what, "users": n, "contexts": 1, **{k: gap[k] for k in (
                    "gap_ratio", "usual_s", "usual_longest_s", "longest_s", "streams")}})
    idle = read_kept(o, "idle")
    if idle:
        found.append({"what": "idle streams", **idle})
    return found


def cpu_name():
    match = re.search(r"^model name\s*: (.*)$", open("/proc/cpuinfo").read(), re.M)
    return match.group(1) if match else platform.machine()


def version(program):
    found = subprocess.run([program, "--version"], capture_output=True, text=True)
    return (found.stdout + found.stderr).strip().splitlines()[0]


def step_table(o):
    result = {"rows": rows(o), "context_tokens": o.tokens, "answer_tokens": o.answer, "budget": o.budget,
              "model": os.path.basename(o.model), "machine": {"cpu": cpu_name(), "threads": o.threads,
                                                              "kernel": platform.release()},
              "version": version(o.squeeze), "llama_version": version(o.llama) if o.llama else None,
              "date": time.strftime("%F", time.gmtime()), "command": o.command}
    with open(o.out, "w") as f:
        json.dump(result, f, indent=2)
        f.write("\n")
    for row in result["rows"]:
        say(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def main():
    o = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    globals()["step_" + o.step](o)


main()
