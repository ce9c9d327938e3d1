#!/usr/bin/python3 -IS
# azure-provisioning.py: the provisioning agent in one file.
# azure-provisioning.sh is the same program in shell, with the same sections and functions.
#
# Arguments, settings and exit statuses: see USAGE. Errors: a step that fails says so on stderr.
# Needs Python 3.6 and its standard library. -IS keeps Python from importing anything else.
# Sources: https://learn.microsoft.com/azure/virtual-machines/linux/no-agent for the WireServer,
# .../linux/provisioning for the DVD, .../instance-metadata-service for IMDS.
"""Provision a Linux VM on Azure, once, on its first boot."""

# ruff: noqa: E402 - two lines have to stand above the other imports
import gc
import sys

# Look for garbage after 50,000 new objects, and not after some hundreds. The imports leave none,
# and looking for it would take a twentieth of the program's CPU.
gc.set_threshold(50000)
# This keeps http.client from importing ssl, which is not used, and would take a quarter of the
# program's memory.
sys.modules['ssl'] = None

import base64
import contextlib
import http.client
import os
import re
import signal
import socket
import stat
import subprocess
import threading
import time
import types
from xml.etree import ElementTree

VERSION = '2.0.0'

USAGE = """\
usage: azure-provisioning [-n | --dry-run] [STEP]...
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
exit status: 0 all steps are done, 1 a step failed, 2 wrong usage"""

settings = types.SimpleNamespace(
    wireserver='http://168.63.129.16',
    imds='http://169.254.169.254',
    attempts=240,
    interval=5,  # seconds
    timeout=30,  # seconds
    extra_groups='',
    dry_run=False,
    steps=['ready', 'hostname', 'disable'],
)

# What changes during a run.
run_state = types.SimpleNamespace(
    has_reply=False,  # whether any server has answered so far
)

CONNECT_LIMIT = 3  # seconds to connect, at most; they are part of the timeout
BODY_LIMIT = 65536  # bytes of a reply's body, at most
ABSENCES_NEEDED = 5  # replies 'no such value' after which IMDS is believed
DVD_ATTEMPTS = 30  # to read the DVD, as the drive, or the medium in it, may come late
ATTEMPTS_BEFORE_DVD = 60  # to get a value from IMDS; then the DVD is read
WHITE_SPACE = ' \t\n\r'  # the characters that are white space in XML
ACCOUNT_NAME = '[A-Za-z_][A-Za-z0-9._-]{0,31}'  # a regular expression, for users and groups

# All texts from files and servers are bytes in Latin-1: one character for each byte, as in the
# shell.
BYTE_ENCODING = 'latin-1'
# A text that cannot be used is replaced by this character, which no valid value has.
INVALID = '\1'


# ---- Messages and failures ---------------------------------------------------------------------


def say(*lines):
    """Print lines to stdout."""
    print_lines(sys.stdout, lines)


def complain(*lines):
    """Print lines to stderr."""
    print_lines(sys.stderr, lines)


def print_lines(stream, lines):
    """Print lines. If they cannot be printed, go on: the VM has to be Ready all the same."""
    text = ''.join(f'{line}\n' for line in lines)
    if stream is not None:  # None: it is closed
        with contextlib.suppress(OSError, UnicodeError):
            stream.buffer.write(os.fsencode(text))  # ASCII, but for paths
            stream.buffer.flush()


class Failed(Exception):
    """A step, or an attempt at a request, failed. The text is the reason, for a line on stderr.

    status: the HTTP status of the reply, if that is the reason; otherwise 0.
    no_reply: whether the server did not answer.
    """

    def __init__(self, reason, status=0, no_reply=False):
        super().__init__(reason)
        self.status = status
        self.no_reply = no_reply


def end_program(status):
    """End the program. sys.exit would also flush stdout, which may fail."""
    os._exit(status)


def usage_error(message):
    """Say what is wrong with the command line or a setting, and end the program."""
    complain(f'azure-provisioning: {message}', USAGE)
    end_program(2)


# ---- The run -----------------------------------------------------------------------------------


def main(arguments):
    """Provision the VM; return the exit status."""
    os.environ['LC_ALL'] = 'C'
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it hides how commands end
    settings.steps = parse_arguments(arguments) or settings.steps
    read_settings()
    if 'remember' in settings.steps and is_remembered():
        return 0
    return run_steps()


def find_step(name):
    """Return the function of a step, or None if there is no such step. All steps are here."""
    return {
        'ready': report_ready,
        'hostname': set_hostname,
        'disable': disable_unit,
        'user': create_user,
        'password': set_password,
        'data': save_data,
        'publish': publish_hostname,
        'remember': remember_vm,
    }.get(name)


def parse_arguments(arguments):
    """Return the steps that are named. The first -h, --version or mistake ends the program."""
    steps = []
    for argument in arguments:
        if argument in ('-n', '--dry-run'):
            settings.dry_run = True
        elif argument in ('-h', '--help'):
            say(USAGE)
            end_program(0)
        elif argument == '--version':
            say(f'azure-provisioning {VERSION}')
            end_program(0)
        elif find_step(argument):
            steps.append(argument)
        else:
            usage_error(f'unknown step or option: {argument}')
    return steps


def read_settings():
    """Read the settings from the environment. One that is not valid is a usage error."""
    settings.wireserver = read_url('AZURE_PROVISIONING_WIRESERVER', settings.wireserver)
    settings.imds = read_url('AZURE_PROVISIONING_IMDS', settings.imds)
    settings.attempts = read_number('AZURE_PROVISIONING_ATTEMPTS', settings.attempts, 1)
    settings.interval = read_number('AZURE_PROVISIONING_INTERVAL', settings.interval, 0)
    settings.timeout = read_number('AZURE_PROVISIONING_TIMEOUT', settings.timeout, 1)
    settings.extra_groups = read_groups('AZURE_PROVISIONING_GROUPS', settings.extra_groups)


def read_url(name, default):
    """Return a base URL without a '/' at its end. It has to be http://HOST[:PORT][/PATH]."""
    url = os.environ.get(name, default)
    host = '[A-Za-z0-9._~-]+'
    port = '[1-9][0-9]{0,4}'
    path = '(/[A-Za-z0-9._~:-]+)*/?'
    if not re.fullmatch(f'http://{host}(:{port})?{path}', url):
        usage_error(f'bad {name}')
    return url.rstrip('/')


def read_number(name, default, least):
    """Return a number. It has to be one from LEAST to 999999, without leading zeros."""
    number = os.environ.get(name, str(default))
    if not re.fullmatch('0|[1-9][0-9]{0,5}', number) or int(number) < least:
        usage_error(f'bad {name}')
    return int(number)


def read_groups(name, default):
    """Return names of groups, separated by commas, or ''. They have to be valid."""
    groups = os.environ.get(name, default)
    if not re.fullmatch(f'({ACCOUNT_NAME}(,{ACCOUNT_NAME})*)?', groups):
        usage_error(f'bad {name}')
    return groups


def run_steps():
    """Run the steps until one fails; return the exit status."""
    tried = []
    for step in settings.steps:
        tried.append(step)
        try:
            run_step(step)
        except Failed as failure:
            complain(f'{step}: {failure}')
            if 'ready' in settings.steps and 'ready' not in tried:
                report_not_ready(f'{step}: {failure}')
            return 1
    return 0


def run_step(step):
    """Do a step. Whatever goes wrong in it, raise Failed."""
    function = find_step(step)
    try:
        function()
    except Failed:
        raise
    except Exception as error:  # one that nobody foresaw: Azure has to be told all the same
        raise Failed(f'{type(error).__name__}: {error}') from error


# ---- Commands and files ------------------------------------------------------------------------


def has_command(name):
    """Whether there is such a program on PATH."""
    paths = [f'{folder}/{name}' for folder in os.get_exec_path()]
    return any(os.path.isfile(path) and os.access(path, os.X_OK) for path in paths)


def run(*command, input_line=None):
    """Run a command that changes the system; return whether the command exists and succeeds.

    A dry run prints the command instead. The input line goes to its stdin, as it may be secret.
    """
    if not settings.dry_run:
        return run_even_dry(*command, input_line=input_line)
    if not has_command(command[0]):
        return False
    say(f'Would run: {" ".join(command)}')
    return True


