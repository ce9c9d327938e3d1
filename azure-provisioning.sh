#!/bin/sh
# azure-provisioning.sh: the provisioning agent in one file.
# azure-provisioning.py is the same program in Python, with the same sections and functions.
#
# Arguments, settings and exit statuses: see USAGE. Errors: a step that fails says so on stderr.
# Needs sleep, and curl, or wget with timeout, head and tr. If hostnamectl fails, it also needs
# chmod, mkdir, mv and rm; the steps beyond the default run need base64, chown, date and tr, too.
# Sources: https://learn.microsoft.com/azure/virtual-machines/linux/no-agent for the WireServer,
# .../linux/provisioning for the DVD, .../instance-metadata-service for IMDS.
#
# How to read this file:
# - UPPERCASE: settings and constants. A function sees the local variables of those that call it.
# - A function hands over texts in variables that are not local: most in $value, the others in those
#   that the comment above it names.
# - A function that fails sets $reason, for the message, and returns 1. `fail` does both:
#       CHECK || fail 'the reason' || return
#   Functions that only find out or try something return 1 without a $reason; their comments say so.

# shellcheck disable=SC3043 # local: dash, BusyBox ash, Bash and mksh have it

VERSION=2.0.0

USAGE='usage: azure-provisioning [-n | --dry-run] [STEP]...
       azure-provisioning -h | --help | --version

Provision this Linux VM on Azure. The steps run in the order given; the default
is: ready hostname disable. The first step that fails ends the run. If ready has
not run yet, but was going to, Azure is then told NotReady, with the reason.

steps:
  ready     report to Azure that this VM is Ready
  hostname  set the hostname that the user chose
  disable   disable azure-provisioning.service: it runs on the first boot only
  user      create the admin user, with its SSH keys and with sudo or doas
  password  set the password of that user, and have sshd take passwords or not
  data      save user data and custom data in /var/lib/azure-provisioning
  publish   renew the DHCP lease, so that the DNS of Azure learns the hostname
  remember  save the id of this VM; with this step, a later run does nothing

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
  AZURE_PROVISIONING_TIMEOUT     time limit of a request, in seconds (default: 30)

Progress goes to stdout, failures go to stderr.
exit status: 0 all steps are done, 1 a step failed, 2 wrong usage'

