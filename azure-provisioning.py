#!/usr/bin/python3 -IS
# azure-provisioning.py: the provisioning agent in one file.
# azure-provisioning.sh is the same program in shell, with the same sections and functions.
#
# Arguments, settings and exit statuses: see USAGE. Errors: a step that fails says so on stderr.
# Needs Python 3.6 and its standard library; -IS ignores the modules of environment and site.
# Sources, below https://learn.microsoft.com/azure/virtual-machines/: linux/no-agent and
# linux/provisioning (WireServer, DVD), instance-metadata-service (IMDS).
"""Provision a Linux VM on Azure, once, on its first boot."""

import base64
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from xml.etree import ElementTree

sys.modules['ssl'] = None  # http.client does without; ssl would take a quarter of all memory
import http.client  # noqa: E402 - behind the line above

VERSION = '1.0.0'

USAGE = """\
usage: azure-provisioning [-n | --dry-run] [STEP]...
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
exit status: 0 all steps are done, 1 a step failed, 2 wrong usage"""

settings = types.SimpleNamespace(
    wireserver='http://168.63.129.16',
    imds='http://169.254.169.254',
    attempts=240,
    interval=5,  # seconds
    timeout=30,  # seconds
    dry_run=False,
)

BODY_LIMIT = 65536  # bytes of a reply's body
SPACE = ' \t\r\n'  # white space, as XML has it
MARKUP = '\1'  # a character that neither XML nor any value may hold


# ---- Messages and failures ---------------------------------------------------------------------


def say(*lines):
    """Print lines to stdout."""
    print_lines(sys.stdout, lines)


def complain(*lines):
    """Print lines to stderr."""
    print_lines(sys.stderr, lines)


def print_lines(stream, lines):
    """Print lines. The VM is provisioned whether or not somebody reads them."""
    if stream is not None:  # None: it is closed
        with contextlib.suppress(OSError, UnicodeError):
            print(*lines, sep='\n', file=stream, flush=True)


class Failed(Exception):
    """A step, or an attempt at a request, failed. The text is the reason, for a line on stderr.

    status: the HTTP status of the reply, if that is the reason.
    absent: whether IMDS said that it has no such value.
    last_attempt: what to add in a report to Azure: why the last attempt failed.
    """

    def __init__(self, reason, status=0, last_attempt=''):
        super().__init__(reason)
        self.status = status
        self.absent = False
        self.last_attempt = last_attempt


def leave(status):
    """End the program. A plain exit would change the status if the output could not be written."""
    os._exit(status)


def usage_error(message):
    """Say what is wrong with the command line or a setting, and end the program."""
    complain(f'azure-provisioning: {message}', USAGE)
    leave(2)


# ---- The run -----------------------------------------------------------------------------------


def main(arguments):
    """Provision the VM; return the exit status."""
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
    steps = parse_arguments(arguments) or ['ready', 'hostname', 'disable']
    read_settings()
    if 'remember' in steps and is_remembered():
        return 0
    return run_steps(steps)


def find_step(name):
    """Return the function of a step, or None. This is the table of all steps."""
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
    """Return the steps that are named. The first argument that is no step and no -n decides."""
    steps = []
    for argument in arguments:
        if argument in ('-n', '--dry-run'):
            settings.dry_run = True
        elif argument in ('-h', '--help'):
            say(USAGE)
            leave(0)
        elif argument == '--version':
            say(f'azure-provisioning {VERSION}')
            leave(0)
        elif find_step(argument):
            steps.append(argument)
        else:
            usage_error(f'unknown step or option: {argument}')
    return steps


def read_settings():
    """Read the settings from the environment, and check them."""
    settings.wireserver = read_url('AZURE_PROVISIONING_WIRESERVER', settings.wireserver)
    settings.imds = read_url('AZURE_PROVISIONING_IMDS', settings.imds)
    settings.attempts = read_number('AZURE_PROVISIONING_ATTEMPTS', settings.attempts, 1)
    settings.interval = read_number('AZURE_PROVISIONING_INTERVAL', settings.interval, 0)
    settings.timeout = read_number('AZURE_PROVISIONING_TIMEOUT', settings.timeout, 1)


