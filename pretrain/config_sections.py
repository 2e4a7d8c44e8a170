"""The sections of a run's configuration besides ``model``: each field with its unit, meaning and key class."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal
from urllib.parse import unquote

from pydantic import Field, field_validator, model_validator

from pretrain.config_base import Identity, Operational, Trajectory
from stoker.errors import Refusal
from stoker.secrets import MASK
from stoker.sections import Section

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Moment = Annotated[float, Field(ge=0, lt=1)]


#: ``name:password@`` in the name of a container image, with a scheme or without; a path on the node has none.
_PASSWORD = re.compile(r"^(?!/[^/]|\.\.?/)(?:[a-z][a-z0-9+.-]*://)?+[^@]*:[^@]*@", re.DOTALL | re.IGNORECASE)
#: The end of an image that is named by its content: ``@sha256:1f3a...`` (OCI image specification 1.1, digests).
_DIGEST = re.compile(r"@[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-fA-F]{32,}$")


def shows_password(image: str) -> bool:
    """The name of a container image holds a password."""
    return _PASSWORD.search(_DIGEST.sub("", unquote(image))) is not None


class RunSection(Section):
    name: Operational[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]]
    """Name of the run and of its directory: letters, digits, dot, dash and underscore."""
    dir: Operational[str] = "runs"
    """Directory that holds the run directories."""
    seed: Identity[Annotated[int, Field(ge=0, lt=2**63)]] = 0
    """Seed of first values and of the data order."""
    steps: Trajectory[Count]
    """Length of the run, in steps; the schedule ends with it."""
    dtype: Identity[Literal["float64", "float32", "bfloat16"]] = "float32"
    """Of parameters and activations; bfloat16 keeps float32 masters and reductions."""
    resume: Operational[Literal["auto", "never"] | Annotated[int, Field(ge=0)]] = "auto"
    """auto: from the newest committed checkpoint if there is one; never: from step 0; a step: from that checkpoint."""
    allow_change: Operational[tuple[str, ...]] = ()
    """Trajectory keys that may differ from the run so far, by name or by section: [train.lr, train.schedule]."""
    deterministic: Operational[bool] = True
    """Bit-equal repetition on one layout; on CUDA it costs speed and asserts its preconditions."""
    kernels: Trajectory[dict[str, str]] = Field(default={})
    """Implementations to run instead of the fastest: {operator: name}, as python -m kernels.selfcheck names them."""
    gc_every: Operational[Count | None] = None
    """Steps between collections of Python's garbage, all ranks together; null: Python decides."""


class DataSection(Section):
    blend: Trajectory[Annotated[dict[str, Positive], Field(min_length=1)]]
    """Token stores and their weights, in any unit: {path of a store: weight}. The data log's first entry."""
    seq_len: Trajectory[Count]
    """Targets in a window, in tokens; also in the data log."""
    tokenizer: Identity[str | None] = None
    """Path of tokenizer.json; null: the one that the stores were written with."""
    heldout: Operational[dict[str, str]] = Field(default={})
    """Stores of documents that are never trained on: {domain: path}."""


class OptimizerSection(Section):
    kind: Literal["adamw"] = "adamw"
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""
    betas: tuple[Moment, Moment] = (0.9, 0.95)
    """Decay of the first and second moment, a step."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Share of a weight lost per step and unit of learning rate; never on norms, biases, A_log, dt_bias."""
    decay_embedding: bool = False
    """Weight decay on the embedding and the head too."""


class ScheduleSection(Section):
    """Learning rate as a share of ``train.lr``: a linear rise over ``warmup_steps``, then ``kind``.

    A run shorter than its warm-up and decay together is the smaller of the two lines: it never reaches the peak.
    """

    kind: Literal["wsd", "cosine"] = "wsd"
    """wsd: flat, then a line down that ends with the run; cosine: half a cosine that starts after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps from zero to the peak."""
    decay_steps: Count | None = None
    """Steps from the peak to the floor; null: a fifth of the run for wsd (arXiv 2405.18392), all that follow the
    warm-up for cosine."""
    min_ratio: Fraction = 0.0
    """The floor, as a share of the peak."""

    def multiplier(self, step: int, steps: int) -> float:
        """Share of the peak at ``step``, counted from 0, of a run of ``steps``."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.kind == "wsd":
            span = self.decay_steps or max(1, steps // 5)
            progress, fall = (step - (steps - span)) / span, lambda x: 1.0 - x
        else:
            span = self.decay_steps or max(1, steps - self.warmup_steps)
            progress, fall = (step - self.warmup_steps) / span, lambda x: (1.0 + math.cos(math.pi * x)) / 2.0
        return min(rise, self.min_ratio + (1.0 - self.min_ratio) * fall(min(1.0, max(0.0, progress))))


class TrainSection(Section):
    global_batch: Trajectory[Count]
    """Sequences a step, over all ranks."""
    micro_batch: Operational[Count] = 1
    """Sequences that a data-parallel rank runs at once; the curve does not depend on it."""
    lr: Trajectory[Positive]
    """Peak learning rate."""
    optimizer: Trajectory[OptimizerSection] = OptimizerSection()
    schedule: Trajectory[ScheduleSection] = ScheduleSection()
    clip: Trajectory[Positive | None] = 1.0
    """Largest global gradient norm, longer gradients are scaled down to it; null: none."""
    skip_limit: Operational[Count] = 10
    """Steps in a row that may be skipped for a non-finite loss or gradient; one more stops the run."""

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainSection:
        if self.global_batch % self.micro_batch:
            divisors = [n for n in range(1, self.global_batch + 1) if self.global_batch % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.micro_batch))
            raise Refusal(
                f"micro_batch={self.micro_batch} does not divide global_batch={self.global_batch}: "
                f"the nearest that does is {nearest}"
            )
        return self


class ParallelSection(Section):
    """Degrees of each axis. An axis not named is 1; data parallelism takes the ranks that remain."""

    tp: Count = 1
    """Tensor: heads, hidden widths and vocabulary."""
    cp: Count = 1
    """Context: parts of a window."""
    pp: Count = 1
    """Pipeline: groups of layers."""
    vpp: Count = 1
    """Chunks of layers that a pipeline rank interleaves."""
    ep: Count = 1
    """Experts over ranks."""
    etp: Count = 1
    """Tensor parallelism inside an expert."""
    sequence_parallel: bool = False
    """Norms and residuals split over the tensor ranks along the sequence."""
    zero: Literal[0, 1] = 1
    """1: optimizer state split over the data-parallel ranks; 0: replicated."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in backward: none, those of the cheap operators, or whole layers."""
    stages: tuple[Count, ...] | None = None
    """Layers of each of the pp*vpp chunks, in order; null: balanced."""


