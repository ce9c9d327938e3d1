"""Watch the processes of boots: python3 tests/bench/watch.py; as root, in the first namespaces.

The kernel tells of each process that starts (process connector), and what each one has used when it
ends (taskstats). Prints an empty line when it watches; on SIGTERM it prints, as JSON, the processes
whose control group is that of a boot, /boot.NAME/..., and how many messages were lost.
"""

import json
import os
import re
import select
import signal
import socket
import struct

CONNECTOR, GENERIC = 11, 16  # netlink families
FORK, EXEC = 1, 2  # events of the connector
GET_FAMILY, FAMILY_ID, FAMILY_NAME = 3, 1, 2  # of generic netlink
LISTEN, CPUS = 1, 3  # of taskstats: a request, and its attribute
OF_PROCESS, STATS = 4, 3  # of taskstats: attributes of what it sends
ROOM = 32 << 20  # bytes of a socket's buffer
FORCE_ROOM = 33  # SO_RCVBUFFORCE


def netlink(family, groups=0):
    found = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, family)
    found.setsockopt(socket.SOL_SOCKET, FORCE_ROOM, ROOM)
    found.bind((0, groups))
    return found


def connector():
    """A socket that is told of forks and execs."""
    found = netlink(CONNECTOR, 1)
    listen = struct.pack('=IIIIHHI', 1, 1, 0, 0, 4, 0, 1)
    found.send(struct.pack('=IHHII', 16 + len(listen), 3, 0, 0, 0) + listen)
    return found


def taskstats():
    """A socket that is told what ended processes have used."""
    found = netlink(GENERIC)

    def request(family, command, kind, data):
        attribute = struct.pack('=HH', 4 + len(data), kind) + data + bytes(-len(data) % 4)
        body = struct.pack('=BBH', command, 1, 0) + attribute
        found.send(struct.pack('=IHHII', 16 + len(body), family, 1, 1, 0) + body)

    request(GENERIC, GET_FAMILY, FAMILY_NAME, b'TASKSTATS\0')
    known = dict(attributes(found.recv(65536)[20:]))
    (family,) = struct.unpack('=H', known[FAMILY_ID])
    request(family, LISTEN, CPUS, b'0-%d\0' % (os.cpu_count() - 1))
    return found


def attributes(data):
    while len(data) >= 4:
        length, kind = struct.unpack_from('=HH', data)
        if length < 4:
            return
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3 :]


class Watch:
    """The processes, by pid: those that have ended, too."""

    def __init__(self):
        self.processes = {}
        self.lost = 0

    def started(self, data):
        """A message of the connector: behind two heads the event, its time and what it is about."""
        event, nanoseconds = struct.unpack_from('=I4xQ', data, 36)
        if event == FORK:
            _, parent, thread, pid = struct.unpack_from('=IIII', data, 52)
            if thread == pid:
                known = self.processes.get(parent)
                place = known['place'] if known else place_of(pid)
                self.processes[pid] = {'place': place, 'began': nanoseconds / 1e9}
        elif event == EXEC:
            _, pid = struct.unpack_from('=II', data, 52)
            if pid in self.processes:  # systemd moves a process before it starts the program
                self.processes[pid]['place'] = place_of(pid) or self.processes[pid]['place']

    def ended(self, data):
        """Messages of taskstats; the offsets are those of the kernel's struct taskstats."""
        while len(data) >= 20:
            (length,) = struct.unpack_from('=I', data)
            for kind, value in attributes(data[20:length]):
                stats = dict(attributes(value)).get(STATS) if kind == OF_PROCESS else None
                if stats:
                    (nanoseconds,) = struct.unpack_from('=Q', stats, 72)
                    (pid,) = struct.unpack_from('=I', stats, 128)
                    (kib,) = struct.unpack_from('=Q', stats, 200)
                    if pid in self.processes:
                        self.processes[pid].update(
                            command=stats[80:112].partition(b'\0')[0].decode('latin-1'),
                            cpu=nanoseconds / 1e6,
                            memory=kib / 1024,
                        )
            data = data[(length + 3) & ~3 :]

    def receive(self, source, take):
        """Take all that a socket has."""
        while True:
            try:
                take(source.recv(65536, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return
            except OSError:  # the buffer was too small
                self.lost += 1


def place_of(pid):
    """The control group of a process of a boot, or ''."""
    try:
        with open('/proc/%d/cgroup' % pid) as file:
            found = re.search('(?m)^0::(/boot[.].*)$', file.read())
    except OSError:
        return ''
    return found.group(1) if found else ''


def main():
    os.setpriority(os.PRIO_PROCESS, 0, -20)  # to look at a process before it is gone
    watch, starts, ends = Watch(), connector(), taskstats()
    stop, stopped = os.pipe()
    os.set_blocking(stopped, False)
    signal.set_wakeup_fd(stopped)
    signal.signal(signal.SIGTERM, lambda *_: None)
    print(flush=True)
    ready = []
    while stop not in ready:
        ready, _, _ = select.select([starts, ends, stop], [], [])
        watch.receive(starts, watch.started)  # first, as only a process that is known can end
        watch.receive(ends, watch.ended)
    found = [process for process in watch.processes.values() if process['place']]
    print(json.dumps({'lost': watch.lost, 'processes': found}))


if __name__ == '__main__':
    main()