def read_url(name, default):
    """Return a base URL, http://HOST[:PORT][/PATH], without a '/' at its end."""
    url = os.environ.get(name, default)
    host, port, path = '[A-Za-z0-9._~-]+', '[1-9][0-9]{0,4}', '(/[A-Za-z0-9._~:-]+)*/?'
    if not re.fullmatch(f'http://{host}(:{port})?{path}', url):
        usage_error(f'bad {name}')
    return url.rstrip('/')


def read_number(name, default, least):
    """Return a whole number of up to six digits, without leading zeros."""
    number = os.environ.get(name, str(default))
    if not re.fullmatch('0|[1-9][0-9]{0,5}', number) or int(number) < least:
        usage_error(f'bad {name}')
    return int(number)


def run_steps(steps):
    """Run the steps until one fails; return the exit status."""
    for number, step in enumerate(steps):
        try:
            run_step(step)
        except Failed as failure:
            reason = f'{step}: {failure}'
            complain(reason)
            if 'ready' in steps[number + 1 :] and 'ready' not in steps[: number + 1]:
                report_not_ready(reason + failure.last_attempt)
            return 1
    return 0


def run_step(step):
    """Run a step. Raise Failed, and nothing else, if it cannot be done."""
    try:
        find_step(step)()
    except Failed:
        raise
    except Exception as error:  # an error that nobody foresaw: it must not keep Azure waiting
        raise Failed(f'{type(error).__name__}: {error}') from error


# ---- Commands and files ------------------------------------------------------------------------


def has_command(name):
    """Whether there is such a program on PATH."""
    return any(os.access(f'{folder}/{name}', os.X_OK) for folder in os.get_exec_path())


def run(*command, line=None):
    """Run a command that changes the system; return whether it is there and succeeds.

    A dry run prints it instead. The line, which may be secret, goes to the command's stdin.
    """
    if not settings.dry_run:
        return succeeds(*command, line=line)
    if has_command(command[0]):
        say(f'Would run: {" ".join(command)}')
    return has_command(command[0])


def succeeds(*command, line=None):
    """Run a command, in a dry run, too; return whether it is there and succeeds."""
    stdin = None if line is None else line.encode('latin-1') + b'\n'
    try:
        return subprocess.run(command, input=stdin).returncode == 0
    except OSError:
        return False


def say_done(line):
    """Print what has been changed; in a dry run, nothing has."""
    if not settings.dry_run:
        say(line)


def write_file(path, mode, content, owner=None):
    """Replace a file, or make a new one, in one step: whoever reads it finds all of it.

    The owner is a pair of numbers; without one, it is root. Raise Failed if that is impossible.
    """
    if settings.dry_run:
        say(f'Would write {path}')
        return
    new = f'{path}.new'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        remove_file(new)
        with open(new, 'xb') as file:
            file.write(content)
        os.chmod(new, mode)
        if owner:
            os.chown(new, *owner, follow_symlinks=False)
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            remove_file(new)
        raise Failed(f'cannot write {path}') from None