def run_twice(*command):
    """Run a command as run does. If it fails, try it again: D-Bus may not have been up."""
    if run(*command):
        return True
    if not has_command(command[0]):
        return False
    time.sleep(1)
    return run(*command)


def run_even_dry(*command, input_line=None):
    """Run a command as run does, but also in a dry run, which has to read the DVD."""
    input_bytes = None
    if input_line is not None:
        input_bytes = f'{input_line}\n'.encode(BYTE_ENCODING)
    try:
        # Without restore_signals, a command goes on if nobody reads its output.
        done = subprocess.run(command, input=input_bytes, restore_signals=False)
        return done.returncode == 0
    except OSError:
        return False


def read_output(*command):
    """Run a command that changes nothing. Return what it prints, '' if it fails.

    The text has no line feeds at its end.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return ''
    if done.returncode != 0:
        return ''
    return done.stdout.decode(BYTE_ENCODING).rstrip('\n')


def say_done(line):
    """Print that something has been changed; a dry run does not print it."""
    if not settings.dry_run:
        say(line)


def write_file(path, mode, content, owner=None):
    """Replace a file, or make a new one. After a power cut it is the old one or the new one.

    mode: a number; None keeps the mode and the owner of the old file.
    owner: (UID, GID); None stands for root.
    Raise Failed if the file cannot be written.
    """
    if settings.dry_run:
        say(f'Would write {path}')
        return
    # PATH.new is there while another copy of this program writes the file. If it is still there
    # after two seconds, that copy has ended early.
    for attempt in (1, 2, 3):
        try:
            if attempt == 3:
                remove_file(f'{path}.new')
            replace_file(path, mode, content, owner)
            return
        except OSError:
            if attempt < 3:
                time.sleep(1)
    with contextlib.suppress(OSError):
        remove_file(f'{path}.new')
    raise Failed(f'cannot write {path}')


def replace_file(path, mode, content, owner):
    """Do the work of write_file. Raise OSError if that is not possible."""
    new = f'{path}.new'
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.isdir(path):
        raise IsADirectoryError(path)
    with open(new, 'xb') as file:  # x fails if it is there: another copy is writing it
        file.write(content)
        if mode is None:
            former = os.stat(path)
            mode = stat.S_IMODE(former.st_mode)
            owner = (former.st_uid, former.st_gid)
        if owner:
            os.fchown(file.fileno(), *owner)
        os.fchmod(file.fileno(), mode)
    sync_path(new)  # before the rename, or a power cut could leave an empty file
    os.replace(new, path)
    sync_path(os.path.dirname(path))


def sync_path(path):
    """Have the disk store a file, or the names of the files in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path):
    """Remove a file, or a symlink, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


# ---- HTTP --------------------------------------------------------------------------------------


def exchange(label, url, headers, data=None, limit=BODY_LIMIT):
    """Send a POST with the data, or a GET without data; return the reply's status and body.

    limit: bytes of the body, at most. The whole exchange may take settings.timeout seconds.

    what comes                   status  problem            the outcome
    nothing, or no whole status  0       'no connection'    Failed: LABEL: no connection; no_reply
    nothing in time              0       'timed out'        Failed: LABEL: timed out; no_reply
    what is not HTTP             0       'broken reply'     Failed: LABEL: broken reply
    a bad status                 404     any                Failed: LABEL: HTTP 404
    200, but half a body         200     'broken reply'     Failed: LABEL: broken reply
    200, but not in time         200     'timed out'        Failed: LABEL: timed out
    200, but a large body        200     'reply too large'  Failed: LABEL: reply too large
    200 and a body               200     ''                 is returned

    For a POST, each 2xx is as good as 200.
    """
    # do_exchange runs in a thread, so that there is one time limit for all of it. A socket's own
    # limit starts again with each byte, and the lookup of a host name has none. If the thread is
    # late, the problem stays 'timed out', and what the thread sets later is not used.
    reply = types.SimpleNamespace(status=0, body=b'', problem='timed out', socket=None)
    thread = threading.Thread(
        target=do_exchange, args=(url, headers, data, limit, reply), daemon=True
    )
    thread.start()
    thread.join(settings.timeout)
    problem = reply.problem  # read first, as the thread sets it last
    status = reply.status
    body = reply.body
    hang_up(reply.socket)
    no_reply = status == 0 and problem in ('no connection', 'timed out')
    if not no_reply:
        run_state.has_reply = True
    is_good = status == 200 or (data is not None and 200 <= status < 300)
    if status != 0 and not is_good:  # a bad status says more than what went wrong after it
        raise Failed(f'{label}: HTTP {status}', status)
    if problem:
        raise Failed(f'{label}: {problem}', no_reply=no_reply)
    return status, body


def hang_up(connected_socket):
    """Shut a connection down, if there is one: a thread that waits for the server then ends."""
    if connected_socket:
        with contextlib.suppress(OSError):
            connected_socket.shutdown(socket.SHUT_RDWR)


def do_exchange(url, headers, data, limit, reply):
    """Do the work of exchange with http.client, which uses no proxy and follows no redirect.

    Set reply.socket when it is connected, reply.status when that has come, reply.body when that has
    come, and at last reply.problem, '' if there is none.
    """
    _, _, host_and_port, path = url.split('/', 3)  # 'http:', '', HOST:PORT and PATH
    all_headers = {
        **headers,
        'User-Agent': f'azure-provisioning/{VERSION}',
        'Accept': '*/*',
        'Accept-Encoding': 'identity',
        'Connection': 'close',
    }
    method = 'GET' if data is None else 'POST'
    try:
        connect_limit = min(CONNECT_LIMIT, settings.timeout)
        connection = http.client.HTTPConnection(host_and_port, timeout=connect_limit)
        connection.response_class = StrictResponse
        with contextlib.closing(connection):
            connection.connect()
            reply.socket = connection.sock
            reply.socket.settimeout(settings.timeout)
            connection.request(method, f'/{path}', data, all_headers)
            response = connection.getresponse()
            reply.status = response.status
            reply.problem = read_body(response, limit, reply)
    except socket.timeout:
        reply.problem = 'timed out'
    except (OSError, OverflowError, UnicodeError):  # the connection, the port, the host name
        has_status = reply.status != 0
        reply.problem = 'broken reply' if has_status else 'no connection'
    except Exception:  # what is not HTTP; http.client raises several
        reply.problem = 'broken reply'


def read_body(response, limit, reply):
    """Set reply.body to the body of a response; return what is wrong with it, or ''."""
    lengths = {each.strip(' \t') for each in response.headers.get_all('Content-Length', [])}
    if len(lengths) > 1 or not all(re.fullmatch('[0-9]+', length) for length in lengths):
        return 'broken reply'
    if any(int(length) > limit for length in lengths):
        return 'reply too large'
    body = response.read(limit + 1)
    missing = response.length  # of the bytes that were announced, as http.client counts it down
    if missing:
        return 'broken reply'
    if len(body) > limit:
        return 'reply too large'
    # The shell cannot hold a NUL byte, and makes it INVALID. So both programs refuse all values of
    # a body with one of these two.
    if b'\0' in body or INVALID.encode() in body:
        body = INVALID.encode()
    reply.body = body
    return ''


class StrictResponse(http.client.HTTPResponse):
    """A response whose chunk sizes are hexadecimal digits alone.

    http.client calls these methods. Its own would not see that a body is 'chunked ', with a blank
    behind the word, would look for one behind the status 204, and would take the sizes 0x10 and +5.
    """

    def begin(self):
        super().begin()
        encoding = self.headers.get('Transfer-Encoding', '').strip(' \t').lower()
        self.chunked = encoding == 'chunked' and self.status != 204  # which has no body
        if self.chunked:
            self.chunk_left = None
            self.length = None

    def _read_next_chunk_size(self):
        line = self.fp.readline(1000)
        size = re.match(b'([0-9A-Fa-f]+)[ \t\r\n;]', line)
        if not size:
            raise ValueError('no chunk size')
        return int(size.group(1), 16)


# ---- Attempts ----------------------------------------------------------------------------------


def retry(step, function, *arguments, optional=False, attempts=None):
    """Call the function until it does not raise Failed; return its result.

    The wait after the first attempt is 1 second, then 2, 3 and so on, up to settings.interval.
    attempts: None stands for settings.attempts. After all of them, raise Failed.
    optional: IMDS may not have the value that the function requests. Then return ''. IMDS says so
    with a status:
    - 404. But that is also its reply to all requests while it starts.
    - 400, if it is too old to know the value.
    So it is believed after ABSENCES_NEEDED such replies, which need not come in a row. With fewer
    attempts than that, each has to end so.
    """
    attempts = attempts or settings.attempts
    absences_needed = min(ABSENCES_NEEDED, attempts)
    absences = 0
    last_reason = ''
    for attempt in range(1, attempts + 1):
        routes_before = read_routes()
        try:
            return function(*arguments)
        except Failed as error:
            failure = error  # as Python deletes that name after this block
        # The same reason is not said each time, or the log would fill up.
        if str(failure) != last_reason or is_power_of_two(attempt):
            complain(f'{step}: attempt {attempt} of {attempts}: {failure}')
        last_reason = str(failure)
        if optional and failure.status in (400, 404):
            absences += 1
            if absences == absences_needed:
                return ''
        if attempt < attempts:
            wait_for(min(attempt, settings.interval), routes_before, failure.no_reply)
    question = ''
    if failure.no_reply and not run_state.has_reply:
        question = '; is this a VM on Azure?'
    raise Failed(f'gave up after {attempts} attempts: {last_reason}{question}')


def is_power_of_two(number):
    """Whether a number is 1, 2, 4, 8 or the like."""
    return number & (number - 1) == 0


def wait_for(seconds, routes_before, no_reply):
    """Wait. After an attempt without a reply, stop when the routes change: the network is up."""
    if not no_reply:
        time.sleep(seconds)
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end and read_routes() == routes_before:
        time.sleep(0.1)


def read_routes():
    """Return the kernel's table of routes, '' if it cannot be read."""
    with contextlib.suppress(OSError), open('/proc/self/net/route') as file:
        return file.read()
    return ''


