"""`emu2 serve` without a browser: what the API answers, what it refuses, and how the command starts and ends."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import pytest
import weights
from PIL import Image

from emu2_megatron import cli
from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.data.tokenizer import Tokenizer, tokenizer_for
from emu2_megatron.errors import ConfigError, Emu2Error
from emu2_megatron.inference import serve, serve_command
from emu2_megatron.inference.generate import generate
from emu2_megatron.inference.load import find
from emu2_megatron.inference.model import Prompt, build, for_inference
from emu2_megatron.inference.prompt import COMPREHENSIVE, CONCISE, chat, encode, to_text
from emu2_megatron.inference.search import Options
from emu2_megatron.parallel import topology

Served = Callable[..., AbstractContextManager[str]]
DOG, CAT = (weights.TOKENIZER.parent / "images" / f"gc_{name}.jpg" for name in ("dog", "cat"))


def shown(file: Path) -> dict[str, str]:
    return {"image": base64.b64encode(file.read_bytes()).decode()}


def call(address: str, path: str, body: Any = None, method: str = "", **headers: str) -> tuple[int, Any]:
    """Status and what was said, as JSON if it is."""
    connection = http.client.HTTPConnection(address, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method or ("GET" if body is None else "POST"), path, data, sent)
    response = connection.getresponse()
    said = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(said) if is_json else (said, response.headers)


@pytest.fixture(scope="module")
def loaded(exported: Path) -> Iterator[SimpleNamespace]:
    """A chat model of two layers with random weights, and its tokenizer."""
    found = find(folder=exported / "hf")
    yield SimpleNamespace(model=found.load(), tokenizer=tokenizer_for(found.config), config=found.config.model)
    topology.stop()


@pytest.fixture
def address(loaded: SimpleNamespace, serve_app: Served) -> Iterator[str]:
    def answer(prompt: Prompt, options: Options) -> list[int]:
        return generate(loaded.model, [prompt], options)[0]

    with serve_app(answer, loaded.tokenizer, loaded.config) as address:
        yield address


CONVERSATION = {"turns": [{"user": [shown(DOG), {"text": "What is it?"}], "assistant": "A dog."},
                          {"user": [shown(CAT), {"text": "And this?"}]}]}  # fmt: skip
TURNS: list[Any] = [([DOG, "What is it?"], "A dog."), ([CAT, "And this?"], None)]
ASKED = {
    "a conversation": (CONVERSATION, chat(TURNS, COMPREHENSIVE), Options()),
    "greedy, a system message": (
        {**CONVERSATION, "system": "", "beams": 1, "max_new_tokens": 9, "min_new_tokens": 9},
        chat(TURNS, ""), Options(beams=1, max_new_tokens=9, min_new_tokens=9),
    ),
    "drawn": ({**CONVERSATION, "temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 7},
              chat(TURNS), Options(beams=1, temperature=0.9, top_p=0.8, top_k=50, seed=7)),
    "grounding": ({**CONVERSATION, "grounding": True}, chat(TURNS, CONCISE, grounding=True), Options()),
    "a document": ({"content": [shown(DOG), {"text": "a dog."}, shown(CAT)], "beams": 2, "length_penalty": 1},
                   [DOG, "a dog.", CAT], Options(beams=2, length_penalty=1.0)),
}  # fmt: skip


@pytest.mark.parametrize("what", ASKED)
def test_answers_are_those_of_generate(what: str, address: str, loaded: SimpleNamespace) -> None:
    """With files in the place of what the request has in itself."""
    record, parts, options = ASKED[what]
    prompt = encode(parts, loaded.tokenizer, loaded.config)
    (wanted,) = generate(loaded.model, [prompt], options)
    status, said = call(address, "/api/generate", record)
    assert status == 200 and said["text"] == to_text(wanted, loaded.tokenizer) and said["text"]
    assert (said["prompt_tokens"], said["new_tokens"]) == (len(prompt.tokens), len(wanted))
    assert ("boxes" in said) == (what == "grounding")


def test_what_the_model_is(address: str, serve_app: Served) -> None:
    status, said = call(address, "/api/model")
    assert status == 200 and (said["name"], said["chat"]) == ("tiny", True)
    assert (said["picture_tokens"], said["context"]) == (6, 2048)  # 4 embeddings between [IMG] and [/IMG]
    assert said["system"] == COMPREHENSIVE and said["defaults"]["beams"] == 5
    with serve_app(lambda prompt, options: [], Tokenizer(weights.TOKENIZER), weights.TINY) as base:
        assert call(base, "/api/model")[1]["chat"] is False
        assert call(base, "/api/generate", {"content": [shown(DOG)]})[1]["text"] == ""
        status, said = call(base, "/api/generate", CONVERSATION)
        assert status == 400 and "it is no chat model" in said["error"]


def test_boxes(serve_app: Served) -> None:
    tokenizer = Tokenizer(weights.TOKENIZER, chat=True)
    corners = [tokenizer.ids[f"<patch_index_{n:04d}>"] for n in (0, 56, 112, 224)]
    phrase = [tokenizer.ids["<phrase>"], *tokenizer.encode("a dog"), tokenizer.ids["</phrase>"]]
    tokens = [*phrase, tokenizer.ids["<object>"], *corners, tokenizer.ids["</object>"]]
    with serve_app(lambda prompt, options: tokens, tokenizer, weights.TINY) as address:
        status, said = call(address, "/api/generate", {**CONVERSATION, "grounding": True})
    assert status == 200 and said["text"] == "a dog"
    assert said["boxes"] == [{"phrase": "a dog", "boxes": [[0, 0.25, 0.5, 1]]}]


def _bomb() -> dict[str, str]:
    """A small file of 81 million pixels."""
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    return {"image": base64.b64encode(file.getvalue()).decode()}


def _said(*content: Any, **other: Any) -> dict[str, Any]:
    return {"content": list(content), **other}


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "the request is not JSON"),
    "not UTF-8": (b'{"content": "\xff"}', "the request is not JSON"),
    "deep": (b"[" * 100_000, "the request is not JSON"),
    "a list": ([], "an object with `content` or `turns`"),
    "nothing": ({}, "wanted is text, or a list of"),
    "unknown": ({"content": "a", "tokens\ud800": 3}, "'tokens\\ud800' is unknown; legal: content, turns"),
    "turns": ({"turns": []}, "`turns` is a list"),
    "answers": ({"turns": [{"user": "a"}, {"user": "b"}]}, "every turn but the last has an `assistant`"),
    "system": ({"turns": [{"user": "a"}], "system": 3}, "`system` is a text"),
    "video": (_said({"video": "AAAA"}), "`emu2 generate` takes videos"),
    "base64": (_said({"image": "~"}), "picture 1: its data is not base64"),
    "no picture": (_said({"text": "a"}, shown(DOG), {"image": "AAAA"}), "picture 2: picture cannot be decoded"),
    "cut off": (_said({"image": shown(DOG)["image"][:40_000]}), "picture 1: picture cannot be decoded"),
    "bomb": (_said(_bomb()), "picture 1: picture is too large: 9000 x 9000 pixels"),
    "embedding": (_said({"text": "<image>"}), "<image> in a prompt stands for an embedding"),
    "surrogate": (_said({"text": "\ud800"}), "text is not valid Unicode"),
    "long": (_said({"text": "a, b" * 2000}), "tokens, and 64 are to follow: the model reads 2048"),
    "very long": (_said({"text": "a" * 200_000}), "the prompt has more than 3125 tokens"),
    "pictures": (_said(*[{"image": "AAAA"}] * 400), "the prompt has more than 2400 tokens"),
    "boxes": (_said(*[{"box": [0, 0, 1, 1]}] * 400), "the prompt has more than 2400 tokens"),
    "no box": (_said({"box": [0, 0.5, 1, 0.5]}), "the box [0, 0.5, 1, 0.5] is none: left < right and top < bottom"),
    "half a box": (_said({"box": [True, 0, 1, 1]}), "a box is four numbers"),
    "long answer": (_said({"text": "a"}, max_new_tokens=2048), "and 2048 are to follow"),
    "beams": (_said({"text": "a"}, beams=100), "beams: 100; legal: up to 16"),
    "beams and draws": (_said({"text": "a"}, beams=2, temperature=1), "beams: 2 with a temperature"),
    "cold": (_said({"text": "a"}, temperature=1e-30), "temperature: 1e-30; legal: 0, or 0.001 and more"),
    "not a number": (_said({"text": "a"}, temperature=float("nan")), "temperature: nan; legal: a number"),
    "infinite": (_said({"text": "a"}, length_penalty=float("inf")), "length_penalty: inf; legal: a number"),
    "half a beam": (_said({"text": "a"}, beams=1.5), "beams: 1.5; legal: a whole number"),
    "true": (_said({"text": "a"}, top_k=True), "top_k: True; legal: a whole number"),
    "seed": (_said({"text": "a"}, temperature=1, seed=2**64), "seed: 18446744073709551616; legal: a whole number"),
    "grounding": (_said({"text": "a"}, grounding="yes"), "`grounding` is true or false"),
}


def test_what_cannot_be_answered(address: str) -> None:
    for what, (body, words) in BAD.items():
        status, said = call(address, "/api/generate", body)
        assert status == 400 and words in said["error"], (what, said)
    assert call(address, "/api/generate", _said({"text": "a"}, max_new_tokens=1))[0] == 200


@pytest.fixture
def fake(serve_app: Served) -> Iterator[tuple[str, list[Prompt]]]:
    """A server that computes nothing, takes 4000 bytes, and the prompts that reached it."""
    prompts: list[Prompt] = []

    def answer(prompt: Prompt, options: Options) -> list[int]:
        prompts.append(prompt)
        if options.seed == 13:
            raise RuntimeError("out of luck")
        return []

    with serve_app(answer, Tokenizer(weights.TOKENIZER), weights.TINY, max_body=4000) as address:
        yield address, prompts


def test_other_pages_are_refused(fake: tuple[str, list[Prompt]]) -> None:
    address, prompts = fake
    port = address.partition(":")[2]
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    for headers, status in (
        ({"Host": "evil.example"}, 403),  # a name that its owner points to this machine
        ({"Host": f"evil.example:{port}"}, 403),
        ({"Host": f"localhost.evil.example:{port}"}, 403),
        ({"Host": "192.0.2.1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),  # a sandboxed frame's, or a file's
        ({"Origin": f"http://localhost:{int(port) - 1}"}, 403),  # another server of this machine
        ({"Origin": f"http://localhost:{port}"}, 403),  # asked as 127.0.0.1
        ({"Content_Type": "text/plain"}, 415),  # what a page may send elsewhere without asking
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
    ):
        said = call(address, "/api/generate", {"content": "a"}, **headers)
        assert said[0] == status and said[1]["error"], headers
    assert call(address, "/", Host="evil.example")[0] == call(address, "/api/model", Origin="http://a.b")[0] == 403
    assert not prompts
    for headers in ({}, own, {"Host": f"[::1]:{port}"}, {"Content_Type": "Application/JSON; charset=utf-8"}):
        assert call(address, "/api/generate", {"content": "a"}, **headers)[0] == 200
    assert len(prompts) == 4


@pytest.mark.parametrize(
    ("host", "asked", "wanted"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True), ("127.0.0.1", "LOCALHOST", True), ("127.0.0.1", "10.0.0.7", False),
        ("10.0.0.7", "10.0.0.7:8000", True), ("10.0.0.7", "10.0.0.8:8000", False), ("Gpu1", "gpu1:80", True),
        ("gpu1", "gpu1.evil.example", False), ("0.0.0.0", "10.0.0.7", True), ("::", "[fe80::1]:80", True),
        ("0.0.0.0", socket.gethostname(), True), ("0.0.0.0", "evil.example", False),
    ],
)  # fmt: skip
def test_names_of_a_server(host: str, asked: str, wanted: bool) -> None:
    assert (serve.refused({"host": asked}, host) == "") == wanted


def test_limits_and_failures(fake: tuple[str, list[Prompt]]) -> None:
    address, prompts = fake
    for data in (b" " * 4001, iter([b" " * 3000] * 2)):  # of known length, and in chunks
        status, said = call(address, "/api/generate", data) if isinstance(data, bytes) else _chunked(address, data)
        assert status == 413 and "more than 4,000 bytes" in said["error"]
    for path, method, wanted in (
        ("/docs", "GET", 404), ("/openapi.json", "GET", 404), ("/api/generate", "GET", 405), ("/chat.html", "GET", 404),
        ("/../serve.py", "GET", 404), ("/", "POST", 405),
    ):  # fmt: skip
        status, said = call(address, path, method=method)
        assert status == wanted and said["error"], path
    status, said = call(address, "/api/generate", {"content": "a", "seed": 13})
    assert status == 500 and said["error"] == "the server failed (RuntimeError); its terminal says where"
    assert call(address, "/api/generate", {"content": "a"})[0] == 200 and len(prompts) == 2


def _chunked(address: str, data: Iterator[bytes]) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", "/api/generate", data, {"Content-Type": "application/json"}, encode_chunked=True)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_the_page_and_its_headers(fake: tuple[str, list[Prompt]]) -> None:
    status, (page, headers) = call(fake[0], "/")
    assert status == 200 and page == serve.PAGE.read_bytes() and headers.get_content_type() == "text/html"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy and headers["X-Content-Type-Options"] == "nosniff"
    assert b"innerHTML" not in page and b"http://" not in page.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"https://" not in page and b"//cdn" not in page


def test_one_at_a_time(serve_app: Served) -> None:
    at_work, most = 0, 0

    def answer(prompt: Prompt, options: Options) -> list[int]:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        time.sleep(0.05)
        at_work -= 1
        return []

    with serve_app(answer, Tokenizer(weights.TOKENIZER), weights.TINY) as address, ThreadPoolExecutor(4) as askers:
        asked = [askers.submit(call, address, "/api/generate", {"content": "a"}) for _ in range(4)]
        assert [one.result()[0] for one in asked] == [200] * 4
    assert most == 1


# Several ranks


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _first_answer(address: str, record: Any) -> tuple[int, Any]:
    """Of a server that is about to start."""
    end = time.monotonic() + 60
    while True:
        try:
            return call(address, "/api/generate", record)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def _ask_and_end(port: int, number: int, records: list[Any]) -> threading.Thread:
    """Asks a server that this process is about to start, puts answers in the place of the records, and sends the
    process a signal."""

    def ask() -> None:
        asked = list(records)
        records.clear()
        try:
            records.extend(_first_answer(f"127.0.0.1:{port}", record) for record in asked)
        finally:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


RECORDS = [
    {"content": [{"text": "a"}, shown(DOG)], "max_new_tokens": 5, "beams": 1},
    {"turns": [{"user": [shown(CAT), {"text": "what?"}]}], "max_new_tokens": 5, "beams": 3},
]


def _on_rank(rank: int, model: ModelConfig, tp: int, port: int) -> dict[str, Any]:
    config = for_inference(replace(harness.config(), model=model), tp)
    records: list[Any] = list(RECORDS)
    thread = _ask_and_end(port, signal.SIGINT, records) if rank == 0 else None
    built = build(config, weights.native(model).__getitem__)
    serve_command.serve(built, Tokenizer(weights.TOKENIZER, chat=True), "tiny", "127.0.0.1", port)
    if thread is not None:
        thread.join()
    return {"said": json.dumps([said.get("text") for _, said in records] if rank == 0 else [])}


@pytest.mark.slow
def test_ranks_answer_together(loaded: SimpleNamespace) -> None:
    """Two of them say what one does, and all end when the first is told to."""
    asked = [(["a", DOG], Options(beams=1, max_new_tokens=5)),
             (chat([([CAT, "what?"], None)]), Options(beams=3, max_new_tokens=5))]  # fmt: skip
    wanted = []
    for parts, options in asked:
        prompt = encode(parts, loaded.tokenizer, loaded.config)
        wanted.append(to_text(generate(loaded.model, [prompt], options)[0], loaded.tokenizer))
    first, second = harness.run(2, _on_rank, loaded.config, 2, _free_port())
    assert json.loads(first["said"]) == wanted and all(wanted) and second["said"] == "[]"


def test_ranks_out_of_step_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """If generating fails on the first of several, the others wait within it: the server ends, and says why."""
    told: list[Any] = []
    monkeypatch.setattr("torch.distributed.new_group", lambda **_: None)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda box, *_, **__: told.extend(box))
    monkeypatch.setattr("signal.raise_signal", pytest.fail)  # it ends without one
    model: Any = SimpleNamespace(here=SimpleNamespace(rank=0, world_size=2), config=SimpleNamespace(model=weights.TINY))
    model.begin = lambda *_: 1 / 0
    port = _free_port()
    with ThreadPoolExecutor(1) as asker, pytest.raises(Emu2Error, match="generating failed, .*: division by zero"):
        said = asker.submit(_first_answer, f"127.0.0.1:{port}", {"content": "a"})
        serve_command.serve(model, Tokenizer(weights.TOKENIZER), "tiny", "127.0.0.1", port)
    assert said.result()[0] == 500 and len(told) == 1 and told[0] is not None


# The command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_by_a_signal(
    number: int, exported: Path, capsys: pytest.CaptureFixture[str], loaded_nowhere: None
) -> None:
    port, records = _free_port(), [{"content": "a", "max_new_tokens": 3}]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # torch's launcher, in another test, leaves its own
    thread = _ask_and_end(port, number, records)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert cli.main(["serve", "--model", str(exported / "hf"), "--port", str(port)]) == 0
    thread.join()
    assert [status for status, _ in records] == [200]
    printed = capsys.readouterr()
    assert printed.out == f"hf at http://127.0.0.1:{port}/ (Ctrl-C ends it)\n" and not printed.err
    assert before == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture
def loaded_nowhere() -> None:
    """A process has one model: that of `loaded` is not to be there."""
    topology.stop()


def test_a_warning_beyond_loopback() -> None:
    assert "no authentication" not in serve_command.announcement("tiny", "::1", 8000, serve.is_loopback("::1"))
    line = serve_command.announcement("tiny", "0.0.0.0", 8000, serve.is_loopback("0.0.0.0"))
    assert "There is no authentication and no encryption" in line


def test_errors_are_one_line(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen there"):
        serve_command.listen("127.0.0.1", taken.getsockname()[1])
    model = ["--model", str(exported / "hf")]
    for arguments, words in (
        ([], "give either --checkpoint or --model"),
        ([*model, "--port", "70000"], "--port: 70000; legal: 0 to 65535"),
        ([*model, "--host", ""], "--host: an address or a name"),
        ([*model, "--tensor-parallel-size", "3"], "tensor_parallel_size: 3; legal"),
    ):
        assert cli.main(["serve", *arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("emu2: ") and words in printed and printed.count("\n") == 1
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.main(["serve", *model]) == 2
    assert "needs fastapi: pip install 'emu2-megatron[serve]'" in capsys.readouterr().err
