#!/bin/bash
# sbatch docs/jobs/slurm.sh   One task a node, which drives all GPUs of the node. longcat finds the
# coordinator and its place in srun's variables; --nodes=1 needs no other change.
#SBATCH --job-name=longcat
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time limit all tasks get SIGTERM: they save and end with status 75.
#SBATCH --signal=TERM@120

srun --kill-on-bad-exit=1 longcat train \
    --config=configs/flash_560b.py \
    --config.mesh.fsdp=4 --config.mesh.expert=8 \
    --workdir=/shared/runs/flash
status=$?

# The supervisor: back into the queue until the last step is done. SLURM itself requeues the job
# when a node fails. Status 2 is a command line that cannot be read; a failure within a minute, by
# anything but SIGTERM (75), would most likely be the same again.
if [ "$status" -ne 0 ] && [ "$status" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ] &&
    { [ "$status" -eq 75 ] || [ "$SECONDS" -ge 60 ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