# ---- Step ready: the goal state and the health report ------------------------------------------


WIRESERVER_HEADERS = {'x-ms-version': '2012-11-30', 'x-ms-agent-name': 'custom-provisioning'}


def report_ready():
    """Report to the WireServer that this VM is Ready."""
    say('Retrieving goal state from the Wireserver')
    details_xml = ''
    retry('ready', report_health, 'Ready', details_xml)


def report_health(state, details_xml):
    """Request the goal state, and send a health report for it: one attempt for retry.

    The WireServer refuses a report for an old goal state. So each attempt requests a new one.
    """
    incarnation, container_id, instance_id = request_goal_state()
    report = (
        '<Health>'
        f'<GoalStateIncarnation>{incarnation}</GoalStateIncarnation>'
        '<Container>'
        f'<ContainerId>{container_id}</ContainerId>'
        '<RoleInstanceList><Role>'
        f'<InstanceId>{instance_id}</InstanceId>'
        f'<Health><State>{state}</State>{details_xml}</Health>'
        '</Role></RoleInstanceList>'
        '</Container>'
        '</Health>'
    )
    if settings.dry_run:
        say('Would send the following data to Wireserver:', report)
        return
    say('Sending the following data to Wireserver:', report)
    url = f'{settings.wireserver}/machine?comp=health'
    headers = {**WIRESERVER_HEADERS, 'Content-Type': 'text/xml;charset=utf-8'}
    status, _ = exchange('health report', url, headers, report.encode())
    say(f'Response: {status}')


def request_goal_state():
    """Return the incarnation, the container's id and the instance's id."""
    url = f'{settings.wireserver}/machine?comp=goalstate'
    _, body = exchange('goal state', url, WIRESERVER_HEADERS)
    root = read_xml('GoalState', body)
    if root is None:
        raise Failed('goal state: not a goal state')
    incarnation = find_squeezed(root, 'Incarnation')
    container_id = find_squeezed(root, 'Container/ContainerId')
    instance_id = find_squeezed(root, 'Container/RoleInstanceList/RoleInstance/InstanceId')
    if not is_number(incarnation):
        raise Failed('goal state: no Incarnation')
    if not is_id(container_id):
        raise Failed('goal state: no ContainerId')
    if not is_id(instance_id):
        raise Failed('goal state: no InstanceId')
    say(
        f'ContainerId: {container_id}',
        f'InstanceId: {instance_id}',
        f'Incarnation: {incarnation}',
    )
    return incarnation, container_id, instance_id


def read_xml(root_name, document):
    """Return the root element of an XML document, or None if it has no root of that name."""
    if b'<!DOCTYPE' in document:  # it could define entities
        return None
    try:
        root = ElementTree.fromstring(document, ElementTree.XMLParser(encoding='utf-8'))
    except (ElementTree.ParseError, ValueError):
        return None
    for element in root.iter():
        element.tag = element.tag.split('}')[-1]  # {NAMESPACE}NAME becomes NAME
    return root if root.tag == root_name else None


def find_text(root, path):
    """Return the text of the first element at a path below the root, '' if there is none."""
    element = root.find(path)
    return '' if element is None else text_of(element)


def text_of(element):
    """Return the text of an element, INVALID if there are elements in it."""
    if len(element) > 0:
        return INVALID
    text = element.text or ''
    return text.encode().decode(BYTE_ENCODING)  # its bytes in UTF-8, as characters


def find_squeezed(root, path):
    """Return the text that find_text finds, squeezed."""
    return squeeze(find_text(root, path))


def squeeze(text):
    """Return a text with one space in place of each run of white space, and none at its ends."""
    return ' '.join(split_words(text))


def split_words(text):
    """Return the words of a text, as WHITE_SPACE splits it. str.split has more such characters."""
    return re.findall(f'[^{WHITE_SPACE}]+', text)


def is_number(text):
    """Whether a text is decimal digits."""
    return re.fullmatch('[0-9]+', text) is not None


def is_id(text):
    """Whether a text is visible ASCII, without the characters that have a meaning in XML."""
    return re.fullmatch('[!-~]+', text) is not None and re.search('[<>&"\']', text) is None


# ---- Step hostname: a value from IMDS ----------------------------------------------------------


def set_hostname():
    """Set the hostname that the user chose.

    If IMDS says that the user chose none, set the VM's name in Azure.
    """
    say('Retrieving hostname from IMDS')
    name, _ = request_property('hostname', 'osProfile/computerName', 'HostName', optional=True)
    if not name:
        name = retry('hostname', request_text, 'name')
    name = name.replace('_', '-')  # systemd would drop the '_'
    if not is_hostname(name):
        raise Failed('no valid hostname')
    say(f'Hostname: {name}')
    if not run_twice('hostnamectl', 'set-hostname', name):
        store_hostname(name)


def is_hostname(text):
    """Whether a text is a hostname: labels with dots between them, 64 characters at most in all."""
    label = '[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?'
    return re.fullmatch(f'{label}([.]{label})*', text) is not None and len(text) <= 64


def store_hostname(name):
    """Set the hostname without systemd: in the kernel for this boot, in a file for later ones.

    Raise Failed if one of the two is not set. The reason names all that failed. For example:
    hostnamectl failed; cannot write /etc/hostname, so web-1 lasts until the next boot
    """
    problems = []
    if has_command('hostnamectl'):
        problems.append('hostnamectl failed')
    kernel_has_name = set_kernel_hostname(name)
    file_has_name = True
    if not kernel_has_name:
        problems.append("cannot set the kernel's hostname")
    try:
        write_file('/etc/hostname', 0o644, f'{name}\n'.encode())
    except Failed as failure:
        file_has_name = False
        until = ''
        if kernel_has_name:
            until = f', so {name} lasts until the next boot'
        problems.append(f'{failure}{until}')
    if not kernel_has_name or not file_has_name:
        raise Failed('; '.join(problems))


