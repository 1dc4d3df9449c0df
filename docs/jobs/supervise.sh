#!/bin/sh
# Runs a command again until it ends well: sh docs/jobs/supervise.sh longcat train --workdir=...
# On several machines each process has a supervisor of its own, with the same coordinator.
# SIGTERM or Ctrl-C is passed on, and ends the loop with the command. So do a command line that
# cannot be read, and three failures in a row within a minute of their start.
stopping=
child=
trap 'stopping=1; [ -n "$child" ] && kill -TERM "$child"' TERM INT
quick=0
while :; do
    started=$(date +%s)
    "$@" &
    child=$!
    wait "$child"
    status=$?
    # A trapped signal ends `wait` before the command has ended.
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        status=$?
    done
    [ "$status" -eq 0 ] && exit 0
    [ -n "$stopping" ] || [ "$status" -eq 2 ] && exit "$status"
    if [ $(($(date +%s) - started)) -lt 60 ]; then quick=$((quick + 1)); else quick=0; fi
    [ "$quick" -ge 3 ] && exit "$status"
    echo "supervise: status $status, starting again" >&2
    sleep 5
done
