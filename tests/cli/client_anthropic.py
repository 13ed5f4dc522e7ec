#!/usr/bin/env python3
"""`squeeze serve` as the `anthropic` package knows a server: client_anthropic.py PORT KEY. A context named book is
there."""
import json
import sys

import anthropic
from pydantic import BaseModel, Field

from client_cases import WEATHER, check_weather, crowd, raises, run_all

URL = f"http://127.0.0.1:{sys.argv[1]}"
KEY = sys.argv[2]
client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=120)
MODEL = client.models.list().data[0].id
TOOL = {"name": "weather", "description": "The weather in a city.", "input_schema": WEATHER}
QUESTION = "What is the capital of France? One word."


class Pet(BaseModel):
    name: str = Field(max_length=8)
    kind: str = Field(max_length=8)


def said(text):
    return [{"role": "user", "content": text}]


GREEDY = {"temperature": 0}  # the package has no name for it any more, the API has


def ask(text=QUESTION, extra_body=None, **more):
    options = {"model": MODEL, "messages": said(text), "max_tokens": 12, **more}
    return client.messages.create(**options, extra_body={**GREEDY, **(extra_body or {})})


def t_models():
    models = [m.id for m in client.models.list()]
    assert models == [MODEL, MODEL + ":book"], models
    one = client.models.retrieve(MODEL + ":book")
    assert one.id == MODEL + ":book" and one.type == "model" and one.display_name and one.created_at.year >= 2024, one
    raises(anthropic.NotFoundError, lambda: client.models.retrieve("claude-opus"))


def t_messages():
    whole = ask()
    assert whole.type == "message" and whole.role == "assistant" and "Paris" in whole.content[0].text, whole
    assert whole.stop_reason == "end_turn" and whole.stop_sequence is None and whole.usage.cache_read_input_tokens == 0
    raw = client.messages.with_raw_response.create(model=MODEL, messages=said("Hi"), max_tokens=1)
    assert raw.headers["request-id"] and raw.parse()._request_id == raw.headers["request-id"]
    with client.messages.stream(model=MODEL, messages=said(QUESTION), extra_body=GREEDY, max_tokens=12) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text and final.stop_reason == "end_turn", (text, final)
    assert final.usage.output_tokens == whole.usage.output_tokens and final.usage.input_tokens == whole.usage.input_tokens
    assert client.messages.count_tokens(model=MODEL, messages=said(QUESTION)).input_tokens == whole.usage.input_tokens
    told = client.messages.count_tokens(model=MODEL, messages=said(QUESTION), system="Be brief.", tools=[TOOL]).input_tokens
    assert told > whole.usage.input_tokens + 20, told
    assert ask("Count to a hundred.", max_tokens=3).stop_reason == "max_tokens"
    word = whole.content[0].text[1:3]
    cut = ask(stop_sequences=["@@", word])
    assert cut.stop_reason == "stop_sequence" and cut.stop_sequence == word, cut
    # What clients send without being asked.
    cached = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    ask(max_tokens=1, system=cached, metadata={"user_id": "u"}, service_tier="auto", thinking={"type": "disabled"},
        extra_headers={"anthropic-beta": "x"}, extra_body={"top_k": 5, "top_p": 0.9})
    turns = [*said("Hi"), {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"},
             {"type": "text", "text": "Hello."}]}, *said("Bye")]
    ask(messages=turns, max_tokens=1)


def t_prefill():
    """A last turn of the assistant's is the beginning of the answer."""
    begun = [*said("Name the first three letters, as A, B, C."), {"role": "assistant", "content": "A, B,"}]
    assert "C" in ask(messages=begun, max_tokens=4).content[0].text


def t_tools():
    options = {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 100}
    reply = ask("How is the weather in Paris?", **options)
    call = reply.content[0]
    assert reply.stop_reason == "tool_use" and call.type == "tool_use" and call.name == "weather", reply
    check_weather(call.input)
    with client.messages.stream(model=MODEL, messages=said("How is the weather in Paris?"), extra_body=GREEDY, **options) as stream:
        seen = [e for e in stream if e.type == "input_json"]
        final = stream.get_final_message().content[0]
    assert seen and final.input == call.input and final.name == "weather", final
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Purple rain."}
    follow = [*said("How is the weather in Paris?"), {"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
    plain = {"tools": [TOOL], "tool_choice": {"type": "none"}, "max_tokens": 8}
    after = ask(messages=follow, **plain)
    assert after.content[0].type == "text", after
    assert after.usage.input_tokens > ask("How is the weather in Paris?", **plain).usage.input_tokens + 10, after
    named = ask("Hi", tools=[TOOL], tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, max_tokens=100)
    assert named.content[0].name == "weather"
    raises(anthropic.BadRequestError, lambda: ask(tools=[TOOL], tool_choice={"type": "tool", "name": "other"}))


def t_schema():
    form = {"format": {"type": "json_schema", "schema": {**WEATHER}}}
    check_weather(json.loads(ask("The weather in Paris, as JSON.", output_config=form, max_tokens=100).content[0].text))
    parsed = client.messages.parse(model=MODEL, messages=said("A dog named Rex."), max_tokens=80, extra_body=GREEDY, output_format=Pet)
    assert isinstance(parsed.parsed_output, Pet), parsed


def t_context():
    named = ask("What is this licence called?", model=MODEL + ":book", extra_body={"squeeze": {"budget": 0.5}})
    assert named.usage.cache_read_input_tokens > 100 and 0 < named.usage.squeeze["share_read"] <= 1, named
    counted = client.messages.count_tokens(model=MODEL + ":book", messages=said("What is this licence called?")).input_tokens
    assert counted == named.usage.input_tokens + named.usage.cache_read_input_tokens, (counted, named)


def t_errors():
    error = raises(anthropic.BadRequestError, lambda: ask(extra_body={"temperature": -1}))
    assert error.status_code == 400 and error.body["error"]["type"] == "invalid_request_error" and error.request_id, error.body
    raises(anthropic.BadRequestError, lambda: ask("word " * 9000))
    error = raises(anthropic.NotFoundError, lambda: ask(model="claude-opus"))
    assert error.body["error"]["type"] == "not_found_error", error.body
    stranger = anthropic.Anthropic(base_url=URL, api_key="sk-of-nobody-at-all", max_retries=0)
    error = raises(anthropic.AuthenticationError, lambda: stranger.messages.create(model=MODEL, messages=said("Hi"), max_tokens=1))
    assert error.body["error"]["type"] == "authentication_error", error.body
    error = raises(anthropic.APIStatusError, lambda: ask("x" * (1 << 20)))
    assert error.status_code == 413 and error.body["error"]["type"] == "request_too_large", error.body


def t_full():
    """More than may wait is refused, and comes again after what Retry-After says."""
    def begin():
        return ask("Write a long story.", max_tokens=2000, stream=True)

    with crowd(begin):
        error = raises(anthropic.RateLimitError, ask)
        assert error.body["error"]["type"] == "rate_limit_error" and int(error.response.headers["retry-after"]) > 0, error.body
    assert client.with_options(max_retries=8).messages.create(model=MODEL, messages=said("Hi"), max_tokens=1).content


run_all(globals())
