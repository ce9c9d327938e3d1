#!/bin/sh
# azure-provisioning.sh: the provisioning agent in one file.
# azure-provisioning.py is the same program in Python, with the same sections and functions.
#
# Arguments, settings and exit statuses: see USAGE. Errors: a step that fails says so on stderr.
# Needs:
# - sleep and curl; or sleep, wget, timeout, head and tr
# - where hostnamectl fails: chmod, hostname, mkdir, mv, rm and sync
# - where there is a DVD drive: mkdir, mount, tr and umount
# - for the other steps: base64, cat, chown, cp, date, ls, mount, readlink, sed, tr and umount; for
#   publish, also grep and uname
# Sources: https://learn.microsoft.com/azure/virtual-machines/linux/no-agent for the WireServer,
# .../linux/provisioning for the DVD, .../instance-metadata-service for IMDS.
#
# How to read this file:
# - UPPERCASE variables are settings and constants.
# - A function uses its arguments, and the variables that its comment names with a $. "Its caller's
#   $x" is a local variable of the caller.
# - The comment says which variables it sets. A function that finds or makes one text sets $value,
#   which the next such function overwrites; but read_file sets $text, and find_line sets $line.
# - A function "can fail": it then sets $reason, for a line on stderr, and returns 1. `fail` does
#   both. If CHECK is false, the function that this line stands in ends there, and fails:
#       CHECK || fail 'the reason' || return
# - Other functions answer a question, or try something: they return 0 or 1, and set no $reason.
# - A text is split with a local IFS. No function that is called meanwhile depends on it: one that
#   splits a text has an IFS of its own.

# shellcheck disable=SC3043 # local: dash, BusyBox ash, Bash and mksh have it

VERSION=2.0.0

USAGE='usage: azure-provisioning [-n | --dry-run] [STEP]...
       azure-provisioning -h | --help | --version

Provision this Linux VM on Azure. The steps run in the order given; the default
is: ready hostname disable. The first step that fails ends the run. If "ready"
was still to come, Azure is told NotReady, with the reason.

steps:
  ready     report to Azure that this VM is Ready
  hostname  set the hostname that the user chose
  disable   disable azure-provisioning.service: it runs on the first boot only
  user      create the admin user, with its SSH keys and with sudo or doas
  password  set the password of that user, and have sshd take passwords or not
  data      save user data and custom data in /var/lib/azure-provisioning
  publish   tell the DHCP server the hostname, so that the DNS of Azure learns it
  remember  save the id of this VM; later runs that name this step do nothing

options:
  -n, --dry-run  print what would be changed, and change nothing
  -h, --help     print this text
  --version      print the version

settings, from the environment:
  AZURE_PROVISIONING_WIRESERVER  base URL of the WireServer
                                 (default: http://168.63.129.16)
  AZURE_PROVISIONING_IMDS        base URL of the metadata service, IMDS
                                 (default: http://169.254.169.254)
  AZURE_PROVISIONING_ATTEMPTS    attempts at each request (default: 240)
  AZURE_PROVISIONING_INTERVAL    longest wait between two attempts, in seconds
                                 (default: 5)
  AZURE_PROVISIONING_TIMEOUT     time limit of a request, in seconds
                                 (default: 30)
  AZURE_PROVISIONING_GROUPS      more groups for the user, separated by commas
                                 (default: none)

Progress goes to stdout, failures go to stderr.
exit status: 0 all steps are done, 1 a step failed, 2 wrong usage'

WIRESERVER=${AZURE_PROVISIONING_WIRESERVER-http://168.63.129.16}
IMDS=${AZURE_PROVISIONING_IMDS-http://169.254.169.254}
ATTEMPTS=${AZURE_PROVISIONING_ATTEMPTS-240}
INTERVAL=${AZURE_PROVISIONING_INTERVAL-5} # seconds
TIMEOUT=${AZURE_PROVISIONING_TIMEOUT-30}  # seconds
EXTRA_GROUPS=${AZURE_PROVISIONING_GROUPS-}
DRY_RUN=

# What changes during a run.
has_reply='' # whether any server has answered so far

CONNECT_LIMIT=3        # seconds to connect, at most; they are part of the timeout
BODY_LIMIT=65536       # bytes of a reply's body, at most
ABSENCES_NEEDED=5      # replies 'no such value' after which IMDS is believed
DVD_ATTEMPTS=30        # to read the DVD, as the drive, or the medium in it, may come late
ATTEMPTS_BEFORE_DVD=60 # to get a value from IMDS; then the DVD is read
NEWLINE='
'
WHITE_SPACE=$(printf ' \t\n\r') # that of XML. '\r' is last, as $() would remove a line feed there.

# A text that cannot be used is replaced by this character, which no valid value has.
INVALID=$(printf '\001')

# ---- Messages and failures ---------------------------------------------------------------------

# say LINE...: print lines to stdout. If they cannot be printed, go on: the VM has to be Ready all
# the same.
say() {
    { printf '%s\n' "$@" || :; } 2>/dev/null
}

# complain LINE...: print lines to stderr
complain() {
    say "$@" >&2
}

# fail REASON: sets $reason; returns 1
fail() {
    reason=$1
    return 1
}

# usage_error MESSAGE: say what is wrong with the command line or a setting, and end the program
usage_error() {
    complain "azure-provisioning: $1" "$USAGE"
    exit 2
}

# ---- The run -----------------------------------------------------------------------------------

# main [ARGUMENT]...: provision the VM; returns the exit status
main() {
    set -u # a variable that is not set is an error
    set -f # a text that is split into words is not a pattern for file names
    export LC_ALL=C
    umask 077
    trap '' PIPE # if nobody reads the output, go on
    parse_arguments "$@"
    check_settings
    if has_word remember "$steps" && is_remembered; then
        return 0
    fi
    if ! has_command curl && ! has_command wget; then
        complain 'azure-provisioning: no curl or wget'
        return 1
    fi
    run_steps
}

# find_step NAME: sets $step_function to the function of a step, or returns 1 if there is no such
# step. All steps are here.
find_step() {
    case $1 in
    ready) step_function=report_ready ;;
    hostname) step_function=set_hostname ;;
    disable) step_function=disable_unit ;;
    user) step_function=create_user ;;
    password) step_function=set_password ;;
    data) step_function=save_data ;;
    publish) step_function=publish_hostname ;;
    remember) step_function=remember_vm ;;
    *) return 1 ;;
    esac
}

# parse_arguments [ARGUMENT]...: sets $steps to those that are named, and DRY_RUN. The first -h,
# --version or mistake ends the program.
parse_arguments() {
    local argument
    steps=''
    for argument; do
        case $argument in
        -n | --dry-run)
            DRY_RUN=yes
            ;;
        -h | --help)
            say "$USAGE"
            exit 0
            ;;
        --version)
            say "azure-provisioning $VERSION"
            exit 0
            ;;
        *)
            find_step "$argument" || usage_error "unknown step or option: $argument"
            steps="$steps $argument"
            ;;
        esac
    done
    steps=${steps:-ready hostname disable}
}

# check_settings: check the settings, and take the '/' from the end of the URLs
check_settings() {
    check_url AZURE_PROVISIONING_WIRESERVER "$WIRESERVER"
    check_url AZURE_PROVISIONING_IMDS "$IMDS"
    check_number AZURE_PROVISIONING_ATTEMPTS "$ATTEMPTS" 1
    check_number AZURE_PROVISIONING_INTERVAL "$INTERVAL" 0
    check_number AZURE_PROVISIONING_TIMEOUT "$TIMEOUT" 1
    check_groups AZURE_PROVISIONING_GROUPS "$EXTRA_GROUPS"
    WIRESERVER=${WIRESERVER%/}
    IMDS=${IMDS%/}
}

