#!/usr/bin/env bash
# Start and stop the service: the trained model at work, see README.md.
#
#   app/run.sh start [options]       start it and wait until it is ready; options: app/server.py --help
#   app/run.sh stop                  answer what was accepted, then end
#   app/run.sh restart [options]     both; without options with those of the last start
#   app/run.sh status                exit status 0 ready, 4 loading, 1 dead, 3 stopped
#   app/run.sh logs [-f]             the end of its log
#   app/run.sh foreground [options]  serve in place of this script, for systemd and Docker
#
# Paths are looked for here and in the project's folder. APP_PYTHON: an interpreter to use instead of .venv's.
# START_SECONDS (600), STOP_SECONDS (60): how long to wait.
set -euo pipefail

HERE=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
STATE=outputs/service
ACTION=${1:-help}
shift || true

ARGS=() MORE=() # MORE: those beside --state_dir
for word in "$@"; do # a path that is there only as seen from where the user stands
    if [[ $word != -* && $word == */* && ! -e $word && -e $HERE/$word ]]; then word=$HERE/$word; fi
    ARGS+=("$word")
done
for ((i = 0; i < ${#ARGS[@]}; i++)); do
    case ${ARGS[i]} in
        --state_dir) STATE=${ARGS[++i]:?--state_dir needs a folder} ;;
        --state_dir=*) STATE=${ARGS[i]#*=} ;;
        *) MORE+=("${ARGS[i]}") ;;
    esac
done

say() { printf '%s\n' "$*"; }
fail() { say "$1" >&2; exit "${2:-1}"; }

# When a process started; nothing for one that is gone, or dead and not yet buried. A pid is used again, this is not.
started() {
    local stat
    if [[ -r /proc/self/stat ]]; then
        { read -r stat < "/proc/$1/stat"; } 2> /dev/null || return 1
        read -ra stat <<< "${stat##*) }"
        [[ ${stat[0]} != [ZX] ]] && say "${stat[19]}"
    else
        ps -o lstart= -p "$1"
    fi
}

# The pid of the service that runs; nothing where none does.
running() {
    local pid began
    { read -r pid began < "$STATE/service.pid"; } 2> /dev/null || return 1
    [[ $pid =~ ^[0-9]+$ && $(started "$pid") == "$began" ]] && say "$pid"
}

lock() {
    mkdir -p "$STATE"
    exec 9> "$STATE/lock"
    flock -w "${START_SECONDS:-600}" 9
}

state() { cat "$STATE/ready" 2> /dev/null || say loading; }

interpreter() {
    if [[ -n ${APP_PYTHON:-} ]]; then
        PYTHON=$APP_PYTHON
    else
        PYTHON=.venv/bin/python
        make --no-print-directory --silent .venv/.installed-app
    fi
}

start() {
    lock # until the process is there: a second start then finds it
    local pid size
    if pid=$(running); then fail "it runs already, process $pid: $(state). New options: app/run.sh restart OPTIONS"; fi
    if [[ -s $STATE/service.pid ]]; then say "the process of an earlier start is gone without having been stopped"; fi
    interpreter
    rm -rf "$STATE/ready" "$STATE"/photos-* # those of requests that a killed service had
    printf '%s\0' app/server.py "${ARGS[@]}" > "$STATE/command"
    touch "$STATE/service.log"
    size=$(wc -c < "$STATE/service.log")
    if ((size > 20000000)); then mv "$STATE/service.log" "$STATE/service.log.1" && size=0; fi
    setsid "$PYTHON" app/server.py "${ARGS[@]}" >> "$STATE/service.log" 2>&1 < /dev/null 9>&- &
    pid=$!
    say "$pid $(started "$pid")" > "$STATE/service.pid"
    flock -u 9
    for ((i = 0; i < 10 * ${START_SECONDS:-600}; i++)); do
        if [[ $(running) != "$pid" ]]; then
            wait "$pid" || true
            tail -c +$((size + 1)) "$STATE/service.log" | tail -n 20 >&2
            rm -f "$STATE/service.pid"
            fail "it did not start: see above, and $STATE/service.log"
        fi
        case $(state) in
            ready* | degraded*) say "$(state), process $pid"; return 0 ;;
        esac
        sleep 0.1
    done
    fail "it is loading still, process $pid: app/run.sh status, app/run.sh logs" 4
}

stop() {
    local pid
    lock
    if ! pid=$(running); then
        rm -f "$STATE/service.pid" "$STATE/ready"
        say "it does not run"
        return 0
    fi
    kill -TERM "$pid"
    for ((i = 0; i < 10 * ${STOP_SECONDS:-60}; i++)); do
        if [[ $(running) != "$pid" ]]; then break; fi
        sleep 0.1
    done
    if [[ $(running) == "$pid" ]]; then
        kill -KILL -- "-$pid"
        for ((i = 0; i < 50; i++)); do [[ $(running) == "$pid" ]] && sleep 0.1 || break; done
        say "it did not end in ${STOP_SECONDS:-60} s and was killed"
    fi
    rm -f "$STATE/service.pid" "$STATE/ready"
    flock -u 9
    say "stopped"
}

case $ACTION in
    start) start ;;
    stop) stop ;;
    restart)
        if ((${#MORE[@]} == 0)) && [[ -s $STATE/command ]]; then mapfile -d '' -s 1 ARGS < "$STATE/command"; fi
        stop
        start
        ;;
    status)
        if pid=$(running); then
            say "$(state), process $pid"
            [[ $(state) == ready* || $(state) == degraded* ]] || exit 4
        elif [[ -s $STATE/service.pid ]]; then
            fail "dead: its process is gone without having been stopped, see $STATE/service.log" 1
        else
            fail "stopped" 3
        fi
        ;;
    logs) exec tail -n 100 "${MORE[@]}" "$STATE/service.log" ;;
    foreground)
        interpreter
        exec "$PYTHON" app/server.py "${ARGS[@]}"
        ;;
    *) # the text at the head of this file
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' app/run.sh
        [[ $ACTION == help ]] || exit 2
        ;;
esac
