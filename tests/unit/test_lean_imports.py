"""What each process imports: in training no scikit-learn, SciPy or W&B, in a sweep's driver nothing that trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_imports_no_package_that_it_does_not_use() -> None:
    for package in ("sklearn", "scipy", "wandb"):
        pytest.importorskip(package, reason=f"{package} is not installed: nothing to leave out")
    said = python(
        "import sys; from ft_ray.lean_imports import load_trl; load_trl(); import ft_ray.sft\n"
        "print([name for name in ('sklearn', 'scipy', 'wandb') if name in sys.modules])\n"
        "from trl.trainer import base_trainer; print(base_trainer.is_wandb_available())\n"
        "import sklearn.metrics, wandb; print(bool(sklearn.metrics.f1_score), bool(wandb.run is None))"
    )
    assert said.splitlines() == ["[]", "False", "True True"]


def test_the_engine_of_a_sweep_imports_no_package_that_it_does_not_use() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: nothing to leave out")
    said = python(
        "import sys; from ft_ray.sweep_actor import EngineActor\n"
        "try: EngineActor(None)\n"  # its imports are done before it looks at what it is to load
        "except AttributeError: print('ft_ray.shared_base' in sys.modules, {'sklearn', 'scipy'} & set(sys.modules))"
    )
    assert said.splitlines()[-1] == "True set()"


def test_the_driver_of_a_sweep_imports_nothing_that_trains(tiny_model: Path, tmp_path: Path) -> None:
    """All its modules, the base found and hashed for the first time, and how long trials train."""
    said = python(
        "import os, sys; os.environ['FT_RAY_CACHE'] = sys.argv[2]\n"
        "import ft_ray.cli_sweep, ft_ray.sweeping, ft_ray.tuning, ft_ray.sweep_finish\n"
        "from ft_ray import base_model, recipe, search_space, sweep_steps, tuning\n"
        "files = base_model.resolve(recipe.Model(id=sys.argv[1]))\n"
        "data = {'train': [{'path': 'x'}]}\n"
        "made = recipe.from_dict({'name': 't', 'model': {'id': sys.argv[1]}, 'data': data})\n"
        "space = search_space.parse({'search': {'data.fraction': {'choice': [0.5, 1.0]}}})\n"
        "class Rows: tokens = staticmethod(lambda split: range(100))\n"
        "rows = sweep_steps.RowShares(Rows, made)\n"
        "print(len(files.hash), sweep_steps.longest(space, made, rows) > 0)\n"
        "from ray.air._internal import usage\n"
        "with tuning.sweep_search.uncounted(): usage.tag_callbacks([tuning.Watch()])\n"  # as Tune calls it
        "heavy = 'torch', 'transformers', 'peft', 'trl', 'sklearn', 'mlflow', 'wandb'\n"
        "print([name for name in heavy if name in sys.modules])",
        str(tiny_model),
        str(tmp_path),
    )
    assert said.splitlines() == ["64 True", "[]"]


def test_what_an_engine_is_made_of_brings_neither_ray_train_nor_torch() -> None:
    """Ray reads it before the engine begins its own imports, for which all trials wait."""
    said = python("import sys, ft_ray.sweep_lease; print('ray.train' in sys.modules, 'torch' in sys.modules)")
    assert said.split() == ["False", "False"]


def test_who_asked_transformers_before_gets_what_it_said() -> None:
    said = python(
        "import transformers.utils.import_utils as asked; there = asked.is_sklearn_available()\n"
        "import sys; from ft_ray.lean_imports import load_transformers; load_transformers()\n"
        "print('transformers.generation.candidate_generator' in sys.modules, ('sklearn' in sys.modules) == there)"
    )
    assert said.splitlines() == ["True True"]


def test_one_that_is_there_already_stays() -> None:
    said = python(
        "import sys, types; sys.modules['sklearn'] = own = types.ModuleType('sklearn')\n"
        "from ft_ray.lean_imports import _without\n"
        "def seen(): print(sys.modules['sklearn'] is own, 'no_such_package' in sys.modules)\n"
        "with _without('sklearn', 'no_such_package'): seen()\n"
        "seen()"
    )
    assert said.splitlines() == ["True True", "True False"]


def test_who_only_names_a_chat_loads_no_model_library() -> None:
    """Ray's controller process and every rank import `train_rank` before they know what they do."""
    said = python("import sys, ft_ray.train_rank; print('transformers' in sys.modules, 'peft' in sys.modules)")
    assert said.split() == ["False", "False"]


def test_the_collector_pauses_for_imports_and_leaves_what_they_made_alone() -> None:
    said = python(
        "import gc; from ft_ray.lean_imports import collector_paused\n"
        "with collector_paused(): import json; print(gc.isenabled())\n"
        "print(gc.isenabled(), gc.get_freeze_count())\n"
        "with collector_paused(keep=True): import csv; print(gc.isenabled())\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000)\n"
        "gc.disable()\n"
        "with collector_paused(): pass\n"
        "print(gc.isenabled())"
    )
    assert said.splitlines() == ["False", "True 0", "False", "True True True", "False"], "as it was before, too"


def test_the_process_of_a_trial_has_ray_tune_without_ray_data_and_pandas() -> None:
    said = python(
        "import sys, ray; from ft_ray.lean_imports import load_tune; load_tune(); load_tune()\n"
        "import ray.tune; print([name for name in ('pandas', 'ray.data') if name in sys.modules])\n"
        "from ray.tune.trainable.function_trainable import FunctionTrainable\n"
        "from ray.tune.result_grid import pd\n"  # what came too early for the real one finds it when it is used
        "print(pd.DataFrame({'a': [1]}).a.sum())\n"
        "import pandas, ray.data; print(pandas.Series([1, 2]).sum(), ray.data.range.__name__)"
    )
    assert said.splitlines() == ["[]", "1", "3 range"]


def test_a_ray_tune_that_cannot_do_without_them_is_imported_whole() -> None:
    said = python(
        "import sys; from ft_ray import lean_imports\n"
        "def named(name): raise TypeError('of another version')\n"
        "lean_imports._named = named; lean_imports.load_tune()\n"
        "import ray.tune; print([name for name in ('pandas', 'ray.data') if name in sys.modules])\n"
        "import numpy, pandas, pyarrow\n"
        "print(numpy.arange(3).sum(), pandas.Series(pyarrow.array([1, 2]).to_pandas()).sum(), ray.data.range.__name__)"
    )
    assert said.splitlines() == ["['pandas', 'ray.data']", "3 3 range"]