def remove_file(path):
    """Remove a file, or a symlink, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


# ---- HTTP --------------------------------------------------------------------------------------


def exchange(label, url, headers, data=None, limit=BODY_LIMIT):
    """Send a request, a POST if there are data, else a GET; return the reply's status and body.

    A GET wants status 200, a POST any 2xx. The body has at most so many bytes as the limit says.
    All of it takes TIMEOUT seconds at most. Raise Failed, with the label and the reason.
    """
    reply = types.SimpleNamespace(status=0, body=b'', problem='timed out', socket=None)
    # A thread, as a socket's timeout bounds neither the lookup of a name nor a server that sends a
    # byte now and then.
    thread = threading.Thread(target=transfer, args=(url, headers, data, limit, reply), daemon=True)
    thread.start()
    thread.join(settings.timeout)
    hang_up(reply.socket)
    # A bad status is the reason for the failure, whatever came behind it.
    if reply.status and reply.status != 200 and not (data and 200 <= reply.status < 300):
        raise Failed(f'{label}: HTTP {reply.status}', reply.status)
    if reply.problem:
        raise Failed(f'{label}: {reply.problem}')
    return reply.status, reply.body


def hang_up(connected_socket):
    """End what a thread still sends or receives, so that the thread ends, too."""
    if connected_socket:
        with contextlib.suppress(OSError):
            connected_socket.shutdown(socket.SHUT_RDWR)


def transfer(url, headers, data, limit, reply):
    """Do an exchange with http.client, which uses no proxy and follows no redirect.

    Set reply.socket, status and body as soon as they are known, and problem, '' if all is well.
    """
    host, path = re.fullmatch('http://([^/]*)(/.*)', url).groups()
    headers = {
        **headers,
        'User-Agent': f'azure-provisioning/{VERSION}',
        'Accept': '*/*',
        'Accept-Encoding': 'identity',
        'Connection': 'close',
    }
    try:
        connection = http.client.HTTPConnection(host, timeout=settings.timeout)
        connection.response_class = StrictResponse
        with contextlib.closing(connection):
            connection.connect()
            reply.socket = connection.sock
            connection.request('POST' if data else 'GET', path, data, headers)
            response = connection.getresponse()
            reply.status = response.status
            reply.problem = read_body(response, limit, reply)
    except socket.timeout:
        reply.problem = 'timed out'
    except (OSError, OverflowError, UnicodeError):  # the last two: no such port, no such name
        reply.problem = 'broken reply' if reply.status else 'no connection'
    except (http.client.HTTPException, ValueError):
        reply.problem = 'broken reply'


def read_body(response, limit, reply):
    """Set reply.body to the body of a response; return what is wrong with it, or ''."""
    lengths = set(response.headers.get_all('Content-Length', []))
    if len(lengths) > 1 or not all(re.fullmatch('[0-9]+', length) for length in lengths):
        return 'broken reply'
    if any(int(length) > limit for length in lengths):
        return 'reply too large'
    body = response.read(limit + 1)
    if response.length:  # so many bytes are missing
        return 'broken reply'
    if len(body) > limit:
        return 'reply too large'
    # A shell cannot hold a NUL byte. The same here: make the body one that is never taken.
    reply.body = rb'\0' if b'\0' in body else body
    return ''


class StrictResponse(http.client.HTTPResponse):
    """A response whose chunk sizes are hexadecimal digits; int() also takes 0x10, +5 and 1_0."""

    def _read_next_chunk_size(self):
        line = self.fp.readline(1000)
        size = re.match(b'[0-9A-Fa-f]+(?=[ \t\r\n;])', line)
        if not size:
            raise ValueError('no chunk size')
        return int(size.group(), 16)


# ---- Attempts ----------------------------------------------------------------------------------


def retry(step, attempts, command, *arguments, optional=False):
    """Call the command until it does not raise Failed; return its result. Raise Failed in the end.

    The waits between attempts are 1 second, 2, 3 and so on, up to INTERVAL.
    Of an optional value, IMDS may say that it has none; it also says so for a moment while it
    starts. Return '' when it has said so five times, or as often as there are attempts.
    """
    absent = 0
    for attempt in range(1, attempts + 1):
        try:
            return command(*arguments)
        except Failed as failure:
            complain(f'{step}: attempt {attempt} of {attempts}: {failure}')
            last = failure
        if optional and last.absent:
            absent += 1
            if absent == min(5, attempts):
                return ''
        if attempt < attempts:
            time.sleep(min(attempt, settings.interval))
    raise Failed(f'gave up after {attempts} attempts', last_attempt=f': {last}')


# ---- Step ready: the goal state and the health report ------------------------------------------


WIRESERVER_HEADERS = {'x-ms-version': '2012-11-30', 'x-ms-agent-name': 'custom-provisioning'}


def report_ready():
    """Report to the WireServer that this VM is Ready."""
    say('Retrieving goal state from the Wireserver')
    retry('ready', settings.attempts, report_health, 'Ready', '')


def report_health(state, details):
    """Request the goal state, and send a health report for it.

    It is requested anew at each attempt, as the WireServer takes no report for an old incarnation.
    """
    incarnation, container_id, instance_id = request_goal_state()
    report = (
        '<Health>'
        f'<GoalStateIncarnation>{incarnation}</GoalStateIncarnation>'
        '<Container>'
        f'<ContainerId>{container_id}</ContainerId>'
        '<RoleInstanceList><Role>'
        f'<InstanceId>{instance_id}</InstanceId>'
        f'<Health><State>{state}</State>{details}</Health>'
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
    incarnation = squeeze(find_text(root, 'Incarnation'))
    container_id = squeeze(find_text(root, 'Container/ContainerId'))
    instance_id = squeeze(find_text(root, 'Container/RoleInstanceList/RoleInstance/InstanceId'))
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
    """Return the root element of an XML document, or None if there is none of that name.

    A document type definition, which could define entities, is refused.
    """
    if b'<!DOCTYPE' in document:
        return None
    try:
        root = ElementTree.fromstring(document, ElementTree.XMLParser(encoding='utf-8'))
    except (ElementTree.ParseError, ValueError):
        return None
    for element in root.iter():
        element.tag = element.tag.rpartition('}')[2]  # {NAMESPACE}NAME
    return root if root.tag == root_name else None


def find_text(root, path):
    """Return the text of the first element at a path, '' if there is none.

    An element with elements inside has no text of use: MARKUP stands for it.
    """
    element = root.find(path)
    if element is None:
        return ''
    return MARKUP if len(element) else element.text or ''


def squeeze(text):
    """Return a text with one space for each run of white space, and none at its ends."""
    return ' '.join(re.findall(f'[^{SPACE}]+', text))


def is_number(text):
    """Whether a text is decimal digits."""
    return re.fullmatch('[0-9]+', text) is not None


def is_id(text):
    """Whether a text is visible ASCII without < > & " and ', so that XML can hold it as it is."""
    return re.fullmatch('[!-~]+', text) is not None and not re.search('[<>&"\']', text)


