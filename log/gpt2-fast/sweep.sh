#!/bin/sh
# The runs behind the preset gpt2-fast: how many tokens Muon needs where AdamW needs 614,400.
#   DATA=data/openstax sh log/gpt2-fast/sweep.sh      # 12 runs, two at a time, a core each; half an hour
# A network of 17.6 million parameters; the last line of each log is its validation loss at the end.
cd "$(dirname "$0")/../.." || exit 1
adamw="--optimizer adamw --max-steps 300 --warmup-steps 15"
muon="--optimizer muon --max-steps 120 --warmup-steps 6"
{
    for seed in 1 2 3; do echo "$adamw --learning-rate 1e-3 --seed $seed --run-name adamw_1e-3_$seed"; done
    for seed in 1 2 3; do echo "$muon --learning-rate 6e-3 --seed $seed --run-name muon_6e-3_$seed"; done
    for lr in 4e-3 8e-3 1.2e-2; do echo "$muon --learning-rate $lr --seed 1 --run-name muon_${lr}_1"; done
    for lr in 5e-4 2e-3 4e-3; do echo "$adamw --learning-rate $lr --seed 1 --run-name adamw_${lr}_1"; done
} | OMP_NUM_THREADS=1 xargs -P 2 -L 1 python train_gpt2.py demo --log-dir log/gpt2-fast \
    --dataset-path "${DATA:-data/openstax}" --n-layer 6 --batch-size 4 --total-batch-tokens 2048 \
    --dtype bfloat16 --val-every 1000 --val-tokens 131072 --sample-every 0 --checkpoint-every 0