# check_url NAME URL: a usage error if the base URL is not http://HOST[:PORT][/PATH]
check_url() {
    local address host_and_port port
    case $2 in
    http://*) ;;
    *) usage_error "bad $1" ;;
    esac
    address=${2#http://}
    case $address in
    '' | :* | /*) usage_error "bad $1" ;; # no HOST
    *//* | *[!A-Za-z0-9._~:/-]*) usage_error "bad $1" ;;
    esac
    host_and_port=${address%%/*}
    case $host_and_port in
    *:*)
        port=${host_and_port#*:}
        check_number "$1" "$port" 1
        [ "${#port}" -le 5 ] || usage_error "bad $1"
        ;;
    esac
}

# check_number NAME NUMBER LEAST: a usage error if it is not a number from LEAST to 999999, without
# leading zeros
check_number() {
    case $2 in
    '' | *[!0-9]*) usage_error "bad $1" ;;
    0?*) usage_error "bad $1" ;; # a leading zero
    esac
    if [ "${#2}" -gt 6 ] || [ "$2" -lt "$3" ]; then
        usage_error "bad $1"
    fi
}

# check_groups NAME GROUPS: a usage error if they are not names of groups, with commas between them,
# or ''
check_groups() {
    local group IFS=','
    case $2 in
    *[!A-Za-z0-9._,-]* | ,* | *, | *,,*) usage_error "bad $1" ;;
    esac
    for group in $2; do
        case $group in
        [!A-Za-z_]*) usage_error "bad $1" ;;
        esac
        [ "${#group}" -le 32 ] || usage_error "bad $1"
    done
}

# run_steps: run $steps until one fails; returns the exit status
run_steps() {
    local step tried=''
    for step in $steps; do
        tried="$tried $step"
        if ! run_step "$step"; then
            complain "$step: $reason"
            if has_word ready "$steps" && ! has_word ready "$tried"; then
                report_not_ready "$step: $reason"
            fi
            return 1
        fi
    done
}

# run_step STEP: do a step; can fail
run_step() {
    reason='unknown error' # in case a function returns 1 without fail, by mistake
    find_step "$1"
    "$step_function"
}

# has_word WORD WORDS: whether it is one of the words
has_word() {
    case " $2 " in
    *" $1 "*) ;;
    *) return 1 ;;
    esac
}

# ---- Commands and files ------------------------------------------------------------------------

# has_command NAME: whether there is such a program on PATH, or the shell has one of its own
has_command() {
    command -v "$1" >/dev/null
}

# run COMMAND [ARGUMENT]...: run a command that changes the system; returns whether the command
# exists and succeeds. A dry run prints it instead.
run() {
    local IFS=' ' # stands between the words of $*
    has_command "$1" || return 1
    if [ -n "$DRY_RUN" ]; then
        say "Would run: $*"
        return 0
    fi
    "$@" || return 1
}

# run_twice COMMAND [ARGUMENT]...: run a command as run does. If it fails, try it again: D-Bus may
# not have been up.
run_twice() {
    if run "$@"; then
        return 0
    fi
    has_command "$1" || return 1
    sleep 1
    run "$@"
}

# read_output COMMAND [ARGUMENT]...: run a command that changes nothing; sets $value to what it
# prints, '' if it fails. The text has no line feeds at its end.
read_output() {
    value=$("$@" </dev/null 2>/dev/null) || value=''
}

# say_done LINE: print that something has been changed; a dry run does not print it
say_done() {
    if [ -z "$DRY_RUN" ]; then
        say "$1"
    fi
}

# write_file FILE MODE OWNER COMMAND [ARGUMENT]...: replace a file, or make a new one, by what the
# command prints. After a power cut it is the old one or the new one. Can fail. For example:
#     write_file /etc/hostname 644 '' printf '%s\n' "$name"
#
# MODE: a number; '' keeps the mode and the owner of the old file.
# OWNER: UID:GID; '' stands for root.
# The command may run more than once.
write_file() {
    local file="$1" attempt
    if [ -n "$DRY_RUN" ]; then
        say "Would write $file"
        return 0
    fi
    # FILE.new is there while another copy of this program writes the file. If it is still there
    # after two seconds, that copy has ended early.
    for attempt in 1 2 3; do
        if [ $attempt = 3 ]; then
            rm -f "$file.new" 2>/dev/null
        fi
        if replace_file "$@" 2>/dev/null; then
            return 0
        fi
        if [ $attempt -lt 3 ]; then
            sleep 1
        fi
    done
    rm -f "$file.new" 2>/dev/null
    fail "cannot write $file"
}

# replace_file FILE MODE OWNER COMMAND [ARGUMENT]...: do the work of write_file; returns 1 if that
# is not possible
replace_file() {
    local file="$1" new="$1.new" mode="$2" owner="$3"
    shift 3
    mkdir -p "${file%/*}" || return 1
    if [ -d "$file" ]; then # mv would put the new file into it
        return 1
    fi
    if [ -e "$new" ] || [ -L "$new" ]; then # another copy is writing it; or it is a FIFO, say
        return 1
    fi
    ( # a subshell, so that set -C ends with it
        set -C # fails if there is a file now
        "$@" >"$new"
    ) || return 1
    if [ -n "$mode" ]; then
        if [ -n "$owner" ]; then
            chown -h "$owner" "$new" || return 1
        fi
        chmod "$mode" "$new" || return 1
    else
        cp -p "$file" "$new" || return 1 # copies mode and owner, but also the old content:
        "$@" >"$new" || return 1         # so write the new one again
    fi
    sync_path "$new" || return 1 # before the rename, or a power cut could leave an empty file
    mv -f "$new" "$file" || return 1
    sync_path "${file%/*}"
}

# sync_path PATH: have the disk store a file, or the names of the files in a folder
sync_path() {
    if has_command sync; then
        sync "$1"
    fi
}

# ---- HTTP --------------------------------------------------------------------------------------

# exchange LABEL URL DATA LIMIT [--header HEADER]...: send a POST with the data, or a GET if they
# are ''; sets $status of the reply, and $body. Can fail. LIMIT: bytes of the body, at most. The
# whole exchange may take TIMEOUT seconds.
#
# what comes                   $status  $problem         the outcome
# nothing, or no whole status  000      no connection    fails: LABEL: no connection; $no_reply: yes
# nothing in time              000      timed out        fails: LABEL: timed out; $no_reply: yes
# what is not HTTP             000      broken reply     fails: LABEL: broken reply
# a bad status                 404      any              fails: LABEL: HTTP 404
# 200, but half a body         200      broken reply     fails: LABEL: broken reply
# 200, but not in time         200      timed out        fails: LABEL: timed out
# 200, but a large body        200, 000 reply too large  fails: LABEL: reply too large
# 200 and a body               200      none             succeeds
#
# For a POST, each 2xx is as good as 200.
exchange() {
    local label="$1" url="$2" data="$3" limit="$4" problem
    local most_bytes=$((limit + 100)) # of a body and the three lines behind it
    shift 4
    set -- "$@" \
        --header "User-Agent: azure-provisioning/$VERSION" \
        --header 'Accept: */*' \
        --header 'Accept-Encoding: identity' \
        --header 'Connection: close'
    {
        if has_command curl; then
            split_reply "$(send_with_curl "$@")" # sets $problem
        else
            # head cuts off what split_reply would refuse. The shell would drop a NUL byte: tr makes
            # it INVALID.
            split_reply "$(send_with_wget "$@" |
                head -c $((most_bytes + 1)) |
                tr '\000' "$INVALID")"
        fi
    } 2>/dev/null # without the messages of the programs, and Bash's warning of a NUL byte
    case $status:$problem in
    '000:no connection' | '000:timed out') no_reply=yes ;;
    *) has_reply=yes ;;
    esac
    case $status:$data in
    000:*) ;;                                   # no status
    200:*) ;;                                   # a good one
    2??:?*) ;;                                  # a good one for a POST
    *) fail "$label: HTTP $status" || return ;; # a bad status says more than the problem
    esac
    [ "$problem" = none ] || fail "$label: $problem"
}

# send_with_curl [--header HEADER]...: send a request, with its caller's $url, $data and $limit.
# Prints four lines for split_reply, or more, as a body may have line feeds. For example:
#     web-1          BODY
#     200            STATUS, 000 without a reply
#     5              SIZE of the body, in bytes
#     none           PROBLEM, one of those of exchange; or "lost": the connection broke
send_with_curl() {
    local bytes_a_second connect_limit=$CONNECT_LIMIT
    if [ "$TIMEOUT" -lt "$connect_limit" ]; then
        connect_limit=$TIMEOUT
    fi
    if [ -n "$data" ]; then
        set -- "$@" --data-binary "$data"
    fi
    # Before curl 8.4, --max-filesize does not stop a body whose size is not announced. So the rate
    # is bounded, too: at most 4 * limit + 4096 * TIMEOUT bytes can come.
    bytes_a_second=$((4 * limit / TIMEOUT + 4096))
    curl -q --silent --fail --noproxy '*' --proto =http \
        --connect-timeout "$connect_limit" --max-time "$TIMEOUT" \
        --max-filesize "$limit" --limit-rate "$bytes_a_second" \
        --write-out '\n%{http_code}\n%{size_download}\n' "$@" "$url"
    case $? in
    0 | 22) echo none ;; # 22: --fail says that the status is bad
    28) echo 'timed out' ;;
    63) echo 'reply too large' ;;
    1 | 8) echo 'broken reply' ;; # it is not HTTP
    *) echo lost ;;
    esac
}

# send_with_wget [--header HEADER]...: do what send_with_curl does, with wget, of GNU or of BusyBox.
# It does not know the SIZE, and leaves that line empty.
#
# What wget says on stderr begins with the head of the reply, indented. For example:
#       HTTP/1.1 200 OK
#       Content-Type: text/xml
send_with_wget() {
    local log exit_status status=000 bad_head=''
    if [ -n "$data" ]; then
        set -- "$@" --post-data "$data"
    fi
    case $(wget --help 2>&1) in
    *--max-redirect*) # only GNU's has these
        set -- --no-config --tries=1 --max-redirect=0 --connect-timeout=$CONNECT_LIMIT "$@"
        ;;
    esac
    # 3 is our stdout. wget's stderr goes to $log (2>&1), and its stdout, the body, to 3 (>&3).
    { log=$(timeout "$TIMEOUT" wget -q -S -Y off -O - "$@" "$url" 2>&1 >&3); } 3>&1
    exit_status=$?
    case $log in
    *'  HTTP/1.'?' '[1-9][0-9][0-9]*)
        status=${log#*'  HTTP/1.'?' '} # 200 OK and more
        status=${status%%[!0-9]*}
        ;;
    *'  '*) bad_head=yes ;; # there is no status in it
    esac
    printf '\n%s\n\n' "$status"
    if [ -n "$bad_head" ]; then
        echo 'broken reply'
    elif [ $exit_status = 124 ] || [ $exit_status = 143 ]; then # timeout's: coreutils or BusyBox
        echo 'timed out'
    elif [ $exit_status != 0 ]; then # the status may also be bad
        echo lost
    elif [ "$status" = 000 ]; then
        echo 'broken reply'
    else
        echo none
    fi
}

# split_reply REPLY: take apart what send_with_curl or send_with_wget printed, line by line from the
# end; sets $status, $body and its caller's $problem. Uses its caller's $limit and $most_bytes.
split_reply() {
    local rest="$1" size
    if [ "${#rest}" -gt $most_bytes ]; then
        status=000
        problem='reply too large'
        body=''
        return 0
    fi
    problem=${rest##*"$NEWLINE"} # the last line
    rest=${rest%"$NEWLINE"*}     # without it
    size=${rest##*"$NEWLINE"}
    rest=${rest%"$NEWLINE"*}
    status=${rest##*"$NEWLINE"}
    body=${rest%"$NEWLINE"*}
    if ! is_status "$status"; then # lines are missing: the client was killed
        status=000
        problem=lost
    fi
    case $status:$problem in
    000:lost) problem='no connection' ;;
    000:none) problem='broken reply' ;; # curl before 7.66 takes what is not HTTP
    *:lost) problem='broken reply' ;;
    esac
    if [ "${#body}" -gt "$limit" ]; then
        problem='reply too large'
    fi
    # A body with a NUL byte is not used. The shell has dropped the byte, so that the body is
    # shorter than its size; or tr has made it INVALID.
    if [ -n "$size" ] && [ "$size" != "${#body}" ]; then
        body=$INVALID
    fi
    case $body in
    *"$INVALID"*) body=$INVALID ;;
    esac
}

# is_status TEXT: whether it is a status of HTTP, or 000
is_status() {
    case $1 in
    [0-9][0-9][0-9]) ;;
    *) return 1 ;;
    esac
}

# ---- Attempts ----------------------------------------------------------------------------------