WIRESERVER=${AZURE_PROVISIONING_WIRESERVER-http://168.63.129.16}
IMDS=${AZURE_PROVISIONING_IMDS-http://169.254.169.254}
ATTEMPTS=${AZURE_PROVISIONING_ATTEMPTS-240}
INTERVAL=${AZURE_PROVISIONING_INTERVAL-5} # seconds
TIMEOUT=${AZURE_PROVISIONING_TIMEOUT-30}  # seconds
DRY_RUN=

BODY_LIMIT=65536 # bytes of a reply's body
NEWLINE='
'
CARRIAGE_RETURN=$(printf '\r')
SPACE=$(printf ' \t\n\r') # white space, as XML has it
BYTE_ORDER_MARK=$(printf '\357\273\277')
INVALID=$(printf '\001') # stands for a text that must not be used: no check of a value accepts it

# ---- Messages and failures ---------------------------------------------------------------------

# say LINE...: print lines to stdout. The VM is provisioned whether or not somebody reads them.
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
    trap '' PIPE # go on if nobody reads the output
    parse_arguments "$@"
    read_settings
    if has_word remember "$steps" && is_remembered; then
        return 0
    fi
    run_steps
}

# find_step NAME: sets $function to the function of a step; returns 1 if there is no such step.
# This is the only table.
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

# read_settings: check the settings, and take the '/' from the end of the URLs
read_settings() {
    check_url AZURE_PROVISIONING_WIRESERVER "$WIRESERVER"
    check_url AZURE_PROVISIONING_IMDS "$IMDS"
    check_number AZURE_PROVISIONING_ATTEMPTS "$ATTEMPTS" 1
    check_number AZURE_PROVISIONING_INTERVAL "$INTERVAL" 0
    check_number AZURE_PROVISIONING_TIMEOUT "$TIMEOUT" 1
    WIRESERVER=${WIRESERVER%/}
    IMDS=${IMDS%/}
}

# check_url NAME URL: a usage error if it is no base URL, http://HOST[:PORT][/PATH]
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

# check_number NAME NUMBER LEAST: a usage error if it is no number of up to six digits without
# leading zeros
check_number() {
    case $2 in
    '' | *[!0-9]* | 0?*) usage_error "bad $1" ;;
    esac
    if [ "${#2}" -gt 6 ] || [ "$2" -lt "$3" ]; then
        usage_error "bad $1"
    fi
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

# run_step STEP: run a step, or fails; sets $last_attempt, for those who do not see the lines before
run_step() {
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

# run COMMAND [ARGUMENT]...: run a command that changes the system; in a dry run, print it, if
# there is such a program. Returns 1 if there is none, or if it returns another status than 0.
run() {
    local IFS=' ' # between the words of $*
    if ! has_command "$1"; then
        return 1
    fi
    if [ -n "$DRY_RUN" ]; then
        say "Would run: $*"
        return
    fi
    "$@" || return 1
}

# say_done LINE: print what has been changed, unless this is a dry run, in which nothing has
say_done() {
    [ -n "$DRY_RUN" ] || say "$1"
}

# write_file FILE MODE OWNER COMMAND [ARGUMENT]...: replace a file, or make a new one, by what the
# command prints, in one step: nobody ever finds half of it. OWNER is UID:GID, or '' for root. Can
# fail.
write_file() {
    local file="$1" mode="$2" owner="$3"
    shift 3
    if [ -n "$DRY_RUN" ]; then
        say "Would write $file"
        return
    fi
    if ! write_new_file "$@" 2>/dev/null; then
        rm -f "$file.new"
        fail "cannot write $file"
    fi
}

# write_new_file COMMAND [ARGUMENT]...: do the work of write_file, with its $file, $mode and $owner;
# returns 1 if that is not possible
write_new_file() {
    mkdir -p "${file%/*}" || return 1
    if [ -d "$file" ]; then # mv would put the new file into it
        return 1
    fi
    rm -f "$file.new" || return 1
    (
        set -C # the file has to be a new one, and no symlink
        "$@" >"$file.new"
    ) || return 1
    chmod "$mode" "$file.new" || return 1
    [ -z "$owner" ] || chown -h "$owner" "$file.new" || return 1
    mv -f "$file.new" "$file" || return 1
}

# ---- HTTP --------------------------------------------------------------------------------------

# exchange LABEL URL DATA LIMIT [--header HEADER]...: send a request, a POST if there are data, else
# a GET; sets $status, 000 without a reply, and $body. Fails with the label.
#
# A GET wants status 200, a POST any 2xx. The body has at most as many bytes as the limit says.
# All of it takes at most TIMEOUT.
exchange() {
    local label="$1" url="$2" data="$3" limit="$4" problem=''
    shift 4
    status=000
    set -- "$@" \
        --header "User-Agent: azure-provisioning/$VERSION" \
        --header 'Accept: */*' \
        --header 'Accept-Encoding: identity' \
        --header 'Connection: close'
    if has_command curl; then
        transfer_with_curl "$@"
    elif has_command wget; then
        transfer_with_wget "$@"
    else
        hopeless=yes # see retry
        problem='no curl or wget'
    fi
    case $status in # a bad one is the reason, whatever else is wrong with the reply
    000 | 200) ;;
    2??) [ -n "$data" ] || fail "$label: HTTP $status" || return ;;
    *) fail "$label: HTTP $status" || return ;;
    esac
    [ -z "$problem" ] || fail "$label: $problem"
}

# transfer_with_curl [--header HEADER]...: do the work of exchange, with its $url, $data and $limit.
# Sets $status, $body, and $problem, which is '' if all is well.
transfer_with_curl() {
    local reply size code bytes_a_second
    [ -z "$data" ] || set -- "$@" --data-binary "$data"
    # Before curl 8.4, --max-filesize does not end a body whose length is not announced. This rate
    # does: a little more than four times the limit comes within TIMEOUT.
    bytes_a_second=$((4 * limit / TIMEOUT + 4096))
    # What curl prints is: BODY STATUS SIZE
    { reply=$(curl -q --silent --fail --noproxy '*' --proto =http --max-time "$TIMEOUT" \
        --max-filesize "$limit" --limit-rate "$bytes_a_second" \
        --write-out ' %{http_code} %{size_download}' "$@" "$url"); } 2>/dev/null
    code=$?
    case $reply in
    *' '[0-9][0-9][0-9]' '[0-9]*) ;;
    *) reply=' 000 0' ;; # curl was killed
    esac
    size=${reply##* }
    reply=${reply% *}
    status=${reply##* }
    body=${reply% *}
    case $code in         # curl's exit status
    0 | 22) problem='' ;; # 22: --fail ended it, because of a bad status
    28) problem='timed out' ;;
    63) problem='reply too large' ;;
    1 | 8 | 27) problem='broken reply' ;; # what came is no HTTP
    *) problem=$(describe_loss) ;;
    esac
    if [ "$size" -gt "$limit" ]; then
        problem='reply too large'
    fi
    if [ "${#body}" -ne "$size" ]; then # the shell has dropped a NUL byte
        body=$INVALID
    fi
}

