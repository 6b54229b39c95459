#!/usr/bin/env bash
# Trains a tiny visual decoder on the photos of examples/data: it learns to paint a photo from the embeddings that a tiny
# encoder makes of it. First a VAE, in place of SDXL's. About 13 minutes on two cores; runs/visual_decoder_tiny then has
# pictures.png, with originals and what is painted of them.
# Arguments are passed on to the second training: `bash examples/visual_decoder_tiny.sh training.steps=500`.
set -euo pipefail
cd "$(dirname "$0")/.."

run=runs/visual_decoder_tiny
rm -rf $run
python tools/make_shards.py --input examples/data --output $run/shards
python examples/tiny_vae.py --output $run/start
emu2 train --config visual_decoder_tiny visual_decoder.sdxl=$run/start "$@"

python - <<'PYTHON'
import json, sys

*_, last = (record for record in map(json.loads, open("runs/visual_decoder_tiny/log.jsonl")) if "painted_psnr" in record)
gain = last["painted_psnr"] - last["shuffled_psnr"]
print(f"painted from their own embeddings, photos are {gain:.1f} dB closer than from those of others (wanted: 5 or more)")
sys.exit(not gain >= 5)
PYTHON
