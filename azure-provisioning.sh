#!/bin/sh
# azure-provisioning.sh: the provisioning agent in one file.
# azure-provisioning.py is the same program in Python, with the same sections and functions.
#
# Arguments, settings and exit statuses: see USAGE. Errors: a step that fails says so on stderr.
# Needs sleep, and curl, or else wget with timeout, head and tr. Where hostnamectl fails,
# and for the other steps, also base64, cat, chmod, chown, date, mkdir, mv, rm and tr.
# Sources, below https://learn.microsoft.com/azure/virtual-machines/: linux/no-agent and
# linux/provisioning (WireServer, DVD), instance-metadata-service (IMDS).
#
# A function returns what it finds in variables that are not local; the comment above it names them.
# If it fails, it returns 1 and has set $reason: see fail.
#
# shellcheck disable=SC3043 # local: dash, BusyBox ash, Bash and mksh have it

VERSION=1.0.0

USAGE='usage: azure-provisioning [-n | --dry-run] [STEP]...
       azure-provisioning -h | --help | --version

Provision this Linux VM on Azure. The steps run in the order given; without any
it is: ready hostname disable. The first step that fails ends the run. If ready
was still to come then, Azure is told NotReady, with the reason.

steps:
  ready     report to Azure that this VM is Ready
  hostname  set the hostname that the user chose
  disable   disable azure-provisioning.service: it runs on the first boot only
  user      create the admin user, with its SSH keys and with sudo or doas
  password  set the password of that user, and have sshd take passwords or not
  data      save user data and custom data in /var/lib/azure-provisioning
  publish   renew the DHCP lease, so that the DNS of Azure learns the hostname
  remember  save the id of this VM: later runs of a command with it do nothing

options:
  -n, --dry-run  print what would be changed, and change nothing
  -h, --help     print this text
  --version      print the version

settings, from the environment, with their defaults:
  AZURE_PROVISIONING_WIRESERVER  base URL of the WireServer: http://168.63.129.16
  AZURE_PROVISIONING_IMDS        base URL of the metadata service (IMDS):
                                 http://169.254.169.254
  AZURE_PROVISIONING_ATTEMPTS    attempts at each request, at least 1: 240
  AZURE_PROVISIONING_INTERVAL    longest wait between two attempts, in seconds: 5
  AZURE_PROVISIONING_TIMEOUT     time limit of a request, in seconds: 30

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
SPACE=$(printf ' \t\n\r')         # white space, as XML has it
CONTROL=$(printf '\001-\037\177') # in [], all control characters
MARKUP=$(printf '\001')           # a character that neither XML nor a value may hold
BYTE_ORDER_MARK=$(printf '\357\273\277')

# ---- Messages and failures ---------------------------------------------------------------------

# say LINE...: print lines to stdout. The VM is provisioned whether or not somebody reads them.
say() {
    { printf '%s\n' "$@" || :; } 2>/dev/null
}

# complain LINE...: print lines to stderr
complain() {
    say "$@" >&2
}

# fail REASON: return 1; sets $reason, for a line on stderr. Use: CHECK || fail REASON || return
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

# main [ARGUMENT]...: provision the VM; return the exit status
main() {
    set -fu # -f: no * in a text is a pattern for file names when it is split into words
    export LC_ALL=C
    umask 077
    trap '' PIPE # a reader that goes away does not end the run
    parse_arguments "$@"
    read_settings
    case " $steps " in
    *' remember '*) ! is_remembered || return 0 ;;
    esac
    run_steps
}

# find_step NAME: sets $function to the function of a step; fails if there is none.
# This is the table of all steps.
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

# parse_arguments [ARGUMENT]...: sets $steps, and DRY_RUN. The first argument that is no step and
# no -n decides.
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

# read_settings: check the settings
read_settings() {
    check_url AZURE_PROVISIONING_WIRESERVER "$WIRESERVER"
    check_url AZURE_PROVISIONING_IMDS "$IMDS"
    check_number AZURE_PROVISIONING_ATTEMPTS "$ATTEMPTS" 1
    check_number AZURE_PROVISIONING_INTERVAL "$INTERVAL" 0
    check_number AZURE_PROVISIONING_TIMEOUT "$TIMEOUT" 1
    WIRESERVER=${WIRESERVER%/}
    IMDS=${IMDS%/}
}

