# make demo: the embedded default, end to end.  make demo_real: the same with real language weights, and product texts.
# make test: the tests.  All make .venv first.
PYTHON ?= python3
BIN := .venv/bin
STEPS := $(shell sed -n 's/^max_steps: //p' configs/demo.yaml)
CHECKPOINT := outputs/demo/step_$(shell printf '%06d' $(STEPS))
REAL_STEPS := $(shell sed -n 's/^max_steps: //p' configs/demo_real.yaml)
REAL_CHECKPOINT := outputs/demo_real/step_$(shell printf '%06d' $(REAL_STEPS))

.PHONY: demo demo_real demo_steps test clean

demo: .venv/.installed
	$(BIN)/python bench/cpu_seconds.py $(MAKE) --no-print-directory demo_steps

demo_steps:
	$(BIN)/python demo.py
	$(MAKE) --no-print-directory $(CHECKPOINT)/options.yaml
	$(BIN)/python run.py --checkpoint_path $(CHECKPOINT) --ablate --num_threads 1

# Trained again only when the demo was made anew or its options changed.
$(CHECKPOINT)/options.yaml: demo/made_by configs/demo.yaml
	$(BIN)/python train_vlm_parallel.py --config configs/demo.yaml --overwrite_output_dir

demo_real: .venv/.installed-real
	$(BIN)/python demo.py --real --output_dir demo_real --held_out 48
	$(MAKE) --no-print-directory $(REAL_CHECKPOINT)/options.yaml
	$(BIN)/python run.py --checkpoint_path $(REAL_CHECKPOINT) --num_samples 2 --num_threads 1

# What was killed goes on; what was made otherwise begins anew.
$(REAL_CHECKPOINT)/options.yaml: outputs/demo_real/begun
	$(BIN)/python train_vlm_parallel.py --config configs/demo_real.yaml --resume auto

outputs/demo_real/begun: demo_real/made_by configs/demo_real.yaml
	rm -rf outputs/demo_real runs/demo_real
	mkdir -p outputs/demo_real
	touch $@

test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile  # what a file's tests share is made once

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.installed-app: .venv/.installed app/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r app/requirements.txt
	touch $@

.venv/.installed-real: .venv/.installed examples/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r examples/requirements.txt
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt app/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf demo outputs/demo runs/demo demo_real outputs/demo_real runs/demo_real
