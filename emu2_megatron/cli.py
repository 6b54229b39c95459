"""The `emu2` command. Thin: it reads arguments, and imports what a subcommand needs only when that one runs."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import emu2_megatron
from emu2_megatron.config.schema import Config
from emu2_megatron.errors import ConfigError, Emu2Error, Stopped, TrainingDiverged
from emu2_megatron.platform.gpus import GPUS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 2 for a configuration that cannot run, 75 or 143 for a run that saved
    and ended early (docs/running.md), 1 for any other known error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without some letter shows "?" for it
    parser = _parser()
    # Overrides may stand before, between and after the options, which argparse cannot say: they are what is left over.
    options, rest = parser.parse_known_args(arguments)
    takes_fields = hasattr(options, "config") and options.command not in ("generate", "serve")
    if wrong := [text for text in rest if text.startswith("-") or not takes_fields]:
        hint = f" (a field of the configuration? then: {wrong[0].lstrip('-')}=VALUE)" if "." in wrong[0] else ""
        parser.error(f"unknown argument: {' '.join(wrong)}{hint}")
    try:
        if options.command == "train":
            resume = [f"checkpoint.resume={options.resume}"] if options.resume else []
            return _train(options.config, [*rest, *resume], options.nproc_per_node)
        if options.command == "embed":
            return _embed(options.config, rest, options.output)
        if options.command == "plan":
            return _plan(options, rest)
        if options.command == "shards":
            from emu2_megatron.data import make_shards

            return make_shards.run(options)
        if options.command == "convert":
            from emu2_megatron.convert import command

            return command.RUN[options.direction](options)
        if options.command == "generate":
            from emu2_megatron.inference import command as generate

            return generate.run(options, sys.argv[1:] if arguments is None else arguments)
        if options.command == "serve":
            from emu2_megatron.inference import serve_command

            return serve_command.run(options, sys.argv[1:] if arguments is None else arguments)
        if options.command == "data":
            return _inspect(options.config, rest, options.rows, options.output)
        return _doctor()
    except Emu2Error as error:
        if (prefix := _prefix(error)) and str(error):
            print(f"{prefix}: {error}", file=sys.stderr)
        return error.code if isinstance(error, Stopped) else 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        # The progress bar hides the cursor, and a rank that was killed cannot bring it back.
        print("\x1b[?25h" if sys.stdout.isatty() else "", end="")
        print("emu2: interrupted; what was saved is in the checkpoint directory", file=sys.stderr)
        return 130


def _train(name_or_file: str, overrides: Sequence[str], nproc_per_node: int | None) -> int:
    from emu2_megatron.config import loading, validate

    config = loading.load(name_or_file, overrides)
    started = os.environ.get("WORLD_SIZE")  # by torchrun or SLURM; without it, launch starts the processes
    data_parallel_size = validate.validate(config, int(started) if started else nproc_per_node)
    validate.validate_files(config)
    if not started:
        nproc_per_node = validate.replica_size(config) * data_parallel_size

    from emu2_megatron.training import launch

    launch.train(config, nproc_per_node)
    return 0


def _plan(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.json is not None and "=" in options.json:  # `--json KEY=VALUE`: no file was given
        overrides, options.json = [options.json, *overrides], "-"
    from emu2_megatron.training import plan_command

    return plan_command.run(
        options.config, overrides, options.gpus, options.gpu, options.images_per_sequence,
        top=options.top, json_file=options.json, html_file=options.html, check=options.check,
        precomputed=options.precomputed_features,
    )  # fmt: skip


def _with_files(name_or_file: str, overrides: Sequence[str], command: str) -> Config:
    """A configuration that can run, whose data is on this machine."""
    from emu2_megatron.config import loading, validate

    config = loading.load(name_or_file, overrides)
    validate.require_language(config, command)
    validate.validate(config, None)
    validate.validate_files(config)
    return config


def _embed(name_or_file: str, overrides: Sequence[str], output: str) -> int:
    config = _with_files(name_or_file, overrides, "emu2 embed")

    from emu2_megatron.training.embed import embed

    for what, count in embed(config, Path(output)).items():
        if count:
            print(f"{what}: {count}")
    print(f"train on them with data.shards='[{output}/**/*.tar]'")
    return 0


def _inspect(name_or_file: str, overrides: Sequence[str], rows: int, output: str) -> int:
    config = _with_files(name_or_file, overrides, "emu2 data inspect")

    from emu2_megatron.data.inspect import inspect

    warning = inspect(config, rows, Path(output))
    print(f"wrote {output}")
    if warning:
        print(f"emu2: {warning}", file=sys.stderr)
    return 0


def _doctor() -> int:
    from emu2_megatron.platform import doctor

    return doctor.print_report(doctor.report())


def _prefix(error: Emu2Error) -> str:
    """Who speaks, empty for a rank that stays silent.

    All ranks get the same ConfigError from the same configuration, so one process of each node says it (files may be
    missing on one node alone). What all ranks have agreed on, one says. Any other error may be a single rank's own, and
    is never swallowed.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return "emu2"
    if isinstance(error, (Stopped, TrainingDiverged)):
        return ""
    if isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK") != "0":
        return ""
    return f"emu2, rank {rank}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="emu2", description=emu2_megatron.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"emu2 {emu2_megatron.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    train = commands.add_parser(
        "train",
        help="train a model",
        usage="emu2 train --config NAME_OR_FILE [KEY=VALUE ...] [--resume auto|FOLDER] [--nproc-per-node N]",
        description="Train a model. KEY=VALUE overrides one field of the configuration; all of them are listed below.",
        allow_abbrev=False,
    )
    train.set_defaults(shows_fields=True)
    train.add_argument("--config", required=True, metavar="NAME_OR_FILE", help="recipe of the package, or a YAML file")
    train.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="processes to start on this machine; default: as many as the layout needs; not used under torchrun",
    )
    train.add_argument(
        "--resume",
        metavar="auto|FOLDER",
        help="go on from the latest checkpoint of the run, if there is one (auto), or from this one",
    )
    plan = commands.add_parser(
        "plan",
        help="rank layouts by estimated step time and memory, without a GPU",
        usage="emu2 plan --config NAME_OR_FILE --gpus N [--gpu NAME] [KEY=VALUE ...]",
        description="Rank the legal layouts of a configuration on so many GPUs by estimated step time, those that fit "
        "their memory. Needs neither GPU nor data. The layout, micro-batch size and recompute are searched; KEY=VALUE "
        "fixes a field (`emu2 train --help` lists them).",
        allow_abbrev=False,
    )
    plan.add_argument("--config", required=True, metavar="NAME_OR_FILE", help="recipe of the package, or a YAML file")
    plan.add_argument("--gpus", required=True, type=int, metavar="N", help="how many GPUs")
    plan.add_argument("--gpu", default="h100-80g", metavar="NAME", help=f"{', '.join(GPUS)} (default %(default)s)")
    plan.add_argument(
        "--images-per-sequence",
        type=float,
        metavar="I",
        help="pictures of a sequence on average; default: as many as fill half of its tokens",
    )
    plan.add_argument(
        "--precomputed-features",
        action="store_true",
        help="pictures come as features that `emu2 embed` made: nothing is encoded",
    )
    plan.add_argument("--top", type=int, default=10, metavar="N", help="layouts to show (default %(default)s)")
    plan.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON, to standard output without FILE"
    )
    plan.add_argument(
        "--check",
        action="store_true",
        help="build the first layout's ranks, one of each kind, on the meta device in a fake world of as many ranks, "
        "and compare their parameters and optimizer state with the estimate",
    )
    plan.add_argument("--html", metavar="FILE", help="write a page with timelines and memory bars")
    embed = commands.add_parser(
        "embed",
        help="compute the visual embeddings of a frozen encoder once, for training on them",
        usage="emu2 embed --config NAME_OR_FILE --output DIR [KEY=VALUE ...]",
        description="Write data.shards again with visual embeddings in the place of pictures. Training with the same "
        "configuration finds them by itself and does not run the encoder. A shard that DIR has already is left alone. "
        "Under torchrun, every process takes its share of the shards.",
        allow_abbrev=False,
    )
    embed.add_argument("--config", required=True, metavar="NAME_OR_FILE", help="the configuration to be trained with")
    embed.add_argument("--output", required=True, metavar="DIR", help="folder of the new shards")
    from emu2_megatron.data import make_shards

    shards = commands.add_parser(
        "shards",
        help="make tar shards of folders, JSONL and Parquet files, or check them",
        description="Make the tar shards that training reads. docs/data-format.md says what the input looks like.",
        allow_abbrev=False,
    )
    make_shards.add_arguments(shards)
    from emu2_megatron.convert import command

    convert = commands.add_parser("convert", help="weights from and to Hugging Face folders", allow_abbrev=False)
    directions = convert.add_subparsers(dest="direction", required=True, metavar="DIRECTION", parser_class=_Parser)
    command.add_to_hf_arguments(
        directions.add_parser(
            "to-hf",
            help="a checkpoint to a folder that transformers loads",
            description="Write a Hugging Face folder of a checkpoint of any layout. Needs no GPU and little memory; "
            "goes on where it was interrupted. docs/conversion.md says what is written.",
            allow_abbrev=False,
        )
    )
    command.add_to_diffusers_arguments(
        directions.add_parser(
            "to-diffusers",
            help="a checkpoint and a visual decoder to a folder that diffusers loads",
            description="Write Emu2-Gen's folder, with which diffusers paints what text and pictures ask for, of a "
            "checkpoint of any layout and a visual decoder. Needs no GPU, and memory for UNet and VAE; goes on where "
            "it was interrupted. docs/conversion.md says what is written.",
            allow_abbrev=False,
        )
    )
    command.add_from_hf_arguments(
        directions.add_parser(
            "from-hf",
            help="released weights, or LLaMA and EVA-CLIP, to a checkpoint",
            description="Write a checkpoint, which loads into any layout, of released weights of Emu2, or of the LLaMA "
            "and EVA-CLIP that it started from. Needs no GPU and little memory; goes on where it was interrupted.",
            allow_abbrev=False,
        )
    )
    from emu2_megatron.inference import command as generate

    generate.add_arguments(
        commands.add_parser(
            "generate",
            help="continue text, pictures and videos with text or with a picture",
            usage="emu2 generate (--checkpoint DIR | --model DIR) (PART ... | --prompts FILE)\n"
            "                     [--image-out PNG --decoder DIR] [options]\n"
            "       emu2 generate --embeddings FILE --image-out PNG --decoder DIR [options]",
            description="Let a model continue a prompt of text, pictures and videos: describe, answer, chat, point at "
            "things, or paint. docs/inference.md has examples.",
            allow_abbrev=False,
        )
    )
    from emu2_megatron.inference import serve_command

    serve_command.add_arguments(
        commands.add_parser(
            "serve",
            help="a local web page to chat with pictures",
            usage="emu2 serve (--checkpoint DIR | --model DIR) [--host ADDRESS] [--port N] [options]",
            description="Serve a web page on this machine to talk with a model about pictures: conversations with a "
            "chat model, captions and continuations with any. Needs the extra `serve` (FastAPI and uvicorn).",
            allow_abbrev=False,
        )
    )
    data = commands.add_parser("data", help="look at the data as the model will see it", allow_abbrev=False)
    looks = data.add_subparsers(dest="look", required=True, metavar="LOOK", parser_class=_Parser)
    inspect = looks.add_parser(
        "inspect",
        help="a page with the first packed sequences: pictures, tokens, what is learnt",
        usage="emu2 data inspect --config NAME_OR_FILE [--rows N] [--output FILE] [KEY=VALUE ...]",
        description="Write one HTML page, which needs no network, with the first packed sequences of a configuration: "
        "their samples and pictures, every token and what it is to the model, and counts.",
        allow_abbrev=False,
    )
    inspect.add_argument(
        "--config", required=True, metavar="NAME_OR_FILE", help="recipe of the package, or a YAML file"
    )
    inspect.add_argument("--rows", type=int, default=4, metavar="N", help="sequences to show (default %(default)s)")
    inspect.add_argument("--output", default="inspect.html", metavar="FILE", help="the page (default %(default)s)")
    commands.add_parser("doctor", help="show what this machine has and what is missing")
    return parser


class _Parser(argparse.ArgumentParser):
    """Puts the recipes and the documentation of every field below the options of `train --help`, and only there."""

    def format_help(self) -> str:
        from emu2_megatron.config import describe

        return super().format_help() + (f"\n{describe.help_text()}\n" if self.get_default("shows_fields") else "")


if __name__ == "__main__":
    sys.exit(main())
