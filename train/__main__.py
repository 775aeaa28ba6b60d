"""Train one run, or sweep several.

python -m train experiment=tiny_source                                           a tiny source from scratch, on one CPU
python -m train experiment=tiny growth=lossless seed=0                           grow it and go on training
python -m train -m experiment=tiny growth=scratch,lossless,tile,random_pad seed=0,1,2
torchrun --nproc_per_node 2 -m train experiment=tiny growth=lossless seed=0      the same losses on two processes
python -m train -m hydra/launcher=slurm experiment=tiny growth=scratch,lossless  each point of the sweep as a Slurm job

Every run writes runs/<study>-<arm>-s<seed>/ and resumes there when started again. Exit status: 0 done, 2 a fault in what was asked,
75 (EX_TEMPFAIL) stopped by SIGTERM or SIGUSR1 with everything saved: start the same command again.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import find_spec
from typing import NoReturn

import hydra
from omegaconf import DictConfig

from model.errors import UserError
from train.settings import CONF, Settings, compose, settings_from
from train.trackers import check_installed


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _hydra(cfg: DictConfig) -> None:
    """One job as Hydra composed it: of a sweep, or of a call with Hydra's own flags."""
    from train import slurm

    if slurm.in_job():
        slurm.join()
    try:
        _train(settings_from(cfg))
    except UserError as error:
        _fail(error)


def main() -> None:
    """The door. Calls and sweeps are composed here first, so that all faults are told with near matches; any other flag is Hydra's."""
    arguments = sys.argv[1:]
    flags = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if argument not in flags]
    try:
        if not flags:
            _train(compose(overrides))
        elif set(flags) <= {"-m", "--multirun"}:
            _check_sweep(overrides)
            with tempfile.TemporaryDirectory() as nowhere:  # a local sweep writes one multirun.yaml, and the runs have no use for it
                if not any(override.startswith(("hydra.sweep.dir=", "hydra/launcher=")) for override in overrides):
                    sys.argv.append(f"hydra.sweep.dir={nowhere}")
                _hydra()
        else:
            _hydra()
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        print("stopped; the same command resumes from the newest checkpoint", file=sys.stderr)
        sys.exit(130)


def _check_sweep(overrides: list[str]) -> None:
    """Tell the faults of every point of a sweep before the first one trains."""
    from train.door import sweep_points

    if any(override.startswith("hydra/launcher=") for override in overrides) and find_spec("submitit") is None:
        raise UserError("hydra/launcher: submitit, which starts the jobs, is not installed; pip install -e '.[slurm]'")
    faults = []
    for point in sweep_points(overrides):
        try:
            check_installed(compose(point).logger.trackers)
        except UserError as error:
            faults.append(str(error))
    UserError.collect(dict.fromkeys(faults))


def _train(settings: Settings) -> None:
    if settings.dry_run:
        from train.forecast import tell

        print(tell(settings))
        return
    check_installed(settings.logger.trackers)
    from train import slurm
    from train.loop import train  # torch, transformers and accelerate are loaded only for settings that hold
    from train.signals import REQUEUE, Stopped

    try:
        train(settings)
    except Stopped as stopped:
        _say(f"{stopped}; the same command goes on from there")
        if slurm.in_job():
            slurm.requeue()
        else:
            sys.exit(REQUEUE)


def _fail(error: UserError) -> NoReturn:
    _say(f"error: {error}")
    sys.exit(2)


def _say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
