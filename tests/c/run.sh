#!/usr/bin/env bash
# Builds the core without Python, and the C tests, with gcc alone; runs them.
#
#     tests/c/run.sh [plain|asan|tsan] [TEST...]
#
# TEST is pages, blocks, nodes, graphs, colls, holders, threads, death, bytes or oracle (default: all; with tsan not oracle, which
# has one thread). SH_TEST_SCALE=X makes the long ones X times as long, SH_TEST_SEED=N starts them
# elsewhere. The last line is "N passed, M failed".

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

mode="${1:-plain}"
shift || true
tests=("$@")
if ((!${#tests[@]})); then
    tests=(pages blocks nodes graphs colls holders threads death bytes)
    [[ $mode == tsan ]] || tests+=(oracle)
fi

flags=(-std=gnu11 -D_GNU_SOURCE -DSH_DEBUG -DSH_CRASH_POINTS -g -O1 -Wall -Wextra -Wvla
    -fno-omit-frame-pointer -pthread -Ishmheap/csrc)
case "$mode" in
plain) ;;
asan) flags+=(-fsanitize=address,undefined -fno-sanitize-recover=all) ;;
tsan) flags+=(-fsanitize=thread -fno-sanitize-recover=all) ;;
*)
    echo "usage: tests/c/run.sh [plain|asan|tsan] [pages|blocks|nodes|graphs|colls|holders|threads|death|bytes|oracle ...]" >&2
    exit 2
    ;;
esac
export ASAN_OPTIONS="detect_leaks=1:${ASAN_OPTIONS:-}"
export TSAN_OPTIONS="halt_on_error=1:second_deadlock_stack=1:${TSAN_OPTIONS:-}"
export SH_TEST_MODE="$mode"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

compile() { # SOURCE...: an object of each, two at a time
    printf '%s\n' "$@" | xargs -P "$(nproc)" -I{} sh -c '
        source=$1; shift
        exec "${CC:-gcc}" "$@" -c "$source" -o "'"$work"'/$(basename "$source" .c).o"
    ' compile {} "${flags[@]}"
}

core=(shmheap/csrc/*.c) # all but what knows Python
tests=("${tests[@]/#/test_}")
compile "${core[@]}" tests/c/support.c tests/c/hammer.c tests/c/oracle*.c $(printf 'tests/c/%s.c\n' "${tests[@]}")

overheard=(sh_pspan_pop sh_span_freed sh_pages_commit sh_pages_give sh_defer) # by test_oracle

passed=0 failed=0
for test in "${tests[@]}"; do
    wraps=() rooms=()
    if [[ $test == test_oracle ]]; then
        wraps=("${overheard[@]/#/-Wl,--wrap=}")
        rooms=("$work"/oracle*.o)
    fi
    "${CC:-gcc}" "${flags[@]}" "${wraps[@]}" -o "$work/$test" "$work/$test.o" "${rooms[@]}" "$work/support.o" "$work/hammer.o" \
        $(printf "$work/%s.o\n" $(basename -s .c "${core[@]}"))
    began=$SECONDS
    "$work/$test" | tee "$work/out" || true
    passed=$((passed + $(grep -c '^ok ' "$work/out" || true)))
    failed=$((failed + $(grep -c '^FAILED ' "$work/out" || true)))
    if ! grep -q '^end of ' "$work/out"; then # it did not come to its end
        echo "FAILED $test"
        failed=$((failed + 1))
    fi
    printf -- '-- %s (%s): %d s\n' "$test" "$mode" $((SECONDS - began))
done
printf '%d passed, %d failed\n' "$passed" "$failed"
((failed == 0))
