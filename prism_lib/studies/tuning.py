"""Settings of a model's edits, found on validation images by Optuna's TPE with successive halving (`prism tune`).

A search over all edits comes first, then one for each edit, of its guidance and confinement. A trial varies four
values of the best one so far. It measures one image of each edit, then two, four and so on, while it is among the
better half of the trials that came so far. Trials are kept in a journal, and trial n is drawn with seed + n, so that a
search goes on where it stopped.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from pydantic import Field, NonNegativeInt, PositiveInt

from prism_lib import paths, records
from prism_lib.configs import checked
from prism_lib.data.folder import load_info, load_table, load_vocabulary
from prism_lib.data.rows import prompt_pairs, true_counterfactual
from prism_lib.editing.methods import RECOMMENDED, InversionConfig
from prism_lib.editing.settings import EditConfig, Recommendation, write_settings
from prism_lib.evaluation import metrics
from prism_lib.evaluation.evaluate import Evaluation, choose_cases
from prism_lib.evaluation.selection import load_guide
from prism_lib.files import exclusive, stable_seed
from prism_lib.language.edits import Edit
from prism_lib.language.labels import NO_FINDING
from prism_lib.models.classifier import Classifier
from prism_lib.models.pipeline import Pipe, load_pipeline
from prism_lib.models.published import locate
from prism_lib.studies.comparison import CRITERION, Cases, measure
from prism_lib.studies.editors import PromptToPrompt

ALL_EDITS = "all edits"  # the first search, with half of the budget
SPACE = {
    "skip": FloatDistribution(0.0, 0.9, step=0.1),
    "guidance_scale": FloatDistribution(1.0, 8.0, log=True),
    "guidance_start": FloatDistribution(0.0, 0.3, step=0.1),
    "guidance_end": FloatDistribution(0.3, 1.0, step=0.1),
    "cross_replace_steps": FloatDistribution(0.0, 0.9, step=0.1),
    "self_replace_steps": FloatDistribution(0.0, 0.9, step=0.1),
    "confine": FloatDistribution(0.0, 0.5, step=0.02),
    "min_change": FloatDistribution(0.005, 0.04, step=0.005),
}
OF_ONE_EDIT = ("guidance_scale", "guidance_start", "guidance_end", "confine")
VARIED = 4  # values that a trial draws anew: most draws of all values at once edit nothing
# The first trial: what is published for prompt-to-prompt.
NEUTRAL = {name: getattr(EditConfig(), name, 0.0) for name in SPACE} | {"min_change": EditConfig().mask.min_change}

Parameters = Mapping[str, float]  # values by name of `SPACE`


@checked()
class TuningConfig:
    """A model, a prepared folder and a budget: `minutes`, or `evaluations` of the U-Net for one image where given.

    What an interrupted search has used counts. `images` validation patients stand for each edit. `guide` is a
    classifier below PRISM_WEIGHTS, not the judge, for images whose true counterfactual is not known.
    """

    model: str
    data: str
    out: str = ""  # where the result goes; "" is the model's own folder
    edits: tuple[str, ...] = ()  # keys or sentences; none stand for removal and addition of every label
    images: PositiveInt = 8  # settings found on four images did worse on other images
    steps: PositiveInt = 25
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    evaluations: NonNegativeInt = 0
    guide: str = ""
    seed: int = 0

    def folder(self) -> Path:
        """Where the result goes; ValueError for a shipped model or one without a folder, unless `out` names one."""
        home = Path(locate(self.model))
        if not self.out and (not home.is_dir() or home.resolve().is_relative_to(paths.weights().resolve())):
            kind = "a shipped model, whose settings stay" if home.is_dir() else "no folder"
            raise ValueError(f"{self.model} is {kind}: name a folder for the result with --out")
        return Path(self.out) if self.out else home


class Found(NamedTuple):
    """What a search found, its folder and studies, and mean losses of images that it did not see, by edit."""

    settings: Recommendation
    folder: Path
    studies: Mapping[str, optuna.Study]
    losses: pd.DataFrame  # columns: "neutral", "before" (what the model recommended) and "found"

    def progress(self) -> dict[str, tuple[range, list[float]]]:
        """By search: the numbers of the trials, and the least loss until each (`plots.curves`)."""
        trials = {name: study.trials_dataframe(("value", "state")) for name, study in self.studies.items()}
        whole = {name: one["value"].where(one["state"] == "COMPLETE") for name, one in trials.items()}
        return {name: (range(1, len(one) + 1), one.cummin().ffill().tolist()) for name, one in whole.items()}


def cases_of(config: TuningConfig, guide: Classifier | None) -> Cases:
    """Validation patients of each edit, `images` to search on and as many to measure the result on.

    ValueError if an edit suits fewer, or if neither the truth nor a guide can tell how good it is.
    """
    info, table = load_info(config.data), load_table(config.data, "val")
    both = [label for label in info["labels"] if {0, 1} <= set(table[label]) and label != NO_FINDING]
    edits = [Edit.read(text, load_vocabulary(config.data)) for text in config.edits]
    edits = edits or [edit for label in both for edit in (Edit(remove=(label,)), Edit(add=(label,)))]
    if not edits:
        raise ValueError(f"no label of {config.data} is both present and absent in its validation images")
    cases = {edit: choose_cases(config.data, edit, 2 * config.images, "val") for edit in edits}
    for edit, rows in cases.items():
        if edit.attributes and true_counterfactual(config.data, rows.head(1), edit) is not None:
            continue
        if guide is None:
            raise ValueError(f"{config.data} has no true counterfactuals of {edit.key}: name a classifier with --guide")
        if len(edit.attributes) != 1 or not {*edit.remove, *edit.add} <= set(guide.labels):
            raise ValueError(f"the guide reads {', '.join(guide.labels)}, each alone, and not {edit.key}")
    return cases


def losses_of(evaluation: Evaluation) -> list[float]:
    """By image: the error to the truth, or what a guide did not gain plus what the edit changed, 2 - CPG - SSIM."""
    if CRITERION in evaluation.table:
        return evaluation.table[CRITERION].tolist()
    return (2 - evaluation.table["cpg"] - metrics.ssim(evaluation.edited, evaluation.factual).tolist()).tolist()


def edit_fields(values: Parameters) -> dict[str, Any]:
    """Values of `SPACE` as fields of `EditConfig`, to the three digits that are written."""
    made: dict[str, Any] = {name: round(value, 3) for name, value in values.items() if name != "skip"}
    return made | ({"mask": {"min_change": made.pop("min_change")}} if "min_change" in made else {})


@dataclass(frozen=True)
class _Search:
    """What the searches of a run share; `label` tells the journal's searches of other configurations apart."""

    config: TuningConfig
    pipe: Pipe
    guide: Classifier | None
    storage: optuna.storages.BaseStorage
    label: str
    say: Callable[[str], object]

    def editor(self, values: Parameters) -> PromptToPrompt:
        """The editor that values of the whole `SPACE` stand for."""
        inversion = InversionConfig(skip=round(values["skip"], 3))
        return PromptToPrompt(RECOMMENDED, self.config.steps, EditConfig(**edit_fields(values)), inversion=inversion)

    def __call__(self, name: str, cases: Cases, names: Sequence[str], start: Parameters, share: float) -> optuna.Study:
        """Vary some values, with the others as in `start`, until a share of the budget is used."""
        config, label = self.config, f"{name} {self.label} {stable_seed(sorted(start.items())):x}"
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        study = optuna.create_study(storage=self.storage, study_name=label, pruner=pruner, load_if_exists=True)
        unit, budget = ("evaluations", config.evaluations) if config.evaluations else ("minutes", config.minutes)
        while True:
            done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
            if done and sum(trial.user_attrs[unit] for trial in done) >= share * budget:
                return study
            if not done:
                study.enqueue_trial({own: start[own] for own in names})
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=4, seed=config.seed + len(done))
            space: dict[str, BaseDistribution] = {own: SPACE[own] for own in names}
            kept = random.Random(config.seed + len(done)).sample(names, max(0, len(names) - VARIED)) if done else ()
            for own in kept:
                space[own] = FloatDistribution(study.best_params[own], study.best_params[own], log=SPACE[own].log)
            trial = study.ask(space)
            editor, begin = self.editor({**start, **trial.params}), time.perf_counter()
            losses: list[float] = []
            evaluations = images = 0
            while images < config.images and not (images and trial.should_prune()):
                rung = slice(images, min(max(1, 2 * images), config.images))
                part = {edit: rows[rung] for edit, rows in cases.items()}
                measured = measure(self.pipe, config.data, part, {name: editor}, self.guide)[name]
                losses += [loss for evaluation in measured.evaluations for loss in losses_of(evaluation)]
                evaluations += round(measured.unet_evaluations * (rung.stop - images) * len(cases))
                images = rung.stop
                trial.report(mean := sum(losses) / len(losses), images)
            trial.set_user_attr("minutes", (time.perf_counter() - begin) / 60)
            trial.set_user_attr("evaluations", evaluations)
            whole = images == config.images
            study.tell(trial, mean if whole else None, TrialState.COMPLETE if whole else TrialState.PRUNED)
            self.say(f"{name}, trial {len(done) + 1}: {mean:.3f} (least {study.best_value:.3f}), {images} images each")


