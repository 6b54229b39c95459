#!/usr/bin/env bash
# Trains a tiny video decoder on the three films of examples/data: it learns to paint four frames of a film from the
# embeddings that a tiny encoder makes of them. First a VAE, in place of Stable Diffusion's. About five minutes on two cores.
# runs/video_decoder_tiny then has clip.mp4, a film and what is painted of it side by side, and pictures.png.
# Arguments are passed on to the second training: `bash examples/video_decoder_tiny.sh training.steps=100`.
set -euo pipefail
cd "$(dirname "$0")/.."

run=runs/video_decoder_tiny
rm -rf $run
python tools/make_shards.py --input examples/data --output $run/shards
python examples/tiny_vae.py --config video_decoder_tiny --output $run/start --steps 200
emu2 train --config video_decoder_tiny video_decoder.sd21=$run/start "$@"