# check_url NAME URL: it has to be http://HOST[:PORT][/PATH]
check_url() {
    local address="${2#http://}"
    case $2 in
    http://*) ;;
    *) usage_error "bad $1" ;;
    esac
    case $address in
    *[!A-Za-z0-9._~:/-]* | *//*) usage_error "bad $1" ;;
    esac
    case ${address%%/*} in # HOST[:PORT]
    '' | :*) usage_error "bad $1" ;;
    *: | *:0* | *:*[!0-9]* | *:??????*) usage_error "bad $1" ;;
    esac
}

# check_number NAME NUMBER LEAST: it has to be a number of up to six digits, without leading zeros
check_number() {
    case $2 in
    '' | *[!0-9]* | 0?* | ???????*) usage_error "bad $1" ;;
    esac
    [ "$2" -ge "$3" ] || usage_error "bad $1"
}

# run_steps: run $steps until one fails; return the exit status
run_steps() {
    local step done=' ' to_come=" $steps "
    for step in $steps; do
        done="$done$step "
        to_come=${to_come#" $step"}
        run_step "$step" && continue
        complain "$step: $reason"
        case $done:$to_come in
        *' ready '*:*) ;;
        *:*' ready '*) report_not_ready "$step: $reason$last_attempt" ;;
        esac
        return 1
    done
}

# run_step STEP: fails, with $reason and $last_attempt, if it cannot be done
run_step() {
    last_attempt=''
    find_step "$1"
    "$function"
}

# ---- Commands and files ------------------------------------------------------------------------

# has_command NAME: whether there is such a program on PATH
has_command() {
    command -v "$1" >/dev/null
}

# run COMMAND [ARGUMENT]...: run a command that changes the system, if it is there; a dry run prints
# it instead
run() {
    local IFS=' '
    has_command "$1" || return
    if [ -n "$DRY_RUN" ]; then
        say "Would run: $*"
    else
        "$@"
    fi
}

# say_done LINE: print what has been changed; in a dry run, nothing has
say_done() {
    [ -n "$DRY_RUN" ] || say "$1"
}

# write_file FILE MODE OWNER COMMAND [ARGUMENT]...: replace a file, or make a new one, by what the
# command prints, in one step: whoever reads it finds all of it. Without an OWNER, it is root's.
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

# write_new_file COMMAND [ARGUMENT]...: a part of write_file, with its $file, $mode and $owner
write_new_file() {
    mkdir -p "${file%/*}" || return
    [ ! -d "$file" ] || return # mv would put the file into it
    rm -f "$file.new" || return
    (set -C && "$@" >"$file.new") || return # -C: a new one, even if somebody is quick
    chmod "$mode" "$file.new" || return
    [ -z "$owner" ] || chown -h "$owner" "$file.new" || return
    mv -f "$file.new" "$file"
}

# ---- HTTP --------------------------------------------------------------------------------------

# exchange LABEL URL DATA LIMIT [--header HEADER]...: send a request, a POST if there are data, else
# a GET; sets $status, 000 without a reply, and $body.
#
# A GET wants status 200, a POST any 2xx. The body has at most so many bytes as the limit says.
# All of it takes TIMEOUT seconds at most.
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
        hopeless=yes
        fail "$label: no curl or wget" || return
    fi
    # A bad status is the reason for the failure, whatever came behind it.
    case ${data:+POST}$status in
    000 | POST000 | 200 | POST2??) ;;
    *) fail "$label: HTTP $status" || return ;;
    esac
    [ -z "$problem" ] || fail "$label: $problem"
}

# transfer_with_curl [--header HEADER]...: a part of exchange, with its $url, $data and $limit; sets
# $status, $body and $problem, '' if all is well
transfer_with_curl() {
    local reply size code
    [ -z "$data" ] || set -- "$@" --data-binary "$data"
    # Before curl 8.4, --max-filesize does not bound a body without a length; --limit-rate does, to
    # four times the limit, and 4 KiB for each second.
    { reply=$(curl -q --silent --fail --noproxy '*' --proto =http --max-time "$TIMEOUT" \
        --max-filesize "$limit" --limit-rate $((4 * limit / TIMEOUT + 4096)) \
        --write-out ' %{http_code} %{size_download}' "$@" "$url"); } 2>/dev/null
    code=$?
    # $reply is: BODY STATUS SIZE
    size=${reply##* }
    reply=${reply% *}
    status=${reply##* }
    body=${reply% *}
    case $status:$code in                               # curl's exit status
    000:0 | *:1 | *:8 | *:27) problem='broken reply' ;; # no HTTP
    *:0 | *:22) problem='' ;;                           # 22: --fail, for a bad status
    *:28) problem='timed out' ;;
    *:63) problem='reply too large' ;;
    000:*) problem='no connection' ;;
    *) problem='broken reply' ;; # cut short
    esac
    [ "$size" -le "$limit" ] || problem='reply too large'
    # The shell drops NUL bytes: a body that had one is made one that is never taken.
    [ "${#body}" -eq "$size" ] || body='\0'
}

# transfer_with_wget [--header HEADER]...: as transfer_with_curl, with the wget of GNU or of BusyBox
transfer_with_wget() {
    local reply headers code
    [ -z "$data" ] || set -- "$@" --post-data "$data"
    case $(wget --help 2>&1) in
    *--max-redirect*) set -- --no-config --tries=1 --max-redirect=0 "$@" ;; # GNU's has these
    esac
    # The body goes through file descriptor 3, past the variable that takes what wget says.
    reply=$({
        headers=$(timeout "$TIMEOUT" wget -q -S -Y off -O - "$@" "$url" 2>&1 >&3)
        code=$?
        status=000
        case $headers in # wget indents what the server sent
        *'  HTTP/1.'?' '[1-9][0-9][0-9]*) status=${headers#*  HTTP/1.? } ;;
        *'  '*) code=8 ;; # no HTTP
        esac
        printf ' %.3s %s' "$status" "$code"
    } 3>&1 2>/dev/null | head -c $((limit + 10)) | tr '\000' '\001')
    if [ "${#reply}" -eq $((limit + 10)) ]; then # the end is cut off
        reply="$reply 200 0"
    fi
    # $reply is: BODY STATUS EXIT_STATUS
    code=${reply##* }
    reply=${reply% *}
    status=${reply##* }
    body=${reply% *}
    case $status:$code in # wget's exit status, or timeout's
    000:0 | *:8) problem='broken reply' ;;
    *:0) problem='' ;;
    *:124 | *:143) problem='timed out' ;; # of coreutils, of BusyBox
    000:*) problem='no connection' ;;
    *) problem='broken reply' ;; # cut short
    esac
    [ "${#body}" -le "$limit" ] || problem='reply too large'
    # The shell drops NUL bytes: tr has made them \001. A body that had one is never taken.
}

# ---- Attempts ----------------------------------------------------------------------------------

# retry STEP ATTEMPTS required|optional COMMAND [ARGUMENT]...: call the command until it succeeds.
# If it never does, sets $last_attempt to why its last attempt failed, for a report to Azure.
#
# The waits between attempts are 1 second, 2, 3 and so on, up to INTERVAL.
# Of an optional value, IMDS may say that it has none ($absent); it also says so for a moment while
# it starts. Set an empty $value when it has said so five times, or as often as there are attempts.
retry() {
    local step="$1" attempts="$2" kind="$3" attempt=1 absences=0 enough=5
    shift 3
    [ "$attempts" -ge 5 ] || enough=$attempts
    while :; do
        absent='' hopeless=''
        "$@" && return
        complain "$step: attempt $attempt of $attempts: $reason"
        if [ "$kind$absent" = optionalyes ]; then
            absences=$((absences + 1))
            if [ "$absences" -eq "$enough" ]; then
                value=''
                return
            fi
        fi
        [ "$attempt" -lt "$attempts" ] && [ -z "$hopeless" ] || break
        sleep $((attempt < INTERVAL ? attempt : INTERVAL))
        attempt=$((attempt + 1))
    done
    last_attempt=": $reason"
    fail "gave up after $attempt attempts"
}

# ---- Step ready: the goal state and the health report ------------------------------------------

# report_ready: report to the WireServer that this VM is Ready
report_ready() {
    say 'Retrieving goal state from the Wireserver'
    retry ready "$ATTEMPTS" required report_health Ready ''
}

# report_health STATE DETAILS: request the goal state, and send a health report for it.
#
# It is requested anew at each attempt, as the WireServer takes no report for an old incarnation.
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

# request_goal_state: sets $incarnation, $container_id and $instance_id
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

# take_goal_state PATH TEXT: keep the text of the first element at each of these paths, for read_xml
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

# read_xml ROOT TAKE: read the XML document in $body; fails if it is none with that root.
# At the end of each element it calls TAKE PATH TEXT; the TEXT is MARKUP if there is markup in it.
#
# The document is cut at each '<'. Each piece is then a tag and the text behind it:
#     <Version>2015-04-05</Version>  becomes  'Version>2015-04-05'  and  '/Version>'
read_xml() {
    local root="$1" take="$2" path='' text='' skip_to='' before piece IFS='<'
    before=${body%%<*}
    is_blank "${before#"$BYTE_ORDER_MARK"}" || return
    # The space makes a piece, which is refused, of a '<' at the end.
    for piece in ${body#"$before<"}' '; do
        if [ -z "$skip_to" ]; then
            case $piece in
            '!--'*) # a comment
                piece=${piece#!--}
                skip_to='-->'
                ;;
            '?'*) # an instruction, or the XML declaration
                piece=${piece#?}
                skip_to='?>'
                ;;
            esac
        fi
        if [ -z "$skip_to" ]; then
            read_piece "$piece" || return
        else
            text=$MARKUP
            case $piece in
            *"$skip_to"*) skip_to='' ;;
            esac
        fi
    done
    [ -z "$root$path$skip_to" ] # the root has been there, and nothing is open
}

# read_piece PIECE: read a tag and the text behind it, for read_xml: sets its $path, which leads to the
# innermost open element, and $text, which stands behind that element's tag
read_piece() {
    local tag="${1%%>*}" name
    # What follows takes long for a long tag, and for '<' without '>' there is no tag.
    if [ "${#tag}" -gt 1000 ] || [ "$tag" = "$1" ]; then
        return 1
    fi
    name=${tag#/}
    name=${name%%["$SPACE"/]*}
    name=${name##*:} # without a prefix
    case $tag in
    "$name" | "/$name") ;; # no attributes: most tags
    *) is_closed "$tag" || return ;;
    esac
    case $tag in
    /*) end_element "$name" || return ;;
    */) start_element "$name" '' && end_element "$name" || return ;;
    *) start_element "$name" "${1#*>}" || return ;;
    esac
    [ -n "$path" ] || is_blank "${1#*>}"
}

