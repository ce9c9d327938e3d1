# make demo | test | boot-test | test-matrix | conformance IMPL='./my-port' | fuzz SEED=2 N=20000 | bench
#      install IMPL=py|sh STEPS='user hostname ready' | uninstall

PREFIX ?= /usr/local
UNITDIR ?= /etc/systemd/system
DESTDIR ?=
IMPL ?=
SEED ?= 1
N ?= 400
PARTS ?= main
STEPS ?=

PROGRAM = $(DESTDIR)$(PREFIX)/sbin/azure-provisioning
UNIT = $(DESTDIR)$(UNITDIR)/azure-provisioning.service
DROP_IN = $(UNIT).d/steps.conf

demo:
	@python3 tests/kit/demo.py $(if $(IMPL),'$(IMPL)')

test:
	@tests/test $(PARTS)

boot-test:
	@tests/test boot

test-matrix:
	@tests/test matrix

conformance:
	@python3 tests/kit/run.py $(if $(IMPL),'$(IMPL)')

fuzz:
	@python3 tests/checks/fuzz.py $(SEED) $(N)

bench:
	@python3 tests/bench/bench.py

install:
	@case '$(IMPL)' in py | sh) ;; *) echo 'make install needs IMPL=py or IMPL=sh' >&2; exit 2 ;; esac
	@case ' $(STEPS)' in *' -'*) echo 'STEPS has an option' >&2; exit 2 ;; esac
	@./azure-provisioning.sh $(STEPS) --version >/dev/null # which refuses what is no step
	install -d '$(dir $(PROGRAM))' '$(dir $(UNIT))'
	install -m 755 azure-provisioning.$(IMPL) '$(PROGRAM)'
	sed 's|^ExecStart=/usr/local/|ExecStart=$(PREFIX)/|' azure-provisioning.service >'$(UNIT)'
	chmod 644 '$(UNIT)'
	rm -f '$(DROP_IN)'
# A step before ready may not try for so long that Azure gives up before it is told NotReady.
	@[ -z '$(STEPS)' ] || { echo "the steps: $(DROP_IN)"; install -d '$(dir $(DROP_IN))' && { \
	    printf '[Service]\nExecStart=\nExecStart=%s\n' '$(PREFIX)/sbin/azure-provisioning $(STEPS)'; \
	    case '$(STEPS)' in ready*) ;; *) echo Environment=AZURE_PROVISIONING_ATTEMPTS=900 ;; esac; \
	    sed -nE 's/^#(.* )?($(subst $() ,|,$(strip $(STEPS))))( .*)?: //p' azure-provisioning.service; \
	} >'$(DROP_IN)'; }

uninstall:
	rm -f '$(PROGRAM)' '$(UNIT)' '$(DROP_IN)'
	rmdir '$(dir $(DROP_IN))' 2>/dev/null || :

.PHONY: demo test boot-test test-matrix conformance fuzz bench install uninstall
