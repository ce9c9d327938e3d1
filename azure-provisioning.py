#!/usr/bin/python3 -IS
# The provisioning agent in one file; azure-provisioning.sh is the same program in shell, function by function.
# Needs Python 3.6, its standard library. Sources: https://learn.microsoft.com/azure/virtual-machines/, the pages
# linux/no-agent and linux/provisioning for the protocol, instance-metadata-service for IMDS.
"""usage: azure-provisioning [-h | --help | --version | -n | --dry-run] [STEP]...
  ready      tell Azure that this Linux VM is Ready: a health report to the WireServer, for the goal state it gives
  hostname   set the hostname the user asked for, from IMDS, the Instance Metadata Service
  disable    disable azure-provisioning.service, so that it runs on the first boot only
  user       create the admin user that IMDS names, with its SSH keys, and with sudo or doas without a password
  password   set the password of that user, from the DVD, and whether sshd takes passwords
  data       write userData, from IMDS, and customData, from the DVD, to /var/lib/azure-provisioning, for root alone
  publish    renew the DHCP lease, so that the DNS of Azure learns the hostname
  remember   record the id of this VM, on which a run that names this step does nothing from then on
Without STEP: ready hostname disable. Steps run in the order given; the first that fails ends the run, and Azure is told
NotReady if ready was still to come. With -n or --dry-run, what would be done is said and not done. Progress goes to
stdout, trouble to stderr. Exit status: 0 every step done, 1 a step failed, 2 usage.
Settings, from the environment, and their defaults:
  AZURE_PROVISIONING_WIRESERVER  base URL of the WireServer (http://168.63.129.16)
  AZURE_PROVISIONING_IMDS        base URL of IMDS (http://169.254.169.254)
  AZURE_PROVISIONING_ATTEMPTS    attempts a step makes before it gives up, from 1 (240)
  AZURE_PROVISIONING_INTERVAL    longest wait between two attempts, in seconds, from 0 (5)
  AZURE_PROVISIONING_TIMEOUT     time for one exchange, in seconds, from 1 (30)"""
import os, signal, sys
os.umask(0o077)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
if __name__ == '__main__' and not sys.flags.isolated:  # import nothing from this folder or PYTHONPATH
    os.execv(sys.executable, [sys.executable, '-IS', *sys.argv])
sys.modules['ssl'] = None  # http.client imports it if it can: a quarter of the memory, for nothing
import binascii, collections, contextlib, http.client, re, socket, time
from xml.parsers import expat

VERSION = '1.0.0'
WIRESERVER = os.environ.get('AZURE_PROVISIONING_WIRESERVER', 'http://168.63.129.16')
IMDS = os.environ.get('AZURE_PROVISIONING_IMDS', 'http://169.254.169.254')
ATTEMPTS = os.environ.get('AZURE_PROVISIONING_ATTEMPTS', '240')
INTERVAL = os.environ.get('AZURE_PROVISIONING_INTERVAL', '5')
TIMEOUT = os.environ.get('AZURE_PROVISIONING_TIMEOUT', '30')
DRY_RUN = {'-n', '--dry-run'} & set(sys.argv)
BODY_LIMIT = 65536  # bytes
DATA_LIMIT = 122880  # bytes, of what has 64 KiB in base64 in it
STATE = '/var/lib/azure-provisioning'
OVF = '/Environment/ProvisioningSection/LinuxProvisioningConfigurationSet'
AGENT = {'x-ms-version': '2012-11-30', 'x-ms-agent-name': 'custom-provisioning'}
SPACE = ' \t\n\r'  # XML's white space
CONTROL = '\0-\37\177'
PATHS = ('/GoalState/Incarnation', '/GoalState/Container/ContainerId',
         '/GoalState/Container/RoleInstanceList/RoleInstance/InstanceId', OVF + '/UserName', OVF + '/UserPassword',
         OVF + '/DisableSshPasswordAuthentication', OVF + '/CustomData')