def set_kernel_hostname(name):
    """Set the kernel's hostname; return whether that worked."""
    if settings.dry_run:
        return True
    try:
        socket.sethostname(name)
    except OSError:
        return False
    return True


def request_property(step, leaf, dvd_path, optional=False):
    """Return a property that the user gave the VM, squeezed, and the root element of the DVD.

    leaf: the path of the property in IMDS.
    dvd_path: its path on the DVD.
    If it comes from IMDS, the root is None. The text is '' if IMDS does not have an optional
    property. Raise Failed after all attempts.

    The DVD is also read if IMDS says that there is no such value. Without a drive, only step 3 is
    done.
    """
    if has_dvd_drive():
        # 1. Ask IMDS for some minutes. The IMDS of Azure Stack has no properties.
        attempts = min(ATTEMPTS_BEFORE_DVD, settings.attempts)
        try:
            text = retry(step, request_text, leaf, optional=optional, attempts=attempts)
        except Failed:
            text = ''
        if text:
            return text, None
        # 2. Look on the DVD.
        try:
            dvd_root = retry(step, request_dvd, attempts=DVD_ATTEMPTS)
            text = squeeze(find_dvd_text(dvd_root, dvd_path))
        except Failed:
            text = ''
        if text:
            return text, dvd_root
    # 3. Ask IMDS, with all attempts.
    return retry(step, request_text, leaf, optional=optional), None


def has_dvd_drive():
    """Whether there is a DVD drive. At the first boot, the DVD is in it, or comes soon."""
    return os.path.exists('/dev/sr0')


def request_text(leaf):
    """Return a value from IMDS, squeezed. Raise Failed if it is empty, or cannot be read."""
    text = squeeze(request_leaf(leaf))
    if not text:
        raise Failed(f'{last_part(leaf)}: empty')
    return text


def request_leaf(leaf, limit=BODY_LIMIT):
    """Return a value from IMDS, which may be empty. Raise Failed if it cannot be read.

    leaf: the path of the value below "compute".
    """
    version = find_api_version(leaf)
    url = f'{settings.imds}/metadata/instance/compute/{leaf}?api-version={version}&format=text'
    _, body = exchange(last_part(leaf), url, {'Metadata': 'true'}, limit=limit)
    return body.decode(BYTE_ENCODING)


def find_api_version(leaf):
    """Return the oldest api-version that knows a value, as an old IMDS refuses later ones."""
    if leaf.startswith('publicKeys'):
        return '2018-04-02'
    return {
        'name': '2017-04-02',
        'vmId': '2017-04-02',
        'osProfile/computerName': '2020-07-15',
        'osProfile/adminUsername': '2020-07-15',
        'osProfile/disablePasswordAuthentication': '2020-10-01',
        'userData': '2021-01-01',
    }[leaf]


def last_part(leaf):
    """Return what messages call a leaf: the last part of its path."""
    return leaf.split('/')[-1]


# ---- Step disable ------------------------------------------------------------------------------


def disable_unit():
    """Disable the service, of systemd or OpenRC, so that the next boot does not run it."""
    sync_all()  # first, or a power cut could leave it disabled without what the other steps did
    # Without --no-reload, systemd would run all of its generators again.
    disabled = run('systemctl', '--no-reload', 'disable', 'azure-provisioning.service')
    if not disabled and not run('rc-update', 'del', 'azure-provisioning'):
        raise Failed('neither systemctl nor rc-update disabled azure-provisioning')
    say_done('Disabled azure-provisioning.service')


def sync_all():
    """Have the disk store all changes, so that a power cut does not undo them."""
    if not settings.dry_run:
        os.sync()


# ================================================================================================
# The default run ends here. What follows runs only if another step is named. There is one
# exception: where has_dvd_drive finds a drive, the step hostname also uses the section about the
# DVD. Our systemd unit hides the drive, unless a drop-in shows it.
# ================================================================================================


# ---- NotReady: a step before ready failed ------------------------------------------------------


def report_not_ready(reason):
    """Report to the WireServer that this VM will not be Ready, so that nobody waits for it."""
    try:
        details_xml = describe_failure(reason)
        say('Retrieving goal state from the Wireserver')
        retry('NotReady', report_health, 'NotReady', details_xml)
    except Exception as failure:  # whatever it is: the run has failed anyway
        complain(f'NotReady: {failure}')


def describe_failure(reason):
    """Return the part of the health report that tells Azure the reason."""
    vm_id = request_vm_id() or read_vm_id()
    now = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
    agent = f'azure-provisioning/{VERSION}'
    text = f'result=error|reason={reason}|agent={agent}|vm_id={vm_id}|timestamp={now}'
    text = os.fsencode(text).decode(BYTE_ENCODING)  # there may be a path in the reason
    description = re.sub('[^ -~]', ' ', text[:512])  # ' ' to '~': ASCII that can be printed
    description = re.sub('[&<>]', ' ', description)
    return (
        '<Details>'
        '<SubStatus>ProvisioningFailed</SubStatus>'
        f'<Description>{description}</Description>'
        '</Details>'
    )


def request_vm_id():
    """Return the id of this VM in Azure's portal, '' if IMDS does not tell it in one attempt."""
    try:
        vm_id = request_text('vmId')
    except Failed:
        return ''
    return vm_id if is_vm_id(vm_id) else ''


def read_vm_id():
    """Return the id of this VM in its firmware, '' if there is none."""
    try:
        vm_id = read_file('/sys/class/dmi/id/product_uuid').lower()
    except Failed:
        return ''
    return vm_id if is_vm_id(vm_id) else ''


def is_vm_id(text):
    """Whether a text is the id of a VM: 36 of '0' to '9', 'a' to 'f' and '-'."""
    return re.fullmatch('[0-9a-f-]{36}', text) is not None


def read_file(path):
    """Return the text of a file without line feeds at its end, '' if there is no such file.

    Raise Failed if it cannot be read, or has a NUL byte or INVALID in it.
    """
    if not os.path.lexists(path):
        return ''
    text = INVALID  # until it is read
    with contextlib.suppress(OSError):
        if os.path.isfile(path):  # opening a FIFO would take for ever
            with open(path, encoding=BYTE_ENCODING, newline='') as file:
                text = file.read()
    if INVALID in text or '\0' in text:
        raise Failed(f'cannot read {path}')
    return text.rstrip('\n')


# ---- Step user: the account, its SSH keys, sudo or doas ----------------------------------------


# How public keys of OpenSSH begin: TYPE BASE64. The base64 begins with the type, too, encoded.
KEY_BEGINNINGS = (
    'ssh-rsa AAAAB3Nz',
    'ssh-ed25519 AAAAC3Nz',
    'ecdsa-sha2-nistp256 AAAAE2Vj',
    'ecdsa-sha2-nistp384 AAAAE2Vj',
    'ecdsa-sha2-nistp521 AAAAE2Vj',
    'sk-ssh-ed25519@openssh.com AAAAGnNr',
    'sk-ecdsa-sha2-nistp256@openssh.com AAAAInNr',
)

NO_LOGIN_REASON = 'no valid SSH key, and no password'
RESERVED_NUMBERS = range(60001, 65536)  # of nobody, and of other accounts of distributions


def create_user():
    """Create the admin user, unless there is one, and let it log in with its keys."""
    say('Retrieving user from IMDS')
    name, dvd_root = request_property('user', 'osProfile/adminUsername', 'UserName')
    if not is_user_name(name):
        raise Failed('no valid user name')
    say(f'User: {name}')
    keys = request_login(dvd_root)
    if not find_account(name):
        add_account(name)
        if settings.dry_run:  # there is no account, and so no home to look at
            grant_root(name)
            return
    account = find_account(name)
    if not account:
        raise Failed('neither useradd nor adduser made the user')
    if is_system_account(account):
        raise Failed(f'{name} is a system account')
    if account.shell.endswith(('/nologin', '/false')):
        complain(f'user: {name} cannot log in: its shell is {account.shell}')
    unlock_account(account)
    if keys:
        authorize_keys(account, keys)
    else:
        finish_home(account)
    join_groups(name)
    grant_root(name)


