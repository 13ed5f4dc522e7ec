#!/usr/bin/env python3
"""`squeeze serve` as the `openai` package knows a server: client_openai.py PORT KEY. A context named book is there, and
CLIENT_DOCUMENT names its text."""
import json
import os
import sys
import time

import openai
from pydantic import BaseModel, Field

from client_cases import OPTIONS, WEATHER, check_weather, crowd, raises, run_all

URL = f"http://127.0.0.1:{sys.argv[1]}/v1"
KEY = sys.argv[2]
client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=120)
chat = client.chat.completions
MODEL = client.models.list().data[0].id
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather in a city.", "parameters": WEATHER}}
FLAT_TOOL = {"type": "function", "name": "weather", "description": "The weather in a city.", "parameters": WEATHER, "strict": True}


class Pet(BaseModel):
    name: str = Field(max_length=8)
    legs: int = Field(ge=0, le=8)


def said(text):
    return [{"role": "user", "content": text}]


def ask(text="What is the capital of France? One word.", **more):
    return chat.create(**{"model": MODEL, "messages": said(text), "temperature": 0, "max_tokens": 12, **more})


def t_models():
    models = client.models.list()
    assert [m.id for m in models] == [MODEL, MODEL + ":book"], models
    assert client.models.retrieve(MODEL + ":book").owned_by == "squeeze"
    raises(openai.NotFoundError, lambda: client.models.retrieve("gpt-4o"))


def t_chat():
    whole = ask()
    choice = whole.choices[0]
    assert "Paris" in choice.message.content and choice.finish_reason == "stop" and choice.message.role == "assistant"
    assert choice.message.refusal is None and whole.model == MODEL and whole.object == "chat.completion", whole
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    assert whole.usage.completion_tokens_details.reasoning_tokens == 0
    raw = chat.with_raw_response.create(model=MODEL, messages=said("Hi"), max_completion_tokens=1)
    assert raw.headers["x-request-id"] and raw.parse()._request_id == raw.headers["x-request-id"]
    text = ""
    with chat.stream(model=MODEL, messages=said("What is the capital of France? One word."), temperature=0, max_tokens=12,
                     stream_options={"include_usage": True}) as stream:
        for event in stream:
            if event.type == "content.delta":
                text += event.delta
        final = stream.get_final_completion()
    assert text == choice.message.content == final.choices[0].message.content and final.usage == whole.usage, (text, final)
    # What clients send without being asked, and what frameworks add.
    ask(max_tokens=1, user="u", store=False, metadata={"a": "b"}, parallel_tool_calls=True, service_tier="auto",
        reasoning_effort="low", modalities=["text"], prediction=openai.NOT_GIVEN, verbosity="low", n=1, logit_bias={},
        safety_identifier="s", prompt_cache_key="k", tools=openai.NOT_GIVEN, top_p=1, presence_penalty=0, stop=None)
    history = [{"role": "developer", "content": "Be brief."}, {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "Hi"}]},
               {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}, {"role": "user", "content": "Bye"}]
    ask(messages=history, max_tokens=1)


def t_choices():
    several = ask("Name an animal.", n=3, temperature=1.5, seed=3, max_tokens=6)
    assert [c.index for c in several.choices] == [0, 1, 2] and len({c.message.content for c in several.choices}) > 1
    again = ask("Name an animal.", n=3, temperature=1.5, seed=3, max_tokens=6)
    assert [c.message.content for c in again.choices] == [c.message.content for c in several.choices]
    texts = ["", "", ""]
    for chunk in ask("Name an animal.", n=3, temperature=1.5, seed=3, max_tokens=6, stream=True):
        for c in chunk.choices:
            texts[c.index] += c.delta.content or ""
    assert texts == [c.message.content for c in several.choices], (texts, several)


def t_stop():
    full = ask("Count: one, two, three, four, five, six, seven.", max_tokens=30).choices[0].message.content
    stop = full[5:8]
    cut = ask("Count: one, two, three, four, five, six, seven.", max_tokens=30, stop=["@@@", stop]).choices[0]
    assert cut.message.content == full[: full.index(stop)] and cut.finish_reason == "stop", (full, cut)
    assert ask("Count to a hundred.", max_tokens=3).choices[0].finish_reason == "length"