ID = '[!#-%(-;=?-~]+'  # what an id is made of: visible ASCII, but for < > & " and '
KEY = ('(ssh-rsa AAAAB3Nz|ssh-ed25519 AAAAC3Nz|ecdsa-sha2-nistp(256|384|521) AAAAE2Vj|sk-ssh-ed25519@openssh.com '
       'AAAAGnNr|sk-ecdsa-sha2-nistp256@openssh.com AAAAInNr)[A-Za-z0-9+/=]*( [^%s]*)?') % CONTROL
BASE64 = '([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{4}|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=|[A-Za-z0-9+/][AQgw]==)'

class Failed(Exception):
    """A step, or an attempt at it, came to nothing; says why."""
    final = False  # True: another attempt would fail too

def need(done, reason):
    if not done:
        raise Failed(reason)

def say(*lines, file=None):
    try:
        print(*lines, sep='\n', file=file, flush=True)
    except (OSError, UnicodeError):
        pass  # the VM is Ready whether or not somebody listens
    return True

def did(line):
    return DRY_RUN or say(line)

def complain(*lines):
    say(*lines, file=sys.stderr or open(os.devnull, 'w'))  # None: closed

def misused(message):
    complain('azure-provisioning: ' + message, __doc__)
    os._exit(2)

def call(*command, line=None):
    """Whether there is such a command and it succeeds. The line is for its stdin, where nobody sees it."""
    if line is None:
        return os.spawnvp(os.P_WAIT, command[0], command) == 0
    import subprocess  # not for the three default steps: it is slow to load
    try:
        return subprocess.run(command, input=line.encode('latin-1') + b'\n').returncode == 0
    except OSError:
        return False

def run(*command, line=None):
    if not DRY_RUN:
        return call(*command, line=line)
    return call('sh', '-c', 'command -v "$0" >/dev/null', command[0]) and say('Would run: ' + ' '.join(command))

def contents(path, limit=-1):
    """The bytes of a file, as text; none where there is none, or it may not be read."""
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):
        return ''
    with open(path, encoding='latin-1', newline='') as file:
        return file.read(limit)