def is_user_name(text):
    """Whether a text is a user name. It has a small letter: to sudo, ALL would be everybody."""
    return (
        re.fullmatch(ACCOUNT_NAME, text) is not None
        and re.search('[a-z]', text) is not None
        and text != 'root'
    )


def request_login(dvd_root):
    """Return the user's valid SSH keys, of the DVD if its root element is given, or of IMDS.

    Raise Failed if the VM would be Ready, and nobody could log in.
    """
    keys = request_keys() if dvd_root is None else find_keys(dvd_root)
    if not keys and 'ready' in settings.steps and 'password' not in settings.steps:
        raise Failed('no valid SSH key, and no step that sets the password')
    return keys


def request_keys():
    """Return the user's valid SSH keys. Raise Failed if there is neither a key nor a password.

    Raise Failed, too, if IMDS does not answer the first two questions below, or has no valid list.
    """
    # 1. IMDS has the keys.
    keys, has_key_text = request_imds_keys(optional=True)
    if keys:
        return keys
    # 2. IMDS says that there is a password: then no key is needed.
    leaf = 'osProfile/disablePasswordAuthentication'
    if retry('user', request_text, leaf, optional=True) == 'false':
        return []
    # 3. The DVD has the keys, or says that there is a password.
    if has_dvd_drive():
        try:
            return find_keys(retry('user', request_dvd, attempts=DVD_ATTEMPTS))
        except Failed:
            pass  # go on with 4
    # 4. If IMDS had no text at all, it may have been starting. Now it has to have a key.
    if not has_key_text:
        try:
            keys, _ = request_imds_keys(optional=False)
        except Failed:
            keys = []
    if not keys:
        raise Failed(NO_LOGIN_REASON)
    return keys


def request_imds_keys(optional):
    """Return the valid SSH keys of IMDS, and whether it has any text as a key, valid or not.

    optional: as for retry. If False, IMDS has to have a list, and the text of each key in it.
    """
    request_function = request_leaf
    if not optional:
        request_function = request_text  # fails if the text is empty
    names = split_words(retry('user', request_function, 'publicKeys', optional=optional))
    keys = []
    has_key_text = False
    for number, name in enumerate(names):  # 0/ 1/ 2/ and so on
        is_next = name in (f'{number}/', str(number))  # with or without its '/'
        if not is_next or number > 99:
            raise Failed('publicKeys: no valid list')
        text = retry('user', request_key_data, number, optional=optional)
        has_key_text = has_key_text or text != ''
        keys += pick_keys(number, text)
    return keys, has_key_text


def request_key_data(number):
    """Return the text of a key that IMDS lists.

    Raise Failed if it is empty, with the status of a value that IMDS does not have: it may be
    starting.
    """
    leaf = f'publicKeys/{number}/keyData'
    text = request_leaf(leaf)
    if not squeeze(text):
        raise Failed(f'{last_part(leaf)}: empty', status=404)
    return text


def find_keys(dvd_root):
    """Return the user's valid SSH keys on the DVD. Raise Failed as request_keys does."""
    keys = []
    elements = dvd_root.findall(f'{OVF_PATH}/SSH/PublicKeys/PublicKey/Value')
    for number, element in enumerate(elements):
        keys += pick_keys(number, text_of(element))
    if not keys and find_password_ban(dvd_root) != 'false':
        raise Failed(NO_LOGIN_REASON)
    return keys


def find_password_ban(dvd_root):
    """Return 'true' if the DVD forbids passwords for SSH, 'false' if it allows them.

    Any other text is returned as it is.
    """
    return squeeze(find_dvd_text(dvd_root, 'DisableSshPasswordAuthentication')).lower()


def pick_keys(key_number, text):
    """Return the valid SSH keys in the text with this number. Print whether each key is valid."""
    keys = []
    for key in split_keys(text):
        if is_ssh_key(key):
            say(f'SSH key: {key.split()[0]}')
            keys.append(key)
        else:
            complain(f'user: publicKeys/{key_number}: no OpenSSH public key')
    return keys


def split_keys(text):
    """Return the keys in a text, at least one, which may be ''.

    Azure may break a key into lines, and a user may give several keys. So a line is a part of the
    key before it, unless it begins with a type, or with options and a type:
        ssh-rsa AAAA...
        no-pty ssh-rsa AAAA...
    A key with options is refused later.
    """
    keys = []
    for line in re.split('[\r\n]', text):
        if not squeeze(line):
            continue
        type_first = '^(ssh|ecdsa|sk)-'
        type_behind_options = ' (ssh|ecdsa|sk)-.* AAAA'
        if not keys or re.search(f'{type_first}|{type_behind_options}', squeeze(line)):
            keys.append('')
        keys[-1] += line  # which goes on with the key
    return [squeeze(key) for key in keys] or ['']  # pick_keys has to say that it is not valid


def is_ssh_key(text):
    """Whether a text is an OpenSSH public key: TYPE BASE64 [COMMENT]."""
    return (
        text.startswith(KEY_BEGINNINGS)
        and re.fullmatch('[A-Za-z0-9+/=]+', text.split(' ')[1]) is not None
        and not has_control_character(text)
    )


def has_control_character(text):
    """Whether a text has a control character in it."""
    return re.search('[\x00-\x1f\x7f]', text) is not None


def find_account(name):
    """Return a user's account, None if there is none. Raise Failed if its line is not valid.

    password_field: the second field in /etc/shadow, or in /etc/passwd if there is no /etc/shadow.
    owner: the numbers of the user and of its group.
    home, shell: paths.
    """
    fields = find_fields('/etc/passwd', name)
    if not fields:
        return None
    if not is_number(fields[2]) or not is_number(fields[3]):
        raise Failed(f'/etc/passwd: no valid line for {name}')
    password_field = fields[1]
    shadow_fields = find_fields('/etc/shadow', name)
    if shadow_fields:
        password_field = shadow_fields[1]
    elif os.path.exists('/etc/shadow'):
        password_field = '!'  # useradd was interrupted: without a line, the account is locked
    return types.SimpleNamespace(
        name=name,
        password_field=password_field,
        owner=(int(fields[2]), int(fields[3])),
        home=to_path(fields[5]),
        shell=to_path(fields[6]),
    )


def to_path(text):
    """Return a text as a path, for which Python has an encoding of its own."""
    return os.fsdecode(text.encode(BYTE_ENCODING))


def find_fields(path, name):
    """Return the fields of the first line for a name, None if there is none.

    path: that of /etc/passwd, or of a file like it. Raise Failed if it cannot be read.
    """
    for line in read_file(path).split('\n'):
        if line.startswith(f'{name}:'):
            fields = line.split(':')
            return fields + [''] * 7  # the line may have fewer than the usual seven
    return None


def add_account(name):
    """Make the user, in the group of the same name, if there is one.

    The caller finds out in /etc/passwd if it worked. Raise Failed if /etc/group cannot be read.
    """
    shell = '/bin/bash' if os.access('/bin/bash', os.X_OK) else '/bin/sh'
    useradd = ['useradd', '-m', '-s', shell]
    adduser = ['adduser', '-D', '-s', shell]  # BusyBox's
    if find_fields('/etc/group', name):
        useradd += ['-g', name]
        adduser += ['-G', name]
    if not run(*useradd, name):
        run(*adduser, name)


def is_system_account(account):
    """Whether an account is not for people, by its number. UID_MIN is in /etc/login.defs.

    Raise Failed if that cannot be read.
    """
    least = 1000
    for line in read_file('/etc/login.defs').split('\n'):
        words = split_words(line)
        if len(words) == 2 and words[0] == 'UID_MIN' and is_number(words[1]):
            least = int(words[1])
    number = account.owner[0]
    return number < least or number in RESERVED_NUMBERS


def unlock_account(account):
    """Unlock an account: without PAM, sshd refuses the keys of one that is locked.

    A '!' in front of the password field locks an account. A '*' there does not lock it, but no
    password matches it.
    """
    if account.password_field.startswith('!'):
        name = account.name
        unlocked = run('chpasswd', '-e', input_line=f'{name}:*')
        if not unlocked and not run('usermod', '-p', '*', name):
            raise Failed(f'neither chpasswd nor usermod unlocked {name}')


