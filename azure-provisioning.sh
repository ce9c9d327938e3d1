#!/bin/sh
# azure-provisioning.sh: the provisioning agent in one file.
# azure-provisioning.py is the same program in Python, with the same sections and functions.
#
# Arguments, settings and exit statuses: see USAGE. Errors: a step that fails says so on stderr.
# Needs sleep, and curl; or wget, with timeout, head and tr. If hostnamectl fails, it needs chmod,
# hostname, mkdir, mv, rm and sync. The other steps also need base64, cat, chown, cp, date, ls,
# mount, readlink, sed, tr and umount; publish needs grep and uname.
# Sources: https://learn.microsoft.com/azure/virtual-machines/linux/no-agent for the WireServer,
# .../linux/provisioning for the DVD, .../instance-metadata-service for IMDS.
#
# How to read this file:
# - UPPERCASE variables are settings and constants.
# - A local variable can also be used by the functions that are called; their comments say "its $x".
# - The comment above a function names the other variables that it sets for its caller. A function
#   that finds or makes one text sets $value.
# - A function "can fail": it sets $reason, for the message, and returns 1. `fail` does both:
#       CHECK || fail 'the reason' || return
# - Other functions answer a question, or try something: they return 0 or 1, and set no $reason.
# - A text is split with a local IFS. The functions that are called while it is set do not split, or
#   have an IFS of their own.

# shellcheck disable=SC3043 # local: dash, BusyBox ash, Bash and mksh have it

VERSION=2.0.0

USAGE='usage: azure-provisioning [-n | --dry-run] [STEP]...
       azure-provisioning -h | --help | --version

Provision this Linux VM on Azure. The steps run in the order given; the default
is: ready hostname disable. The first step that fails ends the run. If "ready"
comes after it, and not before, Azure is told NotReady, with the reason.

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
has_reply=''     # whether any server has answered so far
quick_looks=1200 # at the routes, ten in a second, until one in a second is enough

CONNECT_LIMIT=3   # seconds of the timeout, at most, to connect
BODY_LIMIT=65536  # bytes of a reply's body
ENOUGH_ABSENCES=5 # IMDS has to say this many times that it has no such value
NEWLINE='
'
CARRIAGE_RETURN=$(printf '\r')
SPACE=$(printf ' \t\n\r') # the characters that are white space in XML
BYTE_ORDER_MARK=$(printf '\357\273\277')

# This character stands for a text that must not be used. No value with it is valid.
INVALID=$(printf '\001')

# ---- Messages and failures ---------------------------------------------------------------------

# say LINE...: print lines to stdout. The VM is provisioned whether or not somebody reads them.
say() {
    { printf '%s\n' "$@" || :; } 2>/dev/null
}

# complain LINE...: print lines to stderr
complain() {
    say "$@" >&2
}

# fail REASON: sets $reason, which is that of no attempt; returns 1
fail() {
    reason=$1
    last_attempt=''
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
    trap '' PIPE # go on if nobody reads the output
    parse_arguments "$@"
    check_settings
    if has_word remember "$steps" && is_remembered; then
        return 0
    fi
    run_steps
}

# find_step NAME: sets $function to the function of a step, or returns 1: the table of all steps
find_step() {
    case $1 in
    ready) function=report_ready ;;
    hostname) function=set_hostname ;;
    disable) function=disable_unit ;;
    user) function=create_user ;;
    password) function=set_password ;;
    data) function=save_data ;;
    publish) function=publish_hostname ;;
    remember) function=remember_vm ;;
    *) return 1 ;;
    esac
}

# parse_arguments [ARGUMENT]...: sets $steps, and DRY_RUN. The first -h, --version or mistake ends
# the program.
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
            exit
            ;;
        --version)
            say "azure-provisioning $VERSION"
            exit
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
    local address="${2#http://}"
    case $2 in
    http://*) ;;
    *) usage_error "bad $1" ;;
    esac
    case $address in
    '' | :* | /* | *//* | *[!A-Za-z0-9._~:/-]*) usage_error "bad $1" ;;
    esac
    address=${address%%/*} # HOST[:PORT]
    case $address in
    *:??????*) usage_error "bad $1" ;; # more than five digits
    *:*) check_number "$1" "${address#*:}" 1 ;;
    esac
}

# check_number NAME NUMBER LEAST: a usage error if it is no number of up to six digits, without
# leading zeros
check_number() {
    case $2 in
    '' | *[!0-9]* | 0?*) usage_error "bad $1" ;;
    esac
    if [ "${#2}" -gt 6 ] || [ "$2" -lt "$3" ]; then
        usage_error "bad $1"
    fi
}

# check_groups NAME GROUPS: a usage error if they are not valid names of groups, separated by
# commas, or ''
check_groups() {
    local group IFS=','
    case $2 in
    *[!A-Za-z0-9._,-]* | ,* | *, | *,,*) usage_error "bad $1" ;;
    esac
    for group in $2; do
        case $group in
        [!A-Za-z_]* | ?????????????????????????????????*) usage_error "bad $1" ;; # 33 characters
        esac
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
                report_not_ready "$step: $reason$last_attempt"
            fi
            return 1
        fi
    done
}

# run_step STEP: run a step; can fail. It may set $last_attempt, why the last attempt failed, to be
# added where Azure is told the reason.
run_step() {
    reason='unknown error' # in case that a function returns 1 by mistake
    last_attempt=''
    find_step "$1"
    "$function"
}

# has_word WORD WORDS: whether it is one of the words
has_word() {
    case " $2 " in
    *" $1 "*) ;;
    *) return 1 ;;
    esac
}

# ---- Commands and files ------------------------------------------------------------------------

# has_command NAME: whether there is such a program on PATH
has_command() {
    command -v "$1" >/dev/null
}

# run COMMAND [ARGUMENT]...: run a command that changes the system; returns whether it is there and
# succeeds. A dry run prints the command instead.
run() {
    local IFS=' ' # stands between the words of $*
    has_command "$1" || return 1
    if [ -n "$DRY_RUN" ]; then
        say "Would run: $*"
        return
    fi
    "$@" || return 1
}

# run_twice COMMAND [ARGUMENT]...: run a command as run does. If it fails, try it again: D-Bus may
# not have been up.
run_twice() {
    if run "$@"; then
        return
    fi
    has_command "$1" || return 1
    sleep 1
    run "$@"
}

# ask COMMAND [ARGUMENT]...: sets $value to what a command prints, '' if it fails. It changes
# nothing.
ask() {
    value=$("$@" </dev/null 2>/dev/null) || value=''
}

# say_done LINE: print that something has been changed; a dry run does not print it
say_done() {
    if [ -z "$DRY_RUN" ]; then
        say "$1"
    fi
}

# write_file FILE MODE OWNER COMMAND [ARGUMENT]...: replace a file, or make a new one, by what the
# command prints. After a power cut it is the old one or the new one. MODE: '' keeps mode and
# owner of the old file. OWNER: UID:GID, or '': the new file is root's. Can fail.
write_file() {
    local file="$1" mode="$2" owner="$3" wait
    shift 3
    if [ -n "$DRY_RUN" ]; then
        say "Would write $file"
        return
    fi
    for wait in 1 1 0; do
        if [ $wait = 0 ]; then
            rm -f "$file.new" 2>/dev/null
        fi
        if replace_file "$@" 2>/dev/null; then
            return
        fi
        sleep $wait # another copy of this program may be writing the same file
    done
    rm -f "$file.new" 2>/dev/null
    fail "cannot write $file"
}

# replace_file COMMAND [ARGUMENT]...: do the work of write_file, with its $file, $mode and $owner
replace_file() {
    mkdir -p "${file%/*}" || return 1
    if [ -d "$file" ]; then # mv would put the new file into it
        return 1
    fi
    (
        set -C # the file must not be there; another copy of this program would lose it
        "$@" >"$file.new"
    ) || return 1
    if [ -n "$mode" ]; then
        if [ -n "$owner" ]; then
            chown -h "$owner" "$file.new" || return 1
        fi
        chmod "$mode" "$file.new" || return 1
    else
        copy_attributes || return 1
    fi
    sync_path "$file.new" || return 1 # before the rename, or a power cut could leave an empty file
    mv -f "$file.new" "$file" || return 1
    sync_path "${file%/*}"
}

# copy_attributes: give the new file the mode and the owner of the $file. cp also copies what is in
# it, so that the new content is written once more.
copy_attributes() {
    local content
    content=$(
        cat "$file.new" || exit 1
        echo . # keeps the line feeds at the end
    ) || return 1
    cp -p "$file" "$file.new" || return 1
    printf %s "${content%.}" >"$file.new"
}

# sync_path PATH: have the disk store a file, or the names of the files in a folder
sync_path() {
    if has_command sync; then
        sync "$1"
    fi
}

# ---- HTTP --------------------------------------------------------------------------------------

# exchange LABEL URL DATA LIMIT [--header HEADER]...: send a POST with the data, or a GET if they
# are ''; sets $status of the reply, 000 without one, and $body. Can fail: the reason has the
# label. Sets $no_reply if the server did not answer.
#
# Good is status 200, and for a POST any 2xx. The limit is that of the body, in bytes.
exchange() {
    local label="$1" url="$2" data="$3" limit="$4" problem
    shift 4
    set -- "$@" \
        --header "User-Agent: azure-provisioning/$VERSION" \
        --header 'Accept: */*' \
        --header 'Accept-Encoding: identity' \
        --header 'Connection: close'
    if has_command curl; then
        { take_reply "$(send_with_curl "$@")"; } 2>/dev/null
    elif has_command wget; then
        # head ends what has no end. The shell would drop a NUL byte: tr makes it INVALID.
        take_reply "$(send_with_wget "$@" 2>/dev/null |
            head -c $((limit + 100)) |
            tr '\000' "$INVALID")"
    else
        status=000
        problem='no curl or wget'
        hopeless=yes # see retry
    fi
    case $status:$problem in
    '000:no connection' | '000:timed out') no_reply=yes ;;
    *) has_reply=yes ;;
    esac
    case $status in # a bad status says more than what went wrong after it
    000 | 200) ;;
    2??) [ -n "$data" ] || fail "$label: HTTP $status" || return ;;
    *) fail "$label: HTTP $status" || return ;;
    esac
    [ "$problem" = none ] || fail "$label: $problem"
}

