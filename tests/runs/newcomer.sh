#!/usr/bin/env bash
# What a newcomer does: the commands of README.md from top to bottom, in a fresh copy and a fresh environment, the wheel
# included, which `make wheel` tries away from the checkout. Needs Python 3.11, make, git and a package index.
#
#   tests/runs/newcomer.sh [--smoke] [DIR]
#
# --smoke: the reduced variant of every config (minutes, most of them downloads); otherwise as written (about half an hour).
# DIR: where all of it is made, new or empty; a temporary directory by default, which is removed.
set -euo pipefail

smoke=""
if [ "${1:-}" = --smoke ]; then smoke=1; shift; fi
root=$(cd "$(dirname "$0")/../.." && pwd)
if [ -n "${1:-}" ]; then
    mkdir -p "$1"; place=$(cd "$1" && pwd)
    if [ -n "$(ls -A "$place")" ]; then echo "error: $place is not empty" >&2; exit 2; fi
else
    place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
fi
unset PYTHONPATH VIRTUAL_ENV

say() { printf '\n== %s\n' "$*"; }

mkdir "$place/checkout"
git -C "$root" ls-files -z | (cd "$root" && tar --null --files-from=- --create) | tar --extract --directory "$place/checkout"
cat "$root"/docs/*.md > "$place/text.txt"

say "README.md, from top to bottom"
cd "$place/checkout"
export PATH="$place/checkout/.venv/bin:$PATH"
done_count=0
while IFS= read -r line <&3; do
    line=${line//FILE/$place/text.txt}
    if [ -n "$smoke" ]; then
        line=$(sed -E 's/--config=(quickstart|text_[a-z]+)( |$)/--config=\1:smoke\2/; s/^make quickstart/make quickstart CONFIG=quickstart:smoke/' <<< "$line")
        line=$(sed -E 's/\[(cuda1.|tpu)\]//' <<< "$line")
        case $line in
            "make test"* | "make bench"*) say "left out: $line"; continue ;;
        esac
    fi
    say "$line"
    bash -euo pipefail -c "$line" < /dev/null
    done_count=$((done_count + 1))
done 3< <(awk '/^```/ { on = !on && /^```sh/; next } on' README.md | sed -e :a -e '/\\$/N; s/\\\n//; ta' | sed -E 's/ +# .*//' | grep -v '^ *\(#\|$\)')

say "$done_count commands of README.md ran"
test "$done_count" -ge 7
ls dist/mdm_jax-*.whl