# transfer_with_wget [--header HEADER]...: as transfer_with_curl, with the wget of GNU or of BusyBox
transfer_with_wget() {
    local reply code most=$((limit + 12)) # bytes of a reply, with the two numbers at its end
    [ -z "$data" ] || set -- "$@" --post-data "$data"
    case $(wget --help 2>&1) in
    *--max-redirect*) set -- --no-config --tries=1 --max-redirect=0 "$@" ;; # GNU's has these
    esac
    # What run_wget prints is: BODY STATUS CODE. tr makes a NUL byte, which the shell would drop, an
    # INVALID.
    reply=$(run_wget "$@" 2>/dev/null | head -c "$most" | tr '\000' "$INVALID")
    if [ "${#reply}" -eq "$most" ]; then # head has cut off the end
        status=200
        problem='reply too large'
        return
    fi
    case $reply in
    *' '[0-9][0-9][0-9]' '*) ;;
    *) reply=' 000 killed' ;;
    esac
    code=${reply##* }
    reply=${reply% *}
    status=${reply##* }
    body=${reply% *}
    case $code in
    0) problem='' ;;
    no-http) problem='broken reply' ;;
    124 | 143) problem='timed out' ;; # the exit status of timeout, of coreutils and of BusyBox
    *) problem=$(describe_loss) ;;
    esac
    if [ "${#body}" -gt "$limit" ]; then
        problem='reply too large'
    fi
}

# run_wget [OPTION]...: for transfer_with_wget: print the body of the reply from $url, its status,
# and the exit status
run_wget() {
    local said code status=000
    # The body goes to stdout, by way of 3, and what else wget says goes into a variable.
    { said=$(timeout "$TIMEOUT" wget -q -S -Y off -O - "$@" "$url" 2>&1 >&3); } 3>&1
    code=$?
    case $said in # wget puts two spaces before the lines of the reply
    *'  HTTP/1.'?' '[1-9][0-9][0-9]*) status=${said#*'  HTTP/1.'? } ;;
    *'  '*) code=no-http ;;
    esac
    printf ' %.3s %s' "$status" "$code" # %.3s: three characters
}

# describe_loss: print what the end of a connection means, before there was a $status or after it
describe_loss() {
    case $status in
    000) say 'no connection' ;;
    *) say 'broken reply' ;;
    esac
}

# ---- Attempts ----------------------------------------------------------------------------------

# retry STEP ATTEMPTS required|optional COMMAND [ARGUMENT]...: call the command until it does not
# fail. Fails after so many attempts, with $last_attempt: why the last one failed.
#
# A wait of 1 second follows the first attempt, then 2, 3 and so on, up to INTERVAL. IMDS may have
# no value that is optional. But it also says so ($absent) for a moment while it starts: $value is
# '' when it has said so five times in all, or at each attempt if there are fewer. What is
# $hopeless is not tried again.
retry() {
    local step="$1" attempts="$2" kind="$3" attempt=1 absences=0 enough=5
    shift 3
    if [ "$attempts" -lt 5 ]; then
        enough=$attempts
    fi
    while :; do
        absent=''
        hopeless=''
        if "$@"; then
            return
        fi
        complain "$step: attempt $attempt of $attempts: $reason"
        if [ "$kind" = optional ] && [ -n "$absent" ]; then
            absences=$((absences + 1))
            if [ "$absences" -eq "$enough" ]; then
                value=''
                return
            fi
        fi
        if [ "$attempt" -eq "$attempts" ] || [ -n "$hopeless" ]; then
            last_attempt=": $reason"
            fail "gave up after $attempt attempts" || return
        fi
        sleep $((attempt < INTERVAL ? attempt : INTERVAL))
        attempt=$((attempt + 1))
    done
}

# ---- Step ready: the goal state and the health report ------------------------------------------

# report_ready: report to the WireServer that this VM is Ready, or fails
report_ready() {
    say 'Retrieving goal state from the Wireserver'
    retry ready "$ATTEMPTS" required report_health Ready ''
}

# report_health STATE DETAILS: request the goal state, and send a health report for it, or fails.
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

# request_goal_state: sets $incarnation, $container_id and $instance_id, or fails
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

# take_goal_state PATH TEXT: for read_xml: keep the text of the first element at each of these paths
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

# read_xml ROOT TAKE: read the XML document in $body; returns 1 if it has no root of that name, or
# is none. The document is cut at each '<', into tags with the text behind them. At the end of each
# element, TAKE is called with the element's path and its text:
#
#     <a>1<b>2</b><c/></a>    is cut into    $path is then    calls
#                             a>1            /a
#                             b>2            /a/b
#                             /b>            /a               TAKE a/b 2
#                             c/>            /a               TAKE a/c ''
#                             /a>            ''               TAKE a INVALID, as it has elements
#
# It refuses some legal documents that Azure does not send: those with a document type definition
# or CDATA, with a '>' in an attribute, with a tag of more than 1000 bytes. A text with a comment
# in it is INVALID.
read_xml() {
    local root="$1" take="$2" path='' text='' markup_end='' before piece IFS='<'
    before=${body%%<*}
    is_blank "${before#"$BYTE_ORDER_MARK"}" || return 1
    for piece in ${body#"$before<"}; do
        if [ -z "$markup_end" ]; then
            case $piece in
            '!--'*) # a comment
                markup_end='-->'
                piece=${piece#!--}
                ;;
            '?'*) # an instruction, or the XML declaration
                markup_end='?>'
                piece=${piece#?}
                ;;
            esac
        fi
        if [ -z "$markup_end" ]; then
            read_piece "$piece" || return 1
        else # it goes on, over any '<', to its end
            text=$INVALID
            case $piece in
            *"$markup_end"*) markup_end='' ;;
            esac
        fi
    done
    case $body in
    *'<') return 1 ;; # the shell makes no piece of the nothing behind it
    esac
    [ -z "$path$markup_end" ] && [ -z "$root" ] # all is closed, and the root has been there
}