# is_closed TAG: whether each quote in a tag has its pair: else the '>' behind it was in a value.
# A '/' with white space behind it closes nothing.
is_closed() {
    local rest="$1"
    while :; do
        case ${rest#"${rest%%[\"\']*}"} in # from the first quote on
        '') break ;;
        \"*\"*) rest=${rest#*\"*\"} ;;
        \'*\'*) rest=${rest#*\'*\'} ;;
        *) return 1 ;;
        esac
    done
    case $1 in
    */["$SPACE"]*) return 1 ;;
    esac
}

# start_element NAME TEXT: a part of read_piece
start_element() {
    case $1 in
    '' | '!'*) return 1 ;; # no name; a document type definition, CDATA
    esac
    if [ -z "$path" ] && [ "$1" != "$root" ] || [ "${#path}" -gt 5000 ]; then
        return 1
    fi
    root='' # it comes once
    path=$path/$1
    text=$2
}

# end_element NAME: a part of read_piece
end_element() {
    [ -n "$1" ] && [ "$1" = "${path##*/}" ] || return
    "$take" "${path#/}" "$text"
    path=${path%/*}
    text=$MARKUP
}

# is_blank TEXT: whether it is white space, or nothing
is_blank() {
    case $1 in
    *[!"$SPACE"]*) return 1 ;;
    esac
}

# squeeze TEXT: sets $value to the text with one space for each run of white space, none at its ends
squeeze() {
    local IFS="$SPACE"
    # shellcheck disable=SC2086 # split into words
    set -- $1
    # shellcheck disable=SC2048,SC2086 # again: the shell makes an empty word between two CR
    set -- $*
    value="$*"
}

# is_number TEXT: whether it is decimal digits
is_number() {
    case $1 in
    '' | *[!0-9]*) return 1 ;;
    esac
}

# is_id TEXT: whether it is visible ASCII without < > & " and ', so that XML can hold it as it is
is_id() {
    case $1 in
    '' | *[!!-~]* | *[\<\>\&\"\']*) return 1 ;;
    esac
}

# ---- Step hostname: a value from IMDS ----------------------------------------------------------

# set_hostname: set the hostname that the user chose, or else the name of the VM's resource
set_hostname() {
    local name
    say 'Retrieving hostname from IMDS'
    retry hostname "$ATTEMPTS" optional request_text osProfile/computerName 2021-02-01 || return
    if [ -z "$value" ]; then
        retry hostname "$ATTEMPTS" required request_text name 2019-06-01 || return
    fi
    name=$value
    is_hostname "$name" || fail 'no valid hostname' || return
    say "Hostname: $name"
    run hostnamectl set-hostname "$name" && return
    write_file /etc/hostname 644 '' printf '%s\n' "$name" || return
    set_kernel_hostname "$name"
}

# is_hostname TEXT: whether it is a hostname: Linux takes 64 characters, DNS 63 between two dots
is_hostname() {
    case $1 in
    '' | *[!A-Za-z0-9._-]* | [!A-Za-z0-9]* | *[!A-Za-z0-9] | *..*) return 1 ;;
    *.*) [ "${#1}" -le 64 ] ;;
    *) [ "${#1}" -le 63 ] ;;
    esac
}

# set_kernel_hostname NAME: set the hostname until the next boot, which reads /etc/hostname
set_kernel_hostname() {
    [ -z "$DRY_RUN" ] || return 0
    { hostname "$1" || printf '%s\n' "$1" >/proc/sys/kernel/hostname; } 2>/dev/null ||
        fail "cannot set the kernel's hostname"
}

# request_leaf LEAF API_VERSION [LIMIT]: request a value of the VM from IMDS; sets $value to it.
# Sets $absent if IMDS has none: it answers 404, or 400 if it is too old to know the value.
request_leaf() {
    local url="$IMDS/metadata/instance/compute/$1?api-version=$2&format=text"
    if ! exchange "${1##*/}" "$url" '' "${3:-$BODY_LIMIT}" --header 'Metadata: true'; then
        case $status in
        400 | 404) absent=yes ;;
        esac
        return 1
    fi
    value=$body
}

