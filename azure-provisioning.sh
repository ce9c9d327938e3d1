#!/bin/sh
# The provisioning agent in one file; azure-provisioning.py is the same program in Python, function by function.
# Needs curl, or wget with head, timeout and tr. Sources: https://learn.microsoft.com/azure/virtual-machines/, the pages
# linux/no-agent for the protocol and instance-metadata-service for IMDS.
set -fu # -f: what a server sent is split into words below, not matched with file names; all variables are global
export LC_ALL=C
trap '' PIPE # the VM is Ready whether or not somebody listens
VERSION=0.1.0
USAGE='usage: azure-provisioning [-h | --help | --version] [STEP]...
  ready      tell Azure that this Linux VM is Ready: a health report to the WireServer, for the goal state it gives
  hostname   set the hostname the user asked for, from IMDS, the Instance Metadata Service
  disable    disable azure-provisioning.service, so that it runs on the first boot only
Without STEP: ready hostname disable. Steps run in the order given; the first that fails ends the run.
Progress goes to stdout, trouble to stderr. Exit status: 0 every step done, 1 a step failed, 2 usage.
Settings, from the environment, and their defaults:
  AZURE_PROVISIONING_WIRESERVER  base URL of the WireServer (http://168.63.129.16)
  AZURE_PROVISIONING_IMDS        base URL of IMDS (http://169.254.169.254)
  AZURE_PROVISIONING_ATTEMPTS    attempts a step makes before it gives up, from 1 (240)
  AZURE_PROVISIONING_INTERVAL    longest wait between two attempts, in seconds, from 0 (5)
  AZURE_PROVISIONING_TIMEOUT     time for one exchange, in seconds, from 1 (30)'
WIRESERVER=${AZURE_PROVISIONING_WIRESERVER-http://168.63.129.16}
IMDS=${AZURE_PROVISIONING_IMDS-http://169.254.169.254}
ATTEMPTS=${AZURE_PROVISIONING_ATTEMPTS-240}
INTERVAL=${AZURE_PROVISIONING_INTERVAL-5}
TIMEOUT=${AZURE_PROVISIONING_TIMEOUT-30}
BODY_LIMIT=65536 # bytes
SPACE=" $(printf '\t\n\r')" # XML's white space
ID='!#-%(-;=?-~' # what an id is made of: visible ASCII, but for < > & " and '

say() { { printf '%s\n' "$@" || :; } 2>/dev/null; }
complain() { say "$@" >&2; }
misused() { complain "azure-provisioning: $1" "$USAGE"; exit 2; }
run() { command -v "$1" >/dev/null && command "$@"; } # COMMAND [ARGUMENT]...: if there is such a command

check_url() { # NAME URL: http://HOST[:PORT][/PATH]
    rest=${2#http://}
    case $rest in "$2" | *[!A-Za-z0-9._~:/-]* | *//*) misused "bad $1" ;; esac
    case ${rest%%/*} in '' | :* | *: | *:*[!0-9]* | *:0* | *:??????*) misused "bad $1" ;; esac
}

check_number() { # NAME NUMBER LEAST: without leading zeros, of six digits at most
    case $2 in '' | *[!0-9]* | 0?* | ???????*) misused "bad $1" ;; esac
    [ "$2" -ge "$3" ] || misused "bad $1"
}

exchange() { # LABEL URL DATA [--header HEADER]...: POST the DATA, or GET without; sets $status and $body, or $reason
    label=$1 url=$2 data=$3
    shift 3
    transfer "$@" --header "User-Agent: azure-provisioning/$VERSION" --header 'Accept: */*' \
        --header 'Accept-Encoding: identity' --header 'Connection: close'
    case ${data:+POST}$status:$code in # status 000: none; code, of curl: 28 too slow, 63 too large
    200:0 | POST2??:0) return 0 ;;
    200:28 | POST2??:28 | *000:28) reason="$label: timed out" ;;
    200:63 | POST2??:63) reason="$label: reply too large" ;;
    200:* | POST2??:* | *000:[018] | *000:27) reason="$label: broken reply" ;;
    *000:127) reason="$label: no curl or wget" ;;
    *000:*) reason="$label: no connection" ;;
    *) reason="$label: HTTP $status" ;;
    esac
    return 1
}