# ---- Step hostname: a value from IMDS ----------------------------------------------------------


def set_hostname():
    """Set the hostname that the user chose, or else the name of the VM's resource."""
    say('Retrieving hostname from IMDS')
    computer_name = 'osProfile/computerName', '2021-02-01'
    resource_name = 'name', '2019-06-01'
    name = retry('hostname', settings.attempts, request_text, *computer_name, optional=True)
    if not name:
        name = retry('hostname', settings.attempts, request_text, *resource_name)
    if not is_hostname(name):
        raise Failed('no valid hostname')
    say(f'Hostname: {name}')
    if not run('hostnamectl', 'set-hostname', name):
        write_file('/etc/hostname', 0o644, f'{name}\n'.encode())
        set_kernel_hostname(name)


def is_hostname(text):
    """Whether a text is a hostname: Linux takes 64 characters, DNS 63 between two dots."""
    return (
        re.fullmatch('[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?', text) is not None
        and '..' not in text
        and len(text) <= (64 if '.' in text else 63)
    )


def set_kernel_hostname(name):
    """Set the hostname until the next boot, which reads /etc/hostname."""
    if not settings.dry_run:
        try:
            socket.sethostname(name)
        except OSError:
            raise Failed("cannot set the kernel's hostname") from None


def request_leaf(leaf, api_version, limit=BODY_LIMIT):
    """Request a value of the VM from IMDS; return its text. Raise Failed, absent if it has none.

    404 is its answer then, or 400 if it is too old to know the value.
    """
    label = leaf.rpartition('/')[2]
    url = f'{settings.imds}/metadata/instance/compute/{leaf}?api-version={api_version}&format=text'
    try:
        _, body = exchange(label, url, {'Metadata': 'true'}, limit=limit)
    except Failed as failure:
        failure.absent = failure.status in (400, 404)
        raise
    return body.decode('latin-1')


def request_text(leaf, api_version):
    """Request a value that is not empty from IMDS; return its text, squeezed."""
    text = squeeze(request_leaf(leaf, api_version))
    if not text:
        raise Failed(f'{leaf.rpartition("/")[2]}: empty')
    return text


# ---- Step disable ------------------------------------------------------------------------------