# read_piece TAG>TEXT: read a piece, for read_xml, whose $root, $path and $text it changes; returns
# 1 if it is none
read_piece() {
    local tag="${1%%>*}" name
    if [ "$tag" = "$1" ] || [ "${#tag}" -gt 1000 ]; then # there is no '>', or this would take long
        return 1
    fi
    name=${tag#/}
    name=${name%%["$SPACE"/]*} # without attributes
    name=${name##*:}           # without a prefix
    case $name in
    '' | '!'*) return 1 ;; # '!': a document type definition, or CDATA
    esac
    case $tag in
    "$name" | "/$name") ;;     # most tags: no attributes, no prefix
    */["$SPACE"]*) return 1 ;; # the '/' of an empty element stands at the end
    *) has_paired_quotes "$tag" || return 1 ;;
    esac
    case $tag in
    /*)
        end_element "$name" || return 1
        ;;
    */)
        start_element "$name" '' || return 1
        end_element "$name" || return 1
        ;;
    *)
        start_element "$name" "${1#*>}" || return 1
        ;;
    esac
    [ -n "$path" ] || is_blank "${1#*>}" # outside of the root there is no text
}

# has_paired_quotes TAG: whether each quote in it is closed; if not, its '>' is that of an attribute
has_paired_quotes() {
    local rest="$1"
    while :; do
        rest=${rest#"${rest%%[\"\']*}"} # without what stands before the first quote
        case $rest in
        '') return ;;
        \"*\"*) rest=${rest#\"*\"} ;;
        \'*\'*) rest=${rest#\'*\'} ;;
        *) return 1 ;;
        esac
    done
}

# start_element NAME TEXT: a part of read_piece
start_element() {
    if [ -z "$path" ]; then
        [ "$1" = "$root" ] || return 1
        root='' # there is only one
    fi
    path=$path/$1
    text=$2
    [ "${#path}" -le 5000 ] # more would take long
}

# end_element NAME: a part of read_piece
end_element() {
    [ "$1" = "${path##*/}" ] || return 1
    "$take" "${path#/}" "$text"
    path=${path%/*}
    text=$INVALID # that of the element around, as this one is in it
}

# is_blank TEXT: whether it is white space, or nothing
is_blank() {
    case $1 in
    *[!"$SPACE"]*) return 1 ;;
    esac
}

# squeeze TEXT: sets $value to it without white space at its ends, and with one space for each run
# of it
squeeze() {
    local IFS="$SPACE"
    # shellcheck disable=SC2086 # split into words
    set -- $1
    # For the shell, there is an empty word between two CR. It goes when the words are split again.
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

# is_id TEXT: whether it is visible ASCII, '!' to '~', without what XML could not hold as it is
is_id() {
    case $1 in
    '' | *[!!-~]*) return 1 ;;
    *[\<\>\&\"\']*) return 1 ;;
    esac
}

# ---- Step hostname: a value from IMDS ----------------------------------------------------------

# set_hostname: set the hostname that the user chose; if there is none, the name of the VM's
# resource. Can fail.
set_hostname() {
    local name
    say 'Retrieving hostname from IMDS'
    retry hostname "$ATTEMPTS" optional request_text osProfile/computerName || return
    if [ -z "$value" ]; then
        retry hostname "$ATTEMPTS" required request_text name || return
    fi
    name=$value
    is_hostname "$name" || fail 'no valid hostname' || return
    say "Hostname: $name"
    if ! run hostnamectl set-hostname "$name"; then
        write_file /etc/hostname 644 '' printf '%s\n' "$name" || return
        set_kernel_hostname "$name"
    fi
}

# is_hostname TEXT: whether it is a hostname of up to 64 characters, with up to 63 between two dots
is_hostname() {
    local longest=63
    case $1 in
    *.*) longest=64 ;;
    esac
    case $1 in
    '' | *[!A-Za-z0-9._-]*) return 1 ;;
    [!A-Za-z0-9]* | *[!A-Za-z0-9] | *..*) return 1 ;;
    esac
    [ "${#1}" -le $longest ]
}

# set_kernel_hostname NAME: set the hostname until the next boot, which reads /etc/hostname; or
# fails
set_kernel_hostname() {
    if [ -n "$DRY_RUN" ]; then
        return
    fi
    hostname "$1" 2>/dev/null ||
        { printf '%s\n' "$1" >/proc/sys/kernel/hostname; } 2>/dev/null ||
        fail "cannot set the kernel's hostname"
}

# request_text LEAF: request a value from IMDS; sets $value to its text, squeezed. Fails if it is
# empty.
request_text() {
    request_leaf "$1" || return
    squeeze "$value"
    [ -n "$value" ] || fail "${1##*/}: empty"
}