# request_text LEAF API_VERSION: request a value that is not empty from IMDS; sets $value, squeezed
request_text() {
    request_leaf "$1" "$2" || return
    squeeze "$value"
    [ -n "$value" ] || fail "${1##*/}: empty"
}

# ---- Step disable ------------------------------------------------------------------------------

# disable_unit: disable the service, of systemd or OpenRC, so that the next boot does not run it
disable_unit() {
    run systemctl disable azure-provisioning.service ||
        run rc-update del azure-provisioning ||
        fail 'neither systemctl nor rc-update disabled azure-provisioning' || return
    say_done 'Disabled azure-provisioning.service'
}

# ================================================================================================
# The default run ends here. All that follows runs only if a step is named, or fails before ready.
# ================================================================================================

# ---- NotReady: a step before ready failed ------------------------------------------------------

# report_not_ready REASON: report to the WireServer that this VM will not be Ready: whoever creates
# it stops waiting
report_not_ready() {
    local now text description
    read_vm_id
    now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
    text="result=error|reason=$1|agent=azure-provisioning/$VERSION|vm_id=$vm_id|timestamp=$now"
    description=$(printf '%.512s' "$text" | tr -c " -%'-;=?-~" ' ') # neither & nor < nor >
    say 'Retrieving goal state from the Wireserver'
    retry NotReady "$ATTEMPTS" required report_health NotReady "<Details>\
<SubStatus>ProvisioningFailed</SubStatus>\
<Description>$description</Description>\
</Details>" || complain "NotReady: $reason"
}