def t_logprobs():
    choice = ask(logprobs=True, top_logprobs=3).choices[0]
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0 and token.top_logprobs[0].token == token.token
    assert "".join(t.token for t in choice.logprobs.content).startswith(choice.message.content)
    assert ask(max_tokens=1).choices[0].logprobs is None


def t_json():
    reply = ask("A JSON object with a name, please.", response_format={"type": "json_object"}, max_tokens=60).choices[0]
    assert reply.message.content.startswith("{") and (reply.finish_reason == "length" or json.loads(reply.message.content))
    bounded = {"type": "object", "properties": {"year": {"type": "integer", "minimum": 1900, "maximum": 1999},
               "code": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"}}, "required": ["year", "code"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": bounded}}
    for seed in range(2):
        made = json.loads(ask("A year and a code.", response_format=form, temperature=1, seed=seed, max_tokens=60).choices[0].message.content)
        assert 1900 <= made["year"] <= 1999 and len(made["code"]) == 6 and made["code"][2] == "-", made
    parsed = chat.parse(model=MODEL, messages=said("A dog named Rex with four legs."), response_format=Pet, max_tokens=100, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Pet), parsed
    refused = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "null"}}}}
    error = raises(openai.BadRequestError, lambda: ask(response_format=refused))
    assert error.code == "unsupported_schema" and "not" in error.message, error


def t_tools():
    options = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}
    choice = ask("How is the weather in Paris?", **options).choices[0]
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls" and call.type == "function" and call.function.name == "weather", choice
    check_weather(json.loads(call.function.arguments))
    with chat.stream(model=MODEL, messages=said("How is the weather in Paris?"), temperature=0, **options) as stream:
        seen = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert seen[0].name == "weather" and final.function.arguments == call.function.arguments, (seen, final)
    follow = [*said("How is the weather in Paris?"), choice.message,
              {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"weather": "purple rain"})}]
    reply = ask(messages=follow, tools=[TOOL], tool_choice="none", max_tokens=8).choices[0].message
    assert reply.tool_calls is None and reply.content, reply
    # A result that was handed back is part of what the model reads.
    assert ask(messages=follow, max_tokens=1).usage.prompt_tokens > ask("How is the weather in Paris?", max_tokens=1).usage.prompt_tokens + 10
    named = ask("Hi", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}, max_tokens=60)
    assert named.choices[0].message.tool_calls[0].function.name == "weather"
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]}}
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
    only = ask("Hi", tools=[other, TOOL], tool_choice=allowed, max_tokens=60)
    assert only.choices[0].message.tool_calls[0].function.name == "weather"


def t_completions():
    whole = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=5)
    assert "Paris" in whole.choices[0].text and whole.object == "text_completion", whole
    parts = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=5, stream=True)
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
    echoed = client.completions.create(model=MODEL, prompt="The capital of France is", echo=True, temperature=0, max_tokens=5)
    assert echoed.choices[0].text == "The capital of France is" + whole.choices[0].text, echoed
    two = client.completions.create(model=MODEL, prompt=["One, two,", "A, B, C,"], temperature=0, max_tokens=3, n=2)
    assert [c.index for c in two.choices] == [0, 1, 2, 3] and two.choices[0].text == two.choices[1].text != two.choices[2].text
    default = client.completions.create(model=MODEL, prompt="Once upon a time", temperature=0, seed=1)
    assert default.usage.completion_tokens <= 16, default  # what OpenAI's own server gives