# request_leaf LEAF [LIMIT]: request a value from IMDS; sets $value to its text, which may be empty.
#
# Fails, with $absent set, if IMDS says 404, or 400: it may be too old to know the value.
request_leaf() {
    local leaf="$1" limit="${2-$BODY_LIMIT}" version=2021-02-01 url
    if [ "$leaf" = name ]; then
        version=2019-06-01
    fi
    url="$IMDS/metadata/instance/compute/$leaf?api-version=$version&format=text"
    if ! exchange "${leaf##*/}" "$url" '' "$limit" --header 'Metadata: true'; then
        case $status in
        400 | 404) absent=yes ;;
        esac
        return 1
    fi
    value=$body
}

# ---- Step disable ------------------------------------------------------------------------------

# disable_unit: disable the service, of systemd or OpenRC, so that the next boot does not run it; or
# fails
disable_unit() {
    run systemctl disable azure-provisioning.service ||
        run rc-update del azure-provisioning ||
        fail 'neither systemctl nor rc-update disabled azure-provisioning' || return
    say_done 'Disabled azure-provisioning.service'
}

# ================================================================================================
# The default run ends here. What follows runs only if another step is named.
# ================================================================================================

# ---- NotReady: a step before ready failed ------------------------------------------------------

# report_not_ready REASON: report to the WireServer that this VM will not be Ready, so that nobody
# waits for it
report_not_ready() {
    local now message description
    read_vm_id
    now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
    message="result=error|reason=$1|agent=azure-provisioning/$VERSION|vm_id=$vm_id|timestamp=$now"
    # Spaces take the place of & < > and of what is not visible ASCII.
    description=$(printf '%.512s' "$message" | tr -c ' -~' ' ' | tr '&<>' ' ')
    say 'Retrieving goal state from the Wireserver'
    retry NotReady "$ATTEMPTS" required report_health NotReady "<Details>\
<SubStatus>ProvisioningFailed</SubStatus>\
<Description>$description</Description>\
</Details>" || complain "NotReady: $reason"
}

# read_vm_id: sets $vm_id to the id of this VM in lower case, '' if the firmware does not tell one
read_vm_id() {
    vm_id=''
    if read_file /sys/class/dmi/id/product_uuid; then
        vm_id=$(printf '%s\n' "$text" | tr A-F a-f)
    fi
    case $vm_id in
    *[!0-9a-f-]*) vm_id='' ;;
    esac
    if [ "${#vm_id}" -ne 36 ]; then
        vm_id=''
    fi
}

# read_file FILE: sets $text to the text of a file without line feeds at its end, '' if there is no
# such file. Fails if it cannot be read, or is no text: what is not understood must not be changed.
read_file() {
    text=''
    if [ ! -e "$1" ] && [ ! -L "$1" ]; then
        return
    fi
    [ -f "$1" ] || fail "cannot read $1" || return # opening a FIFO would take for ever
    # The shell would drop a NUL byte.
    { text=$(tr '\000' "$INVALID" <"$1"); } 2>/dev/null || fail "cannot read $1" || return
    case $text in
    *"$INVALID"*) fail "cannot read $1" ;;
    esac
}

# ---- Step user: the account, its SSH keys, sudo or doas ----------------------------------------

# create_user: create the admin user, unless there is one, and let it log in with its keys; or fails
create_user() {
    local name shell=/bin/sh
    say 'Retrieving user from IMDS'
    retry user "$ATTEMPTS" required request_text osProfile/adminUsername || return
    name=$value
    is_user_name "$name" || fail 'no valid user name' || return
    say "User: $name"
    request_keys || return
    find_account "$name" || return
    if [ -z "$account" ]; then
        if [ -x /bin/bash ]; then
            shell=/bin/bash
        fi
        if ! run useradd -m -s $shell "$name"; then
            run adduser -D -s $shell "$name" # BusyBox's; whether it worked is seen below
        fi
        if [ -n "$DRY_RUN" ]; then # without an account, there is no more to look at
            return
        fi
        find_account "$name" || return
    fi
    [ -n "$account" ] || fail 'neither useradd nor adduser made the user' || return
    let_keys_in || return
    if [ -n "$keys" ]; then
        authorize_keys || return
    fi
    grant_root "$name"
}

# is_user_name TEXT: whether it is a user name. sudo has other uses for ALL and other names in
# capitals.
is_user_name() {
    case $1 in
    '' | root | *[!A-Za-z0-9._-]* | [!A-Za-z_]*) return 1 ;;
    *[a-z]*) [ "${#1}" -le 32 ] ;;
    *) return 1 ;;
    esac
}

