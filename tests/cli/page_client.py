#!/usr/bin/env python3
"""The page of a running `squeeze serve` in headless Chromium, through chromedriver and Python's own library alone:
page_client.py PORT TEXT [PICTURE]. TEXT is a file to upload; PICTURE, where a screenshot goes."""
import base64
import http.client
import json
import os
import shutil
import subprocess
import sys
import time

from documents import docx, epub, html, pdf

PORT, TEXT = int(sys.argv[1]), sys.argv[2]
PICTURE = sys.argv[3] if len(sys.argv) > 3 else None
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
WAIT = 240  # seconds, on a busy machine
KEYS = {"tab": "\ue004", "enter": "\ue007", "escape": "\ue00c", "right": "\ue014"}


class Browser:
    def __init__(self):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       text=True)
        self.port, self.session = None, None
        for line in self.driver.stdout:
            if "started successfully on port" in line:
                self.port = int(line.strip().rstrip(".").split()[-1])
                break
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     "--window-size=1200,1000"]
        options = {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def call(self, method, path, body=None):
        prefix = f"/session/{self.session}" if self.session else ""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        connection.request(method, prefix + path, json.dumps(body) if body is not None else None,
                           {"Content-Type": "application/json"})
        value = json.loads(connection.getresponse().read())["value"]
        connection.close()
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{path}: {value['error']}: {value['message'][:300]}")
        return value

    def go(self, path="/"):
        self.call("POST", "/url", {"url": f"http://127.0.0.1:{PORT}{path}"})

    def run(self, script, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector):
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector):
        self.call("POST", f"/element/{self.find(selector)}/click", {})

    def type(self, selector, text):
        self.call("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def press(self, *names):
        actions = [{"type": kind, "value": KEYS[name]} for name in names for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def hover(self, selector):
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": {ELEMENT: self.find(selector)}}
        self.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def size(self, width, height):
        # As phones do it: the window itself has a least width.
        self.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}})

    def dark(self, dark):
        self.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {
            "features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}})

    def wait(self, what, script):
        until = time.monotonic() + WAIT
        while time.monotonic() < until:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.2)
        raise RuntimeError(f"waited {WAIT} s for {what}; the page says: {self.run('return document.body.innerText')}")

    def picture(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("GET", "/screenshot")))

    def close(self):
        try:
            self.call("DELETE", "")
        except (OSError, RuntimeError):
            pass
        self.driver.terminate()
        self.driver.wait()


def check(what, ok, found=None):
    if not ok:
        raise RuntimeError(f"{what}: found {found!r}")


ANSWERS = "const all = [...document.querySelectorAll('.answer')];"


def ask(b, question, exact, n_answers):
    """Asks, and gives back what the newest answers say when all are done."""
    b.run("document.getElementById('question').value = ''; document.getElementById('exact').checked = arguments[0]", exact)
    b.type("#question", question)
    b.click("#send")
    b.wait("an answer that streams", f"{ANSWERS} return all.length && all[0].getAttribute('aria-busy') === 'true' "
                                     "&& all[0].querySelector('.said').textContent.length > 0")
    check("Stop may be pressed meanwhile", b.run("return !document.getElementById('stop').disabled"))
    b.wait("the answers", f"{ANSWERS} return all.length === {n_answers} && "
                          "all.every((one) => one.getAttribute('aria-busy') === 'false') && !document.getElementById('send').disabled")
    return b.run(f"""{ANSWERS} return [...document.querySelector('.pair').querySelectorAll('.answer')].map((one) => ({{
        title: one.querySelector('h3').textContent, said: one.querySelector('.said').textContent,
        figures: one.querySelector('.figures').textContent, cells: one.querySelectorAll('.strip button').length,
        heats: [...one.querySelectorAll('.strip button')].map((cell) => Number(cell.style.getPropertyValue('--heat'))),
        evidence: [...one.querySelectorAll('blockquote')].map((quote) => quote.textContent)}}))""")


def get(path, headers=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=WAIT)
    connection.request(method, path, headers=headers or {})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, response.headers, data


def t_files():
    """Types, what a browser may keep, and what the page may do."""
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript"),
                       ("/icon.svg", "image/svg+xml")):
        status, headers, data = get(path)
        check(path, status == 200 and headers["Content-Type"].startswith(kind) and data, (status, headers.items()))
        check("the policy", "default-src 'none'" in headers["Content-Security-Policy"], headers.items())
        check("its copy", get(path, {"If-None-Match": headers["ETag"]})[0] == 304)
        check("another's copy", get(path, {"If-None-Match": '"0"'})[2] == data)