def t_responses():
    ask_ = {"model": MODEL, "input": "What is the capital of France? One word.", "temperature": 0, "max_output_tokens": 16}
    whole = client.responses.create(**ask_)
    assert whole.status == "completed" and "Paris" in whole.output_text and whole.usage.input_tokens_details.cached_tokens == 0
    assert whole.instructions is None and whole.metadata == {} and whole.tool_choice == "auto" and whole.tools == []
    with client.responses.stream(**ask_) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text, (text, final)
    parsed = client.responses.parse(model=MODEL, input="A dog named Rex with four legs.", text_format=Pet, temperature=0, max_output_tokens=100)
    assert isinstance(parsed.output_parsed, Pet), parsed
    called = client.responses.create(**{**ask_, "input": "The weather in Paris?", "tools": [FLAT_TOOL], "tool_choice": "required",
                                        "max_output_tokens": 100})
    call = called.output[0]
    assert call.type == "function_call" and call.name == "weather" and called.tools[0].name == "weather", called
    assert called.tool_choice == "required", called
    check_weather(json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Purple rain."}
    follow = client.responses.create(**{**ask_, "input": [*said("The weather in Paris?"), call, result], "tools": [FLAT_TOOL],
                                        "tool_choice": "none", "instructions": "Be brief."})
    assert follow.output_text and follow.instructions == "Be brief.", follow
    likely = client.responses.create(**ask_, include=["message.output_text.logprobs"], top_logprobs=2)
    tokens = likely.output[0].content[0].logprobs
    assert tokens and all(len(t.top_logprobs) == 2 for t in tokens), likely
    cut = client.responses.create(**{**ask_, "input": "Count to a hundred.", "max_output_tokens": 16})
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    raises(openai.BadRequestError, lambda: client.responses.create(**ask_, previous_response_id="resp_1"))
    raises(openai.NotFoundError, lambda: client.responses.retrieve("resp_1"))


def t_context():
    question = "What is this licence called?"
    named = ask(question, model=MODEL + ":book", extra_body={"squeeze": {"budget": 0.5}})
    assert named.usage.prompt_tokens_details.cached_tokens > 100 and 0 < named.usage.squeeze["share_read"] <= 1, named
    document = open(os.environ["CLIENT_DOCUMENT"], encoding="utf-8").read()
    found = ask(document + "\n\n" + question, extra_body={"squeeze": {"budget": 0.5}})
    assert found.choices[0].message.content == named.choices[0].message.content and found.usage == named.usage
    assert client.responses.create(model=MODEL + ":book", input=question, max_output_tokens=16).usage.input_tokens_details.cached_tokens > 100


def t_jobs():
    """What the package has no names for goes through its own requests."""
    made = client.post("/contexts", cast_to=object, body={"name": "ship", "text": "The ship is named Aurora. " * 40})
    assert made["id"] == "ship" and made["status"] in ("waiting", "reading", "squeezing", "ready"), made
    raises(openai.ConflictError, lambda: client.post("/contexts", cast_to=object, body={"name": "ship", "text": "x"}))
    until = time.time() + 120
    while client.get("/contexts/ship", cast_to=object)["status"] != "ready":
        assert time.time() < until, client.get("/contexts/ship", cast_to=object)
        time.sleep(0.1)
    assert MODEL + ":ship" in [m.id for m in client.models.list()]
    assert ask("What is the ship's name?", model=MODEL + ":ship").usage.prompt_tokens_details.cached_tokens > 100
    assert client.patch("/contexts/ship", cast_to=object, body={"pinned": True})["pinned"] is True
    assert client.delete("/contexts/ship", cast_to=object)["deleted"] is True
    raises(openai.NotFoundError, lambda: client.get("/contexts/ship", cast_to=object))


def t_errors():
    error = raises(openai.BadRequestError, lambda: ask(temperature=-1))
    assert error.status_code == 400 and error.param == "temperature" and error.type == "invalid_request_error" and error.code, error
    raises(openai.BadRequestError, lambda: ask("word " * 9000))
    raises(openai.NotFoundError, lambda: ask(model="gpt-4o"))
    stranger = openai.OpenAI(base_url=URL, api_key="sk-of-nobody-at-all", max_retries=0)
    error = raises(openai.AuthenticationError, stranger.models.list)
    assert error.code == "invalid_api_key", error
    error = raises(openai.APIStatusError, lambda: ask("x" * (1 << 20)))
    assert error.status_code == 413, error
    raises(openai.NotFoundError, lambda: client.embeddings.create(model=MODEL, input="x"))


def t_full():
    """More than may wait is refused, and comes again after what Retry-After says."""
    with crowd(lambda: ask("Write a long story.", max_tokens=2000, stream=True, logit_bias=OPTIONS["endless"])):
        error = raises(openai.RateLimitError, ask)
        assert error.status_code == 429 and int(error.response.headers["retry-after"]) > 0, error
    patient = client.with_options(max_retries=8)
    assert patient.chat.completions.create(model=MODEL, messages=said("Hi"), max_tokens=1).choices


run_all(globals())
