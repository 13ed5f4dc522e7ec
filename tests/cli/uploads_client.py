#!/usr/bin/env python3
"""Uploads of documents to a running `squeeze serve`, by names: uploads_client.py PORT PROCESS NAME... The documents are made
here, hostile ones among them."""
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time

from documents import WORD, docx, epub, html, pdf

PORT, PROCESS = int(sys.argv[1]), sys.argv[2]
FACT = "The lighthouse keeper Ida Brandt found a blue bottle on the northern beach."
SECRET = os.environ["UPLOADS_SECRET"]  # a file's path; its text is the same


def call(method, path, body=None, kind=None):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request(method, path, body, {"Content-Type": kind} if kind else {})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text)


def upload(name, body, kind="text/plain", status=202):
    got, said = call("POST", f"/v1/contexts?name={name}", body, kind)
    assert got == status, (name, got, said)
    return said


def state(name):
    return call("GET", f"/v1/contexts/{name}")[1]


def until(what, seconds=90):
    end = time.monotonic() + seconds
    while True:
        got = what()
        if got:
            return got
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def ended(name):
    until(lambda: state(name)["status"] in ("ready", "failed"))
    return state(name)


def text_of(name):
    assert ended(name)["status"] == "ready", state(name)
    return call("GET", f"/v1/contexts/{name}/text")[1]["text"]


def problem_of(name):
    assert ended(name)["status"] == "failed", state(name)
    return state(name)["error"]


def children():
    found = subprocess.run(["pgrep", "-P", PROCESS], capture_output=True, text=True, check=False).stdout.split()
    return [pid for pid in found if open(f"/proc/{pid}/stat").read().split()[2] != "Z"]


# ---- Tests ------------------------------------------------------------------------------------


def test_kinds():
    """Told by content, whatever the client says that it is."""
    upload("a.pdf", pdf(FACT), "text/html")
    upload("b.txt", docx(FACT), "application/pdf")
    upload("c", epub(FACT), "image/png")
    upload("d.docx", html(f"<p>{FACT}</p><script>alert(1)</script><style>p {{}}</style>"), "text/plain")
    assert state("a.pdf")["status"] in ("waiting", "converting", "reading", "squeezing", "ready")
    for name in ("a.pdf", "b.txt", "c", "d.docx"):
        text = text_of(name)
        assert FACT in text.replace("\n", " ") and "alert" not in text and "<p" not in text, (name, text)
    # As JSON it is text, of which nothing is made.
    assert call("POST", "/v1/contexts", json.dumps({"name": "e", "text": html(FACT).decode()}), "application/json")[0] == 202
    assert "<body>" in text_of("e")
    assert not children()


def test_damaged():
    whole = pdf(FACT)
    upload("truncated", whole[: whole.index(b"endstream") // 3])
    upload("cut-zip", docx(FACT)[:-200])
    upload("no-zip", b"PK\3\4" + b"word/document.xml" * 20)
    upload("empty-page", html("   "))
    upload("latin", b"<html><body>caf\xe9 \xff\xfe</body></html>")
    for name, wanted in (("truncated", "pdftotext cannot read"), ("cut-zip", "pandoc cannot read"), ("no-zip", "pandoc cannot read"),
                         ("empty-page", "empty")):
        assert wanted in problem_of(name), (name, state(name))
    # In the list, too, until they are removed.
    failed = {c["id"] for c in call("GET", "/v1/contexts")[1]["data"] if c["status"] == "failed"}
    assert failed == {"truncated", "cut-zip", "no-zip", "empty-page"}, failed
    assert call("DELETE", "/v1/contexts/no-zip")[0] == 200 and call("GET", "/v1/contexts/no-zip")[0] == 404
    assert "caf\u00e9" in text_of("latin")


def test_reaching_out():
    """What a document names, files here and addresses elsewhere, is not opened."""
    listening = socket.create_server(("127.0.0.1", 0))
    visits = []

    def listen():
        while True:
            try:
                listening.accept()
            except OSError:
                return
            visits.append(1)

    threading.Thread(target=listen, daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/x"
    names = [f"file://{SECRET}", SECRET, url]
    upload("names", html(f"<p>{FACT}</p>" + "".join(
        f'<iframe src="{n}"></iframe><img src="{n}"><object data="{n}"></object><embed src="{n}"><link rel=stylesheet href="{n}">'
        f'<script src="{n}"></script><a href="{n}">a</a><include src="{n}"/>' for n in names)))
    entity = f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY e SYSTEM "file://{SECRET}"><!ENTITY f SYSTEM "{url}">]>'
    upload("entity", docx(f"{FACT} &e; &f;", entity))
    text = text_of("names")
    assert FACT in text.replace("\n", " ") and "SECRET" not in text, text
    assert ended("entity")["status"] == "failed" or "SECRET" not in text_of("entity")
    listening.close()
    assert not visits


def bomb(entry):
    """A gigabyte of text in a few megabytes."""
    entry.write(f"<w:document {WORD}><w:body>".encode())
    piece = ("<w:p><w:r><w:t>" + "x " * 30000 + "</w:t></w:r></w:p>").encode()
    for _ in range((1 << 30) // len(piece)):
        entry.write(piece)
    entry.write(b"</w:body></w:document>")


def test_bomb():
    packed = docx(bomb)
    assert len(packed) < 12 << 20, len(packed)
    upload("bomb", packed)
    # It may be over before it is looked for. Others are answered meanwhile, and documents of text prepared.
    until(lambda: children() or state("bomb")["status"] == "failed")
    upload("beside", FACT.encode())
    assert FACT in text_of("beside")
    said = problem_of("bomb")
    assert "GiB" in said or "pandoc cannot read" in said, said
    assert not children()


SLOW = html("".join(f"<p>{FACT} <b>{number}</b> {'word ' * 100}</p>" for number in range(1500)))


def test_cancel():
    upload("slow", SLOW)
    until(children)
    assert state("slow")["status"] == "converting"
    assert call("DELETE", "/v1/contexts/slow")[0] == 200
    until(lambda: not children(), 2)
    assert call("GET", "/v1/contexts/slow")[0] == 404


def test_begin():
    """Left in the middle: the server is killed next."""
    upload("slow", SLOW)
    until(children)
    print("children:", *children(), flush=True)


def test_goes_on():
    """After the restart: read on, and found to be too long."""
    assert "tokens, the model holds" in problem_of("slow")


def test_missing():
    for name, body, wanted in (("p", pdf(FACT), "poppler-utils"), ("w", docx(FACT), "pandoc"), ("h", html(FACT), "pandoc")):
        said = upload(name, body, status=501)
        assert said["error"]["code"] == "converter_missing" and wanted in said["error"]["message"], said
        assert call("GET", f"/v1/contexts/{name}")[0] == 404
    upload("text", FACT.encode())
    assert FACT in text_of("text")


for test in sys.argv[3:]:
    began = time.monotonic()
    globals()[f"test_{test}"]()
    print(f"{test}: {time.monotonic() - began:.1f} s", flush=True)
