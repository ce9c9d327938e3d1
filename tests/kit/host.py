"""A fake Azure host on loopback: a WireServer and an IMDS whose answers are data.

    with Host({'goalstate': [Answer('body', b'<GoalState>...')]}) as host:
        run_a_program(host.wireserver, host.imds)
    for request in host.requests: ...

Everything is bound to 127.0.0.1 on ports that the kernel picks, and serves until the block ends.
"""

import collections
import contextlib
import pathlib
import re
import socket
import struct
import subprocess
import threading
import time

GOAL_STATE = pathlib.Path(__file__).resolve().parent / 'cases/goal-states/must-platform.xml'
LEAF = 'GET /metadata/instance/compute/%s?api-version=%s&format=text'
ENDPOINTS = {  # what is asked for -> the request line, but for the path of a base URL
    'goalstate': 'GET /machine?comp=goalstate',
    'health': 'POST /machine?comp=health',
    'computerName': LEAF % ('osProfile/computerName', '2020-07-15'),
    'name': LEAF % ('name', '2017-04-02'),
    'vmId': LEAF % ('vmId', '2017-04-02'),
    'adminUsername': LEAF % ('osProfile/adminUsername', '2020-07-15'),
    'publicKeys': LEAF % ('publicKeys', '2018-04-02'),
    'keyData': LEAF % ('publicKeys/N/keyData', '2018-04-02'),  # any N
    'disablePasswordAuthentication': LEAF
    % ('osProfile/disablePasswordAuthentication', '2020-10-01'),
    'userData': LEAF % ('userData', '2021-01-01'),
}
HEAD = b'HTTP/1.1 200 OK\r\nContent-Type: text/xml; charset=utf-8\r\nContent-Length: %d\r\n\r\n'
BLOCK = b'x' * 65536
ENDLESS = {  # a head, and what follows again and again
    'endless': (b'', BLOCK),
    'endless-lines': (b'', b'<a>x</a>\n' * 7000),
    'endless-chunks': (b'Transfer-Encoding: chunked\r\n', b'10000\r\n' + BLOCK + b'\r\n'),
    'gigabyte': (b'Content-Length: 1073741824\r\n', BLOCK),
}
FAULTS = ('silent', 'close', 'reset', 'drip', 'drip-head', *ENDLESS)
LONGEST = 60  # seconds that a fault goes on, should nobody hang up
PAUSE = 0.2  # seconds from one byte to the next of what comes slowly
MOST = 64 << 20  # bytes that an endless reply sends, should nobody hang up

# kind: 'http', all the bytes of a reply; 'body', the body of a good one; 'reset', bytes and then a
# reset; 'slow', the seconds that a reply takes, and its bytes; 'fault', a word of FAULTS
Answer = collections.namedtuple('Answer', 'kind data')
Request = collections.namedtuple('Request', 'line headers body time server')

ADDRESSES = {'wireserver': '168.63.129.16', 'imds': '169.254.169.254', 'elsewhere': '192.0.2.1'}