def authorize_keys(account, keys):
    """Add the keys to the file where sshd looks for the user's, unless they are there."""
    path = find_keys_file(account)
    folder = os.path.dirname(path)
    for each in (folder, path):
        if os.path.islink(each):  # a user could have root write elsewhere
            raise Failed(f'{each}: a symlink is in the way')
    make_keys_folder(account, folder)
    owner = account.owner
    mode = 0o600
    if not is_in_home(account, path):  # a file of root's, which the user has to be able to read
        owner = None
        mode = 0o644
    text = read_file(path)
    lines = text.split('\n') if text else []
    for key in keys:
        type_and_blob = key.split(' ')[:2]  # without the comment
        if not any(line.split(' ')[:2] == type_and_blob for line in lines):
            lines.append(key)
    content = ''.join(f'{line}\n' for line in lines)
    write_file(path, mode, content.encode(BYTE_ENCODING), owner)
    restore_labels('user', folder)


def find_keys_file(account):
    """Return the file where sshd looks for the user's keys. Raise Failed if it looks nowhere.

    It may look in several. The usual one is taken if it is among them, or else the first.
    """
    default = f'{account.home}/.ssh/authorized_keys'
    patterns = ['.ssh/authorized_keys']
    for line in ask_sshd(account.name).split('\n'):
        if line.startswith('authorizedkeysfile '):
            patterns = split_words(line)[1:]
    paths = [expand_pattern(account, pattern) for pattern in patterns]
    if default in paths:
        return default
    for path in paths:
        if path:
            return path
    raise Failed('sshd looks for keys in no file')


def expand_pattern(account, pattern):
    """Return the path that a word of AuthorizedKeysFile stands for, such as %h/.ssh/keys.

    Return '' if it is 'none', or has a '%' that is not known here.
    """
    values = {'%h': account.home, '%u': account.name, '%U': str(account.owner[0]), '%%': '%'}
    parts = re.findall('%.?|[^%]+', to_path(pattern))  # '%' and a letter, or text without a '%'
    if pattern == 'none' or any(part[0] == '%' and part not in values for part in parts):
        return ''
    path = ''.join(values.get(part, part) for part in parts)
    return path if path.startswith('/') else f'{account.home}/{path}'


def ask_sshd(name):
    """Return how sshd is configured for a user, lines of 'keyword value'; '' if it does not tell.

    At the first boot, sshd may have no host keys yet. It then tells nothing without -G, which it
    has since OpenSSH 9.3.
    """
    connection = f'user={name},host=localhost,addr=127.0.0.1,laddr=127.0.0.1,lport=22'
    output = read_output('sshd', '-T', '-G', '-C', connection)
    return output or read_output('sshd', '-T', '-C', connection)


def is_in_home(account, path):
    """Whether a path is below the user's home."""
    return path.startswith(f'{account.home}/')


def make_keys_folder(account, folder):
    """Make the home, and the folder of the keys, with modes that sshd accepts."""
    uid, gid = account.owner
    make_home(account)
    make_readable_folder(folder)
    if is_in_home(account, folder):
        each = folder
        while is_in_home(account, each):  # for ~/.ssh/keys: that, and ~/.ssh
            run_or_fail(folder, 'chown', '-h', f'{uid}:{gid}', each)
            each = os.path.dirname(each)
        run_or_fail(folder, 'chmod', '700', folder)
        run_or_fail(folder, 'chmod', 'u+rwx,go-w', account.home)


def make_home(account):
    """Make the home, unless it is there and the user's.

    If it is root's, useradd was interrupted: finish its work. If it is somebody else's, raise
    Failed: the keys in it would be theirs.
    """
    home = account.home
    uid, gid = account.owner
    if os.path.isdir(home):
        owner_of_home = os.stat(home).st_uid
        if owner_of_home == uid:
            return
        real_home = os.path.realpath(home)
        is_top_level = real_home.count('/') < 2  # / or /usr: it has to stay root's
        if owner_of_home != 0 or is_top_level:
            raise Failed(f'{home}: belongs to another user')
    else:
        make_readable_folder(home)
    if os.path.isdir('/etc/skel'):
        run_or_fail(home, 'cp', '-R', '-p', '/etc/skel/.', home)
    run_or_fail(home, 'chown', '-R', '-h', f'{uid}:{gid}', home)
    restore_labels('user', home)


def finish_home(account):
    """Make the home of a user who logs in with a password, which also works without a home."""
    try:
        make_home(account)
    except Failed as failure:
        complain(f'user: {failure}')


def make_readable_folder(folder):
    """Make a folder, and those above it, so that everybody may list and enter them."""
    os.umask(0o022)
    made = run('mkdir', '-p', folder)
    os.umask(0o077)
    if not made:
        raise Failed(f'cannot make {folder}')


def run_or_fail(path, *command):
    """Run a command for a path, which the reason names: raise Failed if the command fails."""
    if not run(*command):
        raise Failed(f'cannot make {path}')


def restore_labels(step, path):
    """Give a path, and all in it, the labels of SELinux, if there is SELinux."""
    if has_command('restorecon') and not run('restorecon', '-R', path):
        complain(f'{step}: restorecon failed for {path}')


def join_groups(name):
    """Add the user to those groups of the settings that are there."""
    for group in settings.extra_groups.split(','):
        if group == '':  # the setting is empty
            continue
        if find_fields('/etc/group', group) is None:
            complain(f'user: there is no group {group}')
        elif not run('usermod', '-a', '-G', group, name) and not run('addgroup', name, group):
            raise Failed(f'neither usermod nor addgroup added {name} to {group}')


def grant_root(name):
    """Let the user become root without a password, with sudo or else with doas.

    visudo and doas check the rule before it is written. If neither accepts it, that is no failure,
    as the user can log in. Raise Failed if the rule cannot be written.
    """
    rule = f'{name} ALL=(ALL:ALL) NOPASSWD:ALL'
    # With sudo and doas, the last rule that fits counts. So the names of our files begin with zz.
    if run('visudo', '-q', '-c', '-f', '/dev/stdin', input_line=rule):
        write_file('/etc/sudoers.d/zz-azure-provisioning', 0o440, f'{rule}\n'.encode())
        restore_labels('user', '/etc/sudoers.d/zz-azure-provisioning')
        remove_former('/etc/sudoers.d/azure-provisioning')
        check_sudo(name)
        return
    path = '/etc/doas.conf'
    if os.path.isdir('/etc/doas.d'):
        path = '/etc/doas.d/zz-azure-provisioning.conf'
    rules = add_last_line(read_file(path), f'permit nopass {name}')
    if run('doas', '-C', '/dev/stdin', input_line=rules):
        path = os.path.realpath(path)
        mode = 0o440
        if os.path.exists(path):
            mode = None  # keeps the one it has
        write_file(path, mode, f'{rules}\n'.encode(BYTE_ENCODING))
        restore_labels('user', path)
        remove_former('/etc/doas.d/azure-provisioning.conf')
        return
    complain(f'user: neither sudo nor doas takes a rule for {name}')


def remove_former(path):
    """Remove the file in which an earlier version of this program wrote its rule."""
    if os.path.lexists(path) and not run('rm', '-f', path):
        raise Failed(f'cannot remove {path}')


def check_sudo(name):
    """Complain if sudo does not give the user all rights: another rule may come behind ours."""
    if settings.dry_run:
        return
    rights = read_output('sudo', '-n', '-l', '-U', name)
    all_rights = ('(ALL : ALL) NOPASSWD: ALL', '(ALL) NOPASSWD: ALL')
    if not rights.endswith(all_rights):  # the last rule is printed last
        complain(f'user: sudo does not say that {name} may do all without a password')


def add_last_line(text, line):
    """Return a text that ends with the line."""
    if text == '' or text == line:
        return line
    if text.endswith(f'\n{line}'):
        return text
    return f'{text}\n{line}'


# ---- The DVD: ovf-env.xml ----------------------------------------------------------------------


DVD_FOLDER = '/run/azure-provisioning/dvd'
OVF_FILE = f'{DVD_FOLDER}/ovf-env.xml'
DATA_LIMIT = 122880  # bytes of ovf-env.xml or user data, at most: enough for 64 KiB in base64
OVF_PATH = 'ProvisioningSection/LinuxProvisioningConfigurationSet'


