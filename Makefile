# make demo | test | boot-test | test-matrix | conformance IMPL='./my-port' | fuzz SEED=2 N=20000 | bench
#      install IMPL=py|sh | uninstall

PREFIX ?= /usr/local
UNITDIR ?= /etc/systemd/system
DESTDIR ?=
IMPL ?=
SEED ?= 1
N ?= 400
PARTS ?= main

PROGRAM = $(DESTDIR)$(PREFIX)/sbin/azure-provisioning
UNIT = $(DESTDIR)$(UNITDIR)/azure-provisioning.service

demo:
	@python3 tests/demo.py $(if $(IMPL),'$(IMPL)')

test:
	@tests/test $(PARTS)

boot-test:
	@tests/test boot

test-matrix:
	@tests/test matrix

conformance:
	@python3 tests/run.py $(if $(IMPL),'$(IMPL)')

fuzz:
	@python3 tests/fuzz.py $(SEED) $(N)

bench:
	@python3 tests/bench.py

install:
	@case '$(IMPL)' in py | sh) ;; *) echo 'make install needs IMPL=py or IMPL=sh' >&2; exit 2 ;; esac
	install -d '$(dir $(PROGRAM))' '$(dir $(UNIT))'
	install -m 755 azure-provisioning.$(IMPL) '$(PROGRAM)'
	sed 's|^ExecStart=/usr/local/|ExecStart=$(PREFIX)/|' azure-provisioning.service >'$(UNIT)'
	chmod 644 '$(UNIT)'

uninstall:
	rm -f '$(PROGRAM)' '$(UNIT)'

.PHONY: demo test boot-test test-matrix conformance fuzz bench install uninstall