def good(**others):
    """What Azure answers on a good day, but for the others."""
    answers = {
        'goalstate': [Answer('body', GOAL_STATE.read_bytes())],
        'health': [Answer('http', b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n')],
        'computerName': [Answer('body', b'web-1')],
        'name': [Answer('body', b'vm_0')],
    }
    return dict(answers, **others)


def is_loopback(url):
    """Whether a base URL is one that tests may talk to."""
    return (
        re.match(r'\w+://([^/@]*@)?(127\.\d+\.\d+\.\d+|localhost|\[::1\])(?![\w.-])', url)
        is not None
    )


def leads_out(url):
    """Whether a text looks like a base URL, and is not on loopback."""
    looks = re.match('[a-z]+://[^/:]*[0-9a-z]', url.lower())
    return looks is not None and not is_loopback(url.lower())


def children(pid):
    """The processes below a process; none if it has just ended."""
    try:
        with open('/proc/%d/task/%d/children' % (pid, pid)) as found:
            pids = [int(each) for each in found.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return pids + [each for child in pids for each in children(child)]


def endpoint_of(line):
    """What a request line asks for, or None."""
    method, _, target = re.sub('/publicKeys/[0-9]+/', '/publicKeys/N/', line).partition(' ')
    for endpoint, asked in ENDPOINTS.items():
        if method == asked.partition(' ')[0] and target.endswith(asked.partition(' ')[2]):
            return endpoint
    return None


class Host:
    """The servers; each answer of an endpoint is given once, and the last one from then on."""

    def __init__(self, answers):
        self.answers = answers
        self.requests = []
        self.asked = collections.Counter()
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.requested = threading.Event()
        self.sockets = []
        self.elsewhere = ''

    def __enter__(self):
        self.wireserver = self.listen('wireserver')
        self.imds = self.listen('imds')
        self.elsewhere = self.listen(
            'elsewhere'
        )  # where redirects and proxies point: nobody is to come here
        self.refused = self.listen(None)
        self.unanswered = self.listen_without_room()
        return self

    def __exit__(self, *_):
        self.ended.set()
        with self.lock:
            sockets, self.sockets = self.sockets, None
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def listen(self, server, address=('127.0.0.1', 0)):
        """Open a server, on a port of its own; without a name, one that refuses all connections."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND: the address may come later
        listener.bind(address)
        self.sockets.append(listener)
        if server:
            listener.listen(1024)  # a fleet may knock at once
            threading.Thread(target=self.accept, args=(listener, server), daemon=True).start()
        return 'http://127.0.0.1:%d' % listener.getsockname()[1]

    def listen_without_room(self):
        """Open a server with whom connecting takes for ever: its queue is full."""
        listener = socket.socket()
        listener.bind(('127.0.0.1', 0))
        listener.listen(0)
        self.sockets.append(listener)
        for _ in range(2):
            waiting = socket.socket()
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
            self.sockets.append(waiting)
        return 'http://127.0.0.1:%d' % listener.getsockname()[1]

    def accept(self, listener, server):
        while not self.ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self.lock:
                if self.sockets is None:
                    connection.close()
                    return
                self.sockets.append(connection)
            threading.Thread(target=self.serve, args=(connection, server), daemon=True).start()

    def serve(self, connection, server):
        try:
            request = self.receive(connection, server)
            if request:
                self.reply(connection, self.answer(request))
        except OSError:
            pass  # the program hung up
        connection.close()

    def receive(self, connection, server):
        connection.settimeout(LONGEST)
        received = b''
        while b'\r\n\r\n' not in received:
            more = connection.recv(65536)
            if not more:
                return None
            received += more
        head, _, body = received.partition(b'\r\n\r\n')
        line, *headers = head.decode('latin-1').split('\r\n')
        headers = dict(header.split(': ', 1) for header in headers if ': ' in header)
        length = int(
            next((value for name, value in headers.items() if name.lower() == 'content-length'), 0)
        )
        while len(body) < length:
            body += connection.recv(65536) or b'\0' * length
        request = Request(re.sub(r' HTTP/1\.1$', '', line), headers, body, time.monotonic(), server)
        with self.lock:
            self.requests.append(request)
        self.requested.set()
        return request

    def answer(self, request):
        """The next answer of the endpoint that is asked for."""
        endpoint = endpoint_of(request.line)
        if self.answers.get(endpoint):
            with self.lock:
                turn = self.asked[endpoint]
                self.asked[endpoint] += 1
            answers = self.answers[endpoint]
            return answers[min(turn, len(answers) - 1)]
        return Answer('http', b'HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n')

    def message(self, answer):
        """All the bytes of a reply."""
        data = answer.data
        if answer.kind == 'body':
            data = HEAD % len(data) + data
        return data.replace(b'{elsewhere}', self.elsewhere.encode())

    def reply(self, connection, answer):
        if answer.kind == 'fault':
            self.fault(connection, answer.data)
            return
        if answer.kind == 'slow':
            self.slowly(connection, *answer.data)
            return
        connection.sendall(self.message(answer))
        if answer.kind == 'reset':
            self.reset(connection)
        else:
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # until the program has read all of it

    @staticmethod
    def reset(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))

    def fault(self, connection, word):
        """What goes wrong below HTTP, or without end."""
        if word == 'silent':
            connection.recv(1)
        elif word == 'reset':
            self.reset(connection)
        elif word == 'drip':
            self.drip(connection, b'Content-Length: 1000\r\n\r\n')
        elif word == 'drip-head':
            self.drip(connection, b'Date: ')
        elif word in ENDLESS:
            head, block = ENDLESS[word]
            connection.sendall(b'HTTP/1.1 200 OK\r\n' + head + b'\r\n')
            for _ in range(MOST // len(block)):
                connection.sendall(block)

    def drip(self, connection, head):
        """A byte now and then behind a head, or behind a part of one."""
        connection.sendall(b'HTTP/1.1 200 OK\r\n' + head)
        for _ in range(int(LONGEST / PAUSE)):
            connection.sendall(b'<')
            if self.ended.wait(PAUSE):
                return

    def slowly(self, connection, seconds, data):
        """All bytes of a reply, evenly over some seconds."""
        length = -(-len(data) // int(seconds / PAUSE))  # of a piece, rounded up
        for start in range(0, len(data), length):
            if self.ended.wait(PAUSE):
                return
            connection.sendall(data[start : start + length])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # until the program has read all of it


class Azure(Host):
    """The host, at the addresses that it has in Azure, as far as they are on this machine's lo."""

    def __init__(self, answers=None, away=()):
        super().__init__(answers or good())
        self.away = away

    def __enter__(self):
        for server in ADDRESSES:
            if server not in self.away:
                self.listen(server, (ADDRESSES[server], 80))
        return self

    def posts(self):
        return [request for request in self.requests if request.body]


def network(change):
    """Put Azure's addresses on lo, or take them away: 'add', 'del'."""
    subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)
    for address in ADDRESSES.values():
        subprocess.run(
            ['ip', 'address', change, address + '/32', 'dev', 'lo'],
            check=change == 'add',
            stderr=subprocess.DEVNULL,
        )
