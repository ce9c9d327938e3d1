# `make help` lists the targets. To install the program with other steps than the default ones:
#
#     make install IMPL=sh STEPS='user hostname ready disable'

# For install and uninstall. IMPL is py or sh. DESTDIR is the root file system of an image.
IMPL ?=
STEPS ?=
DESTDIR ?=
PREFIX ?= /usr/local
UNITDIR ?= /etc/systemd/system

# For the tests.
PARTS ?= main
SEED ?= 1
N ?= 400

# They are put between apostrophes below.
ifneq ($(findstring ',$(IMPL)$(STEPS)$(DESTDIR)$(PREFIX)$(UNITDIR)),)
$(error IMPL, STEPS, DESTDIR, PREFIX and UNITDIR may not contain an apostrophe)
endif

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: ## show a first boot with a fake server [IMPL=py|sh]
	@python3 tests/kit/demo.py $(if $(IMPL),'$(IMPL)')

test: ## run the tests that each commit must pass, in about 3 minutes
	@tests/test $(PARTS)

test-all: ## run all tests, as root, in an hour at most
	@tests/test main faults boot matrix

fault-test: ## disturb runs: power cuts, kills, copies at once, in 10 minutes
	@tests/test faults

boot-test: ## boot with systemd, OpenRC and real kernels, as root, in 20 minutes
	@tests/test boot

test-matrix: ## run the cases with other interpreters, programs and environments, in 10 minutes
	@tests/test matrix

conformance: ## run the cases with another program IMPL='./my-port --flag'
	@python3 tests/kit/run.py $(if $(IMPL),'$(IMPL)')

fuzz: ## compare both scripts with an XML library [SEED=1 N=400]
	@python3 tests/checks/fuzz.py $(SEED) $(N)

exhaustive: ## compare them on every sequence of tokens, in 10 minutes
	@python3 tests/checks/exhaustive.py

bench: ## measure what a run costs, in 5 minutes
	@python3 tests/bench/bench.py

bench-agents: ## measure boots beside cloud-init and waagent, as root, in an hour
	@python3 tests/bench/agents.py --page docs/performance.md --svg docs/agents.svg

dist: ## make an archive of the last commit, and its checksum
	@commit=$$(git rev-parse HEAD) && \
	version=$$(git show "$$commit:azure-provisioning.sh" | sed -n 's/^VERSION=//p') && \
	[ -n "$$version" ] && \
	name=azure-provisioning-$$version && \
	mkdir -p dist && \
	git -c tar.umask=0022 archive --format=tar --prefix="$$name/" "$$commit" >"dist/$$name.tar" && \
	gzip -9 -n -f "dist/$$name.tar" && \
	(cd dist && sha256sum "$$name.tar.gz" >SHA256SUMS) && \
	echo "dist/$$name.tar.gz and dist/SHA256SUMS, of commit $$commit"
	@[ -z "$$(git status --porcelain)" ] || \
	    echo 'make dist: warning: changes that are not committed are not in it' >&2

.PHONY: dist

# They install their tools first; a copy of the list says that it is done.
TOOLS = .venv/lint-tools.txt

lint: $(TOOLS) ## run the linters
	@python3 tests/checks/lint.py
	@python3 tests/checks/style.py azure-provisioning.py azure-provisioning.sh

format: $(TOOLS) ## apply the formatters
	@python3 tests/checks/lint.py format

$(TOOLS): tests/checks/lint-tools.txt
	python3 -m venv --clear .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --retries 1 -r $<
	cp $< $@

.PHONY: lint format

BINARY = $(PREFIX)/sbin/azure-provisioning
PROGRAM = $(DESTDIR)$(BINARY)
UNIT = $(DESTDIR)$(UNITDIR)/azure-provisioning.service
# systemd wants quotes around a path with a space.
COMMAND = $(if $(word 2,$(BINARY)),"$(BINARY)",$(BINARY))

# Each drop-in opens the sandbox for the step that it is named after.
DROP_INS = $(wildcard drop-ins/*.conf)
NEEDED_DROP_INS = $(filter $(STEPS:%=drop-ins/%.conf),$(DROP_INS))

# A step before ready must give up before Azure does. Otherwise Azure is never told NotReady.
LIMIT = Environment=AZURE_PROVISIONING_ATTEMPTS=450
IS_READY_FIRST = $(filter ready,$(firstword $(STEPS)))
IS_PUBLISH_EARLY = $(filter publish,$(firstword $(filter publish hostname,$(STEPS))))

NO_READY = STEPS has no ready: Azure is never told that the VM runs
OLD_NAME = STEPS has publish before hostname: it publishes the name of the image
NO_END = STEPS has neither disable nor remember: the steps run on each boot
warn = echo 'make install: warning: $(1)' >&2
fail = { echo "make install: $(1)" >&2; exit 2; }

install: check-install ## copy program and unit IMPL=py|sh [STEPS='…' DESTDIR=… PREFIX=… UNITDIR=…]
	install -d '$(DESTDIR)$(PREFIX)/sbin' '$(DESTDIR)$(UNITDIR)'
	install -m 755 azure-provisioning.$(IMPL) '$(PROGRAM)'
	$(remove-unit)
	sed 's|^ExecStart=.*|ExecStart=$(COMMAND)|' azure-provisioning.service >'$(UNIT)'
	chmod 644 '$(UNIT)'
ifneq ($(strip $(STEPS)),)
	install -d '$(UNIT).d'
	printf '%s\n' '[Service]' ExecStart= 'ExecStart=$(COMMAND) $(strip $(STEPS))' \
	    $(if $(IS_READY_FIRST),,$(LIMIT)) >'$(UNIT).d/steps.conf'
	chmod 644 '$(UNIT).d/steps.conf'
	$(if $(NEEDED_DROP_INS),install -m 644 $(NEEDED_DROP_INS) '$(UNIT).d/')
	@$(if $(filter ready,$(STEPS)),,$(call warn,$(NO_READY)))
	@$(if $(filter disable remember,$(STEPS)),,$(call warn,$(NO_END)))
	@$(if $(IS_PUBLISH_EARLY),$(call warn,$(OLD_NAME)))
endif
	@printf '%s\n' 'Next, as root:' \
	    '    systemctl$(if $(DESTDIR), --root='\''$(DESTDIR)'\'') enable azure-provisioning.service'

# What could stop an installation half way is checked before anything is written.
check-install:
	@case '$(IMPL)' in py | sh) ;; *) $(call fail,IMPL must be py or sh) ;; esac
	@set -f; \
	steps='$(STEPS)'; \
	for step in $$steps; do \
	    case $$step in -*) $(call fail,STEPS has an option: $$step) ;; esac; \
	    ./azure-provisioning.sh "$$step" --version >/dev/null 2>&1 || \
	        $(call fail,STEPS has an unknown step: $$step); \
	done
# Other characters have a meaning for systemd or sed.
	@for path in '$(PREFIX)/' '$(UNITDIR)/'; do \
	    case $$path in \
	    *[!A-Za-z0-9/._+\ -]*) $(call fail,no path for a unit: $$path) ;; \
	    /*) ;; \
	    *) $(call fail,$$path does not begin with /) ;; \
	    esac; \
	done
	@for folder in '$(DESTDIR)$(PREFIX)/sbin' '$(DESTDIR)$(UNITDIR)' '$(UNIT).d'; do \
	    until [ -e "$$folder" ] || [ -L "$$folder" ]; do folder=$$(dirname "$$folder"); done; \
	    { [ -d "$$folder" ] && [ -w "$$folder" ]; } || $(call fail,cannot write to $$folder); \
	done
	@for file in '$(PROGRAM)' '$(UNIT)'; do \
	    [ ! -d "$$file" ] || $(call fail,a folder is in the way: $$file); \
	done

uninstall: ## remove what install copied, with the same DESTDIR, PREFIX and UNITDIR
	rm -f '$(PROGRAM)'
	$(remove-unit)

# The unit and all drop-ins of this Makefile. The folder stays if somebody else has a drop-in there.
define remove-unit
rm -f '$(UNIT)' '$(UNIT).d/steps.conf' $(foreach name,$(notdir $(DROP_INS)),'$(UNIT).d/$(name)')
@rmdir '$(UNIT).d' 2>/dev/null || :
endef

.PHONY: help demo test test-all fault-test boot-test test-matrix conformance fuzz exhaustive bench bench-agents install check-install uninstall