# send_with_curl [--header HEADER]...: send a request to its $url, with its $data. Prints the
# reply's body and three lines, for take_reply:
#     STATUS, 000 without a reply
#     SIZE of the body
#     PROBLEM, or none
send_with_curl() {
    local bytes_a_second connect_limit=$CONNECT_LIMIT
    if [ "$TIMEOUT" -lt "$connect_limit" ]; then
        connect_limit=$TIMEOUT
    fi
    if [ -n "$data" ]; then
        set -- "$@" --data-binary "$data"
    fi
    # Before curl 8.4, --max-filesize does not stop a body whose size is not announced. At this
    # rate, no more than four times the limit, and 4 KiB for each second, come within TIMEOUT.
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
    *) echo 'no connection' ;;
    esac
}

# send_with_wget [--header HEADER]...: the same with wget, of GNU or of BusyBox. It does not know
# the SIZE, which is empty then.
send_with_wget() {
    local said code status=000
    if [ -n "$data" ]; then
        set -- "$@" --post-data "$data"
    fi
    case $(wget --help 2>&1) in
    *--max-redirect*) # only GNU's has these
        set -- --no-config --tries=1 --max-redirect=0 --connect-timeout=$CONNECT_LIMIT "$@"
        ;;
    esac
    # wget's stdout, the body, becomes our stdout, by way of 3. Its stderr is caught in a variable.
    { said=$(timeout "$TIMEOUT" wget -q -S -Y off -O - "$@" "$url" 2>&1 >&3); } 3>&1
    code=$?
    case $said in # wget prints the head of the reply, with two spaces before each line
    *'  HTTP/1.'?' '[1-9][0-9][0-9]*)
        status=${said#*'  HTTP/1.'? }
        status=${status%%[!0-9]*}
        ;;
    *'  '*) code=no-http ;;
    esac
    printf '\n%s\n\n' "$status"
    case $status:$code in
    000:0 | *:no-http) echo 'broken reply' ;;
    *:0) echo none ;;
    *:124 | *:143) echo 'timed out' ;; # timeout's exit status: coreutils, BusyBox
    *) echo 'no connection' ;;
    esac
}

# take_reply REPLY: take apart what one of these printed; sets $status, $body and $problem
take_reply() {
    local rest="$1" size
    problem=${rest##*"$NEWLINE"}
    rest=${rest%"$NEWLINE"*}
    size=${rest##*"$NEWLINE"}
    rest=${rest%"$NEWLINE"*}
    status=${rest##*"$NEWLINE"}
    body=${rest%"$NEWLINE"*}
    case $status:$size in
    [0-9][0-9][0-9]: | [0-9][0-9][0-9]:*[0-9]) ;;
    *) # the end is missing: head has cut it off, or the client was killed
        status=000
        problem='no connection'
        if [ "${#1}" -gt "$limit" ]; then
            problem='reply too large'
        fi
        ;;
    esac
    if [ "${#body}" -gt "$limit" ]; then
        problem='reply too large'
    elif [ "$problem" = 'no connection' ] && [ "$status" != 000 ]; then
        problem='broken reply' # the connection was lost behind the status
    fi
    # The shell drops a NUL byte, and tr makes it INVALID: no value of such a body is used.
    if [ -n "$size" ] && [ "$size" != "${#body}" ]; then
        body=$INVALID
    fi
    case $body in
    *"$INVALID"*) body=$INVALID ;;
    esac
}

# ---- Attempts ----------------------------------------------------------------------------------

# retry STEP ATTEMPTS required|optional COMMAND [ARGUMENT]...: call the command until it does not
# fail. Can fail, after all attempts, or if the command has set $hopeless.
#
# The wait after the first attempt is 1 second, then 2, 3 and so on, up to INTERVAL.
# optional: IMDS may have no such value. It then replies 404 or 400; but while it starts, it also
# does so for values that it has. Sets $value to '' after ENOUGH_ABSENCES such replies, whatever
# came in between. With fewer attempts than that, all of them must have ended so.
retry() {
    local step="$1" attempts="$2" kind="$3" attempt=0 absences=0 enough=$ENOUGH_ABSENCES
    local last_reason='' routes_before question=''
    shift 3
    if [ "$attempts" -lt "$enough" ]; then
        enough=$attempts
    fi
    while :; do
        attempt=$((attempt + 1))
        absent=''   # request_leaf sets it
        hopeless='' # exchange sets these
        no_reply=''
        read_routes
        routes_before=$routes
        if "$@"; then
            return
        fi
        if [ "$reason" != "$last_reason" ] || is_power_of_two $attempt; then
            complain "$step: attempt $attempt of $attempts: $reason"
        fi
        last_reason=$reason
        if [ -n "$absent" ]; then
            absences=$((absences + 1))
        fi
        if [ "$kind" = optional ] && [ "$absences" -ge "$enough" ]; then
            value=''
            return
        fi
        if [ "$attempt" -eq "$attempts" ] || [ -n "$hopeless" ]; then
            break
        fi
        wait_for $((attempt < INTERVAL ? attempt : INTERVAL)) "$routes_before"
    done
    if [ -n "$no_reply" ] && [ -z "$has_reply" ]; then
        question='; is this a VM on Azure?'
    fi
    fail "gave up after $attempt attempts$question"
    last_attempt=": $last_reason"
    return 1
}

