#!/usr/bin/env bash
# SmolLM2-135M learns word problems: SFT, then the methods of the paper, GRPO and more SFT from there, on a CPU in hours.
#
#     pip install -r requirements.txt -r experiments/requirements.txt
#     bash experiments/smollm2.sh                  into runs/smollm2
#     SEEDS=0 ROWS=cl-egrsd bash experiments/smollm2.sh runs/small
#
# Run it in the root of the repository. The same command goes on after a stop: what is complete is left as it is, so take a new
# directory after a change of flags. --bf16 is faster on CPUs with AMX; on others set BF16=--no-bf16.
set -euo pipefail
work=${1:-runs/smollm2}
seeds=${SEEDS:-0 1}
rows=${ROWS:-cl-egrsd direction-aware continued-sft egrsd grpo}
python=${PYTHON:-python}

train() { # output directory, problems, base model, flags
    [ -e "$work/$1/model" ] || "$python" -m family --preset toy --eval-data "" --no-thinking --prompts-per-step 32 --micro-batch 8 \
        --checkpoint-every 4 --resume auto "${BF16:---bf16}" --out "$work/$1" --data "$work/problems/$2.jsonl" --model "$work/$3" "${@:4}"
}
evaluate() { # output directory of a run
    "$python" eval.py --model "$work/$1/model" --data "$work/problems/test.jsonl" --samples 1 \
        --top-p 1 --max-new-tokens 128 --no-thinking --resume auto --out "$work/$1/test"
}
sft=(--method sft --lr 1e-3 --lr-warmup-steps 4 --max-grad-norm 1)
read=(--model "$work/sft/model" --max-new-tokens 128 --slots 128)

# the model, the problems, and SFT on 1,600 draws of 1,000 solutions: the start of everything else
[ -e "$work/model" ] || "$python" -m experiments.smollm2 --out "$work/model"
[ -e "$work/problems/test.jsonl" ] || "$python" -m experiments.stories --out "$work/problems"
train sft sft model "${sft[@]}" --prompts-per-step 16 --steps 100

# what student and teacher do, token by token
[ -e "$work/diagnostics/diagnostics.json" ] || "$python" -m experiments.diagnostics "${read[@]}" --data "$work/problems/validation.jsonl" \
    --problems 200 --samples 1 --gamma 1 --teacher-samples 1 --branches 0 --out "$work/diagnostics"

# a learning rate for all policy gradients, on problems that nothing else trains on: compare `reward` in their
# metrics.jsonl. With us 5e-4 was better
for rate in 2e-4 5e-4; do
    train "rate-$rate" validation sft/model --method direction-aware --lr $rate --steps 8 --seed 100
done

# the runs
for seed in $seeds; do
    for row in $rows; do
        case $row in
            continued-sft) flags=("${sft[@]}" --prompts-per-step 16) ;;
            cl-egrsd) flags=(--method cl-egrsd --gamma 1 --window 3 --lr 5e-4) ;;
            egrsd) flags=(--method egrsd --gamma 1 --lr 5e-4) ;;
            *) flags=(--method "$row" --lr 5e-4) ;;
        esac
        train "$row-seed$seed" train sft/model "${flags[@]}" --steps 24 --seed "$seed"
    done
done

# which signal turns the gradient the right way
[ -s "$work/gradients.json" ] || "$python" -m experiments.gradients "${read[@]}" --data "$work/problems/train.jsonl" --batches 12 --batch 16 \
    --gamma 1 --window 0 3 --eps 0.2 0.8 --pass-tokens 2048 --out "$work/gradients.json"

# before and after, on problems that nothing else saw
evaluate sft
compared=("start=$work/sft")
for row in $rows; do
    for seed in $seeds; do
        evaluate "$row-seed$seed"
        compared+=("$row=$work/$row-seed$seed")
    done
done
for base in start $rows; do
    "$python" -m experiments.paired "${compared[@]}" --to "$base" --out "$work/to-$base"
done
