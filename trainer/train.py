"""One training run: a recipe in, an adapter folder out. `train` reads as the list of what happens, in order.

Everything that can be refused is refused before a weight is read. Steps are the budget, never seconds.
Law: the bytes of the adapter depend on the recipe, the base and the machine, not on interruptions or on reporting.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Event
from typing import Any, Final, Literal

import torch
from datasets import Dataset as Table
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from trainer import checkpoint, export
from trainer.base import DEFAULT_MAX_LENGTH, OpenBase, choose_device, library_versions, open_base
from trainer.centroids import FEWEST_PROMPTS, Form, form_of, write_centroids
from trainer.data import Dataset, load_dataset
from trainer.encode import Encoded, encode_rows
from trainer.errors import Diverged, Interrupted, MethodUnfit, OutputExists, RecipeChanged
from trainer.head_loss import trainer_for
from trainer.method import Plan
from trainer.order import order
from trainer.progress import SILENT, Reporter, Step
from trainer.quantize import quantize_problems
from trainer.recipe import Recipe, changes, method_of, record
from trainer.servable import hub_problems
from trainer.tuner import Batches, Tuner, no_batches

Existing = Literal["refuse", "resume", "overwrite"]
Device = Literal["auto", "cpu", "cuda"]
RECORD: Final = "recipe.json"
BATCHES_READ: Final = 16  # by what is initialised from data
LOSSES_SHOWN: Final = 50  # times in a run that the loss is averaged and shown


@dataclass(frozen=True)
class Workshop:
    """How a run is carried out. Nothing here changes what comes out, save `device` and `threads` in the last bits."""

    existing: Existing = "refuse"  # what to do with a folder that is already there
    checkpoint_steps: int = 200
    threads: int | None = None  # None: as many as torch chooses, which is all cores
    device: Device = "auto"


@dataclass(frozen=True)
class TrainResult:
    folder: Path
    recipe: Mapping[str, Any]  # as in recipe.json
    metrics: Mapping[str, float]  # as in metrics.json
    parameters: int  # trained
    steps: int
    resumed_at: int  # the step at which this process began
    train_s: float  # in this process


@dataclass(frozen=True)
class Lesson:
    """The rows of a run, encoded, and the order in which they are trained on."""

    train: Sequence[Encoded]
    held_out: Sequence[Encoded]
    order: Sequence[int]
    steps: int
    form: Form = "chat"


def train(
    recipe: Recipe,
    out: Path,
    *,
    workshop: Workshop = Workshop(),
    report: Reporter = SILENT,
    stop: Event | None = None,
) -> TrainResult:
    """Train an adapter and put its folder at `out`. Checkpoints lie in `<out>.run` until it is there.

    Raises: TrainError and its leaves; HubError if the base is not found. Interrupted when `stop` was set.
    """
    work = work_folder(out)
    refuse_what_is_there(out, work, workshop.existing)
    if workshop.threads is not None:
        torch.set_num_threads(workshop.threads)
    device = choose_device(workshop.device)
    base = open_base(recipe.base)
    plan = plan_of(recipe, base)
    check_method(recipe, base, plan)
    dataset = load_dataset(recipe)
    lesson = prepare(recipe, dataset, base, plan, report)
    settled = settle(recipe, dataset, plan, lesson.steps)
    check_servable(settled, base)
    start = open_work(work, settled, workshop.existing)
    model = adapted(settled, base, device, lambda: first_batches(settled, lesson, base, device))
    parameters = sum(value.numel() for value in model.parameters() if value.requires_grad)
    report.note(summary(settled, lesson, parameters, device, start))
    began = time.perf_counter()
    run_steps(model, settled, lesson, base, work, start, workshop, device, report, stop or Event())
    train_s = time.perf_counter() - began
    metrics = finish(model, settled, lesson, base, work, out, device, report)
    return TrainResult(
        folder=out,
        recipe=record(settled, library_versions()),
        metrics=metrics,
        parameters=parameters,
        steps=lesson.steps,
        resumed_at=checkpoint.step_of(start) if start else 0,
        train_s=train_s,
    )


def work_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.run")


def refuse_what_is_there(out: Path, work: Path, existing: Existing) -> None:
    if existing == "overwrite":
        return
    if out.exists():
        raise OutputExists(f"{out} is already there; --overwrite replaces it")
    if existing == "refuse" and checkpoint.checkpoints(work):
        raise OutputExists(
            f"{work} holds a run that did not finish; --resume goes on with it, --overwrite starts again"
        )


def plan_of(recipe: Recipe, base: OpenBase) -> Plan:
    """Settle the longest row: the recipe's, else what the base's context leaves beside any virtual tokens."""
    length = recipe.max_length
    if length is None:
        taken = getattr(recipe.options, "virtual_tokens", 0)
        context = base.anatomy.context
        room = DEFAULT_MAX_LENGTH if context is None else max(2, context - taken)
        length = min(DEFAULT_MAX_LENGTH, room)
    return Plan(max_length=length, gradient_checkpointing=recipe.gradient_checkpointing)


def check_method(recipe: Recipe, base: OpenBase, plan: Plan) -> None:
    problems = method_of(recipe).problems(recipe.options, base.anatomy, plan)
    if recipe.quantize is not None:
        problems += quantize_problems(recipe.method, recipe.options, base.anatomy, recipe.quantize)
    context = base.anatomy.context
    if context is not None and plan.max_length > context:
        problems.append(f"max_length {plan.max_length} is above the base's context of {context} tokens")
    if problems:
        raise MethodUnfit(recipe.method, recipe.base, list(dict.fromkeys(problems)))


def check_servable(recipe: Recipe, base: OpenBase) -> None:
    """Refuse what the hub would not take of the settled recipe."""
    problems = hub_problems(method_of(recipe).config(recipe.options, base.anatomy), base.folder)
    if problems:
        raise MethodUnfit(recipe.method, recipe.base, problems)


def prepare(recipe: Recipe, dataset: Dataset, base: OpenBase, plan: Plan, report: Reporter) -> Lesson:
    train_rows, held_out = (
        encode_rows(part.rows, base.tokenizer, max_length=plan.max_length, ends=base.ends)
        for part in (dataset.train, dataset.held_out)
    )
    for name, part in (("training", train_rows), ("held-out", held_out)):
        if part.too_long:
            report.note(f"{part.too_long} {name} rows are longer than {plan.max_length} tokens and were left out")
    strange = {row.end for row in train_rows.rows} - base.stops
    if strange:
        report.note(
            f"answers end with {base.tokenizer.decode(sorted(strange))}, at which {base.name} does not stop by itself: "
            "give it as a stop string when serving"
        )
    rows_per_step = recipe.rows_per_step
    steps = recipe.steps or math.ceil((recipe.epochs or 1) * len(train_rows.rows) / rows_per_step)
    lengths = [len(row.ids) for row in train_rows.rows]
    numbers = order(lengths, rows_per_step=rows_per_step, steps=steps, seed=recipe.seed)
    return Lesson(train_rows.rows, held_out.rows, numbers, steps, form_of(dataset.train.rows[0].content))


def settle(recipe: Recipe, dataset: Dataset, plan: Plan, steps: int) -> Recipe:
    """Replace what the recipe left open by what it came to, so that the record trains the same adapter again."""
    given_eval = recipe.eval_data is not None
    try:
        options = method_of(recipe).settled(recipe.options, steps)
    except ValueError as error:
        raise MethodUnfit(recipe.method, recipe.base, [str(error)]) from None
    return recipe.model_copy(
        update={
            "data": dataset.train.source,
            "eval_data": dataset.held_out.source if given_eval else None,
            "options": options,
            "steps": steps,
            "epochs": None,
            "max_length": plan.max_length,
        }
    )


def open_work(work: Path, recipe: Recipe, existing: Existing) -> Path | None:
    """Prepare the run's folder; return the checkpoint to start from, if there is one. Raises RecipeChanged."""
    if existing == "overwrite" and work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    written = work / RECORD
    now = record(recipe, library_versions())
    start = checkpoint.latest(work)
    if start is None:
        export.write_json(written, now)
        return None
    differences = changes(json.loads(written.read_text(encoding="utf-8")), now)
    if differences:
        raise RecipeChanged(work, differences)
    return start