# retry STEP ATTEMPTS required|optional FUNCTION [ARGUMENT]...: call the function until it does not
# fail. Can fail, after all attempts.
#
# The wait after the first attempt is 1 second, then 2, 3 and so on, up to INTERVAL.
# optional: IMDS may not have the value that the function requests. Then $value is ''. IMDS says so
# with a status:
# - 404. But that is also its reply to all requests while it starts.
# - 400, if it is too old to know the value.
# So it is believed after ABSENCES_NEEDED such replies, which need not come in a row. With fewer
# attempts than that, each has to end so.
retry() {
    local step="$1" attempts="$2" necessity="$3" attempt=0 absences=0 last_reason='' question=''
    local routes_before
    shift 3
    while [ $attempt -lt "$attempts" ]; do
        attempt=$((attempt + 1))
        read_routes
        routes_before=$routes
        status=000 # exchange may change these two
        no_reply=''
        if "$@"; then
            return 0
        fi
        # The same reason is not said each time, or the log would fill up.
        if [ "$reason" != "$last_reason" ] || is_power_of_two $attempt; then
            complain "$step: attempt $attempt of $attempts: $reason"
        fi
        last_reason=$reason
        case $necessity:$status in
        optional:400 | optional:404)
            absences=$((absences + 1))
            if [ $absences = $ABSENCES_NEEDED ] || [ $absences = "$attempts" ]; then
                value=''
                return 0
            fi
            ;;
        esac
        if [ $attempt -lt "$attempts" ]; then
            wait_for $((attempt < INTERVAL ? attempt : INTERVAL)) "$routes_before" "$no_reply"
        fi
    done
    if [ -n "$no_reply" ] && [ -z "$has_reply" ]; then
        question='; is this a VM on Azure?'
    fi
    fail "gave up after $attempts attempts: $last_reason$question"
}

# is_power_of_two NUMBER: whether it is 1, 2, 4, 8 or the like
is_power_of_two() {
    [ $(($1 & ($1 - 1))) -eq 0 ]
}

# wait_for SECONDS ROUTES_BEFORE NO_REPLY: wait. After an attempt without a reply, stop when the
# routes change: the network is up.
wait_for() {
    local tenths=$((10 * $1))
    if [ -z "$3" ]; then
        sleep "$1"
        return 0
    fi
    while [ $tenths -gt 0 ] && read_routes && [ "$routes" = "$2" ]; do
        if sleep 0.1 2>/dev/null; then
            tenths=$((tenths - 1))
        else # this sleep takes whole seconds alone
            sleep 1
            tenths=$((tenths - 10))
        fi
    done
}

# read_routes: sets $routes to the kernel's table of routes, '' if it cannot be read
read_routes() {
    local line
    routes=''
    while read -r line; do
        routes=$routes$line$NEWLINE
    done 2>/dev/null </proc/self/net/route
    return 0 # also without that file
}

# ---- Step ready: the goal state and the health report ------------------------------------------

# report_ready: report to the WireServer that this VM is Ready; can fail
report_ready() {
    local details_xml=''
    say 'Retrieving goal state from the Wireserver'
    retry ready "$ATTEMPTS" required report_health Ready "$details_xml"
}

# report_health STATE DETAILS_XML: request the goal state, and send a health report for it: one
# attempt for retry; can fail
#
# The WireServer refuses a report for an old goal state. So each attempt requests a new one.
report_health() {
    local state="$1" details_xml="$2" report
    request_goal_state || return
    report="<Health>\
<GoalStateIncarnation>$incarnation</GoalStateIncarnation>\
<Container>\
<ContainerId>$container_id</ContainerId>\
<RoleInstanceList><Role>\
<InstanceId>$instance_id</InstanceId>\
<Health><State>$state</State>$details_xml</Health>\
</Role></RoleInstanceList>\
</Container>\
</Health>"
    if [ -n "$DRY_RUN" ]; then
        say 'Would send the following data to Wireserver:' "$report"
        return 0
    fi
    say 'Sending the following data to Wireserver:' "$report"
    exchange 'health report' "$WIRESERVER/machine?comp=health" "$report" "$BODY_LIMIT" \
        --header 'x-ms-version: 2012-11-30' \
        --header 'x-ms-agent-name: custom-provisioning' \
        --header 'Content-Type: text/xml;charset=utf-8' || return
    say "Response: $status"
}

# request_goal_state: sets $incarnation, $container_id and $instance_id; can fail
request_goal_state() {
    local paths
    exchange 'goal state' "$WIRESERVER/machine?comp=goalstate" '' "$BODY_LIMIT" \
        --header 'x-ms-version: 2012-11-30' \
        --header 'x-ms-agent-name: custom-provisioning' || return
    paths='Incarnation Container/ContainerId Container/RoleInstanceList/RoleInstance/InstanceId'
    read_xml GoalState "$paths" || fail 'goal state: not a goal state' || return
    find_squeezed Incarnation
    incarnation=$value
    find_squeezed Container/ContainerId
    container_id=$value
    find_squeezed Container/RoleInstanceList/RoleInstance/InstanceId
    instance_id=$value
    is_number "$incarnation" || fail 'goal state: no Incarnation' || return
    is_id "$container_id" || fail 'goal state: no ContainerId' || return
    is_id "$instance_id" || fail 'goal state: no InstanceId' || return
    say "ContainerId: $container_id" "InstanceId: $instance_id" "Incarnation: $incarnation"
}

# read_xml ROOT PATHS: read the XML document in $body; returns 1 if it is none, or has another root.
# Sets $found_texts, for find_text: PATH>TEXT< for each element at one of these paths below the
# root. The functions below, down to close_element, also set these local variables of read_xml:
# $path         the elements that are open
# $text         the text of the last one of them, or INVALID if there are elements in it
# $root_seen    yes, if the root has begun
# $markup_end   what ends the comment or the instruction that is open, '' if none is
#
# The document is cut at each '<'. For example, these are the pieces of <a>1<b>2</b><c/></a>, and
# what the variables are behind each, if PATHS is 'b c'. The text of c is empty:
#
#     piece    $path    $text      $found_texts
#     a>1      /a       1
#     b>2      /a/b     2
#     /b>      /a       INVALID    b>2<
#     c/>      /a       INVALID    b>2<c><
#     /a>               INVALID    b>2<c><
#
# Azure does not send these, and they are not read as other programs read them:
# - A document type definition, CDATA, a '>' in an attribute, a tag of over 1,000 characters and
#   very deep elements are refused.
# - A text with a comment in it is INVALID.
# - Text behind a comment outside of the root is ignored.
# Entities, such as &amp;, stay as they are: see decode_entities.
read_xml() {
    local root="$1" paths="$2" path='' text='' root_seen='' markup_end=''
    local before byte_order_mark piece IFS='<'
    found_texts=''
    case $body in
    *'<') return 1 ;; # cut off; the loop would not see that there is an empty piece at the end
    esac
    before=${body%%<*}
    if ! is_blank "$before"; then
        byte_order_mark=$(printf '\357\273\277')
        is_blank "${before#"$byte_order_mark"}" || return 1
    fi
    for piece in ${body#"$before<"}; do # IFS cuts at each '<'
        if skip_markup "$piece"; then
            text=$INVALID # for the element that the comment is in
        else
            read_piece "$piece" || return 1
        fi
    done
    [ -n "$root_seen" ] && [ -z "$path" ] && [ -z "$markup_end" ] # nothing is open
}

# skip_markup PIECE: skip it if it is in a comment, or in an instruction such as <?xml ... ?>;
# returns 1 if it is in neither. They may have a '<' in them, and so have several pieces: sets
# $markup_end to the end to look for in the next piece, '' if it is in this one.
skip_markup() {
    local rest="$1"
    if [ -z "$markup_end" ]; then
        case $1 in
        '!--'*)
            markup_end='-->'
            rest=${1#'!--'}
            ;;
        '?'*)
            markup_end='?>'
            rest=${1#'?'}
            ;;
        *)
            return 1
            ;;
        esac
    fi
    case $rest in
    *"$markup_end"*) markup_end='' ;;
    esac
}

# read_piece PIECE: read TAG>TEXT; sets $path, $text, $root_seen and $found_texts. Returns 1 if the
# piece is wrong here. TAG is one of
#     NAME [ATTRIBUTE]...        the start of an element
#     NAME [ATTRIBUTE].../       an empty element
#     /NAME                      the end of an element
read_piece() {
    local tag="${1%%>*}" text_after name
    if [ "$tag" = "$1" ] || [ "${#tag}" -gt 1000 ]; then # no '>'; or too long for this shell
        return 1
    fi
    text_after=${1#*>}
    # For example, a:b c="d" becomes a:b, and that becomes b.
    name=${tag#/}
    name=${name%%["$WHITE_SPACE"/]*}
    name=${name##*:}
    case $tag in
    "$name" | "/$name") ;;                        # nothing but a name, as in most tags
    *) has_valid_attributes "$tag" || return 1 ;; # the '>' may be in an attribute
    esac
    case $tag in
    /*)
        close_element "$name" || return 1
        ;;
    */)
        open_element "$name" '' || return 1
        close_element "$name" || return 1
        ;;
    *)
        open_element "$name" "$text_after" || return 1
        ;;
    esac
    if [ -z "$path" ]; then # the root has ended
        is_blank "$text_after" || return 1
    fi
}

# has_valid_attributes TAG: whether each quote in it has a second one of its kind, and no '/'
# outside of quotes stands before white space
has_valid_attributes() {
    local rest="$1" before
    while :; do
        before=${rest%%[\"\']*}
        case $before in
        */["$WHITE_SPACE"]*) return 1 ;;
        esac
        rest=${rest#"$before"} # from the next quote on
        case $rest in
        '') return 0 ;;
        \"*\"*) rest=${rest#\"*\"} ;;
        \'*\'*) rest=${rest#\'*\'} ;;
        *) return 1 ;;
        esac
    done
}

# open_element NAME TEXT: go down into an element: sets $path, $text and $root_seen. Returns 1 if it
# is a wrong or a second root, or no element.
open_element() {
    case $1 in
    '' | '!'*) return 1 ;; # '!': a document type definition, or CDATA
    esac
    if [ -z "$path" ]; then
        if [ -n "$root_seen" ] || [ "$1" != "$root" ]; then
            return 1
        fi
        root_seen=yes
    fi
    path=$path/$1
    text=$2
    [ "${#path}" -le 5000 ] || return 1 # too deep for this shell
}