# read_vm_id: sets $vm_id to the id of this VM in lower case, '' if the firmware does not tell one
read_vm_id() {
    vm_id=''
    read_file /sys/class/dmi/id/product_uuid || return 0
    vm_id=$(printf '%s\n' "$text" | tr A-F a-f)
    case $vm_id in
    *[!0-9a-f-]*) vm_id='' ;;
    esac
    [ "${#vm_id}" -eq 36 ] || vm_id=''
}

# read_file FILE: sets $text to the text of a file without line feeds at its end, '' if there is no
# such file. Fails if the file cannot be read.
read_file() {
    text=''
    [ -e "$1" ] || [ -L "$1" ] || return 0
    [ -f "$1" ] || fail "cannot read $1" || return # opening a FIFO would take for ever
    { text=$(cat "$1"); } 2>/dev/null || fail "cannot read $1"
}

# ---- Step user: the account, its SSH keys, sudo or doas ----------------------------------------

# create_user: create the admin user, unless there is one, and let it log in with its keys
create_user() {
    local name shell=/bin/sh
    say 'Retrieving user from IMDS'
    retry user "$ATTEMPTS" required request_text osProfile/adminUsername 2021-02-01 || return
    name=$value
    is_user_name "$name" || fail 'no valid user name' || return
    say "User: $name"
    request_keys || return
    find_account "$name" || return
    if [ -z "$account" ]; then
        [ ! -x /bin/bash ] || shell=/bin/bash
        # BusyBox has adduser; whether it worked is seen below.
        run useradd -m -s $shell "$name" || run adduser -D -s $shell "$name"
        [ -z "$DRY_RUN" ] || return 0
        find_account "$name" || return
    fi
    [ -n "$account" ] || fail 'neither useradd nor adduser made the user' || return
    unlock || return
    [ -z "$keys" ] || authorize_keys || return
    grant_root "$name"
}

# is_user_name TEXT: whether it is a user name. sudo has other uses for ALL and its like.
is_user_name() {
    case $1 in
    '' | root | *[!A-Za-z0-9._-]* | [!A-Za-z_]*) return 1 ;;
    *[a-z]*) [ "${#1}" -le 32 ] ;;
    *) return 1 ;;
    esac
}

