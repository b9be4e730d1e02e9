# SPDX-License-Identifier: Apache-2.0
#
# make install [DESTDIR=/path]      everything an administrator installs
# make install-files [DESTDIR=...]  the same without the programs (units, bus and polkit policy, man pages, ...)
# make uninstall [DESTDIR=...]      takes both away again; keeps /etc/vmbus and /var/lib/vmbus
#
# The programs live in an environment of their own, /usr/lib/vmbus/env, made from /usr/bin/python3: the broker gives it,
# read-only, to workers whose users may read nothing under anybody's home. The unit files name that place, so it is fixed.
# Nothing is started and no user is made: systemd's sysusers, tmpfiles and daemon-reload do that on the target
# (see docs/admin-guide.md).

DESTDIR ?=
INSTALL ?= install
INSTALL_PYTHON ?= /usr/bin/python3
INSTALL_LIB = $(DESTDIR)/usr/lib/vmbus
INSTALL_ENV = $(INSTALL_LIB)/env
INSTALL_UNITS = vmbus-broker.service vmbusd.service vmbus-machines.service vmbus-shutdown.service
INSTALL_PROGRAMS = vmbusd vmbus-broker vmbusctl vmbus-img
INSTALL_WHEELS = build/wheels
INSTALL_MAN1 = $(wildcard man/*.1)
INSTALL_MAN5 = $(wildcard man/*.5)
INSTALL_MAN7 = $(wildcard man/*.7)
INSTALL_MAN8 = $(wildcard man/*.8)
SELINUX_DEVEL ?= /usr/share/selinux/devel

# docs/dbus-api.md, man/vmbusctl.1 and the completions, each from its source.
.PHONY: docs
docs: ## the documents and completions that are made from their sources
	@.venv/bin/python -m docs.make

.PHONY: install install-files install-programs install-selinux uninstall wheel

install: install-programs install-files ## programs, units, policies, man pages, completions (DESTDIR=)
	@if [ -f $(SELINUX_DEVEL)/Makefile ]; then $(MAKE) --no-print-directory install-selinux; \
	else echo "no SELinux module installed: selinux-policy-dev is not there"; fi

wheel:
	rm -rf $(INSTALL_WHEELS)
	.venv/bin/maturin build --release --quiet --interpreter .venv/bin/python --out $(INSTALL_WHEELS)

install-programs: wheel
	rm -rf $(INSTALL_ENV)
	$(INSTALL) -d $(INSTALL_LIB) $(DESTDIR)/usr/bin
	$(INSTALL_PYTHON) -m venv --without-pip $(INSTALL_ENV)
	.venv/bin/python -m pip --python $(INSTALL_ENV)/bin/python install --quiet --no-compile --no-warn-script-location \
	    "$$(echo $(INSTALL_WHEELS)/*.whl)[fast]"
	# Scripts name the interpreter where it will be, not where it was staged.
	sed -i '1s|^#!.*|#!/usr/lib/vmbus/env/bin/python -I|' $(addprefix $(INSTALL_ENV)/bin/,$(INSTALL_PROGRAMS))
	# The programs of the libraries are not ours to offer.
	cd $(INSTALL_ENV)/bin && find . -type f $(foreach n,$(INSTALL_PROGRAMS),! -name $(n)) -delete
	$(INSTALL_PYTHON) -m compileall -q --invalidation-mode unchecked-hash -s "$(DESTDIR)" $(INSTALL_ENV)/lib
	ln -sf ../lib/vmbus/env/bin/vmbusctl $(DESTDIR)/usr/bin/vmbusctl
	ln -sf ../lib/vmbus/env/bin/vmbus-img $(DESTDIR)/usr/bin/vmbus-img

install-files:
	$(INSTALL) -D -m 755 systemd/hold-machines $(INSTALL_LIB)/hold-machines
	$(INSTALL) -d $(DESTDIR)/usr/lib/systemd/system
	$(INSTALL) -m 644 $(addprefix systemd/,$(INSTALL_UNITS)) $(DESTDIR)/usr/lib/systemd/system/
	$(INSTALL) -D -m 644 systemd/vmbus.sysusers $(DESTDIR)/usr/lib/sysusers.d/vmbus.conf
	$(INSTALL) -D -m 644 systemd/vmbus.tmpfiles $(DESTDIR)/usr/lib/tmpfiles.d/vmbus.conf
	$(INSTALL) -D -m 644 dbus/org.vmbus1.conf $(DESTDIR)/usr/share/dbus-1/system.d/org.vmbus1.conf
	$(INSTALL) -D -m 644 dbus/org.vmbus1.service $(DESTDIR)/usr/share/dbus-1/system-services/org.vmbus1.service
	$(INSTALL) -d $(DESTDIR)/usr/share/dbus-1/interfaces
	$(INSTALL) -m 644 $(wildcard dbus/*.xml) $(DESTDIR)/usr/share/dbus-1/interfaces/
	$(INSTALL) -D -m 644 polkit/org.vmbus1.policy $(DESTDIR)/usr/share/polkit-1/actions/org.vmbus1.policy
	$(INSTALL) -D -m 644 polkit/50-vmbus-example.rules $(DESTDIR)/usr/share/doc/vmbus/50-vmbus-example.rules
	$(INSTALL) -D -m 644 systemd/broker.toml $(DESTDIR)/usr/share/doc/vmbus/broker.toml
	$(INSTALL) -D -m 644 systemd/vmbusd.toml $(DESTDIR)/usr/share/doc/vmbus/vmbusd.toml
	[ -e $(DESTDIR)/etc/vmbus/broker.toml ] || $(INSTALL) -D -m 644 systemd/broker.toml $(DESTDIR)/etc/vmbus/broker.toml
	$(INSTALL) -D -m 644 docs/examples/debian.toml $(DESTDIR)/usr/share/doc/vmbus/debian.toml
	$(INSTALL) -D -m 644 completions/vmbusctl.bash $(DESTDIR)/usr/share/bash-completion/completions/vmbusctl
	$(INSTALL) -D -m 644 completions/_vmbusctl $(DESTDIR)/usr/share/zsh/vendor-completions/_vmbusctl
	$(INSTALL) -d $(foreach n,1 5 7 8,$(DESTDIR)/usr/share/man/man$(n))
	$(INSTALL) -m 644 $(INSTALL_MAN1) $(DESTDIR)/usr/share/man/man1/
	$(INSTALL) -m 644 $(INSTALL_MAN5) $(DESTDIR)/usr/share/man/man5/
	$(INSTALL) -m 644 $(INSTALL_MAN7) $(DESTDIR)/usr/share/man/man7/
	$(INSTALL) -m 644 $(INSTALL_MAN8) $(DESTDIR)/usr/share/man/man8/

install-selinux: build/selinux/vmbus.pp
	$(INSTALL) -D -m 644 build/selinux/vmbus.pp $(DESTDIR)/usr/share/selinux/packages/vmbus/vmbus.pp

build/selinux/vmbus.pp: selinux/vmbus.te selinux/vmbus.fc selinux/vmbus.if
	rm -rf build/selinux && mkdir -p build/selinux
	cp selinux/vmbus.te selinux/vmbus.fc selinux/vmbus.if build/selinux/
	$(MAKE) -C build/selinux -f $(SELINUX_DEVEL)/Makefile vmbus.pp

uninstall:
	rm -rf $(INSTALL_LIB) $(DESTDIR)/usr/share/doc/vmbus $(DESTDIR)/usr/share/selinux/packages/vmbus
	rm -f $(addprefix $(DESTDIR)/usr/lib/systemd/system/,$(INSTALL_UNITS))
	rm -f $(DESTDIR)/usr/lib/sysusers.d/vmbus.conf $(DESTDIR)/usr/lib/tmpfiles.d/vmbus.conf
	rm -f $(DESTDIR)/usr/share/dbus-1/system.d/org.vmbus1.conf $(DESTDIR)/usr/share/dbus-1/system-services/org.vmbus1.service
	rm -f $(DESTDIR)/usr/share/dbus-1/interfaces/org.vmbus1.*.xml $(DESTDIR)/usr/share/polkit-1/actions/org.vmbus1.policy
	rm -f $(DESTDIR)/usr/bin/vmbusctl $(DESTDIR)/usr/bin/vmbus-img
	rm -f $(DESTDIR)/usr/share/bash-completion/completions/vmbusctl $(DESTDIR)/usr/share/zsh/vendor-completions/_vmbusctl
	rm -f $(addprefix $(DESTDIR)/usr/share/man/man1/,$(notdir $(INSTALL_MAN1))) $(addprefix $(DESTDIR)/usr/share/man/man5/,$(notdir $(INSTALL_MAN5)))
	rm -f $(addprefix $(DESTDIR)/usr/share/man/man7/,$(notdir $(INSTALL_MAN7))) $(addprefix $(DESTDIR)/usr/share/man/man8/,$(notdir $(INSTALL_MAN8)))