def disable_unit():
    """Disable the service, of systemd or OpenRC, so that the next boot does not run it."""
    if not run('systemctl', 'disable', 'azure-provisioning.service') and not run(
        'rc-update', 'del', 'azure-provisioning'
    ):
        raise Failed('neither systemctl nor rc-update disabled azure-provisioning')
    say_done('Disabled azure-provisioning.service')


# ================================================================================================
# The default run ends here. All that follows runs only if a step is named, or fails before ready.
# ================================================================================================


# ---- NotReady: a step before ready failed ------------------------------------------------------


def report_not_ready(reason):
    """Report to the WireServer that this VM will not be Ready: whoever creates it stops waiting."""
    now = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
    agent = f'azure-provisioning/{VERSION}'
    text = f'result=error|reason={reason}|agent={agent}|vm_id={read_vm_id()}|timestamp={now}'
    description = re.sub('[^ -~]|[&<>]', ' ', text[:512])
    details = (
        '<Details>'
        '<SubStatus>ProvisioningFailed</SubStatus>'
        f'<Description>{description}</Description>'
        '</Details>'
    )
    say('Retrieving goal state from the Wireserver')
    try:
        retry('NotReady', settings.attempts, report_health, 'NotReady', details)
    except Failed as failure:
        complain(f'NotReady: {failure}')


def read_vm_id():
    """Return the id of this VM in lower case, or '' if the firmware does not tell one."""
    try:
        vm_id = read_file('/sys/class/dmi/id/product_uuid').lower()
    except Failed:
        return ''
    return vm_id if re.fullmatch('[0-9a-f-]{36}', vm_id) else ''


def read_file(path):
    """Return the text of a file without line feeds at its end, '' if there is no such file.

    The text has a character for each byte. Raise Failed if the file cannot be read.
    """
    if not os.path.lexists(path):
        return ''
    try:
        if not os.path.isfile(path):  # opening a FIFO would take for ever
            raise Failed(f'cannot read {path}')
        with open(path, encoding='latin-1', newline='') as file:
            return file.read().rstrip('\n')
    except OSError:
        raise Failed(f'cannot read {path}') from None


# ---- Step user: the account, its SSH keys, sudo or doas ----------------------------------------


# What OpenSSH writes as the beginning of a public key: its type, and the type again in base64.
KEY_BEGINNINGS = (
    'ssh-rsa AAAAB3Nz',
    'ssh-ed25519 AAAAC3Nz',
    'ecdsa-sha2-nistp256 AAAAE2Vj',
    'ecdsa-sha2-nistp384 AAAAE2Vj',
    'ecdsa-sha2-nistp521 AAAAE2Vj',
    'sk-ssh-ed25519@openssh.com AAAAGnNr',
    'sk-ecdsa-sha2-nistp256@openssh.com AAAAInNr',
)


def create_user():
    """Create the admin user, unless there is one, and let it log in with its keys."""
    say('Retrieving user from IMDS')
    name = retry('user', settings.attempts, request_text, 'osProfile/adminUsername', '2021-02-01')
    if not is_user_name(name):
        raise Failed('no valid user name')
    say(f'User: {name}')
    keys = request_keys()
    if not find_account(name):
        shell = '/bin/bash' if os.access('/bin/bash', os.X_OK) else '/bin/sh'
        if not run('useradd', '-m', '-s', shell, name):
            run('adduser', '-D', '-s', shell, name)  # BusyBox; whether it worked is seen below
        if settings.dry_run:
            return
    account = find_account(name)
    if not account:
        raise Failed('neither useradd nor adduser made the user')
    unlock(account)
    if keys:
        authorize_keys(account, keys)
    grant_root(name)


def is_user_name(text):
    """Whether a text is a user name. sudo has other uses for ALL and its like."""
    return (
        re.fullmatch('[A-Za-z_][A-Za-z0-9._-]{0,31}', text) is not None
        and re.search('[a-z]', text) is not None
        and text != 'root'
    )