# is_power_of_two NUMBER: whether it is 1, 2, 4, 8 or the like: the same failure is not said more
# often
is_power_of_two() {
    [ $(($1 & ($1 - 1))) -eq 0 ]
}

# wait_for SECONDS ROUTES: wait. After an attempt without a reply, wait only until the routes are no
# longer these: the network has come up. Its $no_reply.
wait_for() {
    local tenths=$((10 * $1))
    if [ -z "$no_reply" ]; then
        sleep "$1"
        return
    fi
    while [ $tenths -gt 0 ] && read_routes && [ "$routes" = "$2" ]; do
        if [ $quick_looks -gt 0 ] && sleep 0.1 2>/dev/null; then
            quick_looks=$((quick_looks - 1))
            tenths=$((tenths - 1))
        else # or this sleep takes whole seconds alone
            sleep 1
            tenths=$((tenths - 10))
        fi
    done
}

# read_routes: sets $routes to what the kernel says of the routes, '' if it does not
read_routes() {
    local line
    routes=''
    while read -r line; do
        routes=$routes$line$NEWLINE
    done 2>/dev/null </proc/self/net/route
    return 0
}

# ---- Step ready: the goal state and the health report ------------------------------------------

# report_ready: report to the WireServer that this VM is Ready; can fail
report_ready() {
    say 'Retrieving goal state from the Wireserver'
    retry ready "$ATTEMPTS" required report_health Ready ''
}

# report_health STATE DETAILS: request the goal state, and send a health report for it; can fail
#
# Both belong to one attempt, as the WireServer refuses a report for an old incarnation.
report_health() {
    local report
    request_goal_state || return
    report="<Health>\
<GoalStateIncarnation>$incarnation</GoalStateIncarnation>\
<Container>\
<ContainerId>$container_id</ContainerId>\
<RoleInstanceList><Role>\
<InstanceId>$instance_id</InstanceId>\
<Health><State>$1</State>$2</Health>\
</Role></RoleInstanceList>\
</Container>\
</Health>"
    if [ -n "$DRY_RUN" ]; then
        say 'Would send the following data to Wireserver:' "$report"
        return
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
    exchange 'goal state' "$WIRESERVER/machine?comp=goalstate" '' "$BODY_LIMIT" \
        --header 'x-ms-version: 2012-11-30' \
        --header 'x-ms-agent-name: custom-provisioning' || return
    unset incarnation container_id instance_id
    read_xml GoalState take_goal_state || fail 'goal state: not a goal state' || return
    squeeze "${incarnation-}"
    incarnation=$value
    squeeze "${container_id-}"
    container_id=$value
    squeeze "${instance_id-}"
    instance_id=$value
    is_number "$incarnation" || fail 'goal state: no Incarnation' || return
    is_id "$container_id" || fail 'goal state: no ContainerId' || return
    is_id "$instance_id" || fail 'goal state: no InstanceId' || return
    say "ContainerId: $container_id" "InstanceId: $instance_id" "Incarnation: $incarnation"
}

# take_goal_state PATH TEXT: keep the text of the first element at each of these paths. read_xml
# calls it.
take_goal_state() {
    case $1 in
    GoalState/Incarnation)
        incarnation=${incarnation-$2}
        ;;
    GoalState/Container/ContainerId)
        container_id=${container_id-$2}
        ;;
    GoalState/Container/RoleInstanceList/RoleInstance/InstanceId)
        instance_id=${instance_id-$2}
        ;;
    esac
}

# read_xml ROOT TAKE: read the XML document in $body; returns 1 if it is none, or has another root.
#
# The document is cut at each '<'. At the end of each element, the function TAKE is called with the
# element's path and its text. As an example, these are the pieces of <a>1<b>2</b><c/></a>:
#
#     piece    $path behind it    $text behind it    call
#     a>1      /a                 1
#     b>2      /a/b               2
#     /b>      /a                 INVALID            TAKE a/b 2
#     c/>      /a                 INVALID            TAKE a/c ''
#     /a>                         INVALID            TAKE a INVALID, as there are elements in it
#
# It refuses some legal documents, which Azure does not send: with a document type definition, with
# CDATA, with a '>' in an attribute, or with a tag of over 1000 bytes. A text with a comment is
# INVALID.
read_xml() {
    local root="$1" take="$2" path='' text='' root_seen='' markup_end='' before piece IFS='<'
    case $body in
    *'<') return 1 ;; # the loop would not see the empty piece behind it
    esac
    before=${body%%<*}
    is_blank "${before#"$BYTE_ORDER_MARK"}" || return 1
    for piece in ${body#"$before<"}; do
        if [ -z "$markup_end" ]; then
            case $piece in
            '!--'*) # a comment
                markup_end='-->'
                piece=${piece#'!--'}
                ;;
            '?'*) # an instruction, or the XML declaration
                markup_end='?>'
                piece=${piece#'?'}
                ;;
            esac
        fi
        if [ -z "$markup_end" ]; then
            read_piece "$piece" || return 1
        else # up to the end of the markup, a '<' means nothing
            text=$INVALID
            case $piece in
            *"$markup_end"*) markup_end='' ;;
            esac
        fi
    done
    [ -n "$root_seen" ] && [ -z "$path$markup_end" ] # the last two: nothing is open
}

# read_piece PIECE: read TAG>TEXT, for read_xml: sets its $path, $text and $root_seen. Returns 1 if
# it is wrong here.
read_piece() {
    local tag="${1%%>*}" name
    if [ "$tag" = "$1" ] || [ "${#tag}" -gt 1000 ]; then # no '>'; or a tag that would take long
        return 1
    fi
    name=${tag#/}
    name=${name%%["$SPACE"/]*} # without attributes
    name=${name##*:}           # without a prefix
    case $tag in
    "$name" | "/$name") ;;                     # no attributes, no prefix: so are most tags
    */["$SPACE"]*) return 1 ;;                 # a '/' that ends no tag
    *) has_paired_quotes "$tag" || return 1 ;; # otherwise the '>' is in an attribute
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
        open_element "$name" "${1#*>}" || return 1
        ;;
    esac
    if [ -z "$path" ]; then # behind the root
        is_blank "${1#*>}" || return 1
    fi
}

# has_paired_quotes TAG: whether each quote in it has a second one
has_paired_quotes() {
    local rest="$1"
    while :; do
        rest=${rest#"${rest%%[\"\']*}"} # the tag from its first quote on
        case $rest in
        '') return ;;
        \"*\"*) rest=${rest#\"*\"} ;;
        \'*\'*) rest=${rest#\'*\'} ;;
        *) return 1 ;;
        esac
    done
}

# open_element NAME TEXT: go down into an element: sets $path and $text. Returns 1 if it is a wrong
# or a second root, or no element.
open_element() {
    case $1 in
    '' | '!'*) return 1 ;; # '!': a document type definition, or CDATA
    esac
    if [ -z "$path" ]; then
        [ -z "$root_seen" ] && [ "$1" = "$root" ] || return 1
        root_seen=yes
    fi
    path=$path/$1
    text=$2
    [ "${#path}" -le 5000 ] # a deeper one would take long
}