# request_keys: sets $keys to the user's valid SSH keys, a line each. Fails if there is neither a
# key nor a password.
request_keys() {
    local names name number=0 IFS=' '
    keys=''
    retry user "$ATTEMPTS" optional request_leaf publicKeys || return
    squeeze "$value"
    names=$value
    for name in $names; do # 0/ 1/ 2/ and so on
        if [ "${name%/}" != $number ] || [ $number -gt 99 ]; then
            fail 'publicKeys: no valid list' || return
        fi
        retry user "$ATTEMPTS" optional request_leaf publicKeys/$number/keyData || return
        remove "$CARRIAGE_RETURN$NEWLINE" "$value" # Azure may break a key into lines
        squeeze "$value"
        if is_ssh_key "$value"; then
            say "SSH key: ${value%% *}"
            keys=$keys$value$NEWLINE
        else
            complain "user: publicKeys/$number: no OpenSSH public key"
        fi
        number=$((number + 1))
    done
    if [ -z "$keys" ]; then
        retry user "$ATTEMPTS" optional \
            request_leaf osProfile/disablePasswordAuthentication || return
        squeeze "$value"
        [ "$value" = false ] || fail 'no valid SSH key, and no password'
    fi
}

# remove CHARACTERS TEXT: sets $value to the text without these characters
remove() {
    local IFS="$1"
    # shellcheck disable=SC2086 # split at each of the characters
    set -- $2
    IFS='' # and put together with nothing between
    value="$*"
}

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

# has_control_character TEXT: whether there is one in it
has_control_character() {
    case $1 in
    *[$CONTROL_CHARACTERS]*) ;;
    *) return 1 ;;
    esac
}

CONTROL_CHARACTERS=$(printf '\001-\037\177') # a range and one more, for [ ]

# find_account NAME: sets $account to the user's name, or to '' if there is no such account; or
# fails. Also sets $password_field, that in /etc/shadow, or in /etc/passwd if the user has no line
# there; $owner, the numbers of the user and of its group; and $home, the path of its home.
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
    owner=${3-}:${4-}
    home=${6-}
    is_number "${3-}" || fail "/etc/passwd: no valid line for $name" || return
    is_number "${4-}" || fail "/etc/passwd: no valid line for $name" || return
    find_line /etc/shadow "$name" || return
    if [ -n "$line" ]; then
        # shellcheck disable=SC2086 # split into fields
        set -- $line
        password_field=${2-}
    fi
    account=$name
}

# find_line FILE NAME: sets $line to the first line of /etc/passwd or /etc/shadow for a user, '' if
# there is none; or fails
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

# let_keys_in: unlock the $account without giving it a password: '*' in the place of one that begins
# with '!'. Without PAM, sshd takes no key for an account that is locked with '!'. Can fail.
let_keys_in() {
    case $password_field in
    '!'*)
        say "$account:*" | run chpasswd -e ||
            run usermod -p '*' "$account" ||
            fail 'chpasswd failed'
        ;;
    esac
}

# authorize_keys: add the $keys to the authorized_keys of the $account, unless they are there; or
# fails
authorize_keys() {
    local folder="$home/.ssh" path="$home/.ssh/authorized_keys" lines key blob IFS="$NEWLINE"
    if [ -L "$folder" ] || [ -L "$path" ]; then # the user could have made it; this is root
        fail "$folder: a symlink is in the way" || return
    fi
    make_ssh_folder || fail "cannot make $folder" || return
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
    write_file "$path" 600 "$owner" printf %s "$lines"
}

# make_ssh_folder: make the $folder of the keys, and the $home if it is missing, with modes that
# sshd accepts; returns 1 if that is not possible
make_ssh_folder() {
    if [ ! -d "$home" ]; then # a run was cut off after it had made the account
        run mkdir -p "$home" || return
        run chown "$owner" "$home" || return
    fi
    run mkdir -p "$folder" || return
    run chown -h "$owner" "$folder" || return
    run chmod 700 "$folder" || return
    run chmod go-w "$home"
}

# grant_root NAME: let the user become root without a password, with sudo or doas, if one accepts
# the rule. Fails only if a rule cannot be written.
grant_root() {
    local sudo_rule="$1 ALL=(ALL:ALL) NOPASSWD:ALL" doas_path=/etc/doas.conf doas_rules
    if [ -d /etc/doas.d ]; then
        doas_path=/etc/doas.d/azure-provisioning.conf
    fi
    read_file "$doas_path" || return
    add_last_line "$text" "permit nopass $1"
    doas_rules=$value
    if say "$sudo_rule" | run visudo -q -c -f -; then
        write_file /etc/sudoers.d/azure-provisioning 440 '' printf '%s\n' "$sudo_rule"
    elif say "$doas_rules" | run doas -C /dev/stdin; then
        write_file "$doas_path" 440 '' printf '%s\n' "$doas_rules"
    else # there may be neither; the user can log in all the same
        complain "user: neither sudo nor doas takes a rule for $1"
    fi
}

