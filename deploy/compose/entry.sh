#!/bin/sh
# What compose.yaml starts in each container: `headrace ROLE ...` under the container's own name, which it keeps over
# restarts. Exit code 78 (a configuration with which no start can succeed) becomes 0: Docker knows no exit code that
# `restart: on-failure` leaves alone but that one, and a start that cannot succeed is not to be repeated for ever.
export HEADRACE_NAME="${HEADRACE_NAME:-$(hostname)}"
headrace "$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # a signal has ended the wait, not the process
  wait "$child"
  code=$?
done
if [ "$code" -eq 78 ]; then
  echo "headrace $1 cannot start as it is configured (see above); it is not started again" >&2
  exit 0
fi
exit "$code"