transfer() { # [--header HEADER]...: sets $status, $body, and $code to curl's exit status, or the one that fits wget's
    if command -v curl >/dev/null; then
        [ -z "$data" ] || set -- "$@" --data-binary "$data"
        # Before curl 8.4, only --limit-rate bounds a body without a length: to 4 limits, and 4 KiB for each second.
        { reply=$(curl -q --silent --fail --noproxy '*' --proto =http --max-time "$TIMEOUT" \
            --limit-rate $((4 * BODY_LIMIT / TIMEOUT + 4096)) --max-filesize "$BODY_LIMIT" \
            --write-out ' %{http_code} %{size_download}' "$@" "$url"); } 2>/dev/null
        code=$? size=${reply##* }
    else
        [ -z "$data" ] || set -- "$@" --post-data "$data"
        case $(wget --help 2>&1) in *--max-redirect*) set -- --no-config --tries=1 --max-redirect=0 "$@" ;; esac # GNU's
        reply=$({
            said=$(timeout "$TIMEOUT" wget -q -S -Y off -O - "$@" "$url" 2>&1 >&3)
            code=$? status=000
            case $said in *'  HTTP/1.'?' '[1-9][0-9][0-9]*) status=${said#*  HTTP/1.? } ;; esac
            # timeout ends with 124 (coreutils) or 143 (BusyBox); wget indents what the server sent
            case $code:$said in 124:* | 143:*) code=28 ;; [!0]:*'  '*) code=8 ;; [!0]:*) code=7 ;; esac
            printf ' %.3s %s' "$status" "$code"
        } 3>&1 2>/dev/null | head -c $((BODY_LIMIT + 10)) | tr '\000' '\001')
        [ "${#reply}" -lt $((BODY_LIMIT + 10)) ] || reply="$reply 200 0" # cut there, and with it the end
        code=${reply##* }
        size=$((${#reply} - 5 - ${#code})) # without " STATUS CODE"
    fi
    reply=${reply% *}
    status=${reply##* }
    body=${reply% *}
    [ "${#body}" -eq "$size" ] || body='\0' # a NUL byte was dropped: put in what is neither goal state nor hostname
    [ "$size" -le "$BODY_LIMIT" ] || code=63
}

retry() { # STEP ATTEMPTS COMMAND [ARGUMENT]...: until COMMAND succeeds, or returns 2 for what will not change
    step=$1 attempts=$2 attempt=1
    shift 2
    until "$@"; do
        final=$?
        complain "$step: attempt $attempt of $attempts: $reason"
        case $final:$attempt in 2:* | *:"$attempts") reason="gave up after $attempt attempts" && return 1 ;; esac
        sleep $((attempt < INTERVAL ? attempt : INTERVAL))
        attempt=$((attempt + 1))
    done
}

trim() { # TEXT: sets $value to its words, with a space between: a value has one
    value='' IFS=$SPACE
    for word in $1; do
        [ -z "$word" ] || value=${value:+$value }$word
    done
}

parse() { # read the goal state in $body: sets $incarnation, $container and $instance, as far as they are in it
    unset incarnation container instance
    path='' root='' text='' inside='' IFS='<'
    case $body in *[$(printf '\001-\010\013\014\016-\037')]*) return 1 ;; esac # XML has no such characters
    # Between two '<' stand a tag and the text behind it, or a part of a comment or processing instruction. What is
    # before the first is put behind an instruction, ?x?>; the space keeps the shell from dropping a '<' at the end.
    case $body in ["$SPACE<"]*) ;; $(printf '\357\273\277')["$SPACE<"]*) body=${body#???} ;; esac # byte order mark
    case $body in '<?xml'["$SPACE"]*) body='<?x'${body#?????} ;; esac # the declaration, which stands nowhere else
    for piece in '?x?>'$body' '; do
        [ -n "$inside" ] || case $piece in
        '!--'*) inside='-->' piece=${piece#!--} ;;
        '!'* | '?'["$SPACE"?\>]* | '?'[Xx][Mm][Ll]["$SPACE"?]*) return 1 ;; # a DTD, CDATA; no name, or a reserved one
        '?'*) inside='?>' ;;
        *) tag || return 1 ;;
        esac
        [ -z "$inside" ] || case "$inside$piece " in
        '-->'"${piece%%--*}--"[!\>]*) return 1 ;;          # '--' in a comment
        "$path$inside"*"$inside"*[!"$SPACE"]*) return 1 ;; # text outside the root: $path is empty there
        "$inside"*"$inside"*) inside='' text='<' ;;        # '<' spoils a value with a comment inside
        esac
    done
    [ -z "$path$inside" ] && [ -n "$root" ]
}