# close_element NAME: go up from an element: call TAKE, and set $path and $text. Returns 1 if it is
# not the open one.
close_element() {
    [ -n "$1" ] && [ "$1" = "${path##*/}" ] || return 1
    "$take" "${path#/}" "$text"
    path=${path%/*}
    text=$INVALID
}

# is_blank TEXT: whether it is white space, or nothing
is_blank() {
    case $1 in
    *[!"$SPACE"]*) return 1 ;;
    esac
}

# squeeze TEXT: sets $value to the text without white space at its ends, and with one space for each
# run of it
squeeze() {
    local IFS="$SPACE"
    # shellcheck disable=SC2086 # split into words
    set -- $1
    # The first time, two CR have an empty word between them. The second time, it goes.
    # shellcheck disable=SC2048,SC2086
    set -- $*
    value="$*"
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
    '' | *[!!-~]*) return 1 ;;
    *[\<\>\&\"\']*) return 1 ;;
    esac
}

# ---- Step hostname: a value from IMDS ----------------------------------------------------------

# set_hostname: set the hostname that the user chose, or the resource name if IMDS says there is
# none; can fail.
#
# An empty reply does not say so. It is a failed attempt, like any other reply that is no use.
set_hostname() {
    local name
    say 'Retrieving hostname from IMDS'
    request_property hostname osProfile/computerName optional || return
    if [ -z "$value" ]; then
        retry hostname "$ATTEMPTS" required request_text name || return
    fi
    replace_underscores "$value" # systemd would drop them
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

# is_hostname TEXT: whether it is a hostname: labels with dots between them, of up to 64 characters
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

# store_hostname NAME: set the hostname without systemd: until the next boot in the kernel, and in a
# file; can fail
store_hostname() {
    local problems='' until=''
    if has_command hostnamectl; then
        problems='hostnamectl failed; '
    fi
    if set_kernel_hostname "$1"; then
        until=", so $1 lasts until the next boot"
    else
        problems="${problems}cannot set the kernel's hostname; "
    fi
    if write_file /etc/hostname 644 '' printf '%s\n' "$1"; then
        [ -n "$until" ] || fail "${problems%; }"
    else
        fail "$problems$reason$until"
    fi
}

# set_kernel_hostname NAME: set the kernel's hostname; returns whether that worked
set_kernel_hostname() {
    if [ -n "$DRY_RUN" ]; then
        return
    fi
    hostname "$1" 2>/dev/null ||
        { printf '%s\n' "$1" >/proc/sys/kernel/hostname; } 2>/dev/null
}

# request_property STEP LEAF required|optional: sets $value to a property that the user gave the VM,
# squeezed, and $origin to dvd if it comes from there, or to imds. With a DVD, asks IMDS, then the
# DVD, then IMDS again with all attempts. $value is '' if IMDS does not have an optional property.
# Can fail, after all attempts.
request_property() {
    if has_dvd && request_from_both "$@"; then # it has the properties, too
        return
    fi
    origin=imds
    retry "$1" "$ATTEMPTS" "$3" request_text "$2"
}

# request_text LEAF: sets $value to a value from IMDS, squeezed. Can fail, also if it is empty.
request_text() {
    request_leaf "$1" || return
    squeeze "$value"
    [ -n "$value" ] || fail "${1##*/}: empty"
}

# request_leaf LEAF [LIMIT]: sets $value to a value from IMDS, which may be empty. A leaf is a
# value's path below "compute". Can fail. Sets $absent if the status is 404, or 400: an IMDS that is
# too old to know a value says so.
request_leaf() {
    local leaf="$1" limit="${2-$BODY_LIMIT}" version url
    find_version "$leaf"
    url="$IMDS/metadata/instance/compute/$leaf?api-version=$version&format=text"
    if ! exchange "${leaf##*/}" "$url" '' "$limit" --header 'Metadata: true'; then
        case $status in
        400 | 404) absent=yes ;;
        esac
        return 1
    fi
    value=$body
}

# find_version LEAF: sets $version to the first one of IMDS that has the value: an old IMDS knows no
# other
find_version() {
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
    sync_all
    # Without --no-reload, systemd would run all of its generators again.
    run systemctl --no-reload disable azure-provisioning.service ||
        run rc-update del azure-provisioning ||
        fail 'neither systemctl nor rc-update disabled azure-provisioning' || return
    say_done 'Disabled azure-provisioning.service'
}

# sync_all: have the disk store all changes: a power cut must not undo them after the run is over
sync_all() {
    if [ -z "$DRY_RUN" ] && has_command sync; then
        sync
    fi
}

# ================================================================================================
# The default run ends here. What follows runs only if another step is named; and the section about
# the DVD, if there is a drive and IMDS does not have the hostname.
# ================================================================================================

# ---- NotReady: a step before ready failed ------------------------------------------------------

# report_not_ready REASON: report to the WireServer that this VM will not be Ready, so that nobody
# waits for it
report_not_ready() {
    local now message description
    request_vm_id
    if [ -z "$vm_id" ]; then
        read_vm_id
    fi
    now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
    message="result=error|reason=$1|agent=azure-provisioning/$VERSION|vm_id=$vm_id|timestamp=$now"
    # Spaces take the place of what is not ' ' to '~', ASCII that can be printed, and of & < >.
    description=$(printf '%.512s' "$message" | tr -c ' -~' ' ' | tr '&<>' ' ')
    say 'Retrieving goal state from the Wireserver'
    retry NotReady "$ATTEMPTS" required report_health NotReady "<Details>\
<SubStatus>ProvisioningFailed</SubStatus>\
<Description>$description</Description>\
</Details>" || complain "NotReady: $reason"
}

# request_vm_id: sets $vm_id to the id of this VM as Azure's portal shows it, '' if IMDS does not
# tell it at once
request_vm_id() {
    vm_id=''
    if request_text vmId && is_vm_id "$value"; then
        vm_id=$value
    fi
}

# read_vm_id: sets $vm_id to the id of this VM, '' if the firmware does not tell one
read_vm_id() {
    vm_id=''
    if read_file /sys/class/dmi/id/product_uuid; then
        text=$(printf '%s\n' "$text" | tr A-F a-f)
        if is_vm_id "$text"; then
            vm_id=$text
        fi
    fi
}

# is_vm_id TEXT: whether it is the id of a VM: 36 digits, small letters and dashes
is_vm_id() {
    case $1 in
    *[!0-9a-f-]*) return 1 ;;
    esac
    [ "${#1}" -eq 36 ]
}

# read_file FILE: sets $text to the text of a file without line feeds at its end, '' if there is no
# such file. Can fail, also if it is no text.
read_file() {
    text=''
    if [ ! -e "$1" ] && [ ! -L "$1" ]; then
        return
    fi
    [ -f "$1" ] || fail "cannot read $1" || return # opening a FIFO would take for ever
    # The shell would drop a NUL byte: tr makes it INVALID.
    { text=$(tr '\000' "$INVALID" <"$1"); } 2>/dev/null || fail "cannot read $1" || return
    case $text in
    *"$INVALID"*) fail "cannot read $1" ;;
    esac
}

# ---- Step user: the account, its SSH keys, sudo or doas ----------------------------------------

NO_LOGIN='no valid SSH key, and no password'

# create_user: create the admin user, unless there is one, and let it log in with its keys; can fail
create_user() {
    local name
    say 'Retrieving user from IMDS'
    request_property user osProfile/adminUsername required || return
    name=$value
    is_user_name "$name" || fail 'no valid user name' || return
    say "User: $name"
    if [ "$origin" = dvd ]; then
        find_keys || return
    else
        request_keys || return
    fi
    find_account "$name" || return
    if [ -z "$account" ]; then
        add_account "$name" || return
        if [ -n "$DRY_RUN" ]; then # there is no account, and so no home to look at
            grant_root "$name"
            return
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
    fi
    join_groups "$name" || return
    grant_root "$name"
}

# is_user_name TEXT: whether it is a user name with a small letter: to sudo, ALL and its like are no
# names
is_user_name() {
    case $1 in
    '' | root | *[!A-Za-z0-9._-]* | [!A-Za-z_]*) return 1 ;;
    *[a-z]*) [ "${#1}" -le 32 ] ;;
    *) return 1 ;;
    esac
}

