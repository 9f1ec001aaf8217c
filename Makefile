# make demo     install, fine-tune a subject, blend, open the report
# make test     install, run the tests
# make orderings   the effects on several subjects (longer)
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# What the project is tested with; pyproject.toml says what it admits. Elsewhere: make TORCH=torch==2.13.0+cu130 ...
TORCH ?= torch==2.13.0
PINS := lightning==2.6.6 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 torchmetrics==1.9.0 safetensors==0.8.0 jsonargparse==4.53.0

.PHONY: install demo test orderings sandbox clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[test]'
	touch $@

demo: install
	$(RUN) -m benchmarks.demo --out demo

orderings: install
	$(RUN) -m benchmarks.orderings --out runs/orderings

test: install
	$(RUN) -m pytest

sandbox: install
	$(RUN) -m dreamblend.sandbox.recipe

clean:
	rm -rf $(VENV) demo build *.egg-info
