#!/usr/bin/env bash
# Train an omni model on the bundled corpora, from sharding to a spoken answer, with the commands of a
# real run. Finished steps are skipped, so a second call is quick. Arguments go to launch/train.py:
# `scripts/quickstart.sh --max-steps 20` only exercises the machinery.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export data=data/sample run=runs/quickstart

step() {
    printf '\n== %d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"
}

step "Shard the sample corpora and train the tokenizer"
python -m data_prep sample --out "$data" >/dev/null

step "Train all stages at nano size, each on the exports of its upstream stages"
# Two stages in parallel with one rank each finish sooner than in sequence on two ranks, which wait for each
# other. Sharding the optimizer state of a million parameters costs more time than it saves.
# Muon needs complete matrices, which ZeRO 0 has. Without a weight, one in thirty images would be an emoji.
python launch/pipeline.py --preset nano --data "$data" --run "$run" --parallel-stages 2 -- \
    --deepspeed_config configs/deepspeed/zero0.json \
    thinker.optim.name=muon thinker.optim.muon_lr=1e-2 thinker.training.max_steps=600 \
    thinker.training.validate_every=300 thinker.training.save_every=300 \
    audio_encoder.optim.name=muon audio_encoder.optim.muon_lr=7e-3 audio_encoder.optim.warmup_fraction=0.05 \
    vision_encoder.optim.name=muon vision_encoder.optim.lr=2e-3 vision_encoder.optim.muon_lr=5e-3 \
    'vision_encoder.data.mix.weights={image_caption: 3, image_emoji: 1}' vision_encoder.training.max_steps=800 \
    vision_encoder.training.validate_every=400 vision_encoder.training.save_every=400 \
    codec.optim.name=muon codec.optim.lr=4e-3 codec.optim.muon_lr=1e-2 \
    talker.optim.name=muon talker.optim.lr=2e-3 talker.optim.muon_lr=7e-3 \
    sft.optim.name=muon sft.optim.muon_lr=1e-2 "$@"

step "Results on held-out data, with trivial baselines"
# One process per stage, two at a time: starting ranks would take longer than the evaluation itself.
evaluate() {
    local log=$run/$1/evaluate.log
    [ "$run/$1/evaluation.json" -nt "$run/$1/export/export.json" ] && return
    python launch/evaluate.py --stage "$1" --run "$run" --data "$data" >"$log" 2>&1 && return
    tail -n 5 "$log" >&2
    echo "quickstart: the evaluation of stage $1 failed; see $log" >&2
    return 1
}
export -f evaluate
# Longest first.
printf '%s\n' sft talker codec audio_encoder vision_encoder thinker |
    xargs -P 2 -I '{}' bash -c 'evaluate {}'
python launch/summary.py --run "$run"

step "Answers to held-out questions"
python scripts/answer_held_out.py --data "$data" --run "$run"

step "Done"
cat <<TEXT
Curves, configs, generated texts, and audio clips of all stages:
    cd runs && mlflow ui --workers 1
Ask the model a question:
    python launch/generate.py --run $run --text "Say: hello" --speak hello.wav
Train the last stage again, on these exports:
    deepspeed launch/train.py --stage sft
(activate the environment first: . .venv/bin/activate; Ctrl-C stops the MLflow server)
TEXT