def request_dvd():
    """Return the root element of ovf-env.xml on the DVD: one attempt for retry."""
    mount_dvd()
    document = b''
    if os.path.isfile(OVF_FILE):
        with contextlib.suppress(OSError), open(OVF_FILE, 'rb') as file:
            document = file.read(DATA_LIMIT + 1)
    run_even_dry('umount', DVD_FOLDER)  # if it fails, the next mount_dvd finds the DVD mounted
    if not document:
        raise Failed('ovf-env.xml: cannot be read')
    root = None
    if len(document) <= DATA_LIMIT and may_be_utf_8(document):
        root = read_xml('Environment', document)
    if root is None:
        raise Failed('ovf-env.xml: not an OVF environment')
    return root


def find_dvd_text(root, path):
    """Return the text of the first element at a path on the DVD, '' if there is none."""
    return find_text(root, f'{OVF_PATH}/{path}')


def may_be_utf_8(document):
    """Whether a document can be UTF-8: it is ASCII alone, or names no other encoding.

    It would name one in its declaration: <?xml version="1.0" encoding="UTF-16"?>
    """
    if re.search(b'[^\x00-\x7f]', document) is None:
        return True
    _, _, behind = document.partition(b'<?xml')
    declaration, _, _ = behind.partition(b'?>')
    encoding = re.search(b'encoding[ \t\r\n]*=[ \t\r\n]*["\']([^"\']*)', declaration)
    return encoding is None or encoding.group(1).upper() in (b'UTF-8', b'US-ASCII')


def mount_dvd():
    """Mount the DVD where only root can see it, unless an earlier umount failed.

    A dry run does so, too.
    """
    if os.path.exists(OVF_FILE):
        return
    is_folder = run_even_dry('mkdir', '-p', DVD_FOLDER)
    command = ['mount', '-t', 'udf,iso9660', '-o', 'ro,nosuid,nodev,noexec', '/dev/sr0', DVD_FOLDER]
    if not is_folder or not has_dvd_drive() or not run_even_dry(*command):
        raise Failed('ovf-env.xml: no DVD')


# ---- Step password -----------------------------------------------------------------------------


SSHD_CONFIG = '/etc/ssh/sshd_config'
SSHD_DEFAULT = '/usr/etc/ssh/sshd_config'  # of openSUSE; counts if there is none in /etc
SSHD_DROP_INS = '/etc/ssh/sshd_config.d/*.conf'
OUR_DROP_IN = '/etc/ssh/sshd_config.d/00-azure-provisioning.conf'
# Each of them can allow passwords. Since OpenSSH 8.7, the last two are one setting.
SSHD_KEYWORDS = (
    'PasswordAuthentication',
    'ChallengeResponseAuthentication',
    'KbdInteractiveAuthentication',
)


# What stands in place of a password: nothing, as with a key; and in copies of ovf-env.xml, what
# cloud-init and the Azure agent write.
NO_PASSWORDS = ('', 'REDACTED', '*')


def set_password():
    """Set the password of the admin user, and have sshd take passwords or not."""
    say('Retrieving password from the DVD')
    root = retry('password', request_dvd, attempts=DVD_ATTEMPTS)
    name = squeeze(find_dvd_text(root, 'UserName'))
    if not is_user_name(name):
        raise Failed('no valid user name')
    password = find_dvd_text(root, 'UserPassword')
    if has_control_character(password) or len(password) > 72:  # bytes; Azure allows no more
        raise Failed('no valid password')
    is_given = password not in NO_PASSWORDS
    if is_given:
        store_password(name, password)
        say_done('Password set')
    password_ban = find_password_ban(root)
    if password_ban == 'true':
        configure_sshd(name, 'no')
    elif password_ban == 'false' or is_given:
        configure_sshd(name, 'yes')


def store_password(name, password):
    """Set the password of a user. Raise Failed if chpasswd fails, for example if PAM refuses it."""
    line = f'{name}:{password}'
    if not run('chpasswd', input_line=line):
        raise Failed('chpasswd failed')
    fields = find_fields('/etc/shadow', name) or find_fields('/etc/passwd', name)
    if not fields:  # a dry run
        return
    # The old hash of BusyBox uses only eight characters of the password.
    is_weak = len(fields[1]) == 13 and '$' not in fields[1]
    if is_weak and not run('chpasswd', '-c', 'SHA512', input_line=line):
        raise Failed('chpasswd failed')


def configure_sshd(name, yes_or_no):
    """Have sshd take passwords, or not, by all of the SSHD_KEYWORDS.

    Of several lines for one setting, sshd takes the first. So ours stand in a drop-in that it reads
    before all else, or at the top of its configuration.
    """
    config = SSHD_CONFIG if os.path.isfile(SSHD_CONFIG) else SSHD_DEFAULT
    if not os.path.isfile(config):
        if yes_or_no == 'no' and has_command('dropbear'):
            complain('password: dropbear still accepts passwords')
        return
    our_lines = [f'{keyword} {yes_or_no}' for keyword in SSHD_KEYWORDS]
    lines = read_file(config).split('\n')
    if includes_drop_ins(lines):
        path = OUR_DROP_IN
        write_file(path, 0o600, ''.join(f'{line}\n' for line in our_lines).encode())
    elif config == SSHD_DEFAULT:  # it belongs to the distribution: not to be changed
        raise Failed(f'{SSHD_DEFAULT}: no Include {SSHD_DROP_INS} at the top')
    else:
        while lines and lines[0].split(' ')[0] in SSHD_KEYWORDS:  # those of an earlier run
            del lines[0]
        content = '\n'.join(our_lines + lines).rstrip('\n') + '\n'
        path = os.path.realpath(SSHD_CONFIG)
        write_file(path, None, content.encode(BYTE_ENCODING))
    restore_labels('password', path)
    say_done(f'PasswordAuthentication: {yes_or_no}')
    reload_sshd()
    check_sshd(name, yes_or_no)


def includes_drop_ins(lines):
    """Whether the first line of a configuration that is no comment includes the drop-ins."""
    for line in lines:
        words = split_words(line)
        if words and not words[0].startswith('#'):
            return words[0].lower() == 'include' and SSHD_DROP_INS in words[1:]
    return False


def check_sshd(name, yes_or_no):
    """Ask sshd what its configuration means for the user.

    Raise Failed if it refuses passwords after 'yes', or accepts them in any way after 'no'. Other
    lines may count more than ours: those in a Match, or in a file that sshd reads before.
    """
    if settings.dry_run or not has_command('sshd'):
        return
    lines = ask_sshd(name).split('\n')
    if lines == ['']:
        complain('password: sshd does not tell what it does')  # see ask_sshd
    elif yes_or_no == 'yes' and 'passwordauthentication no' in lines:
        raise Failed(f'sshd still refuses passwords from {name}')
    elif yes_or_no == 'no' and any(f'{each.lower()} yes' in lines for each in SSHD_KEYWORDS):
        raise Failed(f'sshd still accepts passwords from {name}')


def reload_sshd():
    """Have sshd read its configuration again, if it is running. If not, it will at its start."""
    reload_unit = ['systemctl', 'try-reload-or-restart']
    for unit in ('sshd.service', 'ssh.service'):
        if run(*reload_unit, unit):
            return
    run('rc-service', '--ifstarted', 'sshd', 'reload')


# ---- Step data ---------------------------------------------------------------------------------


STATE_FOLDER = '/var/lib/azure-provisioning'


def save_data():
    """Save the user data of IMDS, if any; and the custom data, if there is a DVD."""
    say('Retrieving user data from IMDS')
    user_data = retry('data', request_leaf, 'userData', DATA_LIMIT, optional=True)
    save_decoded('userData', f'{STATE_FOLDER}/user-data', user_data)
    say('Retrieving custom data from the DVD')
    try:
        root = retry('data', request_dvd, attempts=DVD_ATTEMPTS)
    except Failed:
        return  # not a failure: a VM may be without a DVD
    custom_data = find_dvd_text(root, 'CustomData')
    save_decoded('customData', f'{STATE_FOLDER}/custom-data', custom_data)


