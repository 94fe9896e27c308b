"""The service of many adapters, asked by OpenAI's own client."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from services import NAMES, QUESTIONS, TOKENS, asked

from examples.serving.http import Call
from examples.serving.jobs import End
from examples.serving.protocol import Answer

pytestmark = pytest.mark.slow  # the service takes seconds to start


def test_adapters_are_models(service):
    listed = [model.id for model in service.client.models.list()]
    assert listed == ["tiny", *sorted(NAMES)]
    assert service.client.models.retrieve("law").id == "law"
    with pytest.raises(openai.NotFoundError, match="'no-adapter' does not exist"):
        service.client.models.retrieve("no-adapter")


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_says_what_it_says_alone(service, oracle, question):
    """With a cache, padded prompts and slots: the same as without all of it."""
    said = {name: service.text(name, question) for name in ("tiny", *NAMES)}
    seeds = {name: seed for seed, name in enumerate(NAMES)} | {"tiny": None}
    assert said == {name: oracle.says(seeds[name])[question] for name in said}
    assert len(set(said.values())) == len(said)


def test_many_at_once_never_get_the_answer_of_another(service, oracle):
    """More clients than rows, and more adapters than slots."""

    def ask(number):
        name, question = NAMES[number % len(NAMES)], QUESTIONS[number % 7 % 2]
        return service.text(name, question) == oracle.says(NAMES.index(name))[question]

    before = service.health()["loads"]
    with ThreadPoolExecutor(8) as clients:
        assert all(clients.map(ask, range(24)))
    assert service.health()["loads"] > before


def test_a_stream_is_the_answer_in_pieces(service, oracle):
    with service.ask(
        "code", stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = stream
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == oracle.says(1)["Hi"]
    assert len(chunks) > 4
    whole = service.ask("code")
    assert last.usage == whole.usage
    assert whole.usage.completion_tokens == TOKENS
    reasons = [chunks[-1].choices[0].finish_reason, whole.choices[0].finish_reason]
    assert reasons == ["length", "length"]
    assert len({c.id for c in chunks}) == 1


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("Hé🙂!".encode(), ["H", "é", "🙂", "!"]),
        (b"\xff\xff\xff\xc3\xa9!", ["\ufffd", "\ufffd", "\ufffd", "é", "!"]),
        (b"\xf0\x9f\x99a\xf0\x9f", ["\ufffda", "\ufffd"]),
        ("\ufffd🙂".encode(), ["\ufffd", "🙂"]),
    ],
)
def test_characters_of_several_tokens_are_sent_whole(service, said, wanted):
    async def pieces():
        call = Call(Answer("law", 0), [], 0.0)
        for event in (*(3 + byte for byte in said), End.STOP):
            call.events.put_nowait(event)
        return [piece async for piece in service.service._pieces(call)]

    *texts, end = asyncio.run(pieces())
    assert (texts, end) == (wanted, End.STOP)
    assert "".join(texts) == said.decode(errors="replace")


def test_random_answers_depend_on_the_seed_alone(service):
    def ask(seed):
        return service.text("law", temperature=1.5, seed=seed)

    first = ask(1)
    with ThreadPoolExecutor(4) as clients:
        again = list(clients.map(ask, [2, 1, 3, 1]))
    assert again[1] == again[3] == first
    assert len({*again}) == 3
    assert service.text("law", temperature=1.5) != service.text("law", temperature=1.5)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_conversations_have_turns_and_parts(service):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts("H", "é")},
        {"role": "assistant", "content": "Yes?", "refusal": None},
        {"role": "user", "content": "Go"},
    ]
    found = service.client.chat.completions.create(
        model="law",
        messages=turns,
        max_completion_tokens=2,
        temperature=0,
        user="me",
        response_format={"type": "text"},
        tool_choice="none",
    )
    wanted = "".join(
        f"<|im_start|>{turn['role']}\n{text}<|im_end|>\n"
        for turn, text in zip(turns, ["Be brief.", "Hé", "Yes?", "Go"], strict=True)
    )
    tokens = service.service.tokenizer.encode(f"{wanted}<|im_start|>assistant\n")
    assert found.usage.prompt_tokens == len(tokens)
    assert found.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "must be JSON"),
        (b"{", 400, "must be JSON"),
        (b"[" * 100_000, 400, "must be JSON"),
        (b"\xff\xfe", 400, "must be UTF-8"),
        (b"9" * 5000, 400, "must be JSON"),
        (b"[]", 400, "must be an object, got []"),
        (asked(model=None), 400, "model must be of type str, got null"),
        (asked(model=["law"]), 400, "model must be of type str"),
        (asked(model="\ud800"), 400, "must not contain surrogates"),
        (asked(model="no"), 404, "'no' does not exist"),
        (asked(model=""), 404, "'' does not exist"),
        (asked(model=".."), 404, "'..' does not exist"),
        (asked(model="../adapters/law"), 404, "does not exist"),
        (asked(model="law/../code"), 404, "does not exist"),
        (asked(model="/etc"), 404, "does not exist"),
        (asked(model="law\0"), 404, "does not exist"),
        (asked(model="law\n"), 404, "does not exist"),
        (asked(model="x" * 5000), 404, "does not exist"),
        (asked(messages=[]), 400, "must not be empty"),
        (asked(messages="Hi"), 400, "messages must be of type list"),
        (asked(messages=["Hi"]), 400, "messages[0] must be an object"),
        (asked(messages=[{"role": "tool"}]), 400, "messages[0].role must be one of"),
        (asked(messages=[{"role": "user"}]), 400, "messages[0].content must be a text"),
        (asked(messages=[{"role": "user", "content": [7]}]), 400, "content must be a"),
        (
            asked(messages=[{"role": "user", "content": "<|im_end|>"}]),
            400,
            "must not contain <|im_end|>",
        ),
        (
            asked(messages=[{"role": "user", "content": parts("Hi<|im_", "end|>")}]),
            400,
            "must not contain <|im_end|>",
        ),
        (asked(max_tokens=0), 400, "max_tokens must be from 1"),
        (asked(max_tokens=True), 400, "max_tokens must be of type int, got true"),
        (asked(max_tokens=1.5), 400, "max_tokens must be of type int, got 1.5"),
        (asked(max_tokens=65), 400, "max_tokens must be at most 64, got 65"),
        (asked(max_tokens=10**30), 400, "max_tokens must be from 1"),
        (asked(seed=-1), 400, "seed must be from 0"),
        (asked(temperature=-1), 400, "temperature must be from 0 to 2"),
        (asked(temperature=float("nan")), 400, "temperature must be from 0 to 2"),
        (asked(temperature="1"), 400, "temperature must be of type int or float"),
        (asked(stream=1), 400, "stream must be of type bool"),
        (asked(n=2), 400, "n must be 1 or left out"),
        (asked(stop="."), 400, "stop must be null or left out"),
        (asked(tools=[]), 400, 'does not support "tools"'),
        (asked(tool_choice="auto"), 400, 'tool_choice must be "none" or left out'),
        (asked(response_format={"type": "json_object"}), 400, "response_format must"),
        (asked(**{"\ud800": 1}), 400, r'does not support "\ud800"'),
        (
            asked(messages=[{"role": "user", "content": "Hi", "name": "bob"}]),
            400,
            'does not support "name" in messages[0]',
        ),
        (
            asked(stream_options={"include_obfuscation": True}),
            400,
            'does not support "include_obfuscation" in stream_options',
        ),
        (
            asked(messages=[{"role": "user", "content": "x" * 200}]),
            400,
            "at most 128 tokens together",
        ),
    ],
)  # fmt: skip
def test_bad_requests_are_told_why(service, body, status, says):
    found, told = service.post(body)
    assert says in told["error"]["message"]
    assert found == status
    assert told["error"]["type"] == "invalid_request_error"


def test_other_paths_and_methods(service):
    assert service.post(b"{}", "/v1/completions")[0] == 404
    assert service.post(b"{}", "/v1/models")[0] == 405
    with pytest.raises(openai.NotFoundError):
        service.client.models.retrieve("../law")


def test_a_body_of_100_megabytes(service):
    """It is read and dropped, so the client learns why."""
    status, told = service.post(b"x" * 100_000_000)
    assert status == 413
    assert "at most 262,144 bytes" in told["error"]["message"]
    assert service.text("law", max_tokens=1)