# request_keys: sets $keys to the user's valid SSH keys, a line each. Fails if there is neither a
# key nor a password.
#
# They come from IMDS. Without a key there, IMDS may say that there is a password. Otherwise the DVD
# may have one of both. At last IMDS is asked again, and has to have a key now.
request_keys() {
    request_imds_keys optional || return
    [ -z "$keys" ] || return 0
    retry user "$ATTEMPTS" optional \
        request_text osProfile/disablePasswordAuthentication || return
    [ "$value" != false ] || return 0
    if has_dvd && retry user "$DVD_ATTEMPTS" required request_dvd && find_keys; then
        return
    fi
    if [ -z "$has_key_text" ]; then # IMDS may not have the keys yet
        request_imds_keys required || keys=''
    fi
    [ -n "$keys" ] || fail "$NO_LOGIN"
}

# request_imds_keys required|optional: sets $keys to the valid SSH keys of IMDS, and $has_key_text
# if it has any text as a key; can fail. optional: no key and an empty key are
# accepted.
request_imds_keys() {
    local names name number=0 request=request_text IFS=' '
    keys=''
    has_key_text=''
    if [ "$1" = optional ]; then
        request=request_leaf
    fi
    retry user "$ATTEMPTS" "$1" $request publicKeys || return
    squeeze "$value"
    names=$value
    for name in $names; do # 0/ 1/ 2/ and so on
        if [ "${name%/}" != $number ] || [ $number -gt 99 ]; then
            fail 'publicKeys: no valid list' || return
        fi
        retry user "$ATTEMPTS" "$1" $request publicKeys/$number/keyData || return
        has_key_text=$has_key_text$value
        take_keys $number "$value"
        number=$((number + 1))
    done
}

# find_keys: sets $keys to the user's valid SSH keys on the DVD; fails as request_keys does
find_keys() {
    local text number=0 IFS='<'
    keys=''
    for text in $dvd_keys; do
        decode_entities "$text" || value=''
        take_keys $number "$value"
        number=$((number + 1))
    done
    squeeze "$disable_passwords"
    case $keys:$value in
    :[Ff][Aa][Ll][Ss][Ee]) ;;
    :*) fail "$NO_LOGIN" ;;
    esac
}

# take_keys NUMBER TEXT: add the valid SSH keys in the text of a number to $keys; say of each
# key whether it is valid
take_keys() {
    local key IFS="$NEWLINE"
    split_keys "$2"
    for key in ${value:-$INVALID}; do
        squeeze "$key"
        if is_ssh_key "$value"; then
            say "SSH key: ${value%% *}"
            keys=$keys$value$NEWLINE
        else
            complain "user: publicKeys/$1: no OpenSSH public key"
        fi
    done
}

# split_keys TEXT: sets $value to the keys in a text, a line each.
#
# Azure may break a key into lines, and a user may give several keys. A line begins
# another key if it begins with a type, or with options and a type.
split_keys() {
    local each split='' IFS="$CARRIAGE_RETURN$NEWLINE"
    for each in $1; do
        squeeze "$each"
        case $value in
        '') continue ;;
        ssh-* | ecdsa-* | sk-*) split=$split$NEWLINE ;;
        *' ssh-'*' AAAA'* | *' ecdsa-'*' AAAA'* | *' sk-'*' AAAA'*) split=$split$NEWLINE ;;
        esac
        split=$split$each
    done
    value=$split
}

# remove_characters CHARACTERS TEXT: sets $value to the text without these characters
remove_characters() {
    local IFS="$1"
    # shellcheck disable=SC2086 # split at each of the characters
    set -- $2
    IFS='' # stands between the parts when they are put together again
    value="$*"
}

CONTROL_CHARACTERS=$(printf '\001-\037\177') # for [ ], which reads the '-' as a range

# is_ssh_key TEXT: whether it is an OpenSSH public key: TYPE BASE64 [COMMENT]
is_ssh_key() {
    local blob="${1#* }"
    blob=${blob%% *}
    case $1 in # the type of key, and how that type is written in base64
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
    case $1 in
    *[$CONTROL_CHARACTERS]*) ;;
    *) return 1 ;;
    esac
}

# find_account NAME: sets $account to the user's name, or to '' if there is no such account; can
# fail. Also sets $password_field, that of /etc/shadow, or of /etc/passwd if the user has no line
# there; $uid and $gid, the numbers of the user and of its group; $home, the path of its home; and
# $shell, that of its shell.
find_account() {
    local name="$1" IFS=':'
    account=''
    find_line /etc/passwd "$name" || return
    if [ -z "$line" ]; then
        return
    fi
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
        password_field='!' # useradd was interrupted: without a line there, nobody can log in
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
            return
            ;;
        esac
    done
}

# add_account NAME: make the user, with a new group, or with one that has the same name already;
# can fail. Whether it worked is seen in /etc/passwd.
add_account() {
    local shell=/bin/sh group=''
    if [ -x /bin/bash ]; then
        shell=/bin/bash
    fi
    find_line /etc/group "$1" || return
    if [ -n "$line" ]; then
        group=$1
    fi
    run useradd -m -s $shell ${group:+-g "$group"} "$1" ||
        run adduser -D -s $shell ${group:+-G "$group"} "$1" || # BusyBox's
        return 0
}

# is_system_account LOGIN_DEFS: whether the $account is not for people: its number is below UID_MIN
# of /etc/login.defs, whose text is given
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
    [ "$uid" -lt "$least" ]
}

# unlock_account: unlock the $account: without PAM, sshd refuses the keys of one that is locked. Can
# fail.
#
# An account is locked by a '!' at the beginning of its $password_field. With '*' as the whole
# field, the account is not locked, and no password fits.
unlock_account() {
    case $password_field in
    '!'*)
        say "$account:*" | run chpasswd -e ||
            run usermod -p '*' "$account" ||
            fail 'chpasswd failed'
        ;;
    esac
}