# add_last_line TEXT LINE: sets $value to a text that ends with the line. doas goes by the last of
# its rules that fits.
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
DVD_ATTEMPTS=5
DATA_LIMIT=122880 # bytes: 64 KiB in base64, with room for line breaks

# request_dvd: read ovf-env.xml, which is on a DVD at the first boot; sets $user_name,
# $user_password, $disable_passwords and $custom_data to the texts in it, or to ''. Can fail.
request_dvd() {
    mount_dvd || return
    # The shell would drop a NUL byte.
    { body=$(tr '\000' "$INVALID" <"$OVF_FILE") || body=''; } 2>/dev/null
    umount "$DVD_FOLDER" # if it stays mounted, mount_dvd finds the file there
    [ -n "$body" ] || fail 'ovf-env.xml: cannot be read' || return
    [ "${#body}" -le "$DATA_LIMIT" ] || fail 'ovf-env.xml: not an OVF environment' || return
    unset user_name user_password disable_passwords custom_data
    read_xml Environment take_ovf || fail 'ovf-env.xml: not an OVF environment' || return
    user_name=${user_name-}
    user_password=${user_password-}
    disable_passwords=${disable_passwords-}
    custom_data=${custom_data-}
}

# take_ovf PATH TEXT: for read_xml: keep the text of the first element at each of these paths
take_ovf() {
    case ${1#Environment/ProvisioningSection/LinuxProvisioningConfigurationSet/} in
    UserName) user_name=${user_name-$2} ;;
    UserPassword) user_password=${user_password-$2} ;;
    DisableSshPasswordAuthentication) disable_passwords=${disable_passwords-$2} ;;
    CustomData) custom_data=${custom_data-$2} ;;
    esac
}

# mount_dvd: mount the DVD where only root can see it, unless it is still mounted since an earlier
# try; or fails
mount_dvd() {
    mkdir -p "$DVD_FOLDER"
    if [ -e "$OVF_FILE" ]; then
        return
    fi
    [ -e /dev/sr0 ] || fail 'ovf-env.xml: no DVD' || return
    mount -t udf,iso9660 -o ro,nosuid,nodev,noexec /dev/sr0 "$DVD_FOLDER" ||
        fail 'ovf-env.xml: no DVD'
}

# ---- Step password -----------------------------------------------------------------------------

SSHD_CONFIG=/etc/ssh/sshd_config

# set_password: set the password of the admin user, and have sshd take passwords or not; or fails
set_password() {
    local name
    say 'Retrieving password from the DVD'
    retry password "$DVD_ATTEMPTS" required request_dvd || return
    squeeze "$user_name"
    name=$value
    is_user_name "$name" || fail 'no valid user name' || return
    decode_entities "$user_password" || fail 'no valid password' || return
    if has_control_character "$value" || [ "${#value}" -gt 72 ]; then
        fail 'no valid password' || return
    fi
    if [ -n "$value" ]; then
        print_line "$name:$value" | run chpasswd || fail 'chpasswd failed' || return
        say_done 'Password set'
    fi
    if [ ! -f "$SSHD_CONFIG" ]; then
        return
    fi
    squeeze "$disable_passwords"
    case $value in
    [Tt][Rr][Uu][Ee]) configure_sshd no ;;
    [Ff][Aa][Ll][Ss][Ee]) configure_sshd yes ;;
    esac
}

# decode_entities TEXT: sets $value to the text with what &amp; and so on stand for. Returns 1 if
# there is another '&'.
decode_entities() {
    local rest="$1&"
    value=''
    while :; do
        value=$value${rest%%'&'*}
        rest=${rest#*'&'}
        case $rest in
        '') return ;; # that was the '&' that has been added above
        'amp;'*) value="$value&" ;;
        'lt;'*) value="$value<" ;;
        'gt;'*) value="$value>" ;;
        'quot;'*) value="$value\"" ;;
        'apos;'*) value="$value'" ;;
        *) return 1 ;;
        esac
        rest=${rest#*;}
    done
}

# print_line LINE: print a line that may be secret: it is not the argument of a process, which every
# user could see. mksh has print in the place of printf; the other shells have printf.
print_line() {
    if [ "$(command -v printf)" = printf ]; then
        printf '%s\n' "$1"
    else
        # shellcheck disable=SC2039,SC3045 # only mksh comes here
        print -r -- "$1"
    fi 2>/dev/null # the reader may be gone
}