def request_keys():
    """Return the user's valid SSH keys. Raise Failed if nobody could log in."""
    entries = squeeze(
        retry('user', settings.attempts, request_leaf, 'publicKeys', '2021-02-01', optional=True)
    )
    keys = []
    for number, entry in enumerate(entries.split()):
        if entry not in (f'{number}/', f'{number}') or number > 99:
            raise Failed('publicKeys: no valid list')
        leaf = f'publicKeys/{number}/keyData', '2021-02-01'
        text = retry('user', settings.attempts, request_leaf, *leaf, optional=True)
        key = squeeze(remove('\r\n', text))  # Azure may break a key into lines
        if is_ssh_key(key):
            say(f'SSH key: {key.split()[0]}')
            keys.append(key)
        else:
            complain(f'user: publicKeys/{number}: no OpenSSH public key')
    if not keys:
        leaf = 'osProfile/disablePasswordAuthentication', '2021-02-01'
        if squeeze(retry('user', settings.attempts, request_leaf, *leaf, optional=True)) != 'false':
            raise Failed('no valid SSH key, and no password')
    return keys


def remove(characters, text):
    """Return a text without these characters."""
    return re.sub(f'[{characters}]', '', text)


def is_ssh_key(text):
    """Whether a text is an OpenSSH public key: TYPE BASE64 [COMMENT]."""
    return (
        text.startswith(KEY_BEGINNINGS)
        and re.fullmatch('[A-Za-z0-9+/=]+', text.split(' ')[1]) is not None
        and not has_control(text)
    )


def has_control(text):
    """Whether a text has a control character in it."""
    return re.search('[\0-\37\177]', text) is not None


def find_account(name):
    """Return a user's account, None if there is none. Raise Failed if it cannot be read.

    password: the field of /etc/shadow, or of /etc/passwd if there is none.
    owner: the numbers of the user and of its group. home: its folder.
    """
    fields = find_line('/etc/passwd', name)
    if not fields:
        return None
    if not is_number(fields[2]) or not is_number(fields[3]):
        raise Failed(f'/etc/passwd: no valid line for {name}')
    return types.SimpleNamespace(
        name=name,
        password=(find_line('/etc/shadow', name) or fields)[1],
        owner=(int(fields[2]), int(fields[3])),
        home=os.fsdecode(fields[5].encode('latin-1')),
    )


def find_line(path, name):
    """Return the fields of the first line of /etc/passwd or /etc/shadow for a user, or None."""
    for line in read_file(path).split('\n'):
        if line.startswith(f'{name}:'):
            return f'{line}::::::'.split(':')  # at least seven
    return None


def unlock(account):
    """Have the account take keys: for one locked with '!', sshd without PAM takes none.

    '*' says that no password fits, and locks nothing.
    """
    if account.password.startswith('!'):
        name = account.name
        if not run('chpasswd', '-e', line=f'{name}:*') and not run('usermod', '-p', '*', name):
            raise Failed('chpasswd failed')


def authorize_keys(account, keys):
    """Add the keys to the user's authorized_keys, unless they are there."""
    folder = f'{account.home}/.ssh'
    path = f'{folder}/authorized_keys'
    make_ssh_folder(account, folder, path)
    lines = read_file(path).split('\n')
    if lines == ['']:
        lines = []
    for key in keys:
        key_itself = ' '.join(key.split(' ')[:2])  # without the comment
        if not any(f'{line} '.startswith(f'{key_itself} ') for line in lines):
            lines.append(key)
    content = ''.join(f'{line}\n' for line in lines).encode('latin-1')
    write_file(path, 0o600, content, account.owner)


def make_ssh_folder(account, folder, path):
    """Make what is missing of the home and the folder of the keys, as sshd wants them.

    Symlinks are refused: the user could have made them, and this is root.
    """
    if os.path.islink(folder) or os.path.islink(path):
        raise Failed(f'{folder}: a symlink is in the way')
    owner = '{}:{}'.format(*account.owner)
    commands = [
        ('mkdir', '-p', folder),
        ('chown', '-h', owner, folder),
        ('chmod', '700', folder),
        ('chmod', 'go-w', account.home),
    ]
    if not os.path.isdir(account.home):  # a run was cut off after it had made the account
        commands[:0] = [('mkdir', '-p', account.home), ('chown', owner, account.home)]
    if not all(run(*command) for command in commands):
        raise Failed(f'cannot make {folder}')