def put(path, mode, owner, text):
    """Replace the file atomically. Raises Failed."""
    if DRY_RUN:
        return say('Would write ' + path)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        call('rm', '-f', path + '.new')
        with open(path + '.new', 'xb') as file:
            file.write(text.encode('latin-1'))
        if owner:
            os.chown(path + '.new', *map(int, owner.split(':')), follow_symlinks=False)
        os.chmod(path + '.new', mode)
        os.replace(path + '.new', path)
    except OSError:
        os.path.lexists(path + '.new') and call('rm', '-f', path + '.new')
        raise Failed('cannot write ' + path)

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
        return transfer(url, data, DATA_LIMIT if label == 'userData' else BODY_LIMIT, {
            **headers, 'User-Agent': 'azure-provisioning/' + VERSION, 'Accept': '*/*',
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

def transfer(url, data, limit, headers):
    """Have http.client do it, which follows no redirect and obeys no proxy."""
    host, path = re.fullmatch('http://([^/]*)(.*)', url).groups()
    with contextlib.closing(http.client.HTTPConnection(host, timeout=int(TIMEOUT))) as connection:
        connection.request('POST' if data else 'GET', path, data or None, headers)
        response = connection.getresponse()
        need(response.status == 200 or data and 200 <= response.status < 300, 'HTTP %d' % response.status)
        need(int(response.getheader('Content-Length', 0)) <= limit, 'reply too large')
        try:
            body = response.read(limit + 1)
        except OSError:
            raise Failed('broken reply')
        need(not response.length, 'broken reply')  # something is still to come
        need(len(body) <= limit, 'reply too large')
        return response.status, b'\\0' if b'\0' in body else body  # no shell holds a NUL

def retry(step, attempts, command, *arguments):
    """Call the command until it does not raise Failed; return what it returns."""
    for attempt in range(1, attempts + 1):
        try:
            return command(*arguments)
        except Failed as failure:
            complain('%s: attempt %d of %d: %s' % (step, attempt, attempts, failure))
            if failure.final or attempt == attempts:
                raise Failed('gave up after %d attempts' % attempt) from failure
        time.sleep(min(attempt, int(INTERVAL)))

def trim(text):
    return ' '.join(re.findall('[^%s]+' % SPACE, text))

def parse(root, document, reason):
    """Return the texts at PATHS, each of the first element there, as written. Raises Failed, for the reason."""
    path, pieces, texts = '', [], collections.defaultdict(str)
    def tag(name, attributes=None):
        nonlocal path
        local = name.rpartition(':')[2]  # without a prefix
        if attributes is not None:  # a start tag goes down into its element, an end tag takes the text and goes up
            need(path or local == root, reason)
            path, pieces[:] = path + '/' + local, []
        else:
            path in PATHS and texts.setdefault(path, ''.join(pieces))
            path, pieces[:] = path.rpartition('/')[0], '<'  # '<' spoils a value with an element inside
    parser = expat.ParserCreate('utf-8')
    parser.StartElementHandler = parser.EndElementHandler = tag
    parser.DefaultHandler = pieces.append  # text, with its entities
    parser.CommentHandler = parser.ProcessingInstructionHandler = lambda *_: pieces.append('<')  # or a comment
    parser.StartDoctypeDeclHandler = parser.StartCdataSectionHandler = lambda *_: need(False, reason)
    try:
        parser.Parse(document, True)
    except (ValueError, expat.ExpatError):
        raise Failed(reason)
    return texts

def goal_state():
    """Return the incarnation, the container's id and the instance's id of the goal state of now."""
    _, body = exchange('goal state', WIRESERVER.rstrip('/') + '/machine?comp=goalstate', None, AGENT)
    texts = parse('GoalState', body, 'goal state: not a goal state')
    values = [trim(texts[path]) for path in PATHS[:3]]
    for what, value, pattern in zip(('Incarnation', 'ContainerId', 'InstanceId'), values, ('[0-9]+', ID, ID)):
        need(re.fullmatch(pattern, value), 'goal state: no ' + what)
    say('ContainerId: ' + values[1], 'InstanceId: ' + values[2], 'Incarnation: ' + values[0])
    return values

def health_report(state, details):
    """Report the state for the goal state just read: the WireServer refuses an earlier incarnation."""
    report = ('<Health><GoalStateIncarnation>%s</GoalStateIncarnation><Container><ContainerId>%s</ContainerId>'
              '<RoleInstanceList><Role><InstanceId>%s</InstanceId><Health><State>%s</State>%s</Health></Role>'
              '</RoleInstanceList></Container></Health>') % (*goal_state(), state, details)
    if DRY_RUN:
        return say('Would send the following data to Wireserver:', report)
    say('Sending the following data to Wireserver:', report)
    status, _ = exchange('health report', WIRESERVER.rstrip('/') + '/machine?comp=health', report.encode(),
                         {**AGENT, 'Content-Type': 'text/xml;charset=utf-8'})
    say('Response: %d' % status)

def ready():
    say('Retrieving goal state from the Wireserver')
    retry('ready', int(ATTEMPTS), health_report, 'Ready', '')

def not_ready(reason):
    """Tell Azure that this VM will not be Ready, so that nobody waits for it."""
    description = 'result=error|reason=%s|agent=azure-provisioning/%s|vm_id=%s|timestamp=%s' % (
        reason, VERSION, vm_id(), time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()))
    say('Retrieving goal state from the Wireserver')
    try:
        retry('NotReady', int(ATTEMPTS), health_report, 'NotReady', '<Details><SubStatus>ProvisioningFailed</SubStatus>'
              '<Description>%s</Description></Details>' % re.sub("[^ -%'-;=?-~]", ' ', description[:512]))
    except Failed as failure:
        complain('NotReady: %s' % failure)

def metadata(leaf, api_version, empty=''):
    """Ask IMDS for a leaf of compute; return its text, trimmed. Raises Failed, with empty where that is no good."""
    label = leaf.rpartition('/')[2]
    try:
        _, body = exchange(label, '%s/metadata/instance/compute/%s?api-version=%s&format=text' % (
            IMDS.rstrip('/'), leaf, api_version), None, {'Metadata': 'true'})
    except Failed as failure:
        failure.final = re.search(': HTTP (?!404|410|429|5..)', str(failure))
        raise
    value = body.decode('latin-1').strip(SPACE)
    need(value or not empty, label + ': ' + empty)
    return value

def optional(step, leaf):
    """Ask IMDS for what may not be there; return an empty text then. Raises Failed."""
    try:
        return retry(step, 5, metadata, leaf, '2021-02-01')
    except Failed as failure:
        if str(failure.__cause__).endswith(('HTTP 400', 'HTTP 404')):  # 400: an IMDS that does not know it
            return ''
    return retry(step, int(ATTEMPTS), metadata, leaf, '2021-02-01')

def hostname():
    say('Retrieving hostname from IMDS')
    try:
        value = retry('hostname', 5, metadata, 'osProfile/computerName', '2021-02-01', 'no valid hostname')
    except Failed:
        value = retry('hostname', int(ATTEMPTS), metadata, 'name', '2019-06-01', 'no valid hostname')
    longest = 64 if '.' in value else 63  # Linux takes 64 in all, DNS 63 between two dots
    need(re.fullmatch('[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?', value) and '..' not in value and
         len(value) <= longest, 'no valid hostname')
    say('Hostname: ' + value)
    if not run('hostnamectl', 'set-hostname', value):
        put('/etc/hostname', 0o644, '', value + '\n')
        try:
            DRY_RUN or socket.sethostname(value)
        except OSError:
            raise Failed("cannot set the kernel's hostname")

def disable():
    need(run('systemctl', 'disable', 'azure-provisioning.service') or run('rc-update', 'del', 'azure-provisioning'),
         'neither systemctl nor rc-update disabled azure-provisioning')
    did('Disabled azure-provisioning.service')

def user():
    say('Retrieving user from IMDS')
    name = retry('user', int(ATTEMPTS), metadata, 'osProfile/adminUsername', '2021-02-01', 'no valid user name')
    need(valid_user(name), 'no valid user name')
    say('User: ' + name)
    keys = ssh_keys()
    shell = '/bin/bash' if os.access('/bin/bash', os.X_OK) else '/bin/sh'
    account(name, '/etc/passwd') or run('useradd', '-m', '-s', shell, name) or run('adduser', '-D', '-s', shell, name)
    if DRY_RUN and not account(name, '/etc/passwd'):
        return
    fields = account(name, '/etc/shadow') or account(name, '/etc/passwd')
    need(fields, 'neither useradd nor adduser made the user')
    # with '!', sshd without PAM takes no key, either; '*' is just no password
    need(fields[1][:1] != '!' or run('chpasswd', '-e', line=name + ':*') or run('usermod', '-p', '*', name),
         'chpasswd failed')
    authorize(account(name, '/etc/passwd'), keys)
    grant(name)

def valid_user(name):
    return name != 'root' and re.fullmatch('[A-Za-z_][A-Za-z0-9._-]{0,31}', name) and re.search('[a-z]', name)

def account(name, path):  # the fields of one in /etc/passwd or /etc/shadow, or None
    lines = contents(path).split('\n')
    return next(((line + '::::').split(':') for line in lines if line.startswith(name + ':')), None)

def ssh_keys():
    """Return the user's keys. Raises Failed."""
    keys = []
    for number, entry in enumerate(filter(None, trim(optional('user', 'publicKeys')).split(' '))):
        need(entry in (str(number), '%d/' % number) and number < 100, 'publicKeys: no valid list')  # 0/ 1/ and so on
        key = trim(re.sub('[\r\n]', '', optional('user', 'publicKeys/%d/keyData' % number)))  # may be broken into lines
        if re.fullmatch(KEY, key):
            say('SSH key: ' + key.split()[0])
            keys.append(key)
        else:
            complain('user: publicKeys/%d: no OpenSSH public key' % number)
    need(keys or optional('user', 'osProfile/disablePasswordAuthentication') == 'false',
         'no valid SSH key, and no password')
    return keys

def authorize(fields, keys):
    """Let the user of an account in with the keys. Raises Failed."""
    home, owner = os.fsdecode(fields[5].encode('latin-1')), ':'.join(fields[2:4])
    if not keys:
        return
    folder, path = home + '/.ssh', home + '/.ssh/authorized_keys'
    need(not os.path.islink(folder) and not os.path.islink(path), folder + ': a symlink is in the way')
    need(os.path.isdir(home) or run('mkdir', '-p', home) and run('chown', owner, home), 'cannot make ' + folder)
    need(run('mkdir', '-p', folder) and run('chown', '-h', owner, folder) and run('chmod', '700', folder) and
         run('chmod', 'go-w', home), 'cannot make ' + folder)
    known = contents(path).rstrip('\n')
    known += known and '\n'
    for key in keys:
        if not re.search('(?m)^%s( |$)' % re.escape(' '.join(key.split(' ')[:2])), known):
            known += key + '\n'
    put(path, 0o600, owner, known)

def grant(name):
    """Give the user sudo or doas, without a password. Raises Failed."""
    doas = '/etc/doas.d/azure-provisioning.conf' if os.path.isdir('/etc/doas.d') else '/etc/doas.conf'
    rule, permit = name + ' ALL=(ALL:ALL) NOPASSWD:ALL', 'permit nopass ' + name
    others = '\n'.join(line for line in contents(doas).split('\n') if line != permit).rstrip('\n')
    rules = others + '\n' + permit if others else permit
    if run('visudo', '-q', '-c', '-f', '-', line=rule):
        put('/etc/sudoers.d/azure-provisioning', 0o440, '', rule + '\n')
    elif run('doas', '-C', '/dev/stdin', line=rules):
        put(doas, 0o440, '', rules + '\n')
    else:
        complain('user: neither sudo nor doas takes a rule for ' + name)

def dvd():
    """Return the texts on the DVD that is in the drive on the first boot. Raises Failed."""
    folder = '/run/azure-provisioning/dvd'
    need(call('mkdir', '-p', folder) and (os.path.isfile(folder + '/ovf-env.xml') or  # a run was cut off
         os.path.exists('/dev/sr0') and call('mount', '-t', 'udf,iso9660', '-o', 'ro,nosuid,nodev,noexec', '/dev/sr0',
                                             folder)), 'ovf-env.xml: no DVD')
    body = contents(folder + '/ovf-env.xml', DATA_LIMIT)
    call('umount', folder)
    return parse('Environment', body.encode('latin-1'), 'ovf-env.xml: not an OVF environment')

def password():
    say('Retrieving password from the DVD')
    texts = retry('password', 5, dvd)
    name, secret = trim(texts[OVF + '/UserName']), texts[OVF + '/UserPassword'].encode().decode('latin-1')
    need(valid_user(name), 'no valid user name')
    need(not re.search('[<%s]|&(?!(lt|gt|quot|apos|amp);)' % CONTROL, secret), 'no valid password')
    for entity, character in ('lt', '<'), ('gt', '>'), ('quot', '"'), ('apos', "'"), ('amp', '&'):
        secret = secret.replace('&%s;' % entity, character)
    need(len(secret) <= 72, 'no valid password')
    need(not secret or run('chpasswd', line=name + ':' + secret) and did('Password set'), 'chpasswd failed')
    answer = {'true': 'no', 'false': 'yes'}.get(trim(texts[OVF + '/DisableSshPasswordAuthentication']).lower())
    answer and os.path.isfile('/etc/ssh/sshd_config') and sshd(answer)

def sshd(answer):
    """Let sshd take passwords or not, at both of its prompts; of each, the first line counts. Raises Failed."""
    lines = contents('/etc/ssh/sshd_config').rstrip('\n').split('\n')
    settings = ['PasswordAuthentication ' + answer, 'KbdInteractiveAuthentication ' + answer]
    others = [line for line in lines[:2] if not re.match('(Password|KbdInteractive)Authentication ', line)] + lines[2:]
    put('/etc/ssh/sshd_config', 0o644, '', '\n'.join(settings + others).rstrip('\n') + '\n')
    did('PasswordAuthentication: ' + answer)
    (run('systemctl', 'try-reload-or-restart', 'sshd.service') or
     run('systemctl', 'try-reload-or-restart', 'ssh.service') or run('rc-service', '--ifstarted', 'sshd', 'reload'))

def data():
    say('Retrieving user data from IMDS')
    save('userData', 'user-data', optional('data', 'userData'))
    say('Retrieving custom data from the DVD')
    try:
        texts = retry('data', 5, dvd)
    except Failed:
        return
    save('customData', 'custom-data', texts[OVF + '/CustomData'])

def save(label, name, value):
    """Write what is base64 to a file of STATE; without a value, remove that of another VM. Raises Failed."""
    path, value = STATE + '/' + name, re.sub('[%s]' % SPACE, '', value)
    if not value:
        need(run('rm', '-f', path), 'cannot remove ' + path)
        return did(label + ': none')
    need(re.fullmatch(BASE64, value), label + ': no base64')
    put(path, 0o600, '', binascii.a2b_base64(value).decode('latin-1'))
    did(label + ': ' + path)

def publish():
    route = re.search('(?m)^([!-)+-~][!-~]*)\t00000000\t(?:\\S+\t){5}00000000\t', contents('/proc/self/net/route'))
    need(route, 'no default route')
    name = route.group(1)
    need(run('networkctl', 'reconfigure', name) or run('nmcli', 'device', 'reapply', name) or
         run('dhcpcd', '-n', name) or run('dhclient', '-1', '-q', '-sf', '/bin/true', name) and  # a second, for once
         run('dhclient', '-x', '-q', name) or run('killall', '-USR1', 'udhcpc'),
         'no DHCP client renewed the lease of ' + name)
    did('Renewed the DHCP lease of ' + name)

def vm_id():
    return ''.join(re.findall('(?m)^[0-9a-f-]{36}$', contents('/sys/class/dmi/id/product_uuid').lower()))

def remember():
    need(vm_id(), 'cannot read /sys/class/dmi/id/product_uuid')
    put(STATE + '/vm-id', 0o600, '', vm_id() + '\n')
    did('Remembered: ' + vm_id())

def main(arguments):
    """Run the steps; return the exit status."""
    steps = {step.__name__: step for step in (ready, hostname, disable, user, password, data, publish, remember)}
    for step in arguments:
        if step in ('-h', '--help', '--version'):
            say('azure-provisioning ' + VERSION if step == '--version' else __doc__)
            return 0
        if step not in steps and step not in ('-n', '--dry-run'):
            misused('unknown step or option: ' + step)
    check_url('AZURE_PROVISIONING_WIRESERVER', WIRESERVER)
    check_url('AZURE_PROVISIONING_IMDS', IMDS)
    check_number('AZURE_PROVISIONING_ATTEMPTS', ATTEMPTS, 1)
    check_number('AZURE_PROVISIONING_INTERVAL', INTERVAL, 0)
    check_number('AZURE_PROVISIONING_TIMEOUT', TIMEOUT, 1)
    to_come = [step for step in arguments if step in steps] or ['ready', 'hostname', 'disable']
    if 'remember' in to_come and vm_id() and contents(STATE + '/vm-id').rstrip('\n') == vm_id():
        say('Already provisioned: ' + vm_id())
        return 0
    for number, step in enumerate(to_come):
        try:
            steps[step]()
        except (Failed, OSError) as failure:
            complain('%s: %s' % (step, failure))
            if 'ready' in to_come[number:] and 'ready' not in to_come[:number + 1]:
                not_ready('%s: %s' % (step, failure) + (failure.__cause__ and ': %s' % failure.__cause__ or ''))
            return 1
    return 0

if __name__ == '__main__':
    os._exit(main(sys.argv[1:]))  # without another try to print what could not be printed
