#!/usr/bin/env bash
# From words to pictures, in small: a tiny Emu2 learns the captions and embeddings of the photos of examples/data, and what
# it regresses of each caption is painted by the decoder of examples/visual_decoder_tiny.sh, which has to have run before.
# About four minutes on two cores; runs/caption_to_picture/painted then has a picture of every caption.
set -euo pipefail
cd "$(dirname "$0")/.."

decoder=runs/visual_decoder_tiny
run=runs/caption_to_picture
if ! ls $decoder/checkpoints/step_* > /dev/null 2>&1; then
	echo "run examples/visual_decoder_tiny.sh first: it makes the decoder" >&2
	exit 1
fi
rm -rf $run
# The same encoder as the decoder's: that of the same preset and training.seed, frozen.
emu2 train --config tiny_interleaved data.shards="[$decoder/shards/images-*.tar]" model.image_queries=16 \
	data.sequence_length=64 training.steps=500 training.micro_batch_size=16 \
	parallel.tensor_parallel_size=1 parallel.pipeline_parallel_size=1 parallel.data_parallel_size=1 \
	logging.directory=$run "$@"

python - > $run/prompts.jsonl <<'PYTHON'
import json

for line in open("examples/data/images/captions.jsonl"):
    print(json.dumps({"content": [{"text": json.loads(line)["caption"]}]}))
PYTHON

checkpoint=$(ls -d $run/checkpoints/step_* | tail -n 1)
painter=$(ls -d $decoder/checkpoints/step_* | tail -n 1)
# No guidance: what a model of 44 photos makes of no caption is one of the photos, and no place to lead away from.
emu2 generate --checkpoint "$checkpoint" --decoder "$painter" --prompts $run/prompts.jsonl --image-out $run/painted \
	--guidance 1
python examples/rank_paintings.py --config $run/config.yaml --photos examples/data --paintings $run/painted