# authorize_keys: add the $keys to the file where sshd looks for those of the $account, unless they
# are there; can fail
authorize_keys() {
    local path folder lines key blob owner="$uid:$gid" mode=600 IFS="$NEWLINE"
    find_keys_file || return
    path=$value
    folder=${path%/*}
    if [ -L "$folder" ] || [ -L "$path" ]; then # root must not write where the user says
        fail "$folder: a symlink is in the way" || return
    fi
    make_keys_folder || return
    if ! is_in_home "$path"; then # the user has to be able to read it
        owner=''
        mode=644
    fi
    read_file "$path" || return
    lines=$text${text:+$NEWLINE}
    for key in $keys; do
        blob=${key#* }
        blob=${blob%% *} # without the comment
        case $NEWLINE$lines in
        *"$NEWLINE${key%% *} $blob "*) ;;
        *"$NEWLINE${key%% *} $blob$NEWLINE"*) ;;
        *) lines=$lines$key$NEWLINE ;;
        esac
    done
    write_file "$path" $mode "$owner" printf %s "$lines" || return
    restore_labels user "$folder"
}

# find_keys_file: sets $value to the file where sshd looks for the keys of the $account. Fails if
# it looks in none.
find_keys_file() {
    local default="$home/.ssh/authorized_keys" patterns='.ssh/authorized_keys' each first=''
    local IFS="$NEWLINE"
    ask_sshd "$account"
    for each in $value; do
        case $each in
        'authorizedkeysfile '*) patterns=${each#* } ;;
        esac
    done
    IFS=' '
    for each in $patterns; do
        if expand_pattern "$each"; then
            if [ "$value" = "$default" ]; then
                return
            fi
            first=${first:-$value}
        fi
    done
    value=$first
    [ -n "$value" ] || fail 'sshd looks for keys in no file'
}

# expand_pattern PATTERN: sets $value to the path that a word of AuthorizedKeysFile stands for.
# Returns 1 if it is 'none', or has a '%' that is not known here.
expand_pattern() {
    local rest="$1"
    value=''
    while [ "${rest%%'%'*}" != "$rest" ]; do # there is a '%' in it
        value=$value${rest%%'%'*}
        rest=${rest#*'%'}
        case $rest in
        h*) value=$value$home ;;
        u*) value=$value$account ;;
        *) return 1 ;;
        esac
        rest=${rest#?}
    done
    value=$value$rest
    case $value in
    none) return 1 ;;
    /*) ;;
    *) value=$home/$value ;;
    esac
}

# ask_sshd NAME: sets $value to how sshd is configured for a user, lines of 'keyword value'; '' if
# it does not tell.
#
# Since 9.3 it has -G, and tells it also without host keys.
ask_sshd() {
    local connection="user=$1,host=localhost,addr=127.0.0.1,laddr=127.0.0.1,lport=22"
    ask sshd -T -G -C "$connection"
    if [ -z "$value" ]; then
        ask sshd -T -C "$connection"
    fi
}

# is_in_home PATH: whether it is below the $home
is_in_home() {
    case $1 in
    "$home"/*) ;;
    *) return 1 ;;
    esac
}

# make_keys_folder: make the $home, and its $folder of the keys, with modes that sshd accepts; can
# fail
make_keys_folder() {
    local part="$folder"
    make_home || return
    make_passable "$folder" || return
    if is_in_home "$folder"; then
        while is_in_home "$part"; do
            must_run "$folder" chown -h "$uid:$gid" "$part" || return
            part=${part%/*}
        done
        must_run "$folder" chmod 700 "$folder" || return
        must_run "$folder" chmod u+rwx,go-w "$home"
    fi
}

# make_home: make the $home if it is missing. If it is root's, finish it: useradd was interrupted.
# Can fail, also if it is somebody else's: the keys in it are theirs, too.
make_home() {
    local owner_of_home
    if [ -d "$home" ]; then
        owner_of_home=$(find_owner "$home")
        if [ "$owner_of_home" = "$uid" ]; then
            return
        fi
        case $owner_of_home:$home in
        0:/*/?*) ;;
        *) fail "$home: belongs to another user" || return ;; # / and /usr are root's, too
        esac
    else
        make_passable "$home" || return
    fi
    if [ -d /etc/skel ]; then
        must_run "$home" cp -R -p /etc/skel/. "$home" || return
    fi
    must_run "$home" chown -R -h "$uid:$gid" "$home" || return
    restore_labels user "$home"
}

# find_owner FOLDER: print the number of the user that owns it
find_owner() {
    local IFS=' '
    # shellcheck disable=SC2012,SC2046 # ls, as stat is not everywhere; split into words
    set -- $(ls -ldn "$1")
    say "${3-}"
}

# make_passable FOLDER: make it, and those above it, so that everybody may pass through; can fail
make_passable() {
    (
        umask 022
        run mkdir -p "$1"
    ) || fail "cannot make $1"
}

# must_run PATH COMMAND [ARGUMENT]...: run a command that makes the path; can fail
must_run() {
    local path="$1"
    shift
    run "$@" || fail "cannot make $path"
}

# restore_labels STEP PATH: give a path, and what is in it, the labels that SELinux has for it, if
# there is SELinux
restore_labels() {
    if has_command restorecon && ! run restorecon -R "$2"; then
        complain "$1: restorecon failed for $2"
    fi
}

# join_groups NAME: add the user to the EXTRA_GROUPS that there are; can fail
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

# grant_root NAME: let the user become root without a password, with sudo or doas, if one accepts
# the rule; can fail
grant_root() {
    local rule="$1 ALL=(ALL:ALL) NOPASSWD:ALL" path=/etc/doas.conf mode=440 rules
    # With sudo and doas, the last rule that fits counts. Names that begin with zz come last.
    if say "$rule" | run visudo -q -c -f /dev/stdin; then
        write_file /etc/sudoers.d/zz-azure-provisioning 440 '' printf '%s\n' "$rule" || return
        restore_labels user /etc/sudoers.d/zz-azure-provisioning
        remove_former /etc/sudoers.d/azure-provisioning || return
        check_sudo "$1"
        return
    fi
    if [ -d /etc/doas.d ]; then
        path=/etc/doas.d/zz-azure-provisioning.conf
    fi
    read_file "$path" || return
    add_last_line "$text" "permit nopass $1"
    rules=$value
    if say "$rules" | run doas -C /dev/stdin; then
        file_behind "$path"
        if [ -e "$value" ]; then
            mode=''
        fi
        write_file "$value" "$mode" '' printf '%s\n' "$rules" || return
        restore_labels user "$value"
        remove_former /etc/doas.d/azure-provisioning.conf
        return
    fi
    complain "user: neither sudo nor doas takes a rule for $1" # it can log in all the same
}

# remove_former FILE: remove the file in which an earlier version of this program wrote its rule;
# can fail
remove_former() {
    if [ -e "$1" ] || [ -L "$1" ]; then
        run rm -f "$1" || fail "cannot remove $1"
    fi
}

# check_sudo NAME: say so if sudo does not give the user all rights. Another rule may come last.
check_sudo() {
    if [ -n "$DRY_RUN" ]; then
        return
    fi
    ask sudo -n -l -U "$1"
    case $value in
    *'(ALL : ALL) NOPASSWD: ALL') ;; # the last rule
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
DVD_ATTEMPTS=30             # the drive, or the medium in it, may come late
PATIENCE=60                 # attempts at a value of IMDS that is also on the DVD
ASCII=$(printf '\001-\177') # for [ ], which reads the '-' as a range
DATA_LIMIT=122880           # bytes, of ovf-env.xml or user data: room for 64 KiB in base64

# request_dvd: read ovf-env.xml, which is on a DVD at the first boot; sets $host_name, $user_name,
# $user_password, $disable_passwords and $custom_data to the texts in it, or to '', and $dvd_keys to
# those of SSH keys, with a '<' behind each. Can fail.
request_dvd() {
    mount_dvd || return
    # The shell would drop a NUL byte: tr makes it INVALID.
    body=''
    if [ -f "$OVF_FILE" ]; then
        { body=$(tr '\000' "$INVALID" <"$OVF_FILE") || body=''; } 2>/dev/null
    fi
    umount "$DVD_FOLDER" # if it fails, the next mount_dvd finds the DVD mounted
    [ -n "$body" ] || fail 'ovf-env.xml: cannot be read' || return
    if [ "${#body}" -gt "$DATA_LIMIT" ] || ! is_utf_8; then
        fail 'ovf-env.xml: not an OVF environment' || return
    fi
    unset host_name user_name user_password disable_passwords custom_data
    dvd_keys=''
    read_xml Environment take_ovf || fail 'ovf-env.xml: not an OVF environment' || return
    host_name=${host_name-}
    user_name=${user_name-}
    user_password=${user_password-}
    disable_passwords=${disable_passwords-}
    custom_data=${custom_data-}
}

# is_utf_8: whether the $body says that it is UTF-8. ASCII alone is UTF-8, too,
# whatever it says.
is_utf_8() {
    case $body in
    *[!$ASCII]*) ;;
    *) return 0 ;;
    esac
    case ${body%%'?>'*} in # the declaration
    *encoding*=*[\"\'][Uu][Tt][Ff]-8[\"\']*) ;;
    *encoding*=*[\"\'][Uu][Ss]-[Aa][Ss][Cc][Ii][Ii][\"\']*) ;;
    *encoding*=*) return 1 ;;
    esac
}