class CheckpointSection(Section):
    every: Count | None = None
    """Steps between checkpoints; null: only the last step's."""
    keep_last: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: Count | None = None
    """Checkpoints of steps that it divides are kept for good; null: none are."""
    asynchronous: bool = False
    """Write while training goes on."""

    @field_validator("asynchronous")
    @classmethod
    def _synchronous(cls, value: bool) -> bool:
        if value:
            raise Refusal("true is not built yet (saves are synchronous): leave it false")
        return value


class EvalSection(Section):
    every: Count | None = None
    """Steps between evaluations on data.heldout; null: only after the last step."""
    windows: Count = 64
    """Held-out windows of seq_len tokens, each domain."""


class LogSection(Section):
    every: Count = 10
    """Steps between lines of progress where there is no terminal; metrics.jsonl has every step."""
    quiet: bool = False
    """No progress on the console."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases; auto: online if WANDB_API_KEY is set, offline otherwise."""
    wandb_project: Annotated[str, Field(min_length=1)] = "stoker"
    """Project that W&B files the run under."""


class GuardSection(Section):
    """What is done about numbers that are wrong. Every decision is taken on all ranks alike."""

    spike: Trajectory[Literal["off", "skip", "rewind", "stop"]] = "off"
    """A loss or gradient norm far above the steps before it: apply it all the same; skip the step; go back to the
    newest checkpoint before it and pass over its batch; or stop."""
    spike_score: Trajectory[Positive] = 8.0
    """Robust z-score from which it is one: distance above what the window leads to expect, in deviations (1.4826 MAD
    or more: pretrain/guards/spikes.py)."""
    spike_window: Trajectory[Annotated[int, Field(ge=16)]] = 128
    """Applied steps that it is compared with; none is found in the first quarter of a window."""
    max_rewinds: Operational[Count] = 3
    """Rewinds without a new checkpoint in between; one more stops the run."""
    recompute: Operational[bool] = True
    """Before a spike is believed, its step is computed again: another result means hardware, and the second counts."""
    hash_every: Operational[Count | None] = 100
    """Steps between comparisons of what several ranks hold alike, which precede every checkpoint too; null: none."""
    slow_ratio: Operational[Annotated[float, Field(gt=1)]] = 1.3
    """A rank that takes so many times the work time of its peers, over twenty steps, is named."""


class LaunchSection(Section):
    """How a run is started, watched and started again (``stoker train`` and ``stoker launch``)."""

    max_restarts: Annotated[int, Field(ge=0)] = 100
    """Restarts after faults; two like failures at one step stop a run before."""
    warm_spares: bool = True
    """A process for each rank that has imported everything and waits, so that a restart does not pay for it."""
    spare_nodes: Annotated[int, Field(ge=0)] = 0
    """Nodes asked for beyond those that train, to replace one that is lost."""
    grace_s: Positive = 60.0
    """Seconds from being asked to end until the ranks are killed: an urgent checkpoint must fit."""
    hang_s: Positive | None = None
    """Seconds without progress that are a hang; null: from the run's own steps (three times their 99th percentile).
    While a rank starts, loads or ends 600 are, whatever is said here."""
    scratch: Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]*$")] | None = None
    """Folder on each node for caches and node-local files; null: the system's."""
    network_interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]+$")] | None = None
    """Interface that ranks meet on (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); null: the library chooses."""
    container: str | None = None
    """Image that a node runs: of pyxis/enroot on Slurm, of the pod on Kubernetes."""
    mounts: tuple[str, ...] = ()
    """Folders that a container sees: HOST:CONTAINER or HOST:CONTAINER:ro; the run directory and the data must be."""
    partition: str | None = None
    """Slurm partition, or Kueue queue."""
    account: str | None = None
    """Slurm account."""
    time_limit_min: Count | None = None
    """Minutes that the scheduler gives the job; null: the partition's default."""
    signal_s: Count = 300
    """Seconds before the time limit at which the scheduler asks the run to save and be queued again."""
    namespace: str = "default"
    """Kubernetes namespace."""
    volume_claim: str | None = None
    """Kubernetes PersistentVolumeClaim that holds the run directory and the data, mounted at run.dir."""
    webhook: str | None = None
    """URL that is told of faults, restarts and the end; the value is masked in everything that is written."""

    @field_validator("container")
    @classmethod
    def _shows_no_password(cls, value: str | None) -> str | None:
        if value is not None and shows_password(value):
            raise Refusal(
                "it holds a password (and is not shown here): on Slurm credentials belong into enroot's .credentials "
                "file, on Kubernetes into a Secret that imagePullSecrets of the service account names"
            )
        return value

    @field_validator("webhook")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and value != MASK and not value.lower().startswith(("https://", "http://")):
            raise Refusal("it is no http or https address (and is not shown here: it may be a secret)")
        return value