# request_keys: sets $keys to the user's valid SSH keys, a line each. Fails if nobody could log in.
request_keys() {
    local entries entry number=0 IFS=' '
    keys=''
    retry user "$ATTEMPTS" optional request_leaf publicKeys 2021-02-01 || return
    squeeze "$value"
    entries=$value
    for entry in $entries; do
        if [ "${entry%/}" != $number ] || [ $number -gt 99 ]; then
            fail 'publicKeys: no valid list' || return
        fi
        retry user "$ATTEMPTS" optional request_leaf publicKeys/$number/keyData 2021-02-01 || return
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
    [ -z "$keys" ] || return 0
    retry user "$ATTEMPTS" optional \
        request_leaf osProfile/disablePasswordAuthentication 2021-02-01 || return
    squeeze "$value"
    [ "$value" = false ] || fail 'no valid SSH key, and no password'
}

# remove CHARACTERS TEXT: sets $value to the text without these characters
remove() {
    local IFS="$1"
    # shellcheck disable=SC2086 # split
    set -- $2
    IFS=''
    value="$*"
}

# is_ssh_key TEXT: whether it is an OpenSSH public key: TYPE BASE64 [COMMENT]
is_ssh_key() {
    local rest="${1#* }"
    case $1 in # the type, and how the type itself begins in base64
    'ssh-rsa AAAAB3Nz'*) ;;
    'ssh-ed25519 AAAAC3Nz'*) ;;
    'ecdsa-sha2-nistp256 AAAAE2Vj'*) ;;
    'ecdsa-sha2-nistp384 AAAAE2Vj'*) ;;
    'ecdsa-sha2-nistp521 AAAAE2Vj'*) ;;
    'sk-ssh-ed25519@openssh.com AAAAGnNr'*) ;;
    'sk-ecdsa-sha2-nistp256@openssh.com AAAAInNr'*) ;;
    *) return 1 ;;
    esac
    case ${rest%% *} in
    *[!A-Za-z0-9+/=]*) return 1 ;;
    esac
    ! has_control "$1"
}

# has_control TEXT: whether it has a control character in it
has_control() {
    case $1 in
    *[$CONTROL]*) ;;
    *) return 1 ;;
    esac
}

# find_account NAME: sets $account to the user's name, or to '' if there is no such account.
# With it are set $password, the field of /etc/shadow, or of /etc/passwd if there is none;
# $owner, the numbers of the user and of its group; and $home, its folder.
find_account() {
    local name="$1" IFS=':'
    account=''
    find_line /etc/passwd "$name" || return
    [ -n "$line" ] || return 0
    # shellcheck disable=SC2086 # split into fields
    set -- $line
    password=${2-} owner=${3-}:${4-} home=${6-}
    if ! is_number "${3-}" || ! is_number "${4-}"; then
        fail "/etc/passwd: no valid line for $name" || return
    fi
    find_line /etc/shadow "$name" || return
    if [ -n "$line" ]; then
        # shellcheck disable=SC2086 # split into fields
        set -- $line
        password=${2-}
    fi
    account=$name
}

# find_line FILE NAME: sets $line to the first line of /etc/passwd or /etc/shadow for a user, or ''
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

# unlock: have the $account take keys: for one locked with '!', sshd without PAM takes none.
# '*' says that no password fits, and locks nothing.
unlock() {
    case $password in
    '!'*)
        say "$account:*" | run chpasswd -e ||
            run usermod -p '*' "$account" ||
            fail 'chpasswd failed'
        ;;
    esac
}

# authorize_keys: add the $keys to the $account's authorized_keys, unless they are there
authorize_keys() {
    local folder="$home/.ssh" path="$home/.ssh/authorized_keys" lines key rest IFS="$NEWLINE"
    make_ssh_folder || return
    read_file "$path" || return
    lines=$text${text:+$NEWLINE}
    for key in $keys; do
        rest=${key#* }
        rest="${key%% *} ${rest%% *}" # the key itself, without the comment
        case $NEWLINE$lines in
        *"$NEWLINE$rest "* | *"$NEWLINE$rest$NEWLINE"*) ;;
        *) lines=$lines$key$NEWLINE ;;
        esac
    done
    write_file "$path" 600 "$owner" printf %s "$lines"
}

# make_ssh_folder: make what is missing of $home and $folder, as sshd wants them.
# Symlinks are refused: the user could have made them, and this is root.
make_ssh_folder() {
    if [ -L "$folder" ] || [ -L "$path" ]; then
        fail "$folder: a symlink is in the way" || return
    fi
    if [ ! -d "$home" ]; then # a run was cut off after it had made the account
        run mkdir -p "$home" || fail "cannot make $folder" || return
        run chown "$owner" "$home" || fail "cannot make $folder" || return
    fi
    run mkdir -p "$folder" || fail "cannot make $folder" || return
    run chown -h "$owner" "$folder" || fail "cannot make $folder" || return
    run chmod 700 "$folder" || fail "cannot make $folder" || return
    run chmod go-w "$home" || fail "cannot make $folder"
}