# close_element NAME: go up from an element: sets $path, $text and $found_texts. Returns 1 if
# another element is open, or none.
close_element() {
    local path_below_root="${path#"/$root/"}"
    if [ -z "$1" ] || [ "$1" != "${path##*/}" ]; then
        return 1
    fi
    if has_word "$path_below_root" "$paths"; then
        found_texts="$found_texts$path_below_root>$text<"
        [ "${#found_texts}" -le 200000 ] || return 1 # too much for this shell
    fi
    path=${path%/*}
    text=$INVALID # that of the element around it
}

# find_text PATH: sets $value to the text of the first element at a path below the root, '' if there
# is none. read_xml was given the path, and has set $found_texts.
find_text() {
    local each IFS='<'
    value=''
    for each in $found_texts; do
        case $each in
        "$1>"*)
            value=${each#*>}
            return 0
            ;;
        esac
    done
}

# find_squeezed PATH: sets $value to the text that find_text finds, squeezed
find_squeezed() {
    find_text "$1"
    squeeze "$value"
}

# is_blank TEXT: whether it is white space, or nothing
is_blank() {
    case $1 in
    *[!"$WHITE_SPACE"]*) return 1 ;;
    esac
}

# squeeze TEXT: sets $value to the text with one space in place of each run of white space, and none
# at its ends
squeeze() {
    local IFS="$WHITE_SPACE"
    # shellcheck disable=SC2086 # split into words
    set -- $1
    # POSIX wants an empty word between two CR. Splitting again removes it.
    # shellcheck disable=SC2048,SC2086
    set -- $*
    value="$*" # a space, the first character of IFS, stands between the words
}

# is_number TEXT: whether it is decimal digits
is_number() {
    case $1 in
    '' | *[!0-9]*) return 1 ;;
    esac
}

# is_id TEXT: whether it is visible ASCII, '!' to '~', without the characters that have a meaning
# in XML
is_id() {
    case $1 in
    '' | *[!!-~]*) return 1 ;; # the first '!' stands for "not"
    *[\<\>\&\"\']*) return 1 ;;
    esac
}

# ---- Step hostname: a value from IMDS ----------------------------------------------------------

# set_hostname: set the hostname that the user chose; can fail
#
# If IMDS says that the user chose none, set the VM's name in Azure.
set_hostname() {
    local name
    say 'Retrieving hostname from IMDS'
    request_property hostname osProfile/computerName HostName optional || return
    if [ -z "$value" ]; then
        retry hostname "$ATTEMPTS" required request_text name || return
    fi
    replace_underscores "$value" # systemd would drop the '_'
    name=$value
    is_hostname "$name" || fail 'no valid hostname' || return
    say "Hostname: $name"
    if ! run_twice hostnamectl set-hostname "$name"; then
        store_hostname "$name"
    fi
}

# replace_underscores TEXT: sets $value to the text with a '-' in the place of each '_'
replace_underscores() {
    value=$1
    while [ "${value%%_*}" != "$value" ]; do # there is one in it
        value=${value%%_*}-${value#*_}
    done
}

# is_hostname TEXT: whether it is a hostname: labels with dots between them, 64 characters at most
# in all
is_hostname() {
    local label IFS=.
    case $1 in
    '' | *[!A-Za-z0-9.-]* | .* | *. | *..*) return 1 ;;
    esac
    for label in $1; do
        case $label in
        -* | *-) return 1 ;;
        esac
        [ "${#label}" -le 63 ] || return 1
    done
    [ "${#1}" -le 64 ]
}

# store_hostname NAME: set the hostname without systemd: in the kernel for this boot, in a file for
# later ones. Fails if one of the two is not set. The reason names all that failed. For example:
#     hostnamectl failed; cannot write /etc/hostname, so web-1 lasts until the next boot
store_hostname() {
    local name="$1" problems='' until='' kernel_has_name=''
    if has_command hostnamectl; then
        problems='hostnamectl failed; '
    fi
    if set_kernel_hostname "$name"; then
        kernel_has_name=yes
    else
        problems="${problems}cannot set the kernel's hostname; "
    fi
    if ! write_file /etc/hostname 644 '' printf '%s\n' "$name"; then
        if [ -n "$kernel_has_name" ]; then
            until=", so $name lasts until the next boot"
        fi
        fail "$problems$reason$until" || return
    fi
    [ -n "$kernel_has_name" ] || fail "${problems%; }"
}

# set_kernel_hostname NAME: set the kernel's hostname; returns whether that worked
set_kernel_hostname() {
    if [ -n "$DRY_RUN" ]; then
        return 0
    fi
    if hostname "$1" 2>/dev/null; then
        return 0
    fi
    { printf '%s\n' "$1" >/proc/sys/kernel/hostname; } 2>/dev/null
}

# request_property STEP LEAF DVD_PATH required|optional: sets $value to a property that the user
# gave the VM, squeezed, and $property_origin to imds or dvd. Can fail, after all attempts.
#
# LEAF: the path of the property in IMDS.
# DVD_PATH: its path on the DVD.
# $value is '' if IMDS does not have an optional property.
#
# The DVD is also read if IMDS says that there is no such value. Without a drive, only step 3 is
# done.
request_property() {
    local step="$1" leaf="$2" dvd_path="$3" necessity="$4" attempts="$ATTEMPTS_BEFORE_DVD"
    property_origin=imds
    if has_dvd_drive; then
        # 1. Ask IMDS for some minutes. The IMDS of Azure Stack has no properties.
        if [ "$ATTEMPTS" -lt "$attempts" ]; then
            attempts=$ATTEMPTS
        fi
        if retry "$step" "$attempts" "$necessity" request_text "$leaf" && [ -n "$value" ]; then
            return 0
        fi
        # 2. Look on the DVD.
        if retry "$step" "$DVD_ATTEMPTS" required request_dvd; then
            find_dvd_text "$dvd_path"
            squeeze "$value"
            if [ -n "$value" ]; then
                property_origin=dvd
                return 0
            fi
        fi
    fi
    # 3. Ask IMDS, with all attempts.
    retry "$step" "$ATTEMPTS" "$necessity" request_text "$leaf"
}

# has_dvd_drive: whether there is a DVD drive. At the first boot, the DVD is in it, or comes soon.
has_dvd_drive() {
    [ -e /dev/sr0 ]
}

# request_text LEAF: sets $value to a value from IMDS, squeezed; can fail. An empty value is a
# failure.
request_text() {
    request_leaf "$1" || return
    squeeze "$value"
    [ -n "$value" ] || fail "${1##*/}: empty"
}

# request_leaf LEAF [LIMIT]: sets $value to a value from IMDS, which may be empty; can fail
#
# LEAF: the path of the value below "compute".
request_leaf() {
    local leaf="$1" limit="${2-$BODY_LIMIT}" version url
    find_api_version "$leaf"
    url="$IMDS/metadata/instance/compute/$leaf?api-version=$version&format=text"
    exchange "${leaf##*/}" "$url" '' "$limit" --header 'Metadata: true' || return
    value=$body
}

# find_api_version LEAF: sets its caller's $version to the oldest api-version that knows a value, as
# an old IMDS refuses later ones
find_api_version() {
    case $1 in
    name | vmId) version=2017-04-02 ;;
    publicKeys*) version=2018-04-02 ;;
    osProfile/computerName | osProfile/adminUsername) version=2020-07-15 ;;
    osProfile/disablePasswordAuthentication) version=2020-10-01 ;;
    userData) version=2021-01-01 ;;
    esac
}

# ---- Step disable ------------------------------------------------------------------------------

# disable_unit: disable the service, of systemd or OpenRC, so that the next boot does not run it;
# can fail
disable_unit() {
    sync_all # first, or a power cut could leave it disabled without what the other steps did
    # Without --no-reload, systemd would run all of its generators again.
    if ! run systemctl --no-reload disable azure-provisioning.service &&
        ! run rc-update del azure-provisioning; then
        fail 'neither systemctl nor rc-update disabled azure-provisioning' || return
    fi
    say_done 'Disabled azure-provisioning.service'
}

# sync_all: have the disk store all changes, so that a power cut does not undo them
sync_all() {
    if [ -z "$DRY_RUN" ] && has_command sync; then
        sync
    fi
}

# ================================================================================================
# The default run ends here. What follows runs only if another step is named. There is one
# exception: where has_dvd_drive finds a drive, the step hostname also uses the section about the
# DVD. Our systemd unit hides the drive, unless a drop-in shows it.
# ================================================================================================

# ---- NotReady: a step before ready failed ------------------------------------------------------

# report_not_ready REASON: report to the WireServer that this VM will not be Ready, so that nobody
# waits for it
report_not_ready() {
    describe_failure "$1"
    say 'Retrieving goal state from the Wireserver'
    if ! retry NotReady "$ATTEMPTS" required report_health NotReady "$value"; then
        complain "NotReady: $reason" # the run has failed anyway
    fi
}

# describe_failure REASON: sets $value to the part of the health report that tells Azure the reason
describe_failure() {
    local now summary description
    request_vm_id
    if [ -z "$vm_id" ]; then
        read_vm_id
    fi
    now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
    summary="result=error|reason=$1|agent=azure-provisioning/$VERSION|vm_id=$vm_id|timestamp=$now"
    # Spaces take the place of what is not ' ' to '~', ASCII that can be printed, and of & < >.
    description=$(printf '%.512s' "$summary" | tr -c ' -~' ' ' | tr '&<>' '   ')
    value="<Details>\
<SubStatus>ProvisioningFailed</SubStatus>\
<Description>$description</Description>\
</Details>"
}

# request_vm_id: sets $vm_id to the id of this VM in Azure's portal, '' if IMDS does not tell it in
# one attempt
request_vm_id() {
    vm_id=''
    if request_text vmId && is_vm_id "$value"; then
        vm_id=$value
    fi
}

# read_vm_id: sets $vm_id to the id of this VM in its firmware, '' if there is none
read_vm_id() {
    vm_id=''
    if read_file /sys/class/dmi/id/product_uuid; then
        text=$(printf '%s\n' "$text" | tr A-F a-f)
        if is_vm_id "$text"; then
            vm_id=$text
        fi
    fi
}

# is_vm_id TEXT: whether it is the id of a VM: 36 of '0' to '9', 'a' to 'f' and '-'
is_vm_id() {
    case $1 in
    *[!0-9a-f-]*) return 1 ;;
    esac
    [ "${#1}" -eq 36 ]
}

# read_file FILE: sets $text to the text of a file without line feeds at its end, '' if there is no
# such file. Can fail, also if there is a NUL byte or INVALID in it.
read_file() {
    text=''
    if [ ! -e "$1" ] && [ ! -L "$1" ]; then
        return 0
    fi
    if [ -f "$1" ]; then # opening a FIFO would take for ever
        # The shell would drop a NUL byte: tr makes it INVALID.
        { text=$(tr '\000' "$INVALID" <"$1") || text=$INVALID; } 2>/dev/null
    else
        text=$INVALID
    fi
    case $text in
    *"$INVALID"*) fail "cannot read $1" ;;
    esac
}

# ---- Step user: the account, its SSH keys, sudo or doas ----------------------------------------

NO_LOGIN_REASON='no valid SSH key, and no password'