tag() { # read the tag at the start of $piece, and the text behind it
    while head=${piece%%[\"\'\>]*} && rest=${piece#"$head"}; do # drop the attributes: one may hold a '>'
        case $rest in
        '>'*) break ;;
        \"*\"*) rest=${rest#?*\"} ;;
        \'*\'*) rest=${rest#?*\'} ;;
        *) return 1 ;;
        esac
        case $head in [!/]*["$SPACE"][!"$SPACE"=]*=*) piece="${head%%["$SPACE"]*} $rest" ;; *) return 1 ;; esac
    done
    name=${head#/}
    name=${name%%["$SPACE"/]*} rest=${rest#>}
    case $head in '' | / | ["$SPACE"]* | "/$name"*[!"$SPACE"]* | "$name"*/?* | "$name"*[!"$SPACE"/]*) return 1 ;; esac
    case $head in
    [!/]*) [ -n "$path" ] || [ "$root$name" = GoalState ] || return 1
        root=GoalState path=$path/$name text='' ;;
    esac
    case $head in
    /* | */)
        [ "${path##*/}" = "$name" ] || return 1
        case $path in
        /GoalState/Incarnation) trim "$text"; incarnation=${incarnation-$value} ;;
        /GoalState/Container/ContainerId) trim "$text"; container=${container-$value} ;;
        /GoalState/Container/RoleInstanceList/RoleInstance/InstanceId) trim "$text"; instance=${instance-$value} ;;
        esac
        path=${path%/*} text='<' ;; # '<' spoils a value with an element inside
    *) text=$rest ;;
    esac
    [ -n "$path" ] || case $rest in *[!"$SPACE"]*) return 1 ;; esac
}

goal_state() {
    exchange 'goal state' "${WIRESERVER%/}/machine?comp=goalstate" '' --header 'x-ms-version: 2012-11-30' \
        --header 'x-ms-agent-name: custom-provisioning' || return
    if parse; then reason=''; else reason='not a goal state'; fi
    case ${incarnation-} in '' | *[!0-9]*) reason=${reason:-no Incarnation} ;; esac
    case ${container-} in '' | *[!$ID]*) reason=${reason:-no ContainerId} ;; esac
    case ${instance-} in '' | *[!$ID]*) reason=${reason:-no InstanceId} ;; esac
    [ -z "$reason" ] || { reason="goal state: $reason" && return 1; }
    say "ContainerId: $container" "InstanceId: $instance" "Incarnation: $incarnation"
}

health_report() { # only for a goal state just read: the WireServer refuses an earlier incarnation
    goal_state || return
    report="<Health><GoalStateIncarnation>$incarnation</GoalStateIncarnation><Container>\
<ContainerId>$container</ContainerId><RoleInstanceList><Role><InstanceId>$instance</InstanceId>\
<Health><State>Ready</State></Health></Role></RoleInstanceList></Container></Health>"
    say 'Sending the following data to Wireserver:' "$report"
    exchange 'health report' "${WIRESERVER%/}/machine?comp=health" "$report" --header 'x-ms-version: 2012-11-30' \
        --header 'x-ms-agent-name: custom-provisioning' --header 'Content-Type: text/xml;charset=utf-8' || return
    say "Response: $status"
}

ready() {
    say 'Retrieving goal state from the Wireserver'
    retry ready "$ATTEMPTS" health_report
}

metadata() { # LEAF API_VERSION: ask IMDS; sets $value
    exchange "${1##*/}" "${IMDS%/}/metadata/instance/compute/$1?api-version=$2&format=text" '' \
        --header 'Metadata: true' || case $reason in
    *'HTTP 404' | *'HTTP 410' | *'HTTP 429' | *'HTTP 5'?? | *[!0-9]) return 1 ;; # the last: no status
    *) return 2 ;; # any other status
    esac
    trim "$body"
    reason="${1##*/}: no valid hostname"
    [ -n "$value" ]
}

hostname() {
    say 'Retrieving hostname from IMDS'
    retry hostname 5 metadata osProfile/computerName 2021-02-01 ||
        retry hostname "$ATTEMPTS" metadata name 2019-06-01 || return
    case $value in *.*) longest=64 ;; *) longest=63 ;; esac # Linux takes 64 in all, DNS 63 between two dots
    case $value in *[!A-Za-z0-9._-]* | [!A-Za-z0-9]* | *[!A-Za-z0-9] | *..*) longest=0 ;; esac
    [ "${#value}" -le "$longest" ] || { reason='no valid hostname' && return 1; }
    say "Hostname: $value"
    run hostnamectl set-hostname "$value" || set_hostname "$value"
}

set_hostname() { # NAME: without hostnamectl
    reason='cannot write /etc/hostname'
    { umask 022 && printf '%s\n' "$1" >/etc/hostname.new && mv -f /etc/hostname.new /etc/hostname; } 2>/dev/null ||
        { rm -f /etc/hostname.new; return 1; }
    reason="cannot set the kernel's hostname"
    { command hostname "$1" || printf '%s\n' "$1" >/proc/sys/kernel/hostname; } 2>/dev/null
}

disable() {
    reason='neither systemctl nor rc-update disabled azure-provisioning'
    run systemctl disable azure-provisioning.service || run rc-update del azure-provisioning || return
    say 'Disabled azure-provisioning.service'
}

main() { # [STEP]...
    for step; do
        case $step in
        ready | hostname | disable) ;;
        -h | --help) say "$USAGE" && exit ;;
        --version) say "azure-provisioning $VERSION" && exit ;;
        *) misused "unknown step or option: $step" ;;
        esac
    done
    [ $# -gt 0 ] || set -- ready hostname disable
    check_url AZURE_PROVISIONING_WIRESERVER "$WIRESERVER"
    check_url AZURE_PROVISIONING_IMDS "$IMDS"
    check_number AZURE_PROVISIONING_ATTEMPTS "$ATTEMPTS" 1
    check_number AZURE_PROVISIONING_INTERVAL "$INTERVAL" 0
    check_number AZURE_PROVISIONING_TIMEOUT "$TIMEOUT" 1
    for step; do "$step" || { complain "$step: $reason"; exit 1; }; done
}

main "$@"
