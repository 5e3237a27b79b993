"""What the explorer does, without what it looks like: images, edits, runs that can be cancelled, saved files."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from torch import Tensor

from prism_lib import paths
from prism_lib.apps.recipe import Case, Outcome, Recipe, load_image, phantom_patient, unmeasured, upload_name
from prism_lib.data.folder import load_table
from prism_lib.data.uploads import ACCEPT, check_length, read_upload
from prism_lib.editing.counterfactuals import Counterfactual
from prism_lib.editing.inversion import Callback, Inversion
from prism_lib.editing.methods import edit_steps, method_of
from prism_lib.editing.settings import recommended, recommended_inversion
from prism_lib.evaluation import metrics, novelty
from prism_lib.evaluation.evaluate import load_judge
from prism_lib.files import check_images, image_hash
from prism_lib.language.edits import Edit
from prism_lib.language.labels import PHANTOM, Vocabulary, vocabulary
from prism_lib.models.classifier import Classifier
from prism_lib.models.pipeline import Pipe, encode_prompts, image_factor, image_size, load_pipeline, told_apart
from prism_lib.models.published import locate
from prism_lib.models.schedule import Schedule
from prism_lib.paths import FILMS, SHIPPED
from prism_lib.phantom import patients

logger = logging.getLogger(__name__)

WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("explorer.yaml").read_text(encoding="utf-8"))
INFO, SUFFIXES = "dataset.json", ACCEPT.split(",")
PREVIEW_STEPS = 5
OTHER_IMAGES, FILM_JUDGE = (FILMS, "phantom-judge"), "film-judge"  # who reads films in place of the phantom's judge
HEARD = 0.15  # see `models.told_apart`; "with" and "without" are 1 apart


class Fault(ValueError):
    """A sentence for the person at the screen, and the control it belongs to."""

    def __init__(self, control: str, sentence: str) -> None:
        super().__init__(sentence)
        self.control = control


Row = Mapping[Any, Any]  # of a table, with values by label
Progress = Callable[[float], None]
Preview = Callable[[Outcome], None]
Done = Callable[[list[Outcome], str], None]  # the outcomes, or none and a sentence


@dataclass(eq=False, repr=False)
class Session:
    """A model, the image at hand, and every counterfactual made so far; one edit runs at a time, in a thread."""

    pipe: Pipe
    model: str = SHIPPED
    judge: Classifier | None = None
    vocab: Vocabulary = PHANTOM
    references: Mapping[str, novelty.Reference | None] = field(default_factory=dict)  # of every model that is offered
    mode: str = "L"

    def __post_init__(self) -> None:
        self.references, self.pipes = self.references or {self.model: None}, {self.model: self.pipe}
        self.chosen = self.model  # by the person; "" for the one that the image resembles
        self.case: Case | None = None
        self._opened: tuple[Any, ...] = ()  # the arguments of `_open` for the image at hand
        self.history: list[list[Outcome]] = []
        self.running = False
        self._inversions: dict[tuple[str, str, str, str, str, int], Inversion] = {}
        self._stop = threading.Event()

    @classmethod
    def load(cls, model: str = "", judge: str = "", vocab: str = "", mode: str = "L") -> "Session":
        """A session with a model ("" for the shipped one that an image resembles) and a judge ("" for none).

        `vocab` is "" for the one that the model was fine-tuned with, else the phantom's. `mode` is "L" (gray) or "RGB".
        """
        first = model or SHIPPED
        own = Path(locate(first)).resolve() / "vocabulary.yaml"
        words = vocabulary(vocab or (str(own) if own.is_file() else "phantom"))
        shipped = [name for name in (SHIPPED, FILMS) if (paths.weights() / name / "model_index.json").is_file()]
        offered = dict.fromkeys([first, *(shipped if words.name in ("phantom", "films") and mode == "L" else [])])
        references = {name: novelty.load(name) for name in offered}
        made = cls(load_pipeline(first), first, load_judge(judge), words, references, mode)
        made.chosen = model if len(references) > 1 else first
        return made

    def choose(self, model: str) -> Case | None:
        """Edit with an offered model, "" for the one that an image resembles; the image at hand is opened again."""
        before, self.chosen = self.chosen, model
        try:
            return self._open(*self._opened) if self._opened else None
        except Exception:
            self.chosen = before
            raise

    def open_phantom(self, seed: int, index: int) -> Case:
        name = f"phantom:{seed}/{index}"
        labels = phantom_patient(name).labels().to_dict("records")[0]
        title = f"phantom patient {index} of population {seed}"
        return self._open(name, title, labels, lambda size: load_image(name, size, self.mode))

    def open_row(self, folder: Path, file_name: str) -> Case:
        """An image of a folder; of a prepared one, with the labels of its table."""
        if not (folder / INFO).is_file():
            return self.open_file(folder / file_name)
        rows = load_table(folder).query("file_name == @file_name").to_dict("records")
        if not rows:
            raise Fault("image", f"{folder} has no image {file_name}.")
        return self.open_file(folder / file_name, rows[0])

    def open_file(self, path: Path, labels: Row = MappingProxyType({})) -> Case:
        """A file of this machine, read once."""
        path = path.expanduser().resolve()
        if not path.is_file():
            raise Fault("image", f"There is no file {path}.")
        check_length(path.name, path.stat().st_size)
        return self.open_upload(path.name, path.read_bytes(), labels, f"file:{path}")

    def open_upload(self, name: str, content: bytes, labels: Row = MappingProxyType({}), path: str = "") -> Case:
        """An uploaded file. It stays in memory; only `save` and `code` write it, as it was prepared."""
        return self._open(path, name, labels, cache(lambda size: read_upload(name, content, size, self.mode)), content)

    def _open(self, name: str, title: str, labels: Row, read: Callable[[int], Tensor], content: bytes = b"") -> Case:
        """`read` gives the image at the size that a model needs. A failure leaves model and image as they were."""
        distances = {}
        for offered, known in self.references.items():
            if known is not None and known.shape[0] == (3 if self.mode == "RGB" else 1):
                with suppress(ValueError):  # smaller than the model's images
                    distances[offered] = known.scores(read(known.shape[-1])).nan_to_num(nan=torch.inf).item()
        model = self.chosen or min(distances, key=lambda offered: distances[offered], default=self.model)
        pipe = self.pipes.get(model) or load_pipeline(model)
        image = read(image_size(pipe))
        check_images(image, image_factor(pipe.vae))
        self.model, self.pipe, self.pipes[model] = model, pipe, pipe
        self._opened = name, title, labels, read, content
        notice = self._unlike(distances)
        stated = {label: float(value) for label in self.vocab.labels if (value := labels.get(label)) in (0, 1)}
        readings = self._readings(image, model)
        self.case = Case(name or upload_name(image), title, image, stated, readings, distances, notice, content)
        return self.case

    def _unlike(self, distances: Mapping[str, float]) -> str:
        """That an image is unlike those the model was trained on and what to do about it, or nothing."""
        score, known = distances.get(self.model), self.references[self.model]
        if score is None or known is None or not known.is_new(score):
            return ""
        closest = min(distances, key=lambda model: distances[model])
        closer = WORDS["closer"].format(model=closest) if distances[closest] < score else ""
        return str(WORDS["unlike"]).format(model=self.model, score=score, share=known.share, closer=closer)

    def _readings(self, image: Tensor, model: str) -> dict[str, float]:
        if (judge := self.judge) is None:
            return {}
        judge = Classifier.load(FILM_JUDGE) if (Path(model).name, judge.name) == OTHER_IMAGES else judge
        return dict(zip(judge.labels, judge.read(image)[0].tolist(), strict=True))

    def edit(self, remove: Sequence[str] = (), add: Sequence[str] = (), text: str = "") -> Edit:
        """The edit of toggled labels, or of words: a sentence, or "source prompt -> target prompt"."""
        with _faults_of("edit"):
            if text.strip() and (remove or add):
                raise ValueError("Give the edit in words or by the buttons, not both.")
            if text.strip():
                case = self.case
                known = {label: case.state(label) for label in self.vocab.phrases} if case else None
                return Edit.read(text, self.vocab, known)
            if not (remove or add):
                raise ValueError("Say what should be different: press a button or write it.")
            return Edit(tuple(remove), tuple(add))

    def recipe(self, edit: Edit, settings: Mapping[str, Any] | None = None, **more: Any) -> Recipe:
        """The recipe of an edit of the image at hand: fields of `EditConfig`, and `more` of `Recipe`."""
        if self.case is None:
            raise Fault("image", "Choose an image first.")
        with _faults_of("edit"):
            pair = edit.prompts(self._labels(self.case, edit), self.vocab)
            encode_prompts(self.pipe, [pair.source, pair.target])
        about = asdict(pair) | {"model": self.model, "mode": self.mode, "settings": dict(settings or {})}
        with _faults_of("settings"):
            recipe = Recipe(self.case.name, **about, **more)
            recommended(self.pipe, pair, recipe.steps, **recipe.settings)  # do they go with what the model recommends?
            Schedule.from_config(self.pipe.scheduler.config, recipe.steps)
            if not isinstance(recipe.mask, str):
                recipe.own_mask(self.case.image)
        return recipe

    def _labels(self, case: Case, edit: Edit) -> dict[str, float]:
        """What the source prompt may say: what is known, and what the judge reads of labels that stay as they are."""
        edited = {self.vocab.owners.get(name, name) for name in (*edit.remove, *edit.add)}
        said = [label for label in self.vocab.phrases if label in case.labels or label not in edited]
        return {label: float(state) for label in said if (state := case.state(label)) is not None}

    def start(self, recipes: list[Recipe], edit: Edit, *, progress: Progress, preview: Preview, done: Done) -> None:
        """Run in the background. `done` gets the outcomes, or none and a sentence; all calls come from the thread."""
        if self.running:
            raise Fault("run", "An edit is running: wait for it or cancel it.")
        self._stop.clear()
        self.running = True

        def work() -> None:
            made, said = [], ""
            try:
                made = self.run(recipes, edit, progress=progress, preview=preview)
            except CancelledError:
                said = "Cancelled."
            except Exception as error:  # whatever it is, the session goes on
                logger.warning("an edit failed", exc_info=True)
                said = sentence(error)
            self.running = False
            done(made, said)

        threading.Thread(target=work, name="prism-explorer", daemon=True).start()

    def cancel(self) -> None:
        """Ask the run to stop; it does so after the step it is in."""
        self._stop.set()

    def run(
        self, recipes: list[Recipe], edit: Edit, *, progress: Progress = lambda _: None, preview: Preview | None = None
    ) -> list[Outcome]:
        """Run recipes of the image at hand one by one and remember them; a quick look at the first comes before."""
        case = self.case
        assert case is not None, "a recipe has been made, so there is an image"
        first, drawn = recipes[0], recommended_inversion(self.pipes[recipes[0].model], recipes[0].steps)
        taken = edit_steps(first.method, drawn, first.steps)
        if preview is not None and taken >= 2 * PREVIEW_STEPS:
            quick = self._outcome(case, replace(first, steps=PREVIEW_STEPS), edit, self._callback(lambda _: None, 1))
            preview(replace(quick, preview=True))
        walks = 0 if _explained(first, case.image) in self._inversions else method_of(first.method).walks
        callback = self._callback(progress, walks * first.steps + len(recipes) * taken)
        made = [self._outcome(case, recipe, edit, callback) for recipe in recipes]
        self.history.append(made)
        return made

    def _callback(self, progress: Progress, steps: int) -> Callback:
        taken = count(1)

        def after_step(index: int, timestep: int, latents: Tensor) -> None:
            progress(min(1.0, next(taken) / steps))
            if self._stop.is_set():
                raise CancelledError
            if not bool(torch.isfinite(latents).all()):
                raise ValueError(f"The model gave numbers that are not finite at step {index + 1}; lower the strength.")

        return after_step

    def _outcome(self, case: Case, recipe: Recipe, edit: Edit, callback: Callback) -> Outcome:
        key, pipe = _explained(recipe, case.image), self.pipes[recipe.model]
        if key not in self._inversions:
            inversion = recipe.invert(pipe, case.image, callback)
            self._inversions = {old: kept for old, kept in self._inversions.items() if old[1] == case.name}
            self._inversions[key] = inversion
        result = recipe.run(pipe, inversion=self._inversions[key], callback=callback)
        notices = case.notice, edit.note, unmeasured(recipe.model, edit, self.vocab), self._unheard(edit, recipe.model)
        scores = self._scores(case, edit, result, recipe)
        return Outcome(case, recipe, edit, result, scores, " ".join(filter(None, notices)))

    def _unheard(self, edit: Edit, model: str) -> str:
        """That the model hardly tells apart two sides or kinds of device of which the edit names one, or nothing."""
        if Path(model).name == FILMS:  # it removes all kinds alike, and `film-kinds` tells them apart
            return ""
        for name in map(self.vocab.phrase, (*edit.remove, *edit.add, *edit.keep)):  # a side is no word of captions
            for other in self.vocab.details.get(self.vocab.owners.get(name, ""), ()):
                if other != name and told_apart(self.pipes[model], name, other, self.vocab.subject) < HEARD:
                    return f"To {model}, {name} and {other} read almost the same: the image may show either."
        return ""

    def _scores(self, case: Case, edit: Edit, result: Counterfactual, recipe: Recipe) -> dict[str, float]:
        image, factual = result.image[None].cpu(), case.image
        scores = dict(result.scores) | {"ssim": metrics.ssim(image, factual).item()}
        scores |= {f"reads {label}": value for label, value in self._readings(image, recipe.model).items()}
        if case.name.startswith("phantom:") and edit.attributes and patients.SETTABLE.issuperset(edit.attributes):
            truth, changed = patients.counterfactual(phantom_patient(case.name), image.shape[-1], **edit.attributes)
            if bool(changed.any()):
                scores["true_error_ratio"] = metrics.true_error_ratio(image, truth, factual, changed).item()
        return scores


def list_images(folder: Path) -> list[str]:
    """The images of a prepared folder's test split, or all in a folder that has no table, below it too."""
    if (folder / INFO).is_file() or not folder.is_dir():
        return list(load_table(folder, "test")["file_name"])
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise Fault("image", f"{folder} is not a prepared data set and has no images ({ACCEPT}).")
    return found


def _explained(recipe: Recipe, image: Tensor) -> tuple[str, str, str, str, str, int]:
    """What an inversion depends on; a file may hold another image than before."""
    return recipe.model, recipe.image, image_hash(image), recipe.source, recipe.method, recipe.steps


def sentence(error: BaseException) -> str:
    """An exception as one sentence for a person: its first line, without a traceback."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "There is not enough memory for this: close other notebooks or take a smaller model."
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    if said.endswith((".", "!", "?")):
        return said  # it was written as a sentence, and may begin with the name of a file
    return f"{said[:1].upper()}{said[1:]}."


@contextmanager
def _faults_of(control: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise Fault(control, sentence(error)) from None