# create_user: create the admin user, unless there is one, and let it log in with its keys; can fail
create_user() {
    local name
    say 'Retrieving user from IMDS'
    request_property user osProfile/adminUsername UserName required || return
    name=$value
    is_user_name "$name" || fail 'no valid user name' || return
    say "User: $name"
    request_login || return
    find_account "$name" || return
    if [ -z "$account" ]; then
        add_account "$name" || return
        if [ -n "$DRY_RUN" ]; then # there is no account, and so no home to look at
            grant_root "$name" || return
            return 0
        fi
        find_account "$name" || return
    fi
    [ -n "$account" ] || fail 'neither useradd nor adduser made the user' || return
    read_file /etc/login.defs || return
    if is_system_account "$text"; then
        fail "$name is a system account" || return
    fi
    case $shell in
    */nologin | */false) complain "user: $name cannot log in: its shell is $shell" ;;
    esac
    unlock_account || return
    if [ -n "$keys" ]; then
        authorize_keys || return
    else
        finish_home
    fi
    join_groups "$name" || return
    grant_root "$name"
}

# is_user_name TEXT: whether it is a user name. It has a small letter: to sudo, ALL would be
# everybody.
is_user_name() {
    case $1 in
    '' | root | *[!A-Za-z0-9._-]* | [!A-Za-z_]*) return 1 ;;
    *[a-z]*) [ "${#1}" -le 32 ] ;;
    *) return 1 ;;
    esac
}

# request_login: sets $keys to the user's valid SSH keys, of the DVD if $property_origin is dvd, or
# of IMDS. Fails if the VM would be Ready, and nobody could log in.
request_login() {
    if [ "$property_origin" = dvd ]; then
        find_keys || return
    else
        request_keys || return
    fi
    if [ -z "$keys" ] && has_word ready "$steps" && ! has_word password "$steps"; then
        fail 'no valid SSH key, and no step that sets the password'
    fi
}

# request_keys: sets $keys to the user's valid SSH keys, a line each. Fails if there is neither a
# key nor a password; also if IMDS does not answer the first two questions below, or has no valid
# list.
request_keys() {
    local leaf=osProfile/disablePasswordAuthentication
    # 1. IMDS has the keys.
    request_imds_keys optional || return
    if [ -n "$keys" ]; then
        return 0
    fi
    # 2. IMDS says that there is a password: then no key is needed.
    retry user "$ATTEMPTS" optional request_text $leaf || return
    if [ "$value" = false ]; then
        return 0
    fi
    # 3. The DVD has the keys, or says that there is a password.
    if has_dvd_drive && retry user "$DVD_ATTEMPTS" required request_dvd && find_keys; then
        return 0
    fi
    # 4. If IMDS had no text at all, it may have been starting. Now it has to have a key.
    if [ -z "$has_key_text" ]; then
        request_imds_keys required || keys=''
    fi
    [ -n "$keys" ] || fail "$NO_LOGIN_REASON"
}

# request_imds_keys required|optional: sets $keys to the valid SSH keys of IMDS, and $has_key_text
# if it has any text as a key, valid or not; can fail
#
# optional: as for retry. If required, IMDS has to have a list, and the text of each key in it.
request_imds_keys() {
    local names name number=0 request_function=request_leaf IFS=' '
    keys=''
    has_key_text=''
    if [ "$1" != optional ]; then
        request_function=request_text # fails if the text is empty
    fi
    retry user "$ATTEMPTS" "$1" $request_function publicKeys || return
    squeeze "$value"
    names=$value
    for name in $names; do                                        # 0/ 1/ 2/ and so on
        if [ "${name%/}" != $number ] || [ $number -gt 99 ]; then # with or without its '/'
            fail 'publicKeys: no valid list' || return
        fi
        retry user "$ATTEMPTS" "$1" request_key_data $number || return
        if [ -n "$value" ]; then
            has_key_text=yes
        fi
        pick_keys $number "$value"
        number=$((number + 1))
    done
}

# request_key_data NUMBER: sets $value to the text of a key that IMDS lists. Fails if it is empty,
# with the $status of a value that IMDS does not have: it may be starting.
request_key_data() {
    local leaf="publicKeys/$1/keyData"
    request_leaf "$leaf" || return
    if is_blank "$value"; then
        status=404
        fail "${leaf##*/}: empty"
    fi
}

# find_keys: sets $keys to the user's valid SSH keys on the DVD; fails as request_keys does
find_keys() {
    local each number=0 IFS='<'
    keys=''
    for each in $found_texts; do
        case $each in
        "$OVF_PATH/SSH/PublicKeys/PublicKey/Value>"*)
            decode_entities "${each#*>}"
            pick_keys $number "$value"
            number=$((number + 1))
            ;;
        esac
    done
    find_password_ban
    if [ -z "$keys" ] && [ "$value" != false ]; then
        fail "$NO_LOGIN_REASON"
    fi
}

# find_password_ban: sets $value to true if the DVD forbids passwords for SSH, to false if it allows
# them. Any other text is kept as it is.
find_password_ban() {
    find_dvd_text DisableSshPasswordAuthentication
    squeeze "$value"
    case $value in
    [Tt][Rr][Uu][Ee]) value=true ;;
    [Ff][Aa][Ll][Ss][Ee]) value=false ;;
    esac
}

# pick_keys NUMBER TEXT: add the valid SSH keys in the text with this number to $keys. Print whether
# each key is valid.
pick_keys() {
    local key IFS="$NEWLINE"
    split_keys "$2"
    for key in $value; do
        squeeze "$key"
        if is_ssh_key "$value"; then
            say "SSH key: ${value%% *}"
            keys=$keys$value$NEWLINE
        else
            complain "user: publicKeys/$1: no OpenSSH public key"
        fi
    done
}

# split_keys TEXT: sets $value to the keys in a text, a line each; to INVALID if there are none
#
# Azure may break a key into lines, and a user may give several keys. So a line is a part of the key
# before it, unless it begins with a type, or with options and a type:
#     ssh-rsa AAAA...
#     no-pty ssh-rsa AAAA...
# A key with options is refused later.
split_keys() {
    local each split='' IFS
    IFS=$(printf '\r')$NEWLINE # split into lines
    for each in $1; do
        squeeze "$each"
        case $value in
        '') continue ;;
        # a type
        ssh-* | ecdsa-* | sk-*) split=$split$NEWLINE ;;
        # options and a type
        *' ssh-'*' AAAA'* | *' ecdsa-'*' AAAA'* | *' sk-'*' AAAA'*) split=$split$NEWLINE ;;
        esac
        split=$split$each
    done
    value=${split:-$INVALID} # pick_keys has to say that it is not valid
}

# is_ssh_key TEXT: whether it is an OpenSSH public key: TYPE BASE64 [COMMENT]
is_ssh_key() {
    local blob="${1#* }"
    blob=${blob%% *}
    case $1 in # TYPE BASE64. The base64 begins with the type, too, encoded.
    'ssh-rsa AAAAB3Nz'*) ;;
    'ssh-ed25519 AAAAC3Nz'*) ;;
    'ecdsa-sha2-nistp256 AAAAE2Vj'*) ;;
    'ecdsa-sha2-nistp384 AAAAE2Vj'*) ;;
    'ecdsa-sha2-nistp521 AAAAE2Vj'*) ;;
    'sk-ssh-ed25519@openssh.com AAAAGnNr'*) ;;
    'sk-ecdsa-sha2-nistp256@openssh.com AAAAInNr'*) ;;
    *) return 1 ;;
    esac
    case $blob in
    *[!A-Za-z0-9+/=]*) return 1 ;;
    esac
    ! has_control_character "$1"
}

# has_control_character TEXT: whether it has a control character in it
has_control_character() {
    local control_characters
    control_characters=$(printf '\001-\037\177') # the range from \001 to \037, and \177
    case $1 in
    *[$control_characters]*) ;;
    *) return 1 ;;
    esac
}

# find_account NAME: sets $account to the user's name, or to '' if there is no such account. Can
# fail, also if its line is not valid. Sets as well:
# $password_field: the second field in /etc/shadow, or in /etc/passwd if there is no /etc/shadow
# $uid, $gid: the numbers of the user and of its group
# $home, $shell: paths
find_account() {
    local name="$1" IFS=':'
    account=''
    find_line /etc/passwd "$name" || return
    if [ -z "$line" ]; then
        return 0
    fi
    # The fields are name, password, UID, GID, comment, home and shell.
    # shellcheck disable=SC2086 # split into fields
    set -- $line
    password_field=${2-}
    uid=${3-}
    gid=${4-}
    home=${6-}
    shell=${7-}
    is_number "$uid" || fail "/etc/passwd: no valid line for $name" || return
    is_number "$gid" || fail "/etc/passwd: no valid line for $name" || return
    find_line /etc/shadow "$name" || return
    if [ -n "$line" ]; then
        # shellcheck disable=SC2086 # split into fields
        set -- $line
        password_field=${2-}
    elif [ -e /etc/shadow ]; then
        password_field='!' # useradd was interrupted: without a line, the account is locked
    fi
    account=$name
}

# find_line FILE NAME: sets $line to the first line for a name, in /etc/passwd and its like, '' if
# there is none; can fail
find_line() {
    local each IFS="$NEWLINE"
    line=''
    read_file "$1" || return
    for each in $text; do
        case $each in
        "$2:"*)
            line=$each
            return 0
            ;;
        esac
    done
}

# add_account NAME: make the user, in the group of the same name, if there is one. The caller finds
# out in /etc/passwd if it worked. Fails if /etc/group cannot be read.
add_account() {
    local name="$1" login_shell=/bin/sh
    if [ -x /bin/bash ]; then
        login_shell=/bin/bash
    fi
    find_line /etc/group "$name" || return
    # adduser is BusyBox's.
    if [ -z "$line" ]; then
        run useradd -m -s $login_shell "$name" ||
            run adduser -D -s $login_shell "$name" ||
            return 0
    else
        run useradd -m -s $login_shell -g "$name" "$name" ||
            run adduser -D -s $login_shell -G "$name" "$name" ||
            return 0
    fi
}

# is_system_account LOGIN_DEFS: whether the $account is not for people, by its $uid. UID_MIN is in
# /etc/login.defs, whose text is given.
is_system_account() {
    local each least=1000 IFS="$NEWLINE"
    for each in $1; do
        squeeze "$each"
        case $value in
        'UID_MIN '*)
            if is_number "${value#* }"; then
                least=${value#* }
            fi
            ;;
        esac
    done
    # These are of nobody, and of other accounts of distributions.
    if [ "$uid" -gt 60000 ] && [ "$uid" -lt 65536 ]; then
        return 0
    fi
    [ "$uid" -lt "$least" ]
}

