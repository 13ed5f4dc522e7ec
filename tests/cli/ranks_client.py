#!/usr/bin/env python3
"""Ranks that die at random moments: of `squeeze serve --ranks`, of `squeeze ask` and of `squeeze chat` under mpirun.

ranks_client.py PROGRAM INDEX CONTEXTS SEED: INDEX is a context in four shards, CONTEXTS the folder that it is in. Two servers,
one whose ranks are killed and one whose ranks are stopped, and commands beside them run at the same time, since all of this
is waiting. Prints how long each took to say so. A hang is what takes a minute: machines may be loaded.
"""
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

N = 4
HANG_SECONDS = 60
QUESTION = "What does the licence say?"
failures = []
say_lock = threading.Lock()


def say(text):
    with say_lock:
        print(text, flush=True)


def fail(text):
    failures.append(text)
    say("FAILED: " + text)


def parents():
    """The parent of every process that can be seen."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat") as file:
                found[int(name)] = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            pass
    return found


def ranks_below(top):
    """The processes of ranks that are below `top`, by their numbers."""
    above, found = parents(), {}
    for pid in above:
        at = pid
        while at > 1 and at != top:
            at = above.get(at, 0)
        if at != top or pid == top:
            continue
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                for entry in file.read().split(b"\0"):
                    if entry.startswith(b"OMPI_COMM_WORLD_RANK="):
                        found[int(entry.partition(b"=")[2])] = pid
        except (OSError, ValueError):
            pass
    return found


def wait_for(condition, what, seconds=HANG_SECONDS):
    since = time.monotonic()
    while time.monotonic() - since < seconds:
        got = condition()
        if got:
            return got
        time.sleep(0.05)
    fail(f"{what}: not within {seconds} s")
    return None


def waits_in(pid):
    try:
        with open(f"/proc/{pid}/wchan") as file:
            return file.read()
    except OSError:
        return "nothing"


def gone(pids):
    def all_gone():
        for pid in pids:
            try:
                with open(f"/proc/{pid}/stat") as file:
                    if file.read().rpartition(")")[2].split()[0] not in "ZX":
                        return False
            except OSError:
                pass
        return True
    return all_gone


# ---- Servers --------------------------------------------------------------------------------


class Request(threading.Thread):
    """One request; how it ended, and when, is kept."""

    def __init__(self, port, path, body):
        super().__init__(daemon=True)
        self.port, self.path, self.body = port, path, body
        self.status, self.text, self.ended, self.broke = 0, "", 0.0, ""
        self.begun = threading.Event()
        self.start()

    def run(self):
        try:
            line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2 * HANG_SECONDS)
            line.request("POST", self.path, json.dumps(self.body), {"Content-Type": "application/json"})
            answer = line.getresponse()
            self.status = answer.status
            while piece := answer.read1(4096):
                self.text += piece.decode()
                self.begun.set()
        except (OSError, http.client.HTTPException) as error:
            self.broke = repr(error)
        self.ended = time.monotonic()
        self.begun.set()


def get(port, path):
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_SECONDS)
    line.request("GET", path)
    answer = line.getresponse()
    return answer.status, answer.read().decode(), answer.getheader("Retry-After")


def gauge(port, name):
    text = get(port, "/metrics")[1]
    return [int(line.split()[1]) for line in text.splitlines() if line.startswith(f"squeeze_{name} ")]


CHAT = {"model": "book", "temperature": 0, "messages": [{"role": "user", "content": QUESTION}]}
LONG = {"max_tokens": 4000, "squeeze": {"budget": 0.4}}


def ends_of(server):
    """An answer that is the same whenever nothing is wrong."""
    request = Request(server.port, "/v1/chat/completions", CHAT | {"max_tokens": 8})
    request.join()
    if request.status != 200:
        fail(f"an answer: {request.status} {request.text} {request.broke}")
        return None
    return json.loads(request.text)["choices"][0]["message"]["content"]


class Server:
    def __init__(self, name, *options):
        self.name = name
        self.log = open(os.path.join(os.environ["RANKS_FOLDER"], name + ".err"), "w+")
        self.process = subprocess.Popen(
            [program, "serve", "--contexts", contexts, "--port", "0", "--ranks", str(N), "--restart-pause", "0.5",
             "--threads", "1", *options], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.port = None
        wait_for(self.find_port, f"{name}: a server that listens", 4 * HANG_SECONDS)

    def said(self):
        with open(self.log.name) as file:
            return file.read()

    def find_port(self):
        for line in self.said().splitlines():
            if "listening on http" in line:
                self.port = int(line.rpartition(":")[2])
        return self.port or self.process.poll() is not None

    def lose(self, rank, which, moment, restarts, answer):
        """A rank gets a signal while three requests are being answered: they end, and all is as before."""
        what = f"serve, rank {rank} gets {which.name}"
        requests = [
            Request(self.port, "/v1/chat/completions", CHAT | LONG | {"stream": True}),
            Request(self.port, "/v1/chat/completions", CHAT | LONG),
            Request(self.port, "/v1/messages", CHAT | LONG | {"stream": True}),
        ]
        requests[0].begun.wait(HANG_SECONDS)
        pid = ranks_below(self.process.pid).get(rank)
        if pid is None:
            fail(f"{what}: there is no such rank\n{self.said()}")
            return
        time.sleep(moment)
        since = time.monotonic()
        os.kill(pid, which)
        degraded = wait_for(lambda: (h := get(self.port, "/health"))[0] == 503 and h, f"{what}: 503 of /health")
        if degraded:
            health = json.loads(degraded[1])
            if health["status"] != "degraded" or "rank" not in health["reason"]:
                fail(f"{what}: /health says {degraded[1]}")
            alive = wait_for(lambda: gauge(self.port, "ranks_alive"), f"{what}: a gauge of ranks")
            if alive not in ([0], [N - 1], [N]):  # or they are back already
                fail(f"{what}: ranks alive: {alive}")
        for request in requests:
            request.join(HANG_SECONDS)
        took = max(request.ended for request in requests) - since
        chat, whole, messages = requests
        if '"code":"rank_lost"' not in chat.text.rpartition("data: ")[2] or chat.broke:
            fail(f"{what}: the stream ends with {chat.text[-300:]!r} {chat.broke}")
        if whole.status != 503 or json.loads(whole.text or "{}").get("error", {}).get("code") != "rank_lost":
            fail(f"{what}: the answer is {whole.status} {whole.text} {whole.broke}")
        if "event: error\n" not in messages.text or "overloaded_error" not in messages.text or messages.broke:
            fail(f"{what}: the stream of messages ends with {messages.text[-300:]!r} {messages.broke}")
        if f"rank {rank} of {N}" not in whole.text + chat.text:
            fail(f"{what}: the lost rank is not named: {whole.text}")
        wait_for(lambda: get(self.port, "/health")[0] == 200, f"{what}: a server that is back", 2 * HANG_SECONDS)
        back = time.monotonic() - since
        if gauge(self.port, "ranks_restarts_total") != [restarts] or gauge(self.port, "degraded") != [0]:
            fail(f"{what}: restarts: {gauge(self.port, 'ranks_restarts_total')}, wanted {restarts}")
        again = ends_of(self)
        if again != answer:
            fail(f"{what}: behind it the answer is {again!r}, wanted {answer!r}")
        say(f"{what} after {moment:.2f} s: requests ended after {took:.1f} s, all was back after {back:.1f} s")

    def end(self, which):
        """Ends the server; nothing may be left of it."""
        below = list(ranks_below(self.process.pid).values())
        if len(below) != N:
            fail(f"{self.name}: {len(below)} ranks at the end")
        self.process.send_signal(which)
        code = self.process.wait(2 * HANG_SECONDS)
        if code != (0 if which == signal.SIGTERM else -which):
            fail(f"{self.name}: exit code {code} behind {which.name}\n{self.said()}")
        wait_for(gone(below), f"{self.name}: no rank that is left behind {which.name}")


def lose_of_server(name, which, end, moments):
    server = Server(name)
    if not server.port:
        fail(f"{name}: it ended\n{server.said()}")
        return
    try:
        answer = ends_of(server)
        for restarts, (rank, moment) in enumerate(moments, 1):
            server.lose(rank, which, moment, restarts, answer)
        server.end(end)
    except Exception as error:  # whatever a client can run into
        fail(f"{name}: {error!r}\n{server.said()}")
    finally:
        server.process.kill()


# ---- Commands --------------------------------------------------------------------------------


def lose_of_command(command, rank, which, moment):
    what = f"{command}, rank {rank} gets {which.name}"
    questions = [f"Question {i}: what does the licence say?" for i in range(200)]
    arguments = ["mpirun", "--oversubscribe", "-n", str(N), program, command, index, "--budget", "0.4", "--max-tokens",
                 "400", "--threads", "1"]
    job = subprocess.Popen(arguments + (questions if command == "ask" else []), stdin=subprocess.PIPE,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if command == "chat":
        threading.Thread(target=talk, args=(job, questions), daemon=True).start()
    said = []
    reader = threading.Thread(target=lambda: said.append(job.stderr.read()), daemon=True)
    reader.start()
    found = wait_for(lambda: len(f := ranks_below(job.pid)) == N and f, f"{what}: {N} ranks")
    if not found:
        return
    time.sleep(moment)
    since = time.monotonic()
    os.kill(found[rank], which)
    try:
        code = job.wait(HANG_SECONDS)
    except subprocess.TimeoutExpired:
        where = " ".join(f"{pid}: {waits_in(pid)}" for pid in found.values())
        job.kill()
        for pid in found.values():
            os.kill(pid, signal.SIGKILL)
        reader.join(HANG_SECONDS)
        fail(f"{what} after {moment:.2f} s: it hangs; ranks are in {where}; said {''.join(said)!r}")
        return
    took = time.monotonic() - since
    wait_for(gone(found.values()), f"{what}: no rank that is left")
    reader.join(HANG_SECONDS)
    if code == 0 or "rank" not in "".join(said):
        fail(f"{what}: exit code {code}: {''.join(said)}")
    say(f"{what} after {moment:.2f} s: ended after {took:.1f} s with {code}")


def talk(job, questions):
    try:
        for question in questions:
            job.stdin.write(question + "\n")
        job.stdin.flush()
    except OSError:
        pass


def lose_of_commands(cases):
    for case in cases:
        try:
            lose_of_command(*case)
        except Exception as error:  # or the others would not be run
            fail(f"{case[0]}, rank {case[1]}: {error!r}")


program, index, contexts, seed = sys.argv[1:5]
chance = random.Random(int(seed))


def moments(most):
    order = list(range(N))
    chance.shuffle(order)
    return [(rank, most * chance.random()) for rank in order]


if __name__ == "__main__":
    print(f"seed {seed}")
    # Moments of a command begin when its processes are there: also before it has opened anything.
    cases = {command: [(command, rank, which, moment) for which in (signal.SIGKILL, signal.SIGSTOP)
                       for rank, moment in moments(3)] for command in ("ask", "chat")}
    lanes = {
        "killed": (lose_of_server, ("killed", signal.SIGKILL, signal.SIGTERM, moments(1))),
        "stopped": (lose_of_server, ("stopped", signal.SIGSTOP, signal.SIGKILL, moments(1))),
        "ask": (lose_of_commands, (cases["ask"],)),
        "chat": (lose_of_commands, (cases["chat"],)),
    }
    threads = [threading.Thread(target=lane[0], args=lane[1]) for name, lane in lanes.items()
               if name in os.environ.get("RANKS_LANES", " ".join(lanes)).split()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.exit(1 if failures else 0)
