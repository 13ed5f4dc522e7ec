# A thin front for CMake; `make help` lists what it does. Variables: BUILD, JOBS, TIME, JSON, PREFIX, DESTDIR, CC, CXX, CMAKE_ARGS.
BUILD ?= build
PREFIX ?= /usr/local
JOBS ?= $(shell nproc)
TIME ?= 60
# Looked up when used, since set-up may just have installed ninja; an existing build folder keeps what it has.
GENERATOR = $(if $(wildcard $(BUILD)/CMakeCache.txt),,$(if $(shell command -v ninja),-G Ninja))

all: build

help:
	@echo 'make demo          sets up what is missing, builds, prepares a document and asks it two questions'
	@echo 'make build         sets up what is missing, builds $(BUILD)/squeeze'
	@echo 'make check         the same set-up, then every test (half an hour on two cores)'
	@echo 'make check-models  make check, and the tests that need the second model (239 MB more, Gemma terms)'
	@echo 'make fuzz          fuzzes what reads files and text, TIME seconds a target (needs clang)'
	@echo 'make install       installs under $(PREFIX) (PREFIX=..., DESTDIR=...)'
	@echo 'make deb           builds a Debian package for any CPU with AVX2, $(BUILD)/deb/squeeze_*.deb'
	@echo 'make clean         removes $(BUILD)/; the per-user cache stays: scripts/setup.sh --where cache'

setup:
	@scripts/setup.sh

# Configuring anew takes half a second and notices a changed compiler or a cache that has moved.
build: setup
	cmake $(GENERATOR) -S . -B $(BUILD) -DCMAKE_INSTALL_PREFIX=$(PREFIX) -DSQUEEZE_TESTS=OFF $(CMAKE_ARGS)
	cmake --build $(BUILD) --parallel $(JOBS)

demo: build
	@scripts/demo.sh $(BUILD)/squeeze $(BUILD)/demo

check:
	@scripts/check.sh $(BUILD)/check

check-models:
	@scripts/check.sh --models $(BUILD)/check

fuzz: setup
	@scripts/fuzz.sh --time $(TIME) --jobs $(JOBS) --build $(BUILD)/fuzz $(if $(JSON),--json $(JSON))

install: build
	cmake --install $(BUILD) --prefix $(PREFIX)

# A build of its own: not for this very CPU, as the others are, and the library where Debian has libraries.
deb: export SQUEEZE_LLAMA_NATIVE = OFF
deb: setup
	cmake $(if $(wildcard $(BUILD)/deb/CMakeCache.txt),,$(if $(shell command -v ninja),-G Ninja)) -S . -B $(BUILD)/deb \
		-DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX=/usr -DSQUEEZE_TESTS=OFF -DSQUEEZE_LLAMA=pinned -DSQUEEZE_CUDA=OFF $(CMAKE_ARGS)
	cmake --build $(BUILD)/deb --parallel $(JOBS)
	@scripts/deb.sh $(BUILD)/deb

clean:
	rm -rf $(BUILD)

.PHONY: all help setup build demo check check-models fuzz install deb clean
