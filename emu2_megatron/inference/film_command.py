"""`emu2 generate --video-out`: a video painted again, from the embeddings of its frames.

The language model regresses no videos; what is painted are the encoder's embeddings of some frames, evenly spread.
"""

import argparse
from pathlib import Path

from emu2_megatron.errors import ConfigError, DataError
from emu2_megatron.inference import model_options


def run(options: argparse.Namespace) -> int:
    """`emu2 generate`, if a video is the answer."""
    from emu2_megatron.inference.prompt import encode, is_video

    file, wanted = options.video_out, options.prompt
    rules = (
        (options.image is None and options.image_out is None, "give either --image, --image-out or --video-out"),
        (len(wanted) == 1 and not options.prompts and is_video(Path(wanted[0])),
         "--video-out paints a video again: the prompt is one video and nothing else"),
        (options.decoder is not None, "--decoder: give a checkpoint of a run that trained a video decoder"),
        (options.tensor_parallel_size * options.pipeline_parallel_size == 1,
         "--video-out needs the encoder alone, in one process: there is nothing to cut"),
        (file.suffix in (".mp4", ".gif"), f"--video-out: {file}; legal: a file that ends with .mp4 or .gif"),
        (1 <= options.steps <= 1000, f"--steps: {options.steps}; legal: 1 to 1000"),
    )  # fmt: skip
    for holds, problem in rules:
        if not holds:
            raise ConfigError(problem)
    found, tokenizer = model_options.find(options)

    from emu2_megatron.inference.load import find_film_decoder
    from emu2_megatron.model import film
    from emu2_megatron.model.video_loss import training_scheduler
    from emu2_megatron.model.visual_decoder import null_embeddings
    from emu2_megatron.parallel import topology

    width = found.config.model.encoder.hidden_size
    decoder = find_film_decoder(options.decoder, width, options.precision)
    prompt = encode([Path(wanted[0])], tokenizer, found.config.model, decoder.config.frames)
    count, queries = len(prompt.pictures), found.config.model.frame_queries
    if count < decoder.config.frames:
        raise DataError(f"{wanted[0]} has {count} frames, the decoder paints {decoder.config.frames}")
    model = found.load()
    try:
        embeddings_BTQE = model.encode(prompt.pictures, prompt.queries).view(1, count, queries, width)
        assert model.encoder is not None
        null_QE = null_embeddings(decoder.config, model.encoder, queries)
    finally:
        topology.stop()
        del model
    network, vae = decoder.load()
    side = decoder.config.image_size
    (film_THW3,) = film.render(
        network, vae, training_scheduler(decoder.config), embeddings_BTQE, null_QE, [options.seed],
        options.size or (side, side), options.steps, options.guidance,
    )  # fmt: skip
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        film.write(file, film_THW3, decoder.config.frames)
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}") from error
    print(f"wrote {file}: {count} frames of {wanted[0]}, a second long")
    return 0
