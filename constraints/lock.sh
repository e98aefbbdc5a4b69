#!/bin/sh
# Resolves the environments again, each in a throwaway venv, and rewrites the lock files.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
lock() { # NAME EXTRAS WORDS
    python3 -m venv "$work/$1"
    [ "$1" = agent ] || "$work/$1/bin/python" -m pip install --quiet torch==2.13.0
    "$work/$1/bin/python" -m pip install --quiet ".[$2]"
    {
        echo "# Lock of the $3 environment (extras $2): Python 3.11. Renew with: make lock"
        # Plain versions only: no editable path, no local build tag such as +cpu.
        "$work/$1/bin/python" -m pip freeze --exclude phi3-promptflow | sed 's/+cpu$//'
    } > "constraints/$1.txt"
}
lock local flow,local,dev laptop
lock azure flow,local,azure,rehearsal,dev whole
lock agent agent-ui,agent-rag,agent-flows agent
# What of the second an Azure ML job gets.
"$work/azure/bin/python" constraints/trainer.py