def t_upload(b):
    b.wait("the empty list", "return !document.getElementById('no-contexts').hidden")
    b.type("#file", TEXT)
    check("a name from the file's", b.run("return document.getElementById('name').value") == "house")
    b.click("#upload button[type=submit]")
    b.wait("progress", "return document.querySelector('#context-house progress')")
    b.wait("the document", "const line = document.getElementById('context-house');"
                           "return line && line.dataset.status === 'ready' && line.querySelector('input').checked")
    check("no progress any more", b.run("return !document.querySelector('#context-house progress')"))
    b.wait("the name in the question", "return document.getElementById('about').textContent === 'house'")


def t_cancel(b):
    upload(b, TEXT, "other")
    b.wait("a job", "return document.querySelector('#context-other button')")
    b.click("#context-other button")
    b.wait("its end", "return !document.getElementById('context-other')")


def upload(b, path, name):
    b.type("#file", path)
    b.run("document.getElementById('name').value = arguments[0]", name)
    b.click("#upload button[type=submit]")


def t_kinds(b):
    """Documents that are no plain text, each as its program would write it."""
    fact = "The lamp was lit by Ida Brandt."
    kinds = {"pdf": (pdf(fact), "pdftotext"), "docx": (docx(fact), "pandoc"), "epub": (epub(fact), "pandoc"),
             "html": (html(f"<p>{fact}</p>"), "pandoc")}
    made = [name for name, (_, converter) in kinds.items() if shutil.which(converter)]
    print("kinds:", *made)
    for name in made:
        path = os.path.join(os.path.dirname(TEXT), f"lamp.{name}")
        with open(path, "wb") as file:
            file.write(kinds[name][0])
        upload(b, path, f"lamp-{name}")
        b.wait(name, f"const line = document.getElementById('context-lamp-{name}'); return line && line.dataset.status === 'ready'")
        text = json.loads(get(f"/v1/contexts/lamp-{name}/text")[2])["text"]
        check(name, fact in text and "<p" not in text, text)
    if "html" in made:
        path = os.path.join(os.path.dirname(TEXT), "nothing.html")
        with open(path, "wb") as file:
            file.write(html(" "))
        upload(b, path, "nothing")
        said = b.wait("its problem", "const line = document.getElementById('context-nothing');"
                                     "return line && line.dataset.status === 'failed' && line.textContent")
        check("why it failed", "empty" in said, said)
        b.click("#context-nothing button")
        b.wait("its end", "return !document.getElementById('context-nothing')")
    for name in made:
        get(f"/v1/contexts/lamp-{name}", method="DELETE")
    b.go()
    b.wait("the first document alone", "return document.querySelectorAll('.context').length === 1 && "
                                       "document.querySelector('#context-house input:checked')")


def t_exact(b):
    answers = ask(b, "What is the secret code of the garden gate?", True, 2)
    check("two answers side by side", len(answers) == 2, answers)
    check("the first at a budget, the second exact", answers[0]["title"].startswith("Budget 10 %")
          and answers[1]["title"].startswith("Exact"), answers)
    tops = b.run("return [...document.querySelectorAll('.answer')].map((one) => one.getBoundingClientRect().top)")
    check("beside each other", tops[0] == tops[1], tops)
    for answer in answers:
        check("figures", "tokens/s" in answer["figures"] and "Read" in answer["figures"], answer["figures"])
        check("a strip of the document", 20 <= answer["cells"] <= 192, answer["cells"])
        check("its darkest passage", max(answer["heats"]) == 1 and min(answer["heats"]) < 0.7, answer["heats"])
        check("evidence", len(answer["evidence"]) == 3, answer["evidence"])
        check("the passage with the answer is evidence", any("4719" in text for text in answer["evidence"]), answer)
    check("everything was read", "Read100" in answers[1]["figures"], answers[1]["figures"])


def t_strip(b):
    b.hover(".strip button:nth-child(5)")
    text = b.wait("the passage's text", "const text = document.querySelector('.preview').textContent;"
                                        "return text.includes('Passage 5 of') && text")
    check("a passage", "repaired in 18" in text, text)
    b.click(".strip button:nth-child(5)")
    marked = b.wait("the reader", "return document.getElementById('reader').open && document.querySelector('mark').textContent")
    check("the passage is marked", marked.strip() in text, (marked, text))
    b.click("#reader-behind")
    b.wait("the next", "return document.getElementById('reader-title').textContent.includes('passage 6 of')")
    b.press("escape")
    b.wait("no reader", "return !document.getElementById('reader').open")
    check("the focus is back", b.run("return document.activeElement.closest('.strip') !== null"))
    b.press("right", "right")
    name = b.wait("arrows", "return document.activeElement.getAttribute('aria-label')")
    check("two further", name.startswith("Passage 7 of"), name)


