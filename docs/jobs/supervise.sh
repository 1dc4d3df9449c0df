#!/bin/sh
# Runs a command again until it ends well: sh docs/jobs/supervise.sh longcat train --workdir=...
# On several machines each process has a supervisor of its own, with the same coordinator.
# SIGTERM or Ctrl-C is passed on, and ends the loop with the command. So do a command line that
# cannot be read, and three failures in a row within a minute of their start.
stopping=
child=
trap 'stopping=1; [ -n "$child" ] && kill -TERM "$child"' TERM INT

# Runs a command in the background, so that a signal reaches this shell at once.
run() {
    "$@" &
    child=$!
    # A signal before there was a child; one that is still this shell's copy would swallow it.
    [ -n "$stopping" ] && sleep 1 && kill -TERM "$child"
    wait "$child"
    result=$?
    # A trapped signal ends `wait` before the command has ended.
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        result=$?
    done
    child=
    return "$result"
}

quick=0
while :; do
    started=$(date +%s)
    run "$@"
    status=$?
    [ "$status" -eq 0 ] && exit 0
    [ -n "$stopping" ] || [ "$status" -eq 2 ] && exit "$status"
    if [ $(($(date +%s) - started)) -lt 60 ]; then quick=$((quick + 1)); else quick=0; fi
    [ "$quick" -ge 3 ] && exit "$status"
    echo "supervise: status $status, starting again" >&2
    [ -n "$stopping" ] || run sleep 5
    [ -n "$stopping" ] && exit "$status"
done