# take_ovf PATH TEXT: keep the text of the first element at each of these paths, and of all keys.
# read_xml calls it.
take_ovf() {
    case ${1#Environment/ProvisioningSection/LinuxProvisioningConfigurationSet/} in
    HostName) host_name=${host_name-$2} ;;
    UserName) user_name=${user_name-$2} ;;
    UserPassword) user_password=${user_password-$2} ;;
    DisableSshPasswordAuthentication) disable_passwords=${disable_passwords-$2} ;;
    CustomData) custom_data=${custom_data-$2} ;;
    SSH/PublicKeys/PublicKey/Value) dvd_keys="$dvd_keys$2<" ;;
    esac
}

# has_dvd: whether there is a drive, so that the program can wait for the DVD in it
has_dvd() {
    [ -e /dev/sr0 ]
}

# request_from_both STEP LEAF required|optional: do the work of request_property: ask IMDS, but not
# for long, and then look on the DVD. Returns 1 if neither has the property. The IMDS of Azure Stack
# has none of them.
request_from_both() {
    local attempts="$PATIENCE"
    if [ "$ATTEMPTS" -lt "$attempts" ]; then
        attempts=$ATTEMPTS
    fi
    origin=imds
    if retry "$1" "$attempts" "$3" request_text "$2" && [ -n "$value" ]; then
        return
    fi
    origin=dvd
    retry "$1" "$DVD_ATTEMPTS" required request_dvd || return
    case $2 in
    osProfile/computerName) squeeze "$host_name" ;;
    osProfile/adminUsername) squeeze "$user_name" ;;
    esac
    [ -n "$value" ]
}

# mount_dvd: mount the DVD where only root can see it, unless it is mounted: an umount may have
# failed. Can fail.
mount_dvd() {
    mkdir -p "$DVD_FOLDER"
    if [ -e "$OVF_FILE" ]; then
        return
    fi
    has_dvd || fail 'ovf-env.xml: no DVD' || return
    mount -t udf,iso9660 -o ro,nosuid,nodev,noexec /dev/sr0 "$DVD_FOLDER" ||
        fail 'ovf-env.xml: no DVD'
}

# ---- Step password -----------------------------------------------------------------------------

SSHD_CONFIG=/etc/ssh/sshd_config
SSHD_DEFAULT=/usr/etc/ssh/sshd_config # openSUSE's: counts where there is none in /etc
SSHD_DROP_INS='/etc/ssh/sshd_config.d/*.conf'
SSHD_DROP_IN=/etc/ssh/sshd_config.d/00-azure-provisioning.conf
# The last two are one setting since OpenSSH 8.7. Before, either of them lets in with a password.
SSHD_KEYWORDS='PasswordAuthentication ChallengeResponseAuthentication KbdInteractiveAuthentication'

# set_password: set the password of the admin user, and have sshd take passwords or not; can fail
set_password() {
    local name is_given=''
    say 'Retrieving password from the DVD'
    retry password "$DVD_ATTEMPTS" required request_dvd || return
    squeeze "$user_name"
    name=$value
    is_user_name "$name" || fail 'no valid user name' || return
    decode_entities "$user_password" || fail 'no valid password' || return
    if has_control_character "$value" || [ "${#value}" -gt 72 ]; then # as long as Azure allows
        fail 'no valid password' || return
    fi
    # REDACTED stands in a copy of the file that cloud-init makes.
    if [ -n "$value" ] && [ "$value" != REDACTED ]; then
        store_password "$name" "$value" || return
        say_done 'Password set'
        is_given=yes
    fi
    squeeze "$disable_passwords"
    case $value in
    [Tt][Rr][Uu][Ee]) configure_sshd "$name" no ;;
    [Ff][Aa][Ll][Ss][Ee]) configure_sshd "$name" yes ;;
    *)
        if [ -n "$is_given" ]; then
            configure_sshd "$name" yes
        fi
        ;;
    esac
}

# decode_entities TEXT: sets $value to the text with the five entities of XML decoded. Returns 1 if
# there is an '&' of anything else.
decode_entities() {
    local rest="$1"
    value=''
    while [ "${rest%%'&'*}" != "$rest" ]; do # there is an '&' in it
        value=$value${rest%%'&'*}
        rest=${rest#*'&'}
        case $rest in
        'amp;'*) value="$value&" ;;
        'lt;'*) value="$value<" ;;
        'gt;'*) value="$value>" ;;
        'quot;'*) value="$value\"" ;;
        'apos;'*) value="$value'" ;;
        *) return 1 ;;
        esac
        rest=${rest#*;}
    done
    value=$value$rest
}

# print_line LINE: print a line that may be secret, by a command of the shell itself: the arguments
# of a program can be seen by all. That is printf, or print in mksh, which has no printf.
print_line() {
    if [ "$(command -v printf)" = printf ]; then
        printf '%s\n' "$1"
    else
        # shellcheck disable=SC2039,SC3045 # only mksh comes here
        print -r -- "$1"
    fi 2>/dev/null # the reader may be gone
}

# store_password NAME PASSWORD: set the password of a user. Fails if chpasswd does not; PAM may
# forbid it.
store_password() {
    print_line "$1:$2" | run chpasswd || fail 'chpasswd failed' || return
    find_line /etc/shadow "$1" || return
    if [ -z "$line" ]; then
        find_line /etc/passwd "$1" || return
    fi
    value=${line#*:}
    value=${value%%:*}
    # BusyBox may make a hash of 13 characters, which uses only eight characters of the password.
    case $value in
    *'$'*) ;;
    ?????????????) print_line "$1:$2" | run chpasswd -c SHA512 || fail 'chpasswd failed' ;;
    esac
}

# configure_sshd NAME yes|no: have sshd take passwords, or not, in all of the ways that it has; can
# fail.
#
# Of several lines for one setting, sshd takes the first. So ours are in a file that it reads before
# others, or else at the top.
configure_sshd() {
    local config="$SSHD_CONFIG" ours='' keyword
    if [ ! -f "$config" ]; then
        config=$SSHD_DEFAULT
    fi
    if [ ! -f "$config" ]; then
        if [ "$2" = no ] && has_command dropbear; then
            complain 'password: dropbear still accepts passwords'
        fi
        return
    fi
    for keyword in $SSHD_KEYWORDS; do
        ours="$ours$keyword $2$NEWLINE"
    done
    read_file "$config" || return
    if includes_drop_ins; then
        value=$SSHD_DROP_IN
        write_file "$value" 600 '' printf %s "$ours" || return
    elif [ "$config" = "$SSHD_DEFAULT" ]; then # a file in /etc would take the place of all of it
        fail "$SSHD_DEFAULT: no Include $SSHD_DROP_INS at the top" || return
    else
        drop_first_lines
        file_behind "$SSHD_CONFIG"
        write_file "$value" '' '' printf %s "$ours$text${text:+$NEWLINE}" || return
    fi
    restore_labels password "$value"
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
        '' | '#'*) continue ;;
        [Ii][Nn][Cc][Ll][Uu][Dd][Ee]' '*) has_word "$SSHD_DROP_INS" "$value" ;;
        *) return 1 ;;
        esac
        return
    done
    return 1
}

# drop_first_lines: take the lines of an earlier run from the top of the $text
drop_first_lines() {
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

# check_sshd NAME yes|no: fails if sshd says that it does not obey for the user.
#
# Other lines may count more than ours: those of a Match, or in a file that is read before.
check_sshd() {
    if [ -n "$DRY_RUN" ] || ! has_command sshd; then
        return
    fi
    ask_sshd "$1"
    if [ -z "$value" ]; then
        complain 'password: sshd does not tell what it does' # an old one, without host keys
        return
    fi
    case $2$NEWLINE$value$NEWLINE in
    yes*"${NEWLINE}passwordauthentication no$NEWLINE"*)
        fail "sshd still refuses passwords from $1"
        ;;
    no*"${NEWLINE}passwordauthentication yes$NEWLINE"* | \
        no*"${NEWLINE}challengeresponseauthentication yes$NEWLINE"* | \
        no*"${NEWLINE}kbdinteractiveauthentication yes$NEWLINE"*)
        fail "sshd still accepts passwords from $1"
        ;;
    esac
}

