"""What the tests of client packages share."""
import concurrent.futures
import contextlib
import time
import traceback

# The schema of a tool's arguments.
WEATHER = {"type": "object", "properties": {"city": {"type": "string", "minLength": 3, "maxLength": 8}, "unit": {"type": "string", "enum": ["C", "F"]}},
           "required": ["city", "unit"], "additionalProperties": False}
# endless: an answer of the default model that does not end by itself.
OPTIONS = {"endless": {"0": -100, "2": -100}, "places": 4, "waiting": 4}


def check_weather(arguments):
    assert set(arguments) == {"city", "unit"} and isinstance(arguments["city"], str) and arguments["unit"] in ("C", "F"), arguments


def raises(kind, what):
    """What a call raises, which must be of that kind."""
    try:
        made = what()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was wanted, and this came: {made}")


@contextlib.contextmanager
def crowd(open_stream):
    """As many streams at once as fill every place and the queue; they are left at the end."""
    n = OPTIONS["places"] + OPTIONS["waiting"]
    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        streams = list(pool.map(lambda _: open_stream(), range(n)))
    try:
        yield
    finally:
        for stream in streams:
            close = getattr(stream, "close", None) or stream.completion_stream.close
            close()


def run_all(names):
    """Every function t_*, in order; ends the program."""
    failed = 0
    for name, test in list(names.items()):
        if not name.startswith("t_"):
            continue
        since = time.time()
        try:
            test()
            print(f"{name[2:]}: {time.time() - since:.1f} s", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED {name[2:]}\n{traceback.format_exc()[-2500:]}", flush=True)
    raise SystemExit(1 if failed else 0)