def t_stop(b):
    b.run("document.getElementById('exact').checked = false")
    b.run("document.getElementById('question').value = 'Tell the whole story of the house, room by room.'")
    b.click("#send")
    b.wait("words", f"{ANSWERS} return all.length === 3 && all[0].querySelector('.said').textContent.length > 0")
    b.click("#stop")
    b.wait("its end", f"{ANSWERS} return all[0].textContent.includes('Stopped') && !document.getElementById('send').disabled")


def t_text_stays_text(b):
    """What the document and the model say is never HTML."""
    b.run("document.getElementById('question').value = '<img src=x onerror=\"document.title = 1\"> What is kept in the mill?'")
    b.click("#send")
    b.wait("its end", f"{ANSWERS} return all.length === 4 && all[0].getAttribute('aria-busy') === 'false' && !document.getElementById('send').disabled")
    check("no elements of it", b.run("return !document.querySelector('#answers img') && document.title === 'squeeze'"))


def t_looks(b):
    """Everything that can be used has a name, and text stands out enough."""
    nameless = b.run("""return [...document.querySelectorAll('button, input, textarea, progress')].filter((one) =>
        !(one.labels && one.labels.length) && !one.getAttribute('aria-label') && !one.textContent.trim()).map((one) => one.id || one.outerHTML)""")
    check("names", not nameless, nameless)
    for dark in (False, True):
        b.dark(dark)
        worst = b.run(CONTRAST)
        check(f"contrast, {'dark' if dark else 'light'}", worst["ratio"] >= 4.5, worst)
    b.dark(False)


CONTRAST = """
const number = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((x) => x / 255).map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
const back = (one) => { for (; one; one = one.parentElement) {
    const c = number(getComputedStyle(one).backgroundColor); if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
let worst = { ratio: 99 };
for (const one of document.querySelectorAll('h1, h2, h3, h4, p, label, button, dd, dt, blockquote, textarea, .said')) {
    if (!one.offsetParent || one.disabled || !one.textContent.trim()) continue;
    const a = light(number(getComputedStyle(one).color)), b = light(back(one));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst.ratio) worst = { ratio, what: one.outerHTML.slice(0, 120) };
}
return worst;
"""


def t_narrow(b):
    b.size(360, 740)
    b.wait("one column", "return document.documentElement.scrollWidth <= 360")
    widths = b.run("return [...document.querySelectorAll('main > *, .answer')].map((one) => one.getBoundingClientRect().right)")
    check("nothing sticks out", all(width <= 360 for width in widths), widths)
    small = b.run("""return [...document.querySelectorAll('form button, .evidence button')].filter((one) => one.offsetParent &&
        one.getBoundingClientRect().height < 44).map((one) => one.textContent)""")
    check("buttons for fingers", not small, small)
    b.size(1200, 1000)


def t_keyboard(b):
    """A fresh page is gone through from its beginning to its end."""
    b.go()
    b.wait("the document", "return document.querySelector('#context-house input:checked')")
    order = []
    for _ in range(9):
        b.press("tab")
        order.append(b.run("const one = document.activeElement; return one.id || one.className || one.name || one.tagName"))
    wanted = ["skip", "context", "file", "name", "question", "budget", "exact", "send"]
    check("the order of the focus", [name for name in order if name in wanted] == wanted, order)


def t_console(b):
    """No script error, and nothing that the page's policy forbids."""
    log = [entry["message"] for entry in b.call("POST", "/se/log", {"type": "browser"})]
    check("the browser's log", not log, log)


def main():
    t_files()
    b = Browser()
    try:
        b.go()
        for test in (t_upload, t_cancel, t_kinds, t_exact):
            test(b)
            print(test.__name__, flush=True)
        if PICTURE:
            b.size(1180, 1040)
            b.run("window.scrollTo(0, 0); document.activeElement.blur()")
            b.picture(PICTURE)
            b.size(1200, 1000)
        for test in (t_strip, t_stop, t_text_stays_text, t_looks, t_narrow, t_keyboard, t_console):
            test(b)
            print(test.__name__, flush=True)
    finally:
        b.close()


main()
