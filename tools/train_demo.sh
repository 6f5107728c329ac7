#!/bin/sh
# Trains, generates and scores on the bundled documents. Called by `make train`: BIN RUN PROCESSES LIMIT.
# An interrupted training goes on at its last checkpoint when this is called again.
set -eu
bin=$1 run=$2 processes=$3 limit=$4

gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
    processes=$gpus config=ds_configs/zero2.json
    echo "== training on $gpus GPU(s)"
else
    config=ds_configs/cpu_zero2.json
    threads=$(($(getconf _NPROCESSORS_ONLN) / processes))
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
    echo "== training on the CPU with $processes processes of $OMP_NUM_THREADS thread(s)"
fi
port=$("$bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# Ctrl-C is for the ranks, which save and leave; the launcher above them only waits.
(trap '' INT; exec "$bin/deepspeed" --master_port "$port" --num_gpus "$processes" trainer/run.py \
    --ds_config "$config" --preset tiny --run_dir "$run") || exit $?

unset OMP_NUM_THREADS
echo "== generating for test documents"
"$bin/python" tools/generate.py "$run" --split test --limit "$limit" --trace --replace
echo "== scores on the test split, beside trivial baselines"
"$bin/python" tools/evaluate.py "$run/generations/test.jsonl"
"$bin/python" tools/report.py "$run"
cat <<END
== results in $run
   report.html                  all of it in one page: open it in a browser
   generations/test.jsonl       texts beside their references       generations/test.scores.md   the table above
   metrics.jsonl, tb/           losses, evaluations, speed          samples/                     texts while training
   model/                       weights, configuration, vocabulary  config/                      what ran
END