def grant_root(name):
    """Let the user become root without a password, by sudo or by doas, once that takes the rule."""
    sudo_rule = f'{name} ALL=(ALL:ALL) NOPASSWD:ALL'
    doas_rule = f'permit nopass {name}'
    doas_path = '/etc/doas.conf'
    if os.path.isdir('/etc/doas.d'):
        doas_path = '/etc/doas.d/azure-provisioning.conf'
    doas_rules = read_file(doas_path)
    if not f'\n{doas_rules}'.endswith(f'\n{doas_rule}'):  # the last rule that fits counts
        doas_rules = f'{doas_rules}\n{doas_rule}' if doas_rules else doas_rule
    if run('visudo', '-q', '-c', '-f', '-', line=sudo_rule):
        write_file('/etc/sudoers.d/azure-provisioning', 0o440, f'{sudo_rule}\n'.encode())
    elif run('doas', '-C', '/dev/stdin', line=doas_rules):
        write_file(doas_path, 0o440, f'{doas_rules}\n'.encode('latin-1'))
    else:
        complain(f'user: neither sudo nor doas takes a rule for {name}')


# ---- The DVD: ovf-env.xml ----------------------------------------------------------------------


DVD_FOLDER = '/run/azure-provisioning/dvd'
OVF_FILE = f'{DVD_FOLDER}/ovf-env.xml'
DVD_ATTEMPTS = 5
DATA_LIMIT = 122880  # bytes: 64 KiB in base64, with room for line breaks
OVF_PATH = 'ProvisioningSection/LinuxProvisioningConfigurationSet'


def request_dvd():
    """Return the root element of ovf-env.xml, which is on a DVD at the first boot."""
    mount_dvd()
    try:
        with open(OVF_FILE, 'rb') as file:
            document = file.read(DATA_LIMIT + 1)
    except OSError:
        raise Failed('ovf-env.xml: cannot be read') from None
    finally:
        succeeds('umount', DVD_FOLDER)  # if it fails, the next attempt finds the file
    if not document:
        raise Failed('ovf-env.xml: cannot be read')
    root = read_xml('Environment', document)
    if root is None or len(document) > DATA_LIMIT:
        raise Failed('ovf-env.xml: not an OVF environment')
    return root


def mount_dvd():
    """Mount the DVD where only root can see it, unless an earlier run has left it mounted."""
    options = ['-t', 'udf,iso9660', '-o', 'ro,nosuid,nodev,noexec']
    os.makedirs(DVD_FOLDER, exist_ok=True)
    if os.path.exists(OVF_FILE):
        return
    if not os.path.exists('/dev/sr0') or not succeeds('mount', *options, '/dev/sr0', DVD_FOLDER):
        raise Failed('ovf-env.xml: no DVD')


# ---- Step password -----------------------------------------------------------------------------


SSHD_CONFIG = '/etc/ssh/sshd_config'


def set_password():
    """Set the password of the admin user, and have sshd take passwords or not."""
    say('Retrieving password from the DVD')
    root = retry('password', DVD_ATTEMPTS, request_dvd)
    name = squeeze(find_text(root, f'{OVF_PATH}/UserName'))
    password = find_text(root, f'{OVF_PATH}/UserPassword').encode().decode('latin-1')
    disable = squeeze(find_text(root, f'{OVF_PATH}/DisableSshPasswordAuthentication')).lower()
    if not is_user_name(name):
        raise Failed('no valid user name')
    if has_control(password) or len(password) > 72:
        raise Failed('no valid password')
    if password:
        if not run('chpasswd', line=f'{name}:{password}'):
            raise Failed('chpasswd failed')
        say_done('Password set')
    if disable in ('true', 'false') and os.path.isfile(SSHD_CONFIG):
        configure_sshd('no' if disable == 'true' else 'yes')


