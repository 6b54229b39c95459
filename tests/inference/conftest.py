"""A small chat model as a checkpoint and as an export, and web applications that are served."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import weights
from one_thread import one_thread  # noqa: F401  (a fixture)
from safetensors.torch import save_file

from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.convert import from_hf
from emu2_megatron.convert.to_hf import to_hf
from emu2_megatron.data.tokenizer import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def chat_model() -> ModelConfig:
    """Two layers; its vocabulary has `[USER]` and `[ASSISTANT]`."""
    return weights.shallow(2, vocab_size=1274)


@pytest.fixture(scope="session")
def exported(chat_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `checkpoint` and `hf` of it, fp32."""
    root = tmp_path_factory.mktemp("exported")
    save_file(weights.native(chat_model), root / "native.safetensors")
    released = from_hf.whole(root / "native.safetensors", chat_model)
    from_hf.write(released, root / "checkpoint", weights.TOKENIZER)
    to_hf(root / "checkpoint", root / "hf", chat_model, weights.TOKENIZER)
    return root


@contextmanager
def serving(web: Any) -> Iterator[str]:
    """An application served on a free port, in a thread; its `address:port`."""
    from emu2_megatron.inference import serve_command

    with serve_command.listen("127.0.0.1", 0) as listening:
        server = serve_command.server_of(web)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def worker() -> Iterator[ThreadPoolExecutor]:
    """The thread that computes."""
    with ThreadPoolExecutor(1) as worker:
        yield worker


@pytest.fixture
def serve_app(worker: ThreadPoolExecutor) -> Callable[..., AbstractContextManager[str]]:
    """Serves `serve.app` of `answer`, `tokenizer`, `model` and what else it is given."""
    from emu2_megatron.inference import serve

    def of(answer: Any, tokenizer: Tokenizer, model: ModelConfig, **other: Any) -> AbstractContextManager[str]:
        return serving(serve.app(answer, tokenizer, model, worker, "tiny", **other))

    return of