def save_decoded(label, path, text):
    """Decode a text in base64, and write it to a file. If it is '', remove an earlier VM's file."""
    text = ''.join(split_words(text))
    if not is_base64(text):
        raise Failed(f'{label}: no base64')
    if text:
        write_file(path, 0o600, base64.b64decode(text))
        say_done(f'{label}: {path}')
    else:
        if not run('rm', '-f', path):
            raise Failed(f'cannot remove {path}')
        say_done(f'{label}: none')


def is_base64(text):
    """Whether a text is base64 as an encoder writes it: padded, with all unused bits 0."""
    try:
        decoded = base64.b64decode(text)  # also takes what no encoder writes
    except ValueError:
        return False
    return base64.b64encode(decoded) == text.encode(BYTE_ENCODING)


# ---- Step publish ------------------------------------------------------------------------------


def publish_hostname():
    """Have the DHCP client of the default route's interface tell its server the hostname.

    If it fails, it is asked once more, as nmcli fails now and then.
    """
    interface = find_interface()
    if not interface:
        raise Failed('no default route')
    client = find_client(interface)
    if not client:
        raise Failed(f'no known DHCP client has {interface}')
    name = os.uname().nodename
    told = tell_server(client, interface, name)
    if not told:
        time.sleep(1)
        told = tell_server(client, interface, name)
    if not told:
        raise Failed(f'{client} did not tell the DHCP server of {interface} the hostname')
    if client == 'nmcli':
        say_done(
            f'nmcli has NetworkManager tell the DHCP server of {interface} the hostname {name}'
        )
    else:
        say_done(f'The DHCP server of {interface} knows the hostname {name}, from {client}')


def find_interface():
    """Return the interface of the first default route, '' if there is none."""
    for line in read_routes().split('\n'):
        # Interface, destination, gateway, flags, references, use, metric, mask and more
        fields = line.split()
        if len(fields) >= 8:
            interface, destination, mask = fields[0], fields[1], fields[7]
            if destination == '00000000' and mask == '00000000':
                return interface
    return ''


def find_client(interface):
    """Return the command of the DHCP client that has the interface, '' if no known one has it."""
    if os.path.isfile(networkd_lease(interface)):
        return 'networkctl'
    if read_output('nmcli', '-g', 'DHCP4.OPTION', 'device', 'show', interface):
        return 'nmcli'
    if os.path.isfile(DHCPCD_PID) and os.path.isfile(dhcpcd_lease(interface)):
        return 'dhcpcd'
    for client in ('dhclient', 'udhcpc'):
        if find_process(client, interface):
            return client
    return ''


DHCPCD_PID = (
    '/run/dhcpcd/pid'  # of a dhcpcd for all interfaces; one for a single interface ignores -h
)


def dhcpcd_lease(interface):
    """Return the path of dhcpcd's lease, a file that stays when dhcpcd ends."""
    return f'/var/lib/dhcpcd/{interface}.lease'


def networkd_lease(interface):
    """Return the path of systemd-networkd's lease, a file that goes when systemd-networkd ends."""
    index = read_output('cat', f'/sys/class/net/{interface}/ifindex')
    return f'/run/systemd/netif/leases/{index}'


def find_process(client, interface):
    """Return the first process of a client for the interface, '' if there is none. For example:

    812 /sbin/dhclient -4 -q -pf /run/dhclient.eth0.pid eth0
    """
    pattern = f'^([^ ]*/)?(busybox )?{client} (.* )?{interface}( |$)'
    return read_output('pgrep', '-a', '-f', pattern).split('\n')[0]


def tell_server(client, interface, name):
    """Have the client tell its server the hostname; return whether the server knows it.

    NetworkManager does not show that; for nmcli, return whether it took the command.
    """
    if client == 'networkctl':  # networkd takes the hostname from the kernel
        return renew_lease(networkd_lease(interface), client, 'reconfigure', interface)
    if client == 'nmcli':
        return run(client, 'device', 'modify', interface, 'ipv4.dhcp-hostname', name)
    if client == 'dhcpcd':
        return renew_lease(dhcpcd_lease(interface), client, '-n', '-h', name, interface)
    if client == 'dhclient':
        return run_second_dhclient(interface)
    # The running udhcpc cannot be given a hostname. So run a second one, which asks once, and ends.
    # Instead of the script that sets up the interface, it runs /bin/true.
    option = f'hostname:{name}'
    return run(client, '-n', '-q', '-f', '-i', interface, '-x', option, '-s', '/bin/true')


def renew_lease(lease, *command):
    """Run a command that has a client ask for a new lease; return whether it comes in 5 seconds."""
    old = read_file_version(lease)
    if not run(*command):
        return False
    if settings.dry_run:
        return True
    waited = 0
    while read_file_version(lease) in ('', old):  # it is gone, or not written again yet
        if waited == 5:
            return False
        time.sleep(1)
        waited += 1
    return True


def read_file_version(path):
    """Return a text that changes when the file is written again, '' if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return ''
    return f'{status.st_ino} {status.st_mtime_ns}'


def run_second_dhclient(interface):
    """Run a second dhclient, as the running one cannot be asked.

    Return whether the server has heard it. The second one has the arguments of the running one, and
    its identity (DUID), so that it gets the same address. It does not have the lease, as it would
    use that and ask nobody. Instead of the script that sets up the interface, it runs /bin/true.
    """
    words = split_words(to_path(find_process('dhclient', interface)))[2:]  # not PID and command
    if not words:  # it has ended
        return False
    leases = find_value('-lf', words) or '/var/lib/dhcp/dhclient.leases'
    configuration = find_value('-cf', words) or '/etc/dhcp/dhclient.conf'
    # Without this line, dhclient would not send the hostname.
    if not read_output('grep', '-x', 'send host-name = gethostname();', configuration):
        return False
    identity = read_output('sed', '-n', '/^default-duid /p', leases)
    second_leases = f'{leases}.second'
    pid_file = f'{second_leases}.pid'
    words = [word for word in words if word not in ('-d', '-nw')]  # so that it waits for an answer
    words += ['-q', '-sf', '/bin/true', '-pf', pid_file, '-lf', second_leases]
    try:
        write_file(second_leases, 0o600, f'{identity}\n'.encode(BYTE_ENCODING))
        # dhclient -1 asks, and goes on in the background. dhclient -x ends that one.
        is_told = run('dhclient', *words, '-1') and run('dhclient', *words, '-x')
    except Failed:  # the file cannot be written
        is_told = False
    run('rm', '-f', second_leases, pid_file)
    return is_told


def find_value(option, words):
    """Return the word behind an option, '' if the option is not there."""
    for word, following in zip(words, words[1:]):
        if word == option:
            return following
    return ''


# ---- Step remember -----------------------------------------------------------------------------


VM_ID_FILE = f'{STATE_FOLDER}/vm-id'


def remember_vm():
    """Save the id of this VM, by which later runs know that it is provisioned."""
    vm_id = read_vm_id()
    if not vm_id:
        raise Failed('cannot read /sys/class/dmi/id/product_uuid')
    sync_all()
    write_file(VM_ID_FILE, 0o600, f'{vm_id}\n'.encode())
    say_done(f'Remembered: {vm_id}')


def is_remembered():
    """Whether an earlier run on this VM has done the step remember; say so."""
    try:
        remembered = read_file(VM_ID_FILE)
    except Failed:
        return False
    vm_id = read_vm_id()
    if vm_id and remembered in (vm_id, swap_bytes(vm_id)):
        say(f'Already provisioned: {remembered}')
        return True
    return False


def swap_bytes(vm_id):
    """Return an id with the bytes of its first three groups in the other order.

    00112233-4455-6677-... becomes 33221100-5544-7766-..., and the other way round. Firmware shows
    the id of a VM in one order or the other. An update may change it.
    """
    return re.sub('^(..)(..)(..)(..)-(..)(..)-(..)(..)-', r'\4\3\2\1-\6\5-\8\7-', vm_id)


if __name__ == '__main__':
    end_program(main(sys.argv[1:]))