# configure_sshd ANSWER: have sshd take passwords, or not, at both of its prompts, by the first
# lines of its file: sshd goes by the first line of each setting. Can fail.
configure_sshd() {
    local first="PasswordAuthentication $1" second="KbdInteractiveAuthentication $1" others
    read_file "$SSHD_CONFIG" || return
    others=$text${text:+$NEWLINE}
    while :; do
        case $others in # of an earlier run, or as good as one
        'PasswordAuthentication '*) others=${others#*"$NEWLINE"} ;;
        'KbdInteractiveAuthentication '*) others=${others#*"$NEWLINE"} ;;
        *) break ;;
        esac
    done
    write_file "$SSHD_CONFIG" 644 '' printf '%s\n%s\n%s' "$first" "$second" "$others" || return
    say_done "PasswordAuthentication: $1"
    reload_sshd
}

# reload_sshd: have sshd read its configuration again, if it is running. If none is, there is no
# need.
reload_sshd() {
    run systemctl try-reload-or-restart sshd.service ||
        run systemctl try-reload-or-restart ssh.service ||
        run rc-service --ifstarted sshd reload ||
        return 0
}

# ---- Step data ---------------------------------------------------------------------------------

STATE_FOLDER=/var/lib/azure-provisioning

# save_data: save the user data, from IMDS, and the custom data, from the DVD if that can be read;
# or fails
save_data() {
    say 'Retrieving user data from IMDS'
    retry data "$ATTEMPTS" optional request_leaf userData "$DATA_LIMIT" || return
    save userData "$STATE_FOLDER/user-data" "$value" || return
    say 'Retrieving custom data from the DVD'
    if retry data "$DVD_ATTEMPTS" required request_dvd; then
        save customData "$STATE_FOLDER/custom-data" "$custom_data"
    fi
}

# save LABEL FILE TEXT: write to a file what a text is in base64. Without a text, remove the file,
# of another VM. Can fail.
save() {
    remove "$SPACE" "$3"
    is_base64 "$value" || fail "$1: no base64" || return
    if [ -n "$value" ]; then
        write_file "$2" 600 '' decode_base64 "$value" || return
        say_done "$1: $2"
    else
        run rm -f "$2" || fail "cannot remove $2" || return
        say_done "$1: none"
    fi
}

# is_base64 TEXT: whether it is base64 with its padding, and encodes bytes, without bits left over
is_base64() {
    case $1 in
    *[!A-Za-z0-9+/=]* | *=[!=]* | *===*) return 1 ;;
    *[!AQgw]== | *[!AEIMQUYcgkosw048=]=) return 1 ;; # with another letter, bits are left over
    esac
    [ $((${#1} % 4)) -eq 0 ]
}

# decode_base64 TEXT: print what it encodes
decode_base64() {
    print_line "$1" | base64 -d
}

# ---- Step publish ------------------------------------------------------------------------------

# publish_hostname: have the DHCP client renew the lease of the default route's interface, with the
# hostname; or fails
publish_hostname() {
    find_interface || return
    [ -n "$interface" ] || fail 'no default route' || return
    renew_lease || fail "no DHCP client renewed the lease of $interface" || return
    say_done "Renewed the DHCP lease of $interface"
}

# find_interface: sets $interface to that of the first default route, '' if there is none; or fails
find_interface() {
    local route IFS="$NEWLINE"
    interface=''
    read_file /proc/self/net/route || return
    for route in $text; do
        # Interface, destination, gateway, flags, references, use, metric, mask and more
        IFS=$SPACE
        # shellcheck disable=SC2086 # split into fields
        set -- $route
        if [ "${2-}" = 00000000 ] && [ "${8-}" = 00000000 ]; then
            interface=$1
            return
        fi
    done
}

# renew_lease: ask the DHCP clients one by one to renew the lease of $interface; returns 1 if none
# does
renew_lease() {
    run networkctl reconfigure "$interface" ||
        run nmcli device reapply "$interface" ||
        run dhcpcd -n "$interface" ||
        renew_with_dhclient ||
        run killall -USR1 udhcpc
}

# renew_with_dhclient: renew the lease with a second dhclient, as the first one takes no orders,
# and end it. The script /bin/true has it leave the interface alone. Returns 1 if that is not
# possible.
renew_with_dhclient() {
    run dhclient -1 -q -sf /bin/true "$interface" &&
        run dhclient -x -q "$interface"
}

# ---- Step remember -----------------------------------------------------------------------------

VM_ID_FILE=$STATE_FOLDER/vm-id

# remember_vm: save the id of this VM, by which later runs know that it is provisioned; or fails
remember_vm() {
    read_vm_id
    [ -n "$vm_id" ] || fail 'cannot read /sys/class/dmi/id/product_uuid' || return
    write_file "$VM_ID_FILE" 600 '' printf '%s\n' "$vm_id" || return
    say_done "Remembered: $vm_id"
}

# is_remembered: whether an earlier run on this VM has done the step remember; says so
is_remembered() {
    local remembered
    read_file "$VM_ID_FILE" || return 1
    remembered=$text
    read_vm_id
    if [ -z "$remembered" ] || [ "$remembered" != "$vm_id" ]; then
        return 1
    fi
    say "Already provisioned: $vm_id"
}

main "$@"