# grant_root NAME: let the user become root without a password, by sudo or by doas, once that takes
# the rule
grant_root() {
    local sudo_rule="$1 ALL=(ALL:ALL) NOPASSWD:ALL" doas_path=/etc/doas.conf doas_rules
    [ ! -d /etc/doas.d ] || doas_path=/etc/doas.d/azure-provisioning.conf
    read_file "$doas_path" || return
    doas_rules=$text
    case $NEWLINE$text in
    *"${NEWLINE}permit nopass $1") ;; # its last match counts
    *) doas_rules="$text${text:+$NEWLINE}permit nopass $1" ;;
    esac
    if say "$sudo_rule" | run visudo -q -c -f -; then
        write_file /etc/sudoers.d/azure-provisioning 440 '' printf '%s\n' "$sudo_rule"
    elif say "$doas_rules" | run doas -C /dev/stdin; then
        write_file "$doas_path" 440 '' printf '%s\n' "$doas_rules"
    else
        complain "user: neither sudo nor doas takes a rule for $1"
    fi
}

# ---- The DVD: ovf-env.xml ----------------------------------------------------------------------

DVD_FOLDER=/run/azure-provisioning/dvd
OVF_FILE=$DVD_FOLDER/ovf-env.xml
DVD_ATTEMPTS=5
DATA_LIMIT=122880 # bytes: 64 KiB in base64, with room for line breaks

# request_dvd: read ovf-env.xml, which is on a DVD at the first boot; sets those that are in it of
# $user_name, $user_password, $disable_passwords and $custom_data, and the others to ''
request_dvd() {
    mount_dvd || return
    # The shell drops NUL bytes: see transfer_with_wget.
    { body=$(tr '\000' '\001' <"$OVF_FILE") || body=''; } 2>/dev/null
    umount "$DVD_FOLDER" # if it fails, the next attempt finds the file
    [ -n "$body" ] || fail 'ovf-env.xml: cannot be read' || return
    [ "${#body}" -le "$DATA_LIMIT" ] || fail 'ovf-env.xml: not an OVF environment' || return
    unset user_name user_password disable_passwords custom_data
    read_xml Environment take_ovf || fail 'ovf-env.xml: not an OVF environment' || return
    user_name=${user_name-} user_password=${user_password-}
    disable_passwords=${disable_passwords-} custom_data=${custom_data-}
}

# take_ovf PATH TEXT: keep the text of the first element at each of these paths, for read_xml
take_ovf() {
    case ${1#Environment/ProvisioningSection/LinuxProvisioningConfigurationSet/} in
    UserName) user_name=${user_name-$2} ;;
    UserPassword) user_password=${user_password-$2} ;;
    DisableSshPasswordAuthentication) disable_passwords=${disable_passwords-$2} ;;
    CustomData) custom_data=${custom_data-$2} ;;
    esac
}

# mount_dvd: mount the DVD where only root can see it, unless an earlier run has left it mounted
mount_dvd() {
    mkdir -p "$DVD_FOLDER" || fail 'ovf-env.xml: no DVD' || return
    [ ! -e "$OVF_FILE" ] || return 0
    [ -e /dev/sr0 ] || fail 'ovf-env.xml: no DVD' || return
    mount -t udf,iso9660 -o ro,nosuid,nodev,noexec /dev/sr0 "$DVD_FOLDER" ||
        fail 'ovf-env.xml: no DVD'
}

# ---- Step password -----------------------------------------------------------------------------

SSHD_CONFIG=/etc/ssh/sshd_config

# set_password: set the password of the admin user, and have sshd take passwords or not
set_password() {
    local name
    say 'Retrieving password from the DVD'
    retry password "$DVD_ATTEMPTS" required request_dvd || return
    squeeze "$user_name"
    name=$value
    is_user_name "$name" || fail 'no valid user name' || return
    decode_entities "$user_password" || fail 'no valid password' || return
    if has_control "$value" || [ "${#value}" -gt 72 ]; then
        fail 'no valid password' || return
    fi
    if [ -n "$value" ]; then
        print_line "$name:$value" | run chpasswd || fail 'chpasswd failed' || return
        say_done 'Password set'
    fi
    [ -f "$SSHD_CONFIG" ] || return 0
    squeeze "$disable_passwords"
    case $value in
    [Tt][Rr][Uu][Ee]) configure_sshd no ;;
    [Ff][Aa][Ll][Ss][Ee]) configure_sshd yes ;;
    esac
}

