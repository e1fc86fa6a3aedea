"""The server on loopback, asked by the official client: its answers are the engine's, and no client breaks it."""

import asyncio
import contextlib
import copy
import json
import logging
import socket
import threading
import time

import jsonschema
import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from transformers_minicpm4.edge import server as server_module
from transformers_minicpm4.edge.engine import EdgeEngine
from transformers_minicpm4.edge.server import MAX_BODY_BYTES, ChatServer, _event, _Reply, listen, make_app, make_server
from transformers_minicpm4.edge.server_schema import ApiError, read_request
from transformers_minicpm4.edge.server_text import AnswerReader, PromptMaker, opening_of
from transformers_minicpm4.generation.drafts import PromptLookupDraft


NAME = "tiny"
CONTEXT = 1024
PROMPTS = ["Name three rivers.", "三条河流的名字是什么？", "🦙 plus 👩🏽‍🚀 = ?"]
GOOD = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get-weather",
        "description": "天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "from": {"type": "string"}}},
    },
}
CALLS = """<|thought_start|>
Both cities. 😀
<|thought_end|>
<|tool_call_start|>
```python
get-weather(city="Bern 🏔", from="1")
get-weather(city="巴塞尔")
```
<|tool_call_end|>
And then?"""


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
    )
    # In float64 no rounding decides between two tokens.
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def reference(model, tokenizer):
    """Another engine, which the tests ask themselves."""
    return EdgeEngine(copy.deepcopy(model), tokenizer, context=CONTEXT, compile=False)