# file_behind PATH: sets $value to the file that a symlink leads to, or to the path itself
file_behind() {
    value=$(readlink -f "$1") || value=$1
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

# save_data: save the user data, from IMDS, and the custom data, from the DVD if that can be read;
# can fail
save_data() {
    say 'Retrieving user data from IMDS'
    retry data "$ATTEMPTS" optional request_leaf userData "$DATA_LIMIT" || return
    save_decoded userData "$STATE_FOLDER/user-data" "$value" || return
    say 'Retrieving custom data from the DVD'
    if retry data "$DVD_ATTEMPTS" required request_dvd; then
        save_decoded customData "$STATE_FOLDER/custom-data" "$custom_data"
    fi
}

# save_decoded LABEL FILE TEXT: decode a text from base64 into a file. If it is empty, remove what
# the image has there. Can fail.
save_decoded() {
    remove_characters "$SPACE" "$3"
    is_base64 "$value" || fail "$1: no base64" || return
    if [ -n "$value" ]; then
        write_file "$2" 600 '' decode_base64 "$value" || return
        say_done "$1: $2"
    else
        run rm -f "$2" || fail "cannot remove $2" || return
        say_done "$1: none"
    fi
}

# is_base64 TEXT: whether it is base64 as an encoder writes it: padded, and unused bits are
# 0
is_base64() {
    case $1 in
    *[!A-Za-z0-9+/=]* | *=[!=]* | *===*) return 1 ;;
    *[!AQgw]== | *[!AEIMQUYcgkosw048=]=) return 1 ;; # bits are left over
    esac
    [ $((${#1} % 4)) -eq 0 ]
}

# decode_base64 TEXT: print what it encodes
decode_base64() {
    print_line "$1" | base64 -d
}

# ---- Step publish ------------------------------------------------------------------------------

# publish_hostname: have the DHCP client of the default route's interface tell its server the
# hostname; can fail. No other client is asked. If this one fails, it is asked again, as nmcli fails
# now and then.
publish_hostname() {
    local interface client name
    find_interface
    [ -n "$interface" ] || fail 'no default route' || return
    find_client
    [ -n "$client" ] || fail "no known DHCP client has $interface" || return
    name=$(uname -n) || return
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
    while read -r name destination _ _ _ _ _ mask _; do
        if [ "$destination" = 00000000 ] && [ "$mask" = 00000000 ]; then
            interface=$name
            return
        fi
    done 2>/dev/null </proc/self/net/route
}

# find_client: sets $client to the command of the DHCP client that has $interface, '' if none is
# known to
find_client() {
    networkd_lease
    if [ -f "$value" ]; then
        client=networkctl
        return
    fi
    ask nmcli -g DHCP4.OPTION device show "$interface"
    if [ -n "$value" ]; then
        client=nmcli
        return
    fi
    dhcpcd_lease
    if [ -f "$DHCPCD_PID" ] && [ -f "$value" ]; then
        client=dhcpcd
        return
    fi
    for client in dhclient udhcpc; do
        find_process "$client"
        if [ -n "$value" ]; then
            return
        fi
    done
    client=''
}

# The PID file of a dhcpcd for all interfaces. One that runs for a single one takes no hostname.
DHCPCD_PID=/run/dhcpcd/pid

# dhcpcd_lease: sets $value to the path of dhcpcd's lease for $interface, which stays there when
# dhcpcd ends
dhcpcd_lease() {
    value=/var/lib/dhcpcd/$interface.lease
}

# networkd_lease: sets $value to the path of systemd-networkd's lease for $interface, which is
# removed when systemd-networkd ends
networkd_lease() {
    ask cat "/sys/class/net/$interface/ifindex"
    value=/run/systemd/netif/leases/$value
}

# find_process CLIENT: sets $value to its first process for $interface: PID COMMAND [ARGUMENT]...,
# or ''
find_process() {
    ask pgrep -a -f "^([^ ]*[/ ])?$1 (.* )?$interface( |\$)"
    value=${value%%"$NEWLINE"*}
}

# tell_server: have $client tell its server the hostname, $name; returns whether the server has
# heard it. NetworkManager does not show that. It goes on telling the server until that answers.
tell_server() {
    case $client in
    networkctl)
        networkd_lease
        renew "$value" networkctl reconfigure "$interface"
        ;;
    nmcli)
        run nmcli device modify "$interface" ipv4.dhcp-hostname "$name"
        ;;
    dhcpcd)
        dhcpcd_lease
        renew "$value" dhcpcd -n -h "$name" "$interface"
        ;;
    dhclient)
        run_second_dhclient
        ;;
    udhcpc)
        # A second one, as the first one takes no hostname. With /bin/true it changes nothing here.
        run udhcpc -n -q -f -i "$interface" -x "hostname:$name" -s /bin/true
        ;;
    esac
}

# renew LEASE COMMAND [ARGUMENT]...: run a command that only asks for a new lease; returns whether
# it comes within 5 seconds
renew() {
    local lease="$1" old second
    shift
    identify "$lease"
    old=$value
    run "$@" || return
    if [ -n "$DRY_RUN" ]; then
        return
    fi
    for second in 1 2 3 4 5; do
        identify "$lease"
        if [ -n "$value" ] && [ "$value" != "$old" ]; then
            return
        fi
        sleep 1
    done
    return 1
}

# identify FILE: sets $value to a text that changes when the file is written again, '' if there is
# no file
identify() {
    ask ls -l -i --full-time "$1"
}

# run_second_dhclient: run a second dhclient, as the one that has $interface cannot be asked, and
# end it; returns whether the server has heard it. The second one has the arguments of the first
# one, and its identity, so that it gets the same address. It does not have its lease, with which it
# would ask nobody. With /bin/true as its script it changes nothing here.
run_second_dhclient() {
    local IFS=' ' words leases identity second word told=''
    find_process dhclient
    [ -n "$value" ] || return # it has ended
    words=${value#* }
    words=${words#* } # without the PID and the command
    find_value -lf "$words"
    leases=${value:-/var/lib/dhcp/dhclient.leases}
    find_value -cf "$words"
    ask grep -x 'send host-name = gethostname();' "${value:-/etc/dhcp/dhclient.conf}"
    [ -n "$value" ] || return
    ask sed -n '/^default-duid /p' "$leases"
    identity=$value
    second=$leases.second
    set --
    for word in $words; do
        case $word in
        -d | -nw) ;; # so that it waits for an answer
        *) set -- "$@" "$word" ;;
        esac
    done
    set -- "$@" -q -sf /bin/true -pf "$second.pid" -lf "$second"
    if write_file "$second" 600 '' printf '%s\n' "$identity" &&
        run dhclient "$@" -1 && run dhclient "$@" -x; then
        told=yes
    fi
    run rm -f "$second" "$second.pid"
    [ -n "$told" ]
}

# find_value OPTION WORDS: sets $value to the word behind the option, '' if the option is not there
find_value() {
    local IFS=' ' word previous=''
    value=''
    for word in $2; do
        if [ "$previous" = "$1" ]; then
            value=$word
            return
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
# Firmware shows the id of a VM in one order or the other. An update may change it.
swap_bytes() {
    value=$(printf '%s\n' "$1" | sed \
        's/^\(..\)\(..\)\(..\)\(..\)-\(..\)\(..\)-\(..\)\(..\)-/\4\3\2\1-\6\5-\8\7-/')
}

main "$@"
