"""`emu2 serve`: its options, and what its ranks do.

Rank 0 is the server: a single thread of it computes, one request after the other, and tells the other ranks what to
compute with it.
"""

import argparse
import importlib.util
import signal
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from emu2_megatron.errors import ConfigError, Emu2Error
from emu2_megatron.inference import model_options

if TYPE_CHECKING:
    from emu2_megatron.data.tokenizer import Tokenizer
    from emu2_megatron.inference.model import InferenceModel, Prompt
    from emu2_megatron.inference.search import Options

PATIENCE = timedelta(days=365)
"""How long ranks wait for the next request; torch's own half hour would end a server that nobody uses at lunch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `emu2 serve`."""
    model_options.add_arguments(parser)
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where it listens (default %(default)s, which this machine alone can reach: it has no passwords)",
    )
    server.add_argument("--port", type=int, default=8000, metavar="N", help="default %(default)s; 0: any that is free")


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """`emu2 serve`, alone or as one of torchrun's ranks; ends by Ctrl-C or SIGTERM.

    Args:
        options: parsed.
        arguments: as they were given, for ranks that are to be started.
    """
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"emu2 serve needs {' and '.join(missing)}: pip install 'emu2-megatron[serve]'")
    if not options.host:
        raise ConfigError("--host: an address or a name; empty would be every address of this machine")
    if not 0 <= options.port < 2**16:
        raise ConfigError(f"--port: {options.port}; legal: 0 to 65535")
    processes = model_options.ranks_to_start(options)
    found, tokenizer = model_options.find(options)
    try:
        if processes:
            from emu2_megatron.training.launch import start_ranks

            start_ranks(arguments, processes)
            return 0

        from emu2_megatron.parallel import topology

        model = found.load()
        try:
            serve(model, tokenizer, (options.checkpoint or options.model).resolve().name, options.host, options.port)
        finally:
            # After an error other ranks may be waiting in a collective: leave without asking them.
            if model.here.world_size == 1 or sys.exc_info()[0] in (None, KeyboardInterrupt):
                topology.stop()
    except KeyboardInterrupt:
        pass  # how a server is ended
    return 0


def serve(model: "InferenceModel", tokenizer: "Tokenizer", name: str, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; called by all ranks together, on their main threads.

    Args:
        model: of this rank.
        tokenizer: the model's.
        name: of the model, for the page.
        host: address or name to listen at.
        port: 0 takes any that is free.

    Raises:
        ConfigError: nothing can listen there. Emu2Error: a rank failed, so that the ranks are out of step.
    """
    ranks = Ranks(model)
    if model.here.rank > 0:
        ranks.follow()
        return
    from emu2_megatron.inference import serve
    from emu2_megatron.platform import device

    with listen(host, port) as listening, ThreadPoolExecutor(1, initializer=device.activate) as worker:
        web = serve.app(ranks.answer, tokenizer, model.config.model, worker, name, host)
        server = ranks.server = server_of(web)
        # What uvicorn was told, it tells again when it is done.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(announcement(name, host, listening.getsockname()[1], serve.is_loopback(host)), flush=True)
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
            worker.shutdown(cancel_futures=True)
    ranks.end()


class Ranks:
    """Lets all ranks generate what rank 0 is asked for."""

    def __init__(self, model: "InferenceModel") -> None:
        """Called by all ranks together."""
        import torch.distributed as dist

        self.model = model
        self.server: Any = None
        """Is stopped if generating fails and other ranks wait for the rest of it."""
        self._failure: Exception | None = None
        self._several = model.here.world_size > 1
        # Of gloo, also beside GPUs: waiting keeps none of them busy.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if self._several else None

    def answer(self, prompt: "Prompt", options: "Options") -> list[int]:
        """The new tokens; on rank 0, one at a time."""
        from emu2_megatron.inference.generate import generate

        if self._failure is not None:  # the other ranks are still in what failed
            raise Emu2Error(f"the server is ending, generating failed: {self._failure}")
        if self._several:
            prompt = replace(prompt, pictures=[picture.cpu() for picture in prompt.pictures])
            self._tell((prompt, options))
        try:
            return generate(self.model, [prompt], options)[0]
        except Exception as error:
            if self._several:
                self._failure = error
                self.server.should_exit = True
            raise

    def follow(self) -> None:
        """On all other ranks, until rank 0 ends. Signals go to all ranks; what they mean, rank 0 decides."""
        from emu2_megatron.inference.generate import generate

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        while (asked := self._tell(None)) is not None:
            generate(self.model, [asked[0]], asked[1])

    def end(self) -> None:
        """On rank 0: no more requests."""
        if self._failure is not None:
            raise Emu2Error(f"generating failed, and other ranks wait: {self._failure}") from self._failure
        if self._several:
            self._tell(None)

    def _tell(self, asked: Any) -> Any:
        """What rank 0 gives, on all ranks."""
        import torch.distributed as dist

        box = [asked]
        dist.broadcast_object_list(box, 0, group=self._group)
        return box[0]


def listen(host: str, port: int) -> socket.socket:
    """A socket to which connections can be made, though nobody answers them yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen()
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error}); --port 0 takes any") from error
    return listening


def server_of(web: Any) -> Any:
    """A uvicorn server of an application. It believes no header about who asks, and logs errors alone."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            web, http="h11", ws="none", loop="asyncio", lifespan="off", log_level="error", access_log=False,
            proxy_headers=False, server_header=False,
        )
    )  # fmt: skip


def announcement(name: str, host: str, port: int, is_loopback: bool) -> str:
    """What is printed when the server listens."""
    where = f"[{host}]" if ":" in host else host
    line = f"{name} at http://{where}:{port}/ (Ctrl-C ends it)"
    if is_loopback:
        return line
    return (
        f"{line}\nemu2: {host} is not this machine's loopback: whoever can reach it can use the model, and read along. "
        "There is no authentication and no encryption."
    )
