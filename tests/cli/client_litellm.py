#!/usr/bin/env python3
"""`squeeze serve` behind `litellm`, which many frameworks ask through: client_litellm.py PORT KEY. A context named book
is there."""
import json
import os
import sys
import urllib.request

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched from elsewhere
import litellm
from pydantic import BaseModel, Field

from client_cases import OPTIONS, WEATHER, check_weather, crowd, raises, run_all

ROOT = f"http://127.0.0.1:{sys.argv[1]}"
KEY = sys.argv[2]
with urllib.request.urlopen(urllib.request.Request(ROOT + "/v1/models", headers={"x-api-key": KEY})) as listed:
    MODEL = json.load(listed)["data"][0]["id"]
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather in a city.", "parameters": WEATHER}}
QUESTION = "What is the capital of France? One word."
litellm.suppress_debug_info = True
litellm.telemetry = False


class Pet(BaseModel):
    name: str = Field(max_length=8)
    kind: str = Field(max_length=8)


def said(text):
    return [{"role": "user", "content": text}]


def ask(text=QUESTION, model=MODEL, **more):
    return litellm.completion(**{"model": "openai/" + model, "api_base": ROOT + "/v1", "api_key": KEY, "messages": said(text),
                                 "temperature": 0, "max_tokens": 12, "num_retries": 0, "max_retries": 0, **more})


def ask_anthropic(text=QUESTION, model=MODEL, **more):
    return litellm.completion(**{"model": "anthropic/" + model, "api_base": ROOT, "api_key": KEY, "messages": said(text),
                                 "temperature": 0, "max_tokens": 12, "num_retries": 0, "max_retries": 0, **more})


def t_openai():
    whole = ask()
    assert "Paris" in whole.choices[0].message.content and whole.choices[0].finish_reason == "stop", whole
    parts = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens, parts[-1]
    parsed = Pet.model_validate_json(ask("A dog named Rex.", response_format=Pet, max_tokens=80).choices[0].message.content)
    assert parsed.name
    assert ask("A JSON object.", response_format={"type": "json_object"}).choices[0].message.content.startswith("{")
    named = ask("What is this licence called?", model=MODEL + ":book")
    assert named.usage.prompt_tokens_details.cached_tokens > 100, named
    assert len(ask("Name an animal.", n=2, temperature=1.0).choices) == 2
    assert ask(logprobs=True, top_logprobs=1).choices[0].logprobs.content


def t_anthropic():
    whole = ask_anthropic()
    assert "Paris" in whole.choices[0].message.content and whole.choices[0].finish_reason == "stop", whole
    parts = list(ask_anthropic(stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole.choices[0].message.content
    named = ask_anthropic("What is this licence called?", model=MODEL + ":book")
    assert named.usage.prompt_tokens_details.cached_tokens > 100, named


def t_tools():
    question = "How is the weather in Paris?"
    options = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}
    choice = ask(question, **options).choices[0]
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls" and call.function.name == "weather", choice
    check_weather(json.loads(call.function.arguments))
    deltas = [p.choices[0].delta for p in ask_anthropic(question, stream=True, **options)]
    check_weather(json.loads("".join(d.tool_calls[0].function.arguments or "" for d in deltas if d.tool_calls)))
    result = {"role": "tool", "tool_call_id": call.id, "content": "Purple rain."}
    for one in (ask, ask_anthropic):
        reply = one(messages=[*said(question), choice.message.model_dump(), result], max_tokens=8).choices[0].message
        assert reply.content and not reply.tool_calls, reply


def t_others():
    text = litellm.text_completion(model="text-completion-openai/" + MODEL, api_base=ROOT + "/v1", api_key=KEY,
                                   prompt="The capital of France is", max_tokens=5, temperature=0)
    assert "Paris" in text.choices[0].text, text
    reply = litellm.responses(model="openai/" + MODEL, api_base=ROOT + "/v1", api_key=KEY, input=QUESTION, temperature=0, max_output_tokens=16)
    assert "Paris" in reply.output[0].content[0].text, reply


def t_errors():
    for one in (ask, ask_anthropic):
        raises(litellm.BadRequestError, lambda: one(temperature=-1))
        raises(litellm.AuthenticationError, lambda: one(api_key="sk-of-nobody-at-all"))
        raises(litellm.NotFoundError, lambda: one(model="gpt-unknown"))
    raises(litellm.ContextWindowExceededError, lambda: ask("word " * 9000))
    error = raises(Exception, lambda: ask("x" * (1 << 20)))
    assert error.status_code == 413, error


def t_full():
    with crowd(lambda: ask("Write a long story.", max_tokens=2000, stream=True, logit_bias=OPTIONS["endless"])):
        raises(litellm.RateLimitError, ask)
    assert ask(max_tokens=1, num_retries=8, max_retries=8).choices


run_all(globals())
