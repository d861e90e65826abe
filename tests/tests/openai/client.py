"""Uses the `openai` package like a user's program, against the agent: python client.py BASE_URL.

Asserts everything itself and prints one line per passed step. BASE_URL ends in /v1. The agent's endpoint is the tests' model
server, whose tokens repeat these twelve words.
"""

import asyncio
import sys

import openai

WORDS = "Water turns the wheel while the gate decides how much of it. ".split(" ")[:12]
TOKENS = 30
TEXT = "".join(f"{WORDS[n % len(WORDS)]} " for n in range(TOKENS))
MESSAGES = [{"role": "user", "content": "What turns the wheel?"}]
CHAT = {"model": "sample", "messages": MESSAGES, "max_tokens": TOKENS}
PACED = {"extra_body": {"x-test-interval-us": 2000}}


def passed(what):
    print(f"ok {what}", flush=True)


def chat(client):
    answer = client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == TEXT, answer
    assert answer.choices[0].finish_reason == "length", answer
    assert answer.usage.completion_tokens == TOKENS, answer
    assert answer.usage.prompt_tokens == 4, answer
    passed("chat")


def chat_streamed(client):
    stream = client.chat.completions.create(**CHAT, **PACED, stream=True, stream_options={"include_usage": True})
    parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant", parts[0]
    deltas = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(deltas) == TEXT, deltas
    assert sum(1 for delta in deltas if delta) == TOKENS, deltas
    assert len({part.id for part in parts}) == 1, parts
    assert parts[-2].choices[0].finish_reason == "length", parts[-2]
    assert parts[-1].usage.completion_tokens == TOKENS, parts[-1]
    passed("chat streamed")


def text(client):
    asked = {"model": "sample", "prompt": "Water turns", "max_tokens": TOKENS}
    answer = client.completions.create(**asked)
    assert answer.choices[0].text == TEXT, answer
    parts = list(client.completions.create(**asked, **PACED, stream=True))
    assert "".join(part.choices[0].text for part in parts) == TEXT, parts
    passed("text")


def models(client):
    listed = client.models.list()
    assert [model.id for model in listed] == ["sample"], listed
    passed("models")


def errors(client):
    """Errors of the agent and of the endpoint, and the exception class of each status."""
    try:
        client.chat.completions.create(model="unrouted", messages=MESSAGES)
        raise AssertionError("a model without a route got a response")
    except openai.NotFoundError as error:
        assert isinstance(error, openai.APIStatusError)
        assert (error.status_code, error.code, error.type) == (404, "no_route", "invalid_request_error"), error
        assert "no route" in error.body["message"], error.body
    try:
        client.chat.completions.create(model="unpickable", messages=MESSAGES)
        raise AssertionError("a pool without its picker got a response")
    except openai.InternalServerError as error:
        assert (error.status_code, error.code, error.type) == (503, "picker_failed", "server_error"), error
        assert error.response.headers["retry-after"] == "1", error.response.headers
    try:
        client.get("/nothing", cast_to=object)
        raise AssertionError("a path unknown to the endpoint got a response")
    except openai.NotFoundError as error:
        assert (error.status_code, error.code, error.type) == (404, "404", "NotFoundError"), (error.code, error.type)
    passed("errors")


def kept_connection(client):
    """Errors and streams keep the connection usable."""
    for _ in range(3):
        chat_streamed_quietly(client)
        assert client.chat.completions.create(**CHAT).choices[0].message.content == TEXT
        try:
            client.chat.completions.create(model="unrouted", messages=MESSAGES)
        except openai.NotFoundError:
            pass
    passed("kept connection")


def chat_streamed_quietly(client):
    stream = client.chat.completions.create(**CHAT, **PACED, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == TEXT


def abandoned(client):
    """A stream closed early leaves the client usable."""
    with client.chat.completions.create(**CHAT, **PACED, stream=True) as stream:
        next(iter(stream))
    assert client.chat.completions.create(**CHAT).choices[0].message.content == TEXT
    passed("abandoned")


async def concurrent(base_url):
    async def one(client, tokens):
        asked = {**CHAT, "max_tokens": tokens}
        stream = await client.chat.completions.create(**asked, **PACED, stream=True)
        return [part.choices[0].delta.content async for part in stream if part.choices[0].delta.content]

    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        answers = await asyncio.gather(*(one(client, 20 + number) for number in range(20)))
    for number, answer in enumerate(answers):
        assert "".join(answer) == "".join(f"{WORDS[n % len(WORDS)]} " for n in range(20 + number)), (number, answer)
    passed(f"{len(answers)} streams at once")


def main():
    base_url = sys.argv[1]
    # Without retries, which would hide failures.
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        for step in (chat, chat_streamed, text, models, errors, kept_connection, abandoned):
            step(client)
    asyncio.run(concurrent(base_url))
    print(f"openai {openai.__version__}: all steps passed")


main()