def adapted(recipe: Recipe, base: OpenBase, device: torch.device, batches: Batches = no_batches) -> Any:
    """Load the base and put an untrained adapter on it."""
    model = base.load_weights(device, recipe.quantize)
    set_seed(recipe.seed)
    method = method_of(recipe)
    config = method.config(recipe.options, base.anatomy)
    return method.tuner().attach(model, config, batches)


def first_batches(
    recipe: Recipe, lesson: Lesson, base: OpenBase, device: torch.device
) -> Iterator[Mapping[str, torch.Tensor]]:
    """The batches of the first steps, in their order."""
    collate, size = method_of(recipe).tuner().collate, recipe.batch_size
    for start in range(0, min(len(lesson.order), size * BATCHES_READ), size):
        rows = [lesson.train[row] for row in lesson.order[start : start + size]]
        yield {name: tensor.to(device) for name, tensor in collate(rows, base.pad).items()}


def summary(recipe: Recipe, lesson: Lesson, parameters: int, device: torch.device, start: Path | None) -> str:
    origin = f"from step {checkpoint.step_of(start)}" if start else "from the start"
    held = f" in {recipe.quantize}" if recipe.quantize else ""
    return (
        f"{recipe.method} on {recipe.base}{held}: {parameters:,} parameters, {len(lesson.train)} rows "
        f"({len(lesson.held_out)} held out), {lesson.steps} steps of {recipe.rows_per_step} on {device.type}, {origin}"
    )