def find_settings(config: TuningConfig, say: Callable[[str], object] = lambda line: None) -> Found:
    """Search, and write `editing.json`, its record `tuning.json` and all trials, `tuning.csv`, into the folder.

    `say` is given a line after every trial. What is missing raises before the first.
    """
    folder, guide = config.folder(), load_guide(config.guide) if config.guide else None
    cases = cases_of(config, guide)
    pipe = load_pipeline(config.model, mixed_precision="auto")
    same = replace(config, out="", minutes=1, evaluations=0), load_info(config.data)["content_hash"]
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder), records.Timer() as timer:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "tuning.journal")))
        search = _Search(config, pipe, guide, storage, f"{stable_seed(same):x}", say)
        share = 1.0 if len(cases) == 1 else 0.5
        studies = {ALL_EDITS: search(ALL_EDITS, cases, tuple(SPACE), NEUTRAL, share)}
        best, rules, losses = {**NEUTRAL, **studies[ALL_EDITS].best_params}, [], {}
        for edit, rows in cases.items():
            own = best
            if share < 1:
                studies[edit.key] = search(edit.key, {edit: rows}, OF_ONE_EDIT, best, (1 - share) / len(cases))
                own, (pair,) = {**best, **studies[edit.key].best_params}, prompt_pairs(config.data, rows[:1], edit)
                rule = {"when": "add" if pair.adds else "remove", "phrases": [w.lower() for w in pair.target_words]}
                rules.append(rule | {"settings": edit_fields({name: own[name] for name in OF_ONE_EDIT})})
            ways = {"neutral": search.editor(NEUTRAL), "before": PromptToPrompt(RECOMMENDED, config.steps)}
            ways["found"] = search.editor(own)
            found = measure(pipe, config.data, {edit: rows[config.images :]}, ways, guide)
            losses[edit.key] = {way: pd.Series(losses_of(one.evaluations[0])).mean() for way, one in found.items()}
    trials = pd.concat({name: study.trials_dataframe() for name, study in studies.items()}, names=["search", "row"])
    trials.to_csv(folder / "tuning.csv")
    least = {name: study.best_value for name, study in studies.items()}
    metrics = {"least_loss": least, "loss_on_other_images": losses, "trials": len(trials)}
    metrics |= {unit: trials[f"user_attrs_{unit}"].sum() for unit in ("evaluations", "minutes")}
    about: dict[str, Any] = {"dataset": Path(config.data).name, "notebook": "prism tune", "model": config.model}
    about |= {"parameters": {"config": config}, "seed": config.seed, "seconds": timer.seconds, "figures_dir": folder}
    records.record("tuning", metrics=metrics, **about)
    measured = f"prism tune: {config.images} validation images of each edit, {config.steps} steps; tuning.json"
    content = {"measured": measured, "inversion": {"skip": round(best["skip"], 3)}, "defaults": edit_fields(best)}
    return Found(write_settings(folder, content | {"rules": rules}), folder, studies, pd.DataFrame(losses).T)
