# make demo        install, fine-tune a subject, blend, write the report
# make check       formatting, lint and types
# make test        install, run the tests
# make test-all    and those that add minutes
# make test-slurm  the tests on a SLURM of this machine, which make slurm installs (Debian, as root)
# make families-table  write what each family can do into docs/families.md, by the tests that hold it
# make orderings   do the effects show, on three subjects? (longer)
# make sandbox     make the sandbox's weights again (hours on a CPU)
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# What the project is tested with; pyproject.toml says what it admits. Elsewhere: make TORCH=torch==2.13.0+cu130 ...
TORCH ?= torch==2.13.0
PINS := lightning==2.6.6 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 torchmetrics==1.9.0 safetensors==0.8.0 jsonargparse==4.53.0 matplotlib==3.11.2 pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.17 ruff==0.15.0 mypy==2.4.1 torchao==0.18.0 bitsandbytes==0.50.2 prodigyopt==1.1.2 lion-pytorch==0.2.5 schedulefree==1.4.1 compel==2.5.1

SOURCES := dreamblend callbacks benchmarks tests train.py blend.py

.PHONY: install demo check test test-all families-table slurm test-slurm orderings sandbox clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[test]'
	touch $@

# What is there already is not made again: remove demo/ to start over.
# Shorter than the recipes: the pair that it shows is there by step 400, and few inference steps tell which it is.
demo: demo/run/snapshots/step-000400
	$(RUN) blend.py select --run demo/run --num_inference_steps 10
	$(RUN) blend.py predict --config configs/blend.yaml --run demo/run --prompts configs/prompts.txt --seeds 0-3 \
		--model.num_inference_steps 15 --out demo/blend

demo/run/snapshots/step-000400: | install
	$(RUN) -m dreamblend.sandbox photos teal_mug demo/photos
	rm -rf demo/run
	$(RUN) train.py fit --config configs/train_full.yaml --data.instance_dir demo/photos --data.class_noun mug \
		--trainer.max_steps 400 --snapshots.steps '[10, 25, 50, 100, 200, 400]' --trainer.callbacks.num_inference_steps 10 --out demo/run

orderings: install
	$(RUN) -m benchmarks.orderings --out runs/orderings

check: install
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m mypy

test: install
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-all: install
	$(RUN) -m pytest -m 'not slurm' -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

families-table: install
	$(RUN) -m tests.families.table

slurm:
	.ci/slurm.sh install

test-slurm: install
	$(RUN) -m pytest -m slurm

sandbox: install
	$(RUN) -m dreamblend.sandbox.making.recipe
	$(RUN) -m dreamblend.sandbox check

clean:
	rm -rf $(VENV) demo build *.egg-info
