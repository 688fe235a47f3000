#!/usr/bin/env bash
# The GPU benchmarks one after another, each with a time limit, on a machine with the environment active.
#
#   benchmarks/gpu.sh OUT [PART ...]      full1 full8 lora sweep devices serving replicas merge pinning startup (default: all)
#
# Logs and JSON go to the folder OUT. What a benchmark leaves running is ended before the next one begins: its processes
# are known by a variable in their environment, so that nobody else's are touched. GPUS=0,1 says which cards are used;
# parts for several (full8, devices, replicas) are passed over where there is one. BASES is where random models are kept.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:?usage: benchmarks/gpu.sh OUT [PART ...]}; shift
mkdir -p "$out"; out=$(cd "$out" && pwd)
command -v nvidia-smi >/dev/null || { echo "these need an NVIDIA GPU: there is no nvidia-smi" >&2; exit 2; }
bases=${BASES:-/tmp/ft-ray-bases}
gpus=${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}
count=$(tr ',' '\n' <<<"$gpus" | grep -c .)
export CUDA_VISIBLE_DEVICES=$gpus PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 # multicast over NVLink cannot be set up on every host
export FT_RAY_BENCHMARK_RUN=$$-$RANDOM # not in this shell's own /proc/PID/environ, which is what it was started with

end_what_is_left() { # killed, and waited for until the cards' memory is free
  local round entry pid
  for round in 1 2 3; do
    for entry in /proc/[0-9]*; do
      pid=${entry#/proc/}
      tr '\0' '\n' 2>/dev/null <"$entry/environ" | grep -q "^FT_RAY_BENCHMARK_RUN=$FT_RAY_BENCHMARK_RUN\$" || continue
      kill -9 "$pid" 2>/dev/null
    done
    sleep 0.5
  done
  for round in {1..20}; do
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i "$gpus" | awk '{s += $1} END {exit s > 3000}' && return
    sleep 1
  done
}

job() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS code=0; shift 2
  echo "== $name: $*"
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  end_what_is_left
  echo "== $name ended with $code after $((SECONDS - began)) s; its log's end:"
  grep -vE 'it/s\]|Warning' "$out/$name.log" | tail -n 25 | cut -c1-400
}

base() { # SHAPE: prints its folder, made where it is not there
  timeout -k 10 300 python benchmarks/random_base.py "$1" "$bases/$1" --device cuda >"$out/base-$1.log" 2>&1 && echo "$bases/$1"
}

(($#)) || set -- full1 full8 lora sweep devices serving replicas merge pinning startup
for part in "$@"; do
  case $part in full8 | devices | replicas) ((count > 1)) || { echo "== $part: passed over, it takes two GPUs"; continue; } ;; esac
  case $part in
    full1) # three rounds with the order turned round, since hosts differ by a third within minutes
      model=$(base 1B)
      for round in 1 2 3; do
        sides=(ft-ray trl whole loop auto fsdp2); ((round == 2)) && sides=(fsdp2 auto loop whole trl ft-ray)
        for side in "${sides[@]}"; do
          job "full1-$side-$round" 110 python benchmarks/train.py --device cuda --shape 1B --model "$model" --workers 1 \
            --only "$side" --rows 4 --global-rows 4 --steps 24 --work "$out/work" --json "$out/full1-$round.json" --limit 100
        done
      done ;;
    full8)
      job full8 560 python benchmarks/train.py --device cuda --shape 8B --model "$(base 8B)" --workers "1,$count" --each 4 \
        --steps 26 --work "$out/work" --json "$out/full8.json" --limit 150
      job full8-faults 900 python benchmarks/train.py --device cuda --shape 8B --model "$(base 8B)" --workers "1,$count" \
        --each 4 --steps 26 --every 48 --saves --faults --only "ft-ray:$count,resume:$((count / 2))" --work "$out/work" \
        --json "$out/full8-faults.json" --limit 440
      rm -rf "$out/work" ;;
    lora)
      for method in qlora lora; do
        job "$method" 560 python benchmarks/train_lora.py --device cuda --method "$method" --json "$out/$method.json"
      done ;;
    sweep) job sweep 590 python benchmarks/sweep.py --device cuda --quick --json "$out/sweep.json" ;;
    devices)
      job devices 590 python benchmarks/sweep_devices.py --device cuda --devices "$count" --shape 1B --model "$(base 1B)" \
        --json "$out/devices.json" --limit 290 ;;
    serving)
      job serving 590 python benchmarks/serving.py --device cuda --quick --passes 2 --mode direct --gpus "${gpus%%,*},${gpus%%,*}" \
        --json "$out/serving.json" ;;
    replicas)
      job replicas 590 python benchmarks/serving_replicas.py --device cuda --quick --replicas "$count" --model "$(base 1B)" \
        --json "$out/replicas.json" --patience 300 --limit 560 ;;
    merge) job merge 400 python benchmarks/merge.py --device cuda --base "$(base 8B)" --parts copy,merge --json "$out/merge.json" ;;
    pinning) job pinning 200 python benchmarks/pinning.py --json "$out/pinning.json" ;;
    startup) job startup 300 python benchmarks/startup.py --device cuda --json "$out/startup.json" ;;
    *) echo "no part $part" >&2; exit 2 ;;
  esac
done
ls -l "$out"/*.json