# decode_entities TEXT: sets $value to the text with what &amp; and so on stand for. Fails if there
# is another '&'.
decode_entities() {
    local rest="$1"
    value=''
    while [ "$rest" != "${rest%%'&'*}" ]; do
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

# print_line LINE: print a line that may be secret, and is no argument of a process: in mksh, printf
# is a program, and print is not.
print_line() {
    if [ -n "${KSH_VERSION-}" ]; then
        # shellcheck disable=SC2039,SC3045 # only mksh comes here
        print -r -- "$1"
    else
        printf '%s\n' "$1"
    fi 2>/dev/null # the reader may be gone
}

# configure_sshd ANSWER: have sshd take passwords, or not, at both of its prompts; the first line of
# each counts
configure_sshd() {
    read_file "$SSHD_CONFIG" || return
    text=$text$NEWLINE
    while :; do
        case $text in # of a former run
        'PasswordAuthentication '* | 'KbdInteractiveAuthentication '*) text=${text#*"$NEWLINE"} ;;
        *) break ;;
        esac
    done
    write_file "$SSHD_CONFIG" 644 '' printf 'PasswordAuthentication %s\n%s %s\n%s' \
        "$1" KbdInteractiveAuthentication "$1" "${text#"$NEWLINE"}" || return
    say_done "PasswordAuthentication: $1"
    reload_sshd
}

# reload_sshd: have a running sshd read its configuration; one that starts later does so anyway
reload_sshd() {
    run systemctl try-reload-or-restart sshd.service ||
        run systemctl try-reload-or-restart ssh.service ||
        run rc-service --ifstarted sshd reload ||
        :
}

# ---- Step data ---------------------------------------------------------------------------------

STATE_FOLDER=/var/lib/azure-provisioning

# save_data: save the user data, from IMDS, and the custom data, from the DVD if there is one
save_data() {
    say 'Retrieving user data from IMDS'
    retry data "$ATTEMPTS" optional request_leaf userData 2021-02-01 "$DATA_LIMIT" || return
    save userData "$STATE_FOLDER/user-data" "$value" || return
    say 'Retrieving custom data from the DVD'
    retry data "$DVD_ATTEMPTS" required request_dvd || return 0
    save customData "$STATE_FOLDER/custom-data" "$custom_data"
}

# save LABEL FILE TEXT: decode a text from base64 to a file; if it is empty, remove the file of an
# earlier VM
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

# is_base64 TEXT: whether it is base64, padding included
is_base64() {
    case $1 in
    *[!A-Za-z0-9+/=]* | *=[!=]* | *===*) return 1 ;;
    esac
    [ $((${#1} % 4)) -eq 0 ]
}

# decode_base64 TEXT: print what a text in base64 stands for
decode_base64() {
    print_line "$1" | base64 -d
}

# ---- Step publish ------------------------------------------------------------------------------

# publish_hostname: have the DHCP client of the default route's interface renew its lease, with the
# new name
publish_hostname() {
    find_interface
    [ -n "$interface" ] || fail 'no default route' || return
    renew_lease || fail "no DHCP client renewed the lease of $interface" || return
    say_done "Renewed the DHCP lease of $interface"
}

# find_interface: sets $interface to that of the first default route, '' if there is none
find_interface() {
    local name destination mask _
    interface=''
    while read -r name destination _ _ _ _ _ mask _; do
        if [ "$destination/$mask" = 00000000/00000000 ]; then
            interface=$name
            return
        fi
    done 2>/dev/null </proc/self/net/route
}

# renew_lease: ask each DHCP client in turn to renew the lease of $interface; fails if none does
renew_lease() {
    run networkctl reconfigure "$interface" ||
        run nmcli device reapply "$interface" ||
        run dhcpcd -n "$interface" ||
        renew_with_dhclient ||
        run killall -USR1 udhcpc
}

# renew_with_dhclient: ask with a second dhclient, which changes nothing here, and end it
renew_with_dhclient() {
    run dhclient -1 -q -sf /bin/true "$interface" &&
        run dhclient -x -q "$interface"
}

# ---- Step remember -----------------------------------------------------------------------------

VM_ID_FILE=$STATE_FOLDER/vm-id

# remember_vm: save the id of this VM, by which later runs know that it is provisioned
remember_vm() {
    read_vm_id
    [ -n "$vm_id" ] || fail 'cannot read /sys/class/dmi/id/product_uuid' || return
    write_file "$VM_ID_FILE" 600 '' printf '%s\n' "$vm_id" || return
    say_done "Remembered: $vm_id"
}

# is_remembered: whether a run on this VM has got to the step remember; says so
is_remembered() {
    read_vm_id
    [ -n "$vm_id" ] && read_file "$VM_ID_FILE" && [ "$text" = "$vm_id" ] || return
    say "Already provisioned: $vm_id"
}

main "$@"