def run_steps(
    model: Any,
    recipe: Recipe,
    lesson: Lesson,
    base: OpenBase,
    work: Path,
    start: Path | None,
    workshop: Workshop,
    device: torch.device,
    report: Reporter,
    stop: Event,
) -> None:
    """Run TRL over the lesson, from the checkpoint on. Raises Interrupted, Diverged."""
    tuner = method_of(recipe).tuner()
    trainer = trainer_for(model)(
        model=model,
        args=arguments(recipe, lesson, work, workshop.checkpoint_steps, device),
        data_collator=lambda items: tuner.collate([lesson.train[item["row"]] for item in items], base.pad),
        train_dataset=Table.from_dict({"row": list(lesson.order)}),
        processing_class=base.tokenizer,
        callbacks=[Watch(lesson, recipe, report, stop), Steps(tuner)],
    )
    trainer.tuner = tuner
    trainer.remove_callback(PrinterCallback)
    model.train()
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    if trainer.state.global_step < lesson.steps:
        raise Interrupted(work, trainer.state.global_step, lesson.steps)


def arguments(recipe: Recipe, lesson: Lesson, work: Path, checkpoint_steps: int, device: torch.device) -> SFTConfig:
    args = SFTConfig(
        output_dir=str(work),
        max_steps=lesson.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        gradient_checkpointing=recipe.gradient_checkpointing,  # TRL's default is on
        bf16=False,  # TRL's default is on
        use_cpu=device.type == "cpu",
        optim="adamw_torch",
        train_sampling_strategy="sequential",  # the table is already in order
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are already encoded
        max_length=None,
        save_steps=checkpoint_steps,
        save_total_limit=checkpoint.KEPT,
        logging_steps=max(1, lesson.steps // LOSSES_SHOWN),
        logging_nan_inf_filter=False,  # it would hide a loss that is no number
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # with several visible GPUs transformers would wrap the model in DataParallel
    return args


class Watch(TrainerCallback):
    """Reports each step, stops the run when asked to, and when the loss is no longer a number."""

    def __init__(self, lesson: Lesson, recipe: Recipe, report: Reporter, stop: Event) -> None:
        lengths = [len(lesson.train[row].ids) for row in lesson.order]
        self._tokens = list(accumulate(lengths))[recipe.rows_per_step - 1 :: recipe.rows_per_step]
        self._recipe, self._report, self._stop = recipe, report, stop
        self._loss: float | None = None
        self._began = (0, 0.0)  # tokens, seconds
        self._started_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = self._tokens[state.global_step - 1] if state.global_step else 0
        self._began = (done, time.perf_counter())
        self._started_at = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state)  # of the step before, whose loss has been logged by now

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stop.is_set() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def _tell(self, state: Any) -> None:
        tokens, began = self._began
        if state.global_step > self._started_at:
            rate = (self._tokens[state.global_step - 1] - tokens) / (time.perf_counter() - began)
            self._report.step(Step(state.global_step, state.max_steps, self._loss, rate))

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self._loss = float(logs["loss"])
        if not math.isfinite(self._loss):
            raise Diverged(state.global_step, self._loss, self._recipe.learning_rate)


class Steps(TrainerCallback):
    """Tells the method what it may have to do around a step of the optimizer."""

    def __init__(self, tuner: Tuner) -> None:
        self._tuner = tuner

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tuner.before_step(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tuner.after_step(kwargs["model"], kwargs["optimizer"], state.global_step + 1)


def finish(
    model: Any,
    recipe: Recipe,
    lesson: Lesson,
    base: OpenBase,
    work: Path,
    out: Path,
    device: torch.device,
    report: Reporter,
) -> Mapping[str, float]:
    """Export, load back, measure, and put the folder in its place; the run's folder goes when it is there."""
    staging = work / "export"
    shutil.rmtree(staging, ignore_errors=True)  # of a process that died here
    staging.mkdir()
    tuner = method_of(recipe).tuner()
    tuner.save(model, staging, recipe.base)
    written = record(recipe, library_versions())
    method_of(recipe).beside(export.Finishing(staging, base, lesson.held_out, written, device))
    loaded = export.load_adapter(staging, base, device, recipe.quantize)
    metrics = export.measure(loaded, base, lesson.train, lesson.held_out, tuner.collate)
    export.write_golden(loaded, staging, base, export.golden_prompts(lesson.held_out), recipe.quantize)
    if method_of(recipe).found_by_prompts:
        with loaded.disable_adapter():
            centred = write_centroids(loaded, staging, base, [row.prompt for row in lesson.train], lesson.form)
        if not centred:
            report.note(
                f"fewer than {FEWEST_PROMPTS} different prompts: no centroids, so model auto will not choose it"
            )
    export.write_records(staging, written, metrics)
    export.publish(staging, out)
    shutil.rmtree(work)
    return metrics
