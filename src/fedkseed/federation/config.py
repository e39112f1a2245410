"""The settings of a federation: frozen, validated, the same words as flags, TOML keys and attributes."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedkseed.errors import ConfigError
from fedkseed.federation.aggregators import AGGREGATORS, Aggregator
from fedkseed.federation.algorithms import ALGORITHMS, Algorithm
from fedkseed.federation.contradictions import MIN_COHORT, check
from fedkseed.federation.envelope import LARGEST_CLIP, LARGEST_STEP, SMALLEST_CLIP, SMALLEST_STEP
from fedkseed.federation.objectives import CODE, OBJECTIVES, OWN, Objective, Scaling, objective_named
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.noise.families import FAMILIES
from fedkseed.privacy import DELTA, Privacy
from fedkseed.privacy.settings import ClipNorm, Delta, Epsilon, NoiseMultiplier, Unit

if TYPE_CHECKING:  # which cannot know the tables' names
    AlgorithmName: TypeAlias = str
    FamilyName: TypeAlias = str
    AggregatorName: TypeAlias = str
    OptimizerName: TypeAlias = str
else:
    AlgorithmName, FamilyName = Literal[tuple(ALGORITHMS)], Literal[tuple(FAMILIES)]
    AggregatorName, OptimizerName = Literal[tuple(AGGREGATORS)], Literal[tuple(OPTIMIZERS)]
Summation = Literal["ordered", "exact"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Step = Annotated[float, Field(ge=SMALLEST_STEP, le=LARGEST_STEP)]
"""A learning rate or probe distance."""
Count = Annotated[int, Field(ge=1)]


class FederationConfig(BaseModel):
    """What the server decides. Descriptions are the command line's help."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: AlgorithmName = Field(
        "fedkseed", description="One of: " + "; ".join(f"{row.name} ({row.about})" for row in ALGORITHMS.values()) + "."
    )
    num_rounds: Count = Field(40, description="Rounds of federated training.")
    fraction_train: Annotated[float, Field(gt=0, le=1)] = Field(
        0.05, description="Fraction of the clients that take part in a round (m)."
    )
    local_steps: Annotated[int, Field(ge=1, le=65535)] = Field(200, description="Steps that a client takes in a round (tau).")
    local_unit: Literal["steps", "epochs"] = Field(
        "steps", description="What --local-steps counts: steps, or passes over a client's own records."
    )
    batch_size: Annotated[int, Field(ge=1, le=65535)] = Field(1, description="Records in a step's batch.")
    lr: Step = Field(
        description="Learning rate; auto finds one, as fedkseed tune does (published with 1.3B and 3B parameters: 3e-7)."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the learning rate goes over the rounds."
    )
    eps: Step = Field(5e-4, description="Half the distance of the two probes of a two-point step.")
    directions: Annotated[int, Field(ge=1, le=1024)] = Field(
        1,
        description="With 1 a step has two probes along one seed, with n one-sided slopes along n seeds, on one batch, "
        "for n + 1 forward passes; of scores n pairs of probes.",
    )
    objective: str = Field(
        "loss",
        description="What is tuned on: "
        + "; ".join(f"{row.name} ({row.about})" for row in OBJECTIVES.values())
        + "; or PACKAGE:FUNCTION, of (record, answer), whose number is to rise.",
    )
    scaling: Scaling = Field(
        "z-scores", description="Of scores: what becomes of those of a step's probes before slopes are made of them."
    )
    temperature: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0, description="Of scores of answers: 0 answers greedily; else answers are drawn, the same draws for both probes."
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = Field(
        32, description="Of scores of answers: longest answer in tokens."
    )
    dpo_beta: Positive = Field(0.1, description="Of dpo: by how much margins are multiplied; small stays near the base model.")
    max_moved: Positive | None = Field(
        None, description="How far the model may go from its base (moved_rms in metrics.jsonl); beyond, it is pulled back."
    )
    num_seeds: Annotated[int, Field(ge=1, le=65536)] = Field(4096, description="Number of candidate seeds (K).")
    noise: FamilyName = Field(
        "hadamard", description="Perturbations: " + ", ".join(f"{row.name} ({row.about})" for row in FAMILIES.values()) + "."
    )
    weighting: Literal["examples", "equal"] = Field(
        "examples", description="A client's weight in a round: by its number of records, or equal."
    )
    loss_clip: Positive | None = Field(None, description="Drop a step whose two losses differ by more than this.")
    importance_clip: Positive = Field(
        1000.0, description="Of fedkseed-pro: a gradient counts in its seed's importance as if it were no larger than this."
    )
    importance_start: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="Of fedkseed-pro: the first entry of every seed's history."
    )
    lora_rank: Count = Field(8, description="Of fedit and fedit-sgd: rank of the adapters.")
    lora_alpha: Positive = Field(16.0, description="Of fedit and fedit-sgd: the adapters count alpha / rank times.")
    num_virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = Field(
        20, description="Of fedprompt and fedptuning: length of the soft prompt in tokens."
    )
    max_grad: Annotated[float, Field(gt=0, le=60000)] = Field(
        1e4, description="A projected gradient above this is dropped by the client and refused by the server."
    )
    max_value: Positive = Field(
        1e4, description="A reply with a larger number is refused, where replies are changes or tensors."
    )
    max_examples: Count = Field(10_000_000, description="A client that claims more records is refused.")
    max_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Largest weight of one reply in a round (default: twice an equal share; with --aggregator mean a half, of "
        "one or two replies no limit).",
    )
    aggregator: AggregatorName = Field(
        "clipped",
        description="How replies become one change: "
        + "; ".join(f"{row.name} ({row.about})" for row in AGGREGATORS.values())
        + ". All but mean bound each scalar too; with --secure-sums on it is mean.",
    )
    summation: Summation = Field(
        "ordered",
        description="How clients' numbers are added up: in the order of their names, or exactly, in any order and grouping, as "
        "edges do; the last bits differ.",
    )
    shared_seeds: Literal["off", "on"] = Field(
        "off",
        description="Of two-point algorithms: each client steps along seeds of its own, or all of a round along the same.",
    )
    min_replies: Count = Field(1, description="A round with fewer accepted replies is tried again, three times in all.")
    wire: Literal["float16", "float32", "int8", "int4", "int2", "sign"] = Field(
        "float16",
        description="Precision of what travels: float16 or float32; int8, int4, int2 or sign only with fedkseed-grad.",
    )
    rounds_per_page: Annotated[int, Field(ge=0)] = Field(
        0, description="Of fedkseed-grad: fresh directions every so many rounds; 0 keeps those of the first round."
    )
    basis: Literal["table", "coefficients"] = Field(
        "table",
        description="Of fedkseed-grad: which K numbers are sent and stepped on: what moves each weight, or the seeds' own.",
    )
    movement: Literal["absolute", "proportional"] = Field(
        "absolute", description="Of fedkseed-grad: weights move by a page's sum, or by the weight times it."
    )
    local_optimizer: OptimizerName = Field(
        "sgd", description="Of fedkseed-grad: the optimiser of a client's steps on the K numbers."
    )
    server_optimizer: OptimizerName = Field(
        "sgd", description="Of fedkseed-grad: the server's optimiser on the clients' mean change."
    )
    server_lr: Step = Field(
        1.0,
        description="Of fedkseed-grad: the server's rate; with adam and sign it must be given, and is how far a number moves, "
        "such as 1e-3.",
    )
    two_point_clients: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Of fedkseed-grad: share of the clients that cannot backpropagate and answer with scalars."
    )
    checkpointing: Literal["off", "on"] = Field(
        "off", description="Of fedkseed-grad: recompute activations in the backward pass: less memory, more time."
    )
    compile: Literal["off", "on"] = Field(
        "off",
        description="Of two-point algorithms: compile the forward pass; on a GPU a small model's takes half the time then.",
    )
    secure_sums: Literal["off", "on"] = Field(
        "off", description="The server learns the sum of a round's replies and none of them (docs/secure-sums.md)."
    )
    secure_clip: Annotated[float, Field(ge=SMALLEST_CLIP, le=LARGEST_CLIP)] = Field(
        1000.0, description="With --secure-sums on: a client's numbers are clipped to this."
    )
    dp: Unit | None = Field(
        None,
        description="Differential privacy: record, clients hide each of their records; client, the server, which is trusted, "
        "hides each client in what it publishes (docs/privacy.md).",
    )
    clip_norm: ClipNorm | None = Field(
        None, description="With --dp: longest vector that a record's slopes or gradient, or a client's change, counts as."
    )
    noise_multiplier: NoiseMultiplier | None = Field(
        None,
        description="With --dp: deviation of the noise over the clip norm (default: what makes --epsilon last for "
        "--num-rounds).",
    )
    epsilon: Epsilon | None = Field(None, description="With --dp: the budget; the run ends before it is exceeded.")
    delta: Delta | None = Field(None, description=f"With --dp: where epsilon is counted (default: {DELTA:g}).")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(42, description="Seed of everything random in the run.")

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which Python would take for a number
            raise ValueError("expected a number or a text, no truth value")
        return value

    @field_validator("objective")
    @classmethod
    def _is_objective(cls, value: str) -> str:
        if value not in OBJECTIVES and value != OWN and not CODE.fullmatch(value):
            raise ValueError(f"expected {', '.join(OBJECTIVES)}, or a function as PACKAGE:FUNCTION")
        return value

    @model_validator(mode="before")
    @classmethod
    def _sums_are_means(cls, settings: Any) -> Any:
        """What a secure sum allows is its default."""
        if isinstance(settings, dict) and settings.get("secure_sums") == "on":
            return {"aggregator": "mean", **settings}
        return settings

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        check(self)
        return self

    @property
    def privacy(self) -> Privacy | None:
        """The choice of differential privacy; None: none.

        Raises:
            ConfigError: the noise is to be found yet (`fedkseed.runs.privacy`).
        """
        if self.dp is None:
            return None
        if self.noise_multiplier is None:
            raise ConfigError(f"--dp is {self.dp} and the noise has not been found yet; give --noise-multiplier")
        delta = DELTA if self.delta is None else self.delta
        chosen = self.model_dump(include={"clip_norm", "noise_multiplier", "epsilon"})
        return Privacy.model_validate({"unit": self.dp, "delta": delta, **chosen})

    @property
    def facts(self) -> Algorithm:
        """What is to be known of the algorithm."""
        return ALGORITHMS[self.algorithm]

    @property
    def rule(self) -> Aggregator:
        """How replies become one change; of hidden clients the mean, which is clipped and noised by itself."""
        taken = self.facts.takes("aggregator") and self.dp != "client"
        return AGGREGATORS[self.aggregator if taken else "mean"]

    def largest_share(self, num_replies: int) -> float:
        """The largest weight of one of so many replies; an equal share is always allowed."""
        equal = 1 / max(num_replies, 1)
        if self.max_share is not None:
            return max(self.max_share, equal)
        return 2 * equal if self.rule.needs_each_reply else max(0.5, 2 * equal)

    @property
    def goal(self) -> Objective:
        """What is to be known of the objective."""
        return objective_named(self.objective)

    @property
    def passes_per_step(self) -> float:
        """What a local step costs in forward passes of a record, an answer being one; see `Algorithm`, and `directions`.

        Where some clients take two-point steps and the others gradients it is their mean.
        """
        passes = self.facts.passes_per_step - self.two_point_clients * (self.facts.sends == "changes")
        if not self.goal.smooth:
            passes = 2 * self.directions
        elif self.directions > 1:
            passes = self.directions + 1
        return 2 * passes if self.goal.pairs else passes

    @property
    def soft_prompt(self) -> int:
        """How many tokens of the model's context a soft prompt takes."""
        return self.num_virtual_tokens if self.facts.has_soft_prompt else 0

    @property
    def same_seeds(self) -> bool:
        """Whether all two-point clients of a round step along the same seeds.

        They do in secure sums: along seeds of its own, each would be alone in the sum of these.
        """
        return "on" in (self.shared_seeds, self.secure_sums)

    @property
    def min_cohort(self) -> int:
        """How many clients a round must ask at least."""
        return max(self.min_replies, MIN_COHORT if self.secure_sums == "on" else 1)

    def cohort_size(self, num_clients: int) -> int:
        """How many of the clients take part in a round: max(1, int(m N))."""
        return max(1, int(self.fraction_train * num_clients))