# unlock_account: unlock the $account: without PAM, sshd refuses the keys of one that is locked. Can
# fail.
#
# A '!' in front of the $password_field locks an account. A '*' there does not lock it, but no
# password matches it.
unlock_account() {
    case $password_field in
    '!'*) ;;
    *) return 0 ;;
    esac
    if say "$account:*" | run chpasswd -e; then
        return 0
    fi
    run usermod -p '*' "$account" || fail "neither chpasswd nor usermod unlocked $account"
}

# authorize_keys: add the $keys to the file where sshd looks for those of the $account, unless they
# are there; can fail
authorize_keys() {
    local path folder each lines key blob type_and_blob owner="$uid:$gid" mode=600 IFS="$NEWLINE"
    find_keys_file || return
    path=$value
    folder=${path%/*}
    for each in "$folder" "$path"; do
        if [ -L "$each" ]; then # a user could have root write elsewhere
            fail "$each: a symlink is in the way" || return
        fi
    done
    make_keys_folder "$folder" || return
    if ! is_in_home "$path"; then # a file of root's, which the user has to be able to read
        owner=''
        mode=644
    fi
    read_file "$path" || return
    lines=$text
    if [ -n "$lines" ]; then
        lines=$lines$NEWLINE
    fi
    for key in $keys; do
        blob=${key#* }
        blob=${blob%% *}
        type_and_blob="${key%% *} $blob" # without the comment
        case $NEWLINE$lines in
        *"$NEWLINE$type_and_blob "*) ;;        # it is there, with a comment
        *"$NEWLINE$type_and_blob$NEWLINE"*) ;; # or without one
        *) lines=$lines$key$NEWLINE ;;
        esac
    done
    write_file "$path" $mode "$owner" printf %s "$lines" || return
    restore_labels user "$folder"
}

# find_keys_file: sets $value to the file where sshd looks for the keys of the $account. Fails if it
# looks nowhere.
#
# It may look in several. The usual one is taken if it is among them, or else the first.
find_keys_file() {
    local default="$home/.ssh/authorized_keys" patterns='.ssh/authorized_keys' each first=''
    local IFS="$NEWLINE"
    ask_sshd "$account"
    for each in $value; do
        case $each in
        'authorizedkeysfile '*) patterns=${each#* } ;;
        esac
    done
    IFS=' ' # split into words
    for each in $patterns; do
        if expand_pattern "$each"; then
            if [ "$value" = "$default" ]; then
                return 0
            fi
            first=${first:-$value}
        fi
    done
    value=$first
    [ -n "$value" ] || fail 'sshd looks for keys in no file'
}

# expand_pattern PATTERN: sets $value to the path that a word of AuthorizedKeysFile stands for, such
# as %h/.ssh/keys, for the $account, its $uid and its $home. Returns 1 if it is 'none', or has a '%'
# that is not known here.
expand_pattern() {
    local rest="$1"
    value=''
    [ "$1" != none ] || return 1
    while [ "${rest%%'%'*}" != "$rest" ]; do # there is a '%' in it
        value=$value${rest%%'%'*}
        rest=${rest#*'%'}
        case $rest in
        h*) value=$value$home ;;
        u*) value=$value$account ;;
        U*) value=$value$uid ;;
        %*) value=$value% ;;
        *) return 1 ;;
        esac
        rest=${rest#?}
    done
    value=$value$rest
    case $value in
    /*) ;;
    *) value=$home/$value ;;
    esac
}

# ask_sshd NAME: sets $value to how sshd is configured for a user, lines of 'keyword value'; '' if
# it does not tell.
#
# At the first boot, sshd may have no host keys yet. It then tells nothing without -G, which it has
# since OpenSSH 9.3.
ask_sshd() {
    local connection="user=$1,host=localhost,addr=127.0.0.1,laddr=127.0.0.1,lport=22"
    read_output sshd -T -G -C "$connection"
    if [ -z "$value" ]; then
        read_output sshd -T -C "$connection"
    fi
}

# is_in_home PATH: whether it is below the $home
is_in_home() {
    case $1 in
    "$home"/*) ;;
    *) return 1 ;;
    esac
}

# make_keys_folder FOLDER: make the $home, and the folder of the keys, with modes that sshd accepts;
# can fail
make_keys_folder() {
    local folder="$1" each="$1"
    make_home || return
    make_readable_folder "$folder" || return
    if is_in_home "$folder"; then
        while is_in_home "$each"; do # for ~/.ssh/keys: that, and ~/.ssh
            run_or_fail "$folder" chown -h "$uid:$gid" "$each" || return
            each=${each%/*}
        done
        run_or_fail "$folder" chmod 700 "$folder" || return
        run_or_fail "$folder" chmod u+rwx,go-w "$home"
    fi
}

# make_home: make the $home, unless it is there and the user's; can fail
#
# If it is root's, useradd was interrupted: finish its work. If it is somebody else's, fail: the
# keys in it would be theirs.
make_home() {
    local owner_of_home
    if [ -d "$home" ]; then
        find_owner "$home"
        owner_of_home=$value
        if [ "$owner_of_home" = "$uid" ]; then
            return 0
        fi
        resolve_symlink "$home" || return
        case $owner_of_home:$value in
        0:/*/?*) ;; # not / or /usr, which have to stay root's
        *) fail "$home: belongs to another user" || return ;;
        esac
    else
        make_readable_folder "$home" || return
    fi
    if [ -d /etc/skel ]; then
        run_or_fail "$home" cp -R -p /etc/skel/. "$home" || return
    fi
    run_or_fail "$home" chown -R -h "$uid:$gid" "$home" || return
    restore_labels user "$home"
}

# finish_home: make the $home of a user who logs in with a password, which also works without a home
finish_home() {
    make_home || complain "user: $reason"
}

# find_owner FOLDER: sets $value to the number of the user that owns it, not a symlink to it. ls
# prints for example:
#     drwxr-x--- 3 1000 1000 4096 Nov 27 10:00 /home/azureuser
find_owner() {
    local IFS=' '
    read_output ls -L -ldn "$1" # stat is not everywhere
    # shellcheck disable=SC2086 # split into words
    set -- $value
    value=${3-}
}

# make_readable_folder FOLDER: make it, and those above it, so that everybody may list and enter
# them; can fail
make_readable_folder() {
    (
        umask 022
        run mkdir -p "$1"
    ) || fail "cannot make $1"
}

# run_or_fail PATH COMMAND [ARGUMENT]...: run a command for a path, which the reason names; can fail
run_or_fail() {
    local path="$1"
    shift
    run "$@" || fail "cannot make $path"
}

# restore_labels STEP PATH: give a path, and all in it, the labels of SELinux, if there is SELinux
restore_labels() {
    if has_command restorecon && ! run restorecon -R "$2"; then
        complain "$1: restorecon failed for $2"
    fi
}

# join_groups NAME: add the user to those of the EXTRA_GROUPS that are there; can fail
join_groups() {
    local group IFS=','
    for group in $EXTRA_GROUPS; do
        find_line /etc/group "$group" || return
        if [ -z "$line" ]; then
            complain "user: there is no group $group"
        elif ! run usermod -a -G "$group" "$1" && ! run addgroup "$1" "$group"; then
            fail "neither usermod nor addgroup added $1 to $group" || return
        fi
    done
}

# grant_root NAME: let the user become root without a password, with sudo or else with doas; can
# fail
#
# visudo and doas check the rule before it is written. If neither accepts it, that is no failure, as
# the user can log in.
grant_root() {
    local rule="$1 ALL=(ALL:ALL) NOPASSWD:ALL" path=/etc/doas.conf mode=440 rules
    # With sudo and doas, the last rule that fits counts. So the names of our files begin with zz.
    if say "$rule" | run visudo -q -c -f /dev/stdin; then
        write_file /etc/sudoers.d/zz-azure-provisioning 440 '' printf '%s\n' "$rule" || return
        restore_labels user /etc/sudoers.d/zz-azure-provisioning
        remove_former /etc/sudoers.d/azure-provisioning || return
        check_sudo "$1"
        return 0
    fi
    if [ -d /etc/doas.d ]; then
        path=/etc/doas.d/zz-azure-provisioning.conf
    fi
    read_file "$path" || return
    add_last_line "$text" "permit nopass $1"
    rules=$value
    if say "$rules" | run doas -C /dev/stdin; then
        resolve_symlink "$path" || return
        path=$value
        if [ -e "$path" ]; then
            mode='' # keeps the one it has
        fi
        write_file "$path" "$mode" '' printf '%s\n' "$rules" || return
        restore_labels user "$path"
        remove_former /etc/doas.d/azure-provisioning.conf || return
        return 0
    fi
    complain "user: neither sudo nor doas takes a rule for $1"
}

# remove_former FILE: remove the file in which an earlier version of this program wrote its rule;
# can fail
remove_former() {
    if [ -e "$1" ] || [ -L "$1" ]; then
        run rm -f "$1" || fail "cannot remove $1"
    fi
}

# check_sudo NAME: complain if sudo does not give the user all rights: another rule may come behind
# ours
check_sudo() {
    if [ -n "$DRY_RUN" ]; then
        return 0
    fi
    read_output sudo -n -l -U "$1"
    case $value in
    *'(ALL : ALL) NOPASSWD: ALL' | *'(ALL) NOPASSWD: ALL') ;; # the last rule is printed last
    *) complain "user: sudo does not say that $1 may do all without a password" ;;
    esac
}

# add_last_line TEXT LINE: sets $value to a text that ends with the line
add_last_line() {
    case $1 in
    '' | "$2") value=$2 ;;
    *"$NEWLINE$2") value=$1 ;;
    *) value=$1$NEWLINE$2 ;;
    esac
}

# ---- The DVD: ovf-env.xml ----------------------------------------------------------------------

DVD_FOLDER=/run/azure-provisioning/dvd
OVF_FILE=$DVD_FOLDER/ovf-env.xml
DATA_LIMIT=122880 # bytes of ovf-env.xml or user data, at most: enough for 64 KiB in base64
OVF_PATH=ProvisioningSection/LinuxProvisioningConfigurationSet