def configure_sshd(answer):
    """Have sshd take passwords, or not, at both of its prompts; the first line of each counts."""
    keywords = ('PasswordAuthentication ', 'KbdInteractiveAuthentication ')
    lines = read_file(SSHD_CONFIG).split('\n')
    while lines and lines[0].startswith(keywords):  # of a former run
        del lines[0]
    lines[:0] = [keyword + answer for keyword in keywords]
    content = '\n'.join(lines).rstrip('\n') + '\n'
    write_file(SSHD_CONFIG, 0o644, content.encode('latin-1'))
    say_done(f'PasswordAuthentication: {answer}')
    reload_sshd()


def reload_sshd():
    """Have a running sshd read its configuration; one that starts later does so anyway."""
    if not run('systemctl', 'try-reload-or-restart', 'sshd.service') and not run(
        'systemctl', 'try-reload-or-restart', 'ssh.service'
    ):
        run('rc-service', '--ifstarted', 'sshd', 'reload')


# ---- Step data ---------------------------------------------------------------------------------


STATE_FOLDER = '/var/lib/azure-provisioning'


def save_data():
    """Save the user data, from IMDS, and the custom data, from the DVD if there is one."""
    say('Retrieving user data from IMDS')
    leaf = 'userData', '2021-02-01', DATA_LIMIT
    user_data = retry('data', settings.attempts, request_leaf, *leaf, optional=True)
    save('userData', f'{STATE_FOLDER}/user-data', user_data)
    say('Retrieving custom data from the DVD')
    try:
        root = retry('data', DVD_ATTEMPTS, request_dvd)
    except Failed:
        return
    save('customData', f'{STATE_FOLDER}/custom-data', find_text(root, f'{OVF_PATH}/CustomData'))


def save(label, path, text):
    """Decode a text from base64 to a file; if it is empty, remove the file of an earlier VM."""
    text = remove(SPACE, text)
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
    """Whether a text is base64, padding included."""
    return re.fullmatch('[A-Za-z0-9+/]*={0,2}', text) is not None and len(text) % 4 == 0


# ---- Step publish ------------------------------------------------------------------------------


def publish_hostname():
    """Have the DHCP client of the default route's interface renew its lease, with the new name."""
    interface = find_interface()
    if not interface:
        raise Failed('no default route')
    if not renew_lease(interface):
        raise Failed(f'no DHCP client renewed the lease of {interface}')
    say_done(f'Renewed the DHCP lease of {interface}')


def find_interface():
    """Return the interface of the first default route, '' if there is none."""
    for line in read_file('/proc/self/net/route').split('\n'):
        fields = line.split()
        # Interface, destination, gateway, flags, references, use, metric, mask ...
        if len(fields) > 7 and fields[1] == fields[7] == '00000000':
            return fields[0]
    return ''


def renew_lease(interface):
    """Ask each DHCP client in turn; return whether one renewed the lease."""
    return (
        run('networkctl', 'reconfigure', interface)
        or run('nmcli', 'device', 'reapply', interface)
        or run('dhcpcd', '-n', interface)
        or renew_with_dhclient(interface)
        or run('killall', '-USR1', 'udhcpc')
    )


def renew_with_dhclient(interface):
    """Ask with a second dhclient, which changes nothing here, and end it."""
    return run('dhclient', '-1', '-q', '-sf', '/bin/true', interface) and run(
        'dhclient', '-x', '-q', interface
    )


# ---- Step remember -----------------------------------------------------------------------------


VM_ID_FILE = f'{STATE_FOLDER}/vm-id'


def remember_vm():
    """Save the id of this VM, by which later runs know that it is provisioned."""
    vm_id = read_vm_id()
    if not vm_id:
        raise Failed('cannot read /sys/class/dmi/id/product_uuid')
    write_file(VM_ID_FILE, 0o600, f'{vm_id}\n'.encode())
    say_done(f'Remembered: {vm_id}')


def is_remembered():
    """Whether a run on this VM has got to the step remember; say so."""
    vm_id = read_vm_id()
    remembered = vm_id != '' and read_file(VM_ID_FILE) == vm_id
    if remembered:
        say(f'Already provisioned: {vm_id}')
    return remembered


if __name__ == '__main__':
    leave(main(sys.argv[1:]))
