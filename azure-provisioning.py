#!/usr/bin/python3 -IS
# The provisioning agent in one file; azure-provisioning.sh is the same program in shell, function by function.
# Needs Python 3.6, its standard library. Sources: https://learn.microsoft.com/azure/virtual-machines/, the pages
# linux/no-agent for the protocol and instance-metadata-service for IMDS.
"""usage: azure-provisioning [-h | --help | --version] [STEP]...
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
  AZURE_PROVISIONING_TIMEOUT     time for one exchange, in seconds, from 1 (30)"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
if __name__ == '__main__' and not sys.flags.isolated:  # import nothing from this folder or PYTHONPATH
    os.execv(sys.executable, [sys.executable, '-IS', *sys.argv])
sys.modules['ssl'] = None  # http.client imports it if it can: a quarter of the memory, for nothing
import http.client, re, socket, time
from xml.parsers import expat

VERSION = '0.1.0'
WIRESERVER = os.environ.get('AZURE_PROVISIONING_WIRESERVER', 'http://168.63.129.16')
IMDS = os.environ.get('AZURE_PROVISIONING_IMDS', 'http://169.254.169.254')
ATTEMPTS = os.environ.get('AZURE_PROVISIONING_ATTEMPTS', '240')
INTERVAL = os.environ.get('AZURE_PROVISIONING_INTERVAL', '5')
TIMEOUT = os.environ.get('AZURE_PROVISIONING_TIMEOUT', '30')
BODY_LIMIT = 65536  # bytes
AGENT = {'x-ms-version': '2012-11-30', 'x-ms-agent-name': 'custom-provisioning'}
SPACE = ' \t\n\r'  # XML's white space
PATHS = ('/GoalState/Incarnation', '/GoalState/Container/ContainerId',
         '/GoalState/Container/RoleInstanceList/RoleInstance/InstanceId')
ID = '[!#-%(-;=?-~]+'  # what an id is made of: visible ASCII, but for < > & " and '

class Failed(Exception):
    """An exchange, or what it brought, was no good; says why."""
    final = False  # True: another attempt would fail too

def say(*lines, file=None):
    try:
        print(*lines, sep='\n', file=file, flush=True)
    except OSError:
        pass  # the VM is Ready whether or not somebody listens

def complain(*lines):
    say(*lines, file=sys.stderr or open(os.devnull, 'w'))  # None: closed

def misused(message):
    complain('azure-provisioning: ' + message, __doc__)
    os._exit(2)

def run(*command):
    """Whether there is such a command and it succeeds."""
    return os.spawnvp(os.P_WAIT, command[0], command) == 0

def check_url(name, url):
    if not re.fullmatch('http://[A-Za-z0-9._~-]+(:[1-9][0-9]{0,4})?(/[A-Za-z0-9._~:-]+)*/?', url):
        misused('bad ' + name)

def check_number(name, number, least):
    if not re.fullmatch('0|[1-9][0-9]{0,5}', number) or int(number) < least:
        misused('bad ' + name)

def exchange(label, url, data, headers):
    """POST the data, or GET without; return the status and the body of a good reply, or raise Failed."""
    def time_out(signum, frame):
        raise Failed('timed out')
    signal.signal(signal.SIGALRM, time_out)
    signal.setitimer(signal.ITIMER_REAL, int(TIMEOUT))  # a socket's own timeout begins anew with every byte
    try:
        return transfer(url, data, {**headers, 'User-Agent': 'azure-provisioning/' + VERSION, 'Accept': '*/*',
                                    'Accept-Encoding': 'identity', 'Connection': 'close'})
    except Failed as failure:
        reason = str(failure)
    except (OSError, OverflowError, UnicodeError):  # the last two: no such port, no such name
        reason = 'no connection'
    except (http.client.HTTPException, ValueError):
        reason = 'broken reply'
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    raise Failed('%s: %s' % (label, reason))

def transfer(url, data, headers):
    """Have http.client do it, which follows no redirect and obeys no proxy."""
    host, path = re.fullmatch('http://([^/]*)(.*)', url).groups()
    connection = http.client.HTTPConnection(host, timeout=int(TIMEOUT))
    try:
        connection.request('POST' if data else 'GET', path, data or None, headers)
        response = connection.getresponse()
        if response.status != 200 and not (data and 200 <= response.status < 300):
            raise Failed('HTTP %d' % response.status)
        if int(response.getheader('Content-Length', 0)) > BODY_LIMIT:
            raise Failed('reply too large')
        try:
            body = response.read(BODY_LIMIT + 1)
        except OSError:
            raise Failed('broken reply')
        if response.length:  # what is still to come
            raise Failed('broken reply')
        if len(body) > BODY_LIMIT:
            raise Failed('reply too large')
        return response.status, body
    finally:
        connection.close()

def retry(step, attempts, command, *arguments):
    """Call the command until it does not raise Failed; return what it returns."""
    for attempt in range(1, attempts + 1):
        try:
            return command(*arguments)
        except Failed as failure:
            complain('%s: attempt %d of %d: %s' % (step, attempt, attempts, failure))
            if failure.final or attempt == attempts:
                raise Failed('gave up after %d attempts' % attempt)
        time.sleep(min(attempt, int(INTERVAL)))

def trim(text):
    return text.strip(SPACE)

def parse(document):
    """Return the texts in the goal state, by path, each of the first element there; raise ValueError or ExpatError."""
    path, pieces, texts = '', [], {}
    def tag(name, attributes=None):
        nonlocal path
        if attributes is not None:  # a start tag goes down into its element, an end tag takes the text and goes up
            if not path and name != 'GoalState':
                raise ValueError
            path, pieces[:] = path + '/' + name, []
        else:
            texts.setdefault(path if path in PATHS else '', trim(''.join(pieces)))
            path, pieces[:] = path.rpartition('/')[0], '<'  # '<' spoils a value with an element inside
    def refuse(*_):
        raise ValueError
    parser = expat.ParserCreate('utf-8')
    parser.StartElementHandler = parser.EndElementHandler = tag
    parser.CharacterDataHandler = pieces.append
    parser.CommentHandler = parser.ProcessingInstructionHandler = lambda *_: pieces.append('<')  # or a comment
    parser.StartDoctypeDeclHandler = parser.StartCdataSectionHandler = refuse
    parser.Parse(document, True)
    return texts

def goal_state():
    """Return the incarnation, the container's id and the instance's id of the goal state of now."""
    _, body = exchange('goal state', WIRESERVER.rstrip('/') + '/machine?comp=goalstate', None, AGENT)
    try:
        texts = parse(body)
    except (ValueError, expat.ExpatError):
        raise Failed('goal state: not a goal state')
    incarnation, container, instance = [texts.get(path, '') for path in PATHS]
    for what, value, pattern in (('Incarnation', incarnation, '[0-9]+'), ('ContainerId', container, ID),
                                 ('InstanceId', instance, ID)):
        if not re.fullmatch(pattern, value):
            raise Failed('goal state: no ' + what)
    say('ContainerId: ' + container, 'InstanceId: ' + instance, 'Incarnation: ' + incarnation)
    return incarnation, container, instance

def health_report():
    """Report Ready for the goal state just read: the WireServer refuses an earlier incarnation."""
    report = ('<Health><GoalStateIncarnation>%s</GoalStateIncarnation><Container>'
              '<ContainerId>%s</ContainerId><RoleInstanceList><Role><InstanceId>%s</InstanceId>'
              '<Health><State>Ready</State></Health></Role></RoleInstanceList></Container></Health>') % goal_state()
    say('Sending the following data to Wireserver:', report)
    status, _ = exchange('health report', WIRESERVER.rstrip('/') + '/machine?comp=health', report.encode(),
                         {**AGENT, 'Content-Type': 'text/xml;charset=utf-8'})
    say('Response: %d' % status)

def ready():
    """The step. Raises Failed."""
    say('Retrieving goal state from the Wireserver')
    retry('ready', int(ATTEMPTS), health_report)

def metadata(leaf, api_version):
    """Ask IMDS for a leaf of compute; return its text, trimmed and not empty."""
    label = leaf.rpartition('/')[2]
    try:
        _, body = exchange(label, '%s/metadata/instance/compute/%s?api-version=%s&format=text' % (
            IMDS.rstrip('/'), leaf, api_version), None, {'Metadata': 'true'})
    except Failed as failure:
        failure.final = re.search(': HTTP (?!404|410|429|5..)', str(failure))
        raise
    value = trim(body.decode('latin-1'))
    if not value:
        raise Failed(label + ': no valid hostname')
    return value

def hostname():
    """The step. Raises Failed."""
    say('Retrieving hostname from IMDS')
    try:
        value = retry('hostname', 5, metadata, 'osProfile/computerName', '2021-02-01')
    except Failed:
        value = retry('hostname', int(ATTEMPTS), metadata, 'name', '2019-06-01')
    longest = 64 if '.' in value else 63  # Linux takes 64 in all, DNS 63 between two dots
    if not re.fullmatch('[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?', value) or '..' in value or len(value) > longest:
        raise Failed('no valid hostname')
    say('Hostname: ' + value)
    if not run('hostnamectl', 'set-hostname', value):
        set_hostname(value)

def set_hostname(name):
    """Without hostnamectl. Raises Failed."""
    os.umask(0o022)
    reason = 'cannot write /etc/hostname'
    try:
        with open('/etc/hostname.new', 'w') as file:
            file.write(name + '\n')
        os.replace('/etc/hostname.new', '/etc/hostname')
        reason = "cannot set the kernel's hostname"
        socket.sethostname(name)
    except OSError:
        run('rm', '-f', '/etc/hostname.new')
        raise Failed(reason)

def disable():
    """The step. Raises Failed."""
    if not (run('systemctl', 'disable', 'azure-provisioning.service') or run('rc-update', 'del', 'azure-provisioning')):
        raise Failed('neither systemctl nor rc-update disabled azure-provisioning')
    say('Disabled azure-provisioning.service')

def main(arguments):
    """Run the steps; return the exit status."""
    steps = {'ready': ready, 'hostname': hostname, 'disable': disable}
    for step in arguments:
        if step in ('-h', '--help', '--version'):
            say('azure-provisioning ' + VERSION if step == '--version' else __doc__)
            return 0
        if step not in steps:
            misused('unknown step or option: ' + step)
    check_url('AZURE_PROVISIONING_WIRESERVER', WIRESERVER)
    check_url('AZURE_PROVISIONING_IMDS', IMDS)
    check_number('AZURE_PROVISIONING_ATTEMPTS', ATTEMPTS, 1)
    check_number('AZURE_PROVISIONING_INTERVAL', INTERVAL, 0)
    check_number('AZURE_PROVISIONING_TIMEOUT', TIMEOUT, 1)
    for step in arguments or steps:
        try:
            steps[step]()
        except Failed as failure:
            complain('%s: %s' % (step, failure))
            return 1
    return 0

if __name__ == '__main__':
    os._exit(main(sys.argv[1:]))  # without another try to print what could not be printed