# request_dvd: read ovf-env.xml on the DVD, for find_text: one attempt for retry; can fail
request_dvd() {
    local element paths=''
    mount_dvd || return
    # The shell would drop a NUL byte: tr makes it INVALID.
    body=''
    if [ -f "$OVF_FILE" ]; then
        { body=$(tr '\000' "$INVALID" <"$OVF_FILE") || body=''; } 2>/dev/null
    fi
    umount "$DVD_FOLDER" # if it fails, the next mount_dvd finds the DVD mounted
    [ -n "$body" ] || fail 'ovf-env.xml: cannot be read' || return
    if [ "${#body}" -gt "$DATA_LIMIT" ] || ! may_be_utf_8; then
        fail 'ovf-env.xml: not an OVF environment' || return
    fi
    for element in HostName UserName UserPassword DisableSshPasswordAuthentication CustomData \
        SSH/PublicKeys/PublicKey/Value; do
        paths="$paths $OVF_PATH/$element"
    done
    read_xml Environment "$paths" || fail 'ovf-env.xml: not an OVF environment'
}

# find_dvd_text PATH: sets $value to the text of the first element at a path on the DVD, with its
# entities decoded; '' if there is none
find_dvd_text() {
    find_text "$OVF_PATH/$1"
    decode_entities "$value"
}

# decode_entities TEXT: sets $value to a text of read_xml with the entities decoded, such as &amp;
# and &#13; and &#xD;. Any other '&' becomes INVALID.
decode_entities() {
    local piece character is_first=yes IFS='&'
    value=''
    for piece in $1; do # IFS cuts at each '&': TEXT, amp;TEXT, ...
        if [ -n "$is_first" ]; then
            value=$piece
            is_first=''
        else
            find_character "$piece" || character=$INVALID
            value=$value$character${piece#*;}
        fi
    done
    case $1 in
    *'&') value=$INVALID ;; # the loop does not see an empty piece at the end
    esac
}

# find_character PIECE: sets its caller's $character to what the entity before the first ';' stands
# for: amp, or #38, or #x26. Returns 1 if that is not ASCII, or a NUL byte.
find_character() {
    local entity="${1%%;*}" code=''
    if [ "$entity" = "$1" ]; then # no ';'
        return 1
    fi
    case $entity in
    amp) character='&' ;;
    lt) character='<' ;;
    gt) character='>' ;;
    quot) character='"' ;;
    apos) character="'" ;;
    '#x0' | '#x00') return 1 ;;
    '#x'[0-9A-Fa-f] | '#x'[0-7][0-9A-Fa-f]) code=$((0x${entity#'#x'})) ;;
    '#'[1-9] | '#'[1-9][0-9] | '#1'[01][0-9] | '#12'[0-7]) code=${entity#'#'} ;;
    *) return 1 ;;
    esac
    if [ -n "$code" ]; then
        code=$(printf %o "$code")          # 38 is 46 in octal, and \046 is &
        character=$(printf %b "\\0$code.") # the '.' keeps a line feed
        character=${character%.}
    fi
}

# may_be_utf_8: whether the $body can be UTF-8: it is ASCII alone, or names no other encoding. It
# would name one in its declaration: <?xml version="1.0" encoding="UTF-16"?>
may_be_utf_8() {
    local ascii declaration
    ascii=$(printf '\001-\177') # the range from \001 to \177
    case $body in
    *[!$ascii]*) ;;
    *) return 0 ;;
    esac
    case $body in
    *'<?xml'*) declaration=${body#*'<?xml'} ;;
    *) return 0 ;;
    esac
    case ${declaration%%'?>'*} in
    *encoding*=*[\"\'][Uu][Tt][Ff]-8[\"\']*) ;;
    *encoding*=*[\"\'][Uu][Ss]-[Aa][Ss][Cc][Ii][Ii][\"\']*) ;;
    *encoding*=*) return 1 ;;
    esac
}

# mount_dvd: mount the DVD where only root can see it, also in a dry run, unless an earlier umount
# failed. Can fail.
mount_dvd() {
    if [ -e "$OVF_FILE" ]; then
        return 0
    fi
    if ! mkdir -p "$DVD_FOLDER" || ! has_dvd_drive ||
        ! mount -t udf,iso9660 -o ro,nosuid,nodev,noexec /dev/sr0 "$DVD_FOLDER"; then
        fail 'ovf-env.xml: no DVD'
    fi
}

# ---- Step password -----------------------------------------------------------------------------

SSHD_CONFIG=/etc/ssh/sshd_config
SSHD_DEFAULT=/usr/etc/ssh/sshd_config # of openSUSE; counts if there is none in /etc
SSHD_DROP_INS='/etc/ssh/sshd_config.d/*.conf'
OUR_DROP_IN=/etc/ssh/sshd_config.d/00-azure-provisioning.conf
# Each of them can allow passwords. Since OpenSSH 8.7, the last two are one setting.
SSHD_KEYWORDS='PasswordAuthentication ChallengeResponseAuthentication KbdInteractiveAuthentication'

# set_password: set the password of the admin user, and have sshd take passwords or not; can fail
set_password() {
    local name password is_given=''
    say 'Retrieving password from the DVD'
    retry password "$DVD_ATTEMPTS" required request_dvd || return
    find_dvd_text UserName
    squeeze "$value"
    name=$value
    is_user_name "$name" || fail 'no valid user name' || return
    find_dvd_text UserPassword
    password=$value
    if has_control_character "$password" || [ "${#password}" -gt 72 ]; then # bytes; Azure's limit
        fail 'no valid password' || return
    fi
    # What stands in place of a password: nothing, as with a key; and in copies of ovf-env.xml, what
    # cloud-init and the Azure agent write.
    case $password in
    '' | REDACTED | '*') ;;
    *)
        store_password "$name" "$password" || return
        say_done 'Password set'
        is_given=yes
        ;;
    esac
    find_password_ban
    if [ "$value" = true ]; then
        configure_sshd "$name" no
    elif [ "$value" = false ] || [ -n "$is_given" ]; then
        configure_sshd "$name" yes
    fi
}

# print_secret LINE: print a line that may be secret. All users can see the arguments of a program.
# So this has to be a command of the shell itself. In mksh, that is print, as printf is a program.
print_secret() {
    if [ "$(command -v print)" = print ]; then # a program has a path
        # shellcheck disable=SC2039,SC3045 # print is there
        print -r -- "$1"
    else
        printf '%s\n' "$1"
    fi 2>/dev/null # the reader may be gone
}

# store_password NAME PASSWORD: set the password of a user. Fails if chpasswd fails, for example if
# PAM refuses it.
store_password() {
    local hash
    print_secret "$1:$2" | run chpasswd || fail 'chpasswd failed' || return
    find_line /etc/shadow "$1" || return
    if [ -z "$line" ]; then
        find_line /etc/passwd "$1" || return
    fi
    hash=${line#*:} # the second field
    hash=${hash%%:*}
    # The old hash of BusyBox uses only eight characters of the password.
    case $hash in
    *'$'*) return 0 ;; # not the old one
    esac
    if [ "${#hash}" -eq 13 ]; then
        print_secret "$1:$2" | run chpasswd -c SHA512 || fail 'chpasswd failed'
    fi
}

# configure_sshd NAME yes|no: have sshd take passwords, or not, by all of the SSHD_KEYWORDS; can
# fail
#
# Of several lines for one setting, sshd takes the first. So ours stand in a drop-in that it reads
# before all else, or at the top of its configuration.
configure_sshd() {
    local config="$SSHD_CONFIG" our_lines='' keyword path
    if [ ! -f "$config" ]; then
        config=$SSHD_DEFAULT
    fi
    if [ ! -f "$config" ]; then
        if [ "$2" = no ] && has_command dropbear; then
            complain 'password: dropbear still accepts passwords'
        fi
        return 0
    fi
    for keyword in $SSHD_KEYWORDS; do
        our_lines="$our_lines$keyword $2$NEWLINE"
    done
    read_file "$config" || return
    if includes_drop_ins; then
        path=$OUR_DROP_IN
        write_file "$path" 600 '' printf %s "$our_lines" || return
    elif [ "$config" = "$SSHD_DEFAULT" ]; then # it belongs to the distribution: not to be changed
        fail "$SSHD_DEFAULT: no Include $SSHD_DROP_INS at the top" || return
    else
        drop_our_lines
        resolve_symlink "$SSHD_CONFIG" || return
        path=$value
        if [ -n "$text" ]; then
            text=$text$NEWLINE
        fi
        write_file "$path" '' '' printf %s "$our_lines$text" || return
    fi
    restore_labels password "$path"
    say_done "PasswordAuthentication: $2"
    reload_sshd
    check_sshd "$1" "$2"
}

# includes_drop_ins: whether the first line of the $text that is no comment includes the drop-ins
includes_drop_ins() {
    local each IFS="$NEWLINE"
    for each in $text; do
        squeeze "$each"
        case $value in
        '' | '#'*) ;;
        [Ii][Nn][Cc][Ll][Uu][Dd][Ee]' '*)
            has_word "$SSHD_DROP_INS" "$value" || return 1
            return 0
            ;;
        *)
            return 1
            ;;
        esac
    done
    return 1
}

# drop_our_lines: take our lines of an earlier run from the top of the $text
drop_our_lines() {
    local first
    while :; do
        first=${text%%"$NEWLINE"*}
        has_word "${first%% *}" "$SSHD_KEYWORDS" || return 0
        case $text in
        *"$NEWLINE"*) text=${text#*"$NEWLINE"} ;;
        *) text='' ;;
        esac
    done
}

# check_sshd NAME yes|no: ask sshd what its configuration means for the user
#
# Fails if it refuses passwords after yes, or accepts them in any way after no. Other lines may
# count more than ours: those in a Match, or in a file that sshd reads before.
check_sshd() {
    if [ -n "$DRY_RUN" ] || ! has_command sshd; then
        return 0
    fi
    ask_sshd "$1"
    if [ -z "$value" ]; then
        complain 'password: sshd does not tell what it does' # see ask_sshd
        return 0
    fi
    if [ "$2" = yes ] && has_line 'passwordauthentication no' "$value"; then
        fail "sshd still refuses passwords from $1" || return
    fi
    if [ "$2" = no ]; then
        if has_line 'passwordauthentication yes' "$value" ||
            has_line 'challengeresponseauthentication yes' "$value" ||
            has_line 'kbdinteractiveauthentication yes' "$value"; then
            fail "sshd still accepts passwords from $1"
        fi
    fi
}

# has_line LINE TEXT: whether it is one of the text's lines
has_line() {
    case $NEWLINE$2$NEWLINE in
    *"$NEWLINE$1$NEWLINE"*) ;;
    *) return 1 ;;
    esac
}