class Serving:
    def __init__(self, engine, **options):
        self.app = make_app(engine, NAME, **options)
        self.line, self.sock = self.app.state.line, listen("127.0.0.1", 0)
        self.port = self.sock.getsockname()[1]
        ready = threading.Event()
        self.server = make_server(self.app, ready.set)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.sock]})
        self.thread.start()
        assert ready.wait(20)
        self.openai = self.client()

    def close(self):
        self.openai.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.sock.close()

    def client(self, kind=openai.OpenAI, api_key="any"):
        return kind(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=api_key, max_retries=0, timeout=60)

    def ask(self, prompt="Hi", **options):
        messages = user(prompt) if isinstance(prompt, str) else prompt
        options = {"max_tokens": 8, "temperature": 0, **options}
        return self.openai.chat.completions.create(model=NAME, messages=messages, **options)

    def stream(self, prompt, **options):
        """All chunks of a streamed answer."""
        options = {"max_tokens": 8, "temperature": 0, "stream_options": {"include_usage": True}, **options}
        messages = user(prompt) if isinstance(prompt, str) else prompt
        return list(self.openai.chat.completions.create(model=NAME, messages=messages, stream=True, **options))

    def send(self, body, method="POST", path="/v1/chat/completions", kind="application/json", more=""):
        """A request that its client may leave: the open socket."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nContent-Type: {kind}\r\n{more}"
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        sock.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)
        return sock

    def raw(self, *args, **options):
        """Status and body of a request that no decent client sends."""
        with self.send(*args, **options) as sock:
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), head, body

    def wait(self, **wanted):
        """Until the line counts so."""
        until = time.monotonic() + 30
        while not wanted.items() <= self.line.counts().items():
            assert time.monotonic() < until, (wanted, self.line.counts())
            time.sleep(0.005)


@contextlib.contextmanager
def serving(*args, **options):
    server = Serving(*args, **options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def make_engine(model, tokenizer):
    def make(**options):
        return EdgeEngine(copy.deepcopy(model), tokenizer, **{"context": CONTEXT, "compile": False, **options})

    return make


@pytest.fixture(scope="module")
def server(make_engine):
    with serving(make_engine(draft=PromptLookupDraft())) as server:
        yield server


@pytest.fixture
def say(monkeypatch, tokenizer):
    """Let the model say a text instead of its own."""

    class Says(LogitsProcessor):
        def __init__(self, token_ids, begin):
            self.token_ids, self.begin = token_ids, begin

        def __call__(self, input_ids, scores):
            masked = torch.full_like(scores, float("-inf"))
            masked[:, self.token_ids[(input_ids.shape[1] - self.begin) % len(self.token_ids)]] = 0
            return masked

    prepare = ChatServer.prepare

    def say(text, end=True):
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end

        def prepared(self, request, job):
            prepare(self, request, job)
            job.options["logits_processor"] = [Says(token_ids, len(job.token_ids))]

        monkeypatch.setattr(ChatServer, "prepare", prepared)

    return say


def content(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.2, "top_p": 0.9, "seed": 5}])
def test_answers_are_those_of_the_engine(server, reference, prompt, sampling):
    options = {"do_sample": False} if not sampling["temperature"] else {"do_sample": True, "top_k": 0, **sampling}
    expected = reference.generate(user(prompt), max_new_tokens=12, **options)
    answer = server.ask(prompt, max_tokens=12, **sampling)
    chunks = server.stream(prompt, max_completion_tokens=12, **sampling)
    assert answer.choices[0].message.content == content(chunks) == expected.text.strip()
    assert answer.choices[0].finish_reason == chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert (answer.object, chunks[0].object) == ("chat.completion", "chat.completion.chunk")
    for usage in (answer.usage, chunks[-1].usage):
        assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, len(expected.token_ids))
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    # The second request found all of the first one's prompt.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == expected.prompt_tokens - 1
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_seeds_repeat_and_differ(server):
    seeds = (1, -(2**63), 2**63 - 1, 1)
    texts = [server.ask(temperature=1, seed=seed).choices[0].message.content for seed in seeds]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("top_k", [0, -1])
def test_what_is_switched_off_is_off(server, reference, monkeypatch, top_k):
    monkeypatch.setattr(server.line.engine.model.generation_config, "top_k", 1)
    monkeypatch.setattr(server.line.engine.model.generation_config, "repetition_penalty", 0.01)
    sampled, greedy = {"temperature": 1.2, "seed": 5}, {"temperature": 0}
    free = reference.generate(user("Hi"), max_new_tokens=8, do_sample=True, top_k=0, temperature=1.2, seed=5)
    likeliest = reference.generate(user("Hi"), max_new_tokens=8)
    off = {"extra_body": {"top_k": top_k, "min_p": 0, "repetition_penalty": 1}}
    assert server.ask(**sampled, **off).choices[0].message.content == free.text.strip()
    assert server.ask(**greedy, **off).choices[0].message.content == likeliest.text.strip()
    assert server.ask(temperature=None, **off).choices[0].message.content == likeliest.text.strip()
    left_open = server.ask(**sampled).choices[0].message.content
    assert left_open == server.ask(**greedy).choices[0].message.content != likeliest.text.strip()


@pytest.mark.parametrize("text", ["你好，世界 😀👩🏽‍🚀", "line\u2028end\x85 é", '[a "quoted" {text}]\\n'])
def test_text_in_pieces_is_whole_again(server, text):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": text}}}
    whole = server.ask(response_format=form, max_tokens=80)
    chunks = server.stream("Hi", response_format=form, max_tokens=80)
    assert json.loads(whole.choices[0].message.content) == text
    assert content(chunks) == whole.choices[0].message.content
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 3
    assert chunks[-2].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stop, expected", [("三", "一, 二, "), (["d", "b c"], "一, 二, 三 a "), (["zz"], None)])
def test_stop_strings_end_the_answer_and_are_not_in_it(server, say, stop, expected, tokenizer):
    text = "一, 二, 三 a b c d"
    say(text)
    answer, chunks = server.ask(stop=stop, max_tokens=60), server.stream("Hi", stop=stop, max_tokens=60)
    assert answer.choices[0].message.content == content(chunks) == (text if expected is None else expected.strip())
    assert answer.choices[0].finish_reason == "stop"
    shown = tokenizer.decode(tokenizer(text)["input_ids"][: answer.usage.completion_tokens])
    assert answer.usage.completion_tokens == chunks[-1].usage.completion_tokens
    reader = AnswerReader(tokenizer, read_request({**GOOD, "stop": stop}), "")
    reader.put(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])  # as by one pass with a good draft
    assert reader.tokens == answer.usage.completion_tokens
    if expected is not None:  # no more was generated than what shows the stop string
        assert expected in shown
        assert len(shown) <= len(expected) + 3


def test_json_follows_its_schema(server):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 5}, "size": {"enum": [1, 2, None]}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    for seed in range(4):
        answer = server.ask(response_format=form, temperature=1.5, seed=seed, max_tokens=60).choices[0]
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.message.content), schema)
    anything = server.ask(response_format={"type": "json_object"}, temperature=1, seed=3).choices[0]
    assert anything.message.content.lstrip().startswith("{")
    form["json_schema"]["schema"] = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as error:
        server.ask(response_format=form)
    assert error.value.param == "response_format"


# ---------------------------------------------------------------------------------------------------- thoughts, tools


def test_thoughts_and_calls_come_apart(server, say):
    say(CALLS)
    answer = server.ask(tools=[WEATHER], max_tokens=200)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.reasoning_content == "Both cities. 😀"
    assert message.content == "And then?"
    wanted = [{"city": "Bern 🏔", "from": "1"}, {"city": "巴塞尔"}]
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == wanted
    assert len({call.id for call in message.tool_calls}) == 2

    chunks = [chunk.choices[0] for chunk in server.stream("Hi", tools=[WEATHER], max_tokens=200)[:-1]]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [(call.index, call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        (0, "get-weather", wanted[0]),
        (1, "get-weather", wanted[1]),
    ]
    assert all(call.id and call.type == "function" for call in calls)
    assert "".join(getattr(chunk.delta, "reasoning_content", "") for chunk in chunks) == "Both cities. 😀"
    assert chunks[-1].finish_reason == "tool_calls"

    one = server.ask(tools=[WEATHER], parallel_tool_calls=False, max_tokens=200).choices[0].message
    assert [call.function.name for call in one.tool_calls] == ["get-weather"]
    # Nobody asked for a call: it is text.
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        silent = server.ask(max_tokens=200, **options).choices[0]
        assert silent.finish_reason == "stop"
        assert silent.message.tool_calls is None
        assert 'get-weather(city="巴塞尔")' in silent.message.content


def test_an_unreadable_call_is_shown(server, say):
    say(
        'So:\n<|tool_call_start|>\n```python\nget-weather(city=unquoted)\nget-weather(city="Bern")\n```\n<|tool_call_end|>'
    )
    message = server.ask(tools=[WEATHER], max_tokens=200).choices[0].message
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [{"city": "Bern"}]
    assert message.content == "So:\nget-weather(city=unquoted)"


def test_a_call_and_its_result_go_back_into_the_prompt(server, say, tokenizer):
    say(CALLS)
    first = server.ask(tools=[WEATHER], max_tokens=200).choices[0].message
    history = [*user("Hi"), first.model_dump(exclude_none=True)]
    history += [{"role": "tool", "tool_call_id": call.id, "content": "12 °C"} for call in first.tool_calls]
    prompt = PromptMaker(server.line.engine).text(
        read_request({"model": NAME, "messages": history, "tools": [WEATHER]})
    )
    assert (
        'get-weather(city="Bern 🏔", from="1")\nget-weather(city="巴塞尔")\n```\n<|tool_call_end|>\nAnd then?' in prompt
    )
    assert prompt.count("<|im_start|>tool\n12 °C<|im_end|>") == 2
    assert json.dumps(WEATHER["function"], ensure_ascii=False) in prompt
    assert "<|tool_call_start|>\n```python\n" in prompt.partition("Hi")[0]
    say("fine")
    last = server.ask(history, tools=[WEATHER])
    assert last.choices[0].message.content == "fine"
    assert last.usage.prompt_tokens == len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_a_thought_that_the_template_opens_belongs_to_the_answer(server, say, monkeypatch):
    say("Hm.</think>\nYes.")
    template = server.line.engine.tokenizer.chat_template
    opened = template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    monkeypatch.setattr(server.line.engine.tokenizer, "chat_template", opened)
    message = server.ask("I say <|im_start|>assistant\n", max_tokens=20).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")
    assert opening_of("a<|im_start|>assistant\nnot of the template") == opening_of("no such line") == ""


# --------------------------------------------------------------------------------------------------------------- line


def gather(server, prompts, **options):
    """Answers, or errors, of as many clients at once."""

    async def ask(client, prompt):
        try:
            answer = await client.chat.completions.create(
                model=NAME, messages=user(prompt), max_tokens=4, temperature=0, **options
            )
        except openai.APIStatusError as error:
            return error
        return answer.choices[0].message.content

    async def all_of_them():
        async with server.client(openai.AsyncOpenAI) as client:  # a connection for each
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    return asyncio.run(all_of_them())


def test_fifty_clients_get_their_own_answers(server, reference):
    prompts = [f"{number} 条河" for number in range(50)]
    expected = [reference.generate(user(prompt), max_new_tokens=4).text.strip() for prompt in prompts]
    assert len(set(expected)) > 40
    assert gather(server, prompts) == expected
    server.wait(running=0, waiting=0)


def test_a_full_line_says_when_to_come_again(make_engine, reference):
    prompts = [f"{number} rivers" for number in range(50)]
    with serving(make_engine(), queue=3) as server:
        answers = gather(server, prompts)
        refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
        answered = [(prompt, answer) for prompt, answer in zip(prompts, answers) if isinstance(answer, str)]
        assert len(answered) + len(refused) == 50
        assert refused
        assert len(answered) >= 4
        for prompt, answer in answered:
            assert answer == reference.generate(user(prompt), max_new_tokens=4).text.strip()
        assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)
        assert refused[0].code == "queue_full"
        assert server.ask().choices[0].message.content


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_free_their_slots(make_engine, say, stream):
    say("on and on ", end=False)
    body = {"model": NAME, "messages": user("Hi"), "stream": stream}
    with serving(make_engine(), queue=2) as server:
        running = server.send(body)
        server.wait(running=1, waiting=0)
        if stream:
            assert b"200 OK" in running.recv(100)
        waiting = [server.send(body), server.send(body)]
        server.wait(running=1, waiting=2)
        status, head, _ = server.raw(body)
        assert status == 429
        assert b"retry-after" in head
        waiting[0].close()
        server.wait(running=1, waiting=1)
        running.close()
        server.wait(running=1, waiting=0)  # the second's turn
        waiting[1].close()
        server.wait(running=0, waiting=0)
        say("done")
        assert server.ask().choices[0].message.content == "done"


def test_a_client_may_leave_while_its_prompt_is_read(make_engine, reference, monkeypatch):
    engine = make_engine(chunk=8)
    read, entered, gate = [], threading.Event(), threading.Event()
    forward = engine.model.forward

    def slow(*args, **options):
        read.append(1)
        entered.set()
        gate.wait(20)
        return forward(*args, **options)

    with serving(engine) as server:
        monkeypatch.setattr(engine.model, "forward", slow)
        sock = server.send({"model": NAME, "messages": user("word " * 400)})
        assert entered.wait(20)
        sock.close()
        job = server.line._running
        while not job.left:
            time.sleep(0.005)
        gate.set()
        server.wait(running=0, waiting=0)
        assert len(read) == 1  # of some fifty chunks
        monkeypatch.undo()
        assert (
            server.ask(PROMPTS[0]).choices[0].message.content
            == reference.generate(user(PROMPTS[0]), max_new_tokens=8).text.strip()
        )


def test_stopping_ends_all_answers(make_engine, say):
    say("on and on ", end=False)
    body = {"model": NAME, "messages": user("Hi"), "stream": True}
    with serving(make_engine()) as server:
        running = server.send(body)
        server.wait(running=1)
        assert b"200 OK" in running.recv(100)
        waiting = server.send(body)
        server.wait(running=1, waiting=1)
        server.close()
        ends = [b"".join(iter(lambda sock=sock: sock.recv(65536), b"")) for sock in (running, waiting)]
        running.close(), waiting.close()
    assert all(b"the server is stopping" in end for end in ends)
    assert ends[1].startswith(b"HTTP/1.1 503")


def test_a_failing_answer_does_not_break_the_next(server, monkeypatch, capfd, reference):
    stream, text = server.line.engine.stream, reference.generate(user("Hi"), max_new_tokens=8).text.strip()

    def fail(*args, **options):
        if fail.late:
            yield from stream(*args, **options)
        raise RuntimeError("a secret")

    def at_once(*args, **options):
        raise RuntimeError("a secret")

    fail.late = True
    monkeypatch.setattr(server.line.engine, "stream", at_once)
    with pytest.raises(openai.InternalServerError, match="RuntimeError") as error:
        server.ask()
    assert "a secret" not in str(error.value)
    assert "a secret" in capfd.readouterr().err
    monkeypatch.setattr(server.line.engine, "stream", fail)
    with pytest.raises(openai.APIError, match="RuntimeError"):
        server.stream("Hi")
    monkeypatch.undo()
    assert server.ask().choices[0].message.content == text
    capfd.readouterr()


def test_a_long_prompt_does_not_hold_up_a_short_one(server, monkeypatch, reference):
    entered, gate, prepare = threading.Event(), threading.Event(), ChatServer.prepare

    def slow(self, request, job):
        if len(request.messages[0]["content"]) > 1000:
            entered.set()
            gate.wait(20)
        prepare(self, request, job)

    monkeypatch.setattr(ChatServer, "prepare", slow)
    long = [server.send({**GOOD, "messages": user("word " * 20_000)}) for _ in range(40)]  # more than threads
    assert entered.wait(20)
    assert server.ask().choices[0].message.content == reference.generate(user("Hi"), max_new_tokens=8).text.strip()
    assert not gate.is_set()
    gate.set()
    for sock in long:
        with sock:
            assert sock.recv(30).startswith(b"HTTP/1.1 400")


def test_reading_a_body_does_not_hold_up_the_rest(server, monkeypatch):
    entered, gate, read = threading.Event(), threading.Event(), server_module.read_json

    def slow(body):
        entered.set()
        assert gate.wait(20)
        return read(body)

    monkeypatch.setattr(server_module, "read_json", slow)
    with server.send(GOOD) as sock:
        assert entered.wait(20)
        assert server.raw(b"", method="GET", path="/health")[0] == 200
        gate.set()
        assert sock.recv(30).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("at", [(ChatServer, "prepare"), (server_module, "read_request"), (ChatServer, "model")])
def test_a_fault_of_ours_is_said_in_openais_form(server, monkeypatch, caplog, at, stream):
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [caplog.handler])

    def fail(*args):
        raise TypeError("a secret")

    monkeypatch.setattr(*at, fail)
    if at[1] == "model":
        status, _, answer = server.raw(b"", method="GET", path="/v1/models")
    else:
        status, _, answer = server.raw({**GOOD, "stream": stream})
    message = "the request failed: TypeError."
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    assert (status, json.loads(answer)) == (500, {"error": error})
    server.wait(running=0, waiting=0)
    assert "a secret" in caplog.text
    monkeypatch.undo()
    assert server.raw(GOOD)[0] == 200


def test_a_fault_in_the_midst_of_a_stream_is_its_last_event(server, monkeypatch, capfd):
    chunk = _Reply._chunk

    def fail(self, delta, *args, **options):
        if not delta:
            raise TypeError("a secret")
        return chunk(self, delta, *args, **options)

    monkeypatch.setattr(_Reply, "_chunk", fail)
    with pytest.raises(openai.APIError, match="TypeError") as error:
        server.stream("Hi")
    assert "a secret" not in str(error.value)
    assert "a secret" in capfd.readouterr().err
    server.wait(running=0, waiting=0)


# ------------------------------------------------------------------------------------------------------- bad requests

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def with_message(**message):
    return {"messages": [message]}


BAD = {
    "messages": [
        {"messages": None}, {"messages": []}, {"messages": "Hi"}, {"messages": {"role": "user"}}, {"messages": ["Hi"]},
        with_message(role="robot", content="x"), with_message(content="x"), with_message(role=["user"], content="x"),
        with_message(role="user"), with_message(role="user", content=None), with_message(role="user", content=3),
        with_message(role="user", content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        with_message(role="user", content=["x"]), with_message(role="assistant"),
        with_message(role="assistant", tool_calls=[{"id": "a"}]), with_message(role="assistant", tool_calls="f()"),
        with_message(role="assistant", tool_calls=[{**CALL, "function": {"name": "f", "arguments": "[1]"}}]),
        with_message(role="assistant", tool_calls=[{**CALL, "function": {"name": "f", "arguments": "{"}}]),
        with_message(role="assistant", tool_calls=[{**CALL, "function": {"name": "f g", "arguments": "{}"}}]),
        with_message(role="user", content="x", name=3), with_message(role="user", content="word " * 2000),
    ],
    "surrogates": [with_message(role="user", content="\ud800")],
    "model": [{"model": None}, {"model": 3}, {"model": ["tiny"]}],
    "temperature": [{"temperature": value} for value in (-1, 2.1, "hot", True, [], float("nan"), float("inf"))],
    "top_p": [{"top_p": value} for value in (-0.1, 1.1, "x", 10**400)],
    "max_tokens": [{"max_tokens": value} for value in (0, -1, 1.5, "8", True, 2**80)],
    "max_completion_tokens": [{"max_completion_tokens": 0}],
    "n": [{"n": value} for value in (0, 2, "1", 1000)],
    "seed": [{"seed": value} for value in (1.5, "x", 2**64, True)],
    "stop": [{"stop": value} for value in ("", [""], [3], 3, {}, list("abcde"), "x" * 5000, ["\ud800"])],
    "stream": [{"stream": "yes"}, {"stream": 1}],
    "stream_options": [{"stream_options": {"include_usage": True}}, {"stream": True, "stream_options": [1]},
                       {"stream": True, "stream_options": {"include_usage": 1}}],
    "tools": [{"tools": value} for value in ("f", [3], [{"type": "retrieval"}], [{"type": "function"}],
                                             [{"type": "function", "function": {}}], [WEATHER, WEATHER],
                                             [{"type": "function", "function": {"name": "f", "parameters": 3}}])],
    "tool_choice": [{"tool_choice": "required"}, {"tools": [WEATHER], "tool_choice": CALL}],
    "response_format": [{"response_format": value} for value in (
        "json", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 3}},
        {"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "strnig"}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(?=x)"}}},
    )] + [{"response_format": {"type": "json_object"}, "tools": [WEATHER]}],
    "chat_template_kwargs": [{"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, {"chat_template_kwargs": 3},
                             {"chat_template_kwargs": {"enable_thinking": "no"}}],
    "unsupported": [{"logprobs": True}, {"top_logprobs": 3}, {"logit_bias": {"3": 1}}, {"frequency_penalty": 0.5},
                    {"presence_penalty": 1}, {"functions": [{}]}, {"audio": {}}, {"top_k": 5}, {"echo": True}],
}  # fmt: skip


def refusal(status, body):
    error = json.loads(body)["error"]
    assert 400 <= status < 500, (status, error)
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert 10 < len(error["message"]) < 500, error
    return error


@pytest.mark.parametrize("kind", BAD)
def test_bad_fields_are_refused_in_a_sentence(server, kind):
    for change in BAD[kind]:
        body = {**GOOD, **change}
        status, _, answer = server.raw({key: value for key, value in body.items() if value is not None})
        error = refusal(status, answer)
        if kind not in ("surrogates", "unsupported"):
            shown = (error["param"] or "") + error["message"]
            assert kind in shown, (change, error)
    server.wait(running=0, waiting=0)
    assert server.raw(GOOD)[0] == 200


def deep(depth):
    return b'{"model": "tiny", "messages": ' + b"[" * depth + b"]" * depth + b"}"


def test_bad_bodies_are_refused_in_a_sentence(server):
    nested = b'{"items": ' * 700 + b"{}" + b"}" * 700
    form = b'{"type": "json_schema", "json_schema": {"name": "x", "schema": ' + nested + b"}}"
    odd = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "response_format": ' + form + b"}"
    for body in (b"", b"{", b"\xff\xfe", b"[1]", b"3", b"null", deep(10), deep(100_000), b'{"n": ' + b"9" * 9999, odd):
        status, _, answer = server.raw(body)
        refusal(status, answer)
    assert server.raw(GOOD, kind="text/plain")[0] == 415
    assert server.raw(b" " * (17 << 20))[0] == 413
    assert server.raw(json.dumps(GOOD).encode().ljust(MAX_BODY_BYTES))[0] == 200
    assert server.raw(json.dumps(GOOD).encode().ljust(MAX_BODY_BYTES + 1))[0] == 413
    status, _, answer = server.raw({**GOOD, "model": "gpt-9"})
    assert (status, refusal(status, answer)["code"]) == (404, "model_not_found")
    for method, path, expected in (("GET", "/v1/chat/completions", 405), ("POST", "/v1/embeddings", 404)):
        status, _, answer = server.raw(b"{}", method=method, path=path)
        assert status == expected
        refusal(status, answer)
    with pytest.raises(openai.BadRequestError, match="context") as error:
        server.ask("word " * 2000)
    assert error.value.code == "context_length_exceeded"
    assert server.raw(GOOD)[0] == 200


def test_harmless_fields_are_passed_over(server):
    more = {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "n": 1, "logprobs": False,
            "presence_penalty": 0.0, "frequency_penalty": 0, "tools": [], "stop": None, "unheard_of": [1]}  # fmt: skip
    wanted = server.ask(max_tokens=2).choices[0].message.content
    status, _, answer = server.raw({**GOOD, **more, "temperature": 0.0})
    assert (status, json.loads(answer)["choices"][0]["message"]["content"]) == (200, wanted)
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert server.ask([{"role": "user", "content": parts}], max_tokens=2).choices[0].message.content == wanted


def test_models_health_and_the_key(server, make_engine):
    assert [model.id for model in server.openai.models.list()] == [NAME]
    assert server.openai.models.retrieve(NAME).context_length == CONTEXT
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("gpt-9")
    with serving(make_engine(), api_key="secret é") as closed:
        for key in ("wrong", "secret"):
            status, _, answer = closed.raw(GOOD, more=f"Authorization: Bearer {key}\r\n")
            assert (status, json.loads(answer)["error"]["code"]) == (401, "invalid_api_key")
        assert closed.raw(b"", method="GET", path="/v1/models")[0] == 401
        assert closed.raw(b"", method="GET", path="/health")[0] == 200
    with serving(make_engine(), api_key="secret") as closed, closed.client(api_key="secret") as client:
        assert client.models.list().data[0].id == NAME


def test_settings_of_the_chat_window_are_read():
    settings = json.dumps({"max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "top_p": 0.7})
    read = read_request({**GOOD, "max_tokens": None, "generation_config": settings})
    assert (read.max_tokens, read.sampling) == (3, {"temperature": 0.5, "top_p": 0.7})
    assert read_request({**GOOD, "generation_config": '{"do_sample": false}'}).sampling == {"temperature": 0.0}
    with pytest.raises(ApiError, match="JSON"):
        read_request({**GOOD, "generation_config": "{"})


def test_no_reader_of_lines_cuts_an_event():
    event = _event({"text": "a\u2028b\u2029c\x85d\x0be\n"}).decode()
    assert event.splitlines() == [event.strip(), ""]
    assert json.loads(event.removeprefix("data: "))["text"] == "a\u2028b\u2029c\x85d\x0be\n"


@pytest.mark.parametrize(
    "options, word", [({"queue": -1}, "queue"), ({"queue": True}, "queue"), ({"api_key": " "}, "key")]
)
def test_unusable_settings_are_refused(server, options, word):
    with pytest.raises(ValueError, match=word):
        make_app(server.line.engine, NAME, **options)


def test_a_tokenizer_without_a_template_is_refused(make_engine, tokenizer):
    engine = make_engine()
    engine.tokenizer = copy.deepcopy(tokenizer)
    engine.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        make_app(engine, NAME)