# resolve_symlink PATH: sets $value to the path where a symlink leads to, or else to the same path.
# Fails if that cannot be found out.
resolve_symlink() {
    value=$1
    if [ -L "$1" ] || [ -e "$1" ]; then
        value=$(readlink -f "$1") || fail "cannot read $1"
    fi
}

# reload_sshd: have sshd read its configuration again, if it is running. If not, it will at its
# start.
reload_sshd() {
    run systemctl try-reload-or-restart sshd.service ||
        run systemctl try-reload-or-restart ssh.service ||
        run rc-service --ifstarted sshd reload ||
        return 0
}

# ---- Step data ---------------------------------------------------------------------------------

STATE_FOLDER=/var/lib/azure-provisioning

# save_data: save the user data of IMDS, if any; and the custom data, if there is a DVD. Can fail.
save_data() {
    say 'Retrieving user data from IMDS'
    retry data "$ATTEMPTS" optional request_leaf userData "$DATA_LIMIT" || return
    save_decoded userData "$STATE_FOLDER/user-data" "$value" || return
    say 'Retrieving custom data from the DVD'
    if retry data "$DVD_ATTEMPTS" required request_dvd; then # a VM may be without a DVD
        find_dvd_text CustomData
        save_decoded customData "$STATE_FOLDER/custom-data" "$value"
    fi
}

# save_decoded LABEL FILE TEXT: decode a text in base64, and write it to a file. If it is '', remove
# an earlier VM's file. Can fail.
save_decoded() {
    remove_white_space "$3"
    is_base64 "$value" || fail "$1: no base64" || return
    if [ -n "$value" ]; then
        write_file "$2" 600 '' decode_base64 "$value" || return
        say_done "$1: $2"
    else
        run rm -f "$2" || fail "cannot remove $2" || return
        say_done "$1: none"
    fi
}

# remove_white_space TEXT: sets $value to the text without white space
remove_white_space() {
    local IFS="$WHITE_SPACE"
    # shellcheck disable=SC2086 # split into words
    set -- $1
    IFS='' # nothing stands between the words of $*
    value="$*"
}

# is_base64 TEXT: whether it is base64 as an encoder writes it: padded, with all unused bits 0. Four
# bits are unused in the character before '==', and two in the one before '='.
is_base64() {
    case $1 in
    *[!A-Za-z0-9+/=]* | *=[!=]* | *===*) return 1 ;;
    *[!AQgw]==) return 1 ;; # an unused bit is 1
    *[!AEIMQUYcgkosw048=]=) return 1 ;;
    esac
    [ $((${#1} % 4)) -eq 0 ]
}

# decode_base64 TEXT: print what it encodes
decode_base64() {
    print_secret "$1" | base64 -d
}

# ---- Step publish ------------------------------------------------------------------------------

# publish_hostname: have the DHCP client of the default route's interface tell its server the
# hostname; can fail
#
# If the client fails, it is asked once more, as nmcli fails now and then.
publish_hostname() {
    local interface client name
    find_interface
    [ -n "$interface" ] || fail 'no default route' || return
    find_client
    [ -n "$client" ] || fail "no known DHCP client has $interface" || return
    name=$(uname -n) || fail 'uname failed' || return
    if ! tell_server; then
        sleep 1
        tell_server ||
            fail "$client did not tell the DHCP server of $interface the hostname" || return
    fi
    if [ "$client" = nmcli ]; then
        say_done "nmcli has NetworkManager tell the DHCP server of $interface the hostname $name"
    else
        say_done "The DHCP server of $interface knows the hostname $name, from $client"
    fi
}

# find_interface: sets $interface to that of the first default route, '' if there is none
find_interface() {
    local name destination mask _
    interface=''
    # Interface, destination, gateway, flags, references, use, metric, mask and more
    while read -r name destination _ _ _ _ _ mask _; do
        if [ "$destination" = 00000000 ] && [ "$mask" = 00000000 ]; then
            interface=$name
            return 0
        fi
    done 2>/dev/null </proc/self/net/route
}

# find_client: sets $client to the command of the DHCP client that has $interface, '' if no known
# one has it
find_client() {
    local each
    client=''
    networkd_lease
    if [ -f "$value" ]; then
        client=networkctl
        return 0
    fi
    read_output nmcli -g DHCP4.OPTION device show "$interface"
    if [ -n "$value" ]; then
        client=nmcli
        return 0
    fi
    dhcpcd_lease
    if [ -f "$DHCPCD_PID" ] && [ -f "$value" ]; then
        client=dhcpcd
        return 0
    fi
    for each in dhclient udhcpc; do
        find_process "$each"
        if [ -n "$value" ]; then
            client=$each
            return 0
        fi
    done
}

DHCPCD_PID=/run/dhcpcd/pid # of a dhcpcd for all interfaces; one for a single interface ignores -h

# dhcpcd_lease: sets $value to the path of dhcpcd's lease for $interface, a file that stays when
# dhcpcd ends
dhcpcd_lease() {
    value=/var/lib/dhcpcd/$interface.lease
}

# networkd_lease: sets $value to the path of systemd-networkd's lease for $interface, a file that
# goes when systemd-networkd ends
networkd_lease() {
    read_output cat "/sys/class/net/$interface/ifindex"
    value=/run/systemd/netif/leases/$value
}

# find_process CLIENT: sets $value to the first process of a client for $interface, '' if there is
# none. For example:
#     812 /sbin/dhclient -4 -q -pf /run/dhclient.eth0.pid eth0
find_process() {
    read_output pgrep -a -f "^([^ ]*/)?(busybox )?$1 (.* )?$interface( |\$)"
    value=${value%%"$NEWLINE"*}
}

# tell_server: have $client tell its server the hostname, its caller's $name; returns whether the
# server knows it
#
# NetworkManager does not show that; for nmcli, returns whether it took the command.
tell_server() {
    case $client in
    networkctl) # networkd takes the hostname from the kernel
        networkd_lease
        renew_lease "$value" networkctl reconfigure "$interface"
        ;;
    nmcli)
        run nmcli device modify "$interface" ipv4.dhcp-hostname "$name"
        ;;
    dhcpcd)
        dhcpcd_lease
        renew_lease "$value" dhcpcd -n -h "$name" "$interface"
        ;;
    dhclient)
        run_second_dhclient
        ;;
    udhcpc)
        # The running udhcpc cannot be given a hostname. So run a second one, which asks once, and
        # ends. Instead of the script that sets up the interface, it runs /bin/true.
        run udhcpc -n -q -f -i "$interface" -x "hostname:$name" -s /bin/true
        ;;
    esac
}

# renew_lease LEASE COMMAND [ARGUMENT]...: run a command that has a client ask for a new lease;
# returns whether it comes in 5 seconds
renew_lease() {
    local lease="$1" old waited=0
    shift
    read_file_version "$lease"
    old=$value
    run "$@" || return
    if [ -n "$DRY_RUN" ]; then
        return 0
    fi
    read_file_version "$lease"
    while [ -z "$value" ] || [ "$value" = "$old" ]; do # it is gone, or not written again yet
        if [ $waited = 5 ]; then
            return 1
        fi
        sleep 1
        waited=$((waited + 1))
        read_file_version "$lease"
    done
}

# read_file_version FILE: sets $value to a text that changes when the file is written again, '' if
# there is no file
read_file_version() {
    read_output ls -l -i --full-time "$1"
}

# run_second_dhclient: run a second dhclient, as the running one cannot be asked
#
# Returns whether the server has heard it. The second one has the arguments of the running one, and
# its identity (DUID), so that it gets the same address. It does not have the lease, as it would use
# that and ask nobody. Instead of the script that sets up the $interface, it runs /bin/true.
run_second_dhclient() {
    local IFS=' ' words leases configuration identity second_leases pid_file word is_told=''
    find_process dhclient
    [ -n "$value" ] || return # it has ended
    words=${value#* }
    words=${words#* } # without PID and command
    find_value -lf "$words"
    leases=${value:-/var/lib/dhcp/dhclient.leases}
    find_value -cf "$words"
    configuration=${value:-/etc/dhcp/dhclient.conf}
    # Without this line, dhclient would not send the hostname.
    read_output grep -x 'send host-name = gethostname();' "$configuration"
    [ -n "$value" ] || return
    read_output sed -n '/^default-duid /p' "$leases"
    identity=$value
    second_leases=$leases.second
    pid_file=$second_leases.pid
    set --
    for word in $words; do
        case $word in
        -d | -nw) ;; # so that it waits for an answer
        *) set -- "$@" "$word" ;;
        esac
    done
    set -- "$@" -q -sf /bin/true -pf "$pid_file" -lf "$second_leases"
    if write_file "$second_leases" 600 '' printf '%s\n' "$identity"; then
        # dhclient -1 asks, and goes on in the background. dhclient -x ends that one.
        if run dhclient "$@" -1 && run dhclient "$@" -x; then
            is_told=yes
        fi
    fi
    run rm -f "$second_leases" "$pid_file"
    [ -n "$is_told" ]
}

# find_value OPTION WORDS: sets $value to the word behind the option, '' if the option is not there
find_value() {
    local IFS=' ' word previous=''
    value=''
    for word in $2; do
        if [ "$previous" = "$1" ]; then
            value=$word
            return 0
        fi
        previous=$word
    done
}

# ---- Step remember -----------------------------------------------------------------------------

VM_ID_FILE=$STATE_FOLDER/vm-id

# remember_vm: save the id of this VM, by which later runs know that it is provisioned; can fail
remember_vm() {
    read_vm_id
    [ -n "$vm_id" ] || fail 'cannot read /sys/class/dmi/id/product_uuid' || return
    sync_all
    write_file "$VM_ID_FILE" 600 '' printf '%s\n' "$vm_id" || return
    say_done "Remembered: $vm_id"
}

# is_remembered: whether an earlier run on this VM has done the step remember; says so
is_remembered() {
    local remembered
    read_file "$VM_ID_FILE" || return 1
    remembered=$text
    read_vm_id
    swap_bytes "$vm_id"
    case $remembered in
    '') return 1 ;;
    "$vm_id" | "$value") say "Already provisioned: $remembered" ;;
    *) return 1 ;;
    esac
}

# swap_bytes ID: sets $value to an id with the bytes of its first three groups in the other order.
#
# 00112233-4455-6677-... becomes 33221100-5544-7766-..., and the other way round. Firmware shows the
# id of a VM in one order or the other. An update may change it.
swap_bytes() {
    value=$(printf '%s\n' "$1" | sed \
        's/^\(..\)\(..\)\(..\)\(..\)-\(..\)\(..\)-\(..\)\(..\)-/\4\3\2\1-\6\5-\8\7-/')
}

main "$@"
